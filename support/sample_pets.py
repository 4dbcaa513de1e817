"""Draw a stand-in for the Oxford-IIIT Pet dataset: cartoon cats and dogs, indoors and outdoors."""

import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from support.parameters import InputError, reason

# Furs, furniture, walls and floors share these, so that colour alone does not give a pet away.
WHITE, CREAM, GINGER, BROWN = (238, 234, 226), (226, 204, 166), (204, 128, 62), (138, 92, 58)
DARK, GREY, SAND, GREEN = (62, 48, 42), (136, 140, 148), (190, 158, 112), (112, 140, 84)
COLOURS = (WHITE, CREAM, GINGER, BROWN, DARK, GREY, SAND, GREEN)
BLACK, PINK, YELLOW = (24, 18, 18), (196, 130, 124), (196, 196, 84)  # eyes, noses and ears
PATTERNS = {  # noise cells across the picture, stripes across it, contrast between the two colours
    "plain": (5, 0, 0.3), "patches": (4, 0, 4.0), "spots": (17, 0, 2.0),
    "stripes": (6, 12, 1.2), "planks": (2, 8, 3.0), "carpet": (70, 0, 0.4),
}  # fmt: skip
# Shapes have y downwards. Ears and faces are in radii of the head; x > 0 means one on each side.
HANGING = ((0.5, -0.85), (1.0, -0.75), (1.4, 0.1), (1.25, 0.6), (1.0, 0.6), (0.8, 0.1))
FOLDED = ((0.4, -0.8), (0.9, -0.85), (1.25, -0.4), (1.15, 0.0), (0.85, -0.2))
SMALL = ((0.97, -0.1), (0.9, -1.1), (0.15, -0.75))
LARGE = ((0.98, 0.0), (0.9, -1.4), (0.1, -0.75))
BREEDS = (  # in class order: name, species, breed id, ear, tail width, fur colours, pattern, muzzle
    ("beagle", 2, 1, HANGING, 6, (WHITE, BROWN), "patches", WHITE),
    ("Bengal", 1, 1, SMALL, 7, (GINGER, DARK), "spots", CREAM),
    ("Maine_Coon", 1, 2, LARGE, 13, (SAND, DARK), "stripes", WHITE),
    ("pug", 2, 2, FOLDED, 6, (CREAM, SAND), "plain", DARK),
    ("Russian_Blue", 1, 3, LARGE, 6, (GREY, DARK), "plain", GREY),
    ("shiba_inu", 2, 3, SMALL, 12, (GINGER, CREAM), "plain", WHITE),
)
FACES = {  # ovals by species: x, y, x radius, y radius, colour (None: the muzzle's)
    1: ((0, 0.42, 0.42, 0.28, None), (0.42, -0.1, 0.2, 0.18, YELLOW),
        (0.42, -0.1, 0.08, 0.17, BLACK), (0.46, -0.17, 0.04, 0.04, WHITE),
        (0, 0.3, 0.11, 0.08, PINK), (0.09, 0.5, 0.1, 0.03, BLACK)),
    2: ((0, 0.4, 0.52, 0.45, None), (0.4, -0.18, 0.15, 0.16, BLACK),
        (0.44, -0.24, 0.05, 0.05, WHITE), (0, 0.2, 0.2, 0.14, BLACK),
        (0.12, 0.5, 0.13, 0.04, BLACK), (0, 0.64, 0.1, 0.13, PINK)),
}  # fmt: skip
# Poses are bands in hundredths of a box: start x y, bend x y, end x y, width, brightness. First
# comes the tail, whose width is the breed's; last the head: x, y and radius.
POSES = (
    ((16, 50, -12, 50, -2, 10, 0, 190), (26, 55, 28, 75, 26, 97, 12, 150),  # standing, side on
     (66, 55, 70, 75, 69, 97, 12, 150), (8, 56, 40, 50, 75, 53, 36, 215),
     (17, 50, 14, 75, 17, 100, 15, 235), (58, 50, 58, 75, 59, 100, 14, 235),
     (60, 58, 72, 50, 80, 25, 26, 225), (80, 27, 22)),
    ((60, 92, 115, 99, 95, 55, 0, 170), (50, 30, 50, 60, 50, 99, 50, 205),  # sitting, facing us
     (22, 85, 30, 84, 42, 98, 26, 225), (78, 85, 70, 84, 58, 98, 26, 225),
     (41, 58, 43, 80, 41, 99, 15, 240), (59, 58, 57, 80, 59, 99, 15, 240), (50, 28, 25)),
    ((10, 75, -15, 95, 25, 97, 0, 190), (2, 74, 40, 55, 85, 72, 42, 210),  # lying
     (8, 85, 20, 70, 42, 92, 20, 235), (60, 80, 70, 95, 99, 88, 13, 200),
     (50, 80, 60, 98, 90, 96, 14, 240), (76, 45, 24)),
    ((90, 99, 120, 99, 110, 60, 0, 180), (50, 40, 50, 99, 50, 260, 78, 210),  # a portrait
     (50, 42, 40)),
)  # fmt: skip
LIST_HEADER = """#Image CLASS-ID SPECIES BREED ID
#ID: 1:6 Class ids
#SPECIES: 1:Cat 2:Dog
#BREED ID: 1-3:Cat 1:3:Dog
#All images with 1st letter as captial are cat images
#images with small first letter are dog images
"""
DRAWN_BY = "drawn by draw_sample_pets("


def draw_sample_pets(
    root: str | Path, trainval: int = 320, test: int = 80, seed: int = 0, side: int = 160
) -> Path:
    """Draw a small dataset that torchvision.datasets.OxfordIIITPet reads, and return its folder.

    The folder is root/oxford-iiit-pet, with `trainval` + `test` RGB pictures, whose short side is
    about `side` pixels, and their trimaps (1 pet, 2 background, 3 border). The same arguments give
    the same bytes; what they drew before is kept, and what other arguments drew is replaced.
    Errors: `InputError` if a count is below 1, `side` is below 32, the folder exists and was not
    drawn here, or nothing can be written there.
    """
    given = f"trainval={trainval}, test={test}, seed={seed}, side={side}"
    if min(trainval, test) < 1 or side < 32:
        raise InputError(f"need trainval and test >= 1 and side >= 32, got {given}.")
    folder = Path(root) / "oxford-iiit-pet"
    code = zlib.crc32(Path(__file__).read_bytes())  # other code draws other pictures
    note = f"{DRAWN_BY}{given}), code {code:08x}\n"
    try:
        if not _is_drawn(folder, note):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / ".drawing.lock"):
                if not _is_drawn(folder, note):  # unless another process drew it meanwhile
                    _draw(folder, note, trainval, test, seed, side)
    except OSError as error:
        why = f"{folder} cannot be drawn ({reason(error)})"
        raise InputError(f"{why}: make room, or the folder writable.") from None
    return folder


def _is_drawn(folder, note):
    """Return whether the folder holds what the note says; raise InputError if it isn't ours."""
    if not folder.exists():
        return False
    readme = folder / "annotations" / "README"
    found = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    if not found.startswith(DRAWN_BY):
        what = f"{folder} was not drawn by draw_sample_pets"
        raise InputError(f"{what}, so it is left as it is: move it away.")
    return found == note


def _draw(folder, note, trainval, test, seed, side):
    """Draw the dataset aside and rename it: an interrupted drawing leaves no half dataset."""
    # What lies there is of a process that was killed: a living one would hold the lock.
    for left in folder.parent.glob(".drawing-*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".drawing-", dir=folder.parent) as aside:
        new = Path(aside) / "new"
        (new / "images").mkdir(parents=True)
        (new / "annotations" / "trimaps").mkdir(parents=True)
        indices = tqdm(range(trainval + test), "draw sample pets", leave=False)
        lines = [_save_pet(new, seed, index, side) for index in indices]
        texts = {
            "list.txt": LIST_HEADER + "".join(sorted(lines)),
            "trainval.txt": "".join(sorted(lines[:trainval])),
            "test.txt": "".join(sorted(lines[trainval:])),
            "README": note,
        }
        for file, text in texts.items():
            (new / "annotations" / file).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(Path(aside) / "old")
        new.rename(folder)


def _save_pet(folder, seed, index, side):
    """Draw and save picture number `index` with its trimap, and return its line of the list."""
    class_id, number = index % len(BREEDS) + 1, index // len(BREEDS) + 1
    breed, species, breed_id, ear, tail, colours, pattern, muzzle = BREEDS[class_id - 1]
    rng = np.random.default_rng((seed, index))
    width, height = side * rng.uniform(0.9, 1.1) * rng.permutation((1, rng.uniform(1, 1.35)))
    scene = _draw_room(rng, (int(width), int(height)))
    *bands, head = POSES[rng.integers(len(POSES))]
    parts = [(_band(path, width or tail), tone) for *path, width, tone in bands]
    skull_and_ears, face = _head(species, ear, *head, look=rng.uniform(-0.25, 0.25))
    place = _placement(rng, scene.size, rng.uniform(0.57, 1.05), rng.uniform(0.26, 0.74, 2))
    fur = _texture(rng, scene.size, colours, pattern)
    mask = _paint(scene, [(place(outline), tone) for outline, tone in parts + skull_and_ears], fur)
    pen = ImageDraw.Draw(scene)
    for outline, colour in face:
        pen.polygon(place(outline), fill=colour or muzzle)
    # The border is where a box holds pet and background: its mean is neither 0 nor 255.
    trimap = mask.filter(ImageFilter.BoxBlur(round(side / 50))).point([2, *[3] * 254, 1])
    name = f"{breed}_{number}"
    _light(rng, scene).save(folder / "images" / f"{name}.jpg", quality=90)
    trimap.save(folder / "annotations" / "trimaps" / f"{name}.png")
    return f"{name} {class_id} {species} {breed_id}\n"


def _head(species, ear, x, y, r, look):
    """Return a head's parts (outline, brightness) and its face (outline, colour), looking aside."""
    parts, face = [], []
    for flip in (-r, r):
        outline = np.array(ear) * (flip, r) + (x, y)
        parts.append((outline, 190))
        if ear in (SMALL, LARGE):  # it stands up, so that its inside shows
            face.append((outline * 0.6 + outline.mean(axis=0) * 0.4, PINK))
    for dx, dy, rx, ry, colour in FACES[species]:
        for flip in (-r, r) if dx else (r,):
            face.append((_oval(x + flip * dx + look * r, y + r * dy, r * rx, r * ry), colour))
    return [*parts, (_oval(x, y, r, 0.9 * r), 240)], face


def _draw_room(rng, size):
    """Return a wall or hedge above a floor or lawn, with things that stand about."""
    scene, floor = _texture(rng, size), _texture(rng, size)
    horizon = int(size[1] * rng.uniform(0.3, 0.8))
    scene.paste(floor.crop((0, horizon, *size)), (0, horizon))
    things = (
        [_oval(50, 50, 50, 50)],  # a ball
        [_band((0, 50, 50, 40, 100, 50), 80)],  # a cushion
        [np.array([(0, 10), (100, 0), (100, 100), (0, 90)])],  # a box
        [np.array([(40, -300), (60, -300), (60, 100), (40, 100)])],  # the leg of a table
        [_band((50, 100, 50, 30, x, 10), 20) for x in (-20, 40, 110)],  # a plant
    )
    for count in rng.integers(1, 4, size=2):  # two sets, each of one texture
        parts = []
        for kind in rng.integers(len(things), size=count):
            place = _placement(rng, size, rng.uniform(0.2, 0.5), rng.uniform(0, 1, 2))
            parts += [(place(outline), 230) for outline in things[kind]]
        _paint(scene, parts, _texture(rng, size))
    return scene


def _oval(x, y, rx, ry):
    """Return the outline of an ellipse, as points (x, y)."""
    turn = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def _band(path, width):
    """Return the outline of a round-ended band; path is x and y of its start, bend and end."""
    start, bend, end = np.reshape(path, (3, 2))
    t = np.linspace(0, 1, 20)[:, None]
    middle = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    along = (1 - t) * (bend - start) + t * (end - bend)
    across = along[:, ::-1] * (-1, 1) / np.linalg.norm(along, axis=1, keepdims=True)
    across *= width / 2 * np.sqrt(1 - (2 * t - 1) ** 6)
    return np.concatenate([middle + across, (middle - across)[::-1]])


def _placement(rng, size, scale, centre):
    """Return a function that turns, scales, moves and perhaps mirrors an outline."""
    turn = rng.normal(0, 0.12)
    axes = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    axes = axes * scale * min(size) / 100
    axes[0] *= rng.choice((-1, 1))  # mirrors left and right
    return lambda outline: ((outline - 50) @ axes + centre * size).ravel().tolist()


def _texture(rng, size, colours=None, pattern=None):
    """Return a picture of two colours, mixed by noise or wavy stripes: any, unless given."""
    colours = colours or [COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False)]
    cells, stripes, contrast = PATTERNS[pattern or rng.choice(list(PATTERNS))]
    noise = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    wave = np.asarray(noise.resize(size, Image.Resampling.BICUBIC))
    if stripes:
        down, right = rng.standard_normal(2, dtype=np.float32)
        y, x = np.ogrid[: size[1], : size[0]]
        turn = np.float32(2 * np.pi * stripes / np.hypot(down, right) / min(size))
        wave = np.sin(turn * (right * x.astype(np.float32) + down * y.astype(np.float32)) + wave)
    mix = np.clip(128 + 128 * contrast * wave, 0, 255).astype(np.uint8)
    first, second = (Image.new("RGB", size, colour) for colour in colours)
    return Image.composite(second, first, Image.fromarray(mix))


def _paint(scene, parts, texture):
    """Paint parts (outline, brightness) with a texture, shading and a shadow; return their mask."""
    shade = Image.new("L", scene.size)
    pen = ImageDraw.Draw(shade)
    for points, tone in parts:
        pen.polygon(points, fill=tone, outline=tone * 2 // 3)
    mask = shade.point([0, *[255] * 255])
    soft = mask.reduce(4).filter(ImageFilter.BoxBlur(1.5)).point(lambda v: v // 2)
    soft = soft.resize(scene.size, Image.Resampling.BILINEAR)
    scene.paste(BLACK, mask=ImageChops.offset(soft, 4, 5))  # the shadow
    shade = ImageChops.multiply(shade, soft.point(lambda v: min(128 + v, 255)))
    scene.paste(ImageChops.multiply(texture, Image.merge("RGB", [shade] * 3)), mask=mask)
    return mask


def _light(rng, picture):
    """Return the picture, slightly blurred, under a lamp on one side and with a camera's noise."""
    width, height = picture.size
    level, across, down = rng.uniform((190, -40, -40), (245, 40, 40))
    lamp = level + np.linspace(-across, across, width) + np.linspace(-down, down, height)[:, None]
    lamp = lamp + 9 * rng.standard_normal((height, width), dtype=np.float32)
    lamp = Image.fromarray(np.clip(lamp, 0, 255).astype(np.uint8))
    blurred = picture.filter(ImageFilter.BoxBlur(0.4))
    return ImageChops.multiply(blurred, Image.merge("RGB", [lamp] * 3))
