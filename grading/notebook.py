"""Read a hand-in's notebook, whichever editor wrote it, and execute it from a clean state.

It is executed with small parameters, on pictures that are drawn with another seed.
"""

import ast
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

SECONDS = 180  # for all of its cells, also on a busy machine
RUN = "graded"
PLACES = {"DATA_DIR": "data", "DEVICE": "cpu", "PHOTO": "", "DOWNLOAD": False, "RESUME": False}
PARAMETERS = {  # all that say where, on what and what is scored; how to train is the learner's
    **PLACES,
    "DATASET": "sample",
    "IMAGE_SIZE": 32,
    "BASE_CHANNELS": 8,
    "EPOCHS": 6,
    "RUN_NAME": RUN,
    "LIMIT": 0,
    "SCORE_SIZE": 0,
    "MASK_RESIZE": "nearest",
    "DEPTH": 4,
    "NORMS": 2,
    "SKIPS": True,
    "SMALL_EPOCHS": "",
    "BATCH_SIZE": 16,
    "AUGMENT": 0.0,  # so that the images that a net sees are known again
    "FLIP": False,
    "SEED": 0,
    "PRECISION": "float32",
}
KERNEL = {"name": "python3", "language": "python", "display_name": "Python 3"}
NBVAL_COMMENT = re.compile(r"^\s*#\s*(NBVAL|PYTEST_VALIDATE)_\w+\s*$", re.MULTILINE)
SEED = "seed: int = 0, side: int"  # the default in sample_pets.py, which the notebook takes


def read(path: Path) -> NotebookNode:
    """Return a notebook as this machine would have written it: its kernel, line ends and ids.

    The cell of the parameters gets its tag again if an editor has lost it.
    """
    notebook = nbformat.reads(path.read_bytes().decode("utf-8-sig"), as_version=4)
    cells = []
    for number, cell in enumerate(notebook.cells):
        kept = {key: cell[key] for key in ("outputs", "execution_count") if key in cell}
        new = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")
        source = cell.source.replace("\r\n", "\n")
        tags = list(cell.metadata.get("tags", []))
        cells.append(new(source, id=f"cell-{number}", metadata={"tags": tags}, **kept))
    code = [cell for cell in cells if cell.cell_type == "code"]
    if code and not any("parameters" in cell.metadata.tags for cell in code):
        max(code, key=count_parameters).metadata.tags.append("parameters")
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def count_parameters(cell: NotebookNode) -> int:
    """Return how many of the parameters a cell assigns."""
    return len(assigned(cell.source).keys() & PARAMETERS.keys())


def assigned(source: str) -> dict[str, ast.expr]:
    """Return the names that some code assigns at its top level with what they get.

    There are none if it is no Python, a command of IPython's for example.
    """
    try:
        lines = ast.parse(source).body
    except SyntaxError:
        return {}
    lines = [line for line in lines if isinstance(line, ast.Assign | ast.AnnAssign)]
    pairs = [
        (name, line.value)
        for line in lines
        for name in (line.targets if isinstance(line, ast.Assign) else [line.target])
    ]
    return {name.id: value for name, value in pairs if isinstance(name, ast.Name)}


def value_of(name: str, notebook: NotebookNode) -> object:
    """Return the literal that a parameter has in a notebook, by default the grader's own."""
    for cell in notebook.cells:
        value = assigned(cell.source).get(name) if "parameters" in cell.metadata.tags else None
        if isinstance(value, ast.Constant):
            return value.value
    return PARAMETERS[name]


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Return the code cells alone, without outputs, comments for nbval and other tags than one."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells = [nbformat.v4.new_code_cell(NBVAL_COMMENT.sub("", cell.source)) for cell in code]
    for cell, old in zip(cells, code, strict=True):
        cell.metadata["tags"] = ["parameters"] if "parameters" in old.metadata.tags else []
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def execute(folder: Path, report: Callable[[dict], None]) -> None:
    """Execute the notebook staged in `folder`, all cells; its files, runs/graded and all, tell."""
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    pictures = folder / "support" / "sample_pets.py"
    text = pictures.read_text(encoding="utf-8")
    assert text.count(SEED) == 1, f"support/sample_pets.py no longer says {SEED!r}"
    drawn = SEED.replace("0", str(secrets.randbelow(2**31)))
    pictures.write_text(text.replace(SEED, drawn), encoding="utf-8")
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    notebook = cleaned(read(Path("notebooks/pet_segmentation.ipynb")))
    spy = "import sys\nsys.path.insert(0, '../grading')\nsys.path.insert(0, 'grading')\nimport spy"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(spy))
    nbformat.write(notebook, "notebooks/clean.ipynb")
    options = {"progress_bar": False, "allow_errors": True}
    try:
        # Papermill writes it after each cell, so one that ends the kernel still leaves the others.
        execute_notebook("notebooks/clean.ipynb", "executed.ipynb", PARAMETERS, **options)
    except PapermillExecutionError as error:
        report({"error": f"{error.ename}: {error.evalue}"})
    except DeadKernelError:
        mark_the_last("executed.ipynb")
    cells = nbformat.read("executed.ipynb", as_version=4).cells
    answers = re.findall(r"^(?:right: |\d+: )(.+)$", "\n".join(map(printed, cells)), re.MULTILINE)
    right = sum(answer in ("True", "right") for answer in answers)
    report({"quiz": f"Of {len(answers)} answers of the quiz {right} are right."})


def mark_the_last(path: str) -> None:
    """Give the last cell that papermill began an error: it ended the kernel.

    Whether such a cell has an execution count depends on timing, and papermill calls the cells
    that it never began completed.
    """
    notebook = nbformat.read(path, as_version=4)
    last = [cell for cell in notebook.cells if cell.metadata.papermill.start_time][-1]
    told = {"ename": "DeadKernelError", "evalue": "the cell ended its kernel", "traceback": []}
    last.outputs.append(nbformat.v4.new_output("error", **told))
    nbformat.write(notebook, path)


def printed(cell: NotebookNode) -> str:
    """Return what a cell printed."""
    outputs = cell.get("outputs", [])
    return "".join(output.text for output in outputs if output.output_type == "stream")
