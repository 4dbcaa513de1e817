"""Criteria of the rubric: the loss, prediction, the loop, and the files of a run, seen from
outside.

What a net is given, and whether it was training then, is seen by hooks on it; the optimiser by
PyTorch's own hooks.
"""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from petseg_utils import (
    CLASSES,
    IGNORE,
    InputError,
    Pets,
    Recipe,
    UNet,
    confusion_matrix,
    evaluate,
    load_pets,
    load_weights,
    predict,
    save_run,
    save_weights,
    scores,
    segmentation_loss,
    train,
)

# 8 images of 16 x 16 pixels: two steps an epoch, and two images left over.
RECIPE = Recipe(
    EPOCHS=3, BATCH_SIZE=3, IMAGE_SIZE=16, DEPTH=2, LEARNING_RATE=0.01, SEED=1, PRECISION="float32"
)
PLAIN = RECIPE.but(
    MUON=False, LINEAR_DECAY=False, WEIGHT_DECAY=0.0, DICE_WEIGHT=0.0, AVERAGE=False, AUGMENT=0.0
)


def new_model(base_channels: int = 4, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(base_channels, 2)


def same_weights(one: nn.Module, other: nn.Module, tolerance: float = 0) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(mine, yours, rtol=0, atol=tolerance) for mine, yours in pairs)


def without_seconds(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def watch(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return a list that gets the input and the logits of every pass that `model` itself makes while training."""
    passes = []

    def note(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        if module is model and module.training:  # a copy of the model has copies of its hooks
            passes.append((inputs[0].detach().clone(), logits.detach().clone()))

    model.register_forward_hook(note)
    return passes


def indices(images: Tensor, pets: Pets) -> list[int]:
    """Return which of the pets a batch of inputs shows."""
    return [
        int((pets.images / 127.5 - 1 - image).abs().amax((1, 2, 3)).argmin()) for image in images
    ]


# ------------------------------------------------------------------- the loss


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Return logits (2, 3, 4, 6) and masks (2, 4, 6)."""
    random = torch.Generator().manual_seed(0)
    return 2 * torch.randn(2, 3, 4, 6, generator=random), torch.randint(
        3, (2, 4, 6), generator=random
    )


def test_loss_without_dice_is_cross_entropy(batch):
    found, expected = segmentation_loss(*batch, 0.0).item(), F.cross_entropy(*batch).item()
    assert found == pytest.approx(expected, rel=1e-5), (
        f"expected {expected:.4f} for these logits, found {found:.4f}"
    )


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_dice_is_the_overlap_of_whole_classes(batch, weight):
    logits, masks = batch
    likely, truth = (
        logits.softmax(1).transpose(0, 1).flatten(1),
        masks.flatten() == torch.arange(3)[:, None],
    )
    dice = (2 * (likely * truth).sum(1) + 1) / (likely.sum(1) + truth.sum(1) + 1)
    expected = (F.cross_entropy(logits, masks) + weight * (1 - dice.mean())).item()
    found = segmentation_loss(logits, masks, weight).item()
    assert found == pytest.approx(expected, rel=1e-5), (
        f"expected {expected:.4f} with Dice, found {found:.4f}"
    )


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ignored_pixels_count_nowhere_in_the_loss(batch, weight):
    logits, masks = batch
    partly = masks.clone()
    partly[..., 4:] = IGNORE
    found = segmentation_loss(logits, partly, weight).item()
    expected = segmentation_loss(logits[..., :4], masks[..., :4], weight).item()
    assert found == pytest.approx(expected, rel=1e-5), (
        f"expected {expected:.4f} as without them, found {found:.4f}"
    )


# ------------------------------------------------------------------- prediction


class Stub(nn.Module):
    """A net of known answers: logits are the three colours; it keeps what it was given, and whether in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)  # with statistics that change nothing
        self.given, self.trained = [], []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        self.trained.append(self.norm.training)
        return self.norm(x) * self.scale


def colours(count: int = 5, side: int = 8) -> Tensor:
    return torch.randint(
        256, (count, 3, side, side), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )


def as_input(images: Tensor) -> Tensor:
    return images / 127.5 - 1


def test_net_is_given_minus_one_to_one():
    stub, images = Stub(), colours()
    predict(stub, images, torch.float32)
    found = stub.given[0]
    message = f"expected inputs from -1 to 1, found {found.min():.2f} to {found.max():.2f}"
    assert torch.allclose(found, as_input(images), atol=1e-2), message


def test_prediction_is_the_most_probable_label_and_its_probability():
    images = colours(40)
    labels, confidence = predict(Stub(), images, torch.float32)
    likely, expected = as_input(images).softmax(1).max(1)
    assert labels.dtype == torch.uint8, f"expected labels of uint8, found {labels.dtype}"
    assert (labels == expected).float().mean() > 0.999, (
        "expected the most probable label of each pixel, found others"
    )
    assert torch.allclose(confidence, likely, atol=1e-3), (
        "expected the probability of that label, found others"
    )


def test_prediction_uses_the_norms_own_statistics():
    stub = Stub().train()
    predict(stub, colours(), torch.float32)
    assert not any(stub.trained), "expected the net in evaluation mode, found it in training mode"


def test_prediction_is_brought_to_the_wanted_size_bilinearly():
    images = colours()
    labels, _ = predict(Stub(), images, torch.float32, size=(20, 12))
    assert labels.shape == (5, 20, 12), f"expected labels (5, 20, 12), found {tuple(labels.shape)}"
    expected = F.interpolate(as_input(images), (20, 12), mode="bilinear").argmax(1)
    right = (labels == expected).float().mean().item()
    assert right > 0.999, (
        f"expected the labels of logits resized bilinearly, found {right:.0%} of them"
    )


def test_flipping_averages_the_mirror_images_probabilities():
    class Lopsided(Stub):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.linspace(0, 4, x.shape[3])

    images = colours()
    labels, confidence = predict(Lopsided(), images, torch.float32, flip=True)
    one, two = (Lopsided().eval()(as_input(x)).softmax(1) for x in (images, images.flip(3)))
    likely, expected = ((one + two.flip(3)) / 2).max(1)
    assert (labels == expected).float().mean() > 0.99, (
        "expected labels averaged over both images, found others"
    )
    assert torch.allclose(confidence, likely, atol=1e-2), (
        "expected averaged probabilities, found others"
    )


def test_evaluation_counts_every_image_by_itself():
    images, masks = colours(40), torch.randint(3, (40, 12, 12)).byte()
    masks[:, :2] = IGNORE
    found = evaluate(Stub(), Pets([f"pug_{i}" for i in range(40)], images, masks), torch.float32)
    labels, _ = predict(Stub(), images, torch.float32, size=(12, 12))
    expected = torch.stack(
        [confusion_matrix(label, mask) for label, mask in zip(labels, masks, strict=True)]
    )
    assert found.shape == (40, 3, 3), (
        f"expected a matrix for each image, (40, 3, 3), found {tuple(found.shape)}"
    )
    assert torch.equal(found, expected), (
        "expected the counts of each image's own prediction, found others"
    )


# ------------------------------------------------------------------- the loop


def test_labels_are_learned(pets):
    model = new_model(8)
    recipe = RECIPE.but(EPOCHS=40, BATCH_SIZE=4, LEARNING_RATE=0.03, AUGMENT=0.0)
    history = train(model, pets, pets, recipe)
    first, last = history[0]["train_loss"], history[-1]["train_loss"]
    assert last < first / 3, (
        f"expected the loss to fall to a third, found {first:.2f} to {last:.2f}"
    )
    accuracy = scores(evaluate(model, pets, torch.float32).sum(0))["pixel_accuracy"]
    assert accuracy > 0.9, (
        f"expected more than 90 % of the training pixels right, found {accuracy:.0%}"
    )


def test_every_epoch_shows_every_image_once(pets):
    model = new_model()
    passes = watch(model)
    history = train(model, pets, pets, RECIPE.but(BATCH_SIZE=2, AUGMENT=0.0))
    assert len(history) == 3, f"expected a row for each of 3 epochs, found {len(history)}"
    assert len(passes) == 12, f"expected 3 epochs of 4 steps, found {len(passes)} steps"
    orders = [[i for x, _ in passes[k : k + 4] for i in indices(x, pets)] for k in (0, 4, 8)]
    assert all(sorted(order) == list(range(8)) for order in orders), (
        f"expected every image once, found {orders}"
    )
    assert len(set(map(tuple, orders))) > 1, "expected another order in every epoch, found the same"


def test_every_batch_is_full_and_too_few_images_are_told(pets):
    model = new_model()
    passes = watch(model)
    train(model, pets, pets, RECIPE.but(EPOCHS=1))
    assert [len(x) for x, _ in passes] == [3, 3], (
        f"expected batches of 3 and 3, found {[len(x) for x, _ in passes]}"
    )
    with pytest.raises(InputError, match="BATCH_SIZE"):
        train(new_model(), pets, pets, RECIPE.but(BATCH_SIZE=9))


def test_reported_loss_is_the_mean_of_the_epochs_batches(pets):
    model = new_model()
    passes = watch(model)
    history = train(model, pets, pets, PLAIN)
    for row, some in zip(history, (passes[:2], passes[2:4], passes[4:]), strict=True):
        expected = (
            sum(F.cross_entropy(y, pets.masks[indices(x, pets)].long()).item() for x, y in some) / 2
        )
        found = row["train_loss"]
        assert found == pytest.approx(expected, rel=1e-3), (
            f"expected a loss of {expected:.4f}, found {found:.4f}"
        )


def test_steps_are_those_of_the_plainest_loop(pets):
    """The oracle is PyTorch's Adam, over the same batches, with cross-entropy alone."""
    model, oracle = new_model(), new_model()
    passes = watch(model)
    train(model, pets, pets, PLAIN)
    optimizer = torch.optim.Adam(oracle.parameters(), lr=PLAIN.LEARNING_RATE)
    for images, _ in passes:
        optimizer.zero_grad()
        F.cross_entropy(oracle(images), pets.masks[indices(images, pets)].long()).backward()
        optimizer.step()
    # A bias before a BatchNorm has only noise for a gradient, which Adam blows up: compare what
    # comes out.
    image = as_input(pets.images)
    error = (model.train()(image) - oracle(image)).abs().max().item()
    assert error < 1e-2, (
        f"expected the logits of backward, step and fresh gradients, found a difference of {error:.3f}"
    )


@pytest.mark.parametrize("augment", [1.0, 0.0])
def test_same_seed_gives_the_same_net_and_another_does_not(pets, augment):
    first, again, other = new_model(), new_model(), new_model()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        train(model, pets, pets, RECIPE.but(SEED=seed, AUGMENT=augment))
    assert same_weights(first, again), "expected the same weights for the same SEED, found others"
    assert not same_weights(first, other), "expected other weights for another SEED, found the same"


def test_validation_images_teach_nothing(pets):
    other = Pets(pets.names, 255 - pets.images, 2 - pets.masks)
    models = new_model(), new_model()
    for model, valid in zip(models, (pets, other), strict=True):
        train(model, pets, valid, RECIPE)
    assert same_weights(*models), (
        "expected weights that don't depend on the validation images, found others"
    )


def test_last_row_scores_the_net_that_is_returned(pets):
    model = new_model()
    last = train(model, pets, pets, RECIPE.but(LEARNING_RATE=0.3))[-1]
    result = scores(evaluate(model, pets, torch.float32).sum(0))
    for key in ("pixel_accuracy", "mean_iou"):
        expected, found = result[key], last[f"valid_{key}"]
        assert found == pytest.approx(expected), (
            f"expected {key} {expected:.4f} of the net returned, found {found:.4f}"
        )


def test_moving_average_of_the_weights_is_kept(pets):
    averaged, last = new_model(), new_model()
    start = new_model()
    train(averaged, pets, pets, RECIPE)
    train(last, pets, pets, RECIPE.but(AVERAGE=False))
    assert not same_weights(averaged, last), (
        "expected other weights with AVERAGE, found those of the last step"
    )
    moved, whole = (
        sum(
            (a - b).square().sum().item()
            for a, b in zip(m.parameters(), start.parameters(), strict=True)
        )
        ** 0.5
        for m in (averaged, last)
    )
    message = f"expected the average on the way from the first weights to the last, found {moved / whole:.0%} of the way"
    assert 0.3 < moved / whole < 1, message


def rates(pets: Pets, recipe: Recipe) -> list[float]:
    """Train and return the learning rate of every step, of whatever optimiser."""
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"])
    )
    try:
        train(new_model(), pets, pets, recipe)
    finally:
        handle.remove()
    return seen


def test_learning_rate_rises_and_sinks_once(pets):
    seen = rates(pets, RECIPE.but(EPOCHS=10))
    top = seen.index(max(seen))
    message = f"expected a rise and a fall over 20 steps, found {[round(rate, 5) for rate in seen]}"
    assert len(seen) == 20, message
    assert 0 < top < 10, message
    assert seen == sorted(seen[:top]) + sorted(seen[top:], reverse=True), message
    constant = rates(pets, RECIPE.but(LINEAR_DECAY=False))
    assert constant == [0.01] * 6, (
        f"expected a constant rate without LINEAR_DECAY, found {constant}"
    )


def test_augmentation_is_a_switch(pets):
    for augment in (0.5, 0.0):
        model = new_model()
        passes = watch(model)
        train(model, pets, pets, RECIPE.but(AUGMENT=augment))
        inputs = as_input(pets.images)
        plain = all(torch.allclose(x, inputs[indices(x, pets)], atol=1e-5) for x, _ in passes)
        assert plain != bool(augment), (
            f"expected images {'changed' if augment else 'as they are'}, found the opposite"
        )


def test_augmentation_is_as_strong_as_the_recipe_says(pets):
    """At a thousandth of its strength hardly anything is left of it but flips, which have no strength."""
    model = new_model()
    passes = watch(model)
    train(model, pets, pets, RECIPE.but(AUGMENT=0.001))
    inputs = as_input(pets.images)
    known = torch.cat([inputs, inputs.flip(-1)])
    shown = torch.cat([images for images, _ in passes])
    off = (shown[:, None] - known).abs().mean((2, 3, 4)).amin(1).max().item()
    assert off < 0.1, (
        f"expected images nearly as they are with AUGMENT 0.001, found them {off:.2f} off on average"
    )


def test_small_epochs_train_at_smaller_sides(pets):
    model = new_model()
    passes = watch(model)
    train(model, pets, pets, RECIPE.but(SMALL_EPOCHS="1 at 8, 1 at 12"))
    found = [x.shape[-1] for x, _ in passes]
    assert found == [8, 8, 12, 12, 16, 16], (
        f"expected an epoch at the sides 8, 12 and 16 each, found {found}"
    )


def test_small_sides_are_loaded_from_the_photos(pets):
    """So nothing is resized twice."""
    inputs = as_input(load_pets(pets.folder, pets.names, 8).images)
    model = new_model()
    passes = watch(model)
    train(model, pets, pets, RECIPE.but(SMALL_EPOCHS="1 at 8", AUGMENT=0.0))
    shown = torch.cat([images for images, _ in passes[:2]])
    strangers = sum(bool((inputs - image).abs().amax((1, 2, 3)).min() > 1e-5) for image in shown)
    assert not strangers, (
        f"expected 6 photos as load_pets gives them at the side 8, found {strangers} others"
    )


def test_loss_that_is_no_number_is_told(pets):
    model = new_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="LEARNING_RATE"):
        train(model, pets, pets, RECIPE)


def test_resumed_training_equals_an_uninterrupted_one(pets, tmp_path):
    whole, cut, resumed = new_model(), new_model(), new_model(seed=99)
    history = train(whole, pets, pets, RECIPE)
    passes = watch(cut)

    def pull_the_plug(*_: object) -> None:
        if len(passes) == 5:
            raise ConnectionError("pulled the plug")

    cut.register_forward_pre_hook(pull_the_plug)
    with pytest.raises(ConnectionError):
        train(cut, pets, pets, RECIPE, tmp_path / "checkpoint.pt")
    continued = train(resumed, pets, pets, RECIPE.but(RESUME=True), tmp_path / "checkpoint.pt")
    assert without_seconds(continued) == without_seconds(history), (
        "expected the same history, found another"
    )
    assert same_weights(resumed, whole), "expected the same weights, found others"


# ------------------------------------------------------------------- files


def test_weights_survive_being_saved(tmp_path):
    model, other = new_model(), new_model(seed=1)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer += 7  # the norms' statistics count as well
    save_weights(tmp_path / "weights.pt", model)
    load_weights(tmp_path / "weights.pt", other)
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    lost = [
        name
        for (name, mine), yours in pairs
        if not torch.allclose(mine, yours, rtol=2e-3, atol=1e-4)
    ]
    assert not lost, f"expected all weights to survive, found others in {lost[0]}"
    with pytest.raises(InputError):
        load_weights(tmp_path / "weights.pt", UNet(2, 2))


def test_run_folder_holds_what_was_counted(pets, tmp_path):
    matrices = torch.arange(72).view(8, 3, 3)
    history = [{"epoch": 1, "train_loss": 0.5}]
    save_run(tmp_path, {"parameters": {}}, history, {"test": (pets, matrices)})
    test = json.loads((tmp_path / "metrics.json").read_text())["test"]
    assert test["confusion_matrix"] == matrices.sum(0).tolist(), (
        "expected the sum of all images' counts, found another"
    )
    expected = matrices.sum(0).diagonal().sum().item() / matrices.sum().item()
    found = test["pixel_accuracy"]
    assert found == pytest.approx(expected), (
        f"expected an accuracy of {expected:.4f}, found {found}"
    )
    assert list(test["iou"]) == list(CLASSES), (
        f"expected an IoU for each class, found {list(test['iou'])}"
    )
    rows = (tmp_path / "images.csv").read_text().splitlines()
    assert len(rows) == 9, f"expected a header and 8 images in images.csv, found {len(rows)} lines"
