"""Fixtures and helpers that several test files share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

os.environ.setdefault("MPLBACKEND", "Agg")  # before matplotlib is imported: tests need no window

from petseg_utils import IMAGE_FILE, ROOT, TRIMAP_FILE, InputError, Pets, draw_sample_pets


@contextmanager
def new_run_folder() -> Iterator[Path]:
    """Make a folder in runs/ that no other test run has, and remove it at the end."""
    (ROOT / "runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=ROOT / "runs"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """Return a run's folder in runs/, empty, removed afterwards."""
    with new_run_folder() as folder:
        yield folder


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
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(3, (8, 4, 4), generator=random, dtype=torch.uint8)
    masks = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)  # (8, 16, 16)
    noise = torch.randint(-20, 20, (8, 3, 16, 16), generator=random)
    images = (torch.eye(3)[masks.long()].permute(0, 3, 1, 2) * 180 + 40 + noise).byte()
    names = [f"{breed}_{number}" for breed in ("pug", "Bengal") for number in range(4)]
    folder = tmp_path_factory.mktemp("pets")
    for name, image, mask in zip(names, images, masks, strict=True):
        for file, pixels in ((IMAGE_FILE, image.permute(1, 2, 0)), (TRIMAP_FILE, mask + 1)):
            path = folder / file.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path, "PNG")  # which loses nothing
    return Pets(names, images, masks, folder)


@pytest.fixture
def complains():
    """Return a context that expects an `InputError`, in one sentence with all the given words."""

    @contextmanager
    def context(*words):
        with pytest.raises(InputError) as caught:
            yield caught
        message = str(caught.value)
        assert message.endswith(".")
        assert "\n" not in message
        for word in words:
            assert str(word) in message

    return context
