"""The training section: the loop, its checkpoints, and prediction, beyond what the rubric asks."""

import ctypes
import io
import math
import platform
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import petseg_utils
from conftest import at_step, same_weights
from petseg_utils import (
    Muon,
    Pets,
    Recipe,
    Training,
    UNet,
    evaluate,
    keep_freed_memory,
    load_pets,
    predict,
    train,
)

RECIPE = Recipe(  # of 8 images: 2 steps an epoch
    IMAGE_SIZE=16, BASE_CHANNELS=2, DEPTH=2, EPOCHS=3, BATCH_SIZE=3,
    LEARNING_RATE=0.01, SEED=1, PRECISION="float32",
)  # fmt: skip
FLOAT32 = torch.float32


def new_model(recipe: Recipe = RECIPE, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(recipe.BASE_CHANNELS, recipe.DEPTH, norms=recipe.NORMS, skips=recipe.SKIPS)


def without_seconds(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def cut() -> None:
    raise ConnectionError("pulled the plug")


# ------------------------------------------------------------------- the loop


def test_history_has_a_row_per_epoch_with_plain_numbers(pets):
    history = train(new_model(), pets, pets, RECIPE)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    columns = ["epoch", "train_loss", "valid_pixel_accuracy", "valid_mean_iou", "seconds"]
    for row in history:
        assert list(row) == columns
        assert {type(value) for value in row.values()} == {int, float}
        assert row["train_loss"] > 0
        assert 0 <= row["valid_mean_iou"] <= row["valid_pixel_accuracy"] <= 1
        assert row["seconds"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"EPOCHS": 1, "BATCH_SIZE": 8}, id="a single step"),
        # The bottleneck has one pixel: a batch of one image would have nothing to normalise.
        pytest.param({"IMAGE_SIZE": 8, "DEPTH": 3, "BATCH_SIZE": 7}, id="an image left over"),
    ],
)
def test_smallest_training_goes_through(pets, changes):
    recipe = RECIPE.but(**changes)
    small = load_pets(pets.folder, pets.names, recipe.IMAGE_SIZE)
    assert len(train(new_model(recipe), small, small, recipe)) == recipe.EPOCHS


def test_bfloat16_trains_and_leaves_the_weights_in_float32(pets):
    model = new_model()
    rounded = train(model, pets, pets, RECIPE.but(AUGMENT=0.0, PRECISION="bfloat16"))
    exact = train(new_model(), pets, pets, RECIPE.but(AUGMENT=0.0))
    assert {parameter.dtype for parameter in model.parameters()} == {FLOAT32}
    assert rounded[-1]["train_loss"] == pytest.approx(exact[-1]["train_loss"], rel=0.05)
    assert rounded[-1]["train_loss"] != exact[-1]["train_loss"]


def test_net_that_is_no_unet_can_be_trained_and_resumed(pets, tmp_path):
    """A peer from another library has no `base_channels`."""
    path = tmp_path / "checkpoint.pt"
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)
    peer = nn.Sequential(*layers)
    again = deepcopy(peer)
    history = train(peer, pets, pets, RECIPE, path)
    assert train(again, pets, pets, RECIPE.but(RESUME=True), path) == history
    assert same_weights(peer, again)


def test_loss_that_is_no_number_ends_the_training_with_its_epoch(pets, complains):
    model = new_model()
    torch.nn.init.constant_(model.out.bias, math.nan)
    at_step(model, 2, cut)  # a step of the second epoch would fail otherwise
    with complains("no longer a number", "LEARNING_RATE"):
        train(model, pets, pets, RECIPE)


# ------------------------------------------------------------------- ingredients


def test_rate_rises_over_a_tenth_of_the_steps_and_falls_straight_to_nothing(pets, monkeypatch):
    seen, step = [], Muon.step

    def noted(self: Muon) -> None:
        seen.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(Muon, "step", noted)
    train(new_model(), pets, pets, RECIPE.but(EPOCHS=20))  # 40 steps
    shares = np.interp(np.arange(1, 41), [0, 4.1, 41], [0, 1, 0])
    assert seen == pytest.approx(RECIPE.LEARNING_RATE * shares)


@pytest.mark.parametrize("average", [True, False])
def test_moving_average_forgets_less_and_less(average):
    """The oracle is the formula in double precision; from step 890 on each forgets a hundredth."""
    training = Training.start(nn.Linear(1, 1), RECIPE.but(AVERAGE=average), total_steps=1000)
    expected = 0.0
    for step in range(1000):
        value = math.sin(step)
        nn.init.constant_(training.model.weight, value)
        training.average.update_parameters(training.model)
        decay = min(0.99, (1 + step) / (10 + step)) if average else 0
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert training.average.module.weight.item() == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------- memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it speaks to glibc alone")
def test_freed_memory_is_kept():
    keep_freed_memory()
    large = torch.ones(2**24)  # 64 MiB, which glibc would map and unmap by itself
    place = large.data_ptr()
    del large
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split("\n")[:-1]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert any(low <= place < high for low, high in ranges)


@pytest.mark.parametrize("library", [OSError, object], ids=["no library", "no mallopt"])
def test_keeping_freed_memory_is_harmless_without_glibc(monkeypatch, library):
    def load(name):
        if library is OSError:
            raise OSError(name)
        return library()

    monkeypatch.setattr(ctypes, "CDLL", load)
    keep_freed_memory()


class PeakMemory(TorchDispatchMode):
    """Notes how many bytes of tensors were alive at once, at most, beside those that were given."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
        self.sizes = {}
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        for ref in [ref for ref in self.sizes if ref in self.given or ref.expired()]:
            del self.sizes[ref]
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def noise(images: int, mask_side: int) -> Pets:
    """Return so many images of 16 x 16 pixels, and masks, of nothing but noise."""
    random = torch.Generator().manual_seed(0)
    photos = torch.randint(256, (images, 3, 16, 16), generator=random, dtype=torch.uint8)
    masks = torch.randint(3, (images, mask_side, mask_side), generator=random, dtype=torch.uint8)
    return Pets([f"pug_{i}" for i in range(images)], photos, masks)


WORK = {
    "score": lambda model, pets: [evaluate(model, pets, FLOAT32)],
    "predict": lambda model, pets: predict(model, pets.images, FLOAT32, size=(48, 48)),
    "flip": lambda model, pets: predict(model, pets.images, FLOAT32, size=(48, 48), flip=True),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_more_images_take_no_more_memory_than_their_answers(
    work: Callable[[nn.Module, Pets], Sequence[Tensor]],
):
    peaks = []
    for images in (64, 320):
        pets = noise(images, mask_side=48)
        with PeakMemory(pets.images, pets.masks) as memory:
            answers = work(new_model(), pets)
        peaks.append(memory.peak - sum(answer.nbytes for answer in answers))
    assert peaks[1] < 1.1 * peaks[0]


def test_scoring_shows_one_bar_and_none_for_each_batch(monkeypatch):
    shown = io.StringIO()
    eager = {"disable": False, "mininterval": 0, "file": shown}

    def impatient(*arguments: object, delay: float, **options: object) -> tqdm:
        return tqdm(*arguments, delay=delay * 1e-9, **options, **eager)

    monkeypatch.setattr(petseg_utils, "tqdm", impatient)
    evaluate(new_model(), noise(40, mask_side=16), FLOAT32)
    assert "score" in shown.getvalue()
    assert "predict" not in shown.getvalue()


def test_probabilities_computed_in_bfloat16_are_float32_again():
    pets = noise(2, mask_side=16)
    assert predict(new_model(), pets.images, torch.bfloat16)[1].dtype == FLOAT32


# ------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("change", "step"),  # at which it is cut off, counted from 0: of two in each of three epochs
    [
        ({}, 5),
        ({"SMALL_EPOCHS": "1 at 8"}, 2),
        ({"SMALL_EPOCHS": "1 at 8, 1 at 12"}, 4),
        ({"LINEAR_DECAY": False, "AVERAGE": False, "WEIGHT_DECAY": 0.0}, 3),
        ({"MUON": False}, 4),
    ],
)
def test_resumed_equals_uninterrupted(pets, tmp_path, change, step):
    recipe, whole, part = RECIPE.but(**change), new_model(), new_model()
    history = train(whole, pets, pets, recipe)
    at_step(part, step, cut)
    with pytest.raises(ConnectionError):
        train(part, pets, pets, recipe, tmp_path / "part.pt")
    resumed = new_model(seed=99)  # its own weights must not matter
    torch.manual_seed(1234)  # nor where the random generator stands
    continued = train(resumed, pets, pets, recipe.but(RESUME=True), tmp_path / "part.pt")
    assert without_seconds(continued) == without_seconds(history)
    assert same_weights(resumed, whole)


@pytest.fixture
def checkpoint(pets, tmp_path) -> Path:
    """Return the checkpoint of a finished training with `RECIPE`."""
    train(new_model(), pets, pets, RECIPE, tmp_path / "run" / "checkpoint.pt")
    return tmp_path / "run" / "checkpoint.pt"


def resume(pets: Pets, checkpoint: Path, **changes) -> list[dict]:
    """Go on from a checkpoint with another recipe, and the net that belongs to it."""
    recipe = RECIPE.but(RESUME=True, **changes)
    return train(new_model(recipe), pets, pets, recipe, checkpoint)


def test_finished_training_is_not_trained_further(pets, checkpoint):
    content = checkpoint.read_bytes()
    finished, resumed = new_model(), new_model(seed=99)
    history = train(finished, pets, pets, RECIPE)
    at_step(resumed, 0, cut)  # a single step would fail
    again = train(resumed, pets, pets, RECIPE.but(RESUME=True), checkpoint)
    assert without_seconds(again) == without_seconds(history)
    assert same_weights(resumed, finished)
    assert checkpoint.read_bytes() == content


def test_checkpoint_lies_alone_and_records_what_was_trained_without_code(pets, checkpoint):
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    saved = torch.load(checkpoint, weights_only=True)
    assert [row["epoch"] for row in saved["history"]] == [1, 2, 3]
    assert saved["recipe"].items() >= RECIPE.model_dump(exclude=Recipe.PLACES | {"FLIP"}).items()
    assert list(pets.images.shape) in saved["recipe"].values()


def test_training_afresh_puts_the_longest_former_one_aside(pets, checkpoint):
    """Whoever forgets RESUME, stops that, and forgets it again, still has the long training."""
    content, old = checkpoint.read_bytes(), checkpoint.with_name("checkpoint.old.pt")
    for epochs in (1, 2, 1, 4):
        train(new_model(), pets, pets, RECIPE.but(EPOCHS=epochs), checkpoint)
        assert old.read_bytes() == content
    longer = checkpoint.read_bytes()
    train(new_model(), pets, pets, RECIPE.but(SEED=2), checkpoint)
    assert old.read_bytes() == longer
    assert torch.load(checkpoint, weights_only=True)["recipe"]["SEED"] == 2


OTHERS = {
    "DATASET": "oxford", "IMAGE_SIZE": 32, "BASE_CHANNELS": 3, "EPOCHS": 6, "LEARNING_RATE": 0.02,
    "LIMIT": 50, "SCORE_SIZE": 16, "MASK_RESIZE": "bilinear", "DEPTH": 3, "NORMS": 1,
    "SKIPS": False, "SMALL_EPOCHS": "1 at 16", "BATCH_SIZE": 4, "MUON": False,
    "LINEAR_DECAY": False, "WEIGHT_DECAY": 0.0, "DICE_WEIGHT": 0.0, "AVERAGE": False,
    "AUGMENT": 0.0, "SEED": 2, "PRECISION": "bfloat16",
}  # fmt: skip
ELSEWHERE = {
    "DATA_DIR": "elsewhere", "DOWNLOAD": True, "DEVICE": "cpu", "PHOTO": "cat.jpg",
    "RUN_NAME": "other", "FLIP": True,
}  # fmt: skip


def test_every_parameter_is_in_one_of_the_two_lists():
    assert OTHERS.keys() | ELSEWHERE.keys() | {"RESUME"} == Recipe.model_fields.keys()


@pytest.mark.parametrize(
    "changes",
    [*({name: value} for name, value in OTHERS.items()), {"SEED": 5, "MUON": False, "DEPTH": 3}],
    ids=lambda changes: " ".join(changes),
)
def test_checkpoint_of_another_recipe_is_told_with_all_that_differs(
    pets, checkpoint, complains, changes
):
    told = [f"{name} {getattr(RECIPE, name)}, not {value}" for name, value in changes.items()]
    with complains(checkpoint, *told, "RESUME"):
        resume(pets, checkpoint, **changes)


def test_where_a_run_reads_computes_and_writes_does_not_matter(pets, checkpoint):
    assert len(resume(pets, checkpoint, **ELSEWHERE)) == 3


OTHERS_GIVEN = {  # what differs, by the words of the sentence
    "sum of labels": lambda pets: {"train_pets": pets._replace(masks=2 - pets.masks)},
    "validation masks": lambda pets: {"valid_pets": pets._replace(masks=pets.masks[:, ::2, ::2])},
    "images": lambda pets: {"train_pets": Pets(*(part[:6] for part in pets[:3]))},
    "no checkpoint of this net": lambda pets: {"model": new_model(RECIPE.but(DEPTH=3))},
}


@pytest.mark.parametrize("what", OTHERS_GIVEN)
def test_checkpoint_of_other_data_or_another_net_is_told(pets, checkpoint, complains, what):
    given = {"model": new_model(), "train_pets": pets, "valid_pets": pets, "checkpoint": checkpoint}
    with complains(checkpoint, what, "RESUME"):
        train(recipe=RECIPE.but(RESUME=True), **given | OTHERS_GIVEN[what](pets))
