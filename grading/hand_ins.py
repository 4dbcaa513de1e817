"""Grade a class, each folder in a folder a hand-in: `python -m grading --hand-ins FOLDER`.

Hand-ins are graded side by side, each in a process that takes one core. What was graded before is
graded again only if the hand-in, the rubric or the grader has changed since.
"""

import hashlib
import json
import multiprocessing
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from grading import grade as grader


def read_grade(out: Path) -> dict:
    """Return grade.json of a hand-in, or nothing if there is none to be read."""
    try:
        return json.loads((out / "grade.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def grade_one(rubric: grader.Rubric, expected: dict, out: Path, folder: Path) -> bool:
    """Grade a hand-in and write its files, unless they are there; return whether it was graded."""
    start, target, digest = time.monotonic(), out / folder.name, ""
    try:
        hand_in = grader.read_hand_in(folder)
        judging = repr((rubric, grader.grader_files(), hand_in))
        digest = hashlib.sha256(judging.encode()).hexdigest()
        if read_grade(target).get("digest") == digest:
            return False
        graded = grader.grade(hand_in, rubric, expected, workers=1)
    except (SystemExit, Exception) as error:  # the others are graded all the same
        results = [grader.Result(c, False, str(error), 0.0) for c in rubric.criteria]
        graded = grader.Grade(results, [], rubric.pass_mark)
    grader.write(target, graded, time.monotonic() - start, digest)
    return True


def row_of(name: str, graded: dict) -> dict[str, object]:
    """Return a hand-in's line of grades.csv."""
    reasons = [*graded["notes"], *(c["why"] for c in graded["criteria"] if not c["passed"]), ""]
    reasons.sort(key=lambda why: why.startswith("Of "))  # the quiz takes no points
    return {
        "name": name,
        **{c["id"]: c["got"] for c in graded["criteria"]},
        "total": graded["points"],
        "per cent": round(100 * graded["points"] / graded["of"]),
        "passed": graded["passed"],
        "first reason": reasons[0],
    }


def write_table(out: Path, names: list[str]) -> None:
    """Write grades.csv, a line for each of the hand-ins that are graded so far."""
    graded = {name: read_grade(out / name) for name in names}
    rows = [row_of(name, content) for name, content in graded.items() if content]
    pd.DataFrame(rows).to_csv(out / "grades.csv", index=False)


def start_worker(temporary: str) -> None:
    """Leave Ctrl-C to the process that waits for all, and temporary files, too."""
    multiprocessing.current_process().daemon = False  # a hand-in may start processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = temporary


def grade_class(folder: Path, out: Path | None, rubric: grader.Rubric) -> str | None:
    """Grade all hand-ins of a folder; return a sentence if something keeps it from that."""
    if not out:
        return "Say where the grades go: OUT=folder."
    if not folder.is_dir():
        return f"There is no folder {folder}: name the one in which every folder is a hand-in."
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    folders = [path.absolute() for path in found if path.resolve() != out.resolve()]
    if not folders:
        return f"{folder} holds no folder: every hand-in has to be a folder in it."
    grader.prepare()
    if any(c.notebook for c in rubric.criteria):
        grader.pictures()  # once for all
    out.mkdir(parents=True, exist_ok=True)
    names, graded = [path.name for path in folders], []
    work = partial(grade_one, rubric, grader.expected_tests(rubric.criteria), out.absolute())
    start, note, fork = time.monotonic(), "", multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="class-", ignore_cleanup_errors=True) as temporary:
        try:
            with fork.Pool(None, start_worker, (temporary,)) as pool:
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
