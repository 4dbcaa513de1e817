"""What the rubric's tests share: what GRADED_SEED draws anew for each grading, and how they fail.

Sizes, seeds and pictures are drawn.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import nn

from petseg_utils import IMAGE_FILE, TRIMAP_FILE, Pets

SEED = os.environ.get("GRADED_SEED", "0")  # the grader draws it, and prints it


def expect(right: bool, what: str, found: object = "others") -> None:
    """Fail with the sentence that a student reads, unless something is right."""
    assert right, f"expected {what}, found {found}"


def draw(what: str) -> Random:
    """Return a generator of its own for each purpose, so that tests run in any order, or alone."""
    return Random(f"{SEED} {what}")


def draw_pets(folder: Path, names: list[str], side: int, dark: bool = False) -> Pets:
    """Draw pictures, in memory and on the disk, in which the colour gives each label away."""
    seed = draw(names[0]).randrange(2**31)
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randint(3, (len(names), 7, 7), generator=random)
    if dark:  # some without a pet: images differ, so that a mean over them is none over pixels
        coarse[1::3].clamp_(min=1)
    masks = torch.nn.functional.interpolate(coarse[:, None].float(), (side, side))[:, 0].byte()
    noise = torch.randint(-20, 20, (len(names), 3, side, side), generator=random)
    images = (torch.eye(3)[masks.long()].permute(0, 3, 1, 2) * 180 + 40 + noise).byte()
    images = images // 3 if dark else images
    pets = Pets(names, images, masks, folder)
    write_pets(pets)
    return pets


def write_pets(pets: Pets) -> None:
    """Write pictures and trimaps to where their folder has them."""
    for name, image, mask in zip(*pets[:3], strict=True):
        for file, pixels in ((IMAGE_FILE, image.permute(1, 2, 0)), (TRIMAP_FILE, mask + 1)):
            path = pets.folder / file.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path, "PNG")  # which loses nothing


def pull_the_plug() -> None:
    raise ConnectionError("pulled the plug")


def at_step(model: nn.Module, number: int, act: Callable[[], object]) -> None:
    """Let `act` happen, once, when `model` begins a training step, counted from 0."""
    steps = itertools.count()

    def hook(module: nn.Module, _: object) -> None:
        if module is model and module.training and next(steps) == number:
            act()

    model.register_forward_pre_hook(hook)
