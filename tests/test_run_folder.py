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
    {
        "epoch": 1,
        "train_loss": 1.5,
        "valid_pixel_accuracy": 0.25,
        "valid_mean_iou": 0.125,
        "seconds": 0.1,
    },
    {
        "epoch": 2,
        "train_loss": 0.1,
        "valid_pixel_accuracy": 1 / 3,
        "valid_mean_iou": 0.2,
        "seconds": 0.1,
    },
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
    save_run(
        tmp_path / "first",
        metrics,
        HISTORY,
        {"valid": (two, matrices[:2]), "test": (pets, matrices)},
    )
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


def test_metrics_name_the_version_of_the_code_as_git_does(saved, tmp_path):
    """The commit that made a run is found by `git log --find-object`: tried in a repository that has two."""
    if not shutil.which("git"):
        pytest.skip("there is no git on this machine")

    def git(*arguments: str) -> str:
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            *arguments,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    for subject in ("the module", "another"):
        name = "module.py" if subject == "the module" else "other.py"
        (tmp_path / name).write_bytes(
            Path(petseg_utils.__file__).read_bytes() + b"#" * (subject == "another")
        )
        git("add", name)
        git("commit", "--quiet", "--message", subject)
    version = read_run(saved)["versions"]["petseg_utils"]
    assert git("log", "--format=%s", f"--find-object={version}") == "the module\n"


def test_run_without_counts_of_images_is_read_too(saved):
    (saved / "images.csv").unlink()
    assert read_run(saved)["images"] == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda run: shutil.rmtree(run), id="no folder"),
        pytest.param(lambda run: (run / "metrics.json").unlink(), id="no metrics"),
        pytest.param(
            lambda run: (run / "metrics.json").write_text('{"parameters"'), id="half of the metrics"
        ),
        pytest.param(lambda run: (run / "metrics.json").write_text("[1, 2]"), id="a list"),
        pytest.param(lambda run: (run / "metrics.json").write_bytes(b"\xff\xfe\xfa"), id="no text"),
        pytest.param(lambda run: (run / "history.csv").unlink(), id="no history"),
        pytest.param(
            lambda run: (run / "history.csv").write_text("epoch,seconds\n1,many\n"), id="no number"
        ),
        pytest.param(
            lambda run: (run / "history.csv").write_text("epoch,seconds\n1\n"), id="half of a row"
        ),
    ],
)
def test_folder_without_a_complete_run_is_told(saved, complains, damage):
    damage(saved)
    with complains("no complete run", saved):
        read_run(saved)


def test_metrics_are_written_last(saved, pets, matrices, monkeypatch):
    """Their being there says that a run is complete: so a run that fails before its end must not have them."""
    (saved / "metrics.json").unlink()
    monkeypatch.setattr("support.runs.write_csv", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_run(saved, {}, HISTORY, {"test": (pets, matrices)})
    assert not (saved / "metrics.json").exists()


# ------------------------------------------------------------------- weights


@pytest.fixture
def trained() -> UNet:
    """Return a model whose BatchNorms have seen images."""
    model = new_model(base_channels=4)
    model(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    return model.eval()


def test_kept_weights_predict_nearly_the_same_and_are_rounded_once(trained, tmp_path):
    path = tmp_path / "run" / "weights.pt"
    save_weights(path, trained)
    stored = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}
    again = new_model(base_channels=4, seed=7).eval()
    load_weights(path, again)
    assert next(again.parameters()).dtype == torch.float32
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        ours, theirs = trained(images).softmax(1), again(images).softmax(1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
    save_weights(path, again)  # what was rounded once is not rounded further
    assert all(
        torch.equal(tensor, stored[name])
        for name, tensor in torch.load(path, weights_only=True).items()
    )


def test_kept_weights_take_two_bytes_each(tmp_path):
    model = new_model(base_channels=16, depth=3)
    save_weights(tmp_path / "weights.pt", model)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert 2 <= (tmp_path / "weights.pt").stat().st_size / number < 2.2


def test_kept_weights_too_large_for_float16_stay_as_they_are(tmp_path):
    model, again = new_model(), new_model(seed=1)
    variance = next(name for name in model.state_dict() if name.endswith("running_var"))
    model.state_dict()[variance].fill_(1e6)
    save_weights(tmp_path / "weights.pt", model)
    load_weights(tmp_path / "weights.pt", again)
    assert (again.state_dict()[variance] == 1e6).all()


def test_loading_weights_runs_no_code(tmp_path, complains):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    torch.save(new_model().state_dict() | {"out.bias": Code()}, tmp_path / "weights.pt")
    with complains(tmp_path / "weights.pt", "damaged"):
        load_weights(tmp_path / "weights.pt", new_model())
    assert not (tmp_path / "was here").exists()


def test_missing_weights_are_told(tmp_path, complains):
    with complains("no file", tmp_path / "weights.pt"):
        load_weights(tmp_path / "weights.pt", new_model())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("no weights"), id="text"),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), id="half"
        ),
        pytest.param(lambda path: torch.save(new_model(), path), id="pickled model"),
        pytest.param(lambda path: torch.save([1, 2], path), id="list"),
        pytest.param(
            lambda path: save_weights(path, new_model(base_channels=3)), id="other channels"
        ),
        pytest.param(lambda path: save_weights(path, new_model(depth=3)), id="other depth"),
        pytest.param(lambda path: save_weights(path, new_model(norms=1)), id="other norms"),
    ],
)
def test_damaged_and_foreign_weights_are_told(tmp_path, complains, damage):
    path = tmp_path / "weights.pt"
    save_weights(path, new_model())
    damage(path)
    with complains(path, "damaged"):
        load_weights(path, new_model())
