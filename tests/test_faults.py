"""Real faults: kills, full disks, damaged files, odd values. Each ends right or in one sentence.

`make faults` runs the long form, with more of each.
"""

import gzip
import hashlib
import http.server
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import at_step
from filelock import FileLock
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import TINY, new_net
from torchvision.datasets import OxfordIIITPet

import petseg_utils as pets
from conftest import alike, one_sentence, same_weights, told
from experiments import run_notebook, sweep
from petseg_utils import InputError, Recipe, UNet, draw_sample_pets, train
from support import machine, safe_files
from support.checkpoints import finite, load_tensors, save_tensors

LONG = os.environ.get("PETSEG_FAULTS") == "long"
KILLS, EXAMPLES = (30, 400) if LONG else (2, 20)
LONGEST = 300  # seconds that anything may take, on a machine that is busy with other things, too
long = pytest.mark.skipif(not LONG, reason="takes minutes: make faults runs it")
linux = pytest.mark.skipif(sys.platform != "linux", reason="uses limits and mounts of Linux")


def write(path: Path, data: bytes) -> None:
    pets.write_atomically(path, lambda file: file.write(data))


# A process of its own, without the seconds that importing PyTorch takes.
FORK = multiprocessing.get_context("fork")


def child(act, *arguments) -> multiprocessing.Process:
    """Start `act` in a process of its own."""
    process = FORK.Process(target=act, args=arguments, daemon=True)
    process.start()
    return process


def kill(process: multiprocessing.Process) -> None:
    """End a process as a loss of power would: by SIGKILL."""
    process.kill()
    process.join()


def complaint(act) -> str:
    """Return the message of the `InputError` with which `act` ends in a process of its own."""
    said = FORK.SimpleQueue()

    def run():
        try:
            act()
            said.put("It ended well")
        except BaseException as error:
            said.put(str(error) if isinstance(error, InputError) else repr(error))

    child(run).join(LONGEST)
    return said.get()


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    limit = time.monotonic() + LONGEST
    while not path.exists():
        assert time.monotonic() < limit, path
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------- disk


@pytest.fixture
def tiny_disk(tmp_path):
    """Return a folder on a disk of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk of its own")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("epoch", [1, 2])
def test_disk_that_fills_up_in_training_keeps_the_last_checkpoint(tiny_disk, splits, epoch):
    path, other = tiny_disk / "checkpoint.pt", tiny_disk / "other"
    model, whole = new_net(), new_net()

    def fill():
        with suppress(OSError), other.open("wb") as file:
            file.write(bytes(3_000_000))

    at_step(model, 2 * epoch, fill)
    with one_sentence(path, "No space left"):
        train(model, *splits, TINY, path)
    assert len(load_tensors(path)["history"]) == epoch
    other.unlink()
    assert len(train(model, *splits, TINY, path)) == 3  # the same call goes on
    train(whole, *splits, TINY)
    assert same_weights(model, whole)


@linux
def test_limit_of_a_files_size_is_told_and_the_old_file_stays(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_too_much():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        write(path, bytes(3_000_000))

    told(complaint(write_too_much), path, "File too large")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_read_only_disk_is_told(tiny_disk, splits):
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    for act in (
        lambda: write(tiny_disk / "file", b"new"),
        lambda: safe_files.own_folder(tiny_disk, 0),
        lambda: draw_sample_pets(tiny_disk, 2, 1, side=32),
        lambda: train(new_net(), *splits, TINY, tiny_disk / "checkpoint.pt"),
    ):
        with one_sentence(tiny_disk, "Read-only"):
            act()


def test_too_little_room_is_told_before_the_start(tiny_disk):
    with one_sentence("3 MB", tiny_disk):
        safe_files.own_folder(tiny_disk, 3_000_000)
    checkpoint = 3 * 4 * 13_385_475  # three copies of the weights; there may be three of it
    assert machine.room_for(Recipe(BASE_CHANNELS=32)) > 3 * checkpoint


def test_folder_where_a_file_should_be_is_told(tmp_path):
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with one_sentence(tmp_path / "file"):
        write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("act", [
    lambda path: write(path / "figures" / "a.png", b"new"),
    lambda path: safe_files.own_folder(path / "run", 0),
    lambda path: draw_sample_pets(path, 2, 1, side=32),
    lambda path: load_tensors(path / "weights.pt"), pets.read_run, pets.find_dataset,
], ids=["write", "own", "draw", "tensors", "run", "dataset"])  # fmt: skip
def test_file_where_a_folder_should_be_is_told(tmp_path, act):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with one_sentence(path):
        act(path)
    assert path.read_bytes() == b"old"


def test_content_reaches_the_disk_before_the_new_name_does(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace

    def noted(number):
        order.append(os.readlink(f"/proc/self/fd/{number}"))
        sync(number)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("renamed"), replace(*names)))
    write(tmp_path / "file", b"new")
    draft, *rest = order
    assert draft.endswith(".draft")
    assert rest == ["renamed", str(tmp_path)]


@linux
def test_kill_while_a_checkpoint_is_written_leaves_the_old_one_or_the_new(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def write_on():
        for epoch in itertools.count():
            save_tensors(path, {"epoch": epoch, "weights": torch.full((1_000_000,), epoch)})

    for number in range(KILLS):
        process = child(write_on)
        wait_for(path)
        time.sleep(random.Random(number).uniform(0, 0.1))
        kill(process)
        content = load_tensors(path)
        assert (content["weights"] == content["epoch"]).all()
        path.unlink()


# -------------------------------------------------------------------------------------- two at once


def owner(folder: Path, enough) -> multiprocessing.Process:
    """Start a process that owns a run's folder until the event `enough`."""
    mine = FORK.Event()

    def own():
        safe_files.own_folder(folder, 0)
        mine.set()
        enough.wait()

    process = child(own)
    assert mine.wait(LONGEST)
    return process


@linux
def test_second_run_in_a_folder_is_refused_but_not_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files, "PATIENCE", 0.1)
    for _ in range(KILLS):
        first = owner(tmp_path / "run", FORK.Event())
        with one_sentence("another run", tmp_path / "run", "RUN_NAME"):
            safe_files.own_folder(tmp_path / "run", 0)
        kill(first)
    safe_files.own_folder(tmp_path / "run", 0)
    safe_files.own_folder(tmp_path / "run", 0)  # a cell can run again


@linux
def test_process_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch):
    """It ends as soon as the second one says that it waits, however slow the machine is."""
    enough = FORK.Event()

    class Ending(io.StringIO):
        def write(self, text: str) -> int:
            enough.set()
            return super().write(text)

    monkeypatch.setattr(safe_files, "PATIENCE", LONGEST)
    monkeypatch.setattr(sys, "stderr", Ending())
    first = owner(tmp_path / "run", enough)
    safe_files.own_folder(tmp_path / "run", 0)
    first.join()
    assert "waiting" in sys.stderr.getvalue()


def test_drafts_of_killed_runs_are_removed_with_the_start_of_the_next(tmp_path):
    (tmp_path / "figures").mkdir()
    drafts = [tmp_path / ".weights.pt.7.draft", tmp_path / "figures" / ".a.png.8.draft"]
    kept = tmp_path / "checkpoint.pt"
    for path in (*drafts, kept):
        path.write_bytes(b"")
    safe_files.own_folder(tmp_path, 0)
    assert kept.exists()
    assert not any(map(Path.exists, drafts))


def test_open_run_owns_the_folder_that_the_recipe_names(monkeypatch, tmp_path):
    monkeypatch.setattr("support.runs.ROOT", tmp_path)
    assert pets.open_run(Recipe(RUN_NAME="mine")) == tmp_path / "runs" / "mine"
    assert (tmp_path / "runs" / "mine" / ".lock").exists()


@linux
def test_drawing_at_once_draws_once_and_clears_what_killed_ones_left(tmp_path):
    (tmp_path / ".drawing-killed" / "new").mkdir(parents=True)
    drawing = [child(draw_sample_pets, tmp_path, 12, 6, 0, 32) for _ in range(25 if LONG else 4)]
    for process in drawing:
        process.join(LONGEST)
        assert process.exitcode == 0
    assert len(list((tmp_path / "oxford-iiit-pet" / "images").iterdir())) == 18
    assert not list(tmp_path.glob(".drawing-*"))


@linux
def test_killed_drawings_leave_nothing_that_looks_like_a_dataset(tmp_path):
    for number in range(KILLS):
        process = child(draw_sample_pets, tmp_path, 3000, 100)
        time.sleep(random.Random(number).uniform(0.05, 0.5))
        kill(process)
        assert not (tmp_path / "oxford-iiit-pet").exists()
    draw_sample_pets(tmp_path, 4, 2, side=32)
    assert not list(tmp_path.glob(".drawing-*"))


# ----------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def splits(pets):
    """Return images to train and to validate on, the same ones: two steps in each epoch."""
    return pets, pets


def ctrl_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("steps", range(6))
def test_interrupted_training_says_what_is_kept_and_the_same_cell_goes_on(tmp_path, splits, steps):
    path, whole, model = tmp_path / "checkpoint.pt", new_net(), new_net()
    history = train(whole, *splits, TINY)
    at_step(model, steps, ctrl_c)
    kept = f"{path} keeps {steps // 2}" if steps >= 2 else "none was kept"
    with one_sentence("of 3 epochs", kept, "run this cell again"):
        train(model, *splits, TINY, path)
    assert same_weights(model, new_net())  # as before the cell
    again = train(model, *splits, TINY, path)
    assert same_weights(model, whole)
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in history]


@pytest.mark.parametrize("changes", [{}, {"LEARNING_RATE": 0.002}], ids=["no file", "other recipe"])
def test_interrupted_training_without_its_own_checkpoint_starts_anew(tmp_path, splits, changes):
    path, other = tmp_path / "checkpoint.pt" if changes else None, TINY.but(**changes)
    whole, model = new_net(), new_net()
    train(whole, *splits, other)
    at_step(model, 3, ctrl_c)
    with one_sentence(path or "none was kept"):
        train(model, *splits, TINY, path)
    train(model, *splits, other, path)
    assert same_weights(model, whole)
    assert not path or len(load_tensors(path.with_suffix(".old.pt"))["history"]) == 1


def test_no_images_are_told(splits):
    some, empty = splits[0], pets.Pets([], *(tensor[:0] for tensor in splits[0][1:3]))
    assert pets.evaluate(new_net(), empty, torch.float32).shape == (0, 3, 3)
    with one_sentence("no pixels"):
        pets.scores(torch.zeros(3, 3, dtype=torch.int64))
    for pair, missing in (((some, empty), "valid"), ((empty, some), "train")):
        with one_sentence(f"no {missing} images"):
            train(new_net(), *pair, TINY)


# ---------------------------------------------------------------------------------- untrusted files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, splits) -> Path:
    """Return a checkpoint after one of three epochs."""
    path, model = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt", new_net()
    at_step(model, 2, ctrl_c)
    with pytest.raises(InputError):
        train(model, *splits, TINY, path)
    return path


def test_flipped_bits_are_refused_or_hit_nothing(tmp_path):
    """Each bit of a small file with all that a checkpoint holds, or each seventh."""
    path, intact = tmp_path / "file.pt", {"weights": torch.ones(20), "history": [{"epoch": 1.0}]}
    save_tensors(path, intact)
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 1 if LONG else 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert alike(load_tensors(path), intact), bit
        except InputError as error:
            told(error, path)


NAN, GONE = math.nan, object()
CHECKPOINTS = {  # what is changed, inside of what, and to what
    "NaN weights": ("model/out.bias", torch.full((3,), NAN)),
    "NaN in the history": ("history/0/train_loss", NAN),
    "empty schedule": ("schedule", {}),
    "history a text": ("history", "one"),
    "history of empty rows": ("history", [{}]),
    "history of wrong epochs": ("history/0/epoch", 2),
    "history with a text": ("history/0/train_loss", "low"),
    "no history": ("history", GONE),
    "no model": ("model", GONE),
    "model a list": ("model", []),
    "a weight missing": ("model/out.bias", GONE),
    "a weight too many": ("model/more", torch.ones(1)),
    "a weight of another shape": ("model/out.bias", torch.ones(4)),
    "a weight a text": ("model/out.bias", "heavy"),
    "no recipe": ("recipe", GONE),
    "another recipe": ("recipe/LEARNING_RATE", 0.5),
    "optimizer empty": ("optimizer", {}),
    "optimizer without groups": ("optimizer/param_groups", []),
    "momentum missing": ("optimizer/state/0", {}),
    "momentum of another shape": ("optimizer/state/0/momentum", torch.ones(5)),
    "a list": ("", [1, 2]),
    "empty": ("", {}),
}


def changed(content: dict, place: str, value: object) -> object:
    """Return a checkpoint in which another value, or none, is at a place, or instead of it all."""
    if not place:
        return value
    *way, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    inner = content
    for key in way:
        inner = inner[key]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return content


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_checkpoint_that_somebody_changed_is_refused(checkpoint, tmp_path, splits, damage):
    path, model = tmp_path / "checkpoint.pt", new_net()
    save_tensors(path, changed(load_tensors(checkpoint), *CHECKPOINTS[damage]))
    with one_sentence(path):
        train(model, *splits, TINY.but(RESUME=True), path)
    assert same_weights(model, new_net())


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PETSEG_EVIL"],)


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


OLD_FORMAT = {"_use_new_zipfile_serialization": False}
RAW = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "first byte missing": lambda data: data[1:],
    "noise": lambda data: random.Random(0).randbytes(len(data)),
    "zip of nothing": lambda data: b"PK\x05\x06" + bytes(18),
    "pickle with code": lambda data: pickle.dumps({"model": Evil()}),
    "torch file with code": lambda data: saved({"model": Evil()}),
    "old torch format": lambda data: saved({"a": torch.ones(1)}, **OLD_FORMAT),
    "a block of zeros": lambda data: data[:3000] + bytes(512) + data[3512:],
}


@pytest.mark.parametrize("damage", RAW)
def test_what_is_no_checkpoint_runs_no_code(checkpoint, tmp_path, splits, monkeypatch, damage):
    monkeypatch.setenv("PETSEG_EVIL", str(tmp_path / "evil"))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(RAW[damage](checkpoint.read_bytes()))
    with one_sentence(path):
        train(new_net(), *splits, TINY.but(RESUME=True), path)
    with one_sentence(path):
        pets.load_weights(path, new_net())
    assert not (tmp_path / "evil").exists()


# ----------------------------------------------------------------------------------------- datasets


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return draw_sample_pets(tmp_path_factory.mktemp("intact"), 24, 12, seed=0, side=48)


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    """Return a dataset to damage."""
    return Path(shutil.copytree(intact, tmp_path / "oxford-iiit-pet"))


def read(folder: Path) -> dict[str, pets.Pets]:
    """Do with a dataset what the notebook does."""
    train_names, valid_names = pets.hold_out(pets.read_split(folder, "trainval"))
    names = {"train": train_names, "valid": valid_names, "test": pets.read_split(folder, "test")}
    pets.check_run(Recipe(BATCH_SIZE=8), **names)
    return {split: pets.load_pets(folder, chosen, 32, split) for split, chosen in names.items()}


PHOTO, TRIMAP = "images/Bengal_1.jpg", "annotations/trimaps/Bengal_1.png"
TRAINVAL, TEST = "annotations/trainval.txt", "annotations/test.txt"


def rewritten(file: str, change):
    """Return a damage that writes what `change` makes of a file's `text`, `image` or `data`."""
    of = change.__code__.co_varnames[0]

    def damage(folder):
        path = folder / file
        data = path.read_bytes()
        given = {"text": data.decode, "image": lambda: Image.open(path), "data": lambda: data}
        new = change(given[of]())
        path.write_bytes(new.encode() if isinstance(new, str) else new)

    return damage


trainval = partial(rewritten, TRAINVAL)


def renamed(new: str, encoding: str = "utf-8"):
    """Return a damage that renames the first image, everywhere."""

    def damage(folder):
        for file in (PHOTO, TRIMAP):
            (folder / file).rename(folder / file.replace("Bengal_1", new))
        trainval(lambda text: text.replace("Bengal_1 ", f"{new} ").encode(encoding))(folder)

    return damage


def removed(file: str, instead=lambda path: None):
    """Return a damage that removes a file, or makes something else in its place."""

    def damage(folder):
        (folder / file).unlink()
        instead(folder / file)

    return damage


def encode(image: Image.Image, format: str, mode: str = "", **options) -> bytes:
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def recoded(*arguments, **options):
    """Return a damage that stores a photo in another format or mode: see `encode`."""
    return rewritten(PHOTO, lambda image: encode(image, *arguments, **options))


def pointed(*values: int):
    """Return a damage that stores other values for 0, 1, 2, ... in a trimap."""
    table = [*values, *[values[-1]] * (256 - len(values))]
    return rewritten(TRIMAP, lambda image: encode(image.point(table), "PNG"))


def turned(note: int, stored=None, trimap_too: bool = False, square: bool = False):
    """Return a damage that stores a photo turned, with the EXIF note that says so."""

    def damage(folder):
        image, labels = (Image.open(folder / file) for file in (PHOTO, TRIMAP))
        if square:
            image, labels = (one.resize((40, 40), 0) for one in (image, labels))  # nearest
        exif = Image.Exif()
        exif[0x112] = note
        photo = image.transpose(stored) if stored is not None else image
        photo.save(folder / PHOTO, "JPEG", quality=95, exif=exif)
        (labels.transpose(stored) if trimap_too else labels).save(folder / TRIMAP)

    return damage


def linked(folder):
    (folder / PHOTO).rename(folder / "elsewhere.jpg")
    (folder / PHOTO).symlink_to(folder / "elsewhere.jpg")


def grey16(image):
    return encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


TURN = Image.Transpose
RIGHT = {  # these load as the intact dataset does
    "as it is": lambda folder: None,
    "UTF-8 with BOM": trainval(lambda text: b"\xef\xbb\xbf" + text.encode()),
    "UTF-16": trainval(lambda text: text.encode("utf-16")),
    "Latin-1 comment": trainval(lambda text: "# ausgewählt\n".encode("latin-1") + text.encode()),
    "Latin-1 name": renamed("Bengalé_1", "latin-1"),
    "UTF-8 name": renamed("孟加拉_1"),
    "UTF-16 name": renamed("孟加拉_1", "utf-16"),
    "line ends of Windows": trainval(lambda text: text.replace("\n", "\r\n")),
    "line ends of an old Mac": trainval(lambda text: text.replace("\n", "\r")),
    "no last line end": trainval(lambda text: text.rstrip()),
    "blank lines": trainval(lambda text: text.replace("\n", "\n \n")),
    "indented comment": trainval(lambda text: "   # Image\n\t#\n" + text),
    "tabs and spaces": trainval(lambda text: text.replace(" ", "\t").replace("\n", "   \n  ")),
    "names alone": trainval(lambda text: re.sub(" .*", "", text)),
    "one column less": trainval(lambda text: re.sub(r" \d+\n", "\n", text)),
    "name with space, hyphen and dot": renamed("Ben gal-a.b+c_1"),
    "name of 200 letters": renamed("B" * 198 + "_1"),
    "link to a photo": linked,
    "RGBA PNG named jpg": recoded("PNG", "RGBA"),
    "GIF named jpg": recoded("GIF"),
    "photo with bytes behind it": rewritten(PHOTO, lambda data: data + b"more" * 99),
    "EXIF 8, trimap as shown": turned(8, TURN.ROTATE_270),
    "EXIF 5, trimap as shown": turned(5, TURN.TRANSPOSE),
    "junk of a Mac": lambda folder: (folder / "images" / "._Bengal_1.jpg").write_bytes(b"junk"),
}
LISTED = [  # names in trainval.txt that are refused
    "/etc/passwd", "../outside/x_1", "a/../../x_1", "more/x_1", "..\\outside\\x_1", "C:x_1",
    "x\0_1", "x\x1b[31m_1", "pug$\\x$_1", "<img/src=x>_1", ".hidden_1", "🐱_1",
    "x" * 298 + "_1", "猫" * 98 + "_1",
]  # fmt: skip
REPLACED = {  # what takes a file's place, made of it, with words of the sentence
    TRAINVAL: {
        "gzip": (lambda text: gzip.compress(text.encode()), "gzip"),
        "UTF-16 without its mark": (lambda text: text.encode("utf-16-le"), "line 1"),
        "noise": (lambda text: random.Random(1).randbytes(2000), "line"),
        "zeros": (lambda text: bytes(500), "line 1"),
        "empty": (lambda text: "", "names no images", "extract"),
        "comments only": (lambda text: "# nothing\n#\n \n", "names no images"),
        "cut in a line": (lambda text: text[:-12] + "\npu", "line 24"),
        "a name twice": (lambda text: text + text.splitlines()[2], "twice", "lines 3 and 25"),
        "a name of nothing": (
            lambda text: text + "x_1 1 1 1", "images/x_1.jpg", "line 25", "2 files"
        ),
    },
    TEST: {
        "names twice": (lambda text: text * 2, "lines 1 and 13"),
        "a name of the other split": (
            lambda text: text + "Bengal_1 2 1 1\n", "Bengal_1", "trainval.txt", "line 1", "line 13"
        ),
    },
    PHOTO: {
        "empty": (lambda data: b"", "replace it"),
        "cut": (lambda data: data[: len(data) // 2],),
        "an unfinished PPM header": (lambda data: b"P6 12",),
        "without its first byte": (lambda data: data[1:],),
        "a cut PNG": (lambda image: encode(image, "PNG")[:-40],),
        "of 16 bits": (lambda image: grey16(image), "8 bits"),
        "of floats": (lambda image: encode(image.convert("L"), "TIFF", "F"), "8 bits"),
        "of 225 megapixels": (
            lambda data: encode(Image.new("1", (15000, 15000)), "PNG"), "15000", "200,000,000"
        ),
    },
    TRIMAP: {
        "empty": (lambda data: b"", "replace it"),
        "cut": (lambda data: data[: len(data) // 2],),
        "with a wrong checksum": (lambda data: data[:45] + bytes([data[45] ^ 1]) + data[46:],),
        "in colour": (lambda image: encode(image, "PNG", "RGB"), "RGB"),
        "of 16 bits": (lambda image: grey16(image),),
        "a JPEG": (lambda image: encode(image.point(lambda v: v * 60), "JPEG"),),
        "of another size": (lambda image: encode(image.resize((9, 9)), "PNG"), "(9, 9)"),
    },
}  # fmt: skip
WRONG = {  # these are refused, in a sentence with these words
    "trimap of 0, 1, 2": (pointed(0, 0, 1, 2), "Bengal_1.png", "value 0"),
    "trimap with a 4": (pointed(1, 1, 2, 4, 2), "Bengal_1.png", "value 4"),
    "trimap of 0 and 255": (pointed(0, 255, 0), "Bengal_1.png", "value 0"),
    "split missing": (removed(TRAINVAL), "trainval.txt", "missing"),
    "split a folder": (removed(TRAINVAL, os.mkdir), "trainval.txt", "missing"),
    "photo missing": (removed(PHOTO), PHOTO, "line 1"),
    "photo a pipe": (removed(PHOTO, os.mkfifo), "Bengal_1.jpg"),
    "trimap missing": (removed(TRIMAP), "Bengal_1.png", "line 1"),
    "photos missing": (lambda folder: shutil.rmtree(folder / "images"), "24 files", "extract"),
    "photo of another size": (
        rewritten(PHOTO, lambda image: encode(image.resize((30, 31)), "JPEG")),
        "Bengal_1.png", "31",
    ),
    "EXIF 6, trimap as stored": (turned(6, TURN.ROTATE_90, trimap_too=True), "Bengal_1.png"),
    "EXIF 3: half a turn": (turned(3, TURN.ROTATE_180), "Bengal_1.jpg", "turned"),
    "EXIF 2: mirrored": (turned(2, TURN.FLIP_LEFT_RIGHT), "Bengal_1.jpg", "turned"),
    "EXIF 6, square": (turned(6, TURN.ROTATE_90, square=True), "Bengal_1.jpg", "turned"),
}  # fmt: skip
for name in LISTED:
    added = trainval(lambda text, name=name: f"{text}{name} 1 1 1\n")
    WRONG[f"name {name[:20]!a}"] = added, "trainval.txt", "line 25"
for file, kinds in REPLACED.items():
    for kind, (change, *words) in kinds.items():
        WRONG[f"{Path(file).name} {kind}"] = rewritten(file, change), Path(file).name, *words


def by_name(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return image and mask by the name."""
    splits = read(folder).values()
    return {n: (i.int(), m) for split in splits for n, i, m in zip(*split[:3], strict=True)}


@pytest.fixture(scope="module")
def expected(intact) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return by_name(intact)


@pytest.mark.parametrize("damage", RIGHT)
def test_odd_dataset_loads_as_the_intact_one_does(expected, folder, damage):
    RIGHT[damage](folder)
    found = by_name(folder)
    new_name = (found.keys() - expected.keys() or {"Bengal_1"}).pop()  # after `renamed`
    image, mask = found.pop(new_name)
    assert (image - expected["Bengal_1"][0]).abs().float().mean() < 8  # JPEG loses a little
    assert (mask == expected["Bengal_1"][1]).float().mean() > 0.98
    assert expected.keys() - found.keys() == {"Bengal_1"}
    assert all(alike(pair, expected[name]) for name, pair in found.items())


def test_grey_photo_and_a_trimap_that_is_all_background_load(folder):
    recoded("JPEG", "L")(folder)
    pointed(2)(folder)
    assert sum(len(split.names) for split in read(folder).values()) == 36


@pytest.mark.parametrize("damage", WRONG)
def test_damaged_dataset_is_told(folder, damage):
    change, *words = WRONG[damage]
    change(folder)
    (folder.parent / "outside").mkdir()
    with one_sentence(*words):
        read(folder)


@pytest.mark.parametrize(("count", "names"), [(1, 1), (5, 5), (10, 10), (12, 10)])
def test_all_bad_files_of_all_splits_are_told_when_one_is_loaded(folder, count, names):
    paths = sorted((folder / "annotations" / "trimaps").glob("*.png"))
    for path in paths[:count]:
        path.write_bytes(b"no picture")
    with pytest.raises(InputError) as caught:
        pets.load_pets(folder, pets.read_split(folder, "trainval"), 16)
    message = str(caught.value)
    told(message, f"{count} of 36 images" if count > 1 else "")
    assert message.count(".png cannot be decoded") == names
    assert ("and 2 more" in message) == (count == 12)


# ------------------------------------------------------------------------------------------- values


FIELDS = Recipe.model_fields
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=300),
    st.binary(max_size=20), st.lists(st.integers(), max_size=3), st.text("猫_.-", max_size=100),
    st.sampled_from([
        10**5000, -(10**5000), "a" * 10**6,
        "nan", "../x", "/etc", "a\0b", "False", "0", "", " ", "\ud800",
    ]),
)  # fmt: skip
EDGES = [128, 256, 512, 1000, 1024, 1025, 2**31 - 1, 2**31]
RATES = [0.0, 1e-300, 100.0, 101.0, math.inf, NAN]
LIKELY = {
    int: st.integers(-3, 70) | st.sampled_from(EDGES),
    float: st.floats(-0.1, 1.1) | st.sampled_from(RATES),
    bool: st.booleans(),
}
ANY_OF = {
    name: LIKELY.get(field.annotation, st.text(max_size=20)) | ANYTHING
    for name, field in FIELDS.items()
}
SMALL = {
    "IMAGE_SIZE": st.sampled_from([8, 16, 24, 32, 48, 64]), "DEPTH": st.integers(1, 4),
    "BASE_CHANNELS": st.integers(0, 6), "NORMS": st.integers(1, 2),
    "EPOCHS": st.integers(0, 3), "BATCH_SIZE": st.integers(1, 9),
    "SMALL_EPOCHS": st.sampled_from(["", "1 at 8", "1 at 16", "1 at 8, 1 at 16"]),
    "SCORE_SIZE": st.sampled_from([0, 7, 8, 33, 100]), "SEED": st.integers(-1, 2**31),
    "SKIPS": LIKELY[bool], "MUON": LIKELY[bool], "LINEAR_DECAY": LIKELY[bool],
    "AVERAGE": LIKELY[bool], "FLIP": LIKELY[bool], "LEARNING_RATE": LIKELY[float],
    "WEIGHT_DECAY": LIKELY[float], "DICE_WEIGHT": LIKELY[float], "AUGMENT": LIKELY[float],
}  # fmt: skip
# Without a deadline, which a busy machine would miss.
bounded = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
VERY_LONG = "猫x" * 2000


@pytest.mark.parametrize("act", [
    lambda: Recipe(**{VERY_LONG: 1}), lambda: Recipe(EPOCHS=VERY_LONG),
    lambda: pets.find_dataset(VERY_LONG), lambda: sweep.main("", workers=VERY_LONG),
], ids=range(4))  # fmt: skip
def test_very_long_name_or_value_is_not_repeated_whole(act):
    with pytest.raises(InputError) as caught:
        act()
    told(caught.value)
    assert len(str(caught.value)) < 1300  # all parameters' names alone take 400


@pytest.mark.parametrize("name", FIELDS)
def test_any_value_of_any_parameter_is_taken_or_refused_at_once(name):
    @bounded
    @given(ANY_OF[name])
    def check(value):
        try:
            recipe = Recipe(**{name: value})
            pets.check_run(recipe, train=["a"] * 2000, valid=["a"], test=["a"])
            if name == "DATA_DIR":
                pets.find_dataset(recipe.DATA_DIR)
            if name == "PHOTO" and recipe.PHOTO:
                pets.open_image(pets.ROOT / recipe.PHOTO)
        except InputError as error:
            told(error)

    check()


@bounded
@given(st.fixed_dictionaries({}, optional=SMALL))
@example({"EPOCHS": 1, "BATCH_SIZE": 8})  # a single step
# The bottleneck has one pixel: a batch of the image left over would have nothing to normalise.
@example({"IMAGE_SIZE": 8, "DEPTH": 3, "BATCH_SIZE": 7})
def test_any_combination_trains_or_is_refused(intact, values):
    side = values.get("IMAGE_SIZE", 16)
    score = values.get("SCORE_SIZE") or side
    drawn = torch.Generator().manual_seed(0)
    names = pets.read_split(intact, "trainval")

    def some(count, masks):
        images = torch.randint(256, (count, 3, side, side), generator=drawn, dtype=torch.uint8)
        labels = torch.randint(3, (count, masks, masks), generator=drawn, dtype=torch.uint8)
        return pets.Pets(names[:count], images, labels, intact)  # loaded again by SMALL_EPOCHS

    try:
        recipe = TINY.but(**{"EPOCHS": 1, "BATCH_SIZE": 4} | values)
        model = new_net(recipe)
        held_out = some(3, score)
        history = train(model, some(8, side), held_out, recipe)
        assert len(history) == recipe.EPOCHS
        assert finite(history)
        assert pets.evaluate(model, held_out, torch.float32, flip=recipe.FLIP).sum() == 3 * score**2
    except InputError as error:
        told(error)


# ------------------------------------------------------------------------------------------- memory


REAL = {"train": 3311, "valid": 369, "test": 3669}


@pytest.mark.parametrize(("values", "advice"), [
    ({"SCORE_SIZE": 1024}, "SCORE_SIZE"), ({"IMAGE_SIZE": 1024}, "IMAGE_SIZE"),
    ({"BASE_CHANNELS": 256, "DEPTH": 7, "IMAGE_SIZE": 128}, "BASE_CHANNELS"),
    ({"IMAGE_SIZE": 128, "BATCH_SIZE": 1024, "BASE_CHANNELS": 32}, "BATCH_SIZE"),
], ids=str)  # fmt: skip
def test_run_that_does_not_fit_is_refused_with_a_size_that_does(monkeypatch, values, advice):
    sizes, forecast = [], machine.forecast
    monkeypatch.setattr(machine, "forecast", lambda *given: sizes.append(given) or forecast(*given))
    monkeypatch.setattr(machine, "free_memory", lambda: 16_000_000_000)
    recipe = Recipe(**values)
    with pytest.raises(InputError) as caught:
        machine.check_memory(recipe, REAL)
    assert len(sizes) < 3000  # which takes a second at most
    message = str(caught.value)
    told(message, "16.0 GB are free", f"{advice} ")
    size = int(message.split(f": {advice} ")[1].split()[0])
    machine.check_memory(recipe.but(**{advice: size}), REAL)


def test_runs_that_fit_are_not_refused(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 8_000_000_000)
    machine.check_memory(Recipe(), {"train": 288, "valid": 32, "test": 80})
    sizes = {"IMAGE_SIZE": 128, "SCORE_SIZE": 256, "BASE_CHANNELS": 32, "EPOCHS": 13}
    machine.check_memory(Recipe(**sizes, SMALL_EPOCHS="2 at 64, 3 at 128", FLIP=True), REAL)


def limit_memory(more: int) -> None:
    """Let this process take so many bytes more of address space."""
    size = machine.psutil.Process().memory_info().vms + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


@linux
@pytest.mark.parametrize("what", ["train", "evaluate", "load"])
def test_memory_that_runs_out_is_told(what, intact, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2**60)  # as if the forecast were too low
    side, names = 512, pets.read_split(intact, "test") * 500
    images, masks = (torch.zeros(48, *of, side, side, dtype=torch.uint8) for of in ((3,), ()))
    some = pets.Pets(names[:48], images, masks)
    recipe = Recipe(IMAGE_SIZE=side, BATCH_SIZE=48, EPOCHS=1, AUGMENT=0.0)
    acts = {
        "train": lambda: train(UNet(16, 5), some, some, recipe),
        "evaluate": lambda: pets.evaluate(UNet(16, 5), some, torch.float32),
        "load": lambda: pets.load_pets(intact, names, 1024),
    }
    told(complaint(lambda: (limit_memory(500_000_000), acts[what]())), "the memory ran out")


@linux
def test_limit_of_the_address_space_is_forecast():
    names = {"train": ["a"] * 288, "valid": ["a"] * 32, "test": ["a"] * 80}
    large = Recipe(BASE_CHANNELS=64)  # larger than this process may be already
    said = complaint(lambda: (limit_memory(100_000_000), pets.check_run(large, **names)))
    told(said, "GB are free")


# ----------------------------------------------------------------------------------------- download


DOWNLOADS = {  # what becomes of the first archive
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "not there": Path.unlink,
}


@pytest.fixture
def served(intact, tmp_path, monkeypatch):
    """Return the folder from which the two archives of a small dataset are downloaded."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        resources = []
        for name in ("images", "annotations"):
            path = tmp_path / f"{name}.tar.gz"
            with tarfile.open(path, "w:gz") as archive:
                archive.add(intact / name, name)
            address = f"http://127.0.0.1:{host.server_port}/{path.name}"
            resources.append((address, hashlib.md5(path.read_bytes()).hexdigest()))
        monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", resources)
        yield tmp_path
        host.shutdown()


@pytest.mark.parametrize("fault", DOWNLOADS)
def test_download_after_a_fault_works_again(served, expected, tmp_path, fault):
    archive = served / "images.tar.gz"
    whole = archive.read_bytes()
    DOWNLOADS[fault](archive)
    with one_sentence("try again", "images.tar.gz", "annotations.tar.gz"):
        pets.find_dataset(tmp_path / "data", download=True)
    archive.write_bytes(whole)
    assert alike(by_name(pets.find_dataset(tmp_path / "data", download=True)), expected)


def test_download_without_a_network_is_told(tmp_path, monkeypatch):
    nowhere = [("http://127.0.0.1:9/images.tar.gz", "0" * 32)]
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", nowhere)
    with one_sentence("check the network", tmp_path):
        pets.find_dataset(tmp_path, download=True)


# ----------------------------------------------------------------------------------------- make run


VALUES = {"IMAGE_SIZE": 32, "BASE_CHANNELS": 4, "DEPTH": 2, "BATCH_SIZE": 8}


def start(*words: str, **options) -> subprocess.Popen:
    """Start what a target of the Makefile starts."""
    command = [sys.executable, "-m", "experiments.command", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=pets.ROOT, **pipes, **options)


def start_run(name: str, **values) -> subprocess.Popen:
    """Start what `make run` starts, with parameters that make it small."""
    given = VALUES | {"EPOCHS": 1, "LIMIT": 60} | values
    return start("run", name, *(word for pair in given.items() for word in ("-p", *map(str, pair))))


def last_line(process: subprocess.Popen) -> str:
    """Wait until a command has failed, and return the last line of what it says of it."""
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["../zz", "", "a/b", "/tmp/zz", "x" * 101, "猫" * 34, "a b", ".."])
def test_bad_name_of_a_run_leaves_no_folder(name):
    before = set(pets.ROOT.iterdir()), set(pets.ROOT.glob("runs/*"))
    with one_sentence("NAME should be"):
        run_notebook.run(name)
    assert before == (set(pets.ROOT.iterdir()), set(pets.ROOT.glob("runs/*")))


@pytest.mark.parametrize(("words", "sentence"), [
    (["run", "../zz"], "NAME should be"), (["photo", __file__], "cannot be decoded"),
])  # fmt: skip
def test_last_line_of_a_command_is_the_sentence(words, sentence):
    told(last_line(start(*words)), sentence)


INTERRUPTER = """import os, signal, sys
class Interrupter:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter)
"""


@linux
@pytest.mark.parametrize(("words", "module"), [
    (["run", "../zz"], "papermill.cli"), (["compare", "-r", "RUNS", "runs/nowhere"], "rpds.rpds"),
    (["photo", ""], "torch._C"), (["sweep", ""], "numpy"),
], ids=str)  # fmt: skip
def test_interrupt_while_the_modules_load_ends_in_one_sentence(tmp_path, words, module):
    """It comes when a module is looked for, wherever that is on a clock."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTER.format(module=module), encoding="utf-8")
    process = start(*words, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    told(last_line(process), "Interrupted before it began")


@long
def test_finished_notebook_survives_a_run_that_fails(run_folder):
    notebook = run_folder / "notebook.ipynb"
    said, _ = start_run(run_folder.name).communicate(timeout=LONGEST)
    assert said.strip().endswith("notebook.html")
    kept = notebook.read_bytes()
    for name, value in (
        ("EPOCHS", 0), ("EPOCH", 3), ("pets", 5), ("PHOTO", "nothing.jpg"), ("PHOTO", "x" * 300),
        ("EPOCHS", f"1{'0' * 5000}"), ("DATASET", "cats"), ("SCORE_SIZE", 7), ("DEVICE", "abacus"),
    ):  # fmt: skip
        told(last_line(start_run(run_folder.name, **{name: value})))
        assert notebook.read_bytes() == kept


@long
@pytest.mark.parametrize(("moment", "fault"), [
    (".notebook.lock", signal.SIGINT), (".lock", signal.SIGINT), ("figures", signal.SIGINT),
    ("checkpoint.pt", signal.SIGINT), ("checkpoint.pt", signal.SIGKILL),
])  # fmt: skip
def test_stopped_run_ends_in_one_sentence(run_folder, moment, fault):
    (run_folder / "unfinished.ipynb").write_text("of an earlier run", encoding="utf-8")
    # A shell lets what runs in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start_run(run_folder.name, EPOCHS=1000)
    wait_for(run_folder / moment)
    if fault == signal.SIGINT:
        process.send_signal(fault)
    else:
        for kernel in machine.psutil.Process(process.pid).children():
            kernel.send_signal(fault)
    go_on = "go on from" if moment == "checkpoint.pt" else "start again"
    told(last_line(process), "stopped", go_on)
    assert moment == ".notebook.lock" or not (run_folder / "unfinished.ipynb").exists()


@long
def test_second_run_of_a_name_is_refused(run_folder):
    with FileLock(run_folder / ".notebook.lock"):
        told(last_line(start_run(run_folder.name)), "another run", "NAME")


@long
@pytest.mark.parametrize("values", [{"SCORE_SIZE": 512}, {"BASE_CHANNELS": 32, "DEPTH": 5}])
def test_forecast_of_the_memory_is_about_what_a_notebook_takes(run_folder, values):
    process = start_run(run_folder.name, **values)
    peak = 0
    while process.poll() is None:
        for child in machine.psutil.Process(process.pid).children(recursive=True):
            with suppress(OSError, IndexError, machine.psutil.Error):  # one that ends just now
                text = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
                peak = max(peak, 1024 * int(text.partition("VmHWM:")[2].split()[0]))
        time.sleep(0.2)
    recipe = Recipe(**VALUES | values)
    assert 0.8 < machine.forecast(recipe, {"train": 54, "valid": 6, "test": 60}) / peak < 2
