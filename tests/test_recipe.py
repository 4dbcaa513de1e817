"""The recipe section: what is accepted, and the one sentence that everything else gets."""

import math

import pytest
import torch
from pydantic import ValidationError

from petseg_utils import InputError, Recipe, pick_device, pick_precision

VALUES = {  # that pass, at the ends of their ranges, and that do not: of each kind a parameter
    "DATASET": (["sample", "oxford"], ["", "Oxford", "coco", None, 1]),
    "DATA_DIR": (["d", "../shared"], ["", None, 3]),
    "LIMIT": ([0, 50], [-1, 1, 49, 50.0, "50", True]),
    "HOLD_OUT": ([0.02, 0.5], [0, 0.0, 1, -0.1, math.nan, "0.1", None]),
    "IMAGE_SIZE": ([32, 1024], [0, -64, 7, 1025, 64.0, "64", None, 10**5000, -(10**5000)]),
    "SCORE_SIZE": ([0, 8, 1024], [-1, 7, 1025, 64.0, "0", None]),
    "SMALL_EPOCHS": (
        ["", "5 at 32", "2 at 32, 1 at 64, 2 at 32"],
        ["6 at 64", "3 at 32, 3 at 64", "1 at 96", "1 at 0", "2 at", "1 at 32,", " ", 1],
    ),
    "LEARNING_RATE": (
        [1, 1.0, 1e-6],
        [0, 0.0, -0.1, 1.5, math.nan, math.inf, "0.1", True, None, 10**5000],
    ),
    "AUGMENT": ([0, 0.5, 1.0], [-0.1, 1.1, math.nan, "0", True, False, None]),
    "SEED": ([0, 2**31 - 1], [-1, 2**31, 0.0, "0", False, 10**5000]),
    "RUN_NAME": (
        ["r", "run-1.5_b+c", "2024", "x" * 100, "é" * 50],
        ["", "..", ".hidden", "/tmp", "a\\b", "a b", "a\nb", "x" * 101, "é" * 51, None, 3],
    ),
    "SKIPS": ([True, False], ["false", "True", "yes", 0, 1, None]),
}


def short(value: object) -> str:
    """Return the beginning of a value; Python writes no integer of more than 4,300 digits."""
    return "5,000 digits" if type(value) is int and abs(value) > 2**64 else repr(value)[:12]


def pairs(which: int) -> list:
    values = [(name, value) for name in VALUES for value in VALUES[name][which]]
    return [pytest.param(*pair, id=f"{pair[0]} {short(pair[1])}") for pair in values]


@pytest.mark.parametrize(("name", "value"), pairs(0))
def test_values_at_the_ends_of_their_ranges_pass(name, value):
    assert getattr(Recipe(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), pairs(1))
def test_bad_value_ends_in_one_short_sentence_with_its_parameter(complains, name, value):
    shown = short(value) if short(value) != "5,000 digits" else ""
    with complains(f"{name} should ", f"not {shown}") as caught:
        Recipe(**{name: value})
    assert len(str(caught.value)) < 250


def test_unknown_parameter_is_told_with_the_known_ones_before_another_fault_is(complains):
    with complains("no parameter EPOCH:", *Recipe.model_fields):
        Recipe(EPOCH=3, IMAGE_SIZE=100)


@pytest.mark.parametrize(("values", "words"), [
    ({"IMAGE_SIZE": 100, "DEPTH": 3}, ["100", "depth 3", "make it 96 or 104."]),
    ({"IMAGE_SIZE": 64, "DEPTH": 7}, ["64", "depth 7", "make it 128."]),
    ({"SMALL_EPOCHS": "1 at 36", "DEPTH": 3}, ["36 is no multiple of 8", "make it 32 or 40"]),
    ({"SMALL_EPOCHS": "6 at 32"}, ["SMALL_EPOCHS", "fewer epochs than 6", "not '6 at 32'"]),
    ({"SMALL_EPOCHS": "1 at 96"}, ["SMALL_EPOCHS", "sides up to 64", "not '1 at 96'"]),
])  # fmt: skip
def test_values_that_do_not_fit_together_are_told_with_some_that_do(complains, values, words):
    with complains(*words):
        Recipe(**values)


def test_recipe_cannot_be_changed_but_gives_a_changed_copy(complains):
    recipe = Recipe(EPOCHS=9)
    with pytest.raises(ValidationError):
        recipe.EPOCHS = 10
    assert recipe.but(SEED=7, MUON=False) == Recipe(EPOCHS=9, SEED=7, MUON=False)
    assert (recipe.SEED, recipe.MUON) == (0, True)
    with complains("no parameter EPOCH"):
        recipe.but(EPOCH=10)


def notebook(*injected: str, **variables: object) -> dict:
    """Return a notebook's `globals()`: parameters, cells that papermill injected, and much else."""
    cells = ["import petseg_utils as pets", "DATASET: str = 'sample'", *injected]
    return {"In": cells, "pets": ..., "EPOCH_SECONDS": 3} | Recipe().model_dump() | variables


def test_variables_of_a_notebook_make_the_recipe():
    """Of papermill's cells the last counts: executed again, or in JupyterLab, there may be two."""
    cells = ["# Parameters\nEPOCH = 3\n", "# Parameters\nEPOCHS = 3\n"]
    assert Recipe.of_notebook(notebook(EPOCHS=9, FLIP=True)) == Recipe(EPOCHS=9, FLIP=True)
    assert Recipe.of_notebook(notebook(*cells, EPOCHS=3)) == Recipe(EPOCHS=3)


def test_faults_in_a_notebooks_variables_are_told(complains):
    with complains("DOWNLOAD", "'false'"):
        Recipe.of_notebook(notebook(DOWNLOAD="false"))
    cell = '# Parameters\nEPOCH = 3\nRUN_NAME = "a"\n'
    with complains("no parameter EPOCH:"):
        Recipe.of_notebook(notebook(cell, EPOCH=3, RUN_NAME="a"))


def test_jupyter_shows_the_sentence_alone():
    assert InputError("Do this.")._render_traceback_() == ["InputError: Do this."]


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes this machine look as if it had, or lacked, CUDA and MPS."""

    def pretend(cuda: bool, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize("picked", ["cuda", "mps", "cpu"])
def test_auto_takes_the_fastest_device_there_is(machine, picked):
    machine(cuda=picked == "cuda", mps=picked != "cpu")
    assert pick_device("auto") == pick_device() == pick_device(picked) == torch.device(picked)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("there", "wanted"), [
    ("'mps' or 'cpu'", "cuda"), ("'cuda' or 'cpu'", "mps"), ("'cpu'", "abacus"),
])  # fmt: skip
def test_device_that_is_not_there_is_told_with_those_that_are(machine, complains, there, wanted):
    machine("cuda" in there, "mps" in there)
    with complains(f"no device '{wanted}'", "DEVICE", f"to {there}"):
        pick_device(wanted)


@pytest.mark.parametrize(("features", "name", "device", "picked"), [
    ({}, "float32", "cpu", torch.float32),
    ({}, "bfloat16", "cpu", torch.bfloat16),
    ({}, "bfloat16", "mps", torch.bfloat16),
    ({"bf16": True}, "auto", "mps", torch.float32),
    ({"avx2": True, "avx512": True}, "auto", "cpu", torch.float32),
    ({"avx512_bf16": False, "amx_bf16": False}, "auto", "cpu", torch.float32),
    ({"avx2": True, "avx512_bf16": True}, "auto", "cpu", torch.bfloat16),
    ({"amx_bf16": True}, "auto", "cpu", torch.bfloat16),
    ({"bf16": True}, "auto", "cpu", torch.bfloat16),
])  # fmt: skip
def test_auto_takes_bfloat16_only_where_it_is_fast(monkeypatch, features, name, device, picked):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert pick_precision(name, torch.device(device)) == picked
