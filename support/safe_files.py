"""Write files that survive a crash, read damaged ones, and keep a folder to one process.

A file of its own, since nothing here is about segmentation; `petseg_utils` passes on what the
notebooks use. Nothing else in this project writes a result. (Tensors have `tensor_files`, so that
this loads without torch.)
"""

import atexit
import csv
import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from support.parameters import InputError, brief, reason


def write_atomically(path: Path, write: Callable[[io.BytesIO], object]) -> None:
    """Let `write` fill a buffer, then put it at `path`: readers see the old file or the new.

    That holds after a loss of power, too. Errors: `InputError` if the disk refuses; the old file is
    kept then.
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
        sync_folder(path.parent)
    except OSError as error:
        what = "make room, or another place, for it"
        raise InputError(f"{path} cannot be written ({reason(error)}): {what}.") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring to the disk what was renamed in a folder, where the system lets a program do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def read_text(path: Path) -> str:
    """Return a text in UTF-8, in UTF-16 with its mark, or else in Latin-1. Errors: `InputError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): put it there again.") from None
    if data[:2] == b"\x1f\x8b":
        raise InputError(f"{path} is compressed with gzip from its line 1 on: unpack it.")
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ["utf-16"] if marked else ["utf-8-sig", "latin-1"]:
        with suppress(UnicodeDecodeError):
            return data.decode(encoding)
    raise InputError(f"{path} is no text from its line 1 on: save it again, in UTF-8.")


def read_names(path: Path) -> dict[str, int]:
    """Return the names of files that a text lists, one a line, each with its line's number.

    A line may have up to three numbers after the name; what begins with # is a comment. Errors:
    `InputError` for a name twice, and for what can't be part of a file's name here, or would lead
    to another folder.
    """
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name = re.fullmatch(r"(.+?)(\s+\d+){0,3}", line)[1]
        if not re.fullmatch(r"\w[\w .+-]*", name) or len(name.encode()) > 250:
            what = f"{brief(name)}, which is no name of an image: correct it"
            raise InputError(f"{path} has in line {number} {what}.")
        if name in names:
            lines = f"in lines {names[name]} and {number}"
            raise InputError(f"{path} has {name} twice, {lines}: remove one.")
        names[name] = number
    return names


PATIENCE = 10  # seconds that a lock waits for a process that may be about to end


def lock(path: Path) -> None:
    """Lock a file until this process ends, however it ends.

    A process that was just stopped takes some seconds to end, which are waited for. Errors:
    filelock's `Timeout` if another one holds the lock.
    """
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
