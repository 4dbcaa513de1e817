"""Find a dataset, read its lists of names, open images with their trimaps, whatever is wrong."""

import os
import re
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps
from pillow_heif import register_heif_opener
from tqdm import tqdm

from support.parameters import InputError, brief, reason
from support.runs import ROOT

MAX_PIXELS = 200_000_000  # of one image, which then takes 0.8 GB decoded: more than phones make
Image.MAX_IMAGE_PIXELS = None  # our limit takes the place of Pillow's, which warns before
register_heif_opener()  # what iPhones write


def find_dataset(data_dir: str | Path, download: bool = False) -> Path:
    """Return `data_dir`/oxford-iiit-pet, downloaded if asked (800 MB). Errors: `InputError`."""
    folder = ROOT / Path(data_dir).expanduser() / "oxford-iiit-pet"
    if download:
        from torchvision.datasets import OxfordIIITPet  # here, for it takes a second

        try:
            OxfordIIITPet(folder.parent, download=True)
        except Exception as error:  # of the network, the archive or the disk
            parts = "images.tar.gz and annotations.tar.gz from www.robots.ox.ac.uk/~vgg/data/pets"
            what = f"check the network and try again, or unpack {parts} there"
            raise InputError(f"downloading {folder} failed ({reason(error)}): {what}.") from None
    if not os.path.isdir(folder):
        what = "set DATA_DIR to the folder that holds it, or DOWNLOAD"
        raise InputError(f"there is no dataset at {folder}: {what}.")
    return folder.resolve()


def read_text(path: Path) -> str:
    """Return a text in UTF-8, in UTF-16 with its mark, or else in Latin-1. Errors: `InputError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): put it there again.") from None
    if data[:2] == b"\x1f\x8b":
        raise InputError(f"{path} is compressed with gzip from its line 1 on: unpack it.")
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ["utf-16"] if marked else ["utf-8-sig", "latin-1"]:
        with suppress(UnicodeDecodeError):
            return data.decode(encoding)
    raise InputError(f"{path} is no text from its line 1 on: save it again, in UTF-8.")


def read_names(path: Path) -> dict[str, int]:
    """Return the names that a list has, one a line, each with its line's number.

    A line may have up to three numbers after the name; what begins with # is a comment. Errors:
    `InputError` for a name twice, and for what can't be part of a file's name here, or would lead
    to another folder.
    """
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name = re.fullmatch(r"(.+?)(\s+\d+){0,3}", line)[1]
        if not re.fullmatch(r"\w[\w .+-]*", name) or len(name.encode()) > 250:
            what = f"{brief(name)}, which is no name of an image: correct it"
            raise InputError(f"{path} has in line {number} {what}.")
        if name in names:
            lines = f"in lines {names[name]} and {number}"
            raise InputError(f"{path} has {name} twice, {lines}: remove one.")
        names[name] = number
    return names


def read_listed(folder: Path, split: str, kinds: tuple[str, ...]) -> list[str]:
    """Return the names of 'trainval' or 'test'. Errors: `InputError`, also if both have one."""
    other = "test" if split == "trainval" else "trainval"
    path, other = (folder / "annotations" / f"{name}.txt" for name in (split, other))
    names, others = (read_names(path) if path.is_file() else {} for path in (path, other))
    if not names:
        what = "is missing or names no images: extract the dataset's annotations again"
        raise InputError(f"{path} {what}.")
    for name in names.keys() & others.keys():
        lines = f"{path} has in line {names[name]} what {other} has in line {others[name]}"
        what = "an image must not be in two splits, so remove one line"
        raise InputError(f"{lines}, {name}: {what}.")
    files = {kind.format(name): line for name, line in names.items() for kind in kinds}
    missing = [file for file in files if not os.path.isfile(folder / file)]
    if missing:
        first = f"{missing[0]} of line {files[missing[0]]}"
        what = f"names {len(missing)} files that are not there, first {first}: extract them"
        raise InputError(f"{path} {what}.")
    return list(names)


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
        raise ValueError(f"its {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
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
