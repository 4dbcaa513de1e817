"""Criteria of the rubric: what a hand-in's notebook leaves when the grader executes it.

Here `petseg_utils` is the grader's own. GRADED_RUN is the folder in which the notebook was
executed, GRADED_STORED one in which it lies as it was handed in.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import petseg_utils as pets
from grading import notebook as grader
from grading.notebook import NBVAL_COMMENT, PARAMETERS, PLACES, RUN
from support.tensor_files import load_tensors
from support.trace import names_in_use

RUN_FOLDER = Path(os.environ.get("GRADED_RUN", "."))  # empty while tests are only counted
FOLDER = RUN_FOLDER / "runs" / RUN
STORED = Path(os.environ.get("GRADED_STORED", "."))
NOTEBOOK = "notebooks/pet_segmentation.ipynb"
SIDE = PARAMETERS["IMAGE_SIZE"]
NUMBERS = {"trainval": 320, "test": 80}  # of the pictures that the grader had drawn
FEWEST_FIGURES = 8
MOST_IGNORED = 1 / 4  # of the code cells


def executed() -> list[nbformat.NotebookNode]:
    """Return the code cells that the grader executed, without those that it added itself."""
    cells = nbformat.read(RUN_FOLDER / "executed.ipynb", as_version=4).cells
    ours = ("import spy", "# Parameters\n")
    return [
        c
        for c in cells
        if c.cell_type == "code" and not c.source.endswith(ours[0]) and ours[1] not in c.source
    ]


def stored() -> nbformat.NotebookNode:
    """Return the code cells of the notebook as they were handed in."""
    notebook = grader.read(STORED / NOTEBOOK)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return notebook


def read(name: str) -> dict | list[dict]:
    """Return a file of the run. Errors: AssertionError if it is not there."""
    path = FOLDER / name
    assert path.is_file(), f"expected the file {name} in the run's folder, found none"
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else list(csv.DictReader(text.splitlines()))


@pytest.fixture(scope="session")
def dataset() -> Path:
    """Return the dataset, checked to be the one that the grader had drawn."""
    folder = RUN_FOLDER / "data" / "sample" / "oxford-iiit-pet"
    for split, number in NUMBERS.items():
        found = len(pets.read_split(folder, split))
        assert found == number, f"expected {number} pictures in {split}, found {found}"
    return folder


@pytest.fixture(scope="session")
def model() -> pets.UNet:
    """Return the grader's own net with the weights that the notebook saved."""
    return load_net()


def load_net() -> pets.UNet:
    """Return the grader's own net with the weights that the notebook saved.

    A hand-in may name its layers as it likes: they are matched by the order of their use.
    """
    model = pets.UNet(PARAMETERS["BASE_CHANNELS"], PARAMETERS["DEPTH"])
    path = FOLDER / "weights.pt"
    assert path.is_file(), "expected the file weights.pt in the run's folder, found none"
    weights, noted = load_tensors(path), RUN_FOLDER / "names.json"
    theirs = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else []
    own = dict(zip(theirs, names_in_use(model), strict=False))
    renamed = {own.get(name, name): tensor for name, tensor in weights.items()}
    try:
        model.load_state_dict(renamed)
    except RuntimeError:
        b, depth = model.base_channels, model.depth
        pytest.fail(f"expected the weights of a UNet({b}, {depth}), found those of another net")
    return model


@pytest.fixture(scope="session")
def rescored(dataset, model) -> dict[str, torch.Tensor]:
    """Return what the grader counts, (B, K, K), for the validation and the test images."""
    names = {"test": pets.read_split(dataset, "test")}
    names["valid"] = pets.hold_out(pets.read_split(dataset, "trainval"))[1]
    loaded = {split: pets.load_pets(dataset, some, SIDE) for split, some in names.items()}
    return {split: pets.evaluate(model, some, torch.float32) for split, some in loaded.items()}


def test_notebook_runs_to_its_end():
    for number, cell in enumerate(executed(), 1):
        where = f"code cell {number}, {cell.source.partition(chr(10))[0]!r}"
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors:
            pytest.fail(f"expected no error, found {told(errors[0])} in {where}")
        ended = cell.metadata.papermill.status == "completed"
        assert ended, f"expected every cell to end in time, found that {where} did not"
    assert len(executed()) == len(stored().cells), "expected all of the cells, found fewer"


def told(error: nbformat.NotebookNode) -> str:
    """Return an error in one line; a bare assert says nothing, so its own line is told."""
    line = re.search(r"^-+> *\d+ +(.+)", plain("\n".join(error.traceback)), re.MULTILINE)
    why = error.evalue or (line[1] if line else "no reason")
    return f"{error.ename}: {why}".partition("\n")[0]


def plain(text: str) -> str:
    """Return a text without the marks of a terminal's colours."""
    return re.sub(r"(\x1b|#x1B)\[[\d;]*m", "", text)


def test_weights_beat_the_majority_class_by_15_points(rescored):
    matrix = rescored["test"].sum(0)
    accuracy = pets.scores(matrix)["pixel_accuracy"]
    least = (matrix.sum(1).max() / matrix.sum()).item() + 0.15
    assert accuracy >= least, f"expected {least:.1%} of the test pixels right, found {accuracy:.1%}"


def test_metrics_are_what_the_weights_score(rescored):
    metrics, images = read("metrics.json"), read("images.csv")
    columns = [f"{true}_as_{predicted}" for true in pets.CLASSES for predicted in pets.CLASSES]
    for split, expected in rescored.items():
        found = pets.scores(expected.sum(0))
        for score in ("pixel_accuracy", "mean_iou"):
            claimed = metrics[split][score]
            right = claimed == pytest.approx(found[score], abs=0.002)
            wanted = f"{score} {found[score]:.3f} in {split}"
            assert right, f"expected {wanted}, found {claimed:.3f} in metrics.json"
        of_split = [row for row in images if row["split"] == split]
        listed = [[int(row[column]) for column in columns] for row in of_split]
        assert len(listed) == len(expected), (
            f"expected {len(expected)} images of {split}, found {len(listed)}"
        )
        wrong = (torch.tensor(listed) - expected.flatten(1)).abs().sum()
        others = (wrong / expected.sum()).item()
        assert others < 0.01, (
            f"expected images.csv to say what was counted, found {others:.1%} others in {split}"
        )


def test_history_has_a_row_for_every_epoch():
    history, expected = read("history.csv"), PARAMETERS["EPOCHS"]
    assert len(history) == expected, (
        f"expected {expected} rows in history.csv, found {len(history)}"
    )
    losses = [float(row["train_loss"]) for row in history]
    assert losses[-1] < losses[0], (
        f"expected the loss to fall, found {losses[0]:.3f} to {losses[-1]:.3f}"
    )


def test_submission_is_what_the_weights_predict(dataset, model):
    path = FOLDER / "submission.pt"
    assert path.is_file(), "expected the file submission.pt in the run's folder, found none"
    found = torch.load(path, weights_only=True)
    assert found.dtype == torch.uint8, f"expected bytes (uint8), found {found.dtype}"
    assert found.shape == (32, 1, 256, 256), (
        f"expected the shape (32, 1, 256, 256), found {tuple(found.shape)}"
    )
    listed = pets.read_split(dataset, "test")[:32]
    images = pets.load_pets(dataset, listed, SIDE).images
    expected = pets.predict(model, images, torch.float32, size=(256, 256))[0]
    alike = (found[:, 0] == expected).float().mean().item()
    assert alike > 0.998, (
        f"expected what the saved weights predict, found {alike:.1%} of the pixels alike"
    )


def test_split_is_honest(dataset):
    test, trainval = (set(pets.read_split(dataset, split)) for split in ("test", "trainval"))
    held = set(pets.hold_out(sorted(trainval))[1])
    notes = RUN_FOLDER / "calls.jsonl"
    calls = (
        [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
        if notes.exists()
        else []
    )
    for call in calls:
        for key in {"train_pets", "valid_pets"} & set(call):
            stray = test & set(call[key])
            assert not stray, f"expected no test image in {key}, found {len(stray)}"
        stray = held & set(call.get("train_pets", []))
        assert not stray, f"expected no held-out image among those trained on, found {len(stray)}"
    scored = [place for place, call in enumerate(calls) if test & set(call.get("pets", []))]
    trained = [place for place, call in enumerate(calls) if call["call"] == "train"]
    assert len(scored) <= 1, (
        f"expected the test images to be scored once, found {len(scored)} times"
    )
    assert not scored or not trained or scored[0] > trained[-1], (
        "expected the test score after training, found before"
    )
    images, sizes = read("images.csv"), read("metrics.json")["dataset"]
    assert {row["name"] for row in images if row["split"] == "test"} == test, (
        "expected all test images scored"
    )
    expected = {"train": len(trainval - held), "valid": len(held), "test": len(test)}
    found = {split: sizes[split] for split in expected}
    assert found == expected, f"expected the numbers of images {expected}, found {found}"


def test_figures_are_not_blank():
    figures = sorted((FOLDER / "figures").glob("*.png"))
    assert len(figures) >= FEWEST_FIGURES, (
        f"expected {FEWEST_FIGURES} figures or more, found {len(figures)}"
    )
    for path in figures:
        grey = np.asarray(Image.open(path).convert("L"))
        assert grey.std() > 5, f"expected something to see, found {path.name} blank"
    assert len({path.read_bytes() for path in figures}) == len(figures), (
        "expected different figures, found copies"
    )


def test_stored_outputs_reproduce():
    notebook = stored()
    cells = notebook.cells
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), (
        "expected the counts of one run from top to bottom, found others"
    )
    for number, (cell, fresh) in enumerate(zip(cells, executed(), strict=True), 1):
        where = f"code cell {number}, {cell.source.partition(chr(10))[0]!r}"
        lost = fresh.outputs and not cell.outputs
        assert not lost, f"expected stored outputs, found none in {where}"
    marks = [marks_of(cell) for cell in cells]
    skipped = sum("skip" in mark or "raises" in mark for mark in marks)
    assert skipped == 0, (
        f"expected every cell to be run, found {skipped} that nbval skips or lets fail"
    )
    ignored, most = sum("ignore" in mark for mark in marks), int(MOST_IGNORED * len(cells))
    assert ignored <= most, (
        f"expected at most {most} cells whose outputs are not compared, found {ignored}"
    )
    if grader.value_of("DATASET", notebook) != PARAMETERS["DATASET"]:
        return  # outputs of pictures that the grader doesn't have
    found, failures = strict_nbval(notebook)
    assert not failures, f"expected the stored outputs, found others: {failures[0]}"
    assert found == len(cells), f"expected {len(cells)} cells compared, found {found}"


def marks_of(cell: nbformat.NotebookNode) -> str:
    """Return all that a cell says to nbval, by tags and comments, in lower case."""
    comments = [match.group() for match in NBVAL_COMMENT.finditer(cell.source)]
    return " ".join([*cell.metadata.tags, *comments]).lower()


def strict_nbval(notebook: nbformat.NotebookNode) -> tuple[int, list[str]]:
    """Run nbval on the notebook as it was handed in; return how many cells it ran, what failed.

    Only where it finds its files and computes is this machine's.
    """
    for cell in notebook.cells:
        if "parameters" in cell.metadata.tags:
            given = PLACES.keys() & grader.assigned(cell.source)
            cell.source += "".join(f"\n{name} = {PLACES[name]!r}" for name in sorted(given))
    nbformat.write(notebook, STORED / NOTEBOOK)
    options = "-p nbval --nbval --nbval-cell-timeout=150 -c pyproject.toml"
    options += " -p no:cacheprovider --junitxml=nbval.xml"
    command = [sys.executable, "-m", "pytest", *options.split(), NOTEBOOK]
    environment = {**os.environ, "PYTHONPATH": str(STORED)}
    subprocess.run(command, cwd=STORED, env=environment, check=False, stdout=subprocess.DEVNULL)
    report = STORED / "nbval.xml"
    assert report.is_file(), "expected a verdict of nbval, found none"
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [
        f"{case.get('name')}: {' '.join(plain(failure.text or '').split())[:200]}"
        for case in cases
        for failure in [*case.iter("failure"), *case.iter("error")]
    ]
    return len(cases), failures
