"""Run a hand-in's notebook on pictures that differ from others in the test split alone.

What comes before the test score must not: the weights are the same, bit for bit, or something of
the test images decided. So that little time is needed, the runs are small, and end when the
weights are saved.
"""

import json
import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from grading.notebook import PARAMETERS, RUN, cleaned, read

SMALL = PARAMETERS | {"BASE_CHANNELS": 4, "EPOCHS": 3, "AUGMENT": 0.0}
SECONDS = 60
# A pet becomes background, background a border and so on. Whoever learned from these labels has
# learned something else, and what was best by the true ones is now among the worst.
OTHER_TEST = """

_drawn_truly = draw_sample_pets


def draw_sample_pets(*arguments, **named):
    folder = _drawn_truly(*arguments, **named)
    lines = (folder / "annotations" / "test.txt").read_text(encoding="utf-8").splitlines()
    for name in (line.split()[0] for line in lines):
        path = folder / "annotations" / "trimaps" / f"{name}.png"
        trimap = np.array(Image.open(path))
        Image.fromarray((trimap % 3 + 1).astype(np.uint8)).save(path)
    return folder
"""
SPY = """
import sys
sys.path[:0] = ["../grading", "grading"]
import spy
"""


class WeightsSaved(Exception):
    """The notebook has got as far as needed."""


def run(source: Path, folder: Path, other_test: bool) -> None:
    """Copy the staged hand-in to a new folder and run its notebook until weights are saved."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("runs", "data"))
    if other_test:
        with (folder / "support" / "sample_pets.py").open("a", encoding="utf-8") as file:
            file.write(OTHER_TEST)
    notebook = cleaned(read(folder / "notebooks" / "pet_segmentation.ipynb"))
    at = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    given = "\n".join(f"{name} = {value!r}" for name, value in SMALL.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(given))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SPY))
    weights = folder / "runs" / RUN / "weights.pt"

    def stop(**_: object) -> None:
        if weights.exists():
            raise WeightsSaved

    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
        on_cell_executed=stop,
    )
    os.environ["PYTHONPATH"] = str(folder)
    try:
        client.execute()
    except WeightsSaved:
        return
