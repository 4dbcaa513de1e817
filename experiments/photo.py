"""Find the pet in a photo with the net that is kept in notebooks/oxford_run, without the internet.

make photo PHOTO=my_cat.jpg   writes runs/my_cat_mask.png, whose pixels are labels with a palette,
and runs/my_cat_overlay.png; Pillow's formats and HEIC, up to 200 megapixels
"""

import hashlib
import os
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

import petseg_utils as pets

KEPT = pets.ROOT / "notebooks" / "oxford_run"
KINDS = ("mask", "overlay")
STRIP = 1_000_000  # pixels that are computed at once, lest a large photo take gigabytes


def segment(photo: Image.Image) -> Tensor:
    """Return the label of every pixel of an RGB photo, (H, W) uint8, as the kept net sees it."""
    model, recipe = pets.load_net(KEPT)
    device = pets.pick_device()
    model.to(device).eval()
    small = photo.resize((recipe.IMAGE_SIZE, recipe.IMAGE_SIZE), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]  # (1, 3, N, N)
    precision = pets.pick_precision("auto", device)
    with torch.inference_mode():
        logits = pets.run_model(model, image, precision)
        if recipe.FLIP:
            mirrored = pets.run_model(model, image.flip(3), precision).flip(3)
            logits = torch.cat([logits, mirrored])
    return label(logits.cpu(), photo.height, photo.width)


def label(logits: Tensor, height: int, width: int, strip: int = STRIP) -> Tensor:
    """Return the most probable label of every pixel, (height, width) uint8.

    `logits` (V, K, N, N) are V views of one photo, whose probabilities are averaged. They are
    brought up as by `F.interpolate`, but one strip of rows after the other.
    """
    labels = torch.empty(height, width, dtype=torch.uint8)
    side = logits.shape[2]
    place = ((torch.arange(height) + 0.5) * side / height - 0.5).clamp(min=0)  # in rows of logits
    above = place.long()
    below = (above + 1).clamp(max=side - 1)
    for rows in torch.arange(height).split(max(1, strip // width)):
        share = (place - above)[rows].view(-1, 1)
        part = torch.lerp(logits[:, :, above[rows]], logits[:, :, below[rows]], share)
        part = F.interpolate(part, (len(rows), width), mode="bilinear")  # (V, K, rows, width)
        labels[rows] = part.softmax(dim=1).mean(dim=0).argmax(dim=0).byte()
    return labels


def lay_over(photo: Image.Image, mask: Image.Image) -> None:
    """Bring a photo halfway to the colours of its mask, in place: a copy may take a gigabyte."""
    rows = max(1, STRIP // photo.width)
    for top in range(0, photo.height, rows):
        box = (0, top, photo.width, min(top + rows, photo.height))
        photo.paste(Image.blend(photo.crop(box), mask.crop(box).convert("RGB"), 0.5), box)


def free_files(stem: str, photo: str) -> list[Path]:
    """Return where a photo's pictures go: to names that no other photo's pictures have.

    Each tells in its header of which `photo` it is, by the hash of that file.
    """

    def is_free(path: Path) -> bool:
        try:
            with Image.open(path) as picture:
                return picture.info.get("photo") == photo
        except OSError:  # no picture
            return not os.path.lexists(path)

    for name in chain([stem], (f"{stem}_{number}" for number in count(2))):
        files = [pets.ROOT / "runs" / f"{name}_{kind}.png" for kind in KINDS]
        if all(map(is_free, files)):
            return files


def main(path: str) -> None:
    """Write the mask of a photo, and the photo with its mask laid over it. Errors: `InputError`."""
    if not path:
        what = "name one, as in make photo PHOTO=my_cat.jpg"
        raise pets.InputError(f"there is no photo to look at: {what}.")
    photo = pets.open_image(path)
    own = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    labels = segment(photo)
    mask = Image.fromarray(labels.numpy())
    mask.putpalette([v for color in pets.COLORS.values() for v in ImageColor.getrgb(color)])
    lay_over(photo, mask)
    header = PngInfo()
    header.add_text("photo", own)
    for target, picture in zip(free_files(Path(path).stem, own), (mask, photo), strict=True):
        pets.write_atomically(target, lambda f, p=picture: p.save(f, format="png", pnginfo=header))
        print(f"wrote {target.relative_to(pets.ROOT)}")
    pet = torch.count_nonzero(labels == pets.CLASSES.index("pet")).item()
    print(f"{pet / labels.numel():.0%} of the photo is pet")
