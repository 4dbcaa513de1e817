"""Write the edition for students, without what they have to write: `python -m grading.student`.

Bodies are cut out by the syntax tree, so that the solution needs no markers; docstrings stay.
"""

import ast
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Collection
from pathlib import Path

import nbformat

from grading.grade import (
    MODULE,
    NOTEBOOK,
    ROOT,
    Criterion,
    HandIn,
    attempt,
    copy_around_notebooks,
    expected_tests,
    judge,
    prepare,
    read_rubric,
)

TEXTS = tomllib.loads((ROOT / "grading" / "student.toml").read_text(encoding="utf-8"))
TO_WRITE = TEXTS["to_write"]
OWN = ("pyproject.toml", "requirements.txt", ".gitignore")  # beside all modules at the top
CHECK = (
    "grading/__main__.py",
    "grading/grade.py",
    "grading/hand_ins.py",
    "grading/sandbox.py",
    "grading/guard.py",
    "grading/canary.py",
    "tests/conftest.py",
    "tests/doctor.py",
    "tests/drawn.py",
    "tests/test_scores.py",
)


def without_bodies(source: str, names: Collection[str]) -> str:
    """Return a module's source whose functions named only say that they are to be written."""
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    functions = {
        f"{parent.name}.{node.name}" if isinstance(parent, ast.ClassDef) else node.name: node
        for parent in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)))
        for node in parent.body
        if isinstance(node, ast.FunctionDef)
    }
    # Upwards: lines keep their places.
    for name in sorted(names, key=lambda name: -functions[name].lineno):
        node = functions[name]
        before = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        indent = " " * node.body[0].col_offset
        told = f'{indent}    "Write {name}: {TO_WRITE[name]}."\n'
        lines[before : node.end_lineno] = [f"{indent}raise NotImplementedError(\n{told}{indent})\n"]
    return "".join(lines)


def cleared(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook without outputs, and without answers to the quiz."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if "quiz" in cell.metadata.get("tags", []):
                cell.source = re.sub(
                    "^answer = .*", "answer = ...", cell.source, flags=re.MULTILINE
                )
    return notebook


def write_edition(folder: Path) -> None:
    """Write the edition into a folder, in place of what was there, but for an environment."""
    kept = [path for path in folder.glob("*") if path.name != ".venv"]
    for path in kept:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    patterns = ("*.py", "support/*.py", "shapes/*.py", "tests/test_rubric_*.py")
    files = [path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)]
    for name in (*OWN, *CHECK, *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    rubric = (ROOT / "grading" / "rubric.toml").read_text(encoding="utf-8")
    todo = "\n".join(
        f"{n}. `{name}`: {what}." for n, (name, what) in enumerate(TO_WRITE.items(), 1)
    )
    texts = {
        "grading/rubric.toml": rubric.partition("# The notebook's criteria")[0],
        MODULE: without_bodies((ROOT / MODULE).read_text(encoding="utf-8"), TO_WRITE),
        "Makefile": TEXTS["makefile"],
        "README.md": TEXTS["readme"].format(todo=todo),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    copy_around_notebooks(folder)
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    nbformat.write(cleared(notebook), folder / NOTEBOOK)


def prove() -> list[int]:
    """Return the module's points for the edition, and as each function is put back in turn."""
    prepare()
    rubric = read_rubric(quick=True).criteria
    expected = expected_tests(rubric)
    # In one process: quicker.
    every = Criterion("all", 0, "", [test for c in rubric for test in c.tests], seconds=120)
    names, source = list(TO_WRITE), (ROOT / MODULE).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="student-") as temporary:
        modules = [Path(temporary).resolve() / f"{solved}.py" for solved in range(len(names) + 1)]
        for solved, module in enumerate(modules):
            module.write_text(without_bodies(source, names[solved:]), encoding="utf-8")
        hand_ins = [(HandIn(module, module), [every]) for module in modules]
        ends = [outcomes["all"] for outcomes in attempt(hand_ins, 900)]
    return [sum(c.points * judge(c, expected[c.id], end).passed for c in rubric) for end in ends]


if __name__ == "__main__":
    if sys.argv[1:] == ["--prove"]:
        sys.exit(print(*prove()))
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "student"
    full = target.exists() and any(target.iterdir())
    if full and not (target / "grading" / "rubric.toml").exists():
        sys.exit(f"{target} holds something else: name another folder.")
    write_edition(target)
    print(f"Wrote the student edition into {target}")
