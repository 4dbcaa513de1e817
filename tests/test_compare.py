"""Comparing runs: the statistics, folding over seeds, broken runs, and what comes from files in the page."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from papermill.exceptions import PapermillExecutionError

import petseg_utils as pets
from experiments import sweep

ROOT = pets.ROOT  # tests of broken runs have another


def some_counts(images: int = 40, skill: float = 0.7, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the confusion counts of images of 100 pixels, of which about `skill` are right."""
    random = np.random.default_rng(seed)
    wrong = (1 - skill) / 2
    matrix = np.full((3, 3), wrong) + np.eye(3) * (skill - wrong)
    truth = random.multinomial(100, [0.3, 0.5, 0.2], images)  # (B, 3)
    counts = [
        [random.multinomial(n, row) for n, row in zip(pixels, matrix, strict=True)]
        for pixels in truth
    ]
    return {f"pug_{i}": np.array(one).flatten() for i, one in enumerate(counts)}


def write_run(folder: Path, skill: float = 0.7, **changes: object) -> Path:
    """Write a run that wasn't made, as `save_run` would, with other counts for another seed or skill."""
    recipe = pets.Recipe(IMAGE_SIZE=32, RUN_NAME=folder.name).but(**changes)
    scored = {}
    for split, images in (("valid", 20), ("test", 40)):
        counts = some_counts(images, skill, recipe.SEED)
        scored[split] = (
            pets.Pets(list(counts), None, None),
            torch.tensor(np.array(list(counts.values()))).view(-1, 3, 3),
        )
    metrics = {
        "parameters": recipe.model_dump(),
        "dataset": {"name": recipe.DATASET},
        "model": {"parameters": 1000, "flops": 10**9},
        "training": {"seconds": 12.5},
    }
    epoch = {
        "epoch": 1,
        "train_loss": 1.0,
        "valid_pixel_accuracy": skill,
        "valid_mean_iou": skill,
        "seconds": 12.5,
    }
    pets.save_run(folder, metrics, [epoch], scored)
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A project's root with an empty folder runs/."""
    monkeypatch.setattr(pets, "ROOT", tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path


# --------------------------------------------------------------------------------------- statistics


def test_scores_from_counts_are_those_of_the_module():
    counts = np.array(list(some_counts().values()))
    whole = pets.scores(torch.tensor(counts.sum(0)).view(3, 3))
    assert sweep.pixel_accuracy(counts.sum(0)) == pytest.approx(whole["pixel_accuracy"], abs=1e-12)
    assert sweep.mean_iou(counts.sum(0)) == pytest.approx(whole["mean_iou"], abs=1e-12)
    assert sweep.border_iou(counts.sum(0)) == pytest.approx(whole["iou"]["border"], abs=1e-12)


def test_a_class_that_is_not_there_stays_out_of_the_mean():
    counts = np.array([4, 0, 0, 0, 2, 0, 0, 0, 0])
    assert sweep.mean_iou(counts) == 1.0
    assert np.isnan(sweep.border_iou(counts))


def test_the_interval_is_that_of_an_independent_bootstrap():
    counts = some_counts()
    stats = pytest.importorskip("scipy.stats")  # comes with scikit-learn
    rows = np.array(list(counts.values()))
    other = stats.bootstrap(
        (np.arange(len(rows)),),
        lambda chosen, axis=-1: sweep.mean_iou(rows[chosen].sum(-2)),
        vectorized=True, n_resamples=4000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    own = sweep.estimate(sweep.mean_iou, [counts])
    assert own.value == pytest.approx(float(sweep.mean_iou(rows.sum(0))))
    width = own.high - own.low
    assert own.low == pytest.approx(other.low, abs=0.1 * width)
    assert own.high == pytest.approx(other.high, abs=0.1 * width)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(120):
        estimate = sweep.estimate(sweep.pixel_accuracy, [some_counts(60, 0.7, seed)])
        held += estimate.low <= 0.7 <= estimate.high
    assert 105 <= held <= 119  # of 120: 114 are expected, with a standard deviation of 2.4


def test_pairing_makes_the_interval_of_a_difference_narrow():
    """Images differ in how hard they are; a gain that is the same on all of them is certain all the same."""
    random = np.random.default_rng(0)
    base, better = {}, {}
    for i, right in enumerate(random.integers(20, 90, 50)):
        for counts, extra in ((base, 0), (better, 5)):
            counts[f"pug_{i}"] = np.array([right + extra, 100 - right - extra, 0, 0, 0, 0, 0, 0, 0])
    paired = sweep.estimate(sweep.pixel_accuracy, [better], [base])
    alone = sweep.estimate(sweep.pixel_accuracy, [better])
    assert paired.value == pytest.approx(0.05)
    assert paired.high - paired.low < 1e-9 < alone.high - alone.low
    assert paired.verdict == "yes"
    assert sweep.estimate(sweep.pixel_accuracy, [base], [better]).verdict == "no, it harms"
    assert sweep.estimate(sweep.pixel_accuracy, [base], [base]).verdict == "can't be told"


def test_an_estimate_is_the_same_each_time():
    assert sweep.estimate(sweep.mean_iou, [some_counts()]) == sweep.estimate(
        sweep.mean_iou, [some_counts()]
    )


def test_runs_on_other_images_are_not_paired(complains):
    with complains("other images"):
        sweep.estimate(sweep.mean_iou, [some_counts(40)], [some_counts(39)])


def test_seeds_that_held_out_other_images_can_be_averaged():
    first = some_counts(20)
    second = {f"cat_{name}": counts for name, counts in some_counts(20, seed=1).items()}
    both = sweep.estimate(sweep.mean_iou, [first, second])
    means = [sweep.estimate(sweep.mean_iou, [one]).value for one in (first, second)]
    assert both.value == pytest.approx(np.mean(means))


@pytest.mark.parametrize(
    ("costs", "gains", "front"),
    [
        ([1, 2, 3], [0.5, 0.7, 0.6], [0, 1]),
        ([3, 2, 1], [0.5, 0.5, 0.5], [2]),
        ([1, 1], [0.4, 0.5], [1]),
        ([2], [0.1], [0]),
    ],
)
def test_the_pareto_front_holds_what_no_other_beats_at_no_more_cost(costs, gains, front):
    assert sweep.pareto_front(costs, gains) == front


# --------------------------------------------------------------------------------------- comparison


def test_runs_that_differ_in_their_seed_alone_become_one_row_sorted_by_validation(root):
    for seed in (0, 1):
        write_run(root / "runs" / f"base_seed_{seed}", 0.7, SEED=seed)
        write_run(root / "runs" / f"better_seed_{seed}", 0.8, SEED=seed, DICE_WEIGHT=1.0)
    write_run(root / "runs" / "worse", 0.5, DICE_WEIGHT=0.0)
    runs, left_out = sweep.find_runs("runs/*")
    (rows,) = sweep.group_runs(runs).values()
    assert left_out == []
    assert [row.name for row in rows] == ["better", "base", "worse"]
    assert [len(row.runs) for row in rows] == [2, 2, 1]

    base = sweep.find_base(rows, "base")
    table = sweep.comparison(rows, base)
    assert [row["seeds"] for row in table] == ["0, 1", "0, 1", "0"]
    assert "±" in table[0]["test accuracy, %"]
    assert "±" not in table[2]["test accuracy, %"]
    assert table[1]["test gain (95 %)"] == "–"
    assert [row["DICE_WEIGHT"] for row in table] == [1.0, 0.5, 0.0]
    assert "SEED" not in table[0]
    gain = rows[0].gain(base, "test")
    scores = {run.name: run.test.mean_iou for run in runs}
    expected = np.mean(
        [scores[f"better_seed_{seed}"] - scores[f"base_seed_{seed}"] for seed in (0, 1)]
    )
    assert gain.value == pytest.approx(expected)
    assert 0 < gain.low < gain.value < gain.high
    assert rows[2].gain(base, "test").high < 0  # with the base of the seed that it has


def test_what_was_tested_on_something_else_is_in_another_group(root):
    write_run(root / "runs" / "one")
    write_run(root / "runs" / "two", IMAGE_SIZE=64)
    write_run(root / "runs" / "three", DATASET="oxford")
    write_run(root / "runs" / "four", IMAGE_SIZE=64, SCORE_SIZE=32)
    groups = sweep.group_runs(sweep.find_runs("runs/*")[0])
    assert {key[:2]: sorted(row.name for row in rows) for key, rows in groups.items()} == {
        ("sample", 32): ["four", "one"],
        ("sample", 64): ["two"],
        ("oxford", 32): ["three"],
    }


def test_a_row_shows_scores_that_were_reached(root):
    run = sweep.check_run(pets.read_run(write_run(root / "runs" / "one")))
    row = sweep.Repeated("one", [run])
    assert row.shown(lambda _: 0.92109) == "92.10"
    pair = sweep.Repeated("two", [run, run.model_copy(update={"name": "again"})])
    assert pair.shown(lambda one: 0.9 if one.name == "one" else 0.91) == "90.50 ± 0.50"


def test_a_table_takes_the_place_of_folders_but_has_no_intervals(root):
    folders = [
        write_run(root / "runs" / name, skill) for name, skill in (("base", 0.7), ("other", 0.6))
    ]
    runs = [sweep.check_run(pets.read_run(folder)) for folder in folders]
    pets.write_csv(root / "table.csv", [sweep.to_row(run) for run in runs])
    again, left_out = sweep.find_runs("table.csv")
    assert left_out == []
    assert [run.name for run in again] == ["base", "other"]
    for run, other in zip(runs, again, strict=True):
        assert other.recipe == run.recipe
        assert other.test_of == run.test_of
        assert other.valid.mean_iou == pytest.approx(run.valid.mean_iou, abs=1e-6)
    base, other = (sweep.Repeated(run.name, [run]) for run in again)
    gain = other.gain(base, "test")
    assert gain.value == pytest.approx(runs[1].test.mean_iou - runs[0].test.mean_iou, abs=2e-6)
    assert np.isnan(gain.low)
    assert "to" not in gain.points


def test_the_images_that_gained_and_lost_most_are_found(root):
    run = sweep.check_run(pets.read_run(write_run(root / "runs" / "one")))
    counts = {name: one.copy() for name, one in run.counts["test"].items()}
    for name, pixels in (("pug_7", 9), ("pug_8", -9)):
        counts[name][0] += pixels
        counts[name][1] -= pixels
    changed = run.model_copy(update={"counts": {"test": counts}})
    moved = sweep.moved_most(changed, run)
    assert len(moved) == 4
    assert next(iter(moved)) == "pug_7"
    assert list(moved)[-1] == "pug_8"
    assert moved["pug_7"] == pytest.approx(0.09, abs=0.01)


# -------------------------------------------------------------------------------------- broken runs


def metrics_with(change):
    """Return a function that changes the metrics.json of a run."""

    def apply(folder: Path) -> None:
        metrics = json.loads((folder / "metrics.json").read_text())
        change(metrics)
        (folder / "metrics.json").write_text(json.dumps(metrics))

    return apply


def text_in(name: str, change):
    """Return a function that changes the text of a run's file."""
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


BROKEN = {
    "garbage": lambda folder: (folder / "metrics.json").write_bytes(b"\x80\xff garbage"),
    "half": text_in("metrics.json", lambda text: text[: len(text) // 2]),
    "empty": text_in("metrics.json", lambda text: ""),
    "a list": text_in("metrics.json", lambda text: "[1, 2]"),
    "a number": text_in("metrics.json", lambda text: "7"),
    "nested too deep": text_in("metrics.json", lambda text: "[" * 100_000),
    "a folder": lambda folder: (
        (folder / "metrics.json").unlink(),
        (folder / "metrics.json").mkdir(),
    ),
    "no history": lambda folder: (folder / "history.csv").unlink(),
    "empty history": text_in("history.csv", lambda text: ""),
    "history without a column": text_in(
        "history.csv", lambda text: text.replace("train_loss", "loss")
    ),
    "history of words": text_in("history.csv", lambda text: text.replace("12.5", "long")),
    "history of NUL": text_in("history.csv", lambda text: text + "\0"),
    "other keys": metrics_with(lambda m: m.update(accuracy=m.pop("test"))),
    "no parameters": metrics_with(lambda m: m.pop("parameters")),
    "no seed": metrics_with(lambda m: m["parameters"].pop("SEED")),
    "a side that is a text": metrics_with(lambda m: m["parameters"].update(IMAGE_SIZE="large")),
    "a nested parameter": metrics_with(lambda m: m["parameters"].update(SEED={"a": 1})),
    "other classes": metrics_with(lambda m: m["test"].update(iou={"cat": 1.0})),
    "a score of 7": metrics_with(lambda m: m["valid"].update(mean_iou=7)),
    "a score that is no number": metrics_with(lambda m: m["valid"].update(mean_iou=float("nan"))),
    "endless seconds": metrics_with(lambda m: m["training"].update(seconds=float("inf"))),
    "images without a column": text_in(
        "images.csv", lambda text: text.replace("pet_as_pet", "pets")
    ),
    "images of words": text_in(
        "images.csv", lambda text: text.replace("test,pug_1,pug,", "test,pug_1,pug,x")
    ),
    "negative counts": text_in(
        "images.csv", lambda text: text.replace("test,pug_1,pug,", "test,pug_1,pug,-")
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_left_out_with_one_line_and_the_others_are_shown(name, root):
    write_run(root / "runs" / "good")
    BROKEN[name](write_run(root / "runs" / "broken"))
    runs, left_out = sweep.find_runs("runs/*")
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
        sweep.find_runs("table.csv")


@pytest.mark.parametrize(
    "patterns", ["", "runs/nothing", "/etc/*", "../*", "runs", "runs/**a", "\0", "x" * 300]
)
def test_patterns_that_no_run_fits_end_in_a_sentence(patterns, root, complains):
    with complains("RUNS"):
        sweep.find_runs(patterns)


def test_folders_without_a_finished_run_do_not_count(root):
    write_run(root / "runs" / "good")
    (root / "runs" / "going_on").mkdir()
    (root / "runs" / "notes.txt").touch()
    runs, left_out = sweep.find_runs("runs/*")
    assert len(runs) == 1
    assert left_out == []


def test_all_that_comes_from_a_file_is_escaped(root):
    name = "<img src=x onerror=alert(1)>&amp;"
    folder = write_run(root / "runs" / "run").rename(root / "runs" / name)
    (folder / "notebook.ipynb").touch()
    metrics_with(lambda m: m["parameters"].update(MASK_RESIZE="<script>alert(2)</script>"))(folder)
    metrics_with(lambda m: m["dataset"].update(name="<script>alert(3)</script>"))(folder)
    shutil.copytree(folder, root / "runs" / "other")
    metrics_with(lambda m: m["parameters"].update(MASK_RESIZE="nearest"))(root / "runs" / "other")
    (rows,) = sweep.group_runs(sweep.find_runs("runs/*")[0]).values()
    page = pets.html_table(sweep.comparison(rows, None)) + sweep.links(rows)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;img" in page
    assert (
        'href="../runs/%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%26amp%3B/notebook.ipynb"'
        in page
    )


# ------------------------------------------------------------------------------------- the notebook


def run_notebook(output: Path, **parameters: object) -> str:
    """Run compare_runs.ipynb through papermill and return the HTML of its tables. Raises what a cell raises."""
    papermill.execute_notebook(
        ROOT / "notebooks" / "compare_runs.ipynb", output, parameters, progress_bar=False, cwd=ROOT
    )
    shown = [
        one for cell in nbformat.read(output, as_version=4).cells for one in cell.get("outputs", [])
    ]
    return "".join(one.data.get("text/html", "") for one in shown if "data" in one)


def test_the_notebook_shows_a_table_of_runs_sorted_by_validation(tmp_path):
    page = run_notebook(
        tmp_path / "notebook.ipynb", RUNS="experiments/ablations.csv", MAKE_RUNS=False
    )
    kept, _ = sweep.find_runs("experiments/ablations.csv")
    (rows,) = sweep.group_runs(kept).values()
    assert re.findall(r"<tr><td>([^<]+)", page) == [row.name for row in rows]
    header = re.findall(r"<th>(\w+)</th>", page)
    assert {"SKIPS", "AUGMENT", "DEPTH"} <= set(header)
    assert not {"DATASET", "RUN_NAME", "DEVICE", "SEED"} & set(header)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"RUNS": "runs/nowhere"}, "no folder or table of 'runs/nowhere'"),
        ({"RUN": "a"}, "there is no parameter RUN"),
    ],
)
def test_the_notebook_ends_a_mistake_in_one_sentence(parameters, sentence, tmp_path):
    with pytest.raises(PapermillExecutionError) as caught:
        run_notebook(tmp_path / "notebook.ipynb", **parameters, MAKE_RUNS=False)
    assert caught.value.ename == "InputError"
    assert caught.value.evalue.startswith(sentence)
