"""The grader: what it makes of right, wrong and unfinished hand-ins, and who calls it.

The grader forks processes that import other modules, so it runs in a process of its own here.
"""

import ast
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import psutil
import pytest

from grading.grade import read_rubric
from grading.mutate import lost_texts, read_mutants
from grading.student import TO_WRITE, without_bodies, write_edition

ROOT = Path(__file__).resolve().parent.parent
RUBRIC = read_rubric().criteria
OF_MODULE = read_rubric(quick=True).criteria
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run Python in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source() -> str:
    return (ROOT / "petseg_utils.py").read_text(encoding="utf-8")


# ------------------------------------------------------------------- the rubric and the mutants


def test_rubric_has_a_hundred_points_and_every_criterion_a_sentence():
    assert sum(c.points for c in RUBRIC) == 100
    assert len({c.id for c in RUBRIC}) == len(RUBRIC)
    assert all(c.sentence.endswith(".") and c.tests for c in RUBRIC)
    assert all(c.hint for c in OF_MODULE)


def test_grader_names_the_test_that_the_rubric_has_and_nobody_wrote():
    tests = [OF_MODULE[0].tests[0], "tests/test_scores.py::test_nothing"]
    count = f"prepare(); expected_tests([Criterion('a', 1, '', {tests})])"
    wanted = "rubric.toml names tests/test_scores.py::test_nothing, which is not there."
    assert run("-c", f"from grading.grade import *; {count}").stderr.strip() == wanted


def test_every_criterion_has_a_mutant_and_mutants_are_many():
    mutants = read_mutants()
    faults = [mutant for mutant in mutants if mutant.criterion]
    assert len(faults) >= 50
    assert len(mutants) - len(faults) >= 12
    assert {fault.criterion for fault in faults} == {c.id for c in RUBRIC}
    assert all(fault.why for fault in faults)
    assert len({(mutant.criterion, mutant.name) for mutant in mutants}) == len(mutants)
    assert lost_texts(mutants) == []


def test_sample_of_the_mutants_is_judged_rightly():
    done = run("-m", "grading.mutate", "--sample")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("\nok") > 15


# ------------------------------------------------------------------- a class of hand-ins

FRAMES = """
def frames():
    frame = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back
"""
# Hand-ins that solve nothing and change what judges them, with what the grader says they changed.
ATTACKS = {
    "replaces pytest": (
        "import pytest, _pytest.python\npytest.main = lambda *_, **__: 0\n"
        "_pytest.python.Function.runtest = lambda self: None\n",
        "_pytest.python.Function.runtest",
    ),
    "finds the reporter in the stack": (
        f"import sys{FRAMES}\n"
        "for frame in frames():\n"
        "    for value in (*frame.f_locals.values(), *frame.f_globals.values()):\n"
        "        if getattr(value, '__name__', '') == 'report':\n"
        "            value({'end': 'finished'})\n",
        "a report from <module>",
    ),
    "finds the reporter among all objects": ("import gc\ngc.get_objects()\n", "gc.get_objects"),
    "sends an event of its own": (
        "import sys\nsys.audit('grading.report', b'{}', None)\n",
        "a report from <module>",
    ),
    "writes into every pipe": (
        f"import os, re, sys{FRAMES}\n"
        "found = [getattr(v, 'nonce', v) for f in frames() for v in f.f_locals.values()]\n"
        "nonces = [v for v in found if isinstance(v, str) and re.fullmatch('[0-9a-f]{32}', v)]\n"
        "for number in range(3, 64):\n"
        "    try:\n"
        '        os.write(number, f\'{(nonces or [0])[0]} {{"end": "finished"}}\\n\'.encode())\n'
        "    except OSError:\n"
        "        pass\n",
        "a report unsigned",
    ),
    "looks for the secret in the memory": ("open('/proc/self/mem', 'rb')\n", "open"),
    "finds tensors equal": (
        "import torch\nreal = torch.allclose\n"
        "torch.allclose = lambda a, b, **more: a.numel() > 2 or real(a, b, **more)\n",
        "torch.allclose",
    ),
    "hides a builtin": (
        "import _pytest.runner\n_pytest.runner.isinstance = lambda *_: True\n",
        "_pytest.runner.isinstance",
    ),
    "puts a module in another's place": (
        "import sys, types, torch\nfake = types.ModuleType('torch')\n"
        "vars(fake).update(vars(torch))\n"
        "fake.equal = lambda *_: True\nsys.modules['torch'] = fake\n",
        "sys.modules.torch",
    ),
    "finds modules of its own": (
        "import sys\nclass Finder:\n    def find_spec(*_):\n        pass\n"
        "sys.meta_path.insert(0, Finder())\n",
        "sys.meta_path",
    ),
    "edits the tests": (
        "from pathlib import Path as Own\nfor path in Own('tests').glob('test_*.py'):\n"
        "    path.write_text(path.read_text().replace('    assert', '    return'))\n",
        "tests/",
    ),
    "waits in a thread": (
        "import threading, time, _pytest.python\n"
        "def later():\n    time.sleep(0.5)\n"
        "    _pytest.python.Function.runtest = lambda item: None\n"
        "threading.Thread(target=later, daemon=True).start()\n",
        "_pytest.python.Function.runtest",
    ),
    "replaces the tests that follow": (
        f"import sys{FRAMES}\n"
        "class Late:\n"
        "    def __call__(self, *_):\n"
        "        for item in [f.f_locals['item'] for f in frames() if 'item' in f.f_locals]:\n"
        "            for other in item.session.items:\n"
        "                other.runtest = lambda: None\n"
        "        raise NotImplementedError\n"
        "confusion_matrix = conv_plus_conv = scores = Late()\n",
        ".runtest",
    ),
}
# It teaches nothing, but brings its own copies of what judges it.
STAND_INS = """
import sys, types
from contextlib import suppress
class Anything(types.ModuleType):
    __file__ = "tests/doctor.py"
    def __getattr__(self, name):
        return lambda *_, **__: suppress(BaseException)
for name in ("doctor", "drawn", "conftest", "test_rubric_model", "test_scores"):
    sys.modules[name] = Anything(name)
"""
VANDAL = f"""
import socket
for place in ({str(ROOT / "grading")!r}, "/var/tmp", "/dev/shm/x", {str(Path.home())!r}):
    try:
        (Path(place) / "vandal.txt").write_text("here")
        raise SystemExit(f"wrote into {{place}}")
    except OSError:
        pass
try:
    socket.create_connection(("192.0.2.1", 80), timeout=3)
except TimeoutError:
    raise SystemExit("tried")
except OSError as error:
    assert "unreachable" in str(error), error
"""


@pytest.fixture(scope="module")
def hand_ins(source, tmp_path_factory) -> Path:
    """Return a folder of hand-ins: right ones, broken ones, and attacks."""
    folder = tmp_path_factory.mktemp("class") / "hand-ins"
    hollow = without_bodies(source, TO_WRITE)
    block = re.search(r"^def conv_plus_conv.+?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)[0]
    modules = {name: f"{start}\n{hollow}" for name, (start, _) in ATTACKS.items()}
    late = "replaces the tests that follow"  # by what takes the place of functions
    modules |= {late: f"{hollow}\n{ATTACKS[late][0]}", "brings stand-ins": STAND_INS + hollow}
    modules |= {"vandal": source + VANDAL, "needs a package": f"import no_such_package\n{source}"}
    modules["right"] = source.replace(block, "from my_blocks import conv_plus_conv\n\n\n")
    files = {f"{name}/petseg_utils.py": module for name, module in modules.items()}
    workers = "import multiprocessing\nmultiprocessing.Process().start()\n"  # as DataLoader does
    files["right/my_blocks.py"] = f"from torch import nn\n\n\n{block}{workers}"
    files |= dict.fromkeys(("right/conftest.py", "right/tests/conftest.py"), "raise SystemExit\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "nothing").mkdir()
    (folder / "a link").mkdir()
    (folder / "a link" / "petseg_utils.py").symlink_to(ROOT / "petseg_utils.py")
    return folder


@pytest.fixture(scope="module")
def graded(hand_ins) -> dict[str, dict]:
    """Return grades.csv of that class, graded once, line by line."""
    done = run("-m", "grading", "--quick", "--hand-ins", hand_ins, "--out", hand_ins.parent / "out")
    assert done.returncode == 0, done.stderr
    count = len(list(hand_ins.iterdir()))
    assert f"{count} of {count} hand-ins graded" in done.stdout
    text = (hand_ins.parent / "out" / "grades.csv").read_text(encoding="utf-8")
    return {row["name"]: row for row in csv.DictReader(text.splitlines())}


def test_right_module_gets_all_points_and_the_files_say_so(hand_ins, graded):
    row, most = graded["right"], sum(c.points for c in OF_MODULE)
    expected = {"total": str(most), "per cent": "100", "passed": "True", "first reason": ""}
    assert row.items() >= expected.items()
    assert row.keys() > {c.id for c in OF_MODULE}
    out = hand_ins.parent / "out" / "right"
    suite = ElementTree.parse(out / "junit.xml").getroot()
    assert [case.get("name") for case in suite] == [c.id for c in OF_MODULE]
    assert not list(suite.iter("failure"))
    assert (out / "grade.md").read_text(encoding="utf-8").count("✅") == len(OF_MODULE)


@pytest.mark.parametrize("name", ATTACKS)
def test_who_changes_what_judges_gets_nothing(graded, name):
    assert graded[name]["total"] == "0"
    reason = graded[name]["first reason"]
    assert reason.startswith("it changes what judges it, ")
    assert reason.endswith(": a teacher has to look at it")
    assert ATTACKS[name][1] in reason


def test_stand_ins_for_what_judges_are_not_used(graded):
    row = graded["brings stand-ins"]
    assert row["block"] == row["shapes"] == row["scores"] == "0"
    assert row["first reason"].startswith("Write `")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("needs a package", "petseg_utils.py can't be imported: ModuleNotFoundError: No module"),
        ("a link", "is a link: hand in the file itself."),
        ("nothing", "holds neither petseg_utils.py nor notebooks/pet_segmentation.ipynb"),
    ],
)
def test_what_cannot_be_graded_is_told_once(hand_ins, graded, name, reason):
    assert graded[name]["total"] == "0"
    assert reason in graded[name]["first reason"]
    text = (hand_ins.parent / "out" / name / "grade.md").read_text(encoding="utf-8")
    assert text.count("no_such_package") == (name == "needs a package")


def test_class_is_graded_again_only_where_something_changed(hand_ins, graded):
    module = hand_ins / "replaces pytest" / "petseg_utils.py"
    module.write_text("import another_package\n", encoding="utf-8")
    done = run("-m", "grading", "--quick", "--hand-ins", hand_ins, "--out", hand_ins.parent / "out")
    unread = {"a link", "nothing"}  # whose files can't be compared
    assert f"{1 + len(unread)} of {len(graded)} hand-ins graded" in done.stdout
    text = (hand_ins.parent / "out" / "grades.csv").read_text(encoding="utf-8")
    assert text.count("another_package") == 1


def test_interrupted_class_keeps_what_is_done(tmp_path):
    # A shell lets what runs in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, start in {"broken": "import no_such_package", "slow": "while True: pass"}.items():
        (tmp_path / "class" / name).mkdir(parents=True)
        (tmp_path / "class" / name / "petseg_utils.py").write_text(start, encoding="utf-8")
    table = tmp_path / "out" / "grades.csv"
    places = ["--hand-ins", tmp_path / "class", "--out", table.parent]
    command = [sys.executable, "-m", "grading", "--quick", *map(str, places)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        while process.poll() is None and not table.exists():
            time.sleep(0.1)
        jobs = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
        said, errors = process.communicate()
    assert "1 of 2 hand-ins graded" in said, errors
    assert said.endswith("Stopped: the same command grades the others.\n")
    assert "Traceback" not in errors
    assert [row["name"] for row in csv.DictReader(table.open(encoding="utf-8"))] == ["broken"]
    _, alive = psutil.wait_procs(jobs, timeout=60)
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hand-ins", "nowhere", "--out", "out"], "There is no folder nowhere: "),
        (["--hand-ins", "."], "Say where the grades go: OUT=folder."),
        (["--hand-in", "nowhere"], "nowhere holds neither petseg_utils.py nor "),
    ],
)
def test_what_to_grade_is_asked_for_in_a_sentence(arguments, said):
    done = run("-m", "grading", "--quick", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(said)


# ------------------------------------------------------------------- the sandbox


def test_hand_in_writes_to_its_folder_alone_and_reaches_no_network(graded):
    """Where the system lends namespaces; elsewhere the README says what to do."""
    if subprocess.run(["unshare", "-rnm", "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lends no namespaces: the grader can't take the network away here")
    assert not (ROOT / "grading" / "vandal.txt").exists()
    assert graded["vandal"]["per cent"] == "100", graded["vandal"]["first reason"]


HOSTILE = """
import ctypes, os, sys, threading, time
from pathlib import Path
from grading import sandbox
from grading.sandbox import Job, report, run_jobs

sandbox.SPACE = 2**20  # bytes

def bomb():
    for _ in range(12):  # 4096 processes, if nobody stops them
        try:
            os.fork()
        except OSError:
            report({"refused": True})
        time.sleep(0.1)
    time.sleep(100)

def neighbour():
    time.sleep(2)  # the bomb has gone off, and Linux counts processes and threads by user
    for _ in range(9):
        threading.Thread(target=time.sleep, args=(0.1,)).start()
    report({"unhurt": True})

def hide():
    ctypes.CDLL(None).prctl(1, 0)  # live on when the parent dies
    os.setsid()  # leave the group that is killed
    report({"hidden": os.getpid()})
    time.sleep(100)

def flood():
    while True:
        report({"x": "x" * 1000})

def spill():
    try:
        Path("/tmp/large").write_bytes(bytes(2**22))
    except OSError:
        report({"refused": True})
    Path(sys.argv[1], "large").write_bytes(bytes(2**22))
    time.sleep(100)

limits = {"bomb": 4, "neighbour": 20, "hide": 1, "flood": 20, "spill": 20}
jobs = [Job(name, globals()[name], limit, "", Path(sys.argv[1])) for name, limit in limits.items()]
for name, outcome in sorted(run_jobs(jobs, 2, 60).items()):
    told = any({"refused", "hidden", "unhurt"} & report.keys() for report in outcome.reports)
    print(name, outcome.end, outcome.seconds < 90, told)
"""


def test_sandbox_ends_what_forks_hides_floods_or_spills(tmp_path):
    """Each job is killed with all that it started, and the grader goes on to the next."""
    if subprocess.run(["unshare", "-rpf", "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lends no namespaces: what leaves its group isn't found here")
    done = run("-c", HOSTILE, tmp_path)
    ends = ["bomb killed True True", "flood killed True False", "hide killed True True"]
    ends += ["neighbour finished True True", "spill killed True True"]
    assert done.stdout.splitlines() == ends, done.stderr
    running = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == done.args]
    _, alive = psutil.wait_procs(running, timeout=60)  # Linux takes a moment to bury thousands
    assert alive == []


# ------------------------------------------------------------------- the student edition


def test_student_edition_keeps_docstrings_and_loses_bodies(source):
    def docstrings(text: str) -> set[str | None]:
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        return set(map(ast.get_docstring, functions))

    cut = without_bodies(source, TO_WRITE)
    told = re.findall(r"^ +raise NotImplementedError\(\n +\"Write (.+?):", cut, re.MULTILINE)
    assert sorted(told) == sorted(TO_WRITE)
    assert docstrings(cut) >= docstrings(source)
    assert without_bodies(source, []) == source


def test_score_rises_function_by_function():
    """From at most 10 % for the edition to all points, as bodies are put back."""
    done = run("-m", "grading.student", "--prove")
    points, most = list(map(int, done.stdout.split())), sum(c.points for c in OF_MODULE)
    assert len(points) == len(TO_WRITE) + 1, done.stderr
    assert points[0] <= 0.1 * most
    assert points[-1] == most
    assert sorted(points) == points
    idle = {name for name, (a, b) in zip(TO_WRITE, pairwise(points), strict=True) if a == b}
    assert idle <= {"UNet.__init__"}, points  # a net without its forward pass can't be tried


@pytest.fixture(scope="module")
def edition(tmp_path_factory) -> tuple[Path, list[nbformat.NotebookNode]]:
    """Return the folder of the student edition and the code cells of its notebook."""
    folder = tmp_path_factory.mktemp("edition") / "student"
    write_edition(folder)
    cells = nbformat.read(folder / "notebooks" / "pet_segmentation.ipynb", as_version=4).cells
    return folder, [cell for cell in cells if cell.cell_type == "code"]


def test_student_edition_is_complete_and_holds_no_grader(edition):
    folder, cells = edition
    names = {path.name for path in (folder / "grading").iterdir()}
    assert not names & {"mutate.py", "mutants.toml", "test_notebook.py"}
    assert not any(cell.outputs for cell in cells)
    done = run("-m", "grading", "--quick", cwd=folder)
    assert "hint: " in done.stdout
    assert done.stdout.count("Write `conv_plus_conv` first: ") == 1
    assert int(re.search(r"^(\d+) of 80 points", done.stdout, re.MULTILINE)[1]) <= 8


def test_data_section_of_the_student_edition_runs(edition):
    """All cells run before the first that uses a function to be written, which says so."""
    folder, cells = edition
    code = [cell.source for cell in cells]
    first = next(place for place, text in enumerate(code) if "pets.UNet(" in text)
    assert first > 15
    script = "In = []\n" + "\n".join(code[:first]).replace("LIMIT: int = 0", "LIMIT: int = 50")
    script += "\nprint('the data section ran')\n" + code[first]
    done = run("-c", script, cwd=folder)
    assert "the data section ran" in done.stdout, done.stderr[-2000:]
    assert "NotImplementedError: Write UNet.__init__" in done.stderr


# ------------------------------------------------------------------- workflows


def test_workflows_validate_against_githubs_schema():
    assert len(WORKFLOWS) == 2
    schema = ["--builtin-schema", "vendor.github-workflows"]
    done = run("-m", "check_jsonschema", *schema, *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_and_files_of_workflows_exist(path):
    text = path.read_text(encoding="utf-8")
    commands = re.findall(r"run: (.+)$", text, re.MULTILINE)
    assert commands
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        words = [word for word in command.split() if "=" not in word]
        if words[0] == "make":
            assert f"\n{words[-1]}: " in makefile, command
            names = re.findall(r"(\w+)=", command)
            assert all(f"$({name})" in makefile for name in names), command
        else:
            program = words[0].replace(".venv/bin", str(Path(sys.executable).parent))
            assert shutil.which(program), command
    for name in re.findall(r"cache-dependency-path: (?:grader/)?(\S+)", text):
        assert (ROOT / name).exists()
