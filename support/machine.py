"""What this machine has, and what a run needs of it: device, number format, memory and disk.

A file of its own, since nobody has to read it to learn about segmentation; `petseg_utils` passes it
on.
"""

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel

from support.parameters import InputError

CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may use


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch device called `name`; 'auto' takes CUDA, then MPS, then the CPU. Errors: `InputError`."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [kind for kind in there if there[kind]]
    if name not in ("auto", *usable):
        raise InputError(
            f"this machine has no device {name!r}: set DEVICE to {' or '.join(map(repr, usable))}."
        )
    return torch.device(usable[0] if name == "auto" else name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in; 'auto' takes bfloat16 where hardware multiplies it; emulated it is slow."""
    if name != "auto":
        return getattr(torch, name)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = any(features.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory() -> None:
    """Tell glibc's malloc, where there is one, to keep what is freed: the next training step needs
    it again.

    By default the memory of large tensors goes back to Linux after each use and returns as new
    pages of zeros, which slows the step down on the CPU.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of memory of its own for a large tensor
        mallopt(
            -1, -1
        )  # M_TRIM_THRESHOLD: never give back to Linux what is free at the end of the heap


def layers(recipe: BaseModel) -> Iterator[tuple[int, int, int]]:
    """Yield level, input channels and output channels of every `conv_plus_conv` of a recipe's U-Net."""
    b, depth = recipe.BASE_CHANNELS, recipe.DEPTH
    for level in range(depth):
        yield level, b * 2 ** (level - 1) if level else 3, b * 2**level
    yield depth, b * 2 ** (depth - 1), b * 2 ** (depth - 1)
    for level in reversed(range(depth)):
        yield level, 2 * b * 2**level, b * 2 ** max(level - 1, 0)


def count_weights(recipe: BaseModel) -> int:
    """Return about how many weights a recipe's U-Net has: those of its 3 x 3 convolutions, which are nearly all."""
    return sum(9 * (coming * out + out * out) for _, coming, out in layers(recipe))


def room_for(recipe: BaseModel) -> int:
    """Return how many bytes a run needs on the disk: three checkpoints (one is being written), weights, figures."""
    return 3 * 16 * count_weights(recipe) + 2 * 2 * count_weights(recipe) + 30_000_000


def forecast(recipe: BaseModel, images: dict[str, int]) -> int:
    """Return about how many bytes of memory a run takes at most, for so many images of each split.

    The factors are measured, in bytes; `make faults` compares the sum with what runs really took.
    """
    side, score = recipe.IMAGE_SIZE**2, (recipe.SCORE_SIZE or recipe.IMAGE_SIZE) ** 2  # pixels
    train, scored = images.get("train", 0), images.get("valid", 0) + images.get("test", 0)
    data = train * 4 * side + scored * (3 * side + score)
    data += (4 * train + 3 * images.get("valid", 0)) * max(recipe.small_sides, default=0) ** 2
    tensors = sum(side / 4**level * (2 * coming + 6 * out) for level, coming, out in layers(recipe))
    training = recipe.BATCH_SIZE * (4 * tensors + 200 * side)
    scoring = 32 * (32 * recipe.BASE_CHANNELS * side + 80 * score)
    tests = int(images.get("test", 0))
    looking = (
        75 * score * len(range(0, tests, max(1, tests // 400)))
    )  # the cells on errors and sureness take some
    if pick_device(recipe.DEVICE).type != "cpu":
        training = scoring = 0  # a device's own memory is not forecast
    return int(1.2e9 + data + 70 * count_weights(recipe) + max(training, scoring, looking))


def free_memory() -> int:
    """Return how many bytes this process has or can still get, in its container where there is one."""
    free = psutil.virtual_memory().available
    with suppress(
        OSError, ValueError, TypeError
    ):  # without a container there are no such files, or they say "max"
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = re.search(
            r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE
        )
        free = min(free, limit - used + int(cache[1]))  # what is cached of files gives way
    own = psutil.Process().memory_info()
    with suppress(AttributeError):  # only Linux tells
        limit, _ = psutil.Process().rlimit(psutil.RLIMIT_AS)
        free = min(free, limit - own.vms) if limit > 0 else free
    return free + own.rss


@contextmanager
def memory_told() -> Iterator[None]:
    """Turn what Python, PyTorch and Pillow raise for want of memory into an `InputError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            "alloc|out of memory|could not create", str(error)
        ):
            raise
        raise InputError(
            "the memory ran out: make BATCH_SIZE, IMAGE_SIZE, SCORE_SIZE or LIMIT smaller."
        ) from None


def check_memory(recipe: BaseModel, images: dict[str, int]) -> None:
    """Raise `InputError`, naming a size that fits, unless the memory is enough for a run over so many images."""
    free, need = free_memory(), forecast(recipe, images)
    if need <= free:
        return
    stride = 2**recipe.DEPTH
    fits = "take a machine with more memory"
    least_side = max(recipe.small_sides, default=stride)
    for name, least in (
        ("SCORE_SIZE", 8),
        ("BATCH_SIZE", 2),
        ("IMAGE_SIZE", least_side),
        ("BASE_CHANNELS", 1),
    ):
        value = getattr(recipe, name)
        step = stride if name == "IMAGE_SIZE" else 1
        smaller = [
            v
            for v in range(value - step, least - 1, -step)
            if forecast(recipe.model_copy(update={name: v}), images) <= free
        ]
        if smaller:
            fits = f"{name} {smaller[0]} fits, where it is {value}"
            break
    raise InputError(
        f"this run needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: {fits}."
    )
