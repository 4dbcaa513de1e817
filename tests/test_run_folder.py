"""The run folder: what is written whole or not at all, read back, and refused if it is damaged."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import petseg_utils
from conftest import new_run_folder
from petseg_utils import (
    CLASSES,
    InputError,
    Pets,
    UNet,
    load_weights,
    read_run,
    save_run,
    save_weights,
    scores,
)
from support.safe_files import write_atomically


def new_model(base_channels: int = 2, depth: int = 2, seed: int = 0, **switches) -> UNet:
    torch.manual_seed(seed)
    return UNet(base_channels, depth, **switches)


# ------------------------------------------------------------------- writing


def test_file_is_written_with_its_folder(tmp_path):
    write_atomically(tmp_path / "new" / "file", lambda file: file.write(b"whole"))
    assert (tmp_path / "new" / "file").read_bytes() == b"whole"


@pytest.mark.parametrize("step", ["write", "rename"])
def test_failed_write_keeps_the_former_file_and_leaves_no_draft(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(b"former")

    def fail(*_):
        raise OSError("no space left on device")

    def write(file):
        file.write(b"half")
        if step == "write":
            fail()

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises((OSError, InputError), match="no space left on device"):
        write_atomically(path, write)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"former"


def test_two_test_runs_at_once_have_a_folder_each():
    with new_run_folder() as one:
        with new_run_folder() as other:
            (one / "metrics.json").touch()
            assert not (other / "metrics.json").exists()
        assert (one / "metrics.json").exists()
    assert not one.exists()


# ------------------------------------------------------------------- a run

HISTORY = [
    {"epoch": 1, "train_loss": 1.5, "valid_mean_iou": 0.125, "seconds": 0.1},
    {"epoch": 2, "train_loss": 0.1, "valid_mean_iou": 1 / 3, "seconds": 0.1},
]


@pytest.fixture
def matrices() -> torch.Tensor:
    """Return confusion matrices of eight images, all of them different."""
    return torch.randint(1, 100, (8, 3, 3), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(pets, matrices, tmp_path) -> Path:
    """Return the folder of a run, saved."""
    two = Pets(pets.names[:2], pets.images[:2], pets.masks[:2])
    metrics = {"parameters": {"EPOCHS": 2}, "dataset": {"name": "sample"}}
    scored = {"valid": (two, matrices[:2]), "test": (pets, matrices)}
    save_run(tmp_path / "first", metrics, HISTORY, scored)
    return tmp_path / "first"


def test_run_reads_back_as_it_was_saved(saved, pets, matrices):
    run = read_run(saved)
    assert run["name"] == "first"
    assert run["parameters"] == {"EPOCHS": 2}
    assert run["history"] == HISTORY
    assert run["test"] == {**scores(matrices.sum(0)), "images": 8}
    assert run["valid"] == {**scores(matrices[:2].sum(0)), "images": 2}
    assert [(row["split"], row["name"]) for row in run["images"]] == [
        *(("valid", name) for name in pets.names[:2]),
        *(("test", name) for name in pets.names),
    ]


def test_counts_of_every_image_are_kept_by_true_and_predicted_class(saved, matrices):
    last = read_run(saved)["images"][-1]
    assert (last["name"], last["breed"]) == ("Bengal_3", "Bengal")
    counts = [[int(last[f"{true}_as_{predicted}"]) for predicted in CLASSES] for true in CLASSES]
    assert counts == matrices[-1].tolist()


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git on this machine")
def test_metrics_name_the_version_of_the_code_as_git_does(saved, tmp_path):
    """`git log --find-object` finds the commit that made a run: tried where there are two."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
        return done.stdout

    git("init", "--quiet")
    code = Path(petseg_utils.__file__).read_bytes()
    for name, content in (("the module", code), ("another", code + b"#")):
        (tmp_path / name).write_bytes(content)
        git("add", name)
        git("commit", "--quiet", "--message", name)
    version = read_run(saved)["versions"]["petseg_utils"]
    assert git("log", "--format=%s", f"--find-object={version}") == "the module\n"


def test_run_without_counts_of_images_is_read_too(saved):
    (saved / "images.csv").unlink()
    assert read_run(saved)["images"] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("metrics.json", None, id="no metrics"),
        pytest.param("metrics.json", b'{"parameters"', id="half of the metrics"),
        pytest.param("metrics.json", b"[1, 2]", id="a list"),
        pytest.param("metrics.json", b"\xff\xfe\xfa", id="no text"),
        pytest.param("history.csv", None, id="no history"),
        pytest.param("history.csv", b"epoch,seconds\n1,many\n", id="no number"),
        pytest.param("history.csv", b"epoch,seconds\n1\n", id="half of a row"),
        pytest.param("history.csv", b"epoch,seconds\n", id="no row"),
    ],
)
def test_folder_without_a_complete_run_is_told(saved, complains, name, content):
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with complains("no complete run", saved):
        read_run(saved)


def test_missing_folder_is_told(tmp_path, complains):
    with complains("no complete run", tmp_path / "run"):
        read_run(tmp_path / "run")


def test_metrics_are_written_last(saved, pets, matrices, monkeypatch):
    """They say that a run is complete, so one that fails before its end must not have them."""
    (saved / "metrics.json").unlink()
    monkeypatch.setattr("support.runs.write_csv", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_run(saved, {}, HISTORY, {"test": (pets, matrices)})
    assert not (saved / "metrics.json").exists()


# ------------------------------------------------------------------- weights


def test_kept_weights_predict_nearly_the_same_and_are_rounded_once(tmp_path):
    path, random = tmp_path / "run" / "weights.pt", torch.Generator().manual_seed(0)
    kept, again = new_model(base_channels=4), new_model(base_channels=4, seed=7)
    kept(torch.rand(4, 3, 16, 16, generator=random) * 2 - 1)  # for its BatchNorms to see images
    save_weights(path, kept)
    stored = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}
    load_weights(path, again)
    assert next(again.parameters()).dtype == torch.float32
    images = torch.rand(8, 3, 16, 16, generator=random) * 2 - 1
    with torch.no_grad():
        ours, theirs = (model.eval()(images).softmax(1) for model in (kept, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
    save_weights(path, again)  # what was rounded once is not rounded further
    stored_again = torch.load(path, weights_only=True)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in stored_again.items())


def test_kept_weights_too_large_for_float16_stay_as_they_are(tmp_path):
    model, again = new_model(), new_model(seed=1)
    variance = next(name for name in model.state_dict() if name.endswith("running_var"))
    model.state_dict()[variance].fill_(1e6)
    save_weights(tmp_path / "weights.pt", model)
    load_weights(tmp_path / "weights.pt", again)
    assert (again.state_dict()[variance] == 1e6).all()


def test_missing_weights_are_told(tmp_path, complains):
    with complains("no file", tmp_path / "weights.pt"):
        load_weights(tmp_path / "weights.pt", new_model())


@pytest.mark.parametrize("build", [{"base_channels": 3}, {"depth": 3}, {"norms": 1}], ids=str)
def test_weights_of_another_architecture_are_told(tmp_path, complains, build):
    save_weights(tmp_path / "weights.pt", new_model(**build))
    with complains(tmp_path / "weights.pt", "damaged", "another architecture"):
        load_weights(tmp_path / "weights.pt", new_model())
