"""Narrative and second notebook: what cells compute is right, the quiz judges, the page reads."""

import base64
import csv
import re
import sys
from copy import deepcopy

import nbformat
import numpy as np
import pytest
import torch
from nbconvert import HTMLExporter
from PIL import Image
from torch.nn import functional as F

import petseg_utils as pets
from experiments import photo, run_notebook

NOTEBOOK = pets.ROOT / "notebooks" / "pet_segmentation.ipynb"
NARRATIVE = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
DEEPER = nbformat.read(NOTEBOOK.with_name("going_deeper.ipynb"), as_version=4).cells
CELLS = NARRATIVE | {cell.id: cell for cell in DEEPER}
KEPT = pets.read_run(NOTEBOOK.with_name("oxford_run"))
sys.path.append(str(NOTEBOOK.parent))

import quiz  # noqa: E402 (it lies beside the notebook, on no path)


def run_cells(*ids: str, **names: object) -> dict:
    """Run some cells of the notebooks with these names defined, and return all names."""
    space = {"pets": pets, "np": np, "torch": torch, "F": F} | names
    for one in ids:
        exec(CELLS[one].source, space)
    return space


def stored(cell: str, kind: str) -> str:
    """Return what a cell printed, as it is stored, for "text", or else its data of a MIME type."""
    outputs = CELLS[cell].outputs
    parts = [one if kind == "text" else one.get("data", {}) for one in outputs]
    return "".join(part.get(kind, "") for part in parts)


# --------------------------------------------------------------------------------- the first minute


def test_narrative_fits_one_sitting():
    code = [cell.source for cell in NARRATIVE.values() if cell.cell_type == "code"]
    texts = [cell.source for cell in NARRATIVE.values() if cell.cell_type == "markdown"]
    counts = {
        "cells": (len(NARRATIVE), 115),
        "words": (sum(len(text.split()) for text in texts), 4300),
        "lines of code": (len([line for one in code for line in one.splitlines() if line]), 450),
        "names": (len(set(re.findall(r"\bpets\.(\w+)", "\n".join(code)))), 35),
        "bytes": (NOTEBOOK.stat().st_size, 1_300_000),
    }
    print(counts)
    assert not {what: pair for what, pair in counts.items() if pair[0] > pair[1]}


def test_first_cell_shows_the_result_and_the_headline_is_the_kept_runs():
    first = next(iter(NARRATIVE.values()))
    picture = (pets.ROOT / "figures" / "result.png").read_bytes()
    assert base64.b64decode(first.attachments["result.png"]["image/png"]) == picture
    told = stored("headline", "text/markdown")
    assert f"{KEPT['test']['pixel_accuracy']:.2%} of the pixels" in told
    assert f"of {KEPT['test']['images']:,} new" in told


def test_text_on_training_quotes_what_was_measured():
    table = pets.ROOT / "experiments" / "ablations.csv"
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    iou = {row["name"]: 100 * float(row["test.mean_iou"]) for row in rows}
    text = CELLS["train-know"].source.replace("\N{MINUS SIGN}", "-")
    for change in ("AdamW_at_2e-3", "cross-entropy_alone", "no_moving_average", "constant_rate"):
        gains = [iou[f"{change}_seed_{seed}"] - iou[f"base_seed_{seed}"] for seed in (0, 1)]
        assert "({:+.1f} and {:+.1f} w".format(*gains).replace("-0.0", "0.0") in text


# ------------------------------------------------------------------------------------------- shapes


def test_table_of_the_courses_net_has_formulas_shares_and_totals():
    rows = re.findall(r"<tr>(.*?)</tr>", stored("shapes-course-total", "text/html"))
    table = {
        cells[0]: cells
        for cells in (re.findall(r"<td>(.*?)</td>", row.replace("&nbsp;", " ")) for row in rows[1:])
    }
    assert table["down2"][2:4] == ["54b² + 12b", "55,680"]
    assert table["down2"][5:7] == ["27b²N²", "1,811.9"]
    assert (table["out"][2], table["pool1"][2]) == ("3b + 3", "0")
    assert table["all"][3] == f"{sum(p.numel() for p in pets.UNet(32, 5).parameters()):,}"
    shares = [float(cells[4].rstrip("%")) for name, cells in table.items() if name != "all"]
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("given", [(16, 5, 2, 64, 3), (4, 2, 1, 32, 2), (2, 6, 1, 128, 2)], ids=str)
def test_memory_of_a_step_is_predicted(given):
    b, depth, norms, side, images = given
    space = run_cells("shapes-memory-predicted", "shapes-memory-measured")
    model = pets.UNet(b, depth, norms=norms)
    masks = torch.randint(3, (images, side, side), dtype=torch.uint8)
    blank = torch.zeros(images, 3, side, side, dtype=torch.uint8)
    measured = space["measured_bytes"](model, blank, masks)
    predicted = images * space["kept_bytes"](pets.analyse_shapes(model, side), norms)
    assert predicted == pytest.approx(measured, rel=0.02)


def test_nothing_outside_the_receptive_field_has_influence():
    torch.manual_seed(0)
    model = pets.UNet(4, 3)
    influence = run_cells("field-influence")["influence"]
    fields = {step.name: step.receptive_field for step in pets.analyse_shapes(model, 64)}
    for level in (1, 2, 3):
        seen = influence(model, 2 * level, torch.randn(1, 3, 64, 64)).nonzero()
        widths = seen.max(dim=0).values - seen.min(dim=0).values + 1
        assert widths.tolist() == [fields[f"down{level}"]] * 2


# ------------------------------------------------------------------------------------------- scores


def test_binary_iou_takes_the_border_for_pet():
    truth, predicted = torch.randint(3, (2, 400), generator=torch.Generator().manual_seed(1))
    matrix = pets.confusion_matrix(predicted.byte(), truth.byte())
    names = {"matrix": matrix, "test_scores": pets.scores(matrix), "lead": 0, "HTML": str}
    names |= {"images_in": {"test": 1}, "classes": pets.CLASSES, "majority": 1}
    animal = truth != 1, predicted != 1
    expected = (animal[0] & animal[1]).sum() / (animal[0] | animal[1]).sum()
    space = run_cells("cell-070", **names)
    assert space["binary"] == pytest.approx(expected.item())
    assert space["rows"][-1]["IoU"] == f"{expected:.3f}"


def test_calibration_weighs_bins_and_counts_more_than_float32_can():
    names = {"confidence": torch.tensor([0.4, 0.95, 0.95, 0.95])}
    space = run_cells("cell-083", **names, wrong=torch.tensor([True, False, False, True]))
    assert space["calibration_error"] == pytest.approx((0.4 + 3 * (0.95 - 2 / 3)) / 4)
    right = torch.ones(2**24 + 2**22, dtype=torch.bool)
    right[: len(right) // 4] = False
    sure, correct, pixels = space["calibration"](torch.full(right.shape, 0.99), right)
    assert [sure[-1].item(), correct[-1].item()] == pytest.approx([0.99, 0.75], abs=1e-6)
    assert pixels.tolist() == [0] * 7 + [1]


def test_pictures_are_ranked_by_iou_and_empty_masks_stay_out(request):
    split = request.getfixturevalue("pets")
    masks = split.masks.clone()
    masks[2] = 1  # an annotator forgot the pet
    split = split._replace(masks=masks)
    names = {"test_pets": split, "model": pets.UNet(2, 2), "precision": torch.float32}
    matrices = pets.evaluate(names["model"], split, torch.float32)
    chosen = run_cells("cell-076", **names, test_matrices=matrices, asked={})["chosen"]
    ious = [pets.scores(matrix)["mean_iou"] for matrix in matrices]
    shown = [ious[i] for i in chosen]
    assert 2 not in chosen
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == max(one for i, one in enumerate(ious) if i != 2)


def test_checks_before_training_leave_no_trace_in_the_model(request, capsys):
    torch.manual_seed(0)
    model = pets.UNet(4, 2)
    before = deepcopy(model.state_dict())
    names = {"model": model, "train_pets": request.getfixturevalue("pets"), "deepcopy": deepcopy}
    run_cells("cell-052", "cell-054", "cell-056", "cell-058", **names, device=torch.device("cpu"))
    assert "one batch overfitted to more than 95 %: True" in capsys.readouterr().out
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --------------------------------------------------------------------------------------------- quiz

RIGHT = {1: 512, 2: 576, 3: "background", 4: 0.67, 5: 1.1, 6: 64, 9: 4, 10: 6}
WRONG = [
    (1, 256, "before the concatenation"),
    (1, 1024, "one level below"),
    (9, 2, "that is the side"),
    (2, 592, "not five"),
    (2, 512, "power of two"),
    (3, "pet", "value in between"),
    (4, 0.5, "twice"),
    (5, 1.58, "natural logarithm"),
    (5, 0.33, "minus its logarithm"),
    (6, 32, "a scale and a shift"),
    (6, 128, "not learned"),
    (10, 5, "half a cell"),
    (10, "deep", "compare the receptive field"),
    (1, [512], "one number or word, not a list"),
    (5, torch.zeros(2), "one number or word, not a Tensor"),
    (7, lambda m: m.diagonal() / (m.sum(0) + m.sum(1)), "twice"),
    (7, lambda m: 2 * m.diagonal() / (m.sum(0) + m.sum(1)), "Dice"),
    (7, lambda m: m.diagonal() / m.sum(1), "recall"),
    (7, lambda m: m.diagonal() / m.sum(0), "precision"),
    (7, lambda m: m.trace() / m.sum(), "shape (3,)"),
    (7, lambda m: m.nothing, "AttributeError"),
    (8, lambda x, skip, up: up(torch.cat((skip, F.interpolate(x, scale_factor=2)), 1)), "first"),
    (8, lambda x, skip, up: up(F.interpolate(x, scale_factor=2)), "RuntimeError"),
    (8, lambda x, skip, up: torch.cat((F.interpolate(x, scale_factor=2), skip), 1), "the shape"),
    (8, lambda x, skip, up: one_level_up(x, skip, up) + 1, "numbers"),
]


def iou(matrix):
    return matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())


def one_level_up(x, skip, up):
    return up(torch.cat((F.interpolate(x, scale_factor=2), skip), dim=1))


ALSO_RIGHT = [(3, " Background "), (4, 2 / 3), (7, iou), (8, one_level_up)]
ANSWERS = [(number, answer, "right") for number, answer in [*RIGHT.items(), *ALSO_RIGHT]]
ANSWERS += [(number, answer, f"not yet: .*{re.escape(why)}") for number, answer, why in WRONG]


@pytest.mark.parametrize(("number", "answer", "told"), ANSWERS)
def test_quiz_tells_right_from_wrong_and_says_why(number, answer, told, capsys):
    quiz.check(number, answer)
    assert re.fullmatch(f"{number}: {told}.*\n", capsys.readouterr().out, re.DOTALL)


def test_each_question_has_an_open_cell_and_a_solution(capsys):
    cells = [one for one in CELLS if "quiz" in CELLS[one].metadata.get("tags", [])]
    assert len(cells) == len(quiz.QUESTIONS) == len(quiz.SOLUTIONS)
    for number, one in enumerate(cells, 1):
        assert "None" in CELLS[one].source
        assert stored(one, "text") == f"{number}: not answered yet\n"
        quiz.solution(number)
        assert capsys.readouterr().out.startswith(str(RIGHT.get(number, "")))


def test_solutions_of_the_functions_are_right(capsys):
    for number, cell in ((7, "quiz-c9"), (8, "quiz-c10")):
        body = re.sub("(?m)^", "    ", quiz.SOLUTIONS[number])
        source = CELLS[cell].source.replace("    return None  # yours\n", body + "\n")
        exec(source, {"quiz": quiz, "torch": torch, "F": F})
        assert capsys.readouterr().out == f"{number}: right\n"


def test_exercises_have_level_minutes_result_and_hints():
    text = "\n".join(cell.source for one, cell in CELLS.items() if re.fullmatch(r"ex-\d", one))
    exercises = re.split(r"^\*\*\d\. ", text, flags=re.MULTILINE)[1:]
    assert len(exercises) == 8
    for exercise in exercises[:-1]:  # the last is a project
        assert re.search(r"\*(Easy|Medium|Hard), \d+ minutes", exercise)
        assert "Expected:" in exercise
        assert "<details><summary>Hints</summary>" in exercise
    assert "3,352,323" in exercises[0]
    assert sum(p.numel() for p in pets.UNet(32, 4).parameters()) == 3_352_323


def test_doctor_guides_the_learner_who_writes_the_unet(capsys):
    """The starter of the exercise, with a right net and with one that is no U-Net."""
    head, _, rest = CELLS["ex-5-code"].source.partition("    # yours")
    rest = rest[rest.index("\n") :].replace("ready = False", "ready = True")
    names = {"pets": pets, "torch": torch}
    body = "    def __new__(cls, base_channels, depth):\n        return "
    exec(f"{head}{body}pets.UNet(base_channels, depth)\n{rest}", names)
    assert capsys.readouterr().out == "all as planned\n"
    with pytest.raises(AssertionError):
        exec(f"{head}{body}torch.nn.Conv2d(3, 3, kernel_size=3, padding=1)\n{rest}", names)
    assert capsys.readouterr().out.endswith(".\n")


# ----------------------------------------------------------------------------------- page and photo


def streams(*texts: str) -> nbformat.NotebookNode:
    """Return a notebook with a cell that wrote these texts to its standard error."""
    outputs = [nbformat.v4.new_output("stream", name="stderr", text=text) for text in texts]
    cell = nbformat.v4.new_code_cell("train()", outputs=outputs)
    return nbformat.v4.new_notebook(cells=[cell], metadata={"title": "A title"})


def page_of(notebook: nbformat.NotebookNode) -> str:
    template = pets.ROOT / "notebooks" / "page.html.j2"
    return HTMLExporter(template_file=str(template)).from_notebook_node(notebook)[0]


def test_page_has_a_title_needs_no_network_and_shows_no_cleared_progress():
    bar = "epoch 1:  50%|##   |\repoch 1: 100%|####|\r          \r"
    page = page_of(streams(bar, "a warning\n"))
    assert "<title>A title</title>" in page
    assert "http" not in page
    assert page.count('class="output_stream"') == 1
    assert "a warning" in page
    assert "epoch" not in page


def test_only_wide_figures_scroll_on_a_phone():
    data, notebook = {"image/png": "iVBORw0KGgo="}, nbformat.v4.new_notebook()
    sizes = {"image/png": {"width": 480}}, {"image/png": {"width": 1440}}, {}
    outputs = [nbformat.v4.new_output("display_data", data, metadata=size) for size in sizes]
    notebook.cells = [nbformat.v4.new_code_cell("plot()", outputs=outputs)]
    kinds = re.findall(r'<div class="(\w*)">\s*<div class="output_png', page_of(notebook))
    assert kinds == ["", "wide", "wide"]


def test_a_run_stores_only_the_last_state_of_a_progress_bar(tmp_path, monkeypatch):
    states = "epoch 1:  50%|##   |", "\repoch 1: 100%|####|", "\r          \r", "a warning"
    monkeypatch.setattr(
        run_notebook, "call_papermill", lambda _, draft: nbformat.write(streams(*states), draft)
    )
    run_notebook.execute(tmp_path / "any.ipynb", tmp_path / "notebook.ipynb", [])
    (cell,) = nbformat.read(tmp_path / "notebook.ipynb", as_version=4).cells
    assert [output.text for output in cell.outputs] == ["a warning"]
    assert not (tmp_path / "unfinished.ipynb").exists()


def test_kept_net_labels_every_pixel_of_a_photo():
    labels = photo.segment(Image.effect_noise((60, 40), 50).convert("RGB"))
    assert (labels.shape, labels.dtype) == ((40, 60), torch.uint8)
