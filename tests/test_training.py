"""The training section: the loop, its checkpoints, and prediction, beyond what the rubric asks."""

import ctypes
import io
import math
import platform
from copy import deepcopy
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from drawn import at_step, pull_the_plug
from tiny import TINY, new_net
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import petseg_utils
from conftest import same_weights
from petseg_utils import Muon, Pets, Recipe, Training, evaluate, predict, train

RECIPE = TINY.but(SEED=1)  # of 8 images: 2 steps an epoch
FLOAT32 = torch.float32


def without_seconds(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


# ------------------------------------------------------------------- the loop


def test_training_in_bfloat16_leaves_the_weights_in_float32(pets):
    model = new_net()
    train(model, pets, pets, RECIPE.but(PRECISION="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {FLOAT32}


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
    model = new_net()
    torch.nn.init.constant_(model.out.bias, math.nan)
    at_step(model, 2, pull_the_plug)  # a step of the second epoch would fail otherwise
    with complains("no longer a number", "LEARNING_RATE"):
        train(model, pets, pets, RECIPE)


# ------------------------------------------------------------------- ingredients


def test_rate_rises_over_a_tenth_of_the_steps_and_falls_straight_to_nothing(pets, monkeypatch):
    seen = []
    monkeypatch.setattr(Muon, "step", lambda muon: seen.append(muon.param_groups[0]["lr"]))
    train(new_net(), pets, pets, RECIPE.but(EPOCHS=20))  # 40 steps
    shares = np.interp(np.arange(1, 41), [0, 4.1, 41], [0, 1, 0])
    assert seen == pytest.approx(RECIPE.LEARNING_RATE * shares)


def test_moving_average_forgets_a_hundredth_in_the_end():
    """From step 890 on; what it forgets before, the rubric's tests compare with the formula."""
    training = Training.start(nn.Linear(1, 1), RECIPE, total_steps=1000)
    averages = []
    for step in range(1000):
        nn.init.constant_(training.model.weight, float(step == 900))
        training.average.update_parameters(training.model)
        averages.append(training.average.module.weight.item())
    assert averages[900:] == pytest.approx(0.01 * 0.99 ** np.arange(100), rel=1e-3)


# ------------------------------------------------------------------- memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it speaks to glibc alone")
def test_freed_memory_is_kept():
    petseg_utils.keep_freed_memory()
    large = torch.ones(2**24)  # 64 MiB, which glibc would map and unmap by itself
    place = large.data_ptr()
    del large
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split("\n")[:-1]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert any(low <= place < high for low, high in ranges)


@pytest.mark.parametrize("library", [{"side_effect": OSError}, {"return_value": 0}], ids=str)
def test_keeping_freed_memory_is_harmless_without_glibc(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", Mock(**library))
    petseg_utils.keep_freed_memory()


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
def test_more_images_take_no_more_memory_than_their_answers(work):
    peaks = []
    for images in (64, 320):
        pets = noise(images, mask_side=48)
        with PeakMemory(pets.images, pets.masks) as memory:
            answers = work(new_net(), pets)
        peaks.append(memory.peak - sum(answer.nbytes for answer in answers))
    assert peaks[1] < 1.1 * peaks[0]


def test_scoring_shows_one_bar_and_none_for_each_batch(monkeypatch):
    shown = io.StringIO()
    eager = {"disable": False, "mininterval": 0, "file": shown}

    def impatient(*arguments: object, delay: float, **options: object) -> tqdm:
        return tqdm(*arguments, delay=delay * 1e-9, **options, **eager)

    monkeypatch.setattr(petseg_utils, "tqdm", impatient)
    evaluate(new_net(), noise(40, mask_side=16), FLOAT32)
    assert "score" in shown.getvalue()
    assert "predict" not in shown.getvalue()


# ------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("change", "step"), [
    ({"SMALL_EPOCHS": "1 at 8"}, 2), ({"SMALL_EPOCHS": "1 at 8, 1 at 12"}, 4),
    ({"LINEAR_DECAY": False, "AVERAGE": False, "WEIGHT_DECAY": 0.0}, 3), ({"MUON": False}, 4),
])  # fmt: skip
def test_resumed_equals_uninterrupted(pets, tmp_path, change, step):
    """Whatever the recipe; it is cut off at a step of two in each of three epochs."""
    recipe, whole, part = RECIPE.but(**change), new_net(), new_net()
    history = train(whole, pets, pets, recipe)
    at_step(part, step, pull_the_plug)
    with pytest.raises(ConnectionError):
        train(part, pets, pets, recipe, tmp_path / "part.pt")
    resumed = new_net(seed=99)  # its own weights must not matter
    torch.manual_seed(1234)  # nor where the random generator stands
    continued = train(resumed, pets, pets, recipe.but(RESUME=True), tmp_path / "part.pt")
    assert without_seconds(continued) == without_seconds(history)
    assert same_weights(resumed, whole)


@pytest.fixture
def checkpoint(pets, tmp_path) -> Path:
    """Return the checkpoint of a finished training with `RECIPE`."""
    train(new_net(), pets, pets, RECIPE, tmp_path / "run" / "checkpoint.pt")
    return tmp_path / "run" / "checkpoint.pt"


def resume(pets: Pets, checkpoint: Path, **changes) -> list[dict]:
    """Go on from a checkpoint with another recipe, and the net that belongs to it."""
    recipe = RECIPE.but(RESUME=True, **changes)
    return train(new_net(recipe), pets, pets, recipe, checkpoint)


def test_finished_training_is_not_trained_further(pets, checkpoint):
    content = checkpoint.read_bytes()
    finished, resumed = new_net(), new_net(seed=99)
    history = train(finished, pets, pets, RECIPE)
    at_step(resumed, 0, pull_the_plug)  # a single step would fail
    again = train(resumed, pets, pets, RECIPE.but(RESUME=True), checkpoint)
    assert without_seconds(again) == without_seconds(history)
    assert same_weights(resumed, finished)
    assert checkpoint.read_bytes() == content


def test_training_afresh_puts_the_longest_former_one_aside(pets, checkpoint):
    """Whoever forgets RESUME, stops that, and forgets it again, still has the long training."""
    content, old = checkpoint.read_bytes(), checkpoint.with_name("checkpoint.old.pt")
    for epochs in (1, 2, 1, 4):
        train(new_net(), pets, pets, RECIPE.but(EPOCHS=epochs), checkpoint)
        assert old.read_bytes() == content
    longer = checkpoint.read_bytes()
    train(new_net(), pets, pets, RECIPE.but(SEED=2), checkpoint)
    assert old.read_bytes() == longer
    assert torch.load(checkpoint, weights_only=True)["recipe"]["SEED"] == 2


OTHERS = {
    "DATASET": "oxford", "IMAGE_SIZE": 32, "BASE_CHANNELS": 3, "EPOCHS": 6, "LEARNING_RATE": 0.02,
    "LIMIT": 50, "HOLD_OUT": 0.2, "SCORE_SIZE": 16, "MASK_RESIZE": "bilinear", "DEPTH": 3,
    "NORMS": 1, "SKIPS": False, "SMALL_EPOCHS": "1 at 16", "BATCH_SIZE": 4, "MUON": False,
    "LINEAR_DECAY": False, "WEIGHT_DECAY": 0.0, "DICE_WEIGHT": 0.0, "AVERAGE": False,
    "AUGMENT": 0.0, "SEED": 2, "PRECISION": "bfloat16",
}  # fmt: skip
ELSEWHERE = {
    "DATA_DIR": "elsewhere", "DOWNLOAD": True, "DEVICE": "cpu", "PHOTO": "cat.jpg",
    "RUN_NAME": "other", "FLIP": True,
}  # fmt: skip


def test_every_parameter_is_in_one_of_the_two_lists():
    assert OTHERS.keys() | ELSEWHERE.keys() | {"RESUME"} == Recipe.model_fields.keys()


@pytest.mark.parametrize("names", [*OTHERS, "SEED MUON DEPTH"])
def test_checkpoint_of_another_recipe_tells_all_that_differs(pets, checkpoint, complains, names):
    changes = {name: OTHERS[name] for name in names.split()}
    told = [f"{name} {getattr(RECIPE, name)}, not {value}" for name, value in changes.items()]
    with complains(checkpoint, *told, "RESUME"):
        resume(pets, checkpoint, **changes)


def test_where_a_run_reads_computes_and_writes_does_not_matter(pets, checkpoint):
    assert len(resume(pets, checkpoint, **ELSEWHERE)) == 3


OTHERS_GIVEN = {  # what differs, by the words of the sentence
    "sum of labels": lambda pets: {"train_pets": pets._replace(masks=2 - pets.masks)},
    "validation masks": lambda pets: {"valid_pets": pets._replace(masks=pets.masks[:, ::2, ::2])},
    "images": lambda pets: {"train_pets": Pets(*(part[:6] for part in pets[:3]))},
    "no checkpoint of this net": lambda pets: {"model": new_net(RECIPE.but(DEPTH=3))},
}


@pytest.mark.parametrize("what", OTHERS_GIVEN)
def test_checkpoint_of_other_data_or_another_net_is_told(pets, checkpoint, complains, what):
    given = {"model": new_net(), "train_pets": pets, "valid_pets": pets, "checkpoint": checkpoint}
    with complains(checkpoint, what, "RESUME"):
        train(recipe=RECIPE.but(RESUME=True), **given | OTHERS_GIVEN[what](pets))
