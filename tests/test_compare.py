"""Comparing runs: statistics, folding over seeds, broken runs, and the page."""

import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from damage import damage
from papermill.exceptions import PapermillExecutionError
from scipy import stats

import petseg_utils as pets
from experiments import compare
from experiments.read_runs import find_runs, read_folder, to_table, write_table

ROOT = pets.ROOT  # tests of broken runs have another


def some_counts(images: int = 40, skill: float = 0.7, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the confusion counts of images of 100 pixels, of which about `skill` are right."""
    random = np.random.default_rng(seed)
    wrong = (1 - skill) / 2
    matrix = np.full((3, 3), wrong) + np.eye(3) * (skill - wrong)
    truth = random.multinomial(100, [0.3, 0.5, 0.2], images)  # (B, 3)
    return {
        f"pug_{i}": random.multinomial(pixels, matrix).ravel() for i, pixels in enumerate(truth)
    }


def write_run(folder: Path, skill: float = 0.7, **changes: object) -> Path:
    """Write a run that wasn't made, with other counts for another seed or skill."""
    recipe = pets.Recipe(IMAGE_SIZE=32, RUN_NAME=folder.name).but(**changes)
    scored = {}
    for split, images in (("valid", 20), ("test", 40)):
        counts = some_counts(images, skill, recipe.SEED)
        matrices = torch.tensor(np.array(list(counts.values()))).view(-1, 3, 3)
        scored[split] = (pets.Pets(list(counts), None, None), matrices)
    metrics = {
        "parameters": recipe.model_dump(),
        "dataset": {"name": recipe.DATASET},
        "model": {"parameters": 1000, "flops": 10**9},
        "training": {"seconds": 12.5},
    }
    epoch = {"epoch": 1, "train_loss": 1.0, "seconds": 12.5}
    epoch |= {"valid_pixel_accuracy": skill, "valid_mean_iou": skill}
    pets.save_run(folder, metrics, [epoch], scored)
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A project's root with an empty folder runs/."""
    monkeypatch.setattr(pets, "ROOT", tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("counts", [sum(some_counts().values()), np.diag([4, 2, 0]).ravel()])
def test_scores_from_counts_are_those_of_the_module(counts):
    whole = pets.scores(torch.tensor(counts).view(3, 3))
    border = whole["iou"]["border"]
    expected = [whole["pixel_accuracy"], whole["mean_iou"], np.nan if border is None else border]
    scores = ("pixel_accuracy", "mean_iou", "iou.border")
    found = [compare.score_of(counts, score) for score in scores]
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_interval_is_that_of_an_independent_bootstrap():
    counts = some_counts()
    rows = np.array(list(counts.values()))

    def mean_iou(chosen: np.ndarray, axis: int) -> np.ndarray:
        return compare.score_of(rows[chosen].sum(axis - 1), "mean_iou")

    how = {"vectorized": True, "n_resamples": 4000, "method": "percentile"}
    images = (np.arange(len(rows)),)
    other = stats.bootstrap(images, mean_iou, **how, rng=np.random.default_rng(5))
    own = compare.estimate("mean_iou", [counts])
    assert own == compare.estimate("mean_iou", [counts])  # the same each time
    assert own.value == pytest.approx(float(compare.score_of(rows.sum(0), "mean_iou")))
    assert own[1:] == pytest.approx(other.confidence_interval, abs=0.1 * (own.high - own.low))


def test_pairing_makes_the_interval_of_a_difference_narrow():
    """Images differ in how hard they are; a gain that is the same on all of them is certain."""
    random = np.random.default_rng(0)
    base, better = {}, {}
    for i, right in enumerate(random.integers(20, 90, 50)):
        for counts, extra in ((base, 0), (better, 5)):
            counts[f"pug_{i}"] = np.array([right + extra, 100 - right - extra, 0, 0, 0, 0, 0, 0, 0])
    paired = compare.estimate("pixel_accuracy", [better], [base])
    alone = compare.estimate("pixel_accuracy", [better])
    assert paired.value == pytest.approx(0.05)
    assert paired.high - paired.low < 1e-9 < alone.high - alone.low
    assert paired.verdict == "yes"
    assert compare.estimate("pixel_accuracy", [base], [better]).verdict == "no, it harms"
    assert compare.estimate("pixel_accuracy", [base], [base]).verdict == "can't be told"


def test_runs_on_other_images_are_not_paired(complains):
    with complains("other images"):
        compare.estimate("mean_iou", [some_counts(40)], [some_counts(39)])


def test_seeds_that_held_out_other_images_can_be_averaged():
    first = some_counts(20)
    second = {f"cat_{name}": counts for name, counts in some_counts(20, seed=1).items()}
    both = compare.estimate("mean_iou", [first, second])
    means = [compare.estimate("mean_iou", [one]).value for one in (first, second)]
    assert both.value == pytest.approx(np.mean(means))


@pytest.mark.parametrize(("costs", "gains", "front"), [
    ([1, 2, 3], [0.5, 0.7, 0.6], [0, 1]), ([3, 2, 1], [0.5, 0.5, 0.5], [2]),
    ([1, 1], [0.4, 0.5], [1]), ([2], [0.1], [0]),
])  # fmt: skip
def test_the_pareto_front_holds_what_no_other_beats_at_no_more_cost(costs, gains, front):
    assert compare.pareto_front(costs, gains) == front


# --------------------------------------------------------------------------------------- comparison


def test_runs_that_differ_in_their_seed_alone_become_one_row_sorted_by_validation(root):
    for seed in (0, 1):
        write_run(root / "runs" / f"base_seed_{seed}", 0.7, SEED=seed)
        write_run(root / "runs" / f"better_seed_{seed}", 0.8, SEED=seed, DICE_WEIGHT=1.0)
    write_run(root / "runs" / "worse", 0.5, DICE_WEIGHT=0.0)
    runs, left_out = find_runs("runs/*")
    (rows,) = compare.group_runs(runs).values()
    assert left_out == []
    assert [row.name for row in rows] == ["better", "base", "worse"]
    assert [len(row.runs) for row in rows] == [2, 2, 1]

    base = compare.find_base(rows, "base")
    table = compare.comparison(rows, base)
    assert [row["seeds"] for row in table] == ["0, 1", "0, 1", "0"]
    assert ["±" in row["test accuracy, %"] for row in table] == [True, True, False]
    assert table[1]["test gain (95 %)"] == "–"
    assert [row["DICE_WEIGHT"] for row in table] == [1.0, 0.5, 0.0]
    assert "SEED" not in table[0]
    gain = rows[0].gain(base, "test")
    scores = {run.name: run.row["test.mean_iou"] for run in runs}
    each = [scores[f"better_seed_{seed}"] - scores[f"base_seed_{seed}"] for seed in (0, 1)]
    assert gain.value == pytest.approx(np.mean(each))
    assert 0 < gain.low < gain.value < gain.high
    assert rows[2].gain(base, "test").high < 0  # with the base of the seed that it has


def test_what_was_tested_on_something_else_is_in_another_group(root):
    write_run(root / "runs" / "one")
    write_run(root / "runs" / "two", IMAGE_SIZE=64)
    write_run(root / "runs" / "three", DATASET="oxford")
    write_run(root / "runs" / "four", IMAGE_SIZE=64, SCORE_SIZE=32)
    groups = compare.group_runs(find_runs("runs/*")[0]).values()
    names = [sorted(row.name for row in rows) for rows in groups]
    assert names == [["three"], ["four", "one"], ["two"]]


def test_a_row_shows_scores_that_were_reached(root):
    run = read_folder(write_run(root / "runs" / "one"))
    runs = [run.model_copy(update={"row": {"s": score}}) for score in (0.9, 0.91, 0.92109)]
    assert compare.Repeated("one", runs[2:]).shown("s") == "92.10"
    assert compare.Repeated("two", runs[:2]).shown("s") == "90.50 ± 0.50"


def test_a_table_takes_the_place_of_folders_but_has_no_intervals(root):
    folders = {"base": 0.7, "0815": 0.6}  # a name is a text, whatever it looks like
    runs = [read_folder(write_run(root / "runs" / name, skill)) for name, skill in folders.items()]
    runs[0].row["test.iou.border"] = None
    write_table(root / "table.csv", to_table(runs))
    again, left_out = find_runs("table.csv")
    assert left_out == []
    assert [run.name for run in again] == list(folders)
    for run, other in zip(runs, again, strict=True):
        assert (other.recipe, other.test_of) == (run.recipe, run.test_of)
        assert other.row == pytest.approx(run.row, abs=1e-6)
    base, other = (compare.Repeated(run.name, [run]) for run in again)
    gain = other.gain(base, "test")
    scores = [run.row["test.mean_iou"] for run in runs]
    assert gain.value == pytest.approx(scores[1] - scores[0], abs=2e-6)
    assert np.isnan(gain.low)
    assert "to" not in gain.points


def test_the_images_that_gained_and_lost_most_are_found(root):
    run = read_folder(write_run(root / "runs" / "one"))
    counts = {name: one.copy() for name, one in run.counts["test"].items()}
    for name, pixels in (("pug_7", 9), ("pug_8", -9)):
        counts[name][:2] += (pixels, -pixels)
    changed = run.model_copy(update={"counts": {"test": counts}})
    moved = compare.moved_most(changed, run)
    assert len(moved) == 4
    assert list(moved)[:: len(moved) - 1] == ["pug_7", "pug_8"]
    assert moved["pug_7"] == pytest.approx(0.09, abs=0.01)


# -------------------------------------------------------------------------------------- broken runs


METRICS, HISTORY, IMAGES = "metrics.json", "history.csv", "images.csv"
BROKEN = {  # a file, a text in it, and what takes its place
    "garbage": (METRICS, "", "\x80\xff garbage"),
    "half": (METRICS, '"valid": {', ""),
    "a list": (METRICS, "", "[1, 2]"),
    "nested too deep": (METRICS, "", "[" * 100_000),
    "no history": (HISTORY, "", None),
    "empty history": (HISTORY, "", ""),
    "history without a column": (HISTORY, "train_loss", "loss"),
    "history of words": (HISTORY, "12.5", "long"),
    "other keys": (METRICS, '"test": {', '"accuracy": {'),
    "test a text": (METRICS, '"test": {', '"test": "good", "others": {'),
    "no parameters": (METRICS, '"parameters": {', '"others": {'),
    "parameters a list": (METRICS, '"parameters": {', '"parameters": [1], "others": {'),
    "no seed": (METRICS, '"SEED"', '"SEEDS"'),
    "a side that is a text": (METRICS, '"IMAGE_SIZE": 32', '"IMAGE_SIZE": "large"'),
    "a nested parameter": (METRICS, '"SEED": 0', '"SEED": {"a": 1}'),
    "other classes": (METRICS, '"pet": ', '"cat": '),
    "a score of 7": (METRICS, '"mean_iou": 0', '"mean_iou": 7'),
    "a score that is no number": (METRICS, '"mean_iou": ', '"mean_iou": NaN, "other": '),
    "images a text": (METRICS, '"images": 40', '"images": "many"'),
    "endless seconds": (METRICS, '"seconds": 12.5', '"seconds": Infinity'),
    "images without a column": (IMAGES, "pet_as_pet", "pets"),
    "images of words": (IMAGES, "test,pug_1,pug,", "test,pug_1,pug,x"),
    "negative counts": (IMAGES, "test,pug_1,pug,", "test,pug_1,pug,-"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_left_out_with_one_line_and_the_others_are_shown(name, root):
    write_run(root / "runs" / "good")
    (root / "runs" / "going_on").mkdir()  # what isn't finished doesn't count, nor what is no run
    (root / "runs" / "notes.txt").touch()
    file, old, new = BROKEN[name]
    damage(write_run(root / "runs" / "broken") / file, old, new)
    runs, left_out = find_runs("runs/*")
    assert [run.name for run in runs] == ["good"]
    (line,) = left_out
    assert line.startswith("runs/broken is left out: ")
    assert "\n" not in line
    assert line.endswith(".")


@pytest.mark.parametrize(
    "content",
    ["", "name\n", "a,b\n1,2\n", "name,test\nx,7\n", "name,test,test.mean_iou\nx,1,2\n", "\0"],
)
def test_a_broken_table_is_left_out_or_holds_no_runs(content, root, complains):
    (root / "table.csv").write_text(content)
    with complains("no folder or table of 'table.csv'"):
        find_runs("table.csv")


@pytest.mark.parametrize(
    "patterns", ["", "runs/nothing", "/etc/*", "../*", "runs", "runs/**a", "\0", "x" * 300]
)
def test_patterns_that_no_run_fits_end_in_a_sentence(patterns, root, complains):
    with complains("RUNS"):
        find_runs(patterns)


def test_all_that_comes_from_a_file_is_escaped(root):
    name = "<img src=x onerror=alert(1)>&amp;"
    folder = write_run(root / "runs" / "run").rename(root / "runs" / name)
    (folder / "notebook.ipynb").touch()
    damage(folder / METRICS, '"sample"', '"<script>alert(3)</script>"')
    shutil.copytree(folder, root / "runs" / "other")
    damage(folder / METRICS, '"nearest"', '"<script>alert(2)</script>"')
    (rows,) = compare.group_runs(find_runs("runs/*")[0]).values()
    page = pets.html_table(compare.comparison(rows, None)) + compare.links(rows)
    assert not any(tag in page for tag in ("<script", "<img"))
    assert all(tag in page for tag in ("&lt;script&gt;", "&lt;img"))
    quoted = "%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%26amp%3B"
    assert f'href="../runs/{quoted}/notebook.ipynb"' in page


# ------------------------------------------------------------------------------------- the notebook


def run_notebook(output: Path, **parameters: object) -> str:
    """Run compare_runs.ipynb and return the HTML of its tables. Raises what a cell raises."""
    notebook = ROOT / "notebooks" / "compare_runs.ipynb"
    papermill.execute_notebook(notebook, output, parameters, progress_bar=False, cwd=ROOT)
    cells = nbformat.read(output, as_version=4).cells
    shown = [one for cell in cells for one in cell.get("outputs", []) if "data" in one]
    return "".join(one.data.get("text/html", "") for one in shown)


def test_the_notebook_shows_a_table_of_runs_sorted_by_validation(tmp_path):
    table = "experiments/ablations.csv"
    page = run_notebook(tmp_path / "notebook.ipynb", RUNS=table, MAKE_RUNS=False)
    (rows,) = compare.group_runs(find_runs(table)[0]).values()
    assert re.findall(r"<tr><td>([^<]+)", page) == [row.name for row in rows]
    header = set(re.findall(r"<th>(\w+)</th>", page))
    assert {"SKIPS", "AUGMENT", "DEPTH"} <= header
    assert not {"DATASET", "RUN_NAME", "DEVICE", "SEED"} & header


def test_the_notebook_ends_a_mistake_in_one_sentence(tmp_path):
    with pytest.raises(PapermillExecutionError) as caught:
        run_notebook(tmp_path / "notebook.ipynb", RUN="a", MAKE_RUNS=False)
    assert caught.value.ename == "InputError"
    assert caught.value.evalue.startswith("there is no parameter RUN")
