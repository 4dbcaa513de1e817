"""Grade a class, each folder in a folder a hand-in: `python -m grading --hand-ins FOLDER`.

Hand-ins are graded side by side, each in a process that takes one core. What was graded before is
graded again only if the hand-in, the rubric or the grader has changed since.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from grading.grade import (
    MODULE,
    NOTEBOOK,
    Grade,
    Result,
    Rubric,
    expected_tests,
    find_all,
    grade,
    grader_files,
    pictures,
    prepare,
    write,
)


def digest(folder: Path, rubric: Rubric) -> str:
    """Return a number that changes with the hand-in, the rubric and the grader."""
    module, notebook, others, _ = find_all(folder)
    files = {MODULE: module.read_bytes(), NOTEBOOK: notebook.read_bytes()}
    content = hashlib.sha256(repr(rubric).encode())
    for own in (grader_files(), others, files):
        for path, text in sorted(own.items()):
            content.update(f"{path} {len(text)} ".encode() + text)
    return content.hexdigest()


def read_grade(out: Path) -> dict:
    """Return grade.json of a hand-in, or nothing if there is none to be read."""
    try:
        return json.loads((out / "grade.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def grade_one(rubric: Rubric, expected: dict, out: Path, folder: Path) -> bool:
    """Grade a hand-in and write its files, unless they are there; return whether it was graded."""
    start, target, number = time.monotonic(), out / folder.name, ""
    try:
        number = digest(folder, rubric)
        if read_grade(target).get("digest") == number:
            return False
        graded = grade(find_all(folder), rubric, expected, 1)
    except (SystemExit, Exception) as error:  # the others are graded all the same
        graded = Grade([Result(c, False, str(error), 0.0) for c in rubric.criteria], [])
    write(target, graded, rubric.pass_mark, time.monotonic() - start, number)
    return True


def row_of(name: str, graded: dict) -> dict[str, object]:
    """Return a hand-in's line of grades.csv."""
    reasons = [*graded["notes"], *(c["why"] for c in graded["criteria"] if not c["passed"])]
    return {
        "name": name,
        **{c["id"]: c["got"] for c in graded["criteria"]},
        "total": graded["points"],
        "per cent": f"{100 * graded['points'] / graded['of']:.0f}",
        "passed": graded["passed"],
        "first reason": reasons[0] if reasons else "",
    }


def write_table(out: Path, names: list[str]) -> None:
    """Write grades.csv, a line for each of the hand-ins that are graded so far."""
    graded = {name: read_grade(out / name) for name in names}
    rows = [row_of(name, content) for name, content in graded.items() if content]
    with (out / "grades.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else ["name"])
        table.writeheader()
        table.writerows(rows)


def start_worker(temporary: str) -> None:
    """Leave Ctrl-C to the process that waits for all, and temporary files, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = temporary


def grade_class(folder: Path, out: Path | None, rubric: Rubric) -> str | None:
    """Grade all hand-ins of a folder; return a sentence if something keeps it from that."""
    if not out:
        return "Say where the grades go: OUT=folder."
    if not folder.is_dir():
        return f"There is no folder {folder}: name the one in which every folder is a hand-in."
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    folders = [path.absolute() for path in found if path.resolve() != out.resolve()]
    if not folders:
        return f"{folder} holds no folder: every hand-in has to be a folder in it."
    prepare()
    if any(c.notebook for c in rubric.criteria):
        pictures()  # once for all
    out.mkdir(parents=True, exist_ok=True)
    names, graded = [path.name for path in folders], []
    work = partial(grade_one, rubric, expected_tests(rubric.criteria), out.absolute())
    fork = multiprocessing.get_context("fork")
    start, note = time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="class-", ignore_cleanup_errors=True) as temporary:
        workers = min(os.cpu_count() or 1, len(folders))
        try:
            with fork.Pool(workers, start_worker, (temporary,)) as pool:
                results = pool.imap_unordered(work, folders)
                for new in tqdm(results, "hand-ins", len(folders), disable=False):
                    graded.append(new)
                    write_table(out, names)
        except KeyboardInterrupt:
            note = " Stopped: the same command grades the others."
        write_table(out, names)
    kept, minutes = graded.count(False), (time.monotonic() - start) / 60
    print(
        f"{graded.count(True)} of {len(folders)} hand-ins graded in {minutes:.1f} min, "
        f"{kept} unchanged since they were graded. See {out / 'grades.csv'}.{note}"
    )
    return None
