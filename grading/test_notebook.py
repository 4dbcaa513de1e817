"""Criteria of the rubric: what a hand-in's notebook leaves when the grader executes it.

Here `petseg_utils` is the grader's own. GRADED_RUN is the folder in which the notebook was
executed, GRADED_STORED one in which it lies as it was handed in, GRADED_PICTURES has the pictures.
"""

import json
import multiprocessing
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import petseg_utils as pets
from grading import notebook as grader
from grading.notebook import NBVAL_COMMENT, NOTEBOOK, PARAMETERS, PLACES, RUN, WEIGHTS
from support.checkpoints import load_tensors
from support.runs import names_in_use

RUN_FOLDER = Path(os.environ.get("GRADED_RUN", "."))  # empty while tests are only counted
FOLDER = RUN_FOLDER / "runs" / RUN
STORED = Path(os.environ.get("GRADED_STORED", "."))
PICTURES = Path(os.environ.get("GRADED_PICTURES", "."))
DATASET = PICTURES / "new" / "oxford-iiit-pet"
SIDE, LIMIT, FLIP = (PARAMETERS[name] for name in ("IMAGE_SIZE", "LIMIT", "FLIP"))
FEWEST_FIGURES = 8


def expect(right: bool, wanted: object, found: object) -> None:
    """Raise the AssertionError that a criterion's reason is made of, if something isn't right."""
    assert right, f"expected {wanted}, found {found}"


def executed() -> list[nbformat.NotebookNode]:
    """Return the code cells that the grader executed, without those that it added itself."""
    cells = nbformat.read(RUN_FOLDER / "executed.ipynb", as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code" and cell.source != grader.SPY]
    return [cell for cell in cells if "# Parameters\n" not in cell.source]


def stored() -> nbformat.NotebookNode:
    """Return the code cells of the notebook as they were handed in."""
    notebook = grader.read(STORED / NOTEBOOK)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return notebook


def of_run(name: str) -> Path:
    """Return the place of a file of the run. Errors: AssertionError if it is not there."""
    expect((FOLDER / name).is_file(), f"the file {name} in the run's folder", "none")
    return FOLDER / name


@pytest.fixture(scope="session")
def names() -> dict[str, list[str]]:
    """Return the images of each split that the run had to use, as its parameters say."""
    trainval, test = (pets.read_split(DATASET, split, LIMIT) for split in ("trainval", "test"))
    train, valid = pets.hold_out(trainval, PARAMETERS["HOLD_OUT"], PARAMETERS["SEED"])
    return {"train": train, "valid": valid, "test": test}


@pytest.fixture(scope="session")
def model() -> pets.UNet:
    """Return the grader's net with the weights saved: layers match by the order of their use."""
    b, depth, norms = (PARAMETERS[name] for name in ("BASE_CHANNELS", "DEPTH", "NORMS"))
    model = pets.UNet(b, depth, norms=norms)
    weights, noted = load_tensors(of_run("weights.pt")), RUN_FOLDER / "names.json"
    theirs = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else []
    own = dict(zip(theirs, names_in_use(model), strict=False))
    renamed = {own.get(name, name): tensor for name, tensor in weights.items()}
    try:
        model.load_state_dict(renamed)
    except RuntimeError:
        expect(False, f"the weights of a UNet({b}, {depth}, norms={norms})", "those of another net")
    return model


@pytest.fixture(scope="session")
def rescored(names, model) -> dict[str, torch.Tensor]:
    """Return what the grader counts, (B, K, K), for the validation and the test images."""
    scored = {}
    for split in ("valid", "test"):
        loaded = pets.load_pets(DATASET, names[split], SIDE, mask_side=PARAMETERS["SCORE_SIZE"])
        scored[split] = pets.evaluate(model, loaded, torch.float32, flip=FLIP)
    return scored


def test_notebook_runs_to_its_end():
    for number, cell in enumerate(executed(), 1):
        where = place(number, cell)
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors:
            pytest.fail(f"expected no error, found {told(errors[0])} in {where}")
        ended = cell.metadata.papermill.status == "completed"
        expect(ended, "every cell to end in time", f"that {where} did not")
    if (RUN_FOLDER / grader.DEAD).exists():  # papermill calls what it never began completed
        begun = [cell for cell in executed() if cell.metadata.papermill.start_time]
        where = place(len(begun), begun[-1]) if begun else "the import of petseg_utils"
        pytest.fail(f"expected no error, found that the cell ended its kernel in {where}")
    expect(len(executed()) == len(stored().cells), "all of the cells", "fewer")


def place(number: int, cell: nbformat.NotebookNode) -> str:
    """Say which code cell this is, by its number and first line."""
    return f"code cell {number}, {cell.source.partition(chr(10))[0]!r}"


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
    expect(accuracy >= least, f"{least:.1%} of the test pixels right", f"{accuracy:.1%}")


def compare(wanted: dict, where: str, found: dict, **tolerance: float) -> None:
    """Expect what is wanted in nested dicts also in metrics.json; fractions within a tolerance."""

    def said(value: object) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    wanted, found = (pd.json_normalize(some).to_dict("records")[0] for some in (wanted, found))
    for name, value in wanted.items():  # names like "dice.pet"
        right = pytest.approx(value, **tolerance) if isinstance(value, float) else value
        wrong = f"{said(found.get(name))} in metrics.json"
        expect(found.get(name) == right, f"{name} {said(value)}{where}", wrong)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_metrics_are_what_the_weights_score(rescored, split):
    counts, said = rescored[split], json.loads(of_run("metrics.json").read_bytes())[split]
    wanted = pets.scores(counts.sum(0)) | {"images": len(counts)}
    matrix = np.array(wanted.pop("confusion_matrix"))
    compare(wanted, f" in {split}", said, abs=0.002)
    images = pd.read_csv(of_run("images.csv")).query("split == @split")
    expect(len(images) == len(counts), f"{len(counts)} images of {split}", len(images))
    columns = [f"{true}_as_{predicted}" for true in pets.CLASSES for predicted in pets.CLASSES]
    differences = {
        "the confusion_matrix": said["confusion_matrix"] - matrix,
        "images.csv": images[columns].to_numpy() - counts.flatten(1).numpy(),
    }
    for where, wrong in differences.items():
        others = np.abs(wrong).sum() / matrix.sum()
        expect(others < 0.01, f"{where} of {split} to be what was counted", f"{others:.1%} others")


def test_metrics_say_what_was_done(names, model):
    sizes = {split: len(of_split) for split, of_split in names.items()}
    steps = PARAMETERS["EPOCHS"] * pets.count_steps(sizes["train"], PARAMETERS["BATCH_SIZE"])
    seconds = pd.read_csv(of_run("history.csv"))["seconds"].sum()
    training = {"epochs": PARAMETERS["EPOCHS"], "steps": steps, "seconds": seconds, "device": "cpu"}
    training["images_per_second"] = steps * PARAMETERS["BATCH_SIZE"] / seconds
    training["precision"] = PARAMETERS["PRECISION"]
    shapes = pets.analyse_shapes(model, SIDE)
    costs = {key: sum(getattr(step, key) for step in shapes) for key in ("flops", "parameters")}
    wanted = {"parameters": PARAMETERS, "dataset": sizes, "model": costs, "training": training}
    compare(wanted, "", json.loads(of_run("metrics.json").read_bytes()), rel=0.01)


def test_history_has_a_row_for_every_epoch():
    losses = pd.read_csv(of_run("history.csv"))["train_loss"].tolist()
    epochs = PARAMETERS["EPOCHS"]
    expect(len(losses) == epochs, f"{epochs} rows in history.csv", len(losses))
    expect(losses[-1] < losses[0], "the loss to fall", f"{losses[0]:.3f} to {losses[-1]:.3f}")


def test_submission_is_what_the_weights_predict(names, model):
    found = torch.load(of_run("submission.pt"), weights_only=True)
    expect(found.dtype == torch.uint8, "bytes (uint8)", found.dtype)
    shape = (32, 1, 256, 256)
    expect(found.shape == shape, f"the shape {shape}", tuple(found.shape))
    images = pets.load_pets(DATASET, names["test"][:32], SIDE).images
    predicted, _ = pets.predict(model, images, torch.float32, size=shape[2:], flip=FLIP)
    alike = (found[:, 0] == predicted).float().mean().item()
    expect(alike > 0.998, "what the saved weights predict", f"{alike:.1%} of the pixels alike")


# ------------------------------------------------------------------- honesty


def seen() -> list[list[str]]:
    """Return what the spy noted: what was done, and with which images."""
    notes = RUN_FOLDER / "seen.txt"
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    return [line.split() for line in lines]


def test_only_training_images_are_learned(names):
    marks = {(kind, *of) for kind, *of in seen() if kind != "evaluated"}
    learned = {mark for mark in marks if mark[0] == "learned"}
    expect(learned, "a net that is shown images before the weights are saved", "none")
    for split, kinds in (("test", ("learned", "scored")), ("valid", ("learned",))):
        images = pets.load_pets(DATASET, names[split], SIDE).images
        known = [sha256(image.numpy().tobytes()).hexdigest() for image in images]
        told = "held-out" if split == "valid" else split
        for kind in kinds:
            found = sum((kind, mark) in marks for mark in known)
            expect(not found, f"no {told} image {kind} before the weights are saved", found)


def test_test_images_are_scored_once(names):
    test = set(names["test"])
    times = sum(kind == "evaluated" and bool(test & set(of)) for kind, *of in seen())
    expect(times <= 1, "the test images to be scored once", f"{times} times")
    scored = set(pd.read_csv(of_run("images.csv")).query("split == 'test'")["name"])
    expect(scored == test, "all test images scored", f"{len(scored & test)} of {len(test)}")


def test_test_images_decide_nothing():
    """What is trained must not differ if the labels of test images, and they alone, do."""
    first = of_run("weights.pt")
    grader.execute(STORED, PICTURES / "turned", grader.UNTIL_SAVED)
    again = STORED / WEIGHTS
    expect(again.exists(), "the file weights.pt also of a second run", "none")
    true, other = (torch.load(path, weights_only=True) for path in (first, again))
    same = true.keys() == other.keys() and all(torch.equal(true[n], other[n]) for n in true)
    expect(same, "weights that don't depend on the test images", "others")


# ------------------------------------------------------------------- figures and outputs


def test_figures_are_not_blank():
    figures = sorted((FOLDER / "figures").glob("*.png"))
    expect(len(figures) >= FEWEST_FIGURES, f"{FEWEST_FIGURES} figures or more", len(figures))
    for path in figures:
        grey = np.asarray(Image.open(path).convert("L"))
        expect(grey.std() > 5, "something to see", f"{path.name} blank")
    contents = {path.read_bytes() for path in figures}
    expect(len(contents) == len(figures), "different figures", "copies")


def test_stored_outputs_reproduce():
    notebook = stored()
    cells = notebook.cells
    in_order = [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    expect(in_order, "the counts of one run from top to bottom", "others")
    for number, (cell, fresh) in enumerate(zip(cells, executed(), strict=True), 1):
        lost = fresh.outputs and not cell.outputs
        expect(not lost, "stored outputs", f"none in {place(number, cell)}")
    marks = [marks_of(cell) for cell in cells]
    skipped = sum("skip" in mark or "raises" in mark for mark in marks)
    expect(not skipped, "every cell to be run", f"{skipped} that nbval skips or lets fail")
    ignored, most = sum("ignore" in mark for mark in marks), len(cells) // 4
    expect(ignored <= most, f"at most {most} cells whose outputs are not compared", ignored)
    given = [grader.assigned(cell.source) for cell in cells if "parameters" in cell.metadata.tags]
    if given[0].get("DATASET", "sample").strip(" '\"") != "sample":
        return  # outputs of pictures that the grader doesn't have
    found, failures = strict_nbval(notebook)
    lost = "" if ignored else ", and no tag of nbval, as if an editor had lost them"
    expect(not failures, "the stored outputs", f"others{lost}: {' '.join(failures[:1])}")
    expect(found == len(cells), f"{len(cells)} cells compared", found)


def marks_of(cell: nbformat.NotebookNode) -> str:
    """Return all that a cell says to nbval, by tags and comments, in lower case."""
    comments = [match.group() for match in NBVAL_COMMENT.finditer(cell.source)]
    return " ".join([*cell.metadata.tags, *comments]).lower()


def strict_nbval(notebook: nbformat.NotebookNode) -> tuple[int, list[str]]:
    """Run nbval on a notebook, in this machine's places; return how many cells ran, what failed."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.tags:
            given = grader.assigned(cell.source)
            places = [f"{name} = {PLACES[name]!r}" for name in PLACES if name in given]
            cell.source = "\n".join([cell.source, *places, "import grading.sketch"])
    nbformat.write(notebook, STORED / NOTEBOOK)
    if (PICTURES / "default").exists():  # spares the time to draw them
        shutil.copytree(PICTURES / "default", STORED / "data" / "sample")
    nbval = multiprocessing.get_context("fork").Process(target=grader.run_nbval, args=(STORED,))
    nbval.start()
    nbval.join()
    report = STORED / "nbval.xml"
    expect(report.is_file(), "a verdict of nbval", "none")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [
        f"{case.get('name')}: {' '.join(plain(failure.text or '').split())[:200]}"
        for case in cases
        for failure in [*case.iter("failure"), *case.iter("error")]
    ]
    return len(cases), failures
