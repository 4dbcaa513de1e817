"""The training section: the loop, its checkpoints, and prediction, beyond what the rubric asks."""

import ctypes
import io
import math
import platform
from collections.abc import Callable, Sequence
from copy import deepcopy
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import petseg_utils
from petseg_utils import (
    Muon,
    Pets,
    Recipe,
    Training,
    UNet,
    confusion_matrix,
    evaluate,
    keep_freed_memory,
    load_pets,
    predict,
    segmentation_loss,
    to_input,
    train,
)

RECIPE = Recipe(  # of 8 images: 2 steps an epoch
    IMAGE_SIZE=16, BASE_CHANNELS=2, DEPTH=2, EPOCHS=3, BATCH_SIZE=3,
    LEARNING_RATE=0.01, SEED=1, PRECISION="float32",
)  # fmt: skip
LEARNING = RECIPE.but(BASE_CHANNELS=4, EPOCHS=4, BATCH_SIZE=4, LEARNING_RATE=0.03, AUGMENT=0.0)
FLOAT32 = torch.float32


def new_model(recipe: Recipe = RECIPE, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(recipe.BASE_CHANNELS, recipe.DEPTH, norms=recipe.NORMS, skips=recipe.SKIPS)


def without_seconds(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return same_state(one.state_dict(), other.state_dict())


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


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


def test_loss_that_is_no_number_ends_the_training_with_its_epoch(pets, complains, monkeypatch):
    losses = []

    def lost(logits: Tensor, *_: object) -> Tensor:
        losses.append(logits.sum() * math.nan)
        return losses[-1]

    monkeypatch.setattr(petseg_utils, "segmentation_loss", lost)
    with complains("no longer a number", "LEARNING_RATE"):
        train(new_model(), pets, pets, RECIPE)
    assert len(losses) == 2  # the steps of one epoch


def test_no_two_epochs_draw_the_same_whatever_their_seeds(pets, monkeypatch):
    drawn = set()
    epoch = petseg_utils.train_epoch

    def noted(*given: object) -> float:
        drawn.add(torch.initial_seed())
        return epoch(*given)

    monkeypatch.setattr(petseg_utils, "train_epoch", noted)
    for seed in (1, 2):
        train(new_model(), pets, pets, RECIPE.but(SEED=seed))
    assert len(drawn) == 6


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


@pytest.mark.parametrize(
    "change", [{"MUON": False}, {"WEIGHT_DECAY": 0.5}, {"DICE_WEIGHT": 0.0}, {"AVERAGE": False}]
)
def test_every_ingredient_makes_a_difference(pets, change):
    models = [new_model(), new_model()]
    for model, recipe in zip(models, (RECIPE, RECIPE.but(**change)), strict=True):
        train(model, pets, pets, recipe)
    assert not same_weights(*models)


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


def given_pets(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Pets]:
    """Return a list that gets the second argument of every call of the module's function `name`."""
    seen, function = [], getattr(petseg_utils, name)

    def noted(first: object, pets: Pets, *others: object, **options: object) -> object:
        seen.append(pets)
        return function(first, pets, *others, **options)

    monkeypatch.setattr(petseg_utils, name, noted)
    return seen


@pytest.mark.parametrize("resize", ["nearest", "bilinear"])
def test_small_epochs_train_at_smaller_sides_and_are_scored_at_the_full_one(
    pets, monkeypatch, resize
):
    trained, scored = (given_pets(monkeypatch, name) for name in ("train_epoch", "evaluate"))
    recipe = RECIPE.but(EPOCHS=4, SMALL_EPOCHS="2 at 4, 1 at 12", MASK_RESIZE=resize)
    train(new_model(), pets, pets, recipe)
    small = load_pets(pets.folder, pets.names, 4, resize=resize)
    assert torch.equal(trained[0].images, small.images)
    assert torch.equal(trained[0].masks, small.masks)
    assert trained[3] is pets
    for seen in (trained, scored):
        assert [some.images.shape[-1] for some in seen] == [4, 4, 12, 16]
    assert all(torch.equal(some.masks, pets.masks) for some in scored)


def test_norms_have_statistics_of_the_training_images_under_the_averaged_weights(pets):
    """The first BatchNorm's mean is what the first convolution gives for them, on average."""
    model = new_model(LEARNING)
    train(model, pets, pets._replace(images=255 - pets.images), LEARNING)
    with torch.no_grad():
        expected = model.downs[0][0](to_input(pets.images, torch.device("cpu"))).mean(dim=(0, 2, 3))
    torch.testing.assert_close(model.downs[0][1].running_mean, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------- memory


def resident() -> int:
    """Return how many bytes of this process are in memory (Linux only)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * PAGESIZE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it speaks to glibc alone")
def test_freed_memory_is_kept():
    keep_freed_memory()
    large = torch.ones(2**24)  # 64 MiB, which glibc would map and unmap by itself
    before = resident()
    del large
    assert before - resident() < 2**24


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


# ------------------------------------------------------------------- checkpoints


def interrupted(pets: Pets, recipe: Recipe, path: Path, monkeypatch, step: int) -> None:
    """Train until a step fails, counted from 1, as a power cut would."""
    steps = iter(range(1, step))

    def fail_at_step(*args):
        if next(steps, None) is None:
            raise ConnectionError("pulled the plug")
        return segmentation_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(petseg_utils, "segmentation_loss", fail_at_step)
        with pytest.raises(ConnectionError):
            train(new_model(), pets, pets, recipe, path)


@pytest.mark.parametrize(
    ("change", "step"),
    [
        *(({}, step) for step in (3, 4, 5, 6)),
        ({"SMALL_EPOCHS": "1 at 8"}, 3),
        ({"SMALL_EPOCHS": "1 at 8, 1 at 12"}, 3),
        ({"SMALL_EPOCHS": "1 at 8, 1 at 12"}, 5),
        ({"LINEAR_DECAY": False, "AVERAGE": False, "WEIGHT_DECAY": 0.0}, 4),
        ({"MUON": False}, 5),
    ],
)
def test_resumed_equals_uninterrupted(pets, tmp_path, monkeypatch, change, step):
    recipe, whole = RECIPE.but(**change), new_model()
    history = train(whole, pets, pets, recipe, tmp_path / "whole.pt")
    interrupted(pets, recipe, tmp_path / "part.pt", monkeypatch, step)
    resumed = new_model(seed=99)  # its own weights must not matter
    torch.manual_seed(1234)  # nor where the random generator stands
    continued = train(resumed, pets, pets, recipe.but(RESUME=True), tmp_path / "part.pt")
    assert without_seconds(continued) == without_seconds(history)
    assert continued[0]["seconds"] != history[0]["seconds"]  # it read its own checkpoint
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


def test_finished_training_is_not_trained_further(pets, checkpoint, monkeypatch):
    content = checkpoint.read_bytes()
    finished, resumed = new_model(), new_model(seed=99)
    history = train(finished, pets, pets, RECIPE)
    monkeypatch.delattr(petseg_utils, "segmentation_loss")  # a single step would fail
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


@pytest.mark.parametrize(
    "what", ["sum of labels", "validation masks", "images", "no checkpoint of this net"]
)
def test_checkpoint_of_other_data_or_another_net_is_told(pets, checkpoint, complains, what):
    model, seen, held_out = new_model(), pets, pets
    if what == "sum of labels":
        seen = pets._replace(masks=2 - pets.masks)
    elif what == "validation masks":
        held_out = pets._replace(masks=pets.masks.repeat(1, 2, 2))
    elif what == "images":
        seen = Pets(pets.names[:6], pets.images[:6], pets.masks[:6])
    else:
        model = new_model(RECIPE.but(DEPTH=3))
    with complains(checkpoint, what, "RESUME"):
        train(model, seen, held_out, RECIPE.but(RESUME=True), checkpoint)


# ------------------------------------------------------------------- prediction


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Return 70 random images (70, 3, 16, 16): two full batches and a smaller one."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (70, 3, 4, 4), generator=random, dtype=torch.uint8)
    return F.interpolate(coarse, scale_factor=4)


@pytest.fixture(scope="module")
def trained(pets, photos) -> UNet:
    """Return a model that predicts all classes, and whose BatchNorms have seen images."""
    model = new_model(LEARNING)
    train(model, pets, pets, LEARNING)
    with torch.no_grad():
        model.out.bias -= model.eval()(photos / 127.5 - 1).mean(dim=(0, 2, 3))
    assert predict(model, photos, FLOAT32)[0].unique().tolist() == [0, 1, 2]
    return model


@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
@pytest.mark.parametrize("size", [None, (23, 9), (8, 40)])
def test_prediction_is_what_the_net_computes_in_evaluation_mode(trained, photos, size, flip):
    before = deepcopy(trained.state_dict())
    labels, confidences = predict(trained.train(), photos, FLOAT32, size=size, flip=flip)

    def probabilities(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = trained.eval()(images / 127.5 - 1)
        return F.interpolate(logits, size or (16, 16), mode="bilinear").softmax(dim=1)

    expected = probabilities(photos)
    if flip:
        expected = (expected + probabilities(photos.flip(3)).flip(3)) / 2
    assert (labels.dtype, confidences.dtype) == (torch.uint8, torch.float32)
    assert_close(confidences, expected.amax(dim=1))
    assert_close(expected.gather(1, labels.long().unsqueeze(1))[:, 0], confidences)
    assert same_state(trained.state_dict(), before)


def test_bfloat16_predicts_nearly_the_same(trained, photos):
    confidences = predict(trained, photos, FLOAT32)[1]
    rounded = predict(trained, photos, torch.bfloat16)[1]
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - confidences).abs().mean() < 0.02


@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
def test_evaluation_counts_what_is_predicted_at_the_side_of_the_masks(trained, photos, flip):
    pets = noise(len(photos), mask_side=24)._replace(images=photos)
    labels = predict(trained, photos, FLOAT32, size=(24, 24), flip=flip)[0]
    matrices = evaluate(trained, pets, FLOAT32, flip=flip)
    assert (matrices.dtype, matrices.shape) == (torch.int64, (70, 3, 3))
    for matrix, label, mask in zip(matrices, labels, pets.masks, strict=True):
        assert torch.equal(matrix, confusion_matrix(label, mask))
