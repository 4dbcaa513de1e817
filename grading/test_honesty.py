"""Criteria of the rubric: what a hand-in's notebook trains depends on its training images alone.

Here `petseg_utils` is the grader's own, GRADED_STORED a folder in which the hand-in lies, and
GRADED_RUN one in which its notebook was executed, whose pictures are used again.
"""

import os
from hashlib import sha256
from pathlib import Path

import torch

import petseg_utils as pets
from grading import honesty
from grading.notebook import PARAMETERS, RUN

STORED = Path(os.environ.get("GRADED_STORED", "."))
GRADED = Path(os.environ.get("GRADED_RUN", "."))
DATASET = GRADED / honesty.PICTURES


def test_test_images_decide_nothing(tmp_path):
    first = GRADED / "runs" / RUN / "weights.pt"
    assert first.exists(), "expected the file weights.pt, found none"
    again = honesty.run_with_turned_labels(STORED, DATASET, tmp_path / "turned")
    assert again.exists(), "expected the file weights.pt also of a second run, found none"
    true, other = (torch.load(path, weights_only=True) for path in (first, again))
    same = all(torch.equal(true[name], other[name]) for name in true)
    assert same, "expected weights that don't depend on the test images, found others"


def test_only_training_images_are_learned():
    lines = (GRADED / "shown.txt").read_text(encoding="utf-8").splitlines()
    assert lines, "expected a net that is shown images before the weights are saved, found none"
    held = pets.hold_out(pets.read_split(DATASET, "trainval"))[1]
    for split, names in (("test", pets.read_split(DATASET, "test")), ("held-out", held)):
        images = pets.load_pets(DATASET, names, PARAMETERS["IMAGE_SIZE"]).images
        known = {sha256(image.numpy().tobytes()).hexdigest() for image in images}
        kinds = ("learned", "scored") if split == "test" else ("learned",)
        for kind in kinds:
            found = sum(f"{kind} {mark}" in lines for mark in known)
            assert not found, (
                f"expected no {split} image {kind} before the weights are saved, found {found}"
            )
