"""The experiments: the tables that are shown, and mistakes told before long work."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import damage

import petseg_utils as pets
from experiments import score, studies, sweep, throughput
from experiments.compare import group_runs
from experiments.read_runs import check_run, find_runs, read_table
from experiments.tables import cut

FOLDER = pets.ROOT / "experiments"
SHOWN = (FOLDER / "README.md").read_text(encoding="utf-8")
KEPT = pets.ROOT / "notebooks" / "oxford_run"


@pytest.mark.parametrize("name", [*studies.GRIDS, *studies.STUDIES])
def test_the_table_that_is_shown_is_what_the_study_prints(name, capsys):
    studies.main(name)
    printed = capsys.readouterr().out
    assert printed.count("\n") > 5
    assert printed in SHOWN


def test_the_speed_that_is_shown_is_what_was_measured():
    files = [FOLDER / f"throughput_{precision}.json" for precision in ("float32", "bfloat16")]
    kept = [json.loads(file.read_text(encoding="utf-8"))["headline"] for file in files]
    assert throughput.table(*kept) in SHOWN


@pytest.mark.parametrize("grid", studies.GRIDS)
def test_the_kept_runs_are_those_of_the_grid_and_a_change_repeats_one_recipe(grid):
    wanted = sweep.read_grid(FOLDER / f"{grid}.json")
    kept, _ = find_runs(f"experiments/{grid}.csv")
    assert [f"{grid}_{run.name}" for run in kept] == list(wanted)
    for run in kept:
        recipe = pets.Recipe(**wanted[f"{grid}_{run.name}"])
        parameters = recipe.model_dump(exclude=pets.Recipe.PLACES)
        assert {name: run.parameters[name] for name in parameters} == parameters
    (rows,) = group_runs(kept).values()
    for row in rows:
        assert [run.name for run in row.runs] == [f"{row.name}_seed_0", f"{row.name}_seed_1"]


@pytest.mark.parametrize("grid", studies.GRIDS)
def test_a_gain_lies_within_its_interval_and_a_rows_scores_are_means_of_its_seeds(grid):
    kept = read_table(FOLDER / f"{grid}.csv")
    table = studies.grid_table(studies.read_results(FOLDER / f"{grid}.csv"))
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    assert 2 * len(rows) == len(kept)
    for row, first, second in zip(rows, kept[::2], kept[1::2], strict=True):
        mean = 50 * (first.row["test.pixel_accuracy"] + second.row["test.pixel_accuracy"])
        assert 0 <= mean - float(row[1].strip(" %")) < 0.0101  # cut, not rounded
        for cell in filter(None, map(str.strip, row[2:4])):
            points, low, high = map(float, re.findall(r"[+-]?[\d.]+", cell))
            assert low <= points <= high


def test_written_results_read_back_with_the_interval_of_each_gain(tmp_path):
    template = check_run(pets.read_run(KEPT))
    matrix = np.array([5, 2, 3, 1, 8, 1, 2, 2, 6])
    runs = []
    for change, more in (("base", 0), ("no_skips", 2)):
        counts = {f"image_{i}": matrix + more * (np.arange(9) == i % 9) for i in range(20)}
        row = template.row | {"name": f"ablations_{change}_seed_0"}
        runs.append(template.model_copy(update={"row": row, "counts": {"test": counts}}))
    studies.write_results(runs, "ablations", tmp_path / "table.csv")

    rows = studies.read_results(tmp_path / "table.csv")
    assert list(rows.index) == [("base", "0"), ("no_skips", "0")]
    assert rows["gain_low"].isna().tolist() == [True, False]
    assert rows["gain_low"].iloc[1] < rows["gain_high"].iloc[1]
    again = read_table(tmp_path / "table.csv")
    assert again[0].row == pytest.approx(runs[0].row | {"name": "base_seed_0"}, abs=1e-6)


def test_a_table_that_is_kept_is_replaced_only_by_a_whole_one(
    tmp_path, monkeypatch, capsys, complains
):
    (tmp_path / "oxford-iiit-pet").mkdir()
    shutil.copy(studies.GRIDS["ablations"], tmp_path)
    table = tmp_path / "ablations.csv"
    table.write_text("kept")
    failed = {"run": "x", "outcome": "failed", "why": "no disk"}
    made = failed | {"run": KEPT.name, "outcome": "made"}
    monkeypatch.setattr(studies, "GRIDS", {"ablations": tmp_path / "ablations.json"})
    monkeypatch.setattr(sweep, "make_runs", lambda runs, cluster: [made, failed])
    with complains("the kept table stays"):
        studies.main("ablations", str(tmp_path))
    assert "failed x: no disk" in capsys.readouterr().out
    assert table.read_text() == "kept"


def test_the_peer_trains_by_the_recipe_that_it_records():
    muon, adamw = studies.peer_recipes().values()
    assert (muon.MUON, adamw.MUON, muon.BASE_CHANNELS) == (True, False, 32)
    assert adamw.but(MUON=True, LEARNING_RATE=muon.LEARNING_RATE) == muon  # and in nothing else
    small = {"IMAGE_SIZE": 16, "DEPTH": 2, "BASE_CHANNELS": 4, "BATCH_SIZE": 4, "EPOCHS": 2}
    recipe = adamw.but(**small)
    net = pets.conv_plus_conv(3, 3)
    before = net[0].weight.clone()
    result = studies.train_and_score(net, (throughput.random_pets(8, 16),) * 3, recipe)
    assert not torch.equal(net[0].weight, before)
    assert pets.Recipe(**result["recipe"]) == recipe
    assert result["test"]["confusion_matrix"]
    assert result["parameters"] == sum(p.numel() for p in net.parameters())


def test_steps_take_turns_and_those_that_keep_no_freed_memory_come_first(monkeypatch):
    events = []
    monkeypatch.setattr(pets, "keep_freed_memory", lambda: events.append("kept"))
    monkeypatch.setattr(throughput, "steps_of", lambda **changes: changes)
    monkeypatch.setattr(throughput, "epoch", lambda: "loop")
    monkeypatch.setattr(throughput, "matrix_product", lambda _: 1e9)
    monkeypatch.setattr(throughput, "seconds_of", lambda work: events.append(work) or len(events))
    measured = throughput.headline()
    assert events == [{"plain": True}, {}] * 6 + ["kept"] + [{}, {"MUON": True}, "loop"] * 6
    # The least is that of the third measurement, after the round that warms up.
    assert measured["plain_images_per_second"] == throughput.STEPS * throughput.BATCH / 3


# ----------------------------------------------------------------------------------------- score.py


METRICS = "metrics.json"
USAGE = "python -m experiments.score FOLDER [RUN]"
DAMAGED = {  # beside what compare_runs.ipynb refuses as well, in test_compare.py
    "a parameter missing": ('"SKIPS": true,', ""),
    "a stranger among them": ('"SKIPS": true,', '"SKIPS": true, "EPOCH": 3,'),
    "a text for a number": ('"DEPTH": 5', '"DEPTH": "5"'),
    "out of range": ('"IMAGE_SIZE": 256', '"IMAGE_SIZE": -128'),
    "a huge net": ('"BASE_CHANNELS": 32', '"BASE_CHANNELS": 1000000000'),
    "another dataset": ('"DATASET": "oxford"', '"DATASET": "sample"'),
    "another net": ('"BASE_CHANNELS": 32', '"BASE_CHANNELS": 16'),
    "other images": ('"images": 12', '"images": 3'),
}


@pytest.fixture
def run_copy(tmp_path) -> Path:
    """A copy of the kept run without its notebook, as if scored on the twelve drawn images."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (METRICS, "history.csv", "weights.pt"):
        shutil.copy(KEPT / name, folder)
    damage(folder / METRICS, '"images": 3669', '"images": 12')
    return folder


@pytest.fixture
def refuses(run_copy, sample, complains, monkeypatch):
    """Return what expects one sentence of the scoring of the copy, before it loads images."""

    def refuses() -> None:
        monkeypatch.setattr(pets, "load_pets", lambda *_, **__: pytest.fail("the long work began"))
        with complains():
            score.main(str(sample.parent), str(run_copy))

    return refuses


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_run_is_refused_in_a_sentence_before_the_work(name, run_copy, refuses):
    damage(run_copy / METRICS, *DAMAGED[name])
    refuses()


@pytest.mark.parametrize("file", [METRICS, "history.csv", "weights.pt"])
@pytest.mark.parametrize("what", ["missing", "empty", "a folder"])
def test_a_file_that_is_none_is_refused_in_a_sentence_before_the_work(
    file, what, run_copy, refuses
):
    path = run_copy / file
    path.unlink()
    {"missing": list, "empty": path.touch, "a folder": path.mkdir}[what]()
    refuses()


@pytest.mark.parametrize("arguments", [("x" * 300,), (".", "nowhere"), (".", "README.md")])
def test_a_wrong_folder_ends_in_a_sentence(arguments, complains):
    with complains():
        score.main(*arguments)


@pytest.mark.parametrize(("arguments", "told"), [
    ([], USAGE), ([".", ".", "."], USAGE), (["nowhere"], "there is no dataset at "),
])  # fmt: skip
def test_the_script_ends_with_its_usage_or_a_sentence(arguments, told, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score", *arguments])
    monkeypatch.delitem(sys.modules, "experiments.score")
    with pytest.raises(SystemExit, match=re.escape(told)):
        runpy.run_module("experiments.score", run_name="__main__")


def test_weights_are_scored_again(run_copy, sample, capsys):
    """The kept net on twelve drawings: the score then is made up, the score now computed."""
    metrics = json.loads((run_copy / "metrics.json").read_text(encoding="utf-8"))
    score.main(str(sample.parent), str(run_copy))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("on 12 test images") for line in lines)
    assert f"{metrics['test']['pixel_accuracy']:.6f} then" in lines[0]
    now = float(lines[0].split()[1])
    assert 0.2 < now < 1


@pytest.mark.parametrize(("value", "digits", "words"), [
    (0.29, 2, "0.29"), (89.709, 2, "89.70"), (0.5, 0, "0"), (-0.001, 2, "-0.01"),
])  # fmt: skip
def test_cut_never_rounds_up(value, digits, words):
    assert cut(value, digits) == words


def test_statistics_that_training_gathered_replace_those_that_were_measured():
    training = pets.Training.start(pets.UNet(2, 2), pets.Recipe(DEPTH=2), total_steps=10)
    averaged, model = training.average.module, training.model
    with torch.no_grad():
        model.downs[0][1].running_mean.fill_(7)
        model.downs[0][1].weight.fill_(5)
    gathered = studies.with_statistics_of(averaged, model).downs[0][1]
    assert gathered.running_mean.eq(7).all()
    assert gathered.weight.eq(1).all()
    assert averaged.downs[0][1].running_mean.eq(0).all()
