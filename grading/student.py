"""Write the edition for students, without what they have to write: `python -m grading.student`.

Bodies are cut out by the syntax tree, so that the solution needs no markers; docstrings stay.
"""

import ast
import shutil
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path

import nbformat

from grading import grade as grader
from grading.grade import MODULE, NOTEBOOK, ROOT

TEXTS = tomllib.loads((ROOT / "grading" / "student.toml").read_text(encoding="utf-8"))
TO_WRITE = TEXTS["to_write"]
OWN = ("pyproject.toml", "requirements.txt", ".gitignore")  # beside all modules at the top
GRADING = ("__main__", "canary", "grade", "guard", "hand_ins", "sandbox")
TESTS = ("conftest", "doctor", "drawn", "test_scores")


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


def write_edition(folder: Path) -> None:
    """Write the edition into a folder, in place of what was there, but for an environment."""
    for path in [path for path in folder.glob("*") if path.name != ".venv"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    patterns = [*OWN, "*.py", "support/*.py", "shapes/*.py", "tests/test_rubric_*.py"]
    patterns += [f"grading/{name}.py" for name in GRADING] + [f"tests/{name}.py" for name in TESTS]
    for name in [path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    rubric = (ROOT / "grading" / "rubric.toml").read_text(encoding="utf-8")
    todo = [f"{n}. `{name}`: {what}." for n, (name, what) in enumerate(TO_WRITE.items(), 1)]
    texts = {
        "grading/rubric.toml": rubric.partition("# The notebook's criteria")[0],
        MODULE: without_bodies((ROOT / MODULE).read_text(encoding="utf-8"), TO_WRITE),
        "Makefile": TEXTS["makefile"],
        "README.md": TEXTS["readme"].format(todo="\n".join(todo)),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    grader.copy_around_notebooks(folder)
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / NOTEBOOK)


def prove() -> list[int]:
    """Return the module's points for the edition, and as each function is put back in turn."""
    grader.prepare()
    rubric = grader.read_rubric(quick=True).criteria
    expected = grader.expected_tests(rubric)
    every = grader.join("all", rubric)  # in one process: quicker
    names, source = list(TO_WRITE), (ROOT / MODULE).read_text(encoding="utf-8")
    edition = [without_bodies(source, names[solved:]) for solved in range(len(names) + 1)]
    hand_ins = [(grader.HandIn({MODULE: text.encode()}), [every]) for text in edition]
    ends = [outcomes["all"] for outcomes in grader.attempt(hand_ins, 900)]
    return [sum(grader.judge(c, expected[c.id], end).points for c in rubric) for end in ends]


if __name__ == "__main__":
    if sys.argv[1:] == ["--prove"]:
        sys.exit(print(*prove()))
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "student"
    if any(target.glob("*")) and not (target / "grading" / "rubric.toml").exists():
        sys.exit(f"{target} holds something else: name another folder.")
    write_edition(target)
    print(f"Wrote the student edition into {target}")
