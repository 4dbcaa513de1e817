"""Execute a hand-in's notebook from a clean state, with small parameters, on pictures drawn with another seed."""

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import nbformat

SECONDS = 180  # for all of its cells, also on a busy machine
RUN = "graded"
PARAMETERS = {
    "IMAGE_SIZE": 32,
    "BASE_CHANNELS": 8,
    "DEPTH": 4,
    "EPOCHS": 10,
    "PRECISION": "float32",
    "RUN_NAME": RUN,
}
NBVAL_COMMENT = re.compile(r"^\s*#\s*(NBVAL|PYTEST_VALIDATE)_\w+\s*$", re.MULTILINE)
SEED = "seed: int = 0, side: int"  # the default in sample_pets.py, which the notebook takes


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy without outputs, comments for nbval and tags, but for the tag that papermill needs."""
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": ["parameters"] if "parameters" in tags else []})
        if cell.cell_type == "code":
            cell.source, cell.outputs, cell.execution_count = (
                NBVAL_COMMENT.sub("", cell.source),
                [],
                None,
            )
    return notebook


def execute(folder: Path, report: Callable[[dict], None]) -> None:
    """Execute the notebook that is staged in `folder`; what it did is judged by its files, runs/graded and all."""
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    pictures = folder / "support" / "sample_pets.py"
    text = pictures.read_text()
    assert text.count(SEED) == 1, f"support/sample_pets.py no longer says {SEED!r}"
    pictures.write_text(text.replace(SEED, SEED.replace("0", str(secrets.randbelow(2**31)))))
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    notebook = cleaned(nbformat.read("notebooks/pet_segmentation.ipynb", as_version=4))
    spy = "import sys\nsys.path.insert(0, '../grading')\nsys.path.insert(0, 'grading')\nimport spy"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(spy))
    nbformat.write(notebook, "notebooks/clean.ipynb")
    try:
        # Papermill writes it after each cell, so one that ends the kernel still leaves the cells
        # before it.
        execute_notebook("notebooks/clean.ipynb", "executed.ipynb", PARAMETERS, progress_bar=False)
    except PapermillExecutionError as error:
        report({"error": f"{error.ename}: {error.evalue}"})
    cells = nbformat.read("executed.ipynb", as_version=4).cells
    answers = re.findall(r"^(?:right: |\d+: )(.+)$", "\n".join(map(printed, cells)), re.MULTILINE)
    right = sum(answer in ("True", "right") for answer in answers)
    report({"quiz": f"Of {len(answers)} answers of the quiz {right} are right."})


def printed(cell: nbformat.NotebookNode) -> str:
    """Return what a cell printed."""
    return "".join(
        output.text for output in cell.get("outputs", []) if output.output_type == "stream"
    )
