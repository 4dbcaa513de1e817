"""The experiments: their tables are those that are shown, and what is malformed ends in a sentence before long work."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import petseg_utils as pets
from experiments import ablations, compare, norm_statistics, peer, read_runs, score, sweep, throughput
from experiments.tables import cut


@pytest.fixture
def tiny_pets() -> pets.Pets:
    """Eight pictures of noise, 16 x 16 pixels."""
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    return pets.Pets([f"pug_{i}" for i in range(8)], images, images[:, 0] % 3)


FOLDER = pets.ROOT / "experiments"
SHOWN = (FOLDER / "README.md").read_text()
KEPT = pets.ROOT / "notebooks" / "oxford_run"


def run_module(*arguments: object) -> subprocess.CompletedProcess:
    """Run a module of the experiments as a person would."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=pets.ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "command", ["ablations", "ablations optimisers", "norm_statistics", "peer"]
)
def test_the_table_that_is_shown_is_what_the_module_prints(command):
    printed = run_module(*f"experiments.{command}".split())
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.count("\n") > 5
    assert printed.stdout in SHOWN


def test_the_table_of_the_speed_is_that_of_the_kept_result():
    kept = [
        json.loads((FOLDER / f"throughput_{name}.json").read_text())
        for name in ("float32", "bfloat16")
    ]
    assert throughput.table(*(one["headline"] for one in kept)) in SHOWN


@pytest.mark.parametrize("grid", ablations.GRIDS)
def test_the_kept_runs_are_all_those_of_the_grid(grid):
    wanted = sweep.read_grid(FOLDER / f"{grid}.json")
    kept, _ = read_runs.find_runs(f"experiments/{grid}.csv")
    assert [f"{grid}_{run.name}" for run in kept] == list(wanted)
    for run in kept:
        parameters = pets.Recipe(**wanted[f"{grid}_{run.name}"]).model_dump(
            exclude=pets.Recipe.PLACES
        )
        assert {name: run.parameters[name] for name in parameters} == parameters


@pytest.mark.parametrize("grid", ablations.GRIDS)
def test_the_kept_runs_of_a_change_repeat_one_recipe(grid):
    kept, _ = read_runs.find_runs(f"experiments/{grid}.csv")
    (rows,) = compare.group_runs(kept).values()
    grouped = sorted([run.name for run in row.runs] for row in rows)
    assert grouped == sorted([f"{row.name}_seed_0", f"{row.name}_seed_1"] for row in rows)


@pytest.mark.parametrize("grid", ablations.GRIDS)
def test_a_gain_lies_within_its_interval_and_a_rows_scores_are_means_of_its_seeds(grid):
    kept = ablations.read_results(FOLDER / f"{grid}.csv")
    rows = [line.split("|")[1:-1] for line in ablations.table(kept).splitlines()[2:]]
    assert len(rows) == len(kept)
    for row, runs in zip(rows, kept.values(), strict=True):
        mean = sum(100 * float(run["test.pixel_accuracy"]) for run in runs.values()) / len(runs)
        assert 0 <= mean - float(row[1].strip(" %")) < 0.0101  # cut, not rounded
        for cell in filter(None, map(str.strip, row[2:4])):
            points, low, high = map(float, re.findall(r"[+-]?[\d.]+", cell))
            assert low <= points <= high


def test_written_results_read_back_with_the_interval_of_each_gain(tmp_path):
    template = read_runs.check_run(pets.read_run(KEPT))
    matrix = torch.tensor([[5, 2, 3], [1, 8, 1], [2, 2, 6]]).flatten().numpy()
    runs = []
    for change, more in (("base", 0), ("no_skips", 2)):
        counts = {
            "test": {
                f"image_{i}": matrix + more * (torch.arange(9) == i % 9).numpy() for i in range(20)
            }
        }
        runs.append(
            template.model_copy(update={"name": f"ablations_{change}_seed_0", "counts": counts})
        )
    ablations.write_results(runs, "ablations", tmp_path / "table.csv")

    rows = ablations.read_results(tmp_path / "table.csv")
    assert list(rows) == ["base", "no_skips"]
    assert rows["base"][0]["gain_low"] == ""
    assert float(rows["no_skips"][0]["gain_low"]) < float(rows["no_skips"][0]["gain_high"])
    again = read_runs.read_table(tmp_path / "table.csv")
    assert again[0].test.pixel_accuracy == pytest.approx(template.test.pixel_accuracy, abs=1e-6)
    assert again[1].recipe == template.recipe


def test_a_table_that_is_kept_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "oxford-iiit-pet").mkdir()
    shutil.copy(ablations.GRIDS["ablations"], tmp_path)
    table = tmp_path / "ablations.csv"
    table.write_bytes((FOLDER / "ablations.csv").read_bytes())
    outcomes = [
        {"run": KEPT.name, "outcome": "made", "why": ""},
        {"run": "x", "outcome": "failed", "why": "no disk"},
    ]
    monkeypatch.setattr(ablations, "GRIDS", {"ablations": tmp_path / "ablations.json"})
    monkeypatch.setattr(sweep, "make_runs", lambda runs, cluster: outcomes)
    monkeypatch.setattr(sweep, "find_runs", lambda folders: ([], []))
    assert ablations.main(str(tmp_path)) == 1
    assert "failed x: no disk" in capsys.readouterr().out
    assert table.read_bytes() == (FOLDER / "ablations.csv").read_bytes()


def test_the_peer_trains_by_the_recipe_that_it_records(tiny_pets):
    recipe = peer.recipes()["AdamW"].but(
        IMAGE_SIZE=16, DEPTH=2, BASE_CHANNELS=4, BATCH_SIZE=4, EPOCHS=2
    )
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 3, 1)
    )
    before = net[0].weight.clone()
    result = peer.train_and_score(net, (tiny_pets, tiny_pets, tiny_pets), recipe)
    assert not torch.equal(net[0].weight, before)
    assert pets.Recipe(**result["recipe"]) == recipe
    assert result["test"]["confusion_matrix"]
    assert result["parameters"] == sum(p.numel() for p in net.parameters())


def test_both_optimisers_of_the_peer_differ_in_nothing_else():
    muon, adamw = peer.recipes().values()
    assert muon.MUON
    assert not adamw.MUON
    assert adamw.but(MUON=True, LEARNING_RATE=muon.LEARNING_RATE) == muon
    assert muon.BASE_CHANNELS == 32


def test_steps_are_measured_in_turns_in_a_process_each(monkeypatch):
    """What keeps freed memory must not be in the process of the plain step."""
    order = []

    class Pool:
        def __init__(self, _workers, _context, set_up, arguments):
            self.name = arguments[0]
            assert set_up is throughput.set_up

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, _work):
            order.append(self.name)
            return self

        def result(self):
            return len(order)

    monkeypatch.setattr(throughput, "ProcessPoolExecutor", Pool)
    seconds = throughput.in_turns()
    names = list(throughput.HEADLINE)
    assert order == names * 6
    assert seconds["plain"] == len(names) + 1  # the least after the round that warms up
    assert [name for name in names if not throughput.HEADLINE[name][0]] == [
        "plain",
        "memory not kept",
    ]


# ----------------------------------------------------------------------------------------- score.py


def damaged(change) -> str:
    """Return the metrics.json of the kept run, as if it had been scored on twelve images, with a change."""
    metrics = json.loads((KEPT / "metrics.json").read_text())
    metrics["test"]["images"] = (
        12  # as many as the drawn dataset has, so that only the change is wrong
    )
    change(metrics)
    return json.dumps(metrics)


MALFORMED = {
    "garbage": b"\x93\x00\xff garbage",
    "empty": b"",
    "half": (KEPT / "metrics.json").read_bytes()[:700],
    "a list": b"[1, 2]",
    "null": b"null",
    "nested too deep": b"[" * 100_000,
    "no parameters": damaged(lambda m: m.pop("parameters")),
    "parameters a list": damaged(lambda m: m.update(parameters=[1])),
    "a parameter missing": damaged(lambda m: m["parameters"].pop("SKIPS")),
    "a stranger among them": damaged(lambda m: m["parameters"].update(EPOCH=3)),
    "a text for a number": damaged(lambda m: m["parameters"].update(DEPTH="5")),
    "out of range": damaged(lambda m: m["parameters"].update(IMAGE_SIZE=-128)),
    "a huge net": damaged(lambda m: m["parameters"].update(BASE_CHANNELS=10**9)),
    "another dataset": damaged(lambda m: m["parameters"].update(DATASET="sample")),
    "no test": damaged(lambda m: m.pop("test")),
    "test a text": damaged(lambda m: m.update(test="good")),
    "accuracy a text": damaged(lambda m: m["test"].update(pixel_accuracy="high")),
    "accuracy NaN": damaged(lambda m: m["test"].update(pixel_accuracy=float("nan"))),
    "accuracy 7": damaged(lambda m: m["test"].update(pixel_accuracy=7)),
    "other classes": damaged(lambda m: m["test"].update(iou={"cat": 0.5})),
    "images a text": damaged(lambda m: m["test"].update(images="many")),
    "another net": damaged(lambda m: m["parameters"].update(BASE_CHANNELS=16)),
    "other images": damaged(lambda m: m["test"].update(images=3)),
}


@pytest.fixture
def no_long_work(monkeypatch):
    """Make loading the images of a split a failure."""
    monkeypatch.setattr(pets, "load_pets", lambda *_, **__: pytest.fail("the long work began"))


@pytest.fixture
def run_copy(tmp_path):
    """A copy of the kept run, without its notebook."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("history.csv", "weights.pt"):
        shutil.copy(KEPT / name, folder)
    (folder / "metrics.json").write_text(damaged(lambda metrics: None))
    return folder


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_run_is_refused_in_a_sentence_before_the_work(
    name, run_copy, sample, no_long_work, complains
):
    content = MALFORMED[name]
    (run_copy / "metrics.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with complains():
        score.main(str(sample.parent), str(run_copy))


@pytest.mark.parametrize("file", ["metrics.json", "history.csv", "weights.pt"])
@pytest.mark.parametrize("what", ["missing", "empty", "a folder"])
def test_a_damaged_file_is_refused_in_a_sentence_before_the_work(
    file, what, run_copy, sample, no_long_work, complains
):
    (run_copy / file).unlink()
    if what == "empty":
        (run_copy / file).touch()
    if what == "a folder":
        (run_copy / file).mkdir()
    with complains():
        score.main(str(sample.parent), str(run_copy))


@pytest.mark.parametrize(
    "arguments", [("nowhere",), ("README.md",), ("x" * 300,), (".", "nowhere"), (".", "README.md")]
)
def test_a_wrong_folder_ends_in_a_sentence_and_not_with_0(arguments):
    done = run_module("experiments.score", *arguments)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.strip().endswith(".")


@pytest.mark.parametrize("arguments", [(), (".", ".", ".")])
def test_wrong_usage_shows_the_usage(arguments):
    done = run_module("experiments.score", *arguments)
    assert done.returncode == 1
    assert "python -m experiments.score FOLDER [RUN]" in done.stderr


def test_weights_are_scored_again(run_copy, sample, capsys):
    """The kept net on twelve drawings: what is said to be then is made up, what is now is computed."""
    metrics = json.loads((run_copy / "metrics.json").read_text())
    score.main(str(sample.parent), str(run_copy))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("on 12 test images") for line in lines)
    assert f"{metrics['test']['pixel_accuracy']:.6f} then" in lines[0]
    now = float(lines[0].split()[1])
    assert 0.2 < now < 1


@pytest.mark.parametrize(
    ("value", "digits", "words"),
    [(0.29, 2, "0.29"), (89.709, 2, "89.70"), (0.5, 0, "0"), (-0.001, 2, "-0.01")],
)
def test_cut_never_rounds_up(value, digits, words):
    assert cut(value, digits) == words


def test_statistics_that_training_gathered_replace_those_that_were_measured():
    training = pets.Training.start(pets.UNet(2, 2), pets.Recipe(DEPTH=2), total_steps=10)
    averaged, model = training.average.module, training.model
    with torch.no_grad():
        model.downs[0][1].running_mean.fill_(7)
        model.downs[0][1].weight.fill_(5)
    gathered = norm_statistics.with_statistics_of(averaged, model).downs[0][1]
    assert gathered.running_mean.eq(7).all()
    assert gathered.weight.eq(1).all()
    assert averaged.downs[0][1].running_mean.eq(0).all()
