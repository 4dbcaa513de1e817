"""Pet segmentation with a U-Net: everything that notebooks/pet_segmentation.ipynb imports, in the order data flows.

Sections: parameters, data, model, shapes, training, scores, plots, run folder. Nothing here knows of the notebook.
Dimensions: N images, C channels, H = W = S the side of the square images in pixels, K = 3 classes; `b` is
`base_channels`. Images are (N, 3, S, S) uint8; masks are (N, S, S) uint8 labels, an index into `CLASSES` or `IGNORE`.
"""

import csv
import ctypes
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from decimal import ROUND_FLOOR, Decimal
from itertools import cycle, repeat
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torchvision import tv_tensors
from torchvision.datasets import OxfordIIITPet
from torchvision.transforms import v2
from tqdm import tqdm

from sample_pets import draw_sample_pets as draw_sample_pets  # the stand-in dataset, in a file of its own

ROOT = Path(__file__).resolve().parent
CLASSES = ("pet", "background", "border")  # trimap values 1, 2, 3, shifted by one
COLORS = ("#E69F00", "#0072B2", "#1A1A1A")  # one per class, from Okabe and Ito's palette for colour-blind readers
IGNORE = 255  # label of pixels that augmentation moved in from outside the photo: no loss, no score


class InputError(ValueError):
    """A mistake a user can make, told in one sentence: what is wrong, where, and what to do."""

    def _render_traceback_(self) -> list[str]:
        """Let Jupyter and papermill show the sentence alone: the stack would only hide it."""
        return [f"InputError: {self}"]


# --------------------------------------------------------------------------------------------------- parameters

# name: (type, is the value allowed?, what is allowed, in words)
PARAMETERS: dict[str, tuple[type, Callable[..., bool], str]] = {
    "DATASET": (str, lambda v: v in ("sample", "oxford"), "'sample' or 'oxford'"),
    "DATA_DIR": (str, bool, "a folder's path"),
    "DOWNLOAD": (bool, lambda v: True, "True or False"),
    "LIMIT": (int, lambda v: v == 0 or v >= 50, "0 (all images) or a whole number from 50"),
    "IMAGE_SIZE": (int, lambda v: 8 <= v <= 1024, "a whole number from 8 to 1024"),
    "SCORE_SIZE": (int, lambda v: v == 0 or 8 <= v <= 1024, "0 (IMAGE_SIZE) or a whole number from 8 to 1024"),
    "MASK_RESIZE": (str, lambda v: v in ("nearest", "bilinear"), "'nearest' or 'bilinear'"),
    "BASE_CHANNELS": (int, lambda v: 1 <= v <= 256, "a whole number from 1 to 256"),
    "DEPTH": (int, lambda v: 2 <= v <= 7, "a whole number from 2 to 7"),
    "NORMS": (int, lambda v: v in (1, 2), "1 or 2"),
    "SKIPS": (bool, lambda v: True, "True or False"),
    "EPOCHS": (int, lambda v: 1 <= v <= 1000, "a whole number from 1 to 1000"),
    "SMALL_EPOCHS": (int, lambda v: 0 <= v <= 1000, "a whole number from 0, below EPOCHS"),
    "BATCH_SIZE": (int, lambda v: 2 <= v <= 1024, "a whole number from 2 to 1024"),
    "MUON": (bool, lambda v: True, "True or False"),
    "LEARNING_RATE": (float, lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "ONE_CYCLE": (bool, lambda v: True, "True or False"),
    "WEIGHT_DECAY": (float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "DICE_WEIGHT": (float, lambda v: 0 <= v <= 100, "a number from 0 to 100"),
    "AVERAGE": (bool, lambda v: True, "True or False"),
    "AUGMENT": (bool, lambda v: True, "True or False"),
    "FLIP": (bool, lambda v: True, "True or False"),
    "SEED": (int, lambda v: 0 <= v < 2**31, "a whole number from 0 to 2147483647"),
    "DEVICE": (str, lambda v: v in ("auto", "cpu", "cuda", "mps"), "'auto', 'cpu', 'cuda' or 'mps'"),
    "PRECISION": (str, lambda v: v in ("auto", "float32", "bfloat16"), "'auto', 'float32' or 'bfloat16'"),
    "PHOTO": (str, lambda v: True, "an image file's path, or '' for the photo that scikit-image ships"),
    "RUN_NAME": (str, lambda v: re.fullmatch(r"\w[\w.+-]{0,99}", v), "a folder name of letters, digits and _ . + -"),
    "RESUME": (bool, lambda v: True, "True or False"),
}


def check_parameters(given: dict) -> dict:
    """Return `given` if every parameter is known, typed and in range; else raise `InputError` with one sentence."""
    for name, value in given.items():
        if name not in PARAMETERS:
            raise InputError(f"there is no parameter {name}: the parameters are {', '.join(PARAMETERS)}.")
        wanted, allowed, words = PARAMETERS[name]
        number = wanted is float and type(value) is int  # 1 is a fine learning rate, True is not
        if not (type(value) is wanted or number) or not allowed(value):
            raise InputError(f"{name} must be {words}, not {value!r}.")
    check_side(given["IMAGE_SIZE"], given["DEPTH"])
    if given["SMALL_EPOCHS"]:
        if given["SMALL_EPOCHS"] >= given["EPOCHS"]:
            raise InputError(f"SMALL_EPOCHS must be below EPOCHS, {given['EPOCHS']}, not {given['SMALL_EPOCHS']}: "
                             "a net is good only at sizes it was trained on.")  # fmt: skip
        check_half(given["IMAGE_SIZE"], given["DEPTH"])
    pick_device(given["DEVICE"])
    if given["PHOTO"]:
        if not locate(given["PHOTO"]).is_file():
            raise InputError(
                f"there is no photo {locate(given['PHOTO'])}: set PHOTO to an image file's path, or to ''."
            )
        open_photo(locate(given["PHOTO"]))
    if given["RESUME"]:
        require_checkpoint(ROOT / "runs" / given["RUN_NAME"] / "checkpoint.pt")
    return given


def locate(path: str | Path) -> Path:
    """Return `path` made absolute: a relative one counts from the project's root, or else from the current folder."""
    here = Path.cwd() / path
    return (here if here.exists() and not (ROOT / path).exists() else ROOT / path).resolve()


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch device called `name`; 'auto' takes CUDA, then MPS, then the CPU. Errors: `InputError`."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available.get(name):
        usable = " or ".join(repr(kind) for kind, is_usable in available.items() if is_usable)
        raise InputError(f"this machine has no device {name!r}: set DEVICE to {usable}, or to 'auto'.")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in; 'auto' takes bfloat16 only where the processor multiplies it in hardware.

    Without such units, bfloat16 is emulated: an AVX2 processor was eight times slower with it than with float32. (On
    CUDA, PyTorch computes convolutions of float32 in TF32.)
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = any(features.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


# --------------------------------------------------------------------------------------------------- data


class Pets(NamedTuple):
    """A split in memory: `names` of N images, `images` (N, 3, S, S) uint8 and `masks` (N, S, S) uint8 labels.

    Masks that are only scored against may have another side than the images.
    """

    names: list[str]
    images: Tensor
    masks: Tensor


def breed_of(name: str) -> str:
    """Return the breed in an image's name: 'Maine_Coon_12' -> 'Maine_Coon'. Cat breeds start with a capital."""
    return name.rpartition("_")[0]


def find_dataset(data_dir: str | Path, download: bool = False) -> Path:
    """Return the dataset's folder, `data_dir`/oxford-iiit-pet, after downloading it if asked (some 800 MB).

    Errors: `InputError` if it is not there, or the download fails.
    """
    folder = locate(data_dir)
    if download:
        try:
            OxfordIIITPet(folder, download=True)
        except (OSError, RuntimeError) as error:
            message = f"the download into {folder} failed ({error}): check the network, or put the dataset there."
            raise InputError(message) from None
    if not (folder / "oxford-iiit-pet").is_dir():
        raise InputError(
            f"there is no dataset at {folder / 'oxford-iiit-pet'}: set DATA_DIR to the folder that holds "
            "oxford-iiit-pet, or DOWNLOAD to True."
        )
    return folder / "oxford-iiit-pet"


def read_split(folder: Path, split: str, limit: int = 0, seed: int = 0) -> list[str]:
    """Return the image names of a split ('trainval' or 'test'), all or `limit` of them drawn by `seed`, sorted.

    The split file rules, not the folder: the real one holds pictures that no split lists. Errors: `InputError` if
    the split file is missing or empty, or if a name lacks its image or its trimap.
    """
    path = folder / "annotations" / f"{split}.txt"
    if not path.is_file():
        raise InputError(f"the dataset lacks {path}: extract its annotations again.")
    names = [line.split()[0] for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
    if not names:
        raise InputError(f"{path} names no images: extract the dataset's annotations again.")
    missing = [str(file.relative_to(folder)) for name in names for file in pair(folder, name) if not file.is_file()]
    if missing:
        raise InputError(
            f"{path} names {len(missing)} files that aren't there, first {missing[0]}: extract them again."
        )
    if limit:
        names = np.random.default_rng(seed).permutation(names)[:limit].tolist()
    return sorted(names)


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the paths of an image and of its trimap."""
    return folder / "images" / f"{name}.jpg", folder / "annotations" / "trimaps" / f"{name}.png"


def photo_size(folder: Path, name: str) -> tuple[int, int]:
    """Return an image's width and height in pixels, without decoding it."""
    with opened(pair(folder, name)[0]) as image:
        return image.size


def hold_out(names: list[str], fraction: float = 0.1, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split names in two, stratified by breed: (the rest, about `fraction` of each breed).

    Of a breed with several images at least one goes to either side; a breed's only image stays in the rest.
    """
    random = np.random.default_rng(seed)
    held = set()
    for breed in sorted({breed_of(name) for name in names}):
        members = sorted(name for name in names if breed_of(name) == breed)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.update(random.permutation(members)[:count].tolist())
    return [name for name in names if name not in held], [name for name in names if name in held]


def load_pets(
    folder: Path,
    names: list[str],
    side: int,
    title: str = "images",
    *,
    mask_side: int = 0,
    mask_resize: str = "nearest",
) -> Pets:
    """Decode every image and trimap once, in parallel, into memory: 3 * side**2 + mask_side**2 bytes each.

    `mask_side` is `side` unless given. `mask_resize` "bilinear" makes the mistake of mixing labels, to see its price.
    Errors: `InputError` for a file that does not decode, or a trimap that is not of its image's size or holds
    other values than 1, 2 and 3.
    """
    mask_side = mask_side or side
    images = torch.empty(len(names), 3, side, side, dtype=torch.uint8)
    masks = torch.empty(len(names), mask_side, mask_side, dtype=torch.uint8)

    def load(index: int) -> None:
        images[index], masks[index] = load_pair(*pair(folder, names[index]), side, mask_side, mask_resize)

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(load, range(len(names))), title, len(names), leave=False):
            pass
    return Pets(names, images, masks)


def load_pair(
    image_path: Path, trimap_path: Path, side: int, mask_side: int, mask_resize: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """Return one image (3, side, side) uint8 and its mask (mask_side, mask_side); the rest is as in `load_pets`."""
    image, trimap = as_rgb(open_image(image_path)), open_image(trimap_path)
    if trimap.mode != "L":
        raise InputError(f"{trimap_path} has the mode {trimap.mode}, a trimap one channel of 8 bits: replace it.")
    if image.size != trimap.size:
        raise InputError(f"{trimap_path} is {trimap.size} pixels large but its image {image.size}: replace it.")
    strangers = set(np.unique(trimap)) - {1, 2, 3}
    if strangers:
        raise InputError(f"{trimap_path} holds the value {min(strangers)}, a trimap only 1, 2 and 3: replace it.")
    # Pillow's bilinear filter is antialiased; a trimap's values are names, not amounts, and must never be mixed.
    pixels = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BILINEAR)))
    trimap = trimap.resize((mask_side, mask_side), Image.Resampling[mask_resize.upper()])
    trimap = torch.from_numpy(np.array(trimap))
    return pixels.permute(2, 0, 1), trimap - 1  # (H, W, 3) -> (3, H, W); 1, 2, 3 -> 0, 1, 2


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file for the time of a `with` block. Errors: `InputError` if it, or the block, can't read it."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be decoded ({error}): replace it by an intact image file.") from None


def open_image(path: str | Path) -> Image.Image:
    """Decode an image file, whatever its format is. Errors: `InputError`."""
    with opened(path) as image:
        return image.copy()


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, through RGBA if there is a palette: one with transparency converts only with a warning."""
    return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")


def open_photo(path: str | Path) -> Image.Image:
    """Decode any photo as RGB, turned as its camera noted (phones store portraits lying). Errors: `InputError`."""
    return as_rgb(ImageOps.exif_transpose(open_image(path)))


def half_size(images: Tensor) -> Tensor:
    """Return uint8 images (N, 3, S, S) at half their side, antialiased: (N, 3, S/2, S/2)."""
    return v2.functional.resize(images, [images.shape[-1] // 2] * 2, antialias=True)


def augment(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Flip, move and recolour each image and move its mask along; same shapes and dtypes as given.

    Draws from torch's global random generator. Pixels from outside the photo become grey, their label `IGNORE`.
    """
    fill = {tv_tensors.Image: 127, tv_tensors.Mask: IGNORE}
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(10, (0.05, 0.05), (0.8, 1.25), interpolation=v2.InterpolationMode.BILINEAR, fill=fill),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ]
    )
    # A plain tensor beside an image would pass through untouched: only a tv_tensors.Mask moves along, by nearest.
    pairs = [transform(tv_tensors.Image(i), tv_tensors.Mask(m)) for i, m in zip(images, masks, strict=True)]
    return torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs])


# --------------------------------------------------------------------------------------------------- model


def conv_plus_conv(in_channels: int, out_channels: int, norms: int = 2) -> nn.Sequential:
    """Return (3 x 3 convolution, BatchNorm, LeakyReLU) twice: (N, in, H, W) -> (N, out, H, W).

    With `norms` 1 the second BatchNorm is left out. Activating in place spares a copy of the largest tensors.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels) if norms == 2 else nn.Identity(),
        nn.LeakyReLU(0.2, inplace=True),
    )


def check_side(side: int, depth: int) -> None:
    """Raise `InputError`, naming the sides that would work, unless `side` can be halved `depth` times."""
    stride = 2**depth
    if side % stride:
        below = side // stride * stride
        sides = f"{below} or {below + stride}" if below else f"{stride}"
        raise InputError(f"a U-Net of depth {depth} halves the image side {depth} times, but {side} is not divisible "
                         f"by {stride}: make it {sides}, or the U-Net less deep.")  # fmt: skip


def check_half(side: int, depth: int) -> None:
    """Raise `InputError`, naming a side that would work, unless half of `side` fits a U-Net of that depth."""
    stride = 2 ** (depth + 1)
    if side % stride:
        raise InputError(f"SMALL_EPOCHS train at half of IMAGE_SIZE, but {side / 2:g} is not divisible by {2**depth}: "
                         f"make IMAGE_SIZE {(side // stride + 1) * stride}, or SMALL_EPOCHS 0.")  # fmt: skip


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) as the course draws it: (N, 3, S, S) -> logits (N, num_classes, S, S).

    Going down, every level halves the side and doubles the channels: what is lost in place is won in kind. Going
    up, every level doubles the side again and joins the residual of the same size that was kept on the way down.
    To see what they are good for, `norms` 1 leaves out every second BatchNorm, and `skips` False puts zeros in the
    place of the residuals.
    """

    def __init__(
        self,
        base_channels: int = 32,
        depth: int = 5,
        num_classes: int = len(CLASSES),
        *,
        norms: int = 2,
        skips: bool = True,
    ):
        super().__init__()
        self.base_channels, self.depth, self.num_classes = base_channels, depth, num_classes
        self.norms, self.skips = norms, skips
        channels = [base_channels * 2**level for level in range(depth)]  # b, 2b, 4b, ...
        self.downs = nn.ModuleList(map(conv_plus_conv, [3, *channels], channels, repeat(norms)))
        self.bottleneck = conv_plus_conv(channels[-1], channels[-1], norms)
        # Upsampled and residual have as many channels each, so the concatenation doubles them: 2c go in.
        inputs = [2 * c for c in reversed(channels)]
        outputs = [*channels[-2::-1], base_channels]  # as many as the level above keeps; the last one keeps b
        self.ups = nn.ModuleList(map(conv_plus_conv, inputs, outputs, repeat(norms)))
        self.out = nn.Conv2d(base_channels, num_classes, kernel_size=1)
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes, S, S) for images (N, 3, S, S); S must be divisible by 2**depth."""
        self.check_size(x)
        residuals = []
        for down in self.downs:
            x = down(x)
            residuals.append(x if self.skips else torch.zeros_like(x))
            x = self.pool(x)  # (N, c, s, s) -> (N, c, s/2, s/2)
        x = self.bottleneck(x)
        for up in self.ups:
            x = self.upsample(x)  # (N, c, s, s) -> (N, c, 2s, 2s)
            x = torch.cat((x, residuals.pop()), dim=1)  # (N, c, s, s) twice -> (N, 2c, s, s)
            x = up(x)  # (N, 2c, s, s) -> (N, c/2, s, s); at the top (N, c, s, s)
        return self.out(x)

    def check_size(self, x: Tensor) -> None:
        """Raise `InputError` unless height and width of x (N, C, H, W) can be halved `depth` times."""
        for side in x.shape[-2:]:
            check_side(side, self.depth)


# --------------------------------------------------------------------------------------------------- shapes


class Step(NamedTuple):
    """One step of the U-Net's forward pass for one image; shapes are (channels, side)."""

    name: str
    formula: str  # in N, the image side, and b, the base channels
    predicted: tuple[int, float]
    traced: tuple[int, int] | None  # None: the forward pass did not get here
    parameters: int
    flops: int  # of the convolutions, 2 per multiply-add; normalisation and activation are under 1 %
    receptive_field: int  # side in input pixels of what one output pixel can depend on

    @property
    def agrees(self) -> bool:
        """Whether the forward pass gave what the formula predicts."""
        return self.traced == self.predicted

    @property
    def memory(self) -> int:
        """Bytes of the step's output in float32."""
        return int(4 * self.predicted[0] * self.predicted[1] ** 2)


def analyse_shapes(model: UNet, side: int) -> list[Step]:
    """Return one `Step` for each step of the forward pass, predicted by formula and traced with forward hooks."""
    traced = trace_shapes(model, side)
    return [step._replace(traced=traced.get(step.name)) for step in predict_shapes(model, side)]


def predict_shapes(model: UNet, side: int) -> list[Step]:
    """Predict every step from `base_channels`, `depth` and the image side alone; nothing is run."""
    b, depth = model.base_channels, model.depth
    steps: list[Step] = []
    channels = 3
    path: list[str] = []  # all operations from the image to here

    def add(name: str, level: int, out: int, *operations: str) -> None:
        nonlocal channels
        path.extend(operations)
        parameters = flops = 0
        if "conv3" in operations:
            parameters += model.norms * 2 * out  # each BatchNorm has a scale and a shift for every channel
        for operation in operations:
            if operation in ("conv3", "conv1"):
                weights = (9 if operation == "conv3" else 1) * channels * out
                parameters += weights + out  # and a bias for every output channel
                flops += int(2 * weights * (side / 2**level) ** 2)
                channels = out
        channels = out
        size = f"N/{2**level}" if level else "N"
        times = out if name == "out" else f"{out // b}b" if out > b else "b"
        steps.append(
            Step(name, f"{size}, {times}", (out, side / 2**level), None, parameters, flops, receptive_field(path))
        )

    for level in range(depth):
        add(f"down{level + 1}", level, b * 2**level, "conv3", "conv3")
        add(f"pool{level + 1}", level + 1, channels, "pool")
    add("bottleneck", depth, channels, "conv3", "conv3")
    for level in reversed(range(depth)):
        add(f"upsample{level + 1}", level, channels, "upsample")
        add(f"concat{level + 1}", level, 2 * channels)
        add(f"up{level + 1}", level, b * 2 ** max(level - 1, 0), "conv3", "conv3")
    add("out", 0, model.num_classes, "conv1")
    return steps


def receptive_field(path: list[str]) -> int:
    """Return the side, in input pixels, of what one pixel after the operations of `path` can depend on.

    Counted from that pixel back to the image: a 3 x 3 convolution needs two pixels more in a row than it gives, a
    2 x 2 pooling twice as many, and w upsampled pixels come from at most w // 2 + 1 coarser ones.
    """
    width = 1
    for operation in reversed(path):
        width = {"conv3": width + 2, "conv1": width, "pool": 2 * width, "upsample": width // 2 + 1}[operation]
    return width


def trace_shapes(model: UNet, side: int) -> dict[str, tuple[int, int]]:
    """Run one image through a copy of the model and note what every step puts out: {name: (channels, side)}.

    The copy lies on torch's meta device, which knows shapes but computes nothing, so any size is free. A model whose
    shapes don't fit yields the steps before the one that failed.
    """
    model = deepcopy(model).to("meta").eval()
    model.check_size = lambda x: None  # a size that doesn't fit shall get as far as it can
    traced: dict[str, tuple[int, int]] = {}

    def note(name: str, tensor: Tensor) -> None:
        traced[name] = (tensor.shape[1], tensor.shape[3])

    levels = range(1, model.depth + 1)
    pools, upsamples = iter(levels), iter(reversed(levels))  # one module serves all levels, so count its calls
    model.pool.register_forward_hook(lambda _m, _i, output: note(f"pool{next(pools)}", output))
    model.upsample.register_forward_hook(lambda _m, _i, output: note(f"upsample{next(upsamples)}", output))
    for level, up in zip(reversed(levels), model.ups, strict=True):
        up.register_forward_pre_hook(lambda _m, inputs, level=level: note(f"concat{level}", inputs[0]))
        up.register_forward_hook(lambda _m, _i, output, level=level: note(f"up{level}", output))
    for level, down in zip(levels, model.downs, strict=True):
        down.register_forward_hook(lambda _m, _i, output, level=level: note(f"down{level}", output))
    model.bottleneck.register_forward_hook(lambda _m, _i, output: note("bottleneck", output))
    model.out.register_forward_hook(lambda _m, _i, output: note("out", output))
    with suppress(RuntimeError):  # where it fails is told by the steps that are missing
        model(torch.empty(1, 3, side, side, device="meta"))
    return traced


def shape_table(steps: list[Step]) -> str:
    """Return the steps as an HTML table: formula, predicted and traced shape, agreement, and what each step costs."""
    head = ["step", "formula", "predicted", "traced", "agree", "parameters", "MFLOP", "output KiB", "receptive field"]
    rows = []
    for step in steps:
        traced = shape_text(step.traced) if step.traced else "not reached"
        size, channels = step.formula.split(", ")
        cells = [
            step.name, f"{size} × {size} × {channels}", shape_text(step.predicted), traced, "✓" if step.agrees else "✗",
            f"{step.parameters:,}", f"{step.flops / 1e6:,.1f}", f"{step.memory / 1024:,.0f}", step.receptive_field,
        ]  # fmt: skip
        # A narrow window scrolls the table, not the page, and wraps no cell.
        rows.append("".join(f"<td>{str(cell).replace(' ', '&nbsp;')}</td>" for cell in cells))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    header = "".join(f"<th>{title}</th>" for title in head)
    return f'<div style="overflow-x:auto"><table><tr>{header}</tr>\n{body}</table></div>'


def shape_text(shape: tuple[int, float]) -> str:
    """Return (channels, side) as people write it: (64, 128) -> '128 × 128 × 64'."""
    channels, side = shape
    return f"{side:g} × {side:g} × {channels}"


# --------------------------------------------------------------------------------------------------- training


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Return uint8 images (N, 3, S, S) as the model's input: float32 in -1 to 1, on `device`."""
    return images.to(device).float() / 127.5 - 1


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed; other systems' allocators are left as they are.

    Every training step needs the same large tensors again. By default their memory goes back to Linux after each
    use and returns as new pages of zeros, which slows the step down on the CPU.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of memory of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back to Linux what is free at the end of the heap


def segmentation_loss(logits: Tensor, masks: Tensor, dice_weight: float = 0.5) -> Tensor:
    """Return cross-entropy plus `dice_weight` times soft Dice loss (Milletari et al. 2016).

    Shapes: logits (N, K, S, S), masks (N, S, S) int64, result (). Cross-entropy scores pixels one by one; Dice
    scores the overlap of whole classes, so the narrow border counts as much as the wide background. Pixels `IGNORE`
    don't count.
    """
    cross_entropy = F.cross_entropy(logits, masks, ignore_index=IGNORE)
    known = (masks != IGNORE).unsqueeze(1)  # (N, 1, S, S)
    truth = F.one_hot(masks.where(masks != IGNORE, 0), logits.shape[1]).permute(0, 3, 1, 2) * known  # (N, K, S, S)
    probabilities = logits.softmax(dim=1) * known
    overlap = (probabilities * truth).sum(dim=(0, 2, 3))  # (K,)
    total = (probabilities + truth).sum(dim=(0, 2, 3))
    return cross_entropy + dice_weight * (1 - ((2 * overlap + 1) / (total + 1)).mean())


def count_steps(images: int, batch_size: int) -> int:
    """Return how many full batches an epoch has. Errors: `InputError` if it has none."""
    if images < batch_size:
        raise InputError(f"{images} training images don't fill one batch of {batch_size}: make BATCH_SIZE smaller.")
    return images // batch_size


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised: as far in every direction, also where gradients are small.

    After Jordan and others (2024), with Nesterov's momentum, and steps as long as AdamW's usual ones, as Liu and others
    (2025) have them. A parameter (out, ...) counts as a matrix with `out` rows, a vector as one column; others leave
    vectors and the last layer to AdamW. PyTorch's own Muon takes matrices only and computes in bfloat16, which most
    CPUs just emulate.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step against the gradients. `closure` is there for PyTorch's sake and not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:  # the loss does not depend on it
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(average, group["momentum"])
                matrix = orthogonalize(direction.reshape(len(direction), -1))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(matrix.view_as(parameter), alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Keep the singular vectors of a matrix (R, C), but bring all but its tiniest singular values to 0.7 to 1.2.

    Five Newton-Schulz iterations X <- a X + b (X X') X + c (X X')^2 X, with Jordan's coefficients. All factors are
    polynomials in the small X X', so they are multiplied first, and the large X once, at the end.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)  # now no singular value is above 1
    gram = matrix @ matrix.T  # X X', (R, R)
    identity = torch.eye(len(gram), device=gram.device)
    product = identity
    for _ in range(5):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix


def new_training_state(
    model: UNet,
    precision: torch.dtype,
    *,
    learning_rate: float,
    total_steps: int,
    muon: bool = True,
    one_cycle: bool = True,
    weight_decay: float = 0.01,
    averaged: bool = True,
) -> dict:
    """Return all that changes during a training: the model, its average, the optimiser and the schedule, by name."""
    # Units for bfloat16 want all channels of a pixel side by side in memory; float32 is faster without on AVX2.
    model.to(memory_format=torch.channels_last if precision == torch.bfloat16 else torch.contiguous_format)
    parameters = {"params": model.parameters(), "lr": learning_rate, "weight_decay": weight_decay}
    optimizer = Muon(**parameters) if muon else torch.optim.AdamW(**parameters, fused=True)
    if one_cycle:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps)
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    average = AveragedModel(model, avg_fn=moving_average if averaged else latest, use_buffers=True)
    return {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}


def train(
    model: UNet,
    train_pets: Pets,
    valid_pets: Pets,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    muon: bool = True,
    small_epochs: int = 0,
    one_cycle: bool = True,
    weight_decay: float = 0.01,
    dice_weight: float = 0.5,
    averaged: bool = True,
    augmented: bool = True,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> list[dict]:
    """Train `model` in place, on its device, and return the history: one dict per epoch.

    Ingredients: Muon, or AdamW (without weight decay it is Adam); a learning rate that follows one cycle with its
    peak at `learning_rate` (Smith 2018; the momentum goes the other way), or is constant; the first `small_epochs` at
    half the images' side (progressive resizing); a moving average of the weights, which is what gets validated and is
    in `model` at the end. After every epoch the state goes to `checkpoint`; `resume` goes on from there, on a CPU
    exactly as if never interrupted. Errors: `InputError` for too few images for a batch, for a loss that is not
    finite, and for a checkpoint that is missing or belongs to another architecture or recipe.
    """
    steps = count_steps(len(train_pets.names), batch_size)  # per epoch
    keep_freed_memory()
    state = new_training_state(
        model, precision, learning_rate=learning_rate, total_steps=epochs * steps, muon=muon,
        one_cycle=one_cycle, weight_decay=weight_decay, averaged=averaged,
    )  # fmt: skip
    average = state["average"]
    recipe = {
        "base_channels": model.base_channels, "depth": model.depth, "norms": model.norms, "skips": model.skips,
        "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "muon": muon,
        "small_epochs": small_epochs, "one_cycle": one_cycle, "weight_decay": weight_decay,
        "dice_weight": dice_weight, "averaged": averaged, "augmented": augmented, "seed": seed,
        "precision": str(precision),
        "images": list(train_pets.images.shape),
        "sum of labels": int(train_pets.masks.sum()),  # tells other images, and other masks, of the same shape
        "validation masks": list(valid_pets.masks.shape),
    }  # fmt: skip
    if checkpoint and checkpoint.exists() and not resume:
        os.replace(checkpoint, checkpoint.with_suffix(".old.pt"))  # it may have taken hours
    history = load_checkpoint(checkpoint, state, recipe) if resume else []
    if len(history) < small_epochs:
        masks = train_pets.masks[:, ::2, ::2]  # by nearest; validation masks keep the side that scores are for
        small_train = Pets(train_pets.names, half_size(train_pets.images), masks)
        small_valid = valid_pets._replace(images=half_size(valid_pets.images))

    with tqdm(total=epochs * steps, initial=len(history) * steps, mininterval=1, leave=False) as bar:
        for epoch in range(len(history) + 1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            torch.manual_seed(seed * 100_003 + epoch)  # by epoch, so that a resumed run draws the same
            start = time.perf_counter()
            seen, held_out = (small_train, small_valid) if epoch <= small_epochs else (train_pets, valid_pets)
            loss = train_epoch(seen, batch_size, augmented, dice_weight, precision, **state, bar=bar)
            seconds = time.perf_counter() - start
            valid = scores(evaluate(average.module, held_out, precision=precision))
            history.append({
                "epoch": epoch, "train_loss": loss, "valid_pixel_accuracy": valid["pixel_accuracy"],
                "valid_mean_iou": valid["mean_iou"], "seconds": seconds,
            })  # fmt: skip
            bar.set_postfix({"loss": f"{loss:.3f}", "valid accuracy": f"{valid['pixel_accuracy']:.3f}"})
            if checkpoint:
                save_checkpoint(checkpoint, state, recipe, history)
    model.load_state_dict(average.module.state_dict())
    return history


def train_epoch(
    pets: Pets,
    batch_size: int,
    augmented: bool,
    dice_weight: float,
    precision: torch.dtype,
    *,
    model: UNet,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    bar: tqdm,
) -> float:
    """Pass over the images once, in random batches of `batch_size`, and return the mean loss."""
    device = next(model.parameters()).device
    model.train()
    losses = []
    for batch in torch.randperm(len(pets.names)).split(batch_size):
        if len(batch) < batch_size:
            break  # a smaller batch would upset BatchNorm
        images, masks = pets.images[batch], pets.masks[batch]  # (N, 3, S, S), (N, S, S)
        if augmented:
            images, masks = augment(images, masks)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(to_input(images, device))  # (N, K, S, S)
        loss = segmentation_loss(logits.float(), masks.to(device).long(), dice_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise InputError("the loss is not a number any more: make LEARNING_RATE smaller and train again.")
        bar.update()
    return sum(losses) / len(losses)


def moving_average(average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
    """Return the exponential moving average of the weights: decay 0.99, less at first so that it forgets the start."""
    decay = min(0.99, (1 + int(updates)) / (10 + int(updates)))
    return torch.lerp(average, current, 1 - decay) if average.is_floating_point() else current


def latest(average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
    """Return the current weights instead of an average."""
    return current


def save_checkpoint(path: Path, state: dict, recipe: dict, history: list[dict]) -> None:
    """Write everything that going on needs: the state dicts of `state`, the recipe they belong to, the history."""
    parts = {name: part.state_dict() for name, part in state.items()}
    write_atomically(path, lambda file: torch.save({**parts, "recipe": recipe, "history": history}, file))


def require_checkpoint(path: Path | None) -> None:
    """Raise `InputError` unless there is a checkpoint at `path`."""
    if not path or not Path(path).is_file():
        raise InputError(f"there is no checkpoint {path} to go on from: set RESUME to False, or RUN_NAME to its run.")


def load_checkpoint(path: Path, state: dict, recipe: dict) -> list[dict]:
    """Load `state` from a checkpoint of the same recipe and return its history. Errors: `InputError`."""
    require_checkpoint(path)
    damaged = InputError(f"{path} is damaged, or no checkpoint of this project: set RESUME to False.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["recipe"]
    except Exception:  # torch.load has a dozen ways to fail on a damaged file, most of them in many lines
        raise damaged from None
    other = [f"{name} {theirs.get(name)}, not {value}" for name, value in recipe.items() if theirs.get(name) != value]
    if other:
        raise InputError(f"{path} belongs to a run with {'; '.join(other)}: set RESUME to False, or these as there.")
    try:
        for name, part in state.items():
            part.load_state_dict(saved[name])
        return saved["history"]
    except (KeyError, RuntimeError, ValueError):
        raise damaged from None


@torch.inference_mode()
def predict(
    model: UNet,
    images: Tensor,
    *,
    size: tuple[int, int] | None = None,
    flip: bool = False,
    precision: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the most probable label of every pixel, (N, H, W) uint8, and its probability, (N, H, W) float32.

    `size` (H, W) is that of the images (N, 3, S, S) unless given: the logits are brought to it bilinearly. `flip`
    averages the probabilities with those of the mirrored images.
    """
    device = next(model.parameters()).device
    model.eval()

    def probabilities(inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(inputs).float()
        return F.interpolate(logits, size or inputs.shape[-2:], mode="bilinear").softmax(dim=1)  # (N, K, H, W)

    labels, confidences = [], []
    for batch in tqdm(images.split(32), "predict", delay=2, leave=False):
        inputs = to_input(batch, device)
        likely = probabilities(inputs)
        if flip:
            likely = (likely + probabilities(inputs.flip(3)).flip(3)) / 2
        confidence, label = likely.max(dim=1)  # (N, H, W) each
        labels.append(label.byte().cpu())
        confidences.append(confidence.cpu())
    return torch.cat(labels), torch.cat(confidences)


def evaluate(model: UNet, pets: Pets, *, flip: bool = False, precision: torch.dtype = torch.float32) -> Tensor:
    """Return the confusion matrix (K, K) of the model on all pixels of the masks of `pets`."""
    predicted, _ = predict(model, pets.images, size=pets.masks.shape[1:], flip=flip, precision=precision)
    return confusion_matrix(predicted, pets.masks)


# --------------------------------------------------------------------------------------------------- scores


def confusion_matrix(predicted: Tensor, truth: Tensor) -> Tensor:
    """Count pixels by class: (K, K) int64, rows the truth and columns the prediction. Pixels `IGNORE` don't count."""
    counts = torch.zeros(len(CLASSES) ** 2, dtype=torch.long)
    for truths, predictions in zip(truth.split(64), predicted.split(64), strict=True):  # int64 copies are large
        known = truths != IGNORE
        pairs = truths[known].long() * len(CLASSES) + predictions[known].long()
        counts += torch.bincount(pairs, minlength=len(counts))
    return counts.view(len(CLASSES), len(CLASSES))


def scores(matrix: Tensor) -> dict:
    """Derive every score from one confusion matrix, so that images of all batches weigh the same.

    `pixel_accuracy` is the share of the diagonal; per class, with true positives TP, false positives FP and false
    negatives FN, `iou` is TP / (TP + FP + FN) and `dice` is 2 TP / (2 TP + FP + FN). A class that is neither there
    nor predicted has no score (None) and stays out of `mean_iou`.
    """
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


def cut(value: float, digits: int) -> str:
    """Return a number with so many digits after the point, cut and not rounded, for rounding might flatter."""
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR))


# --------------------------------------------------------------------------------------------------- plots
# Each returns a figure whose label, `figure.get_label()`, is its alt text. The classes' colours are theirs alone.

GREEN, RED, SKY = "#009E73", "#D55E00", "#56B4E9"  # for everything else, from the same palette


def colorize(mask: Tensor) -> np.ndarray:
    """Return a mask (S, S) of labels as an RGB picture (S, S, 3) of floats; pixels `IGNORE` are grey."""
    palette = np.full((256, 3), 0.5)
    palette[: len(COLORS)] = [to_rgb(color) for color in COLORS]
    return palette[mask.numpy()]


def overlay(image: Tensor, mask: Tensor) -> np.ndarray:
    """Return an image (3, S, S) uint8 with its mask (S, S) laid over it, as an RGB picture (S, S, 3) of floats."""
    return 0.5 * image.permute(1, 2, 0).numpy() / 255 + 0.5 * colorize(mask)


def plot_grid(columns: dict[str, list], row_titles: list[str], alt: str, width: float = 2.2) -> Figure:
    """Plot columns of RGB pictures side by side, one row per picture, with the legend of the classes below."""
    rows = len(row_titles)
    height, width_of_picture = next(iter(columns.values()))[0].shape[:2]
    size = (width * len(columns), width * rows * height / width_of_picture + 0.6)
    figure, axes = plt.subplots(rows, len(columns), figsize=size, squeeze=False, layout="constrained", label=alt)
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title, fontsize=10)
        for i, picture in enumerate(pictures):
            axes[i, j].imshow(picture)
            axes[i, j].set(xticks=[], yticks=[])
    for i, title in enumerate(row_titles):
        axes[i, 0].set_ylabel(title, fontsize=9)
    figure.legend(handles=class_patches(), loc="outside lower center", ncols=len(CLASSES), frameon=False)
    return figure


def class_patches() -> list[Patch]:
    """Return a legend's handles: a patch in each class's colour."""
    return [Patch(color=color, label=name) for name, color in zip(CLASSES, COLORS, strict=True)]


def plot_samples(pets: Pets, indices: Iterable[int]) -> Figure:
    """Plot some images of a split beside their masks and the two laid over one another."""
    chosen = list(indices)
    columns = {
        "image": [pets.images[i].permute(1, 2, 0).numpy() for i in chosen],
        "mask": [colorize(pets.masks[i]) for i in chosen],
        "overlay": [overlay(pets.images[i], pets.masks[i]) for i in chosen],
    }
    breeds = [breed_of(pets.names[i]).replace("_", " ") for i in chosen]
    return plot_grid(columns, breeds, f"{len(chosen)} images, each beside its mask and an overlay of both.")


def plot_predictions(pets: Pets, predicted: Tensor, indices: Iterable[int], titles: list[str]) -> Figure:
    """Plot images with truth, prediction and error map; wrong pixels are white, right ones dark."""
    chosen = list(indices)
    columns = {
        "image": [pets.images[i].permute(1, 2, 0).numpy() for i in chosen],
        "truth": [colorize(pets.masks[i]) for i in chosen],
        "prediction": [colorize(predicted[i]) for i in chosen],
        "error": [np.repeat((predicted[i] != pets.masks[i]).numpy()[..., None] * 1.0, 3, axis=2) for i in chosen],
    }
    return plot_grid(columns, titles, f"{len(chosen)} images with true mask, predicted mask and, in white, the errors.")


def plot_history(history: list[dict], lines: dict[str, float]) -> Figure:
    """Plot training loss, and validation accuracy and mean IoU, by epoch; `lines` are accuracies to compare with."""
    alt = "Training loss by epoch; beside it validation pixel accuracy and mean IoU"
    alt += f" with lines for {', '.join(lines)}" if lines else ""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", label=f"{alt}.")
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], "o-", color=GREEN)
    left.set(title="training loss", xlabel="epoch", ylim=(0, None))
    right.plot(epochs, [row["valid_pixel_accuracy"] for row in history], "o-", color=GREEN, label="pixel accuracy")
    right.plot(epochs, [row["valid_mean_iou"] for row in history], "s-", color=RED, label="mean IoU")
    for style, (name, value) in zip(cycle(("--", ":", "-.")), lines.items(), strict=False):
        right.axhline(value, color="#555555", linestyle=style, label=name)
    right.set(title="validation", xlabel="epoch", ylim=(0, 1))
    right.legend(loc="lower right", fontsize=8)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return figure


def plot_confusion(matrix: Tensor) -> Figure:
    """Plot a confusion matrix as shares of each true class."""
    shares = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    alt = "Confusion matrix: for each true class (row), the share of its pixels predicted as each class (column)."
    figure, axes = plt.subplots(figsize=(4.6, 3.8), layout="constrained", label=alt)
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="cividis")
    ticks = range(len(CLASSES))
    axes.set(xticks=ticks, yticks=ticks, xticklabels=CLASSES, yticklabels=CLASSES, xlabel="predicted", ylabel="true")
    for i in ticks:
        for j in ticks:
            color = "black" if shares[i, j] > 0.5 else "white"
            axes.text(j, i, f"{shares[i, j]:.1%}", ha="center", va="center", color=color)
    figure.colorbar(picture, label="share of the true class")
    return figure


def plot_unet(steps: list[Step]) -> Figure:
    """Draw the U from its steps: a box's height grows with the side and its width with the channels (square roots)."""
    by_name = {step.name: step for step in steps}
    largest = np.sqrt([step.predicted for step in steps]).max(axis=0)
    depth = sum(name.startswith("down") for name in by_name)
    alt = (
        f"The U-Net drawn as a U: {depth} levels down on the left, the bottleneck at the bottom, {depth} levels up on "
        "the right, and an arrow across each level for what it keeps. Every box is labelled with its shape."
    )
    figure, axes = plt.subplots(figsize=(2.5 + 1.6 * depth, 1.6 + 0.8 * depth), layout="constrained", label=alt)

    def box(name: str, x: float, y: float, color: str, label_at: str) -> Box:
        return draw_box(axes, by_name[name], x, y, largest, color, label_at)

    right = 2 * depth + 1.2  # x of the top level's concatenation
    last_down = last_concat = None  # of the level above
    for level in range(depth):
        y = -1.6 * level
        down = box(f"down{level + 1}", level, y, SKY, "left")
        concat = box(f"concat{level + 1}", right - level, y, "#CCCCCC", "above")
        up = box(f"up{level + 1}", right - level + 0.9, y, "#F0E442", "below")
        draw_arrow(axes, down.right, concat.left, "residual")
        draw_arrow(axes, concat.right, up.left, "next")
        if level:
            draw_arrow(axes, last_down.bottom_right, down.top, "max pooling 2 × 2")
            draw_arrow(axes, up.top, last_concat.bottom, "upsampling × 2")
        else:
            out = box("out", right + 1.9, y, "#CC79A7", "above")
            draw_arrow(axes, up.right, out.left, "next")
        last_down, last_concat = down, concat
    bottleneck = box("bottleneck", depth + 0.1, -1.6 * depth, GREEN, "below")
    draw_arrow(axes, last_down.bottom_right, bottleneck.top, "max pooling 2 × 2")
    draw_arrow(axes, bottleneck.top_right, last_concat.bottom, "upsampling × 2")
    handles = [plt.Line2D([], [], **style, label=name) for name, style in ARROWS.items() if name != "next"]
    axes.legend(handles=handles, loc="lower left", frameon=False, fontsize=9)
    axes.set(xlim=(-1.4, right + 2.5), ylim=(-1.6 * depth - 1.0, 1.0))
    axes.axis("off")
    return figure


ARROWS = {
    "max pooling 2 × 2": {"color": SKY, "linestyle": "-"},
    "upsampling × 2": {"color": RED, "linestyle": "-"},
    "residual": {"color": "#555555", "linestyle": "--"},
    "next": {"color": "#555555", "linestyle": "-"},
}


class Box(NamedTuple):
    """Points on the outline of a box, (x, y) each, where arrows begin and end."""

    left: tuple[float, float]
    right: tuple[float, float]
    top: tuple[float, float]
    bottom: tuple[float, float]
    top_right: tuple[float, float]
    bottom_right: tuple[float, float]


def draw_box(axes: Axes, step: Step, x: float, y: float, largest: np.ndarray, color: str, label_at: str) -> Box:
    """Draw a step's box around (x, y), dotted if the step was not reached, and label it with its traced shape."""
    w, h = np.sqrt(step.traced or step.predicted) / largest * (0.35, 0.5)  # half its width and half its height
    style = {"facecolor": color} if step.traced else {"facecolor": "none", "linestyle": ":"}
    axes.add_patch(Rectangle((x - w, y - h), 2 * w, 2 * h, edgecolor="black", **style))
    text = f"{step.name}\n{shape_text(step.traced).replace(' ', '') if step.traced else 'not reached'}"
    place, ha, va = {
        "left": ((x - w - 0.08, y), "right", "center"),
        "above": ((x, y + h + 0.06), "center", "bottom"),
        "below": ((x, y - h - 0.06), "center", "top"),
    }[label_at]
    axes.text(*place, text, ha=ha, va=va, fontsize=8)
    return Box((x - w, y), (x + w, y), (x, y + h), (x, y - h), (x + w, y + h), (x + w, y - h))


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
    """Draw an arrow of one of the kinds in `ARROWS`."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "lw": 1.5, **ARROWS[kind]})


# --------------------------------------------------------------------------------------------------- run folder


def write_atomically(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Call `write` on a file beside `path`, then rename it: readers see the old file or the new, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")  # runs may share a folder
    with draft.open("wb") as file:
        write(file)
    os.replace(draft, path)


def save_weights(path: Path, model: UNet) -> None:
    """Write the model's weights in float16, which halves the file and changes hardly a label.

    Whole numbers stay as they are, and so does what float16 can't hold: a BatchNorm's variance may be above 65,504.
    """

    def halved(tensor: Tensor) -> Tensor:
        return tensor.half() if tensor.is_floating_point() and tensor.half().isfinite().all() else tensor

    weights = {name: halved(tensor.cpu()) for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda file: torch.save(weights, file))


def load_weights(path: Path, model: UNet) -> None:
    """Load what `save_weights` wrote into a model of the same architecture. Errors: `InputError`."""
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise InputError(f"there are no weights {path}: give the folder of a run that has them.") from None
    except Exception:  # torch.load has a dozen ways to fail on a damaged file, most of them in many lines
        raise InputError(f"{path} is damaged, or holds the weights of another architecture: train again.") from None


def write_json(path: Path, data: dict) -> None:
    """Write `data` for people and programs to read."""
    write_atomically(path, lambda file: file.write(f"{json.dumps(data, indent=2)}\n".encode()))


def save_run(folder: Path, metrics: dict, history: list[dict]) -> None:
    """Write `metrics.json` and `history.csv` into a run's folder."""
    table = io.StringIO()
    writer = csv.DictWriter(table, history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "history.csv", lambda file: file.write(table.getvalue().encode()))
    write_json(folder / "metrics.json", metrics)  # last: its being there says that the run is complete
