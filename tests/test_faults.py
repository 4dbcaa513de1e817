"""Real faults: kills, full disks, damaged files, odd values. Each ends right or in one sentence.

`make faults` runs the long form, with more of each, and writes what was tried to runs/faults.md.
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
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import OxfordIIITPet

import petseg_utils as pets
from experiments import run_notebook, sweep
from experiments.read_runs import find_runs
from petseg_utils import (
    InputError,
    Recipe,
    UNet,
    draw_sample_pets,
    train,
)
from support import machine, safe_files, tensor_files
from support.tensor_files import load_tensors, save_tensors

LONG = os.environ.get("PETSEG_FAULTS") == "long"
KILLS, FLIPS, EXAMPLES = (30, 2000, 400) if LONG else (2, 200, 20)
LONGEST = 300  # seconds that anything may take, on a machine that is busy with other things, too
long = pytest.mark.skipif(not LONG, reason="takes minutes: make faults runs it")
linux = pytest.mark.skipif(sys.platform != "linux", reason="uses limits and mounts of Linux")
TINY = Recipe(EPOCHS=3, BATCH_SIZE=3, BASE_CHANNELS=2, DEPTH=2, IMAGE_SIZE=16, PRECISION="float32")
tried: Counter = Counter()  # (what, how it ended)


def note(what: str, ended: str) -> None:
    """Count for the table how a fault ended: "right" or "one sentence"; all else fails the test."""
    tried[what, ended] += 1


@pytest.fixture(scope="module", autouse=True)
def table():
    """Write what was tried as a table, in the long form."""
    yield
    if LONG:
        lines = ["| what was tried | times | right | one sentence |", "|---|---|---|---|"]
        for what in dict.fromkeys(what for what, _ in tried):
            right, told = tried[what, "right"], tried[what, "one sentence"]
            lines.append(f"| {what} | {right + told} | {right} | {told} |")
        pets.write_atomically(
            pets.ROOT / "runs/faults.md", lambda file: file.write("\n".join([*lines, ""]).encode())
        )


def told(message: str, *words) -> None:
    """Check that a message is one sentence that holds all the given words."""
    assert message.endswith("."), message
    assert "\n" not in message
    assert len(message) < 3000
    for word in words:
        assert str(word) in message, message


@contextmanager
def one_sentence(what: str, *words):
    """Expect an `InputError` of one sentence that holds all the given words, and note it."""
    with pytest.raises(InputError) as caught:
        yield
    told(str(caught.value), *words)
    note(what, "one sentence")


FORK = multiprocessing.get_context(
    "fork"
)  # a process of its own, without the seconds that importing PyTorch takes


def child(act, *arguments) -> multiprocessing.Process:
    """Start `act` in a process of its own."""
    process = FORK.Process(target=act, args=arguments, daemon=True)
    process.start()
    return process


def kill(process: multiprocessing.Process) -> None:
    """End a process as a loss of power would: by SIGKILL."""
    process.kill()
    process.join()


def complaint(act, *arguments) -> str:
    """Return the message of the `InputError` with which `act` ends in a process of its own."""
    said = FORK.SimpleQueue()

    def run():
        try:
            act(*arguments)
            said.put("It ended well")
        except InputError as error:
            said.put(str(error))
        except BaseException as error:
            said.put(f"{type(error).__name__}: {error}")

    process = child(run)
    process.join(LONGEST)
    return said.get()


def new_net() -> UNet:
    torch.manual_seed(0)
    return UNet(TINY.BASE_CHANNELS, TINY.DEPTH)


def same(one: UNet, other: UNet) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


# --------------------------------------------------------------------------------------------- disk


@pytest.fixture
def tiny_disk(tmp_path):
    """Return a folder on a disk of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip("may not mount a disk of its own")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_is_told_and_the_old_file_stays(tiny_disk):
    path = tiny_disk / "file"
    pets.write_atomically(path, lambda file: file.write(b"old"))
    with one_sentence("full disk of 2 MB", path, "No space left"):
        pets.write_atomically(path, lambda file: file.write(bytes(3_000_000)))
    assert path.read_bytes() == b"old"
    assert os.listdir(tiny_disk) == ["file"]


@pytest.mark.parametrize("epoch", [1, 2])
def test_disk_that_fills_up_in_training_keeps_the_last_checkpoint(
    tiny_disk, pets_in_memory, monkeypatch, epoch
):
    path, recipe = tiny_disk / "checkpoint.pt", TINY
    seen = []

    def fill(*arguments):
        seen.append(1)
        if len(seen) == epoch + 1:
            with suppress(OSError), (tiny_disk / "other").open("wb") as file:
                file.write(bytes(3_000_000))
        return first(*arguments)

    first = pets.validate
    monkeypatch.setattr(pets, "validate", fill)
    model = new_net()
    with one_sentence("disk that fills up in training", path, "No space left"):
        train(model, *pets_in_memory, recipe, path)
    assert len(load_tensors(path)["history"]) == epoch
    (tiny_disk / "other").unlink()
    assert len(train(model, *pets_in_memory, recipe, path)) == 3  # the same call goes on
    whole = new_net()
    train(whole, *pets_in_memory, recipe)
    assert same(model, whole)


@linux
def test_limit_of_a_files_size_is_told_and_the_old_file_stays(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        pets.write_atomically(path, lambda file: file.write(bytes(3_000_000)))

    told(complaint(write), path, "File too large")
    note("limit of a file's size", "one sentence")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_read_only_disk_is_told(tiny_disk, pets_in_memory):
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    for act in (
        lambda: pets.write_atomically(tiny_disk / "file", lambda file: file.write(b"new")),
        lambda: safe_files.own_folder(tiny_disk, 0),
        lambda: draw_sample_pets(tiny_disk, 2, 1, side=32),
        lambda: train(new_net(), *pets_in_memory, TINY, tiny_disk / "checkpoint.pt"),
    ):
        with one_sentence("read-only disk", tiny_disk, "Read-only"):
            act()


def test_too_little_room_is_told_before_the_start(tiny_disk, tmp_path):
    with one_sentence("too little room, known beforehand", "3 MB", tiny_disk):
        safe_files.own_folder(tiny_disk, 3_000_000)
    assert (
        machine.room_for(Recipe(BASE_CHANNELS=32)) > 3 * 4 * 3 * 13_385_475
    )  # three checkpoints of three copies


@pytest.mark.parametrize(
    "name", ["file", "checkpoint.pt", "weights.pt", "metrics.json", "history.csv"]
)
def test_folder_where_a_file_should_be_is_told(tmp_path, name):
    (tmp_path / name / "inside").mkdir(parents=True)
    with one_sentence("a folder where a file should be", tmp_path / name):
        pets.write_atomically(tmp_path / name, lambda file: file.write(b"new"))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("act", [
    lambda path: pets.write_atomically(path / "figures" / "a.png", lambda file: file.write(b"new")),
    lambda path: safe_files.own_folder(path / "run", 0),
    lambda path: draw_sample_pets(path, 2, 1, side=32),
    lambda path: load_tensors(path / "weights.pt"),
    lambda path: pets.read_run(path),
    lambda path: pets.find_dataset(path),
], ids=["write", "own", "draw", "tensors", "run", "dataset"])  # fmt: skip
def test_file_where_a_folder_should_be_is_told(tmp_path, act):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with one_sentence("a file where a folder should be", path):
        act(path)
    assert path.read_bytes() == b"old"


def test_content_reaches_the_disk_before_the_new_name_does(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda number: (order.append(os.readlink(f"/proc/self/fd/{number}")), sync(number)),
    )
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("renamed"), replace(*names)))
    pets.write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    draft, *rest = order
    assert draft.endswith(".draft")
    assert rest == ["renamed", str(tmp_path)]


@linux
def test_kills_inside_writes_leave_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "run" / "file"

    def write():
        safe_files.own_folder(path.parent, 0)
        for number in itertools.count():
            pets.write_atomically(
                path, lambda file, n=number: file.write(bytes([n % 256]) * 4_000_000)
            )

    for number in range(KILLS):
        process = child(write)
        wait_for(path)
        time.sleep(random.Random(number).uniform(0, 0.1))
        kill(process)
        content = path.read_bytes()
        assert content == content[:1] * 4_000_000
        note("kill -9 inside a write", "right")
        path.unlink()
    process = child(
        write
    )  # the next one removes what the killed ones left, and no dead one holds the lock
    wait_for(path)
    kill(process)
    assert len(list(path.parent.glob(".*.draft"))) <= 1


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    limit = time.monotonic() + LONGEST
    while not path.exists():
        assert time.monotonic() < limit, path
        time.sleep(0.01)


# -------------------------------------------------------------------------------------- two at once


@linux
def test_second_process_in_a_runs_folder_is_refused_and_a_killed_one_is_not_in_the_way(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(safe_files, "PATIENCE", 0.1)

    def own():
        safe_files.own_folder(tmp_path / "run", 0)
        (tmp_path / "mine").touch()
        time.sleep(60)

    for _ in range(KILLS):
        first = child(own)
        wait_for(tmp_path / "mine")
        with one_sentence("second run in a folder", "another run", tmp_path / "run", "RUN_NAME"):
            safe_files.own_folder(tmp_path / "run", 0)
        kill(first)
        (tmp_path / "mine").unlink()
    safe_files.own_folder(tmp_path / "run", 0)
    safe_files.own_folder(tmp_path / "run", 0)  # a cell can run again


@linux
def test_process_that_is_about_to_end_is_waited_for(tmp_path, capsys):
    def own():
        safe_files.own_folder(tmp_path / "run", 0)
        (tmp_path / "mine").touch()
        wait_for(tmp_path / "waited for")

    first = child(own)
    wait_for(tmp_path / "mine")
    threading.Timer(0.5, (tmp_path / "waited for").touch).start()
    safe_files.own_folder(tmp_path / "run", 0)
    first.join()
    assert "waiting" in capsys.readouterr().err
    note("a run started while the last one ends", "right")


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
    assert (tmp_path / "runs" / "mine").is_dir()


@linux
def test_drawing_at_once_draws_once_and_clears_what_killed_ones_left(tmp_path):
    (tmp_path / ".drawing-killed" / "new").mkdir(parents=True)
    drawing = [child(draw_sample_pets, tmp_path, 12, 6, 0, 32) for _ in range(25 if LONG else 4)]
    for process in drawing:
        process.join(LONGEST)
        assert process.exitcode == 0
        note("first starts at once", "right")
    assert len(list((tmp_path / "oxford-iiit-pet" / "images").iterdir())) == 18
    assert not list(tmp_path.glob(".drawing-*"))


@linux
def test_killed_drawings_leave_nothing_that_looks_like_a_dataset(tmp_path):
    for number in range(KILLS):
        process = child(draw_sample_pets, tmp_path, 3000, 100)
        time.sleep(random.Random(number).uniform(0.05, 0.5))
        kill(process)
        assert not (tmp_path / "oxford-iiit-pet").exists()
        note("kill -9 inside the drawing", "right")
    draw_sample_pets(tmp_path, 4, 2, side=32)
    assert not list(tmp_path.glob(".drawing-*"))


# ----------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def pets_in_memory():
    """Return 8 training and 4 validation images of 16 x 16 pixels."""
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 16, 16), generator=drawn, dtype=torch.uint8)
    masks = torch.randint(3, (12, 16, 16), generator=drawn, dtype=torch.uint8)
    names = [f"pug_{number}" for number in range(12)]
    return pets.Pets(names[:8], images[:8], masks[:8]), pets.Pets(names[8:], images[8:], masks[8:])


@linux
def test_killed_trainings_go_on_to_the_very_same_weights(tmp_path, pets_in_memory):
    path, recipe = tmp_path / "checkpoint.pt", TINY.but(EPOCHS=40, RESUME=True)

    def go_on():
        model = new_net()
        train(model, *pets_in_memory, recipe, path)
        pets.save_weights(tmp_path / "weights.pt", model)

    child(go_on).join()
    whole = load_tensors(tmp_path / "weights.pt")
    path.unlink()
    for number in range(KILLS):
        process = child(go_on)
        wait_for(path)
        time.sleep(random.Random(number).uniform(0, 0.5))
        kill(process)
        assert 1 <= len(load_tensors(path)["history"]) <= 40
        note("kill -9 of a training, which then goes on to the same weights", "right")
        if number % 3 == 2 or number == KILLS - 1:  # killed up to three times, then to its end
            child(go_on).join()
            assert alike(load_tensors(tmp_path / "weights.pt"), whole)
            path.unlink()


def interrupt(monkeypatch, after: int) -> None:
    """Make Ctrl-C come after so many training steps, once."""
    steps = iter(range(after))
    augment = pets.augment

    def stop(*given):
        if next(steps, None) is None:
            monkeypatch.setattr(pets, "augment", augment)
            raise KeyboardInterrupt
        return augment(*given)

    monkeypatch.setattr(pets, "augment", stop)


@pytest.mark.parametrize("steps", range(6))
def test_interrupted_training_says_what_is_kept_and_the_same_cell_goes_on(
    tmp_path, pets_in_memory, monkeypatch, steps
):
    """There are two steps in each of three epochs."""
    path = tmp_path / "checkpoint.pt"
    whole, model = new_net(), new_net()
    history = train(whole, *pets_in_memory, TINY)
    interrupt(monkeypatch, steps)
    kept = f"{path} keeps {steps // 2}" if steps >= 2 else "none was kept"
    with one_sentence(
        "Ctrl-C in training, then the same cell again", "of 3 epochs", kept, "run this cell again"
    ):
        train(model, *pets_in_memory, TINY, path)
    assert same(model, new_net())  # as before the cell
    again = train(model, *pets_in_memory, TINY, path)
    assert same(model, whole)
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in history]
    note("Ctrl-C in training, then the same cell again", "right")


def test_interrupted_training_without_a_checkpoint_starts_anew(pets_in_memory, monkeypatch):
    whole, model = new_net(), new_net()
    train(whole, *pets_in_memory, TINY)
    interrupt(monkeypatch, 3)
    with one_sentence("Ctrl-C in training, then the same cell again", "none was kept"):
        train(model, *pets_in_memory, TINY)
    train(model, *pets_in_memory, TINY)
    assert same(model, whole)


def test_interrupted_training_with_another_recipe_starts_anew(
    tmp_path, pets_in_memory, monkeypatch
):
    path, other = tmp_path / "checkpoint.pt", TINY.but(LEARNING_RATE=0.002)
    whole, model = new_net(), new_net()
    train(whole, *pets_in_memory, other)
    interrupt(monkeypatch, 3)
    with one_sentence("Ctrl-C in training, then another recipe", path):
        train(model, *pets_in_memory, TINY, path)
    train(model, *pets_in_memory, other, path)
    assert same(model, whole)
    assert len(load_tensors(path.with_suffix(".old.pt"))["history"]) == 1


def test_longer_training_is_the_one_that_is_kept(tmp_path, pets_in_memory, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    for epochs in (
        2,
        1,
        1,
    ):  # the first is killed after two epochs, then two that start anew after one
        interrupt(monkeypatch, 2 * epochs)
        with pytest.raises(InputError):
            train(new_net(), *pets_in_memory, TINY, path)
    assert len(load_tensors(path.with_suffix(".old.pt"))["history"]) == 2


def test_resume_without_a_checkpoint_starts_anew(tmp_path, pets_in_memory):
    assert (
        len(train(new_net(), *pets_in_memory, TINY.but(RESUME=True), tmp_path / "checkpoint.pt"))
        == 3
    )


def test_class_that_never_occurs_has_no_score_and_costs_no_results(tmp_path, pets_in_memory):
    matrices = torch.tensor([[[5, 1, 0], [2, 9, 0], [0, 0, 0]]] * 4)
    pets.save_run(tmp_path, {}, [{"epoch": 1}], {"test": (pets_in_memory[1], matrices)})
    assert pets.read_run(tmp_path)["test"]["iou"]["border"] is None


def test_no_images_are_told(pets_in_memory):
    empty = pets.Pets([], pets_in_memory[0].images[:0], pets_in_memory[0].masks[:0])
    assert pets.evaluate(new_net(), empty, torch.float32).shape == (0, 3, 3)
    with one_sentence("an empty split", "no pixels"):
        pets.scores(torch.zeros(3, 3, dtype=torch.int64))
    with one_sentence("an empty split", "no valid images"):
        train(new_net(), pets_in_memory[0], empty, TINY)
    with one_sentence("an empty split", "no train images"):
        train(new_net(), empty, pets_in_memory[0], TINY)


# ---------------------------------------------------------------------------------- untrusted files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pets_in_memory) -> Path:
    """Return a checkpoint after one of three epochs."""
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    monkeypatch = pytest.MonkeyPatch()
    interrupt(monkeypatch, 2)
    with pytest.raises(InputError):
        train(new_net(), *pets_in_memory, TINY, path)
    monkeypatch.undo()
    return path


def alike(one: object, other: object) -> bool:
    """Return whether two contents of torch files are the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and list(one) == list(other)
            and all(alike(one[key], other[key]) for key in one)
        )
    return one == other


@pytest.mark.parametrize("kind", ["checkpoint.pt", "weights.pt"])
def test_flipped_bits_are_refused_or_hit_nothing(checkpoint, tmp_path, kind):
    path = tmp_path / kind
    content = load_tensors(checkpoint)
    save_tensors(path, content if kind == "checkpoint.pt" else content["model"])
    intact, data = load_tensors(path), path.read_bytes()
    drawn = random.Random(0)
    for _ in range(FLIPS // 2):
        bit = drawn.randrange(8 * len(data))
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert alike(load_tensors(path), intact), bit
            note(f"a flipped bit in {kind}", "right")
        except InputError as error:
            told(str(error), path)
            note(f"a flipped bit in {kind}", "one sentence")


def test_every_bit_of_a_small_file_is_guarded(tmp_path):
    path = tmp_path / "small.pt"
    save_tensors(path, {"a": torch.arange(20.0)} if LONG else {"a": torch.ones(1)})
    intact, data = load_tensors(path), path.read_bytes()
    for bit in range(0, 8 * len(data), 1 if LONG else 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(InputError):
            assert alike(load_tensors(path), intact), bit


def poke(content: dict, *keys, value) -> dict:
    """Set a value deep inside."""
    *way, last = keys
    inner = content
    for key in way:
        inner = inner[key]
    inner[last] = value
    return content


NAN = float("nan")
CHECKPOINTS = {
    "NaN weights": lambda c: poke(c, "model", "out.bias", value=torch.full((3,), NAN)),
    "infinite average": lambda c: poke(
        c, "average", "module.out.bias", value=torch.full((3,), math.inf)
    ),
    "NaN in the history": lambda c: poke(c, "history", 0, "train_loss", value=NAN),
    "empty schedule": lambda c: c | {"schedule": {}},
    "schedule a number": lambda c: c | {"schedule": 3},
    "history a text": lambda c: c | {"history": "one"},
    "history of texts": lambda c: c | {"history": ["one"]},
    "history of empty rows": lambda c: c | {"history": [{}]},
    "history of wrong epochs": lambda c: poke(c, "history", 0, "epoch", value=2),
    "history with a text": lambda c: poke(c, "history", 0, "train_loss", value="low"),
    "no history": lambda c: {key: value for key, value in c.items() if key != "history"},
    "no model": lambda c: {key: value for key, value in c.items() if key != "model"},
    "model a list": lambda c: c | {"model": []},
    "model None": lambda c: c | {"model": None},
    "a weight missing": lambda c: (c["model"].pop("out.bias"), c)[1],
    "a weight too many": lambda c: poke(c, "model", "more", value=torch.ones(1)),
    "a weight of another shape": lambda c: poke(c, "model", "out.bias", value=torch.ones(4)),
    "a weight a text": lambda c: poke(c, "model", "out.bias", value="heavy"),
    "no recipe": lambda c: {key: value for key, value in c.items() if key != "recipe"},
    "recipe a list": lambda c: c | {"recipe": [1]},
    "another recipe": lambda c: poke(c, "recipe", "LEARNING_RATE", value=0.5),
    "optimizer empty": lambda c: c | {"optimizer": {}},
    "optimizer without groups": lambda c: poke(c, "optimizer", "param_groups", value=[]),
    "momentum of another shape": lambda c: poke(
        c, "optimizer", "state", 0, "momentum", value=torch.ones(5)
    ),
    "momentum missing": lambda c: poke(c, "optimizer", "state", 0, value={}),
    "momentum a text": lambda c: poke(c, "optimizer", "state", 0, "momentum", value="much"),
    "a list": lambda c: [1, 2],
    "a tensor": lambda c: torch.ones(3),
    "nothing": lambda c: None,
    "empty": lambda c: {},
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_checkpoint_that_somebody_changed_is_refused(checkpoint, tmp_path, pets_in_memory, damage):
    path = tmp_path / "checkpoint.pt"
    save_tensors(path, CHECKPOINTS[damage](load_tensors(checkpoint)))
    model = new_net()
    with one_sentence("a checkpoint changed on purpose", path):
        train(model, *pets_in_memory, TINY.but(RESUME=True), path)
    assert same(model, new_net())


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PETSEG_EVIL"],)


RAW = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "all but a byte": lambda data: data[:-1],
    "first byte missing": lambda data: data[1:],
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: random.Random(0).randbytes(len(data)),
    "text": lambda data: b"weights, weights\n" * 99,
    "page": lambda data: b"<!DOCTYPE html><html>404</html>",
    "gzip": gzip.compress,
    "zip of nothing": lambda data: b"PK\x05\x06" + bytes(18),
    "pickle": lambda data: pickle.dumps({"model": 1}),
    "pickle with code": lambda data: pickle.dumps({"model": Evil()}),
    "torch file with code": lambda data: saved({"model": Evil()}),
    "old torch format": lambda data: saved(
        {"a": torch.ones(1)}, _use_new_zipfile_serialization=False
    ),
    "a block of zeros": lambda data: data[:3000] + bytes(512) + data[3512:],
}


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", RAW)
def test_file_that_is_no_checkpoint_is_refused_and_runs_no_code(
    checkpoint, tmp_path, pets_in_memory, monkeypatch, damage
):
    monkeypatch.setenv("PETSEG_EVIL", str(tmp_path / "evil"))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(RAW[damage](checkpoint.read_bytes()))
    with one_sentence("a file that is no checkpoint", path):
        train(new_net(), *pets_in_memory, TINY.but(RESUME=True), path)
    with one_sentence("a file that is no checkpoint", path):
        pets.load_weights(path, new_net())
    assert not (tmp_path / "evil").exists()


def test_weights_kept_before_there_were_checks_still_load():
    path = pets.ROOT / "notebooks" / "oxford_run" / "weights.pt"
    pets.load_weights(path, UNet(32))


# ----------------------------------------------------------------------------------------- datasets


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return draw_sample_pets(
        tmp_path_factory.mktemp("intact"), trainval=24, test=12, seed=0, side=48
    )


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    """Return a dataset to damage."""
    return Path(shutil.copytree(intact, tmp_path / "oxford-iiit-pet"))


def read(folder: Path) -> dict[str, pets.Pets]:
    """Do with a dataset what the notebook does."""
    train_names, valid_names = pets.hold_out(pets.read_split(folder, "trainval"))
    names = {"train": train_names, "valid": valid_names, "test": pets.read_split(folder, "test")}
    pets.check_run(Recipe(BATCH_SIZE=8), **names)
    return {
        split: pets.load_pets(folder, chosen, 32, f"{split} images")
        for split, chosen in names.items()
    }


def lines(change, split: str = "trainval"):
    """Return a damage that changes the text of a split's file."""

    def damage(folder):
        path = folder / "annotations" / f"{split}.txt"
        changed = change(path.read_text(encoding="utf-8"))
        path.write_bytes(changed.encode() if isinstance(changed, str) else changed)

    return damage


def renamed(new: str, encoding: str = "utf-8"):
    """Return a damage that renames the first image, everywhere."""

    def damage(folder):
        (folder / "images" / "Bengal_1.jpg").rename(folder / "images" / f"{new}.jpg")
        trimaps = folder / "annotations" / "trimaps"
        (trimaps / "Bengal_1.png").rename(trimaps / f"{new}.png")
        path = folder / "annotations" / "trainval.txt"
        path.write_bytes(
            path.read_text(encoding="utf-8").replace("Bengal_1 ", f"{new} ").encode(encoding)
        )

    return damage


def named(name: str):
    """Return a damage that lists a name which is not there."""
    return lines(lambda text: text + f"{name} 1 1 1\n")


def photo(change, file: str = "images/Bengal_1.jpg"):
    """Return a damage that replaces a photo by what `change` makes of its `image`, or its bytes."""

    def damage(folder):
        path = folder / file
        of_image = change.__code__.co_varnames[0] == "image"
        path.write_bytes(change(Image.open(path) if of_image else path.read_bytes()))

    return damage


def trimap(change):
    """Return a damage that replaces a trimap in the same way."""
    return photo(change, "annotations/trimaps/Bengal_1.png")


def a_folder(file: str, make=os.mkdir):
    """Return a damage that makes a folder, or something else, in the place of a file."""

    def damage(folder):
        (folder / file).unlink()
        make(folder / file)

    return damage


def encode(image: Image.Image, format: str, mode: str = "", **options) -> bytes:
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def turned(note: int, stored=None, trimap_too: bool = False, square: bool = False):
    """Return a damage that stores a photo turned, with the EXIF note that says so."""

    def damage(folder):
        path, mask = (
            folder / "images" / "Bengal_1.jpg",
            folder / "annotations" / "trimaps" / "Bengal_1.png",
        )
        image, labels = Image.open(path), Image.open(mask)
        if square:
            image, labels = (
                image.resize((40, 40)),
                labels.resize((40, 40), Image.Resampling.NEAREST),
            )
        exif = Image.Exif()
        exif[0x112] = note
        (image.transpose(stored) if stored is not None else image).save(
            path, "JPEG", quality=95, exif=exif
        )
        (labels.transpose(stored) if trimap_too else labels).save(mask)

    return damage


def without(pattern: str, count: int = 1):
    """Return a damage that removes files."""

    def damage(folder):
        for path in sorted(folder.glob(pattern))[:count]:
            path.unlink()

    return damage


def only(keep):
    """Return a damage that keeps those lines of trainval.txt of which `keep` is true."""
    return lines(
        lambda text: "".join(line for line in text.splitlines(keepends=True) if keep(line))
    )


def replaced(pattern: str, count: int = 1, by=b"no picture"):
    """Return a damage that overwrites files."""

    def damage(folder):
        for path in sorted(folder.glob(pattern))[:count]:
            path.write_bytes(by)

    return damage


def linked(folder):
    path = folder / "images" / "Bengal_1.jpg"
    path.rename(folder / "elsewhere.jpg")
    path.symlink_to(folder / "elsewhere.jpg")


def grey16(image):
    return encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


TURN = Image.Transpose
MANY = "annotations/trimaps/*.png"
RIGHT = {  # these load as the intact dataset does
    "as it is": lambda folder: None,
    "UTF-8 with BOM": lines(lambda text: b"\xef\xbb\xbf" + text.encode()),
    "UTF-16": lines(lambda text: text.encode("utf-16")),
    "UTF-16, big end first": lines(lambda text: b"\xfe\xff" + text.encode("utf-16-be")),
    "Latin-1 comment": lines(lambda text: "# ausgewählt\n".encode("latin-1") + text.encode()),
    "Latin-1 name": renamed("Bengalé_1", "latin-1"),
    "UTF-8 name": renamed("孟加拉_1"),
    "UTF-16 name": renamed("孟加拉_1", "utf-16"),
    "line ends of Windows": lines(lambda text: text.replace("\n", "\r\n")),
    "line ends of an old Mac": lines(lambda text: text.replace("\n", "\r")),
    "no last line end": lines(lambda text: text.rstrip()),
    "blank lines": lines(lambda text: text.replace("\n", "\n \n")),
    "comment": lines(lambda text: "#Image CLASS-ID\n" + text),
    "indented comment": lines(lambda text: "   # Image\n\t#\n" + text),
    "tabs": lines(lambda text: text.replace(" ", "\t")),
    "spaces around": lines(lambda text: text.replace("\n", "   \n  ")),
    "names alone": lines(
        lambda text: "".join(f"{line.split()[0]}\n" for line in text.splitlines())
    ),
    "one column less": lines(
        lambda text: "".join(f"{line.rsplit(' ', 1)[0]}\n" for line in text.splitlines())
    ),
    "name with a space": renamed("Ben gal_1"),
    "name with hyphen and dot": renamed("Ben-gal.a+b_1"),
    "name of 200 letters": renamed("B" * 198 + "_1"),
    "link to a photo": linked,
    "PNG named jpg": photo(lambda image: encode(image, "PNG")),
    "RGBA PNG named jpg": photo(lambda image: encode(image, "PNG", "RGBA")),
    "GIF named jpg": photo(lambda image: encode(image, "GIF")),
    "WebP named jpg": photo(lambda image: encode(image, "WEBP", lossless=True)),
    "BMP named jpg": photo(lambda image: encode(image, "BMP")),
    "TIFF named jpg": photo(lambda image: encode(image, "TIFF")),
    "CMYK JPEG": photo(lambda image: encode(image, "JPEG", "CMYK", quality=95)),
    "progressive JPEG": photo(lambda image: encode(image, "JPEG", quality=95, progressive=True)),
    "photo with bytes behind it": photo(lambda data: data + b"more" * 99),
    "EXIF: not turned": turned(1),
    "EXIF 6, trimap as shown": turned(6, TURN.ROTATE_90),
    "EXIF 8, trimap as shown": turned(8, TURN.ROTATE_270),
    "EXIF 5, trimap as shown": turned(5, TURN.TRANSPOSE),
    "EXIF 7, trimap as shown": turned(7, TURN.TRANSVERSE),
    "pictures that no split lists": lambda folder: shutil.copy(
        folder / "images" / "Bengal_1.jpg", folder / "images" / "stray_1.jpg"
    ),
    "junk of a Mac": lambda folder: (folder / "images" / "._Bengal_1.jpg").write_bytes(b"junk"),
}
OTHERWISE_RIGHT = {  # these load, with another content
    "grey JPEG": photo(lambda image: encode(image, "JPEG", "L")),
    "black and white PNG": photo(lambda image: encode(image, "PNG", "1")),
    "grey PNG with transparency": photo(lambda image: encode(image, "PNG", "LA")),
    "trimap all background": trimap(lambda image: encode(image.point([2] * 256), "PNG")),
    "trimap of 1 and 2 only": trimap(
        lambda image: encode(image.point([1, 1, 2, 2] + [2] * 252), "PNG")
    ),
    "photo of one pixel": lambda folder: [
        Image.new(mode, (1, 1), 1).save(folder / place)
        for mode, place in (
            ("RGB", "images/Bengal_1.jpg"),
            ("L", "annotations/trimaps/Bengal_1.png"),
        )
    ],
}
LISTED = {  # names in trainval.txt that are refused
    "absolute name": "/etc/passwd", "name outside": "../outside/x_1",
    "name deep outside": "a/../../x_1",
    "name in a folder": "more/x_1", "backslashes": "..\\outside\\x_1", "drive": "C:x_1",
    "NUL": "x\0_1", "escape sequence": "x\x1b[31m_1", "name of formulas": "pug$\\x$_1",
    "name of HTML": "<img/src=x>_1", "hidden name": ".hidden_1",
    "name of 300 letters": "x" * 298 + "_1",
    "name of 100 CJK letters": "猫" * 98 + "_1", "emoji": "🐱_1",
}  # fmt: skip
TRAINVAL = {  # texts in the place of trainval.txt, made of it, with words of the sentence
    "gzip": (lambda text: gzip.compress(text.encode()), "gzip"),
    "UTF-16 without its mark": (lambda text: text.encode("utf-16-le"), "line 1"),
    "noise": (lambda text: random.Random(1).randbytes(2000), "line"),
    "zeros": (lambda text: bytes(500), "line 1"),
    "page": (lambda text: "<!DOCTYPE html>\n<html>404</html>\n", "line 1"),
    "JPEG": (lambda text: b"\xff\xd8\xff\xe0\x00\x10JFIF", "line 1"),
    "empty": (lambda text: "", "names no images", "extract"),
    "comments only": (lambda text: "# nothing\n#\n \n", "names no images"),
    "cut in a line": (lambda text: text[:-12] + "\npu", "line 24"),
    "same name twice": (lambda text: text + text.splitlines()[2], "twice", "lines 3 and 25"),
    "listed, not there": (lambda text: text + "x_1 1 1 1", "images/x_1.jpg", "line 25", "2 files"),
}
PHOTO = {  # bytes in the place of a photo, made of the image or of its bytes, and words
    "empty": (lambda data: b"", "replace it"),
    "cut": (lambda data: data[: len(data) // 2],),
    "header alone": (lambda data: data[:30],),
    "a text": (lambda data: b"a cat",),
    "an unfinished PPM header": (lambda data: b"P6 12",),
    "a page": (lambda data: b"<html>404</html>",),
    "without its first byte": (lambda data: data[1:],),
    "zeros": (lambda data: bytes(len(data)),),
    "compressed": (lambda data: gzip.compress(data),),
    "a cut PNG": (lambda image: encode(image, "PNG")[:-40],),
    "of 16 bits": (lambda image: grey16(image), "8 bits"),
    "of 32 bits": (lambda image: encode(image.convert("L"), "TIFF", "I"), "8 bits"),
    "of floats": (lambda image: encode(image.convert("L"), "TIFF", "F"), "8 bits"),
    "of 225 megapixels": (
        lambda data: encode(Image.new("1", (15000, 15000)), "PNG"), "15000", "200,000,000",
    ),
    "of 484 megapixels": (lambda data: encode(Image.new("1", (22000, 22000)), "PNG"),),
}  # fmt: skip
TRIMAP = {  # the same for a trimap
    "empty": (lambda data: b"", "replace it"),
    "cut": (lambda data: data[: len(data) // 2],),
    "a text": (lambda data: b"1 2 3",),
    "with a wrong checksum": (lambda data: data[:45] + bytes([data[45] ^ 1]) + data[46:],),
    "of 0, 1, 2": (lambda image: encode(image.point([0, 0, 1, 2] + [2] * 252), "PNG"), "value 0"),
    "with a 4": (lambda image: encode(image.point([1, 1, 2, 4] + [2] * 252), "PNG"), "value 4"),
    "of 0 and 255": (lambda image: encode(image.point([0, 255] + [0] * 254), "PNG"), "value 0"),
    "in colour": (lambda image: encode(image, "PNG", "RGB"), "RGB"),
    "with transparency": (lambda image: encode(image, "PNG", "LA"), "LA"),
    "with a palette": (lambda image: encode(image, "PNG", "P"),),
    "of 16 bits": (lambda image: grey16(image),),
    "of one bit": (lambda image: encode(image, "PNG", "1"), "mode 1"),
    "a JPEG": (lambda image: encode(image.point(lambda v: v * 60), "JPEG"),),
    "of another size": (lambda image: encode(image.resize((9, 9)), "PNG"), "(9, 9)"),
}
WRONG = {  # these are refused, in a sentence with these words
    **{kind: (named(name), "trainval.txt", "line 25") for kind, name in LISTED.items()},
    **{kind: (lines(c), "trainval.txt", *words) for kind, (c, *words) in TRAINVAL.items()},
    **{f"photo {kind}": (photo(c), "Bengal_1.jpg", *words) for kind, (c, *words) in PHOTO.items()},
    **{f"trimap {kind}": (trimap(c), "Bengal_1.png", *w) for kind, (c, *w) in TRIMAP.items()},
    "split missing": (without("annotations/trainval.txt"), "trainval.txt", "missing"),
    "test split missing": (without("annotations/test.txt"), "test.txt", "missing"),
    "split a folder": (a_folder("annotations/trainval.txt"), "trainval.txt", "missing"),
    "test names twice": (lines(lambda text: text * 2, "test"), "test.txt", "lines 1 and 13"),
    "same name in both": (
        lines(lambda text: text + "Bengal_1 2 1 1\n", "test"),
        "Bengal_1", "trainval.txt", "line 1", "test.txt", "line 13",
    ),
    "photo missing": (without("images/Bengal_1.jpg"), "images/Bengal_1.jpg", "line 1"),
    "trimap missing": (without("annotations/trimaps/Bengal_1.png"), "Bengal_1.png", "line 1"),
    "half extracted": (without("images/*.jpg", 20), "that are not there", "extract"),
    "photos missing": (lambda folder: shutil.rmtree(folder / "images"), "24 files"),
    "photo a folder": (a_folder("images/Bengal_1.jpg"), "Bengal_1.jpg"),
    "photo a pipe": (a_folder("images/Bengal_1.jpg", os.mkfifo), "Bengal_1.jpg"),
    "link to nothing": (
        lambda folder: (linked(folder), (folder / "elsewhere.jpg").unlink()), "Bengal_1.jpg",
    ),
    "one image a breed": (only(lambda line: "_1 " in line), "no valid images", "trainval.txt"),
    "three images": (only(lambda line: re.match("pug_[123] ", line)), "images", "BATCH_SIZE"),
    "photo of another size": (
        photo(lambda image: encode(image.resize((30, 31)), "JPEG")), "Bengal_1.png", "31",
    ),
    "EXIF 6, trimap as stored": (turned(6, TURN.ROTATE_90, trimap_too=True), "Bengal_1.png"),
    "EXIF 3: half a turn": (turned(3, TURN.ROTATE_180), "Bengal_1.jpg", "turned"),
    "EXIF 2: mirrored": (turned(2, TURN.FLIP_LEFT_RIGHT), "Bengal_1.jpg", "turned"),
    "EXIF 6, square": (turned(6, TURN.ROTATE_90, square=True), "Bengal_1.jpg", "turned"),
}  # fmt: skip


@pytest.mark.parametrize("damage", RIGHT)
def test_odd_dataset_loads_as_the_intact_one_does(intact, folder, damage):
    RIGHT[damage](folder)
    ours, theirs = by_name(folder), by_name(intact)
    assert ours.keys() == theirs.keys()
    for name, (image, mask) in theirs.items():
        assert (ours[name][0] - image).abs().float().mean() < (
            8 if name == "Bengal_1" else 1e-6
        )  # JPEG loses a little
        assert (ours[name][1] == mask).float().mean() > (0.98 if name == "Bengal_1" else 0.999999)
    note("an odd dataset", "right")


def by_name(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return image and mask by the name before `renamed`."""
    splits = read(folder).values()
    return {
        original(n): (i.int(), m) for split in splits for n, i, m in zip(*split[:3], strict=True)
    }


def original(name: str) -> str:
    """Return an image's name before `renamed`."""
    return (
        name
        if name.split("_")[0] in {"beagle", "Maine", "pug", "Russian", "shiba", "Bengal"}
        else "Bengal_1"
    )


@pytest.mark.parametrize("damage", OTHERWISE_RIGHT)
def test_odd_picture_loads(folder, damage):
    OTHERWISE_RIGHT[damage](folder)
    loaded = read(folder)
    assert sum(len(split.names) for split in loaded.values()) == 36
    note("an odd dataset", "right")


@pytest.mark.parametrize("damage", WRONG)
def test_damaged_dataset_is_told(folder, damage):
    change, *words = WRONG[damage]
    change(folder)
    (folder.parent / "outside").mkdir()
    with one_sentence("a damaged dataset", *words):
        read(folder)


@pytest.mark.parametrize(("count", "names"), [(1, 1), (5, 5), (10, 10), (12, 10)])
def test_all_bad_files_are_told_together(folder, count, names):
    replaced("annotations/trimaps/*.png", count)(folder)
    chosen = sorted(path.stem for path in (folder / "annotations" / "trimaps").glob("*.png"))
    with pytest.raises(InputError) as caught:
        pets.load_pets(folder, chosen, 16, "pictures")
    message = str(caught.value)
    told(message, f"{count} of 36 images" if count > 1 else "")
    assert message.count(".png cannot be decoded") == names
    assert ("and 2 more" in message) == (count == 12)
    note("several bad files at once", "one sentence")


def test_bad_files_of_all_splits_are_told_when_the_first_split_is_loaded(folder):
    train, test = (pets.read_split(folder, split) for split in ("trainval", "test"))
    paths = [
        folder / "images" / f"{train[0]}.jpg",
        folder / "annotations" / "trimaps" / f"{test[0]}.png",
    ]
    for path in paths:
        path.write_bytes(b"")
    with one_sentence(
        "several bad files at once", "2 of 36 images", *(path.name for path in paths)
    ):
        pets.load_pets(folder, train, 16)


# ------------------------------------------------------------------------------------------- values


FIELDS = Recipe.model_fields
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=300),
    st.binary(max_size=20), st.lists(st.integers(), max_size=3), st.just(10**5000),
    st.just(-(10**5000)), st.just("a" * 10**6), st.text("猫_.-", max_size=100),
    st.sampled_from(["nan", "../x", "/etc", "a\0b", "False", "0", "", " ", "\ud800"]),
)  # fmt: skip
LIKELY = {
    "int": st.one_of(
        st.integers(-3, 70), st.sampled_from([128, 256, 512, 1000, 1024, 1025, 2**31 - 1, 2**31])
    ),
    "float": st.one_of(
        st.floats(-0.1, 1.1), st.sampled_from([0.0, 1e-300, 100.0, 101.0, math.inf, NAN])
    ),
    "bool": st.booleans(),
    "str": st.text(max_size=20),
}
BY_NAME = {
    name: st.one_of(
        LIKELY.get(getattr(field.annotation, "__name__", ""), st.text(max_size=9)), ANYTHING
    )
    for name, field in FIELDS.items()
}
SMALL = {
    "IMAGE_SIZE": st.sampled_from([8, 16, 24, 32, 48, 64]), "DEPTH": st.integers(1, 4),
    "BASE_CHANNELS": st.integers(0, 6),
    "EPOCHS": st.integers(0, 3), "BATCH_SIZE": st.integers(1, 9),
    "SMALL_EPOCHS": st.sampled_from(["", "1 at 8", "1 at 16", "1 at 8, 1 at 16"]),
    "LEARNING_RATE": LIKELY["float"], "WEIGHT_DECAY": LIKELY["float"],
    "DICE_WEIGHT": LIKELY["float"],
    "AUGMENT": LIKELY["float"],
    "NORMS": st.integers(1, 2), "SCORE_SIZE": st.sampled_from([0, 7, 8, 33, 100]),
    "SEED": st.integers(-1, 2**31),
    **{name: st.booleans() for name in ("SKIPS", "MUON", "LINEAR_DECAY", "AVERAGE", "FLIP")},
}  # fmt: skip
bounded = settings(
    max_examples=EXAMPLES,
    deadline=10_000,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


VERY_LONG = "猫x" * 2000


@pytest.mark.parametrize("act", [
    lambda: Recipe(**{VERY_LONG: 1}), lambda: Recipe(EPOCHS=VERY_LONG),
    lambda: Recipe(RUN_NAME=VERY_LONG),
    lambda: pets.find_dataset(VERY_LONG), lambda: pets.open_image(VERY_LONG),
    lambda: run_notebook.run(VERY_LONG), lambda: sweep.main(VERY_LONG),
    lambda: sweep.main("", workers=VERY_LONG),
    lambda: find_runs(VERY_LONG), lambda: sweep.check_runs({"a": {VERY_LONG: 1}}),
], ids=range(10))  # fmt: skip
def test_very_long_name_or_value_is_not_repeated_whole(act):
    with pytest.raises(InputError) as caught:
        act()
    told(str(caught.value))
    assert len(str(caught.value)) < 1300  # all parameters' names alone take 400
    note("a very long name or value", "one sentence")


@pytest.mark.parametrize("name", FIELDS)
def test_any_value_of_any_parameter_is_taken_or_refused_at_once(name):
    @bounded
    @given(BY_NAME[name])
    def check(value):
        try:
            recipe = Recipe(**{name: value})
            pets.check_run(recipe, train=["a"] * 2000, valid=["a"], test=["a"])
            if name == "DATA_DIR":
                pets.find_dataset(recipe.DATA_DIR)
            if name == "PHOTO" and recipe.PHOTO:
                pets.open_image(pets.ROOT / recipe.PHOTO)
            note("any value of a parameter", "right")
        except InputError as error:
            told(str(error))
            note("any value of a parameter", "one sentence")

    check()


@bounded
@given(st.fixed_dictionaries({}, optional=SMALL))
def test_any_combination_trains_or_is_refused(intact, values):
    side, score = (
        values.get("IMAGE_SIZE", 64),
        values.get("SCORE_SIZE") or values.get("IMAGE_SIZE", 64),
    )
    drawn = torch.Generator().manual_seed(0)

    def some(count, masks):
        images = torch.randint(256, (count, 3, side, side), generator=drawn, dtype=torch.uint8)
        labels = torch.randint(3, (count, masks, masks), generator=drawn, dtype=torch.uint8)
        return pets.Pets(
            names[:count], images, labels, intact
        )  # whose photos SMALL_EPOCHS loads again

    names = pets.read_split(intact, "trainval")
    try:
        recipe = Recipe(
            **{"EPOCHS": 1, "BASE_CHANNELS": 2, "DEPTH": 2, "BATCH_SIZE": 4, "PRECISION": "float32"}
            | values
        )
        model = UNet(recipe.BASE_CHANNELS, recipe.DEPTH, norms=recipe.NORMS, skips=recipe.SKIPS)
        held_out = some(3, score)
        history = train(model, some(8, side), held_out, recipe)
        assert len(history) == recipe.EPOCHS
        assert tensor_files.finite(history)
        assert pets.evaluate(model, held_out, torch.float32, flip=recipe.FLIP).sum() == 3 * score**2
        note("any combination of parameters, trained", "right")
    except InputError as error:
        told(str(error))
        note("any combination of parameters, trained", "one sentence")


# ------------------------------------------------------------------------------------------- memory


REAL = {"train": 3311, "valid": 369, "test": 3669}


@pytest.mark.parametrize(("values", "advice"), [
    ({"SCORE_SIZE": 1024}, "SCORE_SIZE"), ({"IMAGE_SIZE": 1024}, "IMAGE_SIZE"),
    ({"BASE_CHANNELS": 256, "DEPTH": 7, "IMAGE_SIZE": 128}, "BASE_CHANNELS"),
    ({"IMAGE_SIZE": 128, "BATCH_SIZE": 1024, "BASE_CHANNELS": 32}, "BATCH_SIZE"),
], ids=str)  # fmt: skip
def test_run_that_does_not_fit_is_refused_with_a_size_that_does(monkeypatch, values, advice):
    monkeypatch.setattr(machine, "free_memory", lambda: 16_000_000_000)
    recipe = Recipe(**values)
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        machine.check_memory(recipe, REAL)
    assert time.perf_counter() - start < 5
    message = str(caught.value)
    told(message, "16.0 GB are free", f"{advice} ")
    size = int(message.split(f": {advice} ")[1].split()[0])
    machine.check_memory(recipe.but(**{advice: size}), REAL)
    note("a run larger than the memory", "one sentence")


def test_runs_that_fit_are_not_refused(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 8_000_000_000)
    machine.check_memory(Recipe(), {"train": 288, "valid": 32, "test": 80})
    real = Recipe(
        IMAGE_SIZE=128,
        SCORE_SIZE=256,
        BASE_CHANNELS=32,
        EPOCHS=13,
        SMALL_EPOCHS="2 at 64, 3 at 128",
        FLIP=True,
    )
    machine.check_memory(real, REAL)


def limit_memory(more: int) -> None:
    """Let this process take so many bytes more of address space."""
    size = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        * resource.getpagesize()
    )
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


@linux
@pytest.mark.parametrize("what", ["train", "evaluate", "load"])
def test_memory_that_runs_out_is_told(what, intact, monkeypatch):
    monkeypatch.setattr(
        machine, "check_memory", lambda *arguments: None
    )  # as if the forecast had been too low
    side, names = 512, pets.read_split(intact, "test") * 500
    images, masks = (
        torch.zeros(48, 3, side, side, dtype=torch.uint8),
        torch.zeros(48, side, side, dtype=torch.uint8),
    )
    some = pets.Pets(names[:48], images, masks)
    recipe = Recipe(IMAGE_SIZE=side, BATCH_SIZE=48, EPOCHS=1, AUGMENT=0.0)
    acts = {
        "train": lambda: train(UNet(16, 5), some, some, recipe),
        "evaluate": lambda: pets.evaluate(UNet(16, 5), some, torch.float32),
        "load": lambda: pets.load_pets(intact, names, 1024),
    }
    told(complaint(lambda: (limit_memory(500_000_000), acts[what]())), "the memory ran out")
    note("memory that runs out", "one sentence")


@linux
def test_limit_of_the_address_space_is_forecast():
    names = {"train": ["a"] * 288, "valid": ["a"] * 32, "test": ["a"] * 80}
    large = Recipe(BASE_CHANNELS=64)  # larger than this process may be already
    told(
        complaint(lambda: (limit_memory(100_000_000), pets.check_run(large, **names))),
        "GB are free",
    )
    note("a run larger than the memory", "one sentence")


# ----------------------------------------------------------------------------------------- download


@pytest.fixture
def server(intact, tmp_path, monkeypatch):
    """Serve the two archives of a small dataset here, and return what becomes of a request."""
    archives, faults = {}, {}
    for name in ("images", "annotations"):
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(intact / name, name)
        archives[f"{name}.tar.gz"] = (tmp_path / f"{name}.tar.gz").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            data = archives[name]
            self.send_response(faults.get("status", 200))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if faults.get("cut"):
                data = data[: len(data) // 2]
            if faults.get("wrong"):
                data = data[:-100] + bytes(100)
            self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{host.server_port}"
    resources = [
        (f"{address}/{name}", hashlib.md5(data).hexdigest()) for name, data in archives.items()
    ]
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", resources)
    yield faults
    host.shutdown()
    host.server_close()


@pytest.mark.parametrize(
    "fault", [None, {"cut": True}, {"wrong": True}, {"status": 404}, {"status": 503}], ids=str
)
def test_download_works_and_after_a_fault_works_again(server, intact, tmp_path, fault):
    if fault:
        server.update(fault)
        with one_sentence(
            "a download that fails, then again", "try again", "images.tar.gz", "annotations.tar.gz"
        ):
            pets.find_dataset(tmp_path / "data", download=True)
        server.clear()
    folder = pets.find_dataset(tmp_path / "data", download=True)
    assert all(map(alike, read(folder)["test"][:3], read(intact)["test"][:3]))
    note("a download that fails, then again", "right")


def test_download_without_a_network_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        OxfordIIITPet, "_RESOURCES", [("http://127.0.0.1:9/images.tar.gz", "0" * 32)]
    )
    with one_sentence("a download without a network", "try again", "images.tar.gz", str(tmp_path)):
        pets.find_dataset(tmp_path / "data", download=True)


def test_download_to_a_full_disk_is_told(server, tiny_disk):
    (tiny_disk / "other").write_bytes(bytes(2_000_000))
    with one_sentence("a download to a full disk", "No space left"):
        pets.find_dataset(tiny_disk / "data", download=True)


# ----------------------------------------------------------------------------------------- make run


@pytest.fixture
def run_name():
    """The name of a run, whose folder is removed afterwards."""
    name = f"test-faults-{os.getpid()}"
    yield name
    shutil.rmtree(pets.ROOT / "runs" / name, ignore_errors=True)


def start(name: str, *options: str) -> subprocess.Popen:
    """Start what `make run` starts."""
    values = ("IMAGE_SIZE 32", "BASE_CHANNELS 4", "DEPTH 2", "EPOCHS 1", "LIMIT 60", "BATCH_SIZE 8")
    words = [word for value in (*values, *options) for word in ("-p", *value.split(" ", 1))]
    command = [sys.executable, "-m", "experiments.command", "run", name, *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=pets.ROOT
    )


@pytest.mark.parametrize("name", ["../zz", "", "a/b", "/tmp/zz", "x" * 101, "猫" * 34, "a b", ".."])
def test_bad_name_of_a_run_leaves_no_folder(name):
    before = set(pets.ROOT.iterdir()), set(pets.ROOT.glob("runs/*"))
    with one_sentence("a bad NAME of a run", "NAME should be"):
        run_notebook.run(name)
    assert before == (set(pets.ROOT.iterdir()), set(pets.ROOT.glob("runs/*")))


def test_last_line_of_make_run_is_the_sentence():
    process = start("../zz")
    told(process.communicate(timeout=LONGEST)[1].strip(), "NAME should be")
    assert process.returncode == 1


@linux
@pytest.mark.parametrize(
    "words",
    [["run", "../zz"], ["compare", "-r", "RUNS", "runs/nowhere"], ["photo", ""], ["sweep", ""]],
)
def test_interrupt_while_the_modules_load_ends_in_one_sentence(words):
    command = [sys.executable, "-m", "experiments.command", *words]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=pets.ROOT, start_new_session=True
    )
    while not re.search(
        "libtorch|rpds", Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
    ):  # some seconds before the end
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    told(errors.strip(), "nterrupted")
    note("Ctrl-C while a command loads its modules", "one sentence")


@long
def test_finished_notebook_survives_a_run_that_fails(run_name):
    folder = pets.ROOT / "runs" / run_name
    good = start(run_name)
    assert good.communicate(timeout=LONGEST)[0].strip().endswith("notebook.html")
    kept = (folder / "notebook.ipynb").read_bytes()
    for value in (
        "EPOCHS 0", "EPOCH 3", "pets 5", "PHOTO nothing.jpg", f"PHOTO {'x' * 300}",
        f"EPOCHS 1{'0' * 5000}", "DATASET cats", "SCORE_SIZE 7", "DEVICE abacus",
    ):  # fmt: skip
        bad = start(run_name, value)
        errors = bad.communicate(timeout=LONGEST)[1]
        assert bad.returncode == 1
        told(errors.strip().splitlines()[-1])
        assert (folder / "notebook.ipynb").read_bytes() == kept
        note("make run with a bad value, over a finished run", "one sentence")


@long
@pytest.mark.parametrize(("moment", "fault"), [
    (".notebook.lock", signal.SIGINT), (".lock", signal.SIGINT), ("figures", signal.SIGINT),
    ("checkpoint.pt", signal.SIGINT), ("checkpoint.pt", signal.SIGKILL),
])  # fmt: skip
def test_stopped_run_ends_in_one_sentence(run_name, moment, fault):
    folder = pets.ROOT / "runs" / run_name
    folder.mkdir(parents=True)
    (folder / "unfinished.ipynb").write_text("of an earlier run", encoding="utf-8")
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell lets what runs in the background ignore it
    process = start(run_name, "EPOCHS 1000")
    wait_for(folder / moment)
    if fault == signal.SIGINT:
        process.send_signal(fault)
    else:
        for kernel in machine.psutil.Process(process.pid).children():
            kernel.send_signal(fault)
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    told(
        errors.strip().splitlines()[-1],
        "stopped",
        "go on from" if moment == "checkpoint.pt" else "start again",
    )
    assert "Traceback" not in errors
    assert moment == ".notebook.lock" or not (folder / "unfinished.ipynb").exists()
    note(f"{fault.name} in make run", "one sentence")


@long
def test_second_run_of_a_name_is_refused(run_name):
    folder = pets.ROOT / "runs" / run_name
    folder.mkdir(parents=True)
    with FileLock(folder / ".notebook.lock"):
        second = start(run_name)
        told(second.communicate(timeout=LONGEST)[1].strip().splitlines()[-1], "another run", "NAME")
    assert second.returncode == 1
    note("second run in a folder", "one sentence")


@long
@pytest.mark.parametrize(
    "values", [["DEPTH 5"], ["SCORE_SIZE 512"], ["BASE_CHANNELS 32", "DEPTH 5", "IMAGE_SIZE 64"]]
)
def test_forecast_of_the_memory_is_about_what_a_notebook_takes(run_name, values):
    process = start(run_name, *values)
    peak = 0
    while process.poll() is None:
        for child in machine.psutil.Process(process.pid).children(recursive=True):
            with suppress(OSError, IndexError, machine.psutil.Error):  # one that ends just now
                text = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
                peak = max(peak, 1024 * int(text.partition("VmHWM:")[2].split()[0]))
        time.sleep(0.2)
    options = {name: int(value) for name, value in (pair.split() for pair in values)}
    recipe = Recipe(**{"IMAGE_SIZE": 32, "BASE_CHANNELS": 4, "DEPTH": 2, "BATCH_SIZE": 8} | options)
    assert 0.8 < machine.forecast(recipe, {"train": 54, "valid": 6, "test": 60}) / peak < 2
