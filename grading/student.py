"""Write the student edition: `python -m grading.student [FOLDER]`, the project without what a
student has to write.

Bodies are cut out by the syntax tree, so that the solution needs no markers; docstrings stay.
"""

import ast
import shutil
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import nbformat

from grading.grade import (
    ROOT,
    Criterion,
    attempt,
    copy_around_notebooks,
    expected_tests,
    judge,
    prepare,
    read_rubric,
)

TO_WRITE = {  # by name, in the order in which it can be solved
    "conv_plus_conv": "return (3 x 3 convolution, BatchNorm, LeakyReLU 0.2) twice, as one nn.Sequential",
    "UNet.__init__": "make the blocks of each level down, of the bottleneck and of each level up, "
    "and out, the last convolution",
    "UNet.forward": "refuse odd sides by check_side; go down and keep the skips, pass the bottleneck, go up again",
    "confusion_matrix": "count the pairs (truth, predicted) of all pixels whose truth is not IGNORE",
    "scores": "derive accuracy, and IoU and Dice by class, from the matrix; return all that the docstring names",
    "segmentation_loss": "add cross-entropy and Dice loss, both without the pixels that are IGNORE",
    "predict": "in batches: logits by run_model, resized to `size`, softmax, and its maximum over the classes",
    "evaluate": "predict batch by batch at the masks' side, and count a confusion matrix for each image",
    "train_epoch": "in random full batches: augment, as strongly as AUGMENT says, run_model, loss, backward, step, "
    "schedule, average",
}
OWN = ("pyproject.toml", "requirements.txt", ".gitignore")  # beside all modules at the top
CHECK = (
    "grading/grade.py",
    "grading/sandbox.py",
    "grading/guard.py",
    "grading/canary.py",
    "tests/conftest.py",
    "tests/doctor.py",
    "tests/drawn.py",
    "tests/test_scores.py",
)
MAKEFILE = """# `make check` tells how many of the module's points you have, with hints; `make lab` opens the notebook.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: check lab

check: .venv/installed
	@$(BIN)/python -m grading.grade --quick --hints

lab: .venv/installed
	$(BIN)/jupyter lab notebooks/pet_segmentation.ipynb

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
"""


def without_bodies(source: str, names: Collection[str]) -> str:
    """Return a module's source in which the functions named raise NotImplementedError, below their docstrings."""
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    functions = {
        f"{parent.name}.{node.name}" if isinstance(parent, ast.ClassDef) else node.name: node
        for parent in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)))
        for node in parent.body
        if isinstance(node, ast.FunctionDef)
    }
    for name in sorted(
        names, key=lambda name: -functions[name].lineno
    ):  # upwards: lines keep their places
        node = functions[name]
        before = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        indent = " " * node.body[0].col_offset
        text = f'"Write {name}: {TO_WRITE[name]}."'
        lines[before : node.end_lineno] = [
            f"{indent}raise NotImplementedError(\n{indent}    {text}\n{indent})\n"
        ]
    return "".join(lines)


def cleared(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook without outputs, and without answers to the quiz."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if "quiz" in cell.metadata.get("tags", []):
                lines = cell.source.splitlines()
                cell.source = "\n".join(
                    "answer = ..." if line.startswith("answer = ") else line for line in lines
                )
    return notebook


def write_edition(folder: Path) -> None:
    """Write the student edition into a folder, in the place of what was there, but for an environment."""
    kept = [path for path in folder.glob("*") if path.name != ".venv"]
    for path in kept:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    files = [
        path.relative_to(ROOT)
        for pattern in ("*.py", "support/*.py", "tests/test_rubric_*.py")
        for path in ROOT.glob(pattern)
    ]
    for name in (*OWN, *CHECK, *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    rubric = (ROOT / "grading" / "rubric.toml").read_text()
    (folder / "grading" / "rubric.toml").write_text(
        rubric.partition("# The notebook's criteria")[0]
    )
    (folder / "petseg_utils.py").write_text(
        without_bodies((ROOT / "petseg_utils.py").read_text(), TO_WRITE)
    )
    (folder / "Makefile").write_text(MAKEFILE)
    copy_around_notebooks(folder)
    notebook = nbformat.read(ROOT / "notebooks" / "pet_segmentation.ipynb", as_version=4)
    nbformat.write(cleared(notebook), folder / "notebooks" / "pet_segmentation.ipynb")
    todo = "\n".join(
        f"{number}. `{name}`: {what}." for number, (name, what) in enumerate(TO_WRITE.items(), 1)
    )
    (folder / "README.md").write_text(
        "# Your task: a U-Net for the Oxford-IIIT Pets\n\nOpen the notebook with `make lab` and read. Where it stops, "
        f"write the function of `petseg_utils.py` that it names:\n\n{todo}\n\n`make check` shows your points, with "
        "hints. Hand in `petseg_utils.py` and the notebook, run from top to bottom.\n"
    )


def prove() -> list[int]:
    """Return the points of the module's criteria for the edition as it is, and as each function is put back in turn."""
    prepare()
    rubric = read_rubric(quick=True).criteria
    expected = expected_tests(rubric)
    every = Criterion(
        "all", 0, "", [test for c in rubric for test in c.tests], seconds=120
    )  # in one process: quicker
    names = list(TO_WRITE)
    with tempfile.TemporaryDirectory(prefix="student-") as temporary:
        modules = [Path(temporary).resolve() / f"{solved}.py" for solved in range(len(names) + 1)]
        for solved, module in enumerate(modules):
            module.write_text(
                without_bodies((ROOT / "petseg_utils.py").read_text(), names[solved:])
            )
        ends = [
            outcomes["all"]
            for outcomes in attempt([(module, module, [every]) for module in modules], 900)
        ]
    return [sum(c.points * judge(c, expected[c.id], end).passed for c in rubric) for end in ends]


if __name__ == "__main__":
    if sys.argv[1:] == ["--prove"]:
        sys.exit(print(*prove()))
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "student"
    if (
        target.exists()
        and any(target.iterdir())
        and not (target / "grading" / "rubric.toml").exists()
    ):
        sys.exit(f"{target} holds something else: name another folder.")
    write_edition(target)
    print(f"Wrote the student edition into {target}")
