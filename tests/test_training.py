"""The training section: the loss, the loop, its checkpoints, and prediction."""

import ctypes
import io
import math
import platform
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import petseg_utils
from petseg_utils import (
    IGNORE,
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
    scores,
    segmentation_loss,
    to_input,
    train,
)

RECIPE = Recipe(  # of 8 images: 2 steps an epoch
    IMAGE_SIZE=16,
    BASE_CHANNELS=2,
    DEPTH=2,
    EPOCHS=3,
    BATCH_SIZE=3,
    LEARNING_RATE=0.01,
    SEED=1,
    PRECISION="float32",
)
LEARNING = RECIPE.but(BASE_CHANNELS=4, EPOCHS=40, BATCH_SIZE=4, LEARNING_RATE=0.03, AUGMENT=0.0)
FLOAT32 = torch.float32


def new_model(recipe: Recipe = RECIPE, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(recipe.BASE_CHANNELS, recipe.DEPTH, norms=recipe.NORMS, skips=recipe.SKIPS)


def without_seconds(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def accuracy(model: nn.Module, pets: Pets) -> float:
    return scores(evaluate(model, pets, FLOAT32).sum(0))["pixel_accuracy"]


# ------------------------------------------------------------------- input and loss


def test_input_reaches_from_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    inputs = to_input(images, torch.device("cpu"))
    assert inputs.dtype == torch.float32
    assert inputs.flatten().tolist() == pytest.approx([-1, -0.6, 1])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (2, 3, 4, 6) and masks (2, 4, 6)."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 6, generator=random), torch.randint(3, (2, 4, 6), generator=random)


@pytest.mark.parametrize("dice_weight", [0.0, 0.5, 2.0])
def test_loss_is_what_a_hand_computes(batch, dice_weight):
    logits, masks = (tensor.double().numpy() for tensor in batch)
    likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    logs, overlaps, totals = [], np.zeros(3), np.zeros(3)
    for n, y, x in np.ndindex(masks.shape):
        label = int(masks[n, y, x])
        logs.append(np.log(likely[n, label, y, x]))
        overlaps[label] += likely[n, label, y, x]
        totals[label] += 1
        totals += likely[n, :, y, x]
    expected = -np.mean(logs) + dice_weight * (1 - np.mean((2 * overlaps + 1) / (totals + 1)))
    assert segmentation_loss(*batch, dice_weight).item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_nearly_zero_for_a_sure_and_right_prediction(batch):
    masks = batch[1]
    logits = F.one_hot(masks, 3).permute(0, 3, 1, 2) * 50.0
    assert segmentation_loss(logits, masks).item() == pytest.approx(0, abs=1e-5)


def test_ignored_pixels_have_no_influence_and_no_gradient(batch):
    logits, masks = batch
    half_known = masks.clone()
    half_known[..., 4:] = IGNORE
    logits.requires_grad_()
    loss = segmentation_loss(logits, half_known)
    loss.backward()
    cropped = segmentation_loss(logits[..., :4], masks[..., :4])
    assert loss.item() == pytest.approx(cropped.item(), rel=1e-6)
    assert logits.grad[..., 4:].abs().max() == 0
    assert logits.grad[..., :4].abs().min() > 0


# ------------------------------------------------------------------- the loop


def test_loss_falls_and_the_labels_are_learned(pets):
    model = new_model(LEARNING)
    history = train(model, pets, pets, LEARNING)
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 3
    assert accuracy(model, pets) > 0.9


def test_history_has_a_row_per_epoch_with_plain_numbers(pets):
    history = train(new_model(), pets, pets, RECIPE)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert list(row) == [
            "epoch",
            "train_loss",
            "valid_pixel_accuracy",
            "valid_mean_iou",
            "seconds",
        ]
        assert {type(value) for value in row.values()} == {int, float}
        assert row["train_loss"] > 0
        assert 0 <= row["valid_mean_iou"] <= row["valid_pixel_accuracy"] <= 1


def test_model_ends_with_the_weights_that_the_last_row_scored(pets):
    model = new_model()
    last = train(model, pets, pets, RECIPE.but(LEARNING_RATE=0.3))[-1]
    result = scores(evaluate(model, pets, FLOAT32).sum(0))
    assert (result["pixel_accuracy"], result["mean_iou"]) == (
        last["valid_pixel_accuracy"],
        last["valid_mean_iou"],
    )


@pytest.mark.parametrize("augment", [1.0, 0.0])
def test_same_seed_gives_the_same_result_and_another_does_not(pets, augment):
    runs = []
    for seed in (1, 1, 2):
        model = new_model()
        runs.append((model, train(model, pets, pets, RECIPE.but(SEED=seed, AUGMENT=augment))))
    (first, history), (again, history_again), (other, _) = runs
    assert without_seconds(history) == without_seconds(history_again)
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_augmentation_can_be_switched_off(pets, monkeypatch):
    called = []
    monkeypatch.setattr(
        petseg_utils, "augment", lambda *given: called.append(given[2]) or given[:2]
    )
    train(new_model(), pets, pets, RECIPE.but(AUGMENT=0.0))
    assert not called
    train(new_model(), pets, pets, RECIPE.but(AUGMENT=0.5))
    assert called == [0.5] * 6


def test_one_epoch_shows_every_image_once(pets, monkeypatch):
    seen = []
    monkeypatch.setattr(petseg_utils, "augment", lambda *given: seen.append(given[0]) or given[:2])
    train(new_model(), pets, pets, RECIPE.but(EPOCHS=1, BATCH_SIZE=2))
    shown = [bytes(image.contiguous().numpy()) for images in seen for image in images]
    assert sorted(shown) == sorted(bytes(image.numpy()) for image in pets.images)


def test_single_step_is_enough(pets):
    assert len(train(new_model(), pets, pets, RECIPE.but(EPOCHS=1, BATCH_SIZE=8))) == 1


def test_bfloat16_trains_and_leaves_the_weights_in_float32(pets):
    model = new_model()
    rounded = train(model, pets, pets, RECIPE.but(AUGMENT=0.0, PRECISION="bfloat16"))
    exact = train(new_model(), pets, pets, RECIPE.but(AUGMENT=0.0))
    assert {parameter.dtype for parameter in model.parameters()} == {FLOAT32}
    assert rounded[-1]["train_loss"] == pytest.approx(exact[-1]["train_loss"], rel=0.05)
    assert rounded[-1]["train_loss"] != exact[-1]["train_loss"]


def test_net_that_is_no_unet_can_be_trained_and_resumed(pets, tmp_path):
    """A peer from another library has no `base_channels`."""

    def new_peer(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)
        )

    peer, again = new_peer(0), new_peer(1)
    history = train(peer, pets, pets, RECIPE, tmp_path / "checkpoint.pt")
    assert train(again, pets, pets, RECIPE.but(RESUME=True), tmp_path / "checkpoint.pt") == history
    assert same_weights(peer, again)


def test_too_few_images_for_a_batch_are_told(pets, complains):
    with complains("8 training images", "BATCH_SIZE"):
        train(new_model(), pets, pets, RECIPE.but(BATCH_SIZE=9))


def test_training_that_diverges_is_told(pets, complains, monkeypatch):
    monkeypatch.setattr(
        petseg_utils, "segmentation_loss", lambda logits, *_: logits.sum() * math.nan
    )
    with complains("no longer a number", "LEARNING_RATE"):
        train(new_model(), pets, pets, RECIPE)


# ------------------------------------------------------------------- ingredients


def rates(pets, monkeypatch, recipe: Recipe) -> list[float]:
    """Train and return the learning rate of every step."""
    seen = []
    step = Muon.step
    monkeypatch.setattr(
        Muon, "step", lambda self: (seen.append(self.param_groups[0]["lr"]), step(self))
    )
    train(new_model(), pets, pets, recipe)
    return seen


def test_the_learning_rate_warms_up_over_a_tenth_of_the_steps_and_falls_straight_to_nothing(
    pets, monkeypatch
):
    seen = rates(pets, monkeypatch, RECIPE.but(EPOCHS=20))  # 40 steps
    shares = np.interp(np.arange(1, 41), [0, 4.1, 41], [0, 1, 0])
    assert seen == pytest.approx(RECIPE.LEARNING_RATE * shares)


def test_without_linear_decay_the_rate_is_constant(pets, monkeypatch):
    assert rates(pets, monkeypatch, RECIPE.but(LINEAR_DECAY=False)) == [RECIPE.LEARNING_RATE] * 6


def test_with_everything_switched_off_it_is_the_plainest_loop(pets):
    """The oracle is PyTorch's Adam, over the same batches, with cross-entropy alone."""
    plain = {
        "MUON": False,
        "LINEAR_DECAY": False,
        "WEIGHT_DECAY": 0.0,
        "DICE_WEIGHT": 0.0,
        "AVERAGE": False,
    }
    trained = new_model()
    train(trained, pets, pets, RECIPE.but(**plain, AUGMENT=0.0))

    model = new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE.LEARNING_RATE)
    for epoch in range(1, 4):
        torch.manual_seed(RECIPE.SEED * 100_003 + epoch)
        for batch in torch.randperm(8).split(3)[:2]:
            loss = F.cross_entropy(model(pets.images[batch] / 127.5 - 1), pets.masks[batch].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ours = dict(trained.named_parameters())
    for name, expected in model.named_parameters():
        # A bias before a BatchNorm has only noise for a gradient, which Adam blows up.
        if not name.endswith(("0.bias", "3.bias")):
            torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5)


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
    """The oracle averages in double precision, by the formula; after 890 steps a weight is forgotten by a hundredth."""
    training = Training.start(nn.Linear(1, 1), RECIPE.but(AVERAGE=average), total_steps=1000)
    expected = 0.0
    for step in range(1000):
        value = math.sin(step)
        nn.init.constant_(training.model.weight, value)
        training.average.update_parameters(training.model)
        decay = min(0.99, (1 + step) / (10 + step)) if average else 0
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert training.average.module.weight.item() == pytest.approx(expected, abs=1e-5)


def test_small_epochs_train_and_validate_at_smaller_sides(pets, monkeypatch):
    trained, scored = [], []
    epoch, score = petseg_utils.train_epoch, petseg_utils.evaluate
    monkeypatch.setattr(
        petseg_utils, "train_epoch", lambda t, p, *a: trained.append(p) or epoch(t, p, *a)
    )
    monkeypatch.setattr(
        petseg_utils, "evaluate", lambda m, p, *a, **k: scored.append(p) or score(m, p, *a, **k)
    )
    train(new_model(), pets, pets, RECIPE.but(EPOCHS=4, SMALL_EPOCHS="2 at 8, 1 at 12"))
    small = load_pets(pets.folder, pets.names, 8)
    assert torch.equal(trained[0].images, small.images)
    assert torch.equal(trained[0].masks, small.masks)
    assert (
        [p.images.shape[-1] for p in trained]
        == [p.images.shape[-1] for p in scored]
        == [8, 8, 12, 16]
    )
    assert trained[3] is pets
    assert all(torch.equal(p.masks, pets.masks) for p in scored)  # at the full side


def test_small_epochs_keep_the_mistake_of_mixing_labels(pets, monkeypatch):
    trained = []
    epoch = petseg_utils.train_epoch
    monkeypatch.setattr(
        petseg_utils, "train_epoch", lambda t, p, *a: trained.append(p) or epoch(t, p, *a)
    )
    train(new_model(), pets, pets, RECIPE.but(SMALL_EPOCHS="1 at 4", MASK_RESIZE="bilinear"))
    assert torch.equal(
        trained[0].masks, load_pets(pets.folder, pets.names, 4, resize="bilinear").masks
    )
    assert not torch.equal(trained[0].masks, load_pets(pets.folder, pets.names, 4).masks)


# ------------------------------------------------------------------- BatchNorm statistics


def stale_accuracy(model: UNet, checkpoint: Path, pets: Pets) -> float:
    """Score the averaged weights with the running statistics of the last weights, as a training leaves them."""
    average = AveragedModel(model)
    saved = torch.load(checkpoint, weights_only=True)
    average.load_state_dict(saved["average"])
    last = {name: tensor for name, tensor in saved["model"].items() if "running" in name}
    average.module.load_state_dict(average.module.state_dict() | last)
    return accuracy(average.module, pets)


def test_averaged_weights_are_validated_with_statistics_of_their_own(pets, tmp_path):
    """Early in a training those that were gathered on the way are of weights that are long gone."""
    recipe = LEARNING.but(EPOCHS=4, LEARNING_RATE=0.1, LINEAR_DECAY=False)
    model = new_model(recipe)
    history = train(model, pets, pets, recipe, tmp_path / "checkpoint.pt")
    fresh, stale = (
        history[-1]["valid_pixel_accuracy"],
        stale_accuracy(new_model(recipe), tmp_path / "checkpoint.pt", pets),
    )
    assert accuracy(model, pets) == fresh
    assert fresh > stale + 0.1


def test_statistics_are_those_of_the_training_images(pets):
    """The first BatchNorm's mean is what the first convolution gives for them, on average."""
    recipe = LEARNING.but(EPOCHS=2)
    model = new_model(recipe)
    train(model, pets, pets._replace(images=255 - pets.images), recipe)
    with torch.no_grad():
        expected = model.downs[0][0](to_input(pets.images, torch.device("cpu"))).mean(dim=(0, 2, 3))
    torch.testing.assert_close(model.downs[0][1].running_mean, expected, rtol=1e-4, atol=1e-5)


def test_one_image_more_than_fills_the_batches_is_no_trouble_at_the_smallest_side(pets):
    """At 8 pixels and depth 3 the bottleneck has one pixel: a batch of one image would have nothing to normalise."""
    recipe = RECIPE.but(IMAGE_SIZE=8, DEPTH=3, BATCH_SIZE=7)
    small = load_pets(pets.folder, pets.names, 8)  # eight images
    assert len(train(new_model(recipe), small, small, recipe)) == 3


# ------------------------------------------------------------------- memory


def resident() -> int:
    """Return how many bytes of this process are in memory (Linux only)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE


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

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
        self.sizes = {}
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {
            ref: size
            for ref, size in self.sizes.items()
            if ref not in self.given and not ref.expired()
        }
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def noise(images: int, side: int, mask_side: int) -> Pets:
    """Return so many images and masks of nothing but noise."""
    random = torch.Generator().manual_seed(0)
    photos = torch.randint(256, (images, 3, side, side), generator=random, dtype=torch.uint8)
    masks = torch.randint(3, (images, mask_side, mask_side), generator=random, dtype=torch.uint8)
    return Pets([f"pug_{i}" for i in range(images)], photos, masks)


def test_scoring_shows_one_bar_and_none_for_each_batch(monkeypatch):
    shown = io.StringIO()

    def impatient(*arguments: object, delay: float, **options: object) -> tqdm:
        return tqdm(
            *arguments, delay=delay * 1e-9, disable=False, mininterval=0, file=shown, **options
        )

    monkeypatch.setattr(petseg_utils, "tqdm", impatient)
    evaluate(new_model(), noise(40, 16, 16), FLOAT32)
    assert "score" in shown.getvalue()
    assert "predict" not in shown.getvalue()


def test_evaluation_takes_no_more_memory_for_more_images():
    peaks = []
    for images in (64, 320):
        pets = noise(images, side=16, mask_side=48)
        with PeakMemory(pets.images, pets.masks) as memory:
            evaluate(new_model(), pets, FLOAT32)
        peaks.append(memory.peak)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("flip", [True, False])
def test_prediction_holds_its_answers_once_beside_a_batch(flip):
    peaks = []
    for images in (64, 320):
        photos = noise(images, side=16, mask_side=8).images
        with PeakMemory(photos) as memory:
            answers = predict(new_model(), photos, FLOAT32, size=(48, 48), flip=flip)
        peaks.append(memory.peak - sum(answer.nbytes for answer in answers))
    assert peaks[1] < 1.1 * peaks[0]


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
    assert (
        continued[0]["seconds"] != history[0]["seconds"]
    )  # it did not read the other's checkpoint
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


def test_resuming_without_a_checkpoint_trains_anew(pets, tmp_path):
    anew, expected = new_model(), new_model()
    history = train(anew, pets, pets, RECIPE.but(RESUME=True), tmp_path / "checkpoint.pt")
    assert without_seconds(history) == without_seconds(train(expected, pets, pets, RECIPE))
    assert same_weights(anew, expected)
    assert (tmp_path / "checkpoint.pt").exists()


def test_training_afresh_puts_the_former_checkpoint_aside(pets, checkpoint):
    content = checkpoint.read_bytes()
    train(new_model(), pets, pets, RECIPE.but(SEED=2), checkpoint)
    assert checkpoint.with_name("checkpoint.old.pt").read_bytes() == content
    assert torch.load(checkpoint, weights_only=True)["recipe"]["SEED"] == 2


def test_longest_of_several_former_trainings_is_kept(pets, checkpoint):
    """Whoever forgets RESUME once, stops that, and forgets it again, still has the long training."""
    content, old = checkpoint.read_bytes(), checkpoint.with_name("checkpoint.old.pt")
    for epochs in (1, 2, 1):
        train(new_model(), pets, pets, RECIPE.but(EPOCHS=epochs), checkpoint)
        assert old.read_bytes() == content
    train(new_model(), pets, pets, RECIPE.but(EPOCHS=4), checkpoint)
    longer = checkpoint.read_bytes()
    train(new_model(), pets, pets, RECIPE, checkpoint)
    assert old.read_bytes() == longer


def test_interrupted_saving_keeps_the_former_checkpoint(pets, tmp_path, monkeypatch):
    save, path = torch.save, tmp_path / "checkpoint.pt"

    def save_once(content, file):
        if path.exists():
            file.write(b"half")
            raise OSError("no space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_once)
    with pytest.raises(OSError, match="no space left"):
        train(new_model(), pets, pets, RECIPE, path)
    assert len(torch.load(path, weights_only=True)["history"]) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint.pt"]


OTHERS = {
    "DATASET": "oxford",
    "IMAGE_SIZE": 32,
    "BASE_CHANNELS": 3,
    "EPOCHS": 6,
    "LEARNING_RATE": 0.02,
    "LIMIT": 50,
    "SCORE_SIZE": 16,
    "MASK_RESIZE": "bilinear",
    "DEPTH": 3,
    "NORMS": 1,
    "SKIPS": False,
    "SMALL_EPOCHS": "1 at 16",
    "BATCH_SIZE": 4,
    "MUON": False,
    "LINEAR_DECAY": False,
    "WEIGHT_DECAY": 0.0,
    "DICE_WEIGHT": 0.0,
    "AVERAGE": False,
    "AUGMENT": 0.0,
    "SEED": 2,
    "PRECISION": "bfloat16",
}
ELSEWHERE = {
    "DATA_DIR": "elsewhere",
    "DOWNLOAD": True,
    "DEVICE": "cpu",
    "PHOTO": "cat.jpg",
    "RUN_NAME": "other",
    "FLIP": True,
}


def test_every_parameter_is_in_one_of_the_two_lists():
    assert OTHERS.keys() | ELSEWHERE.keys() | {"RESUME"} == Recipe.model_fields.keys()


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_checkpoint_of_another_recipe_is_told(pets, checkpoint, complains, name, value):
    with complains(checkpoint, f"{name} {getattr(RECIPE, name)}, not {value}", "RESUME"):
        resume(pets, checkpoint, **{name: value})


def test_all_that_differs_is_named(pets, checkpoint, complains):
    with complains("SEED 1, not 5", "MUON True, not False", "DEPTH 2, not 3"):
        resume(pets, checkpoint, SEED=5, MUON=False, DEPTH=3)


@pytest.mark.parametrize(("name", "value"), ELSEWHERE.items())
def test_where_a_run_reads_computes_and_writes_does_not_matter(pets, checkpoint, name, value):
    assert len(resume(pets, checkpoint, **{name: value})) == 3


def test_checkpoint_of_another_net_is_told(pets, checkpoint, complains):
    with complains(checkpoint, "RESUME"):
        train(new_model(RECIPE.but(DEPTH=3)), pets, pets, RECIPE.but(RESUME=True), checkpoint)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("training masks", "sum of labels"),
        ("validation masks", "validation masks"),
        ("fewer images", "images"),
    ],
)
def test_checkpoint_of_other_data_is_told(pets, checkpoint, complains, what, words):
    finer = pets._replace(masks=pets.masks.repeat_interleave(2, 1).repeat_interleave(2, 2))
    fewer = Pets(pets.names[:6], pets.images[:6], pets.masks[:6])
    other = {
        "training masks": (pets._replace(masks=2 - pets.masks), pets),
        "validation masks": (pets, finer),
        "fewer images": (fewer, pets),
    }[what]
    with complains(checkpoint, words, "RESUME"):
        train(new_model(), *other, RECIPE.but(RESUME=True), checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("no checkpoint"), id="text"),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), id="half"
        ),
        pytest.param(lambda path: torch.save(new_model().state_dict(), path), id="weights only"),
        pytest.param(lambda path: torch.save(new_model(), path), id="pickled model"),
        pytest.param(
            lambda path: torch.save(torch.load(path, weights_only=True) | {"average": {}}, path),
            id="no average",
        ),
    ],
)
def test_damaged_checkpoint_is_told(pets, checkpoint, complains, damage):
    damage(checkpoint)
    with complains(checkpoint):
        resume(pets, checkpoint)


# ------------------------------------------------------------------- prediction


@pytest.fixture(scope="module")
def trained(pets, photos) -> UNet:
    """Return a model whose BatchNorm has seen images, so that eval mode differs from training mode."""
    recipe = LEARNING.but(EPOCHS=4)
    model = new_model(recipe)
    train(model, pets, pets, recipe)
    with torch.no_grad():  # so that it predicts all classes
        model.out.bias -= model.eval()(photos / 127.5 - 1).mean(dim=(0, 2, 3))
    assert predict(model, photos, FLOAT32)[0].unique().tolist() == [0, 1, 2]
    return model


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Return 70 random images (70, 3, 16, 16): two full batches and a smaller one."""
    coarse = torch.randint(
        256, (70, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return F.interpolate(coarse, scale_factor=4)


def test_prediction_is_the_most_probable_label_with_its_probability(trained, photos):
    labels, confidences = predict(trained, photos, FLOAT32)
    with torch.no_grad():
        expected = trained.eval()(photos / 127.5 - 1).softmax(dim=1)
    assert (labels.dtype, confidences.dtype) == (torch.uint8, torch.float32)
    assert labels.shape == confidences.shape == (70, 16, 16)
    torch.testing.assert_close(confidences, expected.amax(dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        expected.gather(1, labels.long().unsqueeze(1))[:, 0], confidences, rtol=0, atol=1e-5
    )


def test_prediction_does_not_depend_on_the_other_images(trained, photos):
    confidences = predict(trained, photos, FLOAT32)[1]
    for chosen in (slice(0, 1), slice(31, 33), slice(69, 70)):
        torch.testing.assert_close(
            predict(trained, photos[chosen], FLOAT32)[1], confidences[chosen], rtol=0, atol=1e-5
        )


def test_prediction_happens_in_eval_mode_and_leaves_the_weights(trained, photos):
    expected = predict(trained, photos, FLOAT32)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    again = predict(trained.train(), photos, FLOAT32)
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize("size", [(16, 16), (23, 9), (8, 40)])
def test_prediction_has_the_size_that_was_asked_for(trained, photos, size):
    labels, confidences = predict(trained, photos[:3], FLOAT32, size=size)
    with torch.no_grad():
        logits = trained.eval()(photos[:3] / 127.5 - 1)
    expected = F.interpolate(logits, size, mode="bilinear").softmax(dim=1).amax(dim=1)
    assert labels.shape == (3, *size)
    torch.testing.assert_close(confidences, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [None, (23, 9)])
def test_flip_predicts_the_mirrored_for_the_mirrored_image(trained, photos, size):
    labels, confidences = predict(trained, photos, FLOAT32, flip=True, size=size)
    of_mirrored = predict(trained, photos.flip(3), FLOAT32, flip=True, size=size)
    torch.testing.assert_close(of_mirrored[1].flip(2), confidences, rtol=0, atol=1e-5)
    assert (of_mirrored[0].flip(2) == labels).float().mean() > 0.999  # a tie may fall either way
    assert not torch.allclose(
        predict(trained, photos, FLOAT32, size=size)[1], confidences, rtol=0, atol=1e-3
    )


def test_flip_averages_probabilities(trained, photos):
    with torch.no_grad():
        straight, mirrored = (
            trained.eval()(images / 127.5 - 1).softmax(dim=1) for images in (photos, photos.flip(3))
        )
    expected = ((straight + mirrored.flip(3)) / 2).amax(dim=1)
    torch.testing.assert_close(
        predict(trained, photos, FLOAT32, flip=True)[1], expected, rtol=0, atol=1e-5
    )


def test_bfloat16_predicts_nearly_the_same(trained, photos):
    confidences = predict(trained, photos, FLOAT32)[1]
    rounded = predict(trained, photos, torch.bfloat16)[1]
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - confidences).abs().mean() < 0.02


def test_evaluation_counts_every_image_as_its_prediction_says(trained, pets):
    labels = predict(trained, pets.images, FLOAT32, flip=True)[0]
    matrices = evaluate(trained, pets, FLOAT32, flip=True)
    assert (matrices.dtype, matrices.shape) == (torch.int64, (8, 3, 3))
    for matrix, label, mask in zip(matrices, labels, pets.masks, strict=True):
        assert torch.equal(matrix, confusion_matrix(label, mask))
    assert matrices.sum() == pets.masks.numel()


def test_evaluation_brings_logits_to_the_side_of_the_masks(trained, photos):
    random = torch.Generator().manual_seed(0)
    finer = Pets(
        [f"pug_{i}" for i in range(8)],
        photos[:8],
        torch.randint(3, (8, 48, 48), generator=random).byte(),
    )
    with torch.no_grad():
        logits = trained.eval()(finer.images / 127.5 - 1)
    matrices = {}
    for mode in ("bilinear", "nearest"):
        labels = F.interpolate(logits, (48, 48), mode=mode).argmax(dim=1).byte()
        matrices[mode] = confusion_matrix(labels, finer.masks)
    result = evaluate(trained, finer, FLOAT32).sum(0)
    assert (result - matrices["bilinear"]).abs().sum() <= 4  # a tie may fall either way
    assert (result - matrices["nearest"]).abs().sum() > 40
