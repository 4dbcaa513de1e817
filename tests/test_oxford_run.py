"""The kept run on the real dataset: it is whole, its numbers agree, and the README quotes it.

It is a record of the code that made it, so nothing here compares its cells with those of today.
"""

import json
import re

import nbformat
import pytest
import torch

import petseg_utils as pets
from experiments.tables import cut

FOLDER = pets.ROOT / "notebooks" / "oxford_run"
RUN = pets.read_run(FOLDER)
RECIPE = pets.Recipe(**RUN["parameters"])
CELLS = nbformat.read(FOLDER / "notebook.ipynb", as_version=4).cells
CODE = [cell for cell in CELLS if cell.cell_type == "code"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]
READMES = " ".join(
    word
    for name in ("README.md", "experiments/README.md")
    for word in (pets.ROOT / name).read_text(encoding="utf-8").split()
)
TEST = RUN["test"]
# Percentage points that flipping gains on the held-out images; the history is of straight ones.
GAIN = 100 * (RUN["valid"]["pixel_accuracy"] - RUN["history"][-1]["valid_pixel_accuracy"])


def shown(pattern: str) -> tuple[str, ...]:
    """Return what the one place in the notebook's texts that fits says."""
    texts = [one.get("text") or one.get("data", {}).get("text/html", "") for one in OUTPUTS]
    (found,) = [match for text in texts for match in re.finditer(pattern, text)]
    return found.groups()


def test_kept_notebook_ran_from_its_first_cell_to_its_last_without_errors():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [output for output in OUTPUTS if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in OUTPUTS) >= 10
    assert not re.search(r"(/work/|/root/|/tmp/|/home/)", json.dumps(OUTPUTS))


def test_kept_notebook_was_given_the_parameters_of_the_metrics():
    (cell,) = [cell for cell in CODE if "injected-parameters" in cell.metadata.get("tags", [])]
    given: dict = {}
    exec(cell.source, {}, given)
    assert given
    assert given == {name: RUN["parameters"][name] for name in given}


def test_kept_notebook_shows_the_scores_and_sizes_of_the_metrics():
    accuracy, iou, images = shown(
        r"<b>(.+)%</b> pixel accuracy, .+ a mean IoU of <b>(.+)</b> on ([\d,]+) test images"
    )
    assert float(accuracy) == pytest.approx(100 * TEST["pixel_accuracy"], abs=0.05)
    assert float(iou) == pytest.approx(TEST["mean_iou"], abs=0.0005)
    assert int(images.replace(",", "")) == TEST["images"]
    for name in pets.CLASSES:
        both = [float(one) for one in shown(rf"<td>{name}</td><td>([\d.]+)</td><td>([\d.]+)</td>")]
        assert both == pytest.approx([TEST["iou"][name], TEST["dice"][name]], abs=0.0005)
    splits = {name: RUN["dataset"][name] for name in ("train", "valid", "test")}
    assert shown(r"images: (\{.+?\})") == (str(splits),)
    counts = shown(r"([\d,]+) parameters, ([\d,]+) FLOPs")
    assert counts == tuple(f"{n:,}" for n in RUN["model"].values())


def test_kept_run_was_scored_with_flipping():
    assert RECIPE.FLIP
    # It is rounded to 0.01 and predicted anew: in bfloat16 a few labels differ from the history's.
    (told,) = shown(r"Flipping changes .+ by (\S+) percent")
    assert float(told) == pytest.approx(GAIN, abs=0.006)


def test_kept_run_is_of_the_reference_net_on_all_images():
    assert (RECIPE.DATASET, RECIPE.LIMIT) == ("oxford", 0)
    assert (RECIPE.BASE_CHANNELS, RECIPE.DEPTH) == (32, 5)
    assert (RECIPE.EPOCHS, RECIPE.SCORE_SIZE) == (13, 256)
    assert TEST["images"] == 3669
    assert sum(map(sum, TEST["confusion_matrix"])) == 3669 * 256**2
    assert TEST["pixel_accuracy"] > 0.881  # the reference


def test_kept_weights_are_small_and_fit_the_reference_net():
    path = FOLDER / "weights.pt"
    assert path.stat().st_size <= 27_000_000
    types = {tensor.dtype for tensor in torch.load(path, weights_only=True).values()}
    assert types == {torch.float16, torch.int64}
    count = sum(p.numel() for p in pets.load_net(FOLDER)[0].parameters())
    assert count == RUN["model"]["parameters"] == 13_385_475


def test_kept_weights_know_pets(oxford):
    """A few test images, for speed; experiments/score.py scores all of them."""
    names = pets.read_split(oxford, "test")[::120]
    few = pets.load_pets(oxford, names, RECIPE.IMAGE_SIZE, mask_side=RECIPE.SCORE_SIZE)
    matrices = pets.evaluate(pets.load_net(FOLDER)[0], few, torch.float32, flip=RECIPE.FLIP)
    accuracy = pets.scores(matrices.sum(0))["pixel_accuracy"]
    assert accuracy == pytest.approx(TEST["pixel_accuracy"], abs=0.04)


def test_readmes_quote_the_kept_run():
    matrix = torch.tensor(TEST["confusion_matrix"])
    majority = (matrix.sum(1).max() / matrix.sum()).item()  # right by guessing one class
    row = [f"{cut(100 * TEST['pixel_accuracy'], 2)} %", cut(TEST["mean_iou"], 3)]
    row += [cut(TEST["iou"][name], 3) for name in pets.CLASSES]
    row += [f"{cut(100 * majority, 1)} %"]
    # Of two classes, where the border counts as pet, in the truth and in the prediction.
    right = matrix[[0, 2]][:, [0, 2]].sum().item()
    either = (matrix.sum() - matrix[1, 1]).item()
    accuracy = 100 * (right + matrix[1, 1].item()) / matrix.sum().item()
    seconds = [row["seconds"] for row in RUN["history"]]
    accuracies = [row["valid_pixel_accuracy"] for row in RUN["history"]]
    reached = next(i for i, accuracy in enumerate(accuracies, 1) if accuracy >= 0.881)
    for words in (
        f"| {' | '.join(row)} |",
        f"IoU of this run is {cut(right / either, 3)}, and {cut(accuracy, 2)} % of the pixels",
        f"{RUN['dataset']['train']:,} images were trained on",
        f"{RUN['dataset']['valid']} of the trainval split",
        f"{sum(seconds) / 60:.0f} minutes on two cores",
        f"gains {cut(GAIN, 2)} points on the held-out images",
        f"88.1 % after {reached} of the epochs and {sum(seconds[:reached]) / 60:.1f} minutes",
    ):
        assert words in READMES


def test_readmes_quote_the_second_seed():
    other = json.loads((pets.ROOT / "experiments" / "second_seed.json").read_text(encoding="utf-8"))
    test, recipes = other["test"], (pets.Recipe(**other["parameters"]), RECIPE)
    used, own = (recipe.model_dump(exclude=pets.Recipe.PLACES) for recipe in recipes)
    assert {name for name in own if used[name] != own[name]} == {"SEED"}
    assert pets.scores(torch.tensor(test["confusion_matrix"])).items() <= test.items()
    got = f"{cut(100 * test['pixel_accuracy'], 2)} %, a mean IoU of {cut(test['mean_iou'], 3)}"
    minutes = f"{other['training']['seconds'] / 60:.0f} minutes"
    assert f"got {got} and {cut(test['iou']['border'], 3)} for the border, in {minutes}" in READMES
