"""The training section: the loss, the loop, its checkpoints, and prediction."""

import math
import platform
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import petseg_utils
from petseg_utils import (
    IGNORE,
    Muon,
    Pets,
    UNet,
    confusion_matrix,
    evaluate,
    half_size,
    keep_freed_memory,
    load_weights,
    moving_average,
    orthogonalize,
    predict,
    save_weights,
    scores,
    segmentation_loss,
    to_input,
    train,
)

RECIPE = {"epochs": 3, "batch_size": 3, "learning_rate": 0.01, "seed": 1}  # 8 images: 2 steps an epoch


def new_model(base_channels: int = 2, depth: int = 1, seed: int = 0, **switches) -> UNet:
    torch.manual_seed(seed)
    return UNet(base_channels, depth, **switches)


def without_seconds(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def same_weights(one: UNet, other: UNet) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


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


@pytest.mark.parametrize(("updates", "decay"), [(1, 2 / 11), (10, 11 / 20), (890, 0.99), (10**6, 0.99)])
def test_moving_average_forgets_less_and_less(updates, decay):
    average, current = torch.tensor([1.0, 5.0]), torch.tensor([3.0, 5.0])
    expected = pytest.approx([1 + (1 - decay) * 2, 5.0])
    assert moving_average(average, current, updates).tolist() == expected
    assert moving_average(average, current, torch.tensor(updates)).tolist() == expected


def test_moving_average_of_counters_is_the_latest():
    assert moving_average(torch.tensor(3), torch.tensor(4), 50).item() == 4


# ------------------------------------------------------------------- the loop


def test_loss_falls_and_the_labels_are_learned(pets):
    model = new_model(base_channels=4)
    history = train(model, pets, pets, epochs=40, batch_size=4, learning_rate=0.03, augmented=False)
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 3
    assert scores(evaluate(model, pets))["pixel_accuracy"] > 0.9


def test_history_has_a_row_per_epoch_with_plain_numbers(pets):
    history = train(new_model(), pets, pets, **RECIPE)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert list(row) == ["epoch", "train_loss", "valid_pixel_accuracy", "valid_mean_iou", "seconds"]
        assert {type(value) for value in row.values()} == {int, float}
        assert row["train_loss"] > 0 and 0 <= row["valid_mean_iou"] <= row["valid_pixel_accuracy"] <= 1


def test_model_ends_with_the_weights_that_the_last_row_scored(pets):
    model = new_model()
    last = train(model, pets, pets, **RECIPE | {"learning_rate": 0.3})[-1]
    result = scores(evaluate(model, pets))
    assert (result["pixel_accuracy"], result["mean_iou"]) == (
        last["valid_pixel_accuracy"],
        last["valid_mean_iou"],
    )


@pytest.mark.parametrize("augmented", [True, False])
def test_same_seed_gives_the_same_result_and_another_does_not(pets, augmented):
    runs = []
    for seed in (1, 1, 2):
        model = new_model()
        runs.append((model, train(model, pets, pets, **RECIPE | {"seed": seed}, augmented=augmented)))
    (first, history), (again, history_again), (other, _) = runs
    assert without_seconds(history) == without_seconds(history_again)
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_augmentation_can_be_switched_off(pets, monkeypatch):
    called = []
    monkeypatch.setattr(petseg_utils, "augment", lambda *pair: called.append(pair) or pair)
    train(new_model(), pets, pets, **RECIPE, augmented=False)
    assert not called
    train(new_model(), pets, pets, **RECIPE)
    assert len(called) == 6


def test_one_epoch_shows_every_image_once(pets, monkeypatch):
    seen = []
    monkeypatch.setattr(petseg_utils, "augment", lambda *pair: seen.append(pair[0]) or pair)
    train(new_model(), pets, pets, **RECIPE | {"epochs": 1, "batch_size": 2})
    shown = {bytes(image.contiguous().numpy()) for images in seen for image in images}
    assert shown == {bytes(image.numpy()) for image in pets.images}


def test_single_step_is_enough(pets):
    assert len(train(new_model(), pets, pets, epochs=1, batch_size=8, learning_rate=0.01)) == 1


def test_bfloat16_trains_and_leaves_the_weights_in_float32(pets):
    model = new_model()
    history = train(model, pets, pets, **RECIPE, augmented=False, precision=torch.bfloat16)
    exact = train(new_model(), pets, pets, **RECIPE, augmented=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert history[-1]["train_loss"] == pytest.approx(exact[-1]["train_loss"], rel=0.05)
    assert history[-1]["train_loss"] != exact[-1]["train_loss"]


def test_too_few_images_for_a_batch_are_told(pets, complains):
    with complains("8 training images", "BATCH_SIZE"):
        train(new_model(), pets, pets, **RECIPE | {"batch_size": 9})


# ------------------------------------------------------------------- ingredients


def rates(pets, monkeypatch, **recipe) -> list[float]:
    """Train and return the learning rate of every step."""
    seen = []
    step = Muon.step
    monkeypatch.setattr(Muon, "step", lambda self: (seen.append(self.param_groups[0]["lr"]), step(self)))
    train(new_model(), pets, pets, **RECIPE, **recipe)
    return seen


def test_one_cycle_rises_to_the_learning_rate_and_sinks_to_almost_nothing(pets, monkeypatch):
    seen = rates(pets, monkeypatch)
    top = seen.index(max(seen))
    assert len(seen) == 6 and 0 < top < 3
    assert seen[: top + 1] == sorted(seen[: top + 1]) and seen[top:] == sorted(seen[top:], reverse=True)
    assert seen[-1] < 0.001 * RECIPE["learning_rate"]


def test_without_one_cycle_the_rate_is_constant(pets, monkeypatch):
    assert rates(pets, monkeypatch, one_cycle=False) == [RECIPE["learning_rate"]] * 6


def test_with_everything_switched_off_it_is_the_plainest_loop(pets):
    """The oracle is PyTorch's Adam, over the same batches, with cross-entropy alone."""
    plain = {"muon": False, "one_cycle": False, "weight_decay": 0.0, "dice_weight": 0.0, "averaged": False}
    trained = new_model()
    train(trained, pets, pets, **RECIPE, **plain, augmented=False)

    model = new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE["learning_rate"])
    for epoch in range(1, 4):
        torch.manual_seed(RECIPE["seed"] * 100_003 + epoch)
        for batch in torch.randperm(8).split(3)[:2]:
            loss = F.cross_entropy(model(pets.images[batch] / 127.5 - 1), pets.masks[batch].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weights = trained.state_dict()
    for name, expected in model.state_dict().items():
        # A bias before a BatchNorm has only noise for a gradient, which Adam blows up, and the mean moves along.
        if not name.endswith(("0.bias", "3.bias", "running_mean")):
            torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)], ids=["wide", "tall"])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape):
    """The oracle is PyTorch's singular value decomposition."""
    torch.manual_seed(0)
    u, values, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.1, 5, len(values))
    levelled = u.T @ orthogonalize(u * values @ v) @ v.T
    assert levelled.diagonal().min() > 0.6 and levelled.diagonal().max() < 1.3
    assert (levelled - levelled.diagonal().diag()).abs().max() < 1e-3


def test_muon_steps_as_pytorchs_own_does_on_the_flattened_kernel():
    """PyTorch's Muon takes matrices only, and computes in bfloat16: hence the tolerance."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(32, 16, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    start = matrix.detach().clone()
    ours = Muon([kernel], lr=0.01, weight_decay=0.5)
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1)
        ours.step()
        theirs.step()
    difference = kernel.detach().flatten(1) - matrix.detach()
    assert difference.norm() < 0.03 * (matrix.detach() - start).norm()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_muon_moves_a_vector_as_far_whatever_its_gradients_scale(scale):
    vector = nn.Parameter(torch.zeros(100))
    vector.grad = scale * torch.linspace(-1, 1, 100)
    Muon([vector], lr=0.01, weight_decay=0.0).step()
    assert 0.6 < vector.detach().square().mean().sqrt() / (0.2 * 0.01) < 1.3
    assert torch.equal(vector.sign(), -vector.grad.sign())


@pytest.mark.parametrize(
    "change", [{"muon": False}, {"weight_decay": 0.5}, {"dice_weight": 0.0}, {"averaged": False}], ids=str
)
def test_every_ingredient_makes_a_difference(pets, change):
    models = [new_model(), new_model()]
    for model, recipe in zip(models, ({}, change), strict=True):
        train(model, pets, pets, **RECIPE, **recipe)
    assert not same_weights(*models)


def test_small_epochs_train_and_validate_at_half_the_side(pets, monkeypatch):
    sides = {"train": [], "valid": []}
    epoch, score = petseg_utils.train_epoch, petseg_utils.evaluate
    monkeypatch.setattr(petseg_utils, "train_epoch", lambda p, *a, **k: sides["train"].append(p) or epoch(p, *a, **k))
    monkeypatch.setattr(petseg_utils, "evaluate", lambda m, p, **k: sides["valid"].append(p) or score(m, p, **k))
    train(new_model(), pets, pets, **RECIPE, small_epochs=2)
    small, whole = sides["train"][0], sides["train"][2]
    assert torch.equal(small.images, half_size(pets.images))
    assert torch.equal(small.masks, pets.masks[:, ::2, ::2])
    assert [p.images.shape[-1] for p in sides["train"]] == [p.images.shape[-1] for p in sides["valid"]] == [8, 8, 16]
    assert whole is pets
    assert all(torch.equal(p.masks, pets.masks) for p in sides["valid"])  # scored at the full side


@pytest.mark.parametrize(
    "ingredients",
    [{"small_epochs": 1}, {"small_epochs": 2}, {"one_cycle": False, "averaged": False, "weight_decay": 0.0}],
    ids=str,
)
def test_resuming_with_other_ingredients_equals_uninterrupted(pets, tmp_path, monkeypatch, ingredients):
    whole, resumed = new_model(), new_model(seed=99)
    history = train(whole, pets, pets, **RECIPE, **ingredients)
    epoch, epochs = petseg_utils.train_epoch, iter(range(1))

    def fail_in_the_second(*args, **named):
        next(epochs)  # StopIteration stands for any crash
        return epoch(*args, **named)

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(petseg_utils, "train_epoch", fail_in_the_second)
        train(new_model(), pets, pets, **RECIPE, **ingredients, checkpoint=tmp_path / "c.pt")
    continued = train(resumed, pets, pets, **RECIPE, **ingredients, checkpoint=tmp_path / "c.pt", resume=True)
    assert without_seconds(continued) == without_seconds(history)
    assert same_weights(resumed, whole)


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

    monkeypatch.setattr(petseg_utils.ctypes, "CDLL", load)
    keep_freed_memory()


# ------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("step", [3, 4, 5, 6], ids="fails at step {}".format)
def test_resumed_equals_uninterrupted(pets, tmp_path, monkeypatch, step):
    whole = new_model()
    history = train(whole, pets, pets, **RECIPE, checkpoint=tmp_path / "whole.pt")

    steps = iter(range(1, step))

    def fail_at_step(*args):
        if next(steps, None) is None:
            raise ConnectionError("pulled the plug")
        return segmentation_loss(*args)

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(petseg_utils, "segmentation_loss", fail_at_step)
        train(new_model(), pets, pets, **RECIPE, checkpoint=tmp_path / "part.pt")

    resumed = new_model(seed=99)  # its own weights must not matter
    torch.manual_seed(1234)  # nor where the random generator stands
    continued = train(resumed, pets, pets, **RECIPE, checkpoint=tmp_path / "part.pt", resume=True)
    assert without_seconds(continued) == without_seconds(history)
    assert continued[0]["seconds"] != history[0]["seconds"]  # it did not read the other's checkpoint
    assert same_weights(resumed, whole)


@pytest.fixture
def checkpoint(pets, tmp_path) -> Path:
    """Return the checkpoint of a finished training with `RECIPE`."""
    train(new_model(), pets, pets, **RECIPE, checkpoint=tmp_path / "run" / "checkpoint.pt")
    return tmp_path / "run" / "checkpoint.pt"


def test_finished_training_is_not_trained_further(pets, checkpoint, monkeypatch):
    content = checkpoint.read_bytes()
    finished = new_model()
    history = train(finished, pets, pets, **RECIPE)
    monkeypatch.delattr(petseg_utils, "segmentation_loss")  # a single step would fail
    resumed = new_model(seed=99)
    assert without_seconds(train(resumed, pets, pets, **RECIPE, checkpoint=checkpoint, resume=True)) == without_seconds(
        history
    )
    assert same_weights(resumed, finished)
    assert checkpoint.read_bytes() == content


def test_checkpoint_lies_alone_and_loads_without_unpickling_code(checkpoint):
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    saved = torch.load(checkpoint, weights_only=True)
    assert len(saved["history"]) == RECIPE["epochs"]
    assert saved["recipe"].items() >= (RECIPE | {"base_channels": 2, "depth": 1}).items()


def test_training_afresh_puts_the_former_checkpoint_aside(pets, checkpoint):
    content = checkpoint.read_bytes()
    train(new_model(), pets, pets, **RECIPE | {"seed": 2}, checkpoint=checkpoint)
    assert checkpoint.with_name("checkpoint.old.pt").read_bytes() == content
    assert torch.load(checkpoint, weights_only=True)["recipe"]["seed"] == 2


def test_interrupted_saving_keeps_the_former_checkpoint(pets, tmp_path, monkeypatch):
    save, path = torch.save, tmp_path / "checkpoint.pt"

    def save_once(content, file):
        if path.exists():
            file.write(b"half")
            raise OSError("no space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_once)
    with pytest.raises(OSError, match="no space left"):
        train(new_model(), pets, pets, **RECIPE, checkpoint=path)
    assert len(torch.load(path, weights_only=True)["history"]) == 1


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"base_channels": 3}, "base_channels 2, not 3"),
        ({"depth": 2}, "depth 1, not 2"),
        ({"norms": 1}, "norms 2, not 1"),
        ({"skips": False}, "skips True, not False"),
    ],
)
def test_checkpoint_of_another_architecture_is_told(pets, checkpoint, complains, model, words):
    with complains(checkpoint, words, "RESUME"):
        train(new_model(**model), pets, pets, **RECIPE, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("name", RECIPE)
def test_checkpoint_of_another_recipe_is_told(pets, checkpoint, complains, name):
    recipe = RECIPE | {name: RECIPE[name] * 2}
    with complains(checkpoint, f"{name} {RECIPE[name]}, not {recipe[name]}", "RESUME"):
        train(new_model(), pets, pets, **recipe, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize(
    "other",
    [
        {"muon": False},
        {"small_epochs": 1},
        {"one_cycle": False},
        {"weight_decay": 0.0},
        {"dice_weight": 0.0},
        {"averaged": False},
        {"augmented": False},
        {"precision": torch.bfloat16},
    ],
    ids=str,
)
def test_checkpoint_of_other_ingredients_is_told(pets, checkpoint, complains, other):
    (name,) = other
    with complains(checkpoint, name, f"not {other[name]}", "RESUME"):
        train(new_model(), pets, pets, **RECIPE, **other, checkpoint=checkpoint, resume=True)


def test_training_that_diverges_is_told(pets, complains, monkeypatch):
    monkeypatch.setattr(petseg_utils, "segmentation_loss", lambda logits, *_: logits.sum() * math.nan)
    with complains("not a number", "LEARNING_RATE"):
        train(new_model(), pets, pets, **RECIPE)


def test_muon_leaves_a_parameter_without_gradient_alone():
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    used.sum().backward()
    Muon([used, unused], lr=0.1).step()
    assert unused.eq(1).all() and not used.eq(1).any()


def test_checkpoint_of_other_masks_is_told(pets, checkpoint, complains):
    with complains(checkpoint, "sum of labels", "RESUME"):
        train(new_model(), pets._replace(masks=2 - pets.masks), pets, **RECIPE, checkpoint=checkpoint, resume=True)


def test_checkpoint_of_other_validation_masks_is_told(pets, checkpoint, complains):
    finer = pets._replace(masks=pets.masks.repeat_interleave(2, 1).repeat_interleave(2, 2))
    with complains(checkpoint, "validation masks", "RESUME"):
        train(new_model(), pets, finer, **RECIPE, checkpoint=checkpoint, resume=True)


def test_checkpoint_of_other_images_is_told(pets, checkpoint, complains):
    fewer = Pets(pets.names[:6], pets.images[:6], pets.masks[:6])
    with complains(checkpoint, "images", "RESUME"):
        train(new_model(), fewer, pets, **RECIPE, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("no checkpoint"), id="text"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), id="half"),
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
    with complains(checkpoint, "RESUME"):
        train(new_model(), pets, pets, **RECIPE, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("path", [None, Path("nowhere") / "checkpoint.pt"])
def test_missing_checkpoint_is_told(pets, complains, path):
    with complains("no checkpoint", path, "RESUME"):
        train(new_model(), pets, pets, **RECIPE, checkpoint=path, resume=True)


# ------------------------------------------------------------------- prediction


@pytest.fixture(scope="module")
def trained(pets, photos) -> UNet:
    """Return a model whose BatchNorm has seen images, so that eval mode differs from training mode."""
    model = new_model(base_channels=4, depth=2)
    train(model, pets, pets, epochs=4, batch_size=4, learning_rate=0.02, augmented=False)
    with torch.no_grad():  # so that it predicts all classes
        model.out.bias -= model.eval()(photos / 127.5 - 1).mean(dim=(0, 2, 3))
    assert predict(model, photos)[0].unique().tolist() == [0, 1, 2]
    return model


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Return 70 random images (70, 3, 16, 16): two full batches and a smaller one."""
    coarse = torch.randint(256, (70, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return F.interpolate(coarse, scale_factor=4)


def test_prediction_is_the_most_probable_label_with_its_probability(trained, photos):
    labels, confidences = predict(trained, photos)
    with torch.no_grad():
        expected = trained.eval()(photos / 127.5 - 1).softmax(dim=1)
    assert (labels.dtype, confidences.dtype) == (torch.uint8, torch.float32)
    assert labels.shape == confidences.shape == (70, 16, 16)
    torch.testing.assert_close(confidences, expected.amax(dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(expected.gather(1, labels.long().unsqueeze(1))[:, 0], confidences, rtol=0, atol=1e-5)


def test_prediction_does_not_depend_on_the_other_images(trained, photos):
    confidences = predict(trained, photos)[1]
    for chosen in (slice(0, 1), slice(31, 33), slice(69, 70)):
        torch.testing.assert_close(predict(trained, photos[chosen])[1], confidences[chosen], rtol=0, atol=1e-5)


def test_prediction_happens_in_eval_mode_and_leaves_the_weights(trained, photos):
    expected = predict(trained, photos)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    again = predict(trained.train(), photos)
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize("size", [(16, 16), (23, 9), (8, 40)])
def test_prediction_has_the_size_that_was_asked_for(trained, photos, size):
    labels, confidences = predict(trained, photos[:3], size=size)
    with torch.no_grad():
        logits = trained.eval()(photos[:3] / 127.5 - 1)
    expected = F.interpolate(logits, size, mode="bilinear").softmax(dim=1).amax(dim=1)
    assert labels.shape == (3, *size)
    torch.testing.assert_close(confidences, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [None, (23, 9)])
def test_flip_predicts_the_mirrored_for_the_mirrored_image(trained, photos, size):
    labels, confidences = predict(trained, photos, flip=True, size=size)
    of_mirrored = predict(trained, photos.flip(3), flip=True, size=size)
    torch.testing.assert_close(of_mirrored[1].flip(2), confidences, rtol=0, atol=1e-5)
    assert (of_mirrored[0].flip(2) == labels).float().mean() > 0.999  # a tie may fall either way
    assert not torch.allclose(predict(trained, photos, size=size)[1], confidences, rtol=0, atol=1e-3)


def test_flip_averages_probabilities(trained, photos):
    with torch.no_grad():
        straight, mirrored = (trained.eval()(images / 127.5 - 1).softmax(dim=1) for images in (photos, photos.flip(3)))
    expected = ((straight + mirrored.flip(3)) / 2).amax(dim=1)
    torch.testing.assert_close(predict(trained, photos, flip=True)[1], expected, rtol=0, atol=1e-5)


def test_bfloat16_predicts_nearly_the_same(trained, photos):
    confidences = predict(trained, photos)[1]
    rounded = predict(trained, photos, precision=torch.bfloat16)[1]
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - confidences).abs().mean() < 0.02


def test_evaluation_is_the_confusion_matrix_of_the_prediction(trained, pets):
    expected = confusion_matrix(predict(trained, pets.images, flip=True)[0], pets.masks)
    assert torch.equal(evaluate(trained, pets, flip=True), expected)
    assert expected.sum() == pets.masks.numel()


def test_evaluation_brings_logits_to_the_side_of_the_masks(trained, photos):
    random = torch.Generator().manual_seed(0)
    finer = Pets([f"pug_{i}" for i in range(8)], photos[:8], torch.randint(3, (8, 48, 48), generator=random).byte())
    with torch.no_grad():
        logits = trained.eval()(finer.images / 127.5 - 1)
    matrices = {}
    for mode in ("bilinear", "nearest"):
        labels = F.interpolate(logits, (48, 48), mode=mode).argmax(dim=1).byte()
        matrices[mode] = confusion_matrix(labels, finer.masks)
    result = evaluate(trained, finer)
    assert (result - matrices["bilinear"]).abs().sum() <= 4  # a tie may fall either way
    assert (result - matrices["nearest"]).abs().sum() > 40


# ------------------------------------------------------------------- weights


def test_kept_weights_are_half_as_large_and_predict_nearly_the_same(trained, photos, tmp_path):
    path = tmp_path / "run" / "weights.pt"
    save_weights(path, trained)
    stored = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}
    again = new_model(base_channels=4, depth=2, seed=7)
    load_weights(path, again)
    assert next(again.parameters()).dtype == torch.float32
    labels, confidences = predict(trained, photos)
    assert (predict(again, photos)[0] == labels).float().mean() > 0.99
    torch.testing.assert_close(predict(again, photos)[1], confidences, rtol=0, atol=0.02)
    save_weights(path, again)  # what was rounded once is not rounded further
    assert all(torch.equal(tensor, stored[name]) for name, tensor in torch.load(path, weights_only=True).items())
    once_more = new_model(base_channels=4, depth=2, seed=8)
    load_weights(path, once_more)
    assert same_weights(once_more, again)


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
    with complains("no weights", tmp_path / "weights.pt"):
        load_weights(tmp_path / "weights.pt", new_model())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("no weights"), id="text"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), id="half"),
        pytest.param(lambda path: torch.save(new_model(), path), id="pickled model"),
        pytest.param(lambda path: torch.save([1, 2], path), id="list"),
        pytest.param(lambda path: save_weights(path, new_model(base_channels=3)), id="other channels"),
        pytest.param(lambda path: save_weights(path, new_model(depth=2)), id="other depth"),
        pytest.param(lambda path: save_weights(path, new_model(norms=1)), id="other norms"),
    ],
)
def test_damaged_and_foreign_weights_are_told(tmp_path, complains, damage):
    path = tmp_path / "weights.pt"
    save_weights(path, new_model())
    damage(path)
    with complains(path, "damaged", "another architecture"):
        load_weights(path, new_model())
