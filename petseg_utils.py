"""Pet segmentation with a U-Net: the model, and every helper that the notebooks import.

Sections, as data flows: recipe, data, model, shapes, scores, training; none uses a later one.
Letters: B images, N the side of the square images in pixels, b base channels, K = 3 classes. Images
are (B, 3, N, N) uint8, masks (B, N, N) uint8 labels, each an index into `CLASSES`, or `IGNORE`.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

# Rooms below, which nobody has to read to learn about segmentation; what they offer is passed on.
from shapes.doctor import first_fault
from shapes.table import Planned, Step, compare
from shapes.trace import Trace, sizes_of, trace_shapes
from support.checkpoints import identify, resume, save_checkpoint, undone_if_stopped
from support.dataset import check_pairs, find_dataset, open_image, open_pair, read_listed
from support.machine import check_run, count_steps, memory_told, pick_device, usable_cpus
from support.muon import Muon
from support.parameters import InputError, Parameters, check_folder_name, param, read_sides
from support.pictures import COLORS, GREEN, RED, colorize, html_table, plot_grid, plot_unet
from support.runs import ROOT, load_weights, open_run, read_run, save_weights, write_run
from support.safe_files import write_atomically
from support.sample_pets import draw_sample_pets
from support.speed import keep_freed_memory, pick_precision, precision_of, prepare

# What notebooks, experiments and tests use: the module's own, and what rooms below it offer.
# fmt: off
__all__ = [
    "CLASSES", "COLORS", "GREEN", "IGNORE", "IMAGE_FILE", "RED", "ROOT", "TRIMAP_FILE",
    "InputError", "Muon", "Parameters", "Pets", "Recipe", "Step", "Training", "UNet",
    "analyse_shapes", "augment", "breed_of", "check_run", "check_side", "colorize",
    "confusion_matrix", "conv_plus_conv", "count_steps", "diagnose", "draw_sample_pets",
    "epochs", "evaluate", "find_dataset", "hold_out", "html_table", "keep_freed_memory",
    "load_net", "load_pets", "load_weights", "open_image", "open_run", "pick_device",
    "pick_precision", "plan", "plot_grid", "plot_unet", "predict", "read_run", "read_split",
    "run_model", "save_run", "save_weights", "scores", "segmentation_loss", "to_input",
    "trace_shapes", "train", "train_epoch", "validate", "write_atomically",
]
# fmt: on

CLASSES = tuple(COLORS)  # pet, background, border: trimap values 1, 2, 3, shifted by one
IGNORE = 255  # label of pixels that augmentation moved in from outside the photo: no loss, no score


# ------------------------------------------------------------------------------------------- recipe


class Recipe(Parameters):
    """Every parameter of a run: what a learner changes first, then what the experiments vary."""

    # These say where a run reads, computes and writes, not what it trains.
    PLACES: ClassVar[set[str]] = {"DATA_DIR", "DOWNLOAD", "DEVICE", "PHOTO", "RUN_NAME", "RESUME"}

    DATASET: Literal["sample", "oxford"] = param("sample", '"sample" (drawn) or "oxford" (real)')
    DATA_DIR: str = param("data", "folder that holds oxford-iiit-pet", min_length=1)
    IMAGE_SIZE: int = param(64, "side of the images in pixels; divisible by 2**DEPTH", 8, 1024)
    BASE_CHANNELS: int = param(16, "channels of the first level (the course's net has 32)", 1, 256)
    EPOCHS: int = param(6, "passes over the training images", 1, 1000)
    LEARNING_RATE: float = param(1e-2, "the rate, at its peak", gt=0, most=1)
    PHOTO: str = param("", 'image file to try the net on; "" takes the one that scikit-image ships')
    RUN_NAME: str = param("default", "results go to runs/RUN_NAME (papermill: beside its output)")

    DOWNLOAD: bool = param(False, "download the real dataset (about 800 MB) into DATA_DIR")
    LIMIT: int = param(0, "use only this many images of each split; 0 uses all", 0)
    HOLD_OUT: float = param(0.1, "share of each breed in trainval to validate by", gt=0, lt=1)
    SCORE_SIZE: int = param(0, "side of the masks that are scored; 0 takes IMAGE_SIZE", 0, 1024)
    MASK_RESIZE: Literal["nearest", "bilinear"] = param("nearest", 'or "bilinear", a mistake')
    DEPTH: int = param(5, "levels down, and up again", 2, 7)
    NORMS: int = param(2, "BatchNorms in each conv_plus_conv", 1, 2)
    SKIPS: bool = param(True, "False replaces what the skip connections carry by zeros")
    SMALL_EPOCHS: str = param("", 'first EPOCHS at smaller sides, like "2 at 64, 3 at 128"')
    BATCH_SIZE: int = param(16, "images in one training step", 2, 1024)
    MUON: bool = param(True, "train with Muon; False trains with AdamW")
    LINEAR_DECAY: bool = param(True, "the rate warms up, then falls to 0; False: it is constant")
    WEIGHT_DECAY: float = param(0.01, "how much each step shrinks the weights", 0, 1)
    DICE_WEIGHT: float = param(0.5, "weight of the Dice loss beside cross-entropy", 0, 100)
    AVERAGE: bool = param(True, "keep a moving average of the weights; False keeps the last ones")
    AUGMENT: float = param(1.0, "how much to move and recolour training images; 0 for none", 0, 1)
    FLIP: bool = param(False, "average the predictions for an image and its mirror image")
    SEED: int = param(0, "of weights, held-out images, batches and augmentation", 0, lt=2**31)
    DEVICE: Literal["auto", "cpu", "cuda", "mps"] = param("auto", '"auto", "cpu", "cuda" or "mps"')
    PRECISION: Literal["auto", "float32", "bfloat16"] = param("auto", '"float32" or "bfloat16"')
    RESUME: bool = param(False, "go on from the run's checkpoint, if there is one")

    @model_validator(mode="after")
    def fits_together(self) -> Self:
        """Check what no single bound can say."""
        check_folder_name(self.RUN_NAME, "RUN_NAME")
        for name, least in (("LIMIT", 50), ("SCORE_SIZE", 8)):
            if 0 < (value := getattr(self, name)) < least:
                raise InputError(f"{name} should be 0 or at least {least}, not {value}.")
        small = self.small_sides
        for side in {*small, self.IMAGE_SIZE}:
            check_side(side, self.DEPTH)
        if len(small) >= self.EPOCHS or max(small, default=0) > self.IMAGE_SIZE:
            wanted = f"name fewer epochs than {self.EPOCHS}, at sides up to {self.IMAGE_SIZE}"
            why = "the last epochs train at IMAGE_SIZE, which is scored"
            raise InputError(f"SMALL_EPOCHS should {wanted}, not {self.SMALL_EPOCHS!r}: {why}.")
        return self

    @property
    def small_sides(self) -> list[int]:
        """The side of each of the first epochs, those of SMALL_EPOCHS. Errors: `InputError`."""
        return read_sides("SMALL_EPOCHS", self.SMALL_EPOCHS)


def check_side(side: int, depth: int) -> None:
    """Raise `InputError`, naming sides that work, unless a U-Net can halve `side` so often."""
    stride = 2**depth
    if side % stride:
        below = side // stride * stride
        sides = f"{below} or {below + stride}" if below else stride
        how = f"halves the image side {depth} times, but {side} is no multiple of {stride}"
        raise InputError(f"a U-Net of depth {depth} {how}: make it {sides}.")


# --------------------------------------------------------------------------------------------- data

IMAGE_FILE, TRIMAP_FILE = "images/{}.jpg", "annotations/trimaps/{}.png"


class Pets(NamedTuple):
    """A split in memory; masks that are only scored may have another side than the images."""

    names: list[str]  # B of them
    images: Tensor  # (B, 3, N, N) uint8
    masks: Tensor  # (B, N, N) uint8 labels
    folder: Path = Path()  # of the dataset, to load the images again at another side


def breed_of(name: str) -> str:
    """Return the breed in an image's name: 'Maine_Coon_12' -> 'Maine_Coon', with C for cats."""
    return name.rpartition("_")[0]


def files_of(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the paths of an image and of its trimap, by the image's name."""
    return folder / IMAGE_FILE.format(name), folder / TRIMAP_FILE.format(name)


def read_split(folder: Path, split: str, limit: int = 0, seed: int = 0) -> list[str]:
    """Return the image names of a split ('trainval' or 'test'), sorted: all, or `limit` drawn.

    The split file decides, not the folder: the real one holds pictures that no split lists.
    Errors: `InputError` for a split file without names, a name that the other split has, too,
    and a name without image or trimap.
    """
    names = read_listed(folder, split, (IMAGE_FILE, TRIMAP_FILE))
    drawn = np.random.default_rng(seed).permutation(names).tolist()
    return sorted(drawn[: limit or None])


def hold_out(names: list[str], fraction: float = 0.1, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split names in two, stratified by breed: (the rest, about `fraction` of each breed).

    At least one image of a breed goes to either side; a breed's only image stays in the rest.
    """
    random = np.random.default_rng(seed)
    held = set()
    for breed in sorted({breed_of(name) for name in names}):
        members = sorted(name for name in names if breed_of(name) == breed)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.update(random.permutation(members)[:count].tolist())
    return [name for name in names if name not in held], [name for name in names if name in held]


@memory_told()
def load_pets(
    folder: Path,
    names: list[str],
    side: int,
    title: str = "images",
    *,
    mask_side: int = 0,
    resize: str = "nearest",
) -> Pets:
    """Decode every image and trimap once, in parallel, into memory.

    `mask_side` is `side` unless given. `resize` "bilinear" makes the mistake of mixing labels, to
    show its price. Errors: `InputError`.
    """
    mask_side = mask_side or side
    images = torch.empty(len(names), 3, side, side, dtype=torch.uint8)
    masks = torch.empty(len(names), mask_side, mask_side, dtype=torch.uint8)

    def fill(index: int) -> None:
        image, trimap = open_pair(*files_of(folder, names[index]))
        # Pillow's bilinear filter is antialiased. A trimap's values are names, not amounts, and
        # must never be mixed.
        image = image.resize((side, side), Image.Resampling.BILINEAR)
        trimap = trimap.resize((mask_side, mask_side), Image.Resampling[resize.upper()])
        images[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        masks[index] = torch.from_numpy(np.array(trimap)) - 1  # 1, 2, 3 -> 0, 1, 2

    try:
        with ThreadPoolExecutor(usable_cpus()) as pool:
            list(tqdm(pool.map(fill, range(len(names))), title, len(names), leave=False))
    except InputError:  # one is bad: tell of all at once, of both splits
        every = chain(names, *(read_split(folder, split) for split in ("trainval", "test")))
        check_pairs([files_of(folder, name) for name in dict.fromkeys(every)])
        raise
    return Pets(names, images, masks, folder)


def augment(images: Tensor, masks: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Flip, move and recolour each image of a batch, and move its mask along, on their device.

    Half of the images are mirrored. `strength` scales the rest: turns of up to 10 degrees, shifts
    of up to 5 % of the side, sizes from 80 to 125 %, colours as in `recolour`. Pixels from outside
    the photo are grey, labelled `IGNORE`. Shapes and dtypes stay. All is drawn by torch's global
    generator, on the CPU, so that a resumed run draws the same.
    """
    count = len(images)
    mirror = 1 - 2 * torch.randint(2, (count,))
    angle = torch.empty(count).uniform_(-10, 10).deg2rad() * strength
    size = 1 + torch.empty(count).uniform_(-0.2, 0.25) * strength
    shift = torch.empty(count, 2, 1).uniform_(-0.1, 0.1) * strength  # from -1 to 1 is a side
    cos, sin = angle.cos() / size, angle.sin() / size
    turn = torch.stack([mirror * cos, mirror * sin, -sin, cos], dim=1).view(count, 2, 2)
    # Where in the photo, from -1 to 1, each pixel of the result comes from: (B, N, N, 2).
    source = torch.cat([turn, turn @ shift], dim=2).to(images.device)
    grid = F.affine_grid(source, list(images.shape), align_corners=False)

    def move(pixels: Tensor, outside: int, mode: str) -> Tensor:
        moved = F.grid_sample(pixels.float() - outside, grid, mode, align_corners=False)
        return moved + outside  # for grid_sample fills with zeros

    moved = recolour(move(images, 127, "bilinear"), strength)
    labels = move(masks.unsqueeze(1), IGNORE, "nearest").squeeze(1)  # labels must never be mixed
    return moved.to(images.dtype), labels.to(masks.dtype)


def recolour(images: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of images (B, 3, N, N), each by up to 20 %."""
    factors = 1 + torch.empty(3, len(images), 1, 1, 1).uniform_(-0.2, 0.2) * strength
    brightness, contrast, saturation = factors.to(images.device)
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # of luma, ITU-R BT.601
    grey = (weights * images).sum(dim=1, keepdim=True)  # (B, 1, N, N)
    images = torch.lerp(grey, images, saturation)
    images = torch.lerp(grey.mean(dim=(2, 3), keepdim=True), images, contrast)
    return images.mul_(brightness).round_().clamp_(0, 255)


# -------------------------------------------------------------------------------------------- model


def conv_plus_conv(in_channels: int, out_channels: int, norms: int = 2) -> nn.Sequential:
    """Return (3 x 3 convolution, BatchNorm, LeakyReLU) twice: (B, in, H, W) -> (B, out, H, W).

    With `norms` 1 the second BatchNorm is left out. Activating in place spares a copy of the
    largest tensors.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels) if norms == 2 else nn.Identity(),
        nn.LeakyReLU(0.2, inplace=True),
    )


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) as the course draws it: (B, 3, N, N) -> (B, K, N, N) logits.

    Going down, every level halves the side and doubles the channels. Going up, every level doubles
    the side again and concatenates the skip: the tensor of the same side that was kept on the way
    down. To see what they are worth, `norms` 1 leaves out every second BatchNorm, and `skips` False
    replaces the skips by zeros.
    """

    def __init__(
        self,
        base_channels: int = 32,
        depth: int = 5,
        num_classes: int = 3,
        *,
        norms: int = 2,
        skips: bool = True,
    ) -> None:
        super().__init__()
        self.base_channels, self.depth, self.num_classes = base_channels, depth, num_classes
        self.norms, self.skips = norms, skips
        channels = [base_channels * 2**level for level in range(depth)]  # b, 2b, 4b, ...
        self.downs = nn.ModuleList(map(conv_plus_conv, [3, *channels], channels, repeat(norms)))
        self.bottleneck = conv_plus_conv(channels[-1], channels[-1], norms)
        # The upsampled tensor and the skip have c channels each: together 2c go in. As many come
        # out as the level above keeps; the top level gives b.
        inputs = [2 * c for c in reversed(channels)]
        outputs = [*channels[-2::-1], base_channels]
        self.ups = nn.ModuleList(map(conv_plus_conv, inputs, outputs, repeat(norms)))
        self.out = nn.Conv2d(base_channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K, N, N) for images (B, 3, N, N). Errors: as in `check_side`."""
        for side in x.shape[-2:]:
            check_side(side, self.depth)
        kept = []
        for down in self.downs:
            x = down(x)
            kept.append(x if self.skips else torch.zeros_like(x))
            x = F.max_pool2d(x, kernel_size=2)  # (B, c, n, n) -> (B, c, n/2, n/2)
        x = self.bottleneck(x)
        for up in self.ups:
            x = F.interpolate(x, scale_factor=2)  # (B, c, n, n) -> (B, c, 2n, 2n), nearest
            x = torch.cat((x, kept.pop()), dim=1)  # (B, c, n, n) twice -> (B, 2c, n, n)
            x = up(x)  # (B, 2c, n, n) -> (B, c/2, n, n); at the top (B, c, n, n)
        return self.out(x)


# ------------------------------------------------------------------------------------------- shapes


def plan(side: int, base_channels: int, depth: int, num_classes: int) -> Iterator[Planned]:
    """Yield every operation of the forward pass: step, level, kind, kernel and what it gives."""

    def planned(step: str, level: int, kind: str, channels: int, kernel: int = 0) -> Planned:
        return Planned(step, level, kind, kernel, (channels, side / 2**level))

    def block(step: str, level: int, channels: int) -> list[Planned]:  # a `conv_plus_conv`
        return [planned(step, level, "convolution", channels, kernel=3)] * 2

    b = base_channels
    for level in range(depth):
        yield from block(f"down{level + 1}", level, b * 2**level)
        yield planned(f"pool{level + 1}", level + 1, "pooling", b * 2**level)
    yield from block("bottleneck", depth, b * 2 ** (depth - 1))
    for level in reversed(range(depth)):
        yield planned(f"upsample{level + 1}", level, "upsampling", b * 2**level)
        yield planned(f"concat{level + 1}", level, "concatenation", 2 * b * 2**level)
        yield from block(f"up{level + 1}", level, b * 2 ** max(level - 1, 0))
    yield planned("out", 0, "convolution", num_classes, kernel=1)


def plan_and_trace(model: nn.Module, side: int, sizes: dict[str, int]) -> tuple[list, Trace]:
    """Return the plan of a net by `sizes`, or else as it looks, and what its forward pass did."""
    traced = trace_shapes(model, side)
    return list(plan(side, **sizes_of(model, traced) | sizes)), traced


def analyse_shapes(model: nn.Module, side: int, **sizes: int) -> list[Step]:
    """Return a `Step` for each step of the forward pass, predicted by formula and traced.

    `sizes` may say base_channels, depth and num_classes. A net that is no U-Net of this plan has
    its traced operations as steps, without a prediction.
    """
    return compare(*plan_and_trace(model, side, sizes), model)


def diagnose(model: nn.Module, side: int, **sizes: int) -> str:
    """Say in a sentence where a net first parts from the plan, and why; "" if it doesn't.

    `sizes` are those of `analyse_shapes`.
    """
    return first_fault(*plan_and_trace(model, side, sizes))


# ------------------------------------------------------------------------------------------- scores


def confusion_matrix(predicted: Tensor, truth: Tensor) -> Tensor:
    """Count pixels by class: (K, K) int64, rows the truth and columns the prediction.

    Both tensors hold uint8 labels in the same shape, of one image or of many. Pixels `IGNORE`
    don't count.
    """
    known = truth != IGNORE
    # From 0 to 8: fits uint8, and spares large int64 copies.
    pairs = truth[known] * len(CLASSES) + predicted[known]
    return torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), len(CLASSES))


def scores(matrix: Tensor) -> dict:
    """Derive every score from one confusion matrix: each pixel weighs the same, whatever its batch.

    `pixel_accuracy` is the share of the diagonal; per class, with true positives TP, false
    positives FP and false negatives FN, `iou` is TP / (TP + FP + FN) and `dice` is 2 TP / (2 TP +
    FP + FN). A class that neither occurs nor is predicted has no score (None) and stays out of
    `mean_iou`. Errors: `InputError` if nothing was counted.
    """
    if not matrix.any():
        raise InputError("there are no pixels to score: use a split that has images, with labels.")
    right = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - right
    iou = [int(tp) / int(all_) if all_ else None for tp, all_ in zip(right, union, strict=True)]
    dice = [None if value is None else 2 * value / (1 + value) for value in iou]
    present = [value for value in iou if value is not None]
    return {
        "pixel_accuracy": int(right.sum()) / int(matrix.sum()),
        "mean_iou": sum(present) / len(present),
        "iou": dict(zip(CLASSES, iou, strict=True)),
        "dice": dict(zip(CLASSES, dice, strict=True)),
        "confusion_matrix": matrix.tolist(),
    }


def save_run(
    folder: Path, metrics: dict, history: list[dict], scored: dict[str, tuple[Pets, Tensor]]
) -> None:
    """Write a run's results: its history, the counts of every image, and `metrics.json` last.

    `scored` has the images of a split and what `evaluate` counted, (B, K, K), by the split's name.
    """
    splits, images = {}, []
    pairs = [f"{true}_as_{predicted}" for true in CLASSES for predicted in CLASSES]
    for split, (pets, matrices) in scored.items():
        splits[split] = {**scores(matrices.sum(0)), "images": len(matrices)}
        for name, matrix in zip(pets.names, matrices, strict=True):
            counts = dict(zip(pairs, matrix.flatten().tolist(), strict=True))
            images.append({"split": split, "name": name, "breed": breed_of(name), **counts})
    write_run(folder, {**metrics, **splits}, history, images)


def load_net(folder: Path) -> tuple[UNet, Recipe]:
    """Return the trained net of a run and the recipe it was trained by. Errors: `InputError`."""
    recipe = Recipe(**read_run(folder)["parameters"])
    model = UNet(recipe.BASE_CHANNELS, recipe.DEPTH, norms=recipe.NORMS, skips=recipe.SKIPS)
    load_weights(folder / "weights.pt", model)
    return model, recipe


# ----------------------------------------------------------------------------------------- training


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Return uint8 images (B, 3, N, N) as the model's input: float32 in -1 to 1, on `device`."""
    return images.to(device).float() / 127.5 - 1


def run_model(model: nn.Module, images: Tensor, precision: torch.dtype) -> Tensor:
    """Return float32 logits (B, K, N, N) of uint8 images, computed in `precision` where it lies."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        return model(to_input(images, device)).float()


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Tensor,
    precision: torch.dtype,
    *,
    size: tuple[int, int] | None = None,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the most probable label of every pixel and its probability, in batches of 32.

    Shapes: images (B, 3, N, N); labels (B, H, W) uint8 and probabilities (B, H, W) float32. The
    logits are brought to `size` (H, W), that of the images unless given, bilinearly. `flip`
    averages the probabilities with those of the mirrored images.
    """
    size = tuple(size or images.shape[2:])
    model.eval()

    def probabilities(batch: Tensor) -> Tensor:  # (B, K, H, W)
        logits = run_model(model, batch, precision)
        return F.interpolate(logits, size, mode="bilinear").softmax(dim=1)

    labels = torch.empty(len(images), *size, dtype=torch.uint8)
    confidences = torch.empty(len(images), *size)
    delay = 2 if len(images) > 32 else math.inf
    for start in tqdm(range(0, len(images), 32), "predict", delay=delay, leave=False):
        part = slice(start, start + 32)
        likely = probabilities(images[part])
        if flip:
            likely = (likely + probabilities(images[part].flip(3)).flip(3)) / 2
        confidences[part], labels[part] = likely.max(dim=1)
    return labels, confidences


@memory_told()
def evaluate(model: nn.Module, pets: Pets, precision: torch.dtype, *, flip: bool = False) -> Tensor:
    """Return the confusion matrix of every image of `pets`, (B, K, K) int64.

    Batches are counted and forgotten: the predictions for the test split at 1,024 px take 19 GB.
    """
    keep_freed_memory()
    matrices = [torch.zeros(0, len(CLASSES), len(CLASSES), dtype=torch.int64)]
    batches = list(zip(pets.images.split(32), pets.masks.split(32), strict=True))
    for images, masks in tqdm(batches, "score", delay=2, leave=False):
        labels, _ = predict(model, images, precision, size=masks.shape[1:], flip=flip)
        matrices += [confusion_matrix(*pair)[None] for pair in zip(labels, masks, strict=True)]
    return torch.cat(matrices)


def segmentation_loss(logits: Tensor, masks: Tensor, dice_weight: float = 0.5) -> Tensor:
    """Return cross-entropy plus `dice_weight` times soft Dice loss (Milletari et al. 2016).

    Shapes: logits (B, K, N, N), masks (B, N, N) int64, result (). Cross-entropy scores pixels one
    by one; Dice scores the overlap of whole classes, so the narrow border counts as much as the
    wide background. `IGNORE` doesn't count.
    """
    cross_entropy = F.cross_entropy(logits, masks, ignore_index=IGNORE)
    known = (masks != IGNORE).unsqueeze(1)  # (B, 1, N, N)
    labels = masks.where(masks != IGNORE, 0)
    truth = F.one_hot(labels, logits.shape[1]).permute(0, 3, 1, 2) * known  # (B, K, N, N)
    probabilities = logits.softmax(dim=1) * known
    overlap = (probabilities * truth).sum(dim=(0, 2, 3))  # (K,)
    total = (probabilities + truth).sum(dim=(0, 2, 3))
    return cross_entropy + dice_weight * (1 - ((2 * overlap + 1) / (total + 1)).mean())


class Training(NamedTuple):
    """All that changes during a training, and so what a checkpoint holds, beside the history."""

    model: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, total_steps: int) -> Self:
        """Return the model with its average, its optimiser and the schedule of the rate."""
        options = {"lr": recipe.LEARNING_RATE, "weight_decay": recipe.WEIGHT_DECAY}
        if recipe.MUON:
            optimizer = Muon(model.parameters(), **options, precision=precision_of(model, recipe))
        else:
            optimizer = torch.optim.AdamW(model.parameters(), **options, fused=True)

        def share_of_peak(step: int) -> float:  # rises over a tenth of the steps, then falls to 0
            done = (step + 1) / (total_steps + 1)
            return min(done / 0.1, (1 - done) / 0.9) if recipe.LINEAR_DECAY else 1

        def moving_average(averages: list[Tensor], currents: list[Tensor], updates: int) -> None:
            longest = 0.99 if recipe.AVERAGE else 0
            decay = min(longest, (1 + int(updates)) / (10 + int(updates)))  # soon forgets the start
            for average, current in zip(averages, currents, strict=True):
                average.lerp_(current, 1 - decay)

        average = AveragedModel(model, multi_avg_fn=moving_average)
        return cls(model, average, optimizer, LambdaLR(optimizer, share_of_peak))


@memory_told()
def train(
    model: nn.Module,
    train_pets: Pets,
    valid_pets: Pets,
    recipe: Recipe,
    checkpoint: Path | None = None,
) -> list[dict]:
    """Train `model` in place, on its device, by `recipe`; return the history, a dict per epoch.

    What is validated, and is in `model` at the end, is the moving average of the weights. After
    every epoch the state goes to `checkpoint`; with RESUME training goes on from there, on a CPU
    exactly as if never interrupted. So it does without RESUME if the same call was interrupted.
    Errors: `InputError` for too few images, a loss that is no number, a full disk, a checkpoint
    that is damaged or of another training, and an interrupt.
    """
    check_run(recipe, train=train_pets.names, valid=valid_pets.names)
    prepare(model, recipe)
    identity = identify(model, train_pets, valid_pets, recipe)
    steps = recipe.EPOCHS * count_steps(len(train_pets.names), recipe.BATCH_SIZE)
    history: list[dict] = []
    with undone_if_stopped(model, recipe, checkpoint, history):
        training = Training.start(model, recipe, steps)
        if checkpoint and checkpoint.exists():
            go_on = recipe.RESUME or getattr(model, "interrupted", None) == recipe
            history += resume(checkpoint, training._asdict(), identity, go_on)
        for row in epochs(training, train_pets, valid_pets, recipe, len(history)):
            history.append(row)
            if checkpoint:
                save_checkpoint(checkpoint, training._asdict(), identity, history)
        model.load_state_dict(training.average.module.state_dict())
    return history


def epochs(
    training: Training, train_pets: Pets, valid_pets: Pets, recipe: Recipe, done: int
) -> Iterator[dict]:
    """Train the epochs that are not done yet, and yield a row of the history after each."""
    steps = count_steps(len(train_pets.names), recipe.BATCH_SIZE)
    sides = recipe.small_sides + [recipe.IMAGE_SIZE] * (recipe.EPOCHS - len(recipe.small_sides))

    @lru_cache(maxsize=1)
    def at_side(side: int) -> tuple[Pets, Pets]:
        if side == recipe.IMAGE_SIZE:
            return train_pets, valid_pets
        smaller = load_pets(train_pets.folder, train_pets.names, side, resize=recipe.MASK_RESIZE)
        held_out = load_pets(valid_pets.folder, valid_pets.names, side)
        return smaller, held_out._replace(masks=valid_pets.masks)

    with tqdm(total=recipe.EPOCHS * steps, initial=done * steps, mininterval=1, leave=False) as bar:
        for epoch, side in list(enumerate(sides, 1))[done:]:
            bar.set_description(f"epoch {epoch}/{recipe.EPOCHS}")
            # By the epoch, so that a resumed run draws the same; no two seeds share an epoch's.
            torch.manual_seed(recipe.SEED * 100_003 + epoch)
            seen, held_out = at_side(side)
            start = time.perf_counter()
            loss = train_epoch(training, seen, recipe, bar)
            seconds = time.perf_counter() - start
            accuracy, iou = validate(training.average.module, seen, held_out, recipe)
            bar.set_postfix({"loss": f"{loss:.3f}", "valid accuracy": f"{accuracy:.3f}"})
            yield {
                "epoch": epoch,
                "train_loss": loss,
                "valid_pixel_accuracy": accuracy,
                "valid_mean_iou": iou,
                "seconds": seconds,
            }


def train_epoch(training: Training, pets: Pets, recipe: Recipe, bar: tqdm) -> float:
    """Pass over the images once, in random batches, and return the mean loss."""
    model, average, optimizer, schedule = training
    device, precision = next(model.parameters()).device, precision_of(model, recipe)
    model.train()
    losses = []
    for batch in torch.randperm(len(pets.names)).split(recipe.BATCH_SIZE):
        if len(batch) < recipe.BATCH_SIZE:
            break  # a smaller batch would upset BatchNorm
        images, masks = pets.images[batch].to(device), pets.masks[batch].to(device)
        if recipe.AUGMENT:
            images, masks = augment(images, masks, recipe.AUGMENT)  # (B, 3, N, N), (B, N, N)
        logits = run_model(model, images, precision)  # (B, K, N, N)
        loss = segmentation_loss(logits, masks.long(), recipe.DICE_WEIGHT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.detach())  # not read yet: a GPU would have to wait for it in each step
        bar.update()
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):
        what = "make LEARNING_RATE smaller and train again"
        raise InputError(f"the loss is no longer a number: {what}.")
    return mean


def validate(
    model: nn.Module, train_pets: Pets, valid_pets: Pets, recipe: Recipe
) -> tuple[float, float]:
    """Return pixel accuracy and mean IoU of averaged weights, with BatchNorm statistics anew.

    In training no batch went through the averaged weights, so their running means and variances
    are those of other weights. They are measured on at most ten batches of training images.
    """
    device, precision = next(model.parameters()).device, precision_of(model, recipe)
    some = train_pets.images[:: math.ceil(len(train_pets.images) / (10 * recipe.BATCH_SIZE))]
    batches = [batch for batch in some.split(recipe.BATCH_SIZE) if len(batch) == recipe.BATCH_SIZE]
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        update_bn((to_input(batch, device) for batch in batches), model)
    result = scores(evaluate(model, valid_pets, precision).sum(0))
    return result["pixel_accuracy"], result["mean_iou"]
