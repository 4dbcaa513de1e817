"""The run on the real dataset that is kept: it is this notebook's, it is whole, and the README quotes it."""

import json
import re
import sys

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


def test_kept_scores_follow_from_the_confusion_matrix():
    again = pets.scores(torch.tensor(METRICS["test"]["confusion_matrix"]))
    assert again == {name: METRICS["test"][name] for name in again}


def test_readme_quotes_the_kept_run():
    test = METRICS["test"]
    row = [f"{ablations.cut(100 * test['pixel_accuracy'], 2)} %", ablations.cut(test["mean_iou"], 3)]
    row += [ablations.cut(test["iou"][name], 3) for name in pets.CLASSES]
    row += [f"{ablations.cut(100 * test['majority_accuracy'], 1)} %"]
    assert f"| {' | '.join(row)} |" in README


def test_readme_quotes_the_benchmarks():
    measured = json.loads((pets.ROOT / "benchmarks" / "throughput.json").read_text())
    for table in (ablations.table(), peer.table(), throughput.table(measured["headline"])):
        assert table in README
    assert f"the same change gains up to {ablations.spread()} points more or less" in README


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
    accuracy = pets.scores(pets.evaluate(kept_model(), few))["pixel_accuracy"]
    assert accuracy == pytest.approx(METRICS["test"]["pixel_accuracy"], abs=0.04)
