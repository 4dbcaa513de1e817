"""The parameters section: what is accepted, and the one sentence that everything else gets."""

import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import petseg_utils
from petseg_utils import PARAMETERS, InputError, check_parameters, locate, pick_device, pick_precision

GOOD = {
    "DATASET": "sample",
    "DATA_DIR": "../shared",
    "DOWNLOAD": False,
    "LIMIT": 0,
    "IMAGE_SIZE": 64,
    "SCORE_SIZE": 0,
    "MASK_RESIZE": "nearest",
    "BASE_CHANNELS": 8,
    "DEPTH": 3,
    "NORMS": 2,
    "SKIPS": True,
    "EPOCHS": 4,
    "SMALL_EPOCHS": 0,
    "BATCH_SIZE": 16,
    "MUON": True,
    "LEARNING_RATE": 0.003,
    "ONE_CYCLE": True,
    "WEIGHT_DECAY": 0.01,
    "DICE_WEIGHT": 0.5,
    "AVERAGE": True,
    "AUGMENT": True,
    "FLIP": False,
    "SEED": 0,
    "DEVICE": "auto",
    "PRECISION": "auto",
    "PHOTO": "",
    "RUN_NAME": "run-1.5_b",
    "RESUME": False,
}
BAD = {
    "DATASET": ["", "Oxford", "coco", None, 1],
    "DATA_DIR": ["", None, 3],
    "DOWNLOAD": ["false", "True", 0, 1, None],
    "LIMIT": [-1, 1, 49, 50.0, "50", True],
    "IMAGE_SIZE": [0, -64, 7, 1032, 64.0, "64", None],
    "SCORE_SIZE": [-1, 7, 1025, 64.0, "0", None],
    "MASK_RESIZE": ["", "Nearest", "bicubic", None, 0],
    "NORMS": [0, 3, 2.0, "2", True],
    "SKIPS": ["false", 0, 1, None],
    "SMALL_EPOCHS": [-1, 1001, 1.0, "1", False],
    "ONE_CYCLE": ["false", 0, 1, None],
    "WEIGHT_DECAY": [-0.1, 1.1, math.nan, "0", True, None],
    "DICE_WEIGHT": [-0.1, 101, math.nan, math.inf, "0", False, None],
    "AVERAGE": ["false", 0, 1, None],
    "BASE_CHANNELS": [0, -1, 257, 8.0, "8"],
    "DEPTH": [0, -1, 1, 8, 2.5, "3", True],
    "EPOCHS": [0, -1, 1001, 1.5, "4", True],
    "BATCH_SIZE": [0, 1, 1025, 16.0, "16"],
    "MUON": ["false", "muon", 0, 1, None],
    "LEARNING_RATE": [0, 0.0, -0.1, 1.5, math.nan, math.inf, "0.1", True, None],
    "AUGMENT": ["false", "yes", 0, 1, None],
    "FLIP": ["false", "yes", 0, 1, None],
    "SEED": [-1, 2**31, 0.0, "0", False],
    "DEVICE": ["", "gpu", "cuda:7", "CPU", None, 0],
    "PRECISION": ["", "float16", "bf16", 32, None],
    "PHOTO": [None, 3, False],
    "RUN_NAME": ["", ".", "..", ".hidden", "a/b", "a\\b", "/tmp", "a b", "a\nb", "x" * 101, None, 3],
    "RESUME": ["false", 0, None],
}


def test_every_parameter_has_good_and_bad_examples_here():
    assert set(PARAMETERS) == set(GOOD) == set(BAD)


def test_good_parameters_come_back_as_given():
    assert check_parameters(GOOD) == GOOD


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATASET", "oxford"),
        ("LIMIT", 50),
        ("IMAGE_SIZE", 8),
        ("IMAGE_SIZE", 1024),
        ("SCORE_SIZE", 8),
        ("SCORE_SIZE", 1024),
        ("MASK_RESIZE", "bilinear"),
        ("NORMS", 1),
        ("SMALL_EPOCHS", 3),
        ("WEIGHT_DECAY", 0),
        ("WEIGHT_DECAY", 1.0),
        ("DICE_WEIGHT", 0),
        ("DICE_WEIGHT", 100.0),
        ("BASE_CHANNELS", 1),
        ("BASE_CHANNELS", 256),
        ("DEPTH", 2),
        ("DEPTH", 6),
        ("EPOCHS", 1),
        ("EPOCHS", 1000),
        ("BATCH_SIZE", 2),
        ("BATCH_SIZE", 1024),
        ("LEARNING_RATE", 1),
        ("LEARNING_RATE", 1e-6),
        ("SEED", 2**31 - 1),
        ("DEVICE", "cpu"),
        ("PRECISION", "float32"),
        ("PRECISION", "bfloat16"),
        ("AUGMENT", False),
        ("FLIP", True),
        ("PHOTO", str(files("skimage.data") / "chelsea.png")),
    ],
)
def test_values_at_the_ends_of_their_ranges_pass(name, value):
    assert check_parameters(GOOD | {name: value})[name] == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_bad_value_is_told_with_its_parameter(complains, name, value):
    with complains(name, "must be", repr(value)):
        check_parameters(GOOD | {name: value})


def test_unknown_parameter_is_told_with_the_known_ones(complains):
    with complains("no parameter EPOCH:", *PARAMETERS):
        check_parameters(GOOD | {"EPOCH": 3})


@pytest.mark.parametrize(("side", "depth", "words"), [(100, 3, "96 or 104"), (64, 7, "make it 128"), (9, 2, "8 or 12")])
def test_image_size_that_the_depth_does_not_divide_is_told_with_sizes_that_work(complains, side, depth, words):
    with complains(str(side), f"depth {depth}", words):
        check_parameters(GOOD | {"IMAGE_SIZE": side, "DEPTH": depth})


@pytest.mark.parametrize("epochs", [4, 5])
def test_training_on_small_images_alone_is_told(complains, epochs):
    with complains("SMALL_EPOCHS", "below EPOCHS, 4", f"not {epochs}"):
        check_parameters(GOOD | {"SMALL_EPOCHS": epochs})


def test_image_size_whose_half_the_depth_does_not_divide_is_told_with_one_that_works(complains):
    assert check_parameters(GOOD | {"IMAGE_SIZE": 72})
    with complains("36", "not divisible by 8", "IMAGE_SIZE 80"):
        check_parameters(GOOD | {"IMAGE_SIZE": 72, "SMALL_EPOCHS": 1})
    assert check_parameters(GOOD | {"IMAGE_SIZE": 80, "SMALL_EPOCHS": 1})


def test_photo_that_is_not_there_is_told_with_its_path(tmp_path, complains):
    with complains("PHOTO", tmp_path / "cat.jpg"):
        check_parameters(GOOD | {"PHOTO": str(tmp_path / "cat.jpg")})


def test_photo_that_is_no_image_is_told_before_any_work(complains):
    with complains(__file__, "cannot be decoded"):
        check_parameters(GOOD | {"PHOTO": __file__})


def test_resuming_needs_the_checkpoint_of_the_run(tmp_path, monkeypatch, complains):
    monkeypatch.setattr(petseg_utils, "ROOT", tmp_path)
    resumed = GOOD | {"RESUME": True, "RUN_NAME": "mine"}
    checkpoint = tmp_path / "runs" / "mine" / "checkpoint.pt"
    with complains(checkpoint, "RESUME", "RUN_NAME"):
        check_parameters(resumed)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert check_parameters(resumed) == resumed


def test_jupyter_shows_the_sentence_alone():
    assert InputError("Do this.")._render_traceback_() == ["InputError: Do this."]


def test_relative_path_counts_from_the_root_or_else_from_the_current_folder(tmp_path, monkeypatch):
    root, here = (tmp_path / name for name in ("root", "here"))
    for folder in (root / "in_root", root / "in_both", here / "in_here", here / "in_both"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(petseg_utils, "ROOT", root.resolve())
    monkeypatch.chdir(here)
    found = {name: locate(name) for name in ("in_root", "in_both", "in_here", "nowhere", here / "in_both")}
    assert found == {
        "in_root": root.resolve() / "in_root",
        "in_both": root.resolve() / "in_both",
        "in_here": here.resolve() / "in_here",
        "nowhere": root.resolve() / "nowhere",
        here / "in_both": here.resolve() / "in_both",
    }
    assert locate(Path("in_here") / ".." / "in_root") == root.resolve() / "in_root"


# ------------------------------------------------------------------- device, precision


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes this machine look as if it had, or lacked, CUDA and MPS."""

    def pretend(cuda: bool, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "picked"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device_there_is(machine, cuda, mps, picked):
    machine(cuda, mps)
    assert pick_device("auto") == pick_device() == pick_device(picked) == torch.device(picked)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("cuda", "mps", "wanted"), [(False, True, "cuda"), (True, False, "mps")])
def test_device_that_is_not_there_is_told_with_those_that_are(machine, complains, cuda, mps, wanted):
    machine(cuda, mps)
    other = "mps" if mps else "cuda"
    with complains(f"no device '{wanted}'", "DEVICE", f"'{other}' or 'cpu'"):
        check_parameters(GOOD | {"DEVICE": wanted})


def test_device_of_an_unknown_name_is_told(complains):
    with complains("'abacus'", "DEVICE"):
        pick_device("abacus")


@pytest.mark.parametrize(("name", "picked"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_named_precision_is_taken_on_any_device(name, picked):
    assert pick_precision(name, torch.device("cpu")) == pick_precision(name, torch.device("mps")) == picked


@pytest.mark.parametrize(
    ("features", "picked"),
    [
        ({"avx2": True, "avx512": True}, torch.float32),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
    ],
)
def test_auto_precision_takes_bfloat16_only_where_the_processor_has_it(monkeypatch, features, picked):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert pick_precision("auto", torch.device("cpu")) == picked


def test_auto_precision_is_float32_on_mps():
    assert pick_precision("auto", torch.device("mps")) == torch.float32
