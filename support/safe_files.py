"""Write files that survive a crash, as all results here, and keep a folder to one process."""

import atexit
import csv
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from support.parameters import InputError, reason

PATIENCE = 10  # seconds that a lock waits: a process that was just stopped takes some to end


def write_atomically(path: Path, write: Callable[[io.BytesIO], object]) -> None:
    """Let `write` fill a buffer, then put it at `path`: readers see the old file or the new.

    So they do after a loss of power. Errors: `InputError` if the disk refuses: the old file stays.
    """
    buffer = io.BytesIO()  # so that only one line below can meet a full disk, whoever writes
    write(buffer)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        with suppress(OSError):  # some systems let no program bring a folder to the disk
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        what = "make room, or another place, for it"
        raise InputError(f"{path} cannot be written ({reason(error)}): {what}.") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys as a table with a header. Errors: as in `write_atomically`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(table.getvalue().encode()))


def git_name(path: Path) -> str:
    """Return git's name of a file's content, which `git log --find-object=NAME` finds."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lock(path: Path) -> None:
    """Lock a file until this process ends, however it ends. Errors: filelock's `Timeout`."""
    own = FileLock(path, is_singleton=True)  # one for all calls of a process
    try:
        own.acquire(timeout=0)
    except Timeout:
        told = f"another run is writing to {path.parent}: waiting {PATIENCE} seconds for its end"
        print(told, file=sys.stderr)
        own.acquire(timeout=PATIENCE)
    atexit.register(own.release)


def own_folder(folder: Path, room: int) -> None:
    """Make a folder that this process alone may write to, with room for so many bytes.

    Drafts of processes that were killed are removed. Errors: `InputError` if the folder is in use,
    can't be written to, or lies on a disk that is too full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder / ".lock")
        for draft in folder.rglob(".*.draft"):
            draft.unlink()
        free = shutil.disk_usage(folder).free
    except Timeout:
        what = "wait for it, shut down its kernel, or choose another RUN_NAME"
        raise InputError(f"another run is writing to {folder}: {what}.") from None
    except (OSError, ValueError) as error:
        why = f"{folder} cannot be written to ({reason(error)})"
        raise InputError(f"{why}: change its rights, or RUN_NAME.") from None
    if free < room:
        need = f"the run needs {room / 1e6:,.0f} MB on the disk of {folder}"
        there = f"{free / 1e6:,.0f} MB are free"
        raise InputError(f"{need}, where {there}: make room, or BASE_CHANNELS smaller.")
