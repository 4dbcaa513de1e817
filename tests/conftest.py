"""Fixtures and helpers that several test files share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ.setdefault("MPLBACKEND", "Agg")  # before matplotlib is imported: tests need no window

from drawn import draw_pets

from petseg_utils import ROOT, InputError, Pets, draw_sample_pets


def alike(one: object, other: object) -> bool:
    """Return whether two contents of torch files are the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and alike(tuple(one.values()), tuple(other.values()))
    return one == other


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return alike(one.state_dict(), other.state_dict())


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """Return a folder in runs/ that no other test run has, empty, removed afterwards."""
    (ROOT / "runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=ROOT / "runs"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Keep PyTorch on one thread: for tensors this small, more only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """Return the folder oxford-iiit-pet of a stand-in of 24 + 12 pictures; leave it unchanged."""
    return draw_sample_pets(tmp_path_factory.mktemp("sample"), trainval=24, test=12, side=64)


@pytest.fixture(scope="session")
def oxford() -> Path:
    """Return the folder oxford-iiit-pet of the real dataset."""
    if "PETSEG_DATA" not in os.environ:
        pytest.skip("PETSEG_DATA should be set to the folder that holds the real oxford-iiit-pet.")
    return Path(os.environ["PETSEG_DATA"]) / "oxford-iiit-pet"


@pytest.fixture(scope="session")
def pets(tmp_path_factory) -> Pets:
    """Return 8 pictures of 16 x 16 pixels, in memory and on disk, whose colours are the labels."""
    names = [f"{breed}_{number}" for breed in ("pug", "Bengal") for number in range(4)]
    return draw_pets(tmp_path_factory.mktemp("pets"), names, side=16)


def told(message: object, *words: object) -> None:
    """Check that a message is one sentence, no longer than any, that holds all the given words."""
    message = str(message)
    assert message.endswith("."), message
    assert "\n" not in message
    assert len(message) < 3000
    for word in words:
        assert str(word) in message, message


@contextmanager
def one_sentence(*words: object) -> Iterator[pytest.ExceptionInfo]:
    """Expect an `InputError` of one sentence that holds all the given words."""
    with pytest.raises(InputError) as caught:
        yield caught
    told(caught.value, *words)


@pytest.fixture
def complains():
    """Return `one_sentence`, for files that import nothing from here."""
    return one_sentence
