"""Read a hand-in's notebook, whichever editor wrote it, and execute it from a clean state.

It is executed with small parameters, on pictures that the grader draws by a seed of its own.
"""

import asyncio
import logging
import os
import re
import shutil
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import nbformat
import numpy as np
import pytest
import torch
from ipykernel.kernelapp import IPKernelApp
from jupyter_client import KernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError
from PIL import Image

NOTEBOOK = Path("notebooks/pet_segmentation.ipynb")
SECONDS = 180  # for all of its cells, also on a busy machine
RUN = "graded"
WEIGHTS = Path("runs") / RUN / "weights.pt"
PICTURES = {"trainval": 250, "test": 250}  # more than LIMIT, which has to be obeyed
PLACES = {"DATA_DIR": "data", "DEVICE": "cpu", "PHOTO": "", "DOWNLOAD": False, "RESUME": False}
# All that say where, on what and what is scored; how to train is the learner's.
PARAMETERS = PLACES | {
    "DATASET": "sample", "LIMIT": 240, "HOLD_OUT": 0.15, "RUN_NAME": RUN, "SEED": 3,
    "IMAGE_SIZE": 32, "SCORE_SIZE": 48, "MASK_RESIZE": "nearest", "FLIP": True,
    "BASE_CHANNELS": 8, "DEPTH": 4, "NORMS": 1, "SKIPS": True, "EPOCHS": 8, "SMALL_EPOCHS": "",
    "BATCH_SIZE": 16, "PRECISION": "float32", "AUGMENT": 0.0,  # so that images are known again
}  # fmt: skip
KERNEL = {"name": "python3", "language": "python", "display_name": "Python 3"}
NBVAL_COMMENT = re.compile(r"^\s*#\s*(NBVAL|PYTEST_VALIDATE)_\w+\s*$", re.MULTILINE)
AS_DRAWN = """
draw_anew = draw_sample_pets

def draw_sample_pets(root, *given, **named):
    return draw_anew(root, *given, **named) if given or named else Path({!r})
"""
SPY = "import grading.spy"
UNTIL_SAVED = f"""{SPY}, grading.sketch
get_ipython().events.register("post_run_cell", grading.spy.leave)
"""
DEAD = "dead"  # the name of a file that says that a cell ended its kernel


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
        most = max(code, key=lambda cell: len(assigned(cell.source).keys() & PARAMETERS.keys()))
        most.metadata.tags.append("parameters")
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def assigned(source: str) -> dict[str, str]:
    """Return the names that code assigns, each at the start of a line, with the text they get."""
    return dict(re.findall(r"^(\w+) *(?::[^=\n]+)?=(?!=) *([^#\n]*)", source, re.MULTILINE))


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Return the code cells alone, without outputs, comments for nbval and other tags than one."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells = [nbformat.v4.new_code_cell(NBVAL_COMMENT.sub("", cell.source)) for cell in code]
    for cell, old in zip(cells, code, strict=True):
        cell.metadata["tags"] = ["parameters"] if "parameters" in old.metadata.tags else []
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def draw_pictures(folder: Path, seed: int) -> None:
    """Draw what all hand-ins are run on: new pictures, the notebook's own, and turned ones.

    The last have each pet of the test images labelled background, background border and so on. Who
    learned from these labels has learned something else, and what did best by the true ones does
    worst.
    """
    from petseg_utils import TRIMAP_FILE, draw_sample_pets, read_split

    draw_sample_pets(folder / "default")
    new = draw_sample_pets(folder / "new", **PICTURES, seed=seed)
    turned = shutil.copytree(new, folder / "turned" / new.name)
    for name in read_split(turned, "test"):
        path = turned / TRIMAP_FILE.format(name)
        trimap = np.array(Image.open(path))
        Image.fromarray((trimap % 3 + 1).astype(np.uint8)).save(path)


async def fork_kernel(manager: KernelManager, kernel_cmd: list[str], **kw: object) -> None:
    """Fork a kernel from this process: what was imported here needs no seconds there."""
    given = kernel_cmd[kernel_cmd.index("-f") :]
    os.environ["PYTHONPATH"] = os.getcwd()  # the staged folder
    await launch(manager, kernel_cmd, preexec_fn=lambda: be_kernel(given), **kw)


launch = KernelManager._async_launch_kernel
with_forked_kernels = patch.object(KernelManager, launch.__name__, fork_kernel)


@with_forked_kernels
def run_nbval(folder: Path) -> None:
    """Run nbval on the notebook that lies in `folder`; nbval.xml there tells."""
    os.chdir(folder)
    options = ["-pnbval", "--nbval", "--nbval-cell-timeout=150", "-pno:cacheprovider"]
    pytest.main([*options, "--junitxml=nbval.xml", "-c", "pyproject.toml", str(NOTEBOOK)])


@with_forked_kernels
def execute(folder: Path, pictures: Path, first: str = SPY) -> None:
    """Execute a `first` cell and all of the notebook staged in `folder` on drawn pictures."""
    with (folder / "support" / "sample_pets.py").open("a", encoding="utf-8") as file:
        file.write(AS_DRAWN.format(str(pictures / "oxford-iiit-pet")))
    os.chdir(folder)
    notebook = cleaned(read(NOTEBOOK))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    nbformat.write(notebook, "notebooks/clean.ipynb")
    options = {"progress_bar": False, "allow_errors": True}
    try:
        # Papermill writes it after each cell, so one that ends the kernel still leaves the others.
        with suppress(PapermillExecutionError):  # the cell tells
            execute_notebook("notebooks/clean.ipynb", "executed.ipynb", PARAMETERS, **options)
    except DeadKernelError:
        Path(DEAD).touch()


def be_kernel(arguments: list[str]) -> None:
    """Be a kernel as if started anew, in a process just forked; this never returns."""
    os.closerange(3, 4096)  # the way to the grader, and the pipe on which `subprocess` waits
    sys.path.insert(0, os.environ["PYTHONPATH"])
    installed = tuple(sysconfig.get_paths().values())
    for name, module in list(sys.modules.items()):
        place = getattr(module, "__file__", None) or [*getattr(module, "__path__", ()), ""][0]
        # The grader's, of which the hand-in has its own, and what reads settings when imported.
        if name.startswith("tqdm") or (place[:1] == "/" and not place.startswith(installed)):
            del sys.modules[name]
    torch.set_num_threads(1)  # what a net learns depends on how many there are
    torch.manual_seed(torch.Generator().initial_seed())  # as in every new process
    logging.root.handlers.clear()  # pytest's
    asyncio.set_event_loop(asyncio.new_event_loop())  # the old one's files are closed
    IPKernelApp.launch_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])
    os._exit(0)


def quiz_of(path: Path) -> str:
    """Return how many answers of the quiz are right in an executed notebook."""
    cells = nbformat.read(path, as_version=4).cells
    answers = re.findall(r"^\d+: (.+)$", "\n".join(map(printed, cells)), re.MULTILINE)
    return f"Of {len(answers)} answers of the quiz {answers.count('right')} are right."


def printed(cell: NotebookNode) -> str:
    """Return what a cell printed."""
    outputs = cell.get("outputs", [])
    return "".join(output.text for output in outputs if output.output_type == "stream")
