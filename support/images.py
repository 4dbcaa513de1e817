"""Open image files of any format, and the trimaps that belong to them, whatever is wrong with them.

A file of its own, since nothing here is about U-Nets; `petseg_utils` passes it on.
"""

from pathlib import Path

from PIL import Image, ImageOps
from pillow_heif import register_heif_opener
from tqdm import tqdm

from support.parameters import InputError, reason

MAX_PIXELS = 200_000_000  # of one image, which then takes 0.8 GB decoded: more than phones make
Image.MAX_IMAGE_PIXELS = None  # our limit takes the place of Pillow's, which warns before
register_heif_opener()  # what iPhones write


def open_image(path: str | Path, rgb: bool = True, paired: bool = False) -> Image.Image:
    """Decode an image file of any format, turned the way its camera noted, as RGB or as it is.

    `paired` says that a trimap belongs to it, whose size has to show that it was turned, too.
    `~` is the home folder. Errors: `InputError`.
    """
    try:
        path = Path(path).expanduser()
        with Image.open(path) as image:
            check_header(image, rgb, paired)
            image.load()
            if image.getexif().get(0x112, 1) != 1:  # else this would only make a copy
                image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: check the name.") from None
    except MemoryError:
        raise InputError(f"the memory ran out while {path} was decoded: make it smaller.") from None
    except Exception as error:  # Pillow's decoders have many ways to fail on a damaged file
        why = reason(error).removesuffix(f" {str(path)!r}")
        sentence = f"{path} cannot be decoded ({why}): replace it by an intact image file."
        raise InputError(sentence) from None
    if rgb and image.mode == "P":  # one with transparency turns into RGB only with a warning
        image = image.convert("RGBA")
    return image.convert("RGB") if rgb and image.mode != "RGB" else image


def check_header(image: Image.Image, rgb: bool, paired: bool) -> None:
    """Raise `ValueError` for what an image's header alone tells: see `open_image`."""
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"its {size} pixels are more than {MAX_PIXELS:,}")
    if rgb and image.mode.startswith(("I", "F")):  # Pillow would clip them to white, or to black
        raise ValueError(f"its mode {image.mode} has more than 8 bits a channel")
    turn = image.getexif().get(0x112, 1) if paired else 1  # from 5 on, width becomes height
    if turn in (2, 3, 4) or (turn > 4 and image.width == image.height):
        why = "nothing tells whether its trimap is turned, too"
        raise ValueError(f"it is to be shown turned, and {why}")


def open_pair(photo: Path, trimap: Path) -> tuple[Image.Image, Image.Image]:
    """Decode a photo and its trimap: as large, in 8 bits, only 1, 2 and 3. Errors: `InputError`."""
    image, labels = open_image(photo, paired=True), open_image(trimap, rgb=False)
    strangers = {value for value, count in enumerate(labels.histogram()) if count} - {1, 2, 3}
    why = ""
    if labels.mode != "L":
        why = f"has the mode {labels.mode}, but a trimap has one channel of 8 bits"
    elif labels.size != image.size:
        why = f"is {labels.size} pixels large but its image is {image.size}"
    elif strangers:
        why = f"holds the value {min(strangers)}, but a trimap holds only 1, 2 and 3"
    if why:
        raise InputError(f"{trimap} {why}: replace it.")
    return image, labels


def check_pairs(pairs: list[tuple[Path, Path]]) -> None:
    """Raise `InputError` that tells of all photos and trimaps that are unusable, unless none is."""
    faults = []
    for pair in tqdm(pairs, "check all images", leave=False):
        try:
            open_pair(*pair)
        except InputError as error:
            faults.append(str(error).rstrip("."))
    if faults:
        count = f"{len(faults)} of {len(pairs)} images are unusable: " if len(faults) > 1 else ""
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError(f"{count}{'; '.join(faults[:10])}{more}.")
