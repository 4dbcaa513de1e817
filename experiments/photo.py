"""Find the pet in a photo with the net that is kept in notebooks/oxford_run: no training, no
dataset, no internet.

make photo PHOTO=my_cat.jpg   writes runs/my_cat_mask.png and runs/my_cat_overlay.png; Pillow's
formats, any size
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import petseg_utils as pets

KEPT = pets.ROOT / "notebooks" / "oxford_run"


def segment(photo: Image.Image) -> torch.Tensor:
    """Return the label of every pixel of an RGB photo, (H, W) uint8, as the kept net sees it."""
    model, recipe = pets.load_net(KEPT)
    device = pets.pick_device()
    small = photo.resize((recipe.IMAGE_SIZE, recipe.IMAGE_SIZE), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]  # (1, 3, N, N)
    precision = pets.pick_precision("auto", device)
    labels, _ = pets.predict(
        model.to(device), image, precision, size=photo.size[::-1], flip=recipe.FLIP
    )
    return labels[0]


def main(path: str) -> None:
    """Write the mask of a photo, and the photo with the mask laid over it, and say where. Errors: `InputError`."""
    if not path:
        raise pets.InputError(
            "there is no photo to look at: name one, as in make photo PHOTO=my_cat.jpg."
        )
    photo = pets.open_image(path)
    labels = segment(photo)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    pictures = {"mask": pets.colorize(labels), "overlay": pets.colorize(labels, pixels)}
    for kind, picture in pictures.items():
        file = pets.ROOT / "runs" / f"{Path(path).stem}_{kind}.png"
        image = Image.fromarray((255 * picture).round().astype(np.uint8))
        pets.write_atomically(file, lambda out, image=image: image.save(out, format="png"))
        print(f"wrote {file.relative_to(pets.ROOT)}")
    print(f"{(labels == pets.CLASSES.index('pet')).double().mean():.0%} of the photo is pet")
