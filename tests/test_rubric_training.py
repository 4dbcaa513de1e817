"""Criteria of the rubric: loss, prediction, the loop and the files of a run, seen from outside.

What a net is given, and whether it was training then, is seen by PyTorch's own hooks on all nets,
and so is the optimiser.
"""

import csv
import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from drawn import draw, draw_pets, write_pets
from sklearn import metrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from petseg_utils import (
    CLASSES,
    IGNORE,
    InputError,
    Pets,
    Recipe,
    UNet,
    augment,
    confusion_matrix,
    evaluate,
    load_net,
    load_pets,
    load_weights,
    predict,
    save_run,
    save_weights,
    segmentation_loss,
    train,
)
from support.muon import Muon

SMALL = 8  # the side of the first epoch in some trainings


def as_input(images: Tensor) -> Tensor:
    return images / 127.5 - 1


def new_model(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(4, 2)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def indices(images: Tensor, pets: Pets) -> list[int]:
    """Return which of the pets a batch of inputs shows, -1 for one that is none of them."""
    off = [(as_input(pets.images) - image).abs().amax((1, 2, 3)) for image in images]
    return [int(d.argmin()) if d.min() < 0.03 else -1 for d in off]


def score_by_hand(labels: Tensor, masks: Tensor) -> tuple[float, float]:
    """Return pixel accuracy and mean IoU, as scikit-learn counts them."""
    truth, predicted = (x[masks != IGNORE].flatten().numpy() for x in (masks, labels))
    there = np.union1d(truth, predicted)
    iou = metrics.jaccard_score(truth, predicted, labels=there, average="macro")
    return metrics.accuracy_score(truth, predicted), iou


# ------------------------------------------------------------------- the loss


def loss_by_hand(logits: Tensor, masks: Tensor, weight: float) -> Tensor:
    """Return cross-entropy plus `weight` times Dice loss, of the known pixels as one long list."""
    known = masks != IGNORE
    pixels, labels = logits.movedim(1, -1)[known], masks[known].long()
    likely, truth = pixels.softmax(1), F.one_hot(labels, logits.shape[1])
    dice = (2 * (likely * truth).sum(0) + 1) / ((likely + truth).sum(0) + 1)
    return F.cross_entropy(pixels, labels) + weight * (1 - dice.mean())


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Return logits (B, 3, H, W) and masks (B, H, W)."""
    random = draw("loss")
    size = random.randint(2, 4), random.randint(3, 9), random.randint(10, 14)
    torch.manual_seed(random.randrange(2**31))
    return 2 * torch.randn(3, *size).transpose(0, 1), torch.randint(3, size)


def test_loss_without_dice_is_cross_entropy(batch):
    found, expected = segmentation_loss(*batch, 0.0).item(), F.cross_entropy(*batch).item()
    message = f"expected {expected:.4f} for these logits, found {found:.4f}"
    assert found == pytest.approx(expected, rel=1e-5), message


@pytest.mark.parametrize("weight", [0.5, 2.0, 7.0])
def test_dice_is_the_overlap_of_whole_classes(batch, weight):
    found, expected = (f(*batch, weight).item() for f in (segmentation_loss, loss_by_hand))
    message = f"expected {expected:.4f} with Dice, found {found:.4f}"
    assert found == pytest.approx(expected, rel=1e-5), message


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ignored_pixels_count_nowhere_in_the_loss(batch, weight):
    batch[1][..., 4:] = IGNORE
    found, expected = (f(*batch, weight).item() for f in (segmentation_loss, loss_by_hand))
    message = f"expected {expected:.4f} as without them, found {found:.4f}"
    assert found == pytest.approx(expected, rel=1e-5), message


# ------------------------------------------------------------------- prediction


class Stub(nn.Module):
    """A net of known answers: its logits are the colours, brighter to the right.

    It keeps what it was given, whether in training, and in which precision it computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)  # with statistics that change nothing
        self.one = nn.Conv2d(3, 3, 1)
        self.one.weight.data, self.one.bias.data = torch.eye(3)[..., None, None], torch.zeros(3)
        self.given, self.trained, self.precisions = [], [], []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        self.trained.append(self.training)
        logits = self.one(self.norm(x) * torch.linspace(0, 4, x.shape[3]))
        self.precisions.append(logits.dtype)
        return logits


class Asked(NamedTuple):
    """Images (B, 3, H, W), the size of the masks, and the probabilities of the stub's answers."""

    images: Tensor
    size: tuple[int, int]
    likely: Callable[..., Tensor]


@pytest.fixture
def asked() -> Asked:
    """Return more images than fit into one batch, at a size of which no number is there twice."""
    random = draw("images")
    count, height, width, *size = random.sample(range(33, 45), 1) + random.sample(range(46, 64), 4)
    torch.manual_seed(random.randrange(2**31))
    images = torch.randint(256, (count, 3, height // 4, width // 4), dtype=torch.uint8)

    def likely(size: tuple[int, int], images: Tensor = images) -> Tensor:
        with torch.no_grad():
            logits = Stub().eval()(as_input(images))
        return F.interpolate(logits, size, mode="bilinear").softmax(1)

    return Asked(images, tuple(size), likely)


def test_net_is_given_minus_one_to_one(asked):
    stub = Stub()
    predict(stub, asked.images, torch.float32)
    found = torch.cat(stub.given)
    right = found.shape == asked.images.shape and torch.allclose(
        found.sort(0)[0], as_input(asked.images).sort(0)[0], atol=1e-2
    )
    message = f"expected inputs from -1 to 1, found {found.min():.3f} to {found.max():.3f}"
    assert right, message


@pytest.mark.parametrize("resized", [False, True], ids=["images' size", "another size"])
def test_prediction_is_the_most_probable_label_and_its_probability(asked, resized):
    size = asked.size if resized else tuple(asked.images.shape[2:])
    how = {"size": size} if resized else {}
    labels, confidence = predict(Stub(), asked.images, torch.float32, **how)
    likely, expected = asked.likely(size).max(1)
    assert labels.dtype == torch.uint8, f"expected labels of uint8, found {labels.dtype}"
    assert labels.shape == expected.shape, (
        f"expected labels {tuple(expected.shape)}, found {tuple(labels.shape)}"
    )
    what = "the labels of logits resized bilinearly" if resized else "the most probable label"
    right = (labels == expected).float().mean().item()
    assert right > 0.999, f"expected {what} of each pixel, found {right:.1%} of them"
    assert torch.allclose(confidence, likely, atol=1e-3), (
        "expected the probability of that label, found others"
    )


def test_prediction_uses_the_norms_own_statistics(asked):
    stub = Stub().train()
    predict(stub, asked.images, torch.float32)
    assert not any(stub.trained), "expected the net in evaluation mode, found it in training mode"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_prediction_is_computed_in_the_precision_asked_for(asked, precision):
    for flip in (False, True):
        stub = Stub()
        predict(stub, asked.images, precision, flip=flip)
        found = set(stub.precisions)
        assert found == {precision}, f"expected a net computed in {precision}, found {found}"


def test_flipping_averages_the_mirror_images_probabilities(asked):
    mirrored = asked.likely(asked.size, asked.images.flip(3)).flip(3)
    expected, label = ((asked.likely(asked.size) + mirrored) / 2).max(1)
    labels, found = predict(Stub(), asked.images, torch.float32, size=asked.size, flip=True)
    right = (labels == label).float().mean().item()
    assert right > 0.99, f"expected labels averaged over both images, found {right:.1%} of them"
    assert torch.allclose(found, expected, atol=1e-2), "expected averaged probabilities, not others"


@pytest.mark.parametrize("flip", [False, True], ids="flip {}".format)
def test_evaluation_counts_every_image_by_itself(asked, flip):
    """At the masks' side, which is not the images', and with more pixels than some counts hold."""
    images = asked.images
    masks = torch.randint(3, (len(images), *asked.size), dtype=torch.uint8)
    masks[:, :2] = IGNORE
    names = [f"pug_{i}" for i in range(len(images))]
    found = evaluate(Stub(), Pets(names, images, masks), torch.float32, flip=flip)
    likely = asked.likely(asked.size)
    if flip:
        likely = likely + asked.likely(asked.size, images.flip(3)).flip(3)
    shape = (len(images), 3, 3)
    assert found.shape == shape, f"expected a matrix for each image, found {tuple(found.shape)}"
    pairs = zip(likely.argmax(1), masks, strict=True)
    expected = torch.stack([counted(*pair) for pair in pairs])
    off = (found - expected).abs().sum().item()
    what = f"the counts of each image's own prediction, with flip={flip}"
    assert off <= 0.001 * expected.sum(), f"expected {what}, found {off} others"


def counted(labels: Tensor, masks: Tensor) -> Tensor:
    """Return the confusion matrix (3, 3), counted pixel by pixel."""
    matrix = np.zeros((3, 3), dtype=np.int64)
    known = masks != IGNORE
    np.add.at(matrix, (masks[known].numpy(), labels[known].numpy()), 1)
    return torch.from_numpy(matrix)


@pytest.mark.parametrize("least", [1, 60, 500])
def test_confusion_matrix_counts_every_pixel_at_any_size(least):
    random = draw(f"matrix {least}")
    size = (
        random.randint(3, 4),
        random.randint(least, least + 40),
        random.randint(least, least + 40),
    )
    torch.manual_seed(random.randrange(2**31))
    labels, masks = torch.randint(3, (2, *size), dtype=torch.uint8)
    masks[torch.rand(size) < 0.1] = IGNORE
    expected, found = counted(labels, masks).tolist(), confusion_matrix(labels, masks).tolist()
    assert found == expected, f"expected the counts {expected}, rows the truth, found {found}"


# ------------------------------------------------------------------- the loop, seen from outside


class Passed(NamedTuple):
    """A forward pass: what the net was given, its logits and weights, and its statistics then."""

    images: Tensor
    logits: Tensor
    weights: list[Tensor]
    statistics: list[Tensor]


class Seen(NamedTuple):
    """What a training showed: all passes by their kind, rates and weights of every step."""

    model: UNet
    history: list[dict]
    steps: list[Passed]  # of the net that is trained, while training
    measured: list[Passed]  # of other nets in training mode
    scored: list[Passed]  # in evaluation mode
    rates: list[float]
    stepped: list[list[Tensor]]  # the weights after each step
    start: list[Tensor]


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def see(recipe: Recipe, train_pets: Pets, valid_pets: Pets) -> Seen:
    """Train a new net, in evaluation mode at first, with PyTorch's own hooks on all nets."""
    model = new_model().eval()
    seen = Seen(model, [], [], [], [], [], [], copies(model.parameters()))

    def passed(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        if isinstance(module, UNet):
            parts = (module.parameters(), [b for b in module.buffers() if b.ndim])
            kind = seen.steps if module is model else seen.measured
            kind = kind if module.training else seen.scored
            kind.append(Passed(*copies((inputs[0], logits)), *map(copies, parts)))

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.rates.append(optimizer.param_groups[0]["lr"])

    def after(*_: object) -> None:
        seen.stepped.append(copies(model.parameters()))

    hooks = [
        register_module_forward_hook(passed),
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    ]
    try:
        seen.history.extend(train(model, train_pets, valid_pets, recipe))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class Drawn(NamedTuple):
    """Pictures to train and to validate on, unlike one another, and recipes at their side."""

    train_pets: Pets
    valid_pets: Pets
    recipe: Recipe
    plain: Recipe

    def see(self, recipe: Recipe, **changes: object) -> Seen:
        return see(recipe.but(**changes), self.train_pets, self.valid_pets)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Drawn:
    """Return pictures of which some are left over in an epoch, and a split that nobody may see."""
    random = draw("training")
    folder = tmp_path_factory.mktemp("drawn")
    batch_size, side = random.randint(3, 5), random.choice((12, 16, 20))
    count = random.randint(3, 4) * batch_size + random.randint(1, batch_size - 1)
    splits = {"pug": count, "Bengal": random.randint(33, 40), "Maine_Coon": count}
    pets = {
        breed: draw_pets(folder, [f"{breed}_{i}" for i in range(n)], side, breed != "pug")
        for breed, n in splits.items()
    }
    (folder / "annotations" / "test.txt").write_text("\n".join(pets["Maine_Coon"].names))
    listed = [*pets["pug"].names, *pets["Bengal"].names]
    (folder / "annotations" / "trainval.txt").write_text("\n".join(listed))
    finer = load_pets(folder, pets["Bengal"].names, side, mask_side=random.choice((14, 22, 26)))
    recipe = Recipe(
        EPOCHS=3,
        BATCH_SIZE=batch_size,
        IMAGE_SIZE=side,
        DEPTH=2,
        LEARNING_RATE=random.uniform(0.02, 0.04),
        SEED=random.randrange(1, 1000),
        PRECISION="float32",
    )
    no_extras = {"LINEAR_DECAY": False, "AVERAGE": False, "AUGMENT": 0.0, "MUON": False}
    plain = recipe.but(**no_extras, WEIGHT_DECAY=0.0, DICE_WEIGHT=0.0)
    return Drawn(pets["pug"], finer, recipe, plain)


def test_labels_are_learned(drawn):
    recipe = drawn.recipe.but(EPOCHS=40, LEARNING_RATE=0.03, AUGMENT=0.0)
    model = new_model()
    history = train(model, drawn.train_pets, drawn.valid_pets, recipe)
    first, last = history[0]["train_loss"], history[-1]["train_loss"]
    assert last < first / 3, (
        f"expected the loss to fall to a third, found {first:.2f} to {last:.2f}"
    )
    counts = evaluate(model, drawn.train_pets, torch.float32).sum(0)
    right = (counts.diagonal().sum() / counts.sum()).item()
    assert right > 0.9, f"expected more than 90 % of the training pixels right, found {right:.0%}"


@pytest.mark.parametrize("left_over", [True, False])
def test_every_epoch_shows_every_image_once_in_full_batches(drawn, left_over):
    pets, size = drawn.train_pets, drawn.recipe.BATCH_SIZE
    steps = len(pets.names) // size
    count = len(pets.names) if left_over else steps * size
    pets = Pets(pets.names[:count], pets.images[:count], pets.masks[:count], pets.folder)
    seen = see(drawn.recipe.but(AUGMENT=0.0), pets, drawn.valid_pets)
    rows = [row["epoch"] for row in seen.history]
    assert rows == [1, 2, 3], f"expected a row for each of 3 epochs, found {rows}"
    sizes = [len(step.images) for step in seen.steps]
    assert sizes == [size] * 3 * steps, (
        f"expected batches of {size} and {size}, 3 times {steps} of them in training mode, "
        f"found {sizes}"
    )
    shown = [i for step in seen.steps for i in indices(step.images, pets)]
    orders = [tuple(shown[k * steps * size :][: steps * size]) for k in range(3)]
    once = all(len(set(order)) == len(order) and min(order) >= 0 for order in orders)
    assert once, f"expected every image once, found {orders}"
    assert len(set(orders)) == 3, "expected another order in every epoch, found the same"


def test_too_few_images_are_told(drawn):
    few = drawn.recipe.but(BATCH_SIZE=len(drawn.train_pets.names) + 1)
    with pytest.raises(InputError, match="BATCH_SIZE"):
        train(new_model(), drawn.train_pets, drawn.valid_pets, few)


def check_losses(drawn: Drawn, changes: dict) -> None:
    """Check the loss of every epoch of a training by the plain recipe with some changes."""
    seen = drawn.see(drawn.plain, **changes)
    given = drawn.train_pets
    resize, weight = changes.get("MASK_RESIZE", "nearest"), changes.get("DICE_WEIGHT", 0.0)
    small = load_pets(given.folder, given.names, SMALL, resize=resize)
    steps = len(seen.steps) // 3
    for epoch, row in enumerate(seen.history):
        pets = small if changes.get("SMALL_EPOCHS") and epoch == 0 else given
        losses = []
        for step in seen.steps[epoch * steps :][:steps]:
            assert step.images.shape[-1] == pets.images.shape[-1], (
                f"expected an epoch at the sides {SMALL} and others at IMAGE_SIZE, found others"
            )
            which = indices(step.images, pets)
            assert min(which) >= 0, f"expected photos as load_pets gives them at the side {SMALL}"
            losses.append(loss_by_hand(step.logits, pets.masks[which], weight))
        found, expected = row["train_loss"], torch.stack(losses).mean().item()
        told = f"a loss of {expected:.4f} in epoch {epoch + 1} with {changes}"
        assert found == pytest.approx(expected, rel=2e-5), f"expected {told}, found {found:.4f}"


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_reported_loss_is_the_mean_of_the_epochs_batches(drawn, weight):
    check_losses(drawn, {"DICE_WEIGHT": weight})


@pytest.mark.parametrize("resize", ["nearest", "bilinear"])
def test_small_epochs_train_on_photos_and_masks_resized_once(drawn, resize):
    check_losses(drawn, {"SMALL_EPOCHS": f"1 at {SMALL}", "MASK_RESIZE": resize})


STEPS = {"plain": {}, "AdamW": {"WEIGHT_DECAY": 0.9, "DICE_WEIGHT": 3.0}}
STEPS["Muon"] = {**STEPS["AdamW"], "MUON": True}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_the_plainest_loop(drawn, name):
    """The oracle is PyTorch's AdamW, or the project's Muon, over the same batches."""
    recipe, oracle = drawn.plain.but(**STEPS[name], EPOCHS=2), new_model()
    seen = drawn.see(recipe)
    options = {"lr": recipe.LEARNING_RATE, "weight_decay": recipe.WEIGHT_DECAY}
    kind = Muon if recipe.MUON else torch.optim.AdamW
    optimizer = kind(oracle.parameters(), **options)
    for step in seen.steps:
        masks = drawn.train_pets.masks[indices(step.images, drawn.train_pets)]
        optimizer.zero_grad()
        loss_by_hand(oracle(step.images), masks, recipe.DICE_WEIGHT).backward()
        optimizer.step()
    # A bias before a BatchNorm has only noise for a gradient, which Adam blows up: compare the
    # kernels, which show the decay, and what comes out, which doesn't.
    pairs = zip(seen.stepped[-1], oracle.parameters(), strict=True)
    kernels = max(((a - b).norm() / b.norm()).item() for a, b in pairs if b.ndim == 4)
    image = as_input(drawn.train_pets.images)
    logits = (seen.model.train()(image) - oracle.train()(image)).abs().max().item()
    assert logits < 0.05, (
        f"expected the logits of backward, step and fresh gradients ({name}), "
        f"found a difference of {logits:.3f}"
    )
    assert kernels < 0.02, (
        f"expected the weights of {name} with WEIGHT_DECAY {recipe.WEIGHT_DECAY}, "
        f"found a difference of {kernels:.1%}"
    )


def test_learning_rate_rises_and_sinks_once(drawn):
    peak = drawn.recipe.LEARNING_RATE
    for muon in (True, False):
        found = drawn.see(drawn.recipe, LINEAR_DECAY=False, MUON=muon).rates
        assert found == [peak] * len(found), (
            f"expected a constant rate {peak:.4f} without LINEAR_DECAY, found {found}"
        )
    seen = drawn.see(drawn.recipe, EPOCHS=8)
    rates, top = seen.rates, seen.rates.index(max(seen.rates))
    told = [round(rate, 5) for rate in rates]
    message = f"expected a rise and a fall over {len(seen.steps)} steps"
    peaks = f"{message} to LEARNING_RATE {peak:.4f}, found {max(rates):.4f}"
    ends = f"{message} to a last rate near 0, found {rates[-1]}"
    message += f", found {told}"
    assert len(rates) == len(seen.steps), message
    assert 0 < top < len(rates) / 4, message
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True), message
    assert 0.8 * peak < max(rates) <= peak, peaks
    assert 0 < rates[-1] < 0.2 * peak, ends
    shares = [rates[top + k] - rates[top + k + 1] for k in range(len(rates) - top - 1)]
    assert max(shares) < 1.5 * min(shares), message.replace("a fall", "a steady fall")


def averages(seen: Seen) -> list[list[Tensor]]:
    """Return the average after every step; of the one before n steps in keep (n + 1) / (n + 10)."""
    kept, every = copies(seen.stepped[0]), []
    for n, weights in enumerate(seen.stepped):
        share = min(0.99, (n + 1) / (n + 10)) if n else 0
        kept = [share * a + (1 - share) * b for a, b in zip(kept, weights, strict=True)]
        every.append(kept)
    return every


def close(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.allclose(*pair, atol=1e-5) for pair in zip(one, other, strict=True))


def test_moving_average_of_the_weights_is_kept(drawn):
    seen = drawn.see(drawn.recipe)
    assert close(seen.model.parameters(), averages(seen)[-1]), (
        "expected the moving average of the weights after every step, found others"
    )
    last = drawn.see(drawn.recipe, AVERAGE=False)
    assert close(last.model.parameters(), last.stepped[-1]), (
        "expected other weights with AVERAGE than without, those of the last step, found others"
    )


@pytest.mark.parametrize("small", ["", f"1 at {SMALL}"])
def test_every_row_scores_the_averaged_net_on_the_validation_images(drawn, small):
    """On all of them once, at the epoch's side, with BatchNorm statistics of training images."""
    seen = drawn.see(drawn.recipe, SMALL_EPOCHS=small, AUGMENT=0.0)
    train_pets, valid_pets = drawn.train_pets, drawn.valid_pets
    every, steps = averages(seen), len(seen.steps) // 3
    sides = [SMALL if small and not epoch else drawn.recipe.IMAGE_SIZE for epoch in range(3)]
    for epoch, (side, row) in enumerate(zip(sides, seen.history, strict=True)):
        shown = load_pets(valid_pets.folder, valid_pets.names, side)
        learned = load_pets(train_pets.folder, train_pets.names, side)
        average = every[(epoch + 1) * steps - 1]
        mine = [p for p in seen.scored if close(p.weights, average)]
        assert mine, f"expected the weights averaged up to epoch {epoch + 1} scored, found others"
        answers = {
            i: logits
            for p in mine
            if p.images.shape[-1] == side
            for i, logits in zip(indices(p.images, shown), p.logits.float(), strict=True)
        }
        answers.pop(-1, None)
        assert len(answers) == len(shown.names), (
            f"expected every validation image scored at the side {side} in epoch {epoch + 1}, "
            f"found {len(answers)} of {len(shown.names)}"
        )
        off = statistics_off(mine[0], learned, drawn.recipe.BATCH_SIZE)
        assert off < 0.3, (
            "expected BatchNorm statistics measured anew on training images, found others"
        )
        logits = torch.stack([answers[i] for i in range(len(answers))])
        labels = F.interpolate(logits, valid_pets.masks.shape[1:], mode="bilinear").argmax(1)
        found = row["valid_pixel_accuracy"], row["valid_mean_iou"]
        expected = score_by_hand(labels, valid_pets.masks)
        assert found == pytest.approx(expected, abs=1e-3), (
            f"expected pixel accuracy and mean IoU {expected} in epoch {epoch + 1}, found {found}"
        )
    assert close(seen.model.parameters(), every[-1]), (
        "expected the scores of the net returned, found it with other weights"
    )
    assert close([b for b in seen.model.buffers() if b.ndim], mine[0].statistics), (
        "expected the statistics of the net returned to be those scored, found others"
    )


def statistics_off(scored: Passed, pets: Pets, batch_size: int) -> float:
    """Return how far the statistics are from those of the training images, at most, in parts."""
    model = new_model().train()
    for parameter, weights in zip(model.parameters(), scored.weights, strict=True):
        parameter.data = weights
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for images in pets.images.split(batch_size):
            model(as_input(images))
    buffers = [b for b in model.buffers() if b.ndim]
    pairs = list(zip(buffers, scored.statistics, strict=True))
    scales = [variance.mean().sqrt() for variance in buffers[1::2]]
    means = [
        ((a - b).abs().mean() / s).item() for (a, b), s in zip(pairs[::2], scales, strict=True)
    ]
    spreads = [(b.mean() / a.mean()).sqrt().sub(1).abs().item() for a, b in pairs[1::2]]
    return max(means + spreads)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_computes_in_the_precision_of_the_recipe(drawn, precision):
    seen = drawn.see(drawn.recipe, PRECISION=precision, EPOCHS=1)
    for kind in (seen.steps, seen.measured, seen.scored):
        found = {str(p.logits.dtype).removeprefix("torch.") for p in kind}
        assert found <= {precision}, f"expected nets computed in {precision}, found {found}"


# ------------------------------------------------------------------- what is random


def test_augmentation_is_a_switch(drawn):
    plain = [i for step in drawn.see(drawn.recipe, AUGMENT=0.0).steps for i in shown(step, drawn)]
    assert min(plain) >= 0, "expected images as they are with AUGMENT 0, found others"
    changed = [i for step in drawn.see(drawn.recipe).steps for i in shown(step, drawn)]
    assert max(changed) < 0, "expected every image of every step changed, found some as they are"


def shown(step: Passed, drawn: Drawn) -> list[int]:
    return indices(step.images, drawn.train_pets)


@pytest.fixture
def alike(drawn) -> Drawn:
    """Return one picture, again and again, to train on: what differs then is the augmentation."""
    pets = drawn.train_pets
    count = 4 * drawn.recipe.BATCH_SIZE
    names = [f"pug_{i}" for i in range(count)]
    one = Pets(names, *(x[:1].repeat(count, *[1] * (x.ndim - 1)) for x in pets[1:3]), pets.folder)
    return drawn._replace(train_pets=one)


def test_augmentation_is_another_for_every_image_in_every_step(alike):
    seen = alike.see(alike.recipe)
    images = torch.cat([step.images for step in seen.steps]).flatten(1)
    off = torch.cdist(images, images, p=1) / images.shape[1]
    same_twice = int((off + torch.eye(len(images)) < 1e-3).sum()) // 2
    assert not same_twice, (
        f"expected {len(images)} images augmented each in its own way, found {same_twice} alike"
    )


@pytest.mark.parametrize("strength", [0.001, 0.25, 1.0])
def test_augmentation_is_as_strong_as_the_recipe_says(alike, strength):
    """As strong as `augment` by itself; at a thousandth hardly anything is left of it but flips."""
    seen = alike.see(alike.recipe, AUGMENT=strength, EPOCHS=6)
    torch.manual_seed(1)
    pets = alike.train_pets
    some = [augment(pets.images, pets.masks, strength)[0] for _ in range(8)]
    plain = as_input(pets.images[:1])

    def moved(images: Tensor) -> float:
        off = [(images - x).abs().mean((1, 2, 3)) for x in (plain, plain.flip(-1))]
        return torch.stack(off).amin(0).mean().item()

    found = moved(torch.cat([step.images for step in seen.steps]))
    expected = moved(as_input(torch.cat(some)))
    assert abs(found - expected) < 0.3 * expected + 0.01, (
        f"expected images changed as AUGMENT {strength} says, by {expected:.3f} on average, "
        f"found {found:.3f}"
    )


def test_every_seed_and_every_epoch_draws_its_own(drawn):
    drawn_by = {}
    for seed in range(drawn.recipe.SEED, drawn.recipe.SEED + 3):
        seen = drawn.see(drawn.recipe, SEED=seed, AUGMENT=0.0, EPOCHS=4)
        steps = len(seen.steps) // 4
        for epoch in range(4):
            some = seen.steps[epoch * steps :][:steps]
            order = tuple(i for step in some for i in shown(step, drawn))
            drawn_by.setdefault(order, []).append(f"epoch {epoch + 1} of seed {seed}")
    twice = [places for places in drawn_by.values() if len(places) > 1]
    assert not twice, (
        f"expected other batches for every seed and epoch, found the same in {twice[0]}"
    )


@pytest.mark.parametrize("augmented", [1.0, 0.0])
def test_same_seed_gives_the_same_net_and_another_does_not(drawn, augmented):
    recipe = drawn.recipe.but(AUGMENT=augmented)
    seeds = recipe.SEED, recipe.SEED, recipe.SEED + 1
    first, again, other = (drawn.see(recipe, SEED=seed).model for seed in seeds)
    assert same_weights(first, again), "expected the same weights for the same SEED, found others"
    assert not same_weights(first, other), "expected other weights for another SEED, found the same"


# ------------------------------------------------------------------- what is honest


def test_validation_images_teach_nothing(drawn):
    """Not even which epoch is best: a late one by labels that are right, an early one by others."""
    train_pets = drawn.train_pets
    recipe = drawn.recipe.but(AUGMENT=0.0, EPOCHS=6)
    wrong = [train_pets._replace(masks=(train_pets.masks + k) % 3) for k in (1, 2)]
    models = [see(recipe, train_pets, p).model for p in (drawn.valid_pets, train_pets, *wrong)]
    assert all(same_weights(models[0], model) for model in models[1:]), (
        "expected weights that don't depend on the validation images, found others"
    )


def test_training_looks_at_no_other_images(drawn):
    small = drawn.recipe.but(SMALL_EPOCHS=f"1 at {SMALL}", AUGMENT=0.0)
    seen = see(small, drawn.train_pets, drawn.valid_pets)
    full = [p for p in (*seen.steps, *seen.measured) if p.images.shape[-1] != SMALL]
    strangers = sum(-1 in shown(step, drawn) for step in full)
    assert not strangers, f"expected training on training images only, found {strangers} others"


def test_test_images_decide_nothing(drawn):
    """A split file leads to some on the disk, first with true labels, then with others."""
    train_pets, models = drawn.train_pets, []
    for turn in range(3):
        names = [f"Maine_Coon_{i}" for i in range(len(train_pets.names))]
        write_pets(train_pets._replace(names=names, masks=(train_pets.masks + turn) % 3))
        models.append(drawn.see(drawn.recipe, AUGMENT=0.0, EPOCHS=6).model)
    assert all(same_weights(models[0], model) for model in models[1:]), (
        "expected weights that don't depend on the test images, found others"
    )


@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_training_equals_an_uninterrupted_one(drawn, tmp_path, epoch):
    pets, recipe = (drawn.train_pets, drawn.valid_pets), drawn.recipe
    whole, cut, resumed = new_model(), new_model(), new_model(seed=99)
    history = train(whole, *pets, recipe)
    steps = epoch * (len(pets[0].names) // recipe.BATCH_SIZE)
    done = 0

    def pull_the_plug(model: nn.Module, *_: object) -> None:
        nonlocal done
        done += model is cut and model.training
        if done > steps + 1:
            raise ConnectionError("pulled the plug")

    cut.register_forward_pre_hook(pull_the_plug)
    with pytest.raises(ConnectionError):
        train(cut, *pets, recipe, tmp_path / "checkpoint.pt")
    continued = train(resumed, *pets, recipe.but(RESUME=True), tmp_path / "checkpoint.pt")
    for row in (*continued, *history):
        assert row.pop("seconds") > 0, "expected the seconds of every epoch, found none"
    assert continued == history, "expected the same history, found another"
    assert same_weights(resumed, whole), "expected the same weights, found others"


def test_loss_that_is_no_number_is_told(drawn):
    model = new_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="LEARNING_RATE"):
        train(model, drawn.train_pets, drawn.valid_pets, drawn.recipe)


# ------------------------------------------------------------------- files


def test_weights_survive_being_saved(tmp_path):
    model, other = new_model(), new_model(seed=1)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer += 7  # the norms' statistics count as well
    save_weights(tmp_path / "weights.pt", model)
    load_weights(tmp_path / "weights.pt", other)
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    lost = [name for (name, a), b in pairs if not torch.allclose(a, b, rtol=2e-3, atol=1e-4)]
    assert not lost, f"expected all weights to survive, found others in {lost[0]}"
    with pytest.raises(InputError):
        load_weights(tmp_path / "weights.pt", UNet(2, 2))


@pytest.mark.parametrize(("norms", "skips"), [(2, True), (1, True), (2, False)])
def test_run_is_loaded_as_its_recipe_says(drawn, tmp_path, norms, skips):
    random = draw(f"run {norms} {skips}")
    width, depth = random.randint(2, 5), random.choice((2, 3))
    recipe = Recipe(BASE_CHANNELS=width, DEPTH=depth, NORMS=norms, SKIPS=skips)
    model, image = UNet(width, depth, norms=norms, skips=skips), torch.randn(2, 3, 16, 16)
    for _ in range(30):  # until what a norm gives is about 1, else nothing would reach the logits
        model(image)
    save_weights(tmp_path / "weights.pt", model)
    matrices = torch.ones(len(drawn.valid_pets.names), 3, 3, dtype=torch.int64)
    history = [{"epoch": 1, "train_loss": 0.5}]
    said = {"parameters": recipe.model_dump()}
    save_run(tmp_path, said, history, {"valid": (drawn.valid_pets, matrices)})
    loaded, its = load_net(tmp_path)
    found, expected = (net.eval()(image) for net in (loaded, model))
    what = f"the net of NORMS={norms} and SKIPS={skips}"
    assert torch.allclose(found, expected, atol=0.02), f"expected {what} again, found another"
    assert its == recipe, "expected the recipe of the run, found another"


def test_run_folder_holds_what_was_counted(drawn, tmp_path):
    torch.manual_seed(draw("counts").randrange(2**31))
    scored = {
        split: (pets, torch.randint(1, 99, (len(pets.names), 3, 3)))
        for split, pets in (("valid", drawn.valid_pets), ("test", drawn.train_pets))
    }
    history = [{"epoch": epoch, "train_loss": 0.5 / epoch} for epoch in (1, 2)]
    save_run(tmp_path, {"parameters": {}}, history, scored)
    told = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "images.csv").read_text(encoding="utf-8").splitlines()
    columns = [f"{true}_as_{predicted}" for true in CLASSES for predicted in CLASSES]
    rows = list(csv.DictReader(lines))
    for split, (pets, matrices) in scored.items():
        matrix, found = matrices.sum(0), told[split]
        assert found["confusion_matrix"] == matrix.tolist(), (
            "expected the sum of all images' counts, found another"
        )
        assert found["images"] == len(matrices), (
            f"expected the number of {split} images, not others"
        )
        right = matrix.diagonal()
        several = {
            "iou": matrix.sum(0) + matrix.sum(1) - right,
            "dice": matrix.sum(0) + matrix.sum(1),
        }
        accuracy = (right.sum() / matrix.sum()).item()
        assert found["pixel_accuracy"] == pytest.approx(accuracy), (
            f"expected an accuracy of {accuracy:.4f}, found {found['pixel_accuracy']}"
        )
        for name, all_ in several.items():
            expected = dict(
                zip(CLASSES, (right * (1 + (name == "dice")) / all_).tolist(), strict=True)
            )
            assert found[name] == pytest.approx(expected), (
                f"expected an {name} for each class, {expected}, found {found[name]}"
            )
        iou = sum(found["iou"].values()) / 3
        assert found["mean_iou"] == pytest.approx(iou), (
            f"expected the mean IoU {iou}, found another"
        )
        mine = [row for row in rows if row["split"] == split]
        listed = [[int(row[column]) for column in columns] for row in mine]
        assert listed == matrices.flatten(1).tolist(), (
            f"expected each {split} image's counts in images.csv, found others"
        )
        names = [row["name"] for row in mine]
        assert names == list(pets.names), f"expected the {split} images' names, found others"
    assert len(rows) == sum(len(m) for _, m in scored.values()), (
        "expected no other rows, found some"
    )
    lines = (tmp_path / "history.csv").read_text(encoding="utf-8").splitlines()
    kept = [{key: float(text) for key, text in row.items()} for row in csv.DictReader(lines)]
    assert kept == history, f"expected the history in history.csv, found {kept}"
