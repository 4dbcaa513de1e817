"""Grade a hand-in by the rubric: `python -m grading.grade --hand-in FOLDER --out FOLDER [--quick]`.

The hand-in's petseg_utils.py and notebooks/pet_segmentation.ipynb are copied beside the grader's
own everything else, afresh for every criterion, whose tests run in a process of their own. This
process never imports the hand-in; it counts the tests of every criterion with its own module, and a
test that is missing, skipped or silent scores nothing.
"""

import argparse
import importlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch

from grading.sandbox import Job, Outcome, run_jobs

ROOT = Path(__file__).resolve().parent.parent
MODULE, NOTEBOOK = Path("petseg_utils.py"), Path("notebooks/pet_segmentation.ipynb")
HEAVY = (
    "matplotlib.pyplot",
    "pydantic.main",
    "sklearn.metrics",
    "torchvision.datasets",
    "torchvision.transforms.v2",
)
CANARY = "grading/canary.py"
LIMIT = 60  # for a criterion that doesn't say otherwise
LARGEST = 50 * 2**20  # bytes of a file handed in
SETTINGS = {
    "MPLBACKEND": "Agg",
    "TQDM_DISABLE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "OMP_NUM_THREADS": "1",
}


def prepare() -> None:
    """Import here, once, what every criterion's process needs: they are forked from this one and have it at once."""
    os.environ |= SETTINGS
    os.environ.setdefault("GRADED_SEED", str(secrets.randbelow(2**31)))  # of tests/drawn.py
    sys.dont_write_bytecode = True
    for name in HEAVY:
        importlib.import_module(name)


class Criterion(NamedTuple):
    """A row of the rubric."""

    id: str
    points: int
    sentence: str
    tests: list[str]
    notebook: bool = False
    hint: str = ""
    seconds: float = LIMIT


class Result(NamedTuple):
    """What a hand-in got for a criterion, and why not all of it."""

    criterion: Criterion
    passed: bool
    why: str
    seconds: float


class Rubric(NamedTuple):
    """The criteria, the pass mark in per cent of the points, and the limit for all of them in seconds."""

    criteria: list[Criterion]
    pass_mark: float
    seconds: float


def read_rubric(quick: bool = False) -> Rubric:
    """Read the rubric; `quick` leaves out the criteria of the notebook."""
    content = tomllib.loads((ROOT / "grading" / "rubric.toml").read_text())
    criteria = [Criterion(**row) for row in content["criterion"]]
    return Rubric(
        [c for c in criteria if not (quick and c.notebook)],
        content["pass_mark"],
        content["seconds"],
    )


# ------------------------------------------------------------------- staging


def find(hand_in: Path, file: Path) -> Path:
    """Return the hand-in's file, or the project's own for one that it lacks. Errors: SystemExit for an odd one."""
    path = hand_in / file
    if path.is_symlink() or path.parent.resolve() != hand_in.resolve() / file.parent:
        sys.exit(f"{path} is a link: hand in the file itself.")
    if not path.exists():
        return ROOT / file
    if not path.is_file() or path.stat().st_size > LARGEST:
        sys.exit(f"{path} is no file of at most {LARGEST // 2**20} MiB: hand in the file itself.")
    return path


def copy_around_notebooks(folder: Path) -> None:
    """Copy into a folder what lies beside the project's notebooks, but no notebook."""
    shutil.copytree(
        ROOT / "notebooks",
        folder / "notebooks",
        ignore=shutil.ignore_patterns("*.ipynb", ".*", "__*"),
    )


def stage(folder: Path, module: Path, notebook: Path | None = None) -> Path:
    """Copy all that a criterion needs into a new folder: the grader's own, one module and perhaps one notebook."""
    own = [
        path for name in (".", "support", "tests", "grading") for path in (ROOT / name).glob("*.py")
    ]
    files = {path.relative_to(ROOT): path for path in (*own, ROOT / "pyproject.toml")} | {
        MODULE: module
    }
    if notebook:
        copy_around_notebooks(folder)
        files[NOTEBOOK] = notebook
    for target, source in files.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_bytes(source.read_bytes())
    return folder


# ---------------------------------------------------------- running pytest, in a process of its own


class Reporter:
    """A plugin of pytest that reports what was collected, what began and how it ended."""

    def __init__(self, report: Callable[[dict], None]) -> None:
        self.report = report

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.report({"collected": [item.nodeid for item in session.items]})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            last = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")][
                -1:
            ]
            self.report({"broken": last[0].lstrip("E ") if last else "an error"})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.report({"started": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = str(crash.message if crash else report.longrepr or "").strip().splitlines()
        outcome = "xpassed" if hasattr(report, "wasxfail") else report.outcome
        self.report(
            {"test": report.nodeid, "outcome": outcome, "why": lines[0][:300] if lines else ""}
        )


def run_pytest(
    folder: Path, tests: list[str], report: Callable[[dict], None], *options: str
) -> None:
    """Run tests in a staged folder."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.path[:1] = [str(folder)]
    options = (*options, "-c", "pyproject.toml", "-p", "no:cacheprovider", "-s", "-q", "--color=no")
    options = (*options, "-p", "no:unraisableexception")  # it collects garbage, for half a second
    run = pytest.main  # before a hand-in can replace it
    try:
        module = Path(importlib.import_module("petseg_utils").__file__)
    except BaseException as error:  # SystemExit is one, too
        return report({"broken": f"{type(error).__name__}: {error}"[:300]})
    run([*options, *tests], plugins=[Reporter(report)])
    report({"module handed in": module == folder / MODULE})


def plain(why: str) -> str:
    """Return pytest's reason in the words of the rubric's tests: expected, found."""
    why = why.removeprefix("AssertionError: ").removeprefix("Failed: ")
    if why.startswith("DID NOT RAISE "):
        return f"expected an {why.removeprefix('DID NOT RAISE ')}, found none"
    if why.startswith("assert "):
        return f"expected a check to hold, found {why}"
    return (
        f"expected no error, found {why}"
        if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", why)
        else why
    )


def judge(criterion: Criterion, expected: list[str], outcome: Outcome) -> Result:
    """Turn what a process reported into a verdict with its reason."""
    verdicts = {
        r["test"]: r for r in outcome.reports if r.get("outcome") != "passed" and "test" in r
    }
    passed = {r["test"] for r in outcome.reports if r.get("outcome") == "passed"} - set(verdicts)
    started = [r["started"] for r in outcome.reports if "started" in r]
    broken = [r["broken"] for r in outcome.reports if "broken" in r]
    failed = [nodeid for nodeid in expected if nodeid in verdicts]
    canaries = [nodeid for nodeid in started if nodeid.startswith(CANARY)]
    where = started[-1] if started else "the import of petseg_utils"
    if broken:
        why = f"the module or its tests can't be loaded: {broken[0]}"
    elif failed:
        first = verdicts[failed[0]]
        why = f"{'' if first['outcome'] == 'failed' else first['outcome'] + ', '}{plain(first['why'])} ({failed[0]})"
    elif outcome.end == "killed":
        why = f"it took longer than {outcome.seconds:.0f} s or reported too much, and was stopped in {where}"
    elif outcome.end == "stopped":
        why = f"its process ended in {where}, before all tests were done"
    elif missing := [nodeid for nodeid in expected if nodeid not in passed]:
        why = f"{len(missing)} of {len(expected)} tests gave no verdict, first {missing[0]}"
    elif not canaries or any(nodeid in passed for nodeid in canaries):
        why = "a test that must fail passed: the hand-in changes how it is judged"
    elif {"module handed in": True} not in outcome.reports:
        why = "the module that was tested is not the one handed in"
    else:
        return Result(criterion, True, "", outcome.seconds)
    return Result(criterion, False, why, outcome.seconds)


def expected_tests(criteria: list[Criterion]) -> dict[str, list[str]]:
    """Return the node ids of each criterion's tests, as collected with the project's own module."""
    tests = sorted({test for criterion in criteria for test in criterion.tests})
    with tempfile.TemporaryDirectory() as temporary:
        folder = stage(Path(temporary).resolve(), ROOT / MODULE)
        files = sorted(
            {test.partition("::")[0] for test in tests}
        )  # by name, one that is absent would hide all others
        job = Job(
            "collect", lambda report: run_pytest(folder, files, report, "--collect-only"), LIMIT
        )
        reports = run_jobs([job], [], 1, LIMIT)["collect"].reports
    if broken := [report["broken"] for report in reports if "broken" in report]:
        sys.exit(f"{ROOT / MODULE} or its tests can't be loaded: {broken[0]}")
    ids = next((report["collected"] for report in reports if "collected" in report), [])
    found = {
        test: [nodeid for nodeid in ids if nodeid == test or nodeid.startswith(f"{test}[")]
        for test in tests
    }
    if absent := [test for test in tests if not found[test]]:
        sys.exit(f"rubric.toml names {absent[0]}, which is not there.")
    return {c.id: [nodeid for test in c.tests for nodeid in found[test]] for c in criteria}


# ------------------------------------------------------------------- grading


def plan(
    threads: int, folder: Path, module: Path, notebook: Path, criteria: list[Criterion]
) -> list[Job]:
    """Return the jobs that grade a hand-in in `folder`: one for every criterion, named by its
    folder.

    The last one, strict nbval, takes by far the longest, and may have `threads`.
    """
    run, stored = folder / "run", folder / "stored"
    jobs = []
    if any(c.notebook for c in criteria):
        from grading.notebook import SECONDS, execute  # the student edition does without

        jobs.append(
            Job(str(run), lambda report: execute(stage(run, module, notebook), report), SECONDS)
        )

    def work(c: Criterion, report: Callable[[dict], None]) -> None:
        own = stage(folder / c.id, ROOT / MODULE if c.notebook else module)
        if c.notebook:
            os.environ |= {
                "GRADED_RUN": str(run),
                "GRADED_STORED": str(stored),
                "OMP_NUM_THREADS": str(threads),
            }
            if not stored.exists():
                stage(stored, module, notebook)
        run_pytest(own, [*c.tests, CANARY], report)

    for c in criteria:
        after = str(run) if c.notebook else ""
        jobs.append(Job(str(folder / c.id), lambda report, c=c: work(c, report), c.seconds, after))
    return jobs


def attempt(
    hand_ins: list[tuple[Path, Path, list[Criterion]]], seconds: float
) -> list[dict[str, Outcome]]:
    """Run modules and notebooks against criteria; return for each pair the outcomes by criterion, and of its "run"."""
    own = {
        file.parent for hand_in in hand_ins for file in hand_in[:2]
    }  # and nobody may write to what is handed in
    with tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True) as temporary:
        folders = [Path(temporary).resolve() / str(number) for number in range(len(hand_ins))]
        threads = (
            torch.get_num_threads() if len(hand_ins) == 1 else 1
        )  # then no other job is left beside the last
        jobs = [
            plan(threads, folder, *hand_in)
            for folder, hand_in in zip(folders, hand_ins, strict=True)
        ]
        read_only = [ROOT, Path(sys.prefix).resolve(), *own]
        outcomes = run_jobs(
            [job for some in jobs for job in some], read_only, min(4, os.cpu_count() or 1), seconds
        )
        return [{Path(job.name).name: outcomes[job.name] for job in some} for some in jobs]


def grade(module: Path, notebook: Path, rubric: Rubric) -> tuple[list[Result], str]:
    """Return a result for every criterion, and the notebook's quiz in words."""
    prepare()
    expected = expected_tests(rubric.criteria)
    [outcomes] = attempt([(module, notebook, rubric.criteria)], rubric.seconds)
    reports = outcomes["run"].reports if "run" in outcomes else []
    quiz = next((report["quiz"] for report in reports if "quiz" in report), "")
    return [judge(c, expected[c.id], outcomes[c.id]) for c in rubric.criteria], quiz


# ------------------------------------------------------------------- telling


def as_markdown(results: list[Result], verdict: str) -> str:
    """Return the rubric as a Markdown table, for a CI's summary."""
    lines = ["| criterion | points | why |", "|---|---:|---|"]
    for c, passed, why, _ in results:
        text = (why or c.sentence).replace("|", "\\|").replace("<", "&lt;")
        lines.append(
            f"| {'✅' if passed else '❌'} {c.id} | {c.points * passed} of {c.points} | {text} |"
        )
    return "\n".join([f"**{verdict}**", "", *lines, ""])


def as_junit(results: list[Result]) -> bytes:
    """Return the results as JUnit XML, a test case for each criterion."""
    failures = str(sum(not result.passed for result in results))
    suite = ElementTree.Element(
        "testsuite", name="rubric", tests=str(len(results)), failures=failures
    )
    for c, passed, why, seconds in results:
        case = ElementTree.SubElement(
            suite, "testcase", classname="rubric", name=c.id, time=f"{seconds:.2f}"
        )
        if not passed:
            message = "".join(sign if sign.isprintable() else " " for sign in why)
            ElementTree.SubElement(case, "failure", message=message)
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def main() -> None:
    """Grade, print the rubric, write the files; exit with 0 at or above the pass mark."""
    parser = argparse.ArgumentParser(description="Grade a hand-in by grading/rubric.toml.")
    parser.add_argument(
        "--hand-in", type=Path, default=ROOT, help="its folder; the project itself unless given"
    )
    parser.add_argument("--out", type=Path, help="folder for grade.json, grade.md and junit.xml")
    parser.add_argument("--quick", action="store_true", help="judge the module alone")
    parser.add_argument(
        "--hints", action="store_true", help="add a hint for every criterion that is not met"
    )
    given = parser.parse_args()
    if not any((given.hand_in / file).exists() for file in (MODULE, NOTEBOOK)):
        sys.exit(
            f"{given.hand_in} holds neither {MODULE} nor {NOTEBOOK}: name the folder of a hand-in."
        )
    start = time.monotonic()
    rubric = read_rubric(quick=given.quick)
    files = [find(given.hand_in, file).absolute() for file in (MODULE, NOTEBOOK)]
    results, quiz = grade(*files, rubric)
    for c, passed, why, _ in results:
        print(
            f"{'pass' if passed else 'FAIL'}  {c.points * passed:2} of {c.points:2}  {c.id:14} {c.sentence}"
        )
        if not passed:
            print(
                f"{'':18}why: {why}"
                + (f"\n{'':18}hint: {c.hint}" if given.hints and c.hint else "")
            )
    points, most = (
        sum(r.criterion.points * r.passed for r in results),
        sum(c.points for c in rubric.criteria),
    )
    enough = 100 * points >= rubric.pass_mark * most
    verdict = (
        f"{points} of {most} points ({100 * points / most:.0f} %), pass mark {rubric.pass_mark} %"
    )
    seconds = time.monotonic() - start
    print(f"{verdict}: {'passed' if enough else 'NOT passed'}, in {seconds:.0f} s. {quiz}")
    print(f"What the tests draw comes from GRADED_SEED={os.environ['GRADED_SEED']}.")
    if given.out:
        rows = [
            {**c._asdict(), "passed": p, "got": c.points * p, "why": w, "took": s}
            for c, p, w, s in results
        ]
        content = {
            "points": points,
            "of": most,
            "pass_mark": rubric.pass_mark,
            "passed": enough,
            "seconds": seconds,
        }
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "grade.json").write_text(
            json.dumps({**content, "quiz": quiz, "criteria": rows}, indent=2) + "\n"
        )
        (given.out / "grade.md").write_text(as_markdown(results, verdict))
        (given.out / "junit.xml").write_bytes(as_junit(results))
    sys.exit(not enough)


if __name__ == "__main__":
    main()
