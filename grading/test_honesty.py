"""Criteria of the rubric: what a hand-in's notebook trains depends on its training images alone.

Here `petseg_utils` is the grader's own, GRADED_STORED a folder in which the hand-in lies, and
GRADED_RUN one in which its notebook was executed, whose pictures are used again.
"""

import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import petseg_utils as pets
from grading import honesty

STORED = Path(os.environ.get("GRADED_STORED", "."))
DRAWN = Path(os.environ.get("GRADED_RUN", ".")) / honesty.PICTURES


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[Path]:
    """Return the weights by true and by turned labels of the test images."""
    folder = tmp_path_factory.mktemp("honest")
    pictures = DRAWN if DRAWN.exists() else pets.draw_sample_pets(folder)
    paths = [honesty.run(STORED, pictures, folder / str(t), t) for t in (False, True)]
    assert all(path.exists() for path in paths), "expected the file weights.pt, found none"
    return paths


def test_test_images_decide_nothing(weights):
    true, other = (torch.load(path, weights_only=True) for path in weights)
    same = all(torch.equal(true[name], other[name]) for name in true)
    assert same, "expected weights that don't depend on the test images, found others"


def test_only_training_images_are_learned(weights):
    folder = weights[0].parents[2]
    dataset = folder / honesty.PICTURES
    held = pets.hold_out(pets.read_split(dataset, "trainval"))[1]
    lines = (folder / "shown.txt").read_text(encoding="utf-8").splitlines()
    side = honesty.SMALL["IMAGE_SIZE"]
    for split, names in (("test", pets.read_split(dataset, "test")), ("held-out", held)):
        images = pets.load_pets(dataset, names, side).images
        known = {sha256(image.numpy().tobytes()).hexdigest() for image in images}
        kinds = ("learned", "scored") if split == "test" else ("learned",)
        for kind in kinds:
            found = sum(f"{kind} {mark}" in lines for mark in known)
            assert not found, (
                f"expected no {split} image {kind} before the weights are saved, found {found}"
            )
