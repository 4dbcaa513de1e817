"""The run on the real dataset that is kept: it is this notebook's, it is whole, and the README quotes it."""

import csv
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import petseg_utils as pets

FOLDER = pets.ROOT / "notebooks" / "oxford_run"
METRICS = json.loads((FOLDER / "metrics.json").read_text())
CELLS = nbformat.read(FOLDER / "notebook.ipynb", as_version=4).cells
README = (pets.ROOT / "README.md").read_text()
sys.path.append(str(pets.ROOT / "benchmarks"))

import ablations  # noqa: E402
import peer  # noqa: E402
import score  # noqa: E402
import throughput  # noqa: E402


def read_history(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "history.csv").read_text().splitlines()))


HISTORY = read_history(FOLDER)
ADAMW = read_history(pets.ROOT / "benchmarks" / "oxford_adamw")


def sources(cells: list) -> list[str]:
    return [cell.source for cell in cells if cell.cell_type == "code" and "injected-parameters" not in tags(cell)]


def tags(cell: dict) -> list[str]:
    return cell.metadata.get("tags", [])


def kept_model() -> pets.UNet:
    return score.load_model(FOLDER, METRICS["parameters"])


def test_kept_notebook_has_the_cells_of_the_narrative():
    narrative = nbformat.read(FOLDER.parent / "pet_segmentation.ipynb", as_version=4)
    assert sources(CELLS) == sources(narrative.cells)
    assert any("injected-parameters" in tags(cell) for cell in CELLS)


def test_kept_notebook_ran_to_its_end_without_errors():
    code = [cell for cell in CELLS if cell.cell_type == "code"]
    assert all(isinstance(cell.execution_count, int) for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 14
    assert not re.search(r"(/work/|/root/|/tmp/|/home/)", json.dumps([cell.outputs for cell in code]))


def test_kept_run_is_of_the_reference_net_on_all_images():
    given = METRICS["parameters"]
    assert (given["DATASET"], given["LIMIT"]) == ("oxford", 0)
    assert (given["BASE_CHANNELS"], given["DEPTH"], given["EPOCHS"], given["SCORE_SIZE"]) == (32, 5, 13, 256)
    assert METRICS["test"]["images"] == 3669
    assert sum(map(sum, METRICS["test"]["confusion_matrix"])) == 3669 * 256**2
    assert METRICS["test"]["pixel_accuracy"] > 0.881  # the reference


def valid_accuracy(history: list[dict]) -> str:
    return f"{pets.cut(100 * float(history[-1]['valid_pixel_accuracy']), 2)} %"


def gain() -> float:
    """Of flipping, in percentage points: the history is of straight images."""
    return 100 * (METRICS["valid"]["pixel_accuracy"] - float(HISTORY[-1]["valid_pixel_accuracy"]))


def test_kept_run_was_scored_with_flipping():
    texts = [output.get("text", "") for cell in CELLS for output in cell.get("outputs", [])]
    (told,) = [float(found[1]) for text in texts if (found := re.search(r"Flipping changes .* by (\S+) percent", text))]
    assert METRICS["parameters"]["FLIP"] and told == pytest.approx(gain(), abs=0.01)


def test_kept_scores_follow_from_the_confusion_matrix():
    again = pets.scores(torch.tensor(METRICS["test"]["confusion_matrix"]))
    assert again == {name: METRICS["test"][name] for name in again}


def test_readme_quotes_the_kept_run():
    test = METRICS["test"]
    row = [f"{pets.cut(100 * test['pixel_accuracy'], 2)} %", pets.cut(test["mean_iou"], 3)]
    row += [pets.cut(test["iou"][name], 3) for name in pets.CLASSES]
    row += [f"{pets.cut(100 * test['majority_accuracy'], 1)} %"]
    assert f"| {' | '.join(row)} |" in README


def test_readme_quotes_the_benchmarks():
    measured, beside = (
        json.loads((pets.ROOT / "benchmarks" / f"{name}.json").read_text()) for name in ("throughput", "peer")
    )
    for table in (ablations.table(), peer.table(beside), throughput.table(measured["headline"])):
        assert table in README
    assert f"differ by up to {ablations.spread()} points" in README


def test_readme_tells_how_the_kept_run_went():
    seconds = [float(row["seconds"]) for row in HISTORY]
    reached = next(i for i, row in enumerate(HISTORY, 1) if float(row["valid_pixel_accuracy"]) >= 0.881)
    for words in (
        f"{METRICS['dataset']['train']:,} images were trained on",
        f"{METRICS['dataset']['valid']} of the trainval split",
        f"{sum(seconds) / 60:.0f} minutes on two cores",
        f"gains {gain():.2f} points on the held-out images",
        f"ended at {valid_accuracy(ADAMW)} on the held-out images, the run above at {valid_accuracy(HISTORY)}",
        f"88.1 % after {reached} of the epochs and {sum(seconds[:reached]) / 60:.0f} minutes",
    ):
        assert words in " ".join(README.split())


@pytest.mark.parametrize(
    ("value", "digits", "words"), [(0.29, 2, "0.29"), (89.709, 2, "89.70"), (0.5, 0, "0"), (-0.001, 2, "-0.01")]
)
def test_cut_never_rounds_up(value, digits, words):
    assert pets.cut(value, digits) == words


@pytest.mark.parametrize(
    ("change", "words"),
    [({"DATASET": "sample"}, "not of the real dataset"), ({"SKIPS": ...}, "older version, without SKIPS")],
)
def test_scoring_another_kind_of_run_ends_in_a_sentence(change, words, tmp_path):
    given = {name: value for name, value in (METRICS["parameters"] | change).items() if value is not ...}
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS | {"parameters": given}))
    with pytest.raises(pets.InputError, match=words):
        score.read_metrics(tmp_path)


def test_scoring_no_run_ends_in_a_sentence(tmp_path):
    with pytest.raises(pets.InputError, match=r"no readable metrics\.json"):
        score.read_metrics(tmp_path)


def test_kept_weights_are_small_and_fit_the_reference_net():
    path = FOLDER / "weights.pt"
    assert path.stat().st_size <= 27_000_000
    weights = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16, torch.int64}
    assert sum(p.numel() for p in kept_model().parameters()) == METRICS["model"]["parameters"] == 13_385_475


def test_kept_weights_know_pets(oxford):
    """A few test images, for speed; benchmarks/score.py scores all of them."""
    given = METRICS["parameters"]
    names = pets.read_split(oxford, "test")[::120]
    few = pets.load_pets(oxford, names, given["IMAGE_SIZE"], mask_side=given["SCORE_SIZE"])
    accuracy = pets.scores(pets.evaluate(kept_model(), few, flip=given["FLIP"]))["pixel_accuracy"]
    assert accuracy == pytest.approx(METRICS["test"]["pixel_accuracy"], abs=0.04)
