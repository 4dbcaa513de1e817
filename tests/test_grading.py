"""The grader: what it makes of right, wrong and unfinished hand-ins, and the workflows that call
it.

The grader forks processes that import other modules, so it runs in a process of its own here.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import psutil
import pytest

from grading import notebook as grader
from grading import test_notebook as notebook_criteria
from grading.mutants import (
    MODULE_FAULTS,
    MODULE_HARMLESS,
    NOTEBOOK_FAULTS,
    NOTEBOOK_HARMLESS,
    OUTPUT_FAULTS,
)
from grading.student import TO_WRITE, without_bodies, write_edition

ROOT = Path(__file__).resolve().parent.parent
RUBRIC = tomllib.loads((ROOT / "grading" / "rubric.toml").read_text())
OF_MODULE = [row for row in RUBRIC["criterion"] if not row.get("notebook")]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def run(module: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run one of the grader's programs."""
    command = [sys.executable, "-m", f"grading.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def grade_quickly(source: str, folder: Path, *, cwd: Path = ROOT) -> dict:
    """Grade a module and return grade.json."""
    (folder / "hand-in").mkdir(parents=True, exist_ok=True)
    (folder / "hand-in" / "petseg_utils.py").write_text(source)
    done = run(
        "grade", "--quick", "--hand-in", folder / "hand-in", "--out", folder / "out", cwd=cwd
    )
    assert (folder / "out" / "grade.json").exists(), done.stdout + done.stderr
    return json.loads((folder / "out" / "grade.json").read_text()) | {
        "status": done.returncode,
        "said": done.stdout,
    }


def got(graded: dict) -> dict[str, int]:
    return {row["id"]: row["got"] for row in graded["criteria"]}


@pytest.fixture(scope="module")
def source() -> str:
    return (ROOT / "petseg_utils.py").read_text()


# ------------------------------------------------------------------- the rubric and the mutants


def test_rubric_has_a_hundred_points_and_every_criterion_a_sentence():
    rows = RUBRIC["criterion"]
    assert sum(row["points"] for row in rows) == 100
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["sentence"].endswith(".") and row["tests"] for row in rows)
    assert all(row["hint"] for row in OF_MODULE)


def test_grader_names_the_test_that_the_rubric_has_and_nobody_wrote():
    tests = [OF_MODULE[0]["tests"][0], "tests/test_scores.py::test_nothing"]
    program = (
        f"from grading.grade import *; prepare(); expected_tests([Criterion('a', 1, '', {tests})])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.stderr.strip()
        == "rubric.toml names tests/test_scores.py::test_nothing, which is not there."
    )


def test_every_criterion_has_a_mutant_and_mutants_are_many():
    faults = (*MODULE_FAULTS, *NOTEBOOK_FAULTS, *OUTPUT_FAULTS)
    variants = (*MODULE_HARMLESS, *NOTEBOOK_HARMLESS)
    assert len(faults) >= 50
    assert len(variants) >= 12
    assert {fault.criterion for fault in faults} == {row["id"] for row in RUBRIC["criterion"]}
    assert all(fault.why for fault in faults)
    assert len({mutant[:2] for mutant in (*faults, *variants)}) == len(faults) + len(variants)


def test_every_mutant_still_applies(source):
    """Each text is there exactly once; one that isn't must follow the source it changes."""
    notebook = nbformat.read(ROOT / "notebooks" / "pet_segmentation.ipynb", as_version=4)
    cells = "\n".join(cell.source for cell in notebook.cells)
    tables = (
        (source, (*MODULE_FAULTS, *MODULE_HARMLESS)),
        (cells, (*NOTEBOOK_FAULTS, *NOTEBOOK_HARMLESS)),
    )
    lost = {
        m.name: old
        for text, table in tables
        for m in table
        for old in m.changes[::2]
        if text.count(old) != 1
    }
    assert lost == {}


def test_sample_of_the_mutants_is_judged_rightly():
    done = run("mutate", "--sample")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("\nok") > 20


# ------------------------------------------------------------------- grading


def test_right_module_gets_all_points_and_the_files_say_so(source, tmp_path):
    graded = grade_quickly(source, tmp_path)
    assert graded["status"] == 0, graded["said"]
    assert graded["points"] == graded["of"] == sum(row["points"] for row in OF_MODULE)
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert [case.get("name") for case in suite] == [row["id"] for row in OF_MODULE]
    assert not list(suite.iter("failure"))
    assert (tmp_path / "out" / "grade.md").read_text().count("✅") == len(OF_MODULE)


def test_module_that_replaces_pytest_and_leaves_gets_nothing(source, tmp_path):
    """Of all, since every criterion's process ends, or says green where it must say red."""
    patched = (
        "import pytest, sys\npytest.main = lambda *a, **k: 0\n"
        "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None\n"
    )
    graded = grade_quickly(source.replace("import csv\n", f"{patched}import csv\n", 1), tmp_path)
    assert graded["points"] == 0
    assert graded["status"] == 1
    assert all("a test that must fail passed" in row["why"] for row in graded["criteria"])
    assert len(list(ElementTree.parse(tmp_path / "out" / "junit.xml").iter("failure"))) == len(
        OF_MODULE
    )


def test_hand_in_writes_neither_to_the_project_nor_reaches_a_network(source, tmp_path):
    """Where the system lends namespaces; elsewhere the README says what to do."""
    if subprocess.run(["unshare", "-rnm", "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lends no namespaces: the grader can't take the network away here")
    vandal = f"""
import socket
try:
    Path({str(ROOT / "grading" / "vandal.txt")!r}).write_text("here")
    raise SystemExit("wrote")
except OSError:
    pass
try:
    socket.create_connection(("192.0.2.1", 80), timeout=3)
except TimeoutError:
    raise SystemExit("tried")
except OSError as error:
    assert "unreachable" in str(error), error
"""
    graded = grade_quickly(source + vandal, tmp_path)
    assert not (ROOT / "grading" / "vandal.txt").exists()
    assert graded["points"] == graded["of"], graded["criteria"][0]["why"]


def test_hand_in_of_links_or_of_nothing_is_refused(tmp_path):
    done = run("grade", "--quick", "--hand-in", tmp_path)
    assert done.returncode == 1
    assert "holds neither" in done.stderr
    (tmp_path / "petseg_utils.py").symlink_to(ROOT / "petseg_utils.py")
    done = run("grade", "--quick", "--hand-in", tmp_path)
    assert done.returncode == 1
    assert "is a link" in done.stderr


# ------------------------------------------------------------------- the sandbox

HOSTILE = """
import ctypes, os, sys, time
from grading.sandbox import Job, run_jobs

def bomb(report):
    for _ in range(12):  # 4096 processes, if nobody stops them
        try:
            os.fork()
        except OSError:
            report({"refused": True})
        time.sleep(0.1)
    time.sleep(100)

def hide(report):
    ctypes.CDLL(None).prctl(1, 0)  # live on when the parent dies
    os.setsid()  # leave the group that is killed
    report({"hidden": os.getpid()})
    time.sleep(100)

def flood(report):
    while True:
        report({"x": "x" * 1000})

seconds = {"bomb": 4, "hide": 1, "flood": 20}
for name, outcome in run_jobs([Job(name, globals()[name], s) for name, s in seconds.items()], [], 1, 30).items():
    print(name, outcome.end, outcome.seconds < 10, any("refused" in r or "hidden" in r for r in outcome.reports))
"""


def test_sandbox_ends_what_forks_hides_or_floods(tmp_path):
    """Each job is killed with all that it started, and the grader goes on to the next."""
    if subprocess.run(["unshare", "-rpf", "true"], capture_output=True).returncode != 0:
        pytest.skip(
            "this system lends no namespaces: what leaves its process group isn't found here"
        )
    (tmp_path / "hostile.py").write_text(HOSTILE)
    command = [sys.executable, str(tmp_path / "hostile.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    ends = ["bomb killed True True", "hide killed True True", "flood killed True False"]
    assert done.stdout.splitlines() == ends, done.stderr
    left = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] == command
    ]
    assert left == []


# ------------------------------------------------------------------- stored outputs


def small_notebook() -> nbformat.NotebookNode:
    """Return a notebook of eight cells as it is stored after a run."""
    cells = []
    for number in range(1, 9):
        output = nbformat.v4.new_output("stream", text=f"{number * number}\n")
        source = f"print({number} * {number})"
        cells.append(nbformat.v4.new_code_cell(source, execution_count=number, outputs=[output]))
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.parametrize(
    "fault", [None, *OUTPUT_FAULTS], ids=lambda fault: fault.name if fault else "as it was run"
)
def test_stored_outputs_fail_with_the_reason(tmp_path, monkeypatch, fault):
    notebook = small_notebook()
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "executed.ipynb")  # what the grader saw
    if fault:
        fault.mark(notebook.cells)
    nbformat.write(notebook, tmp_path / "notebooks" / "pet_segmentation.ipynb")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(notebook_criteria, "RUN_FOLDER", tmp_path)
    monkeypatch.setattr(notebook_criteria, "STORED", tmp_path)
    with pytest.raises(AssertionError, match=re.escape(fault.why)) if fault else nullcontext():
        notebook_criteria.test_stored_outputs_reproduce()


def test_cell_that_ends_the_kernel_is_named(tmp_path, monkeypatch):
    notebook = small_notebook()
    notebook.metadata.kernelspec = {
        "name": "python3",
        "language": "python",
        "display_name": "Python 3",
    }
    notebook.cells[2].source = "import os; os._exit(0)"
    for name in ("notebooks", "support", "grading"):
        (tmp_path / name).mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "pet_segmentation.ipynb")
    shutil.copy(ROOT / "support" / "sample_pets.py", tmp_path / "support")
    (tmp_path / "grading" / "spy.py").touch()
    monkeypatch.setenv("PYTHONPATH", "")  # the grader sets it: so it is put back
    monkeypatch.chdir(tmp_path)
    grader.execute(tmp_path, [].append)
    monkeypatch.setattr(notebook_criteria, "RUN_FOLDER", tmp_path)
    with pytest.raises(pytest.fail.Exception, match="ended its kernel in code cell 3, 'import os"):
        notebook_criteria.test_notebook_runs_to_its_end()


# ------------------------------------------------------------------- the student edition


def test_student_edition_keeps_docstrings_and_loses_bodies(source):
    cut = ast.parse(without_bodies(source, TO_WRITE))
    bodies = [node.body for node in ast.walk(cut) if isinstance(node, ast.FunctionDef)]
    assert sum(
        isinstance(body[-1], ast.Raise) and "Write " in ast.unparse(body[-1]) for body in bodies
    ) == len(TO_WRITE)

    def docstrings(tree: ast.Module) -> list[str | None]:
        return [
            ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        ]

    kept = docstrings(cut)
    assert [text for text in docstrings(ast.parse(source)) if text and text not in kept] == []
    assert without_bodies(source, []) == source


def test_score_rises_function_by_function():
    """From at most 10 % for the edition as it is handed out to all points, as bodies are put back."""
    done = run("student", "--prove")
    names, points = list(TO_WRITE), list(map(int, done.stdout.split()))
    most = sum(row["points"] for row in OF_MODULE)
    assert len(points) == len(names) + 1, done.stderr
    assert points[0] <= 0.1 * most
    assert points[-1] == most
    rises = [after - before for before, after in pairwise(points)]
    assert min(rises) >= 0, points
    idle = {name for name, rise in zip(names, rises, strict=True) if rise == 0}
    assert idle <= {"UNet.__init__"}, points  # a net without its forward pass can't be tried


def test_student_edition_is_complete_and_holds_no_grader(tmp_path):
    folder = tmp_path / "student"
    write_edition(folder)
    assert not [
        path
        for path in folder.rglob("*.py")
        if "mutant" in path.name or path.name == "test_notebook.py"
    ]
    cells = nbformat.read(folder / "notebooks" / "pet_segmentation.ipynb", as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs")]
    done = run("grade", "--quick", "--hints", cwd=folder)
    assert "hint: " in done.stdout
    assert "Write conv_plus_conv: " in done.stdout
    assert int(re.search(r"^(\d+) of 80 points", done.stdout, re.MULTILINE)[1]) <= 8


def test_data_section_of_the_student_edition_runs(tmp_path):
    """All cells before the first that shows a function to be written run; the first to use one says what to write."""
    folder = tmp_path / "student"
    write_edition(folder)
    cells = nbformat.read(folder / "notebooks" / "pet_segmentation.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    first = next(place for place, text in enumerate(code) if "pets.UNet(" in text)
    assert first > 15
    script = "In = []\n" + "\n".join(code[:first]).replace("LIMIT: int = 0", "LIMIT: int = 50")
    script += "\nprint('the data section ran')\n" + code[first]
    (folder / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True)
    assert "the data section ran" in done.stdout, done.stderr[-2000:]
    assert "NotImplementedError: Write UNet.__init__" in done.stderr


# ------------------------------------------------------------------- workflows


def test_workflows_validate_against_githubs_schema():
    assert len(WORKFLOWS) == 2
    schema = ["--builtin-schema", "vendor.github-workflows"]
    command = [sys.executable, "-m", "check_jsonschema", *schema, *map(str, WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_of_workflows_exist(path):
    commands = re.findall(r"run: (.+)$", path.read_text(), re.MULTILINE)
    assert commands
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        words = [word for word in command.split() if "=" not in word]
        if words[0] == "make":
            target = words[-1]
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), command
            names = re.findall(r"(\w+)=", command)
            assert all(f"$({name})" in makefile for name in names), command
        elif words[0].startswith(".venv/bin/"):
            assert (Path(sys.executable).parent / Path(words[0]).name).exists(), command
        else:
            assert shutil.which(words[0]), command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_files_that_workflows_name_exist(path):
    for name in re.findall(r"cache-dependency-path: (?:grader/)?(\S+)", path.read_text()):
        assert (ROOT / name).exists()
