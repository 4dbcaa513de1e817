"""What this machine has, and what a run needs of it: device, processors, memory and disk."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel

from support.parameters import InputError

# Where Linux says in which control groups this process is, and what each of them may use.
OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch device called `name`; 'auto' takes CUDA, then MPS, then the CPU.

    On the CPU, torch gets no more threads than may run at once: it knows OMP_NUM_THREADS, but not
    the quota of a container. Errors: `InputError`.
    """
    kinds = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    usable = [kind for kind, backend in kinds.items() if backend.is_available()]
    if name not in ("auto", *usable):
        names = " or ".join(map(repr, usable))
        raise InputError(f"this machine has no device {name!r}: set DEVICE to {names}.")
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    return torch.device(usable[0] if name == "auto" else name)


def own_limits(controller: str, *versions: list[str]) -> Iterator[tuple[Path, list[int]]]:
    """Yield what limits this process in Linux: for its control group and each above it, the folder
    and the numbers in files, by their names in version 2 and in version 1.

    Version 2 has one tree of groups, version 1 one for each controller ("cpu", "memory"). A
    container may see its own group at the root of the tree, and its name on the host here.
    """
    told = OWN_CGROUPS.read_text(encoding="utf-8") if OWN_CGROUPS.exists() else ""
    for line in told.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tree = CGROUPS / controller if controllers else CGROUPS
        own = tree / group.strip("/")
        folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(tree)]
        for folder, files in product(folders, versions):
            with suppress(OSError, ValueError):  # it isn't there, or says "max"
                texts = [(folder / file).read_text(encoding="utf-8") for file in files]
                yield folder, [int(number) for text in texts for number in text.split()]


def usable_cpus() -> int:
    """Return how many processors may work for this process at once, by its affinity and quota."""
    usable = os.cpu_count() or 1
    with suppress(AttributeError):  # macOS binds no process to a processor
        usable = len(psutil.Process().cpu_affinity())
    names = ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    for _, (quota, period) in own_limits("cpu", *names):
        usable = min(usable, math.ceil(quota / period)) if quota > 0 else usable
    return usable


def count_weights(recipe: BaseModel) -> int:
    """Return about how many weights a recipe's U-Net has: the sum over its 3 x 3 convolutions."""
    return int(12.75 * (recipe.BASE_CHANNELS * 2**recipe.DEPTH) ** 2)


def room_for(recipe: BaseModel) -> int:
    """Return a run's bytes on the disk: 3 checkpoints (one is being written), weights, figures."""
    return 3 * 16 * count_weights(recipe) + 2 * 2 * count_weights(recipe) + 30_000_000


def forecast(recipe: BaseModel, images: dict[str, int]) -> int:
    """Return about how many bytes of memory a run takes at most, for so many images of each split.

    The factors are measured, in bytes; `make faults` compares the sum with what runs really took.
    """
    side, score = recipe.IMAGE_SIZE**2, (recipe.SCORE_SIZE or recipe.IMAGE_SIZE) ** 2  # pixels
    train, valid, test = (int(images.get(split, 0)) for split in ("train", "valid", "test"))
    data = train * 4 * side + (valid + test) * (3 * side + score)
    data += (4 * train + 3 * valid) * max(recipe.small_sides, default=0) ** 2
    kept = recipe.BASE_CHANNELS * (120 - 96 / 2**recipe.DEPTH) + 224  # each level half as much
    training = recipe.BATCH_SIZE * kept * side
    scoring = 32 * (32 * recipe.BASE_CHANNELS * side + 80 * score)
    looking = 75 * score * len(range(0, test, max(1, test // 400)))  # at errors and sureness
    if pick_device(recipe.DEVICE).type != "cpu":
        training = scoring = 0  # a device's own memory is not forecast
    return int(1.2e9 + data + 70 * count_weights(recipe) + max(training, scoring, looking))


def free_memory() -> int:
    """Return how many bytes this process has or can still get, in its container if any."""
    free = psutil.virtual_memory().available
    names = ["memory.max", "memory.current"], ["memory.limit_in_bytes", "memory.usage_in_bytes"]
    for folder, (limit, used) in own_limits("memory", *names):
        with suppress(OSError):
            told = (folder / "memory.stat").read_text(encoding="utf-8")
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)", told, re.MULTILINE)
            free = min(free, limit - used + int([0, *cached][-1]))  # cached files give way
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
        of_memory = re.search("alloc|out of memory|could not create", str(error))
        if isinstance(error, RuntimeError) and not of_memory:
            raise
        what = "make BATCH_SIZE, IMAGE_SIZE, SCORE_SIZE or LIMIT smaller"
        raise InputError(f"the memory ran out: {what}.") from None


def check_memory(recipe: BaseModel, images: dict[str, int]) -> None:
    """Raise `InputError`, naming a size that fits, unless the memory is enough for a run."""
    free, need = free_memory(), forecast(recipe, images)
    if need <= free:
        return
    stride = 2**recipe.DEPTH
    least_side = max(recipe.small_sides, default=stride)
    least_of = {"SCORE_SIZE": 8, "BATCH_SIZE": 2, "IMAGE_SIZE": least_side, "BASE_CHANNELS": 1}
    fitting = (
        f"{name} {size} fits, where it is {getattr(recipe, name)}"
        for name, least in least_of.items()
        for size in range(least, getattr(recipe, name), stride if name == "IMAGE_SIZE" else 1)[::-1]
        if forecast(recipe.model_copy(update={name: size}), images) <= free
    )
    fits = next(fitting, "take a machine with more memory")
    told = f"this run needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    raise InputError(f"{told}: {fits}.")


def check_run(recipe: BaseModel, **names: list[str]) -> None:
    """Raise `InputError` for a split without images, less than a batch, or too little memory."""
    for split, images in names.items():
        if not images:
            breeds = "validation needs breeds that have two images in trainval.txt"
            what = breeds if split == "valid" else "add some"
            raise InputError(f"there are no {split} images: {what}.")
    count_steps(len(names["train"]), recipe.BATCH_SIZE)
    check_memory(recipe, {split: len(images) for split, images in names.items()})


def count_steps(images: int, batch_size: int) -> int:
    """Return how many full batches an epoch has. Errors: `InputError` if it has none."""
    if images < batch_size:
        few = f"{images} training images don't fill one batch of {batch_size}"
        raise InputError(f"{few}: make BATCH_SIZE smaller.")
    return images // batch_size
