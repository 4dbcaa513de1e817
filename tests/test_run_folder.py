"""The run folder: what is written whole or not at all, read back, and refused if it is damaged."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from course_unet import UNet as CourseUNet
from tiny import TINY, new_net
from torch import nn

import petseg_utils
from conftest import alike
from petseg_utils import Pets, UNet, load_weights, read_run, save_run, save_weights, scores

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
    places = [("valid", name) for name in pets.names[:2]] + [("test", name) for name in pets.names]
    assert [(row["split"], row["name"]) for row in run["images"]] == places
    assert run["images"][-1]["breed"] == "Bengal"


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git on this machine")
def test_metrics_name_the_version_of_the_code_as_git_does(saved):
    """So `git log --find-object` finds the commit that made a run."""
    ask = ["git", "hash-object", "--no-filters", petseg_utils.__file__]
    told = subprocess.check_output(ask, text=True).strip()
    assert read_run(saved)["versions"]["petseg_utils"] == told


def test_run_without_counts_of_images_is_read_too(saved):
    (saved / "images.csv").unlink()
    assert read_run(saved)["images"] == []


@pytest.mark.parametrize(("name", "content"), [
    ("", None), ("metrics.json", None), ("history.csv", None),
    ("metrics.json", b'{"parameters"'), ("metrics.json", b"[1, 2]"),
    ("metrics.json", b"\xff\xfe\xfa"), ("history.csv", b"epoch,seconds\n1,many\n"),
    ("history.csv", b"epoch,seconds\n1\n"), ("history.csv", b"epoch,seconds\n"),
], ids=str)  # fmt: skip
def test_folder_without_a_complete_run_is_told(saved, complains, name, content):
    if content is not None:
        (saved / name).write_bytes(content)
    elif name:
        (saved / name).unlink()
    else:
        shutil.rmtree(saved)
    with complains("no complete run", saved):
        read_run(saved)


def test_metrics_are_written_last(saved, pets, matrices, monkeypatch):
    """They say that a run is complete, so one that fails before its end must not have them."""
    (saved / "metrics.json").unlink()
    monkeypatch.setattr("support.runs.write_csv", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_run(saved, {}, HISTORY, {"test": (pets, matrices)})
    assert not (saved / "metrics.json").exists()


def test_kept_weights_are_rounded_once_and_predict_nearly_the_same(tmp_path):
    path = tmp_path / "run" / "weights.pt"
    wider = TINY.but(BASE_CHANNELS=4)
    kept, again = new_net(wider), new_net(wider, seed=7)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    kept(images)  # for its BatchNorms to see some
    save_weights(path, kept)
    stored = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}
    load_weights(path, again)
    assert next(again.parameters()).dtype == torch.float32
    with torch.no_grad():
        ours, theirs = (model.eval()(images).softmax(1) for model in (kept, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
    save_weights(path, again)  # what was rounded once is not rounded further
    assert alike(torch.load(path, weights_only=True), stored)


def test_kept_weights_too_large_for_float16_stay_as_they_are(tmp_path):
    model, again = new_net(), new_net(seed=1)
    variance = next(name for name in model.state_dict() if name.endswith("running_var"))
    model.state_dict()[variance].fill_(1e6)
    save_weights(tmp_path / "weights.pt", model)
    load_weights(tmp_path / "weights.pt", again)
    assert (again.state_dict()[variance] == 1e6).all()


def test_missing_weights_are_told(tmp_path, complains):
    with complains("no file", tmp_path / "weights.pt"):
        load_weights(tmp_path / "weights.pt", new_net())


@pytest.mark.parametrize("change", [{"BASE_CHANNELS": 3}, {"DEPTH": 3}, {"NORMS": 1}], ids=str)
def test_weights_of_another_architecture_are_told(tmp_path, complains, change):
    save_weights(tmp_path / "weights.pt", new_net(TINY.but(**change)))
    with complains(tmp_path / "weights.pt", "damaged", "another architecture"):
        load_weights(tmp_path / "weights.pt", new_net())


def test_weights_are_loaded_into_a_net_with_other_names_which_gives_the_same(tmp_path):
    ours, theirs = UNet(2, 3).eval(), CourseUNet(2, 3).eval()
    save_weights(tmp_path / "weights.pt", ours)
    for net in (ours, theirs):
        load_weights(tmp_path / "weights.pt", net)
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(ours(images), theirs(images))


class Scaled(nn.Module):
    """A net that holds a tensor itself, beside its parts."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        setattr(self, part, nn.Conv2d(3, 3, 1))

    def forward(self, x):
        return self.scale * next(self.children())(x)


def test_tensors_of_the_net_itself_have_names_too(tmp_path):
    ours, theirs = Scaled("out"), Scaled("last")
    save_weights(tmp_path / "weights.pt", ours)
    for net in (ours, theirs):
        load_weights(tmp_path / "weights.pt", net)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
