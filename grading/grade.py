"""Grade a hand-in by the rubric.

The hand-in's module, notebook and other Python files are laid beside the grader's own everything
else, afresh for every criterion, whose tests run in a process of their own. This process never
imports the hand-in; it counts the tests of every criterion with its own module, and a test that is
missing, skipped or silent scores nothing.
"""

import importlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import tomllib
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from _pytest.config import default_plugins

from grading.sandbox import Job, Outcome, report, run_jobs

ROOT = Path(__file__).resolve().parent.parent
MODULE, NOTEBOOK = Path("petseg_utils.py"), Path("notebooks/pet_segmentation.ipynb")
# The last is what an optimiser's first step loads.
HEAVY = "matplotlib.pyplot", "pydantic.main", "sklearn.metrics", "torch._dynamo"
OWN_FOLDERS = ("tests", "grading", "support", "shapes")  # nothing in them is handed in
UNWRITTEN = re.compile(r"NotImplementedError: Write ([\w.]+): (.*?)\.? \([\w/.]+::")
CHANGES = "it changes what judges it"
LIMIT = 60  # for a criterion that doesn't say otherwise
LARGEST = 50 * 2**20  # bytes of a file handed in
SETTINGS = {
    "GRADERS_MODULE": str(ROOT / MODULE),  # of tests/doctor.py
    "MPLBACKEND": "Agg",
    "TQDM_DISABLE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "OMP_NUM_THREADS": "1",
}


def prepare() -> None:
    """Import what every criterion's process needs: they are forked from this one and have it."""
    os.environ |= SETTINGS
    os.environ.setdefault("GRADED_SEED", str(secrets.randbelow(2**31)))  # of tests/drawn.py
    sys.dont_write_bytecode = True
    matplotlib.use(SETTINGS["MPLBACKEND"])  # it was imported before
    for name in (*HEAVY, *(f"_pytest.{plugin}" for plugin in default_plugins)):
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

    @property
    def kind(self) -> str:
        """Name the criteria that are judged in one process; a slow one is judged in its own."""
        return self.id if self.seconds > LIMIT else "notebook" if self.notebook else "module"


def join(name: str, criteria: list[Criterion]) -> Criterion:
    """Return criteria of one kind as one, so that a single process judges them."""
    tests = [test for criterion in criteria for test in criterion.tests]
    seconds = max(2 * LIMIT, *(criterion.seconds for criterion in criteria))
    return Criterion(name, 0, "", tests, criteria[0].notebook, seconds=seconds)


class Result(NamedTuple):
    """What a hand-in got for a criterion, and why not all of it."""

    criterion: Criterion
    passed: bool
    why: str
    seconds: float

    @property
    def points(self) -> int:
        return self.criterion.points * self.passed


class Rubric(NamedTuple):
    """The criteria, the pass mark in per cent of the points, and the limit of all in seconds."""

    criteria: list[Criterion]
    pass_mark: float
    seconds: float


def read_rubric(quick: bool = False) -> Rubric:
    """Read the rubric; `quick` leaves out the criteria of the notebook."""
    content = tomllib.loads((ROOT / "grading" / "rubric.toml").read_text(encoding="utf-8"))
    criteria = [Criterion(**row) for row in content["criterion"]]
    kept = [c for c in criteria if not (quick and c.notebook)]
    return Rubric(kept, content["pass_mark"], content["seconds"])


# ------------------------------------------------------------------- staging

Files = dict[Path, bytes]  # by their place in a staged folder


class HandIn(NamedTuple):
    """What is graded: the module, the notebook, and other Python files."""

    files: Files
    run: str = ""  # names the run of its notebook if it has the same code as others


def read_file(folder: Path, file: Path) -> bytes:
    """Return a hand-in's file, or the project's own if it lacks it. Errors: SystemExit if odd."""
    path = folder / file
    if path.is_symlink() or path.parent.resolve() != folder.resolve() / file.parent:
        sys.exit(f"{path} is a link: hand in the file itself.")
    if not path.exists():
        return (ROOT / file).read_bytes()
    if not path.is_file() or path.stat().st_size > LARGEST:
        sys.exit(f"{path} is no file of at most {LARGEST // 2**20} MiB: hand in the file itself.")
    return path.read_bytes()


def read_hand_in(folder: Path) -> HandIn:
    """Return what a folder hands in; only the module and the notebook replace the grader's own."""
    if not any((folder / file).exists() for file in (MODULE, NOTEBOOK)):
        sys.exit(f"{folder} holds neither {MODULE} nor {NOTEBOOK}: name the folder of a hand-in.")
    packages = [init.parent.rglob("*.py") for init in folder.glob("*/__init__.py")]
    found = set(folder.glob("*.py")).union(folder.glob("notebooks/*.py"), *packages)
    places = [MODULE, NOTEBOOK]
    for path in sorted(path.relative_to(folder) for path in found):
        own = path.parts[0] in OWN_FOLDERS or (ROOT / path).exists() or path.name == "conftest.py"
        places += [] if own else [path]
    return HandIn({place: read_file(folder, place) for place in places})


def copy_around_notebooks(folder: Path) -> None:
    """Copy into a folder what lies beside the project's notebooks, but no notebook."""
    own = shutil.ignore_patterns("*.ipynb", ".*", "__*")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=own, dirs_exist_ok=True)


@cache
def grader_files() -> Files:
    """Return all that a criterion needs beside the hand-in."""
    paths = [path for name in (".", *OWN_FOLDERS) for path in (ROOT / name).glob("*.py")]
    paths = sorted([*paths, ROOT / "pyproject.toml"])
    return {path.relative_to(ROOT): path.read_bytes() for path in paths}


def stage(folder: Path, files: Files) -> Path:
    """Write files into a new folder; beside a notebook, also what it finds there."""
    if NOTEBOOK in files:
        copy_around_notebooks(folder)
        # The list of fonts takes kernels seconds to make.
        fonts = shutil.copytree(matplotlib.get_cachedir(), folder / ".matplotlib")
        os.environ["MPLCONFIGDIR"] = str(fonts)
    for target, content in files.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_bytes(content)
    return folder


# ---------------------------------------------------------- running pytest, in a process of its own

OPTIONS = [
    "-c", "pyproject.toml", "-s", "-q", "--color=no", "-pno:cacheprovider",
    "--tb=native",  # the others parse the module for every failure
    "-pno:unraisableexception",  # it collects garbage, for half a second
    "-pno:legacypath",  # it replaces functions of pytest
]  # fmt: skip


class Reporter:
    """A plugin of pytest that reports what was collected, what began and how it ended."""

    def __init__(self) -> None:
        self.ends: list[dict] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        report({"collected": [item.nodeid for item in session.items]}, session.items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.ends.append({"broken": lines[-1].lstrip("E ") if lines else "an error"})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        report({"started": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = str(crash.message if crash else report.longrepr or "").strip().splitlines()
        outcome = "xpassed" if hasattr(report, "wasxfail") else report.outcome
        why = lines[0][:300] if lines else ""
        self.ends.append({"test": report.nodeid, "outcome": outcome, "why": why})

    def pytest_runtest_logfinish(self) -> None:
        """Report how a test ended, now that its fixtures have put back what they changed."""
        for end in self.ends:
            report(end)
        self.ends.clear()

    pytest_sessionfinish = pytest_runtest_logfinish  # what can't be collected is told then


def run_pytest(folder: Path, tests: list[str], *options: str, guarded: bool = True) -> None:
    """Run tests in a staged folder, guarded where it holds a module that was handed in."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    if guarded:
        sys.audit("grading.start", str(folder))
    try:
        module = Path(importlib.import_module("petseg_utils").__file__)
    except BaseException as error:  # SystemExit is one, too
        return report({"broken": f"{type(error).__name__}: {error}"[:300]})
    for path in (folder / "tests").glob("*.py"):
        sys.modules.pop(path.stem, None)  # of the hand-in's, where the grader's will be imported
    report({"module handed in": module == folder / MODULE})
    pytest.main([*OPTIONS, *options, *tests], plugins=[Reporter()])


def plain(why: str) -> str:
    """Return pytest's reason in the words of the rubric's tests: expected, found."""
    why = why.removeprefix("AssertionError: ").removeprefix("Failed: ")
    why = re.sub("^DID NOT RAISE (.*)", r"expected an \1, found none", why)
    why = re.sub("^(?=assert )", "expected a check to hold, found ", why)
    error = r"^(?=[\w.]*(Error|Exception|Interrupt|Exit)\b)"
    return re.sub(error, "expected no error, found ", why)


def judge(criterion: Criterion, expected: list[str], outcome: Outcome) -> Result:
    """Turn what a process reported into a verdict with its reason."""
    ends = [r for r in outcome.reports if "test" in r]
    verdicts = {r["test"]: r for r in ends if r["outcome"] != "passed"}
    passed = {r["test"] for r in ends} - verdicts.keys()
    kinds = ("started", "broken", "tampered")
    started, broken, tampered = ([r[k] for r in outcome.reports if k in r] for k in kinds)
    canaries = [nodeid for nodeid in started if not (ROOT / nodeid.partition("::")[0]).exists()]
    where = started[-1] if started else "the import of petseg_utils"
    if tampered:
        why = f"{CHANGES}, {tampered[0]}: a teacher has to look at it"
    elif broken:
        why = f"the module or its tests can't be loaded: {broken[0]}"
    elif first := next((verdicts[nodeid] for nodeid in expected if nodeid in verdicts), None):
        kind = "" if first["outcome"] == "failed" else f"{first['outcome']}, "
        why = f"{kind}{plain(first['why'])} ({first['test']})"
    elif outcome.end == "killed":
        limit = f"took longer than {outcome.seconds:.0f} s, or reported or wrote too much"
        why = f"it {limit}, and was stopped in {where}"
    elif outcome.end == "stopped":
        why = f"its process ended in {where}, before all tests were done"
    elif missing := [nodeid for nodeid in expected if nodeid not in passed]:
        why = f"{len(missing)} of {len(expected)} tests gave no verdict, first {missing[0]}"
    elif not canaries or any(nodeid in passed for nodeid in canaries):
        why = f"{CHANGES}, a test that must fail: a teacher has to look at it"
    elif {"module handed in": True} not in outcome.reports:
        why = "the module that was tested is not the one handed in"
    else:
        why = ""
    return Result(criterion, not why, why, outcome.seconds)


def expected_tests(criteria: list[Criterion]) -> dict[str, list[str]]:
    """Return the node ids of each criterion's tests, as collected with the project's own module."""
    tests = sorted({test for criterion in criteria for test in criterion.tests})
    # Files by name: a test that is absent would hide all others.
    names = sorted({test.partition("::")[0] for test in tests})
    with tempfile.TemporaryDirectory() as temporary:
        staged = partial(stage, Path(temporary).resolve(), grader_files())
        job = Job("", lambda: run_pytest(staged(), names, "--collect-only"), LIMIT)
        reports = run_jobs([job], 1, LIMIT)[""].reports
    if broken := [report["broken"] for report in reports if "broken" in report]:
        sys.exit(f"{ROOT / MODULE} or its tests can't be loaded: {broken[0]}")
    ids = next((report["collected"] for report in reports if "collected" in report), [])
    found = {test: [id_ for id_ in ids if test in (id_, id_.partition("[")[0])] for test in tests}
    if absent := [test for test in tests if not found[test]]:
        sys.exit(f"rubric.toml names {absent[0]}, which is not there.")
    return {c.id: [nodeid for test in c.tests for nodeid in found[test]] for c in criteria}


# ------------------------------------------------------------------- grading


@cache
def pictures() -> tempfile.TemporaryDirectory:
    """Draw what all notebooks are run on; the folder goes when this process ends."""
    from grading.notebook import draw_pictures

    drawn = tempfile.TemporaryDirectory(prefix="pictures-")
    folder, seed = Path(drawn.name).resolve(), int(os.environ["GRADED_SEED"])
    job = Job("", lambda: draw_pictures(folder, seed), LIMIT, writable=folder, readable=[ROOT])
    if run_jobs([job], 1, LIMIT)[""].end != "finished":
        sys.exit(f"No pictures can be drawn into {folder}: make room, or give the machine time.")
    return drawn


def plan(folder: Path, hand_in: HandIn, criteria: list[Criterion]) -> dict[str, Job]:
    """Return the jobs of a hand-in: "run", which executes its notebook, and each criterion's."""
    own, jobs, seen = grader_files(), {}, [ROOT]
    files = own | hand_in.files
    of_module = {place: content for place, content in files.items() if place != NOTEBOOK}
    run = folder.parent / (hand_in.run or f"{folder.name}-run")
    if any(c.notebook for c in criteria):
        from grading.notebook import SECONDS, execute, quiz_of  # the student edition does without

        drawn = Path(pictures().name).resolve()
        seen.append(drawn)

        def execute_notebook() -> None:
            execute(stage(run, files), drawn / "new")
            report({"quiz": quiz_of(run / "executed.ipynb")})

        run.mkdir(parents=True, exist_ok=True)
        jobs["run"] = Job(str(run), execute_notebook, SECONDS, writable=run, readable=seen)

    def work_on(c: Criterion) -> None:
        canary = Path("tests") / f"test_{secrets.token_hex(4)}.py"  # a name like any other
        used = (own if c.notebook else of_module) | {canary: own[Path("grading/canary.py")]}
        if c.notebook:
            stored = stage(folder / f"{c.id}-stored", files)
            os.environ |= {"GRADED_RUN": str(run), "GRADED_STORED": str(stored)}
            os.environ["GRADED_PICTURES"] = str(drawn)
        run_pytest(stage(folder / c.id, used), [*c.tests, str(canary)], guarded=not c.notebook)

    for c in criteria:
        job = Job(str(folder / c.id), partial(work_on, c), c.seconds, readable=seen)
        jobs[c.id] = job._replace(after=str(run), readable=[*seen, run]) if c.notebook else job
    return jobs


def attempt(
    hand_ins: list[tuple[HandIn, list[Criterion]]], seconds: float, workers: int = 4
) -> list[dict[str, Outcome]]:
    """Return for each hand-in the outcomes by criterion, and that of its notebook as "run"."""
    workers = min(workers, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary).resolve()
        plans = [plan(folder / str(n), *pair) for n, pair in enumerate(hand_ins)]
        jobs = {job.name: job for some in plans for job in some.values()}  # a run may be shared
        outcomes = run_jobs(list(jobs.values()), workers, seconds)
    return [{key: outcomes[job.name] for key, job in some.items()} for some in plans]


class Grade(NamedTuple):
    """A result for every criterion, what has to be said once, and the pass mark in per cent."""

    results: list[Result]
    notes: list[str]
    pass_mark: float

    @property
    def points(self) -> int:
        return sum(result.points for result in self.results)

    @property
    def of(self) -> int:
        return sum(result.criterion.points for result in self.results)

    @property
    def passed(self) -> bool:
        return 100 * self.points >= self.pass_mark * self.of

    def __str__(self) -> str:
        share = f"({100 * self.points / self.of:.0f} %)"
        return f"{self.points} of {self.of} points {share}, pass mark {self.pass_mark} %"


def grade(hand_in: HandIn, rubric: Rubric, expected: dict[str, list[str]], workers: int) -> Grade:
    """Grade a hand-in: what is quick in one process, and alone what failed there for its module."""
    kinds = dict.fromkeys(c.kind for c in rubric.criteria)
    joined = [join(kind, [c for c in rubric.criteria if c.kind == kind]) for kind in kinds]
    [ends] = attempt([(hand_in, joined)], rubric.seconds, workers)
    outcomes, whole = {c.id: ends[c.kind] for c in rubric.criteria}, ends["module"]
    imported = any("module handed in" in report for report in whole.reports)
    if imported and not any("tampered" in report for report in whole.reports):
        of_module = [c for c in rubric.criteria if not c.notebook]
        again = [c for c in of_module if not judge(c, expected[c.id], whole).passed]
        outcomes |= attempt([(hand_in, again)], rubric.seconds, workers)[0] if again else {}
    results = [judge(c, expected[c.id], outcomes[c.id]) for c in rubric.criteria]
    reports = ends["run"].reports if "run" in ends else []
    quiz = [report["quiz"] for report in reports if "quiz" in report]
    return tell_once(Grade(results, quiz, rubric.pass_mark), imported)


def tell_once(graded: Grade, imported: bool) -> Grade:
    """Tell once what is the reason of many criteria; who changes what judges gets nothing."""
    results, notes, _ = graded
    if tampered := [r.why for r in results if r.why.startswith(CHANGES)]:
        return graded._replace(results=[r._replace(passed=False, why=tampered[0]) for r in results])
    if not imported:
        why = next(r.why for r in results if not r.criterion.notebook)
        error = why.partition("loaded: ")[2] or why
        absent = "ModuleNotFoundError" in error
        only = " Only what requirements.txt names is there, and what was handed in." * absent
        notes = [f"{MODULE} can't be imported: {error.rstrip('.')}.{only}", *notes]
    told, again = set(), []
    for result in results:
        why = result.why
        if not imported and not result.criterion.notebook:
            why = f"{MODULE} can't be imported"
        elif unwritten := UNWRITTEN.search(why):
            name, how = unwritten.groups()
            why = f"it needs {name}" if name in told else f"Write `{name}` first: {how}"
            told.add(name)
        again.append(result._replace(why=why))
    return graded._replace(results=again, notes=notes)


# ------------------------------------------------------------------- telling


def as_markdown(graded: Grade) -> str:
    """Return the rubric as a Markdown table, for a CI's summary."""

    def safe(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    lines = ["| criterion | points | why |", "|---|---:|---|"]
    for r in graded.results:
        sign, c = "✅" if r.passed else "❌", r.criterion
        lines.append(f"| {sign} {c.id} | {r.points} of {c.points} | {safe(r.why or c.sentence)} |")
    return "\n\n".join([f"**{graded}**", *map(safe, graded.notes), "\n".join(lines)]) + "\n"


def as_junit(results: list[Result]) -> bytes:
    """Return the results as JUnit XML, a test case for each criterion."""
    suite = ElementTree.Element("testsuite", name="rubric", tests=str(len(results)))
    suite.set("failures", str(sum(not result.passed for result in results)))
    for c, passed, why, seconds in results:
        known = {"classname": "rubric", "name": c.id, "time": f"{seconds:.2f}"}
        case = ElementTree.SubElement(suite, "testcase", **known)
        if not passed:
            message = "".join(sign if sign.isprintable() else " " for sign in why)
            ElementTree.SubElement(case, "failure", message=message)
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def show(graded: Grade) -> None:
    """Print the rubric with what was got, and a hint where that is nothing."""
    seed = f"What the tests draw is GRADED_SEED={os.environ['GRADED_SEED']}."
    print(*graded.notes, seed, sep="\n")
    for r in graded.results:
        verdict, c = "pass" if r.passed else "FAIL", r.criterion
        print(f"{verdict}  {r.points:2} of {c.points:2}  {c.id:14} {c.sentence}")
        if not r.passed:
            print(f"{'':18}why: {r.why}")
            if c.hint:
                print(f"{'':18}hint: {c.hint}")


def write(out: Path, graded: Grade, seconds: float, digest: str = "") -> None:
    """Write grade.json, grade.md and junit.xml into a folder; `digest` says what was graded."""
    content = {key: getattr(graded, key) for key in ("points", "of", "pass_mark", "passed")}
    content |= {"seconds": seconds, "digest": digest, "notes": graded.notes}
    content["criteria"] = []
    for r in graded.results:
        got = {"passed": r.passed, "got": r.points, "why": r.why, "took": r.seconds}
        content["criteria"].append(r.criterion._asdict() | got)
    out.mkdir(parents=True, exist_ok=True)
    (out / "grade.md").write_text(as_markdown(graded), encoding="utf-8")
    (out / "junit.xml").write_bytes(as_junit(graded.results))
    # Last: its being there says that the hand-in is graded.
    (out / "grade.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
