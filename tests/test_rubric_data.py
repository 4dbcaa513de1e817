"""Criteria of the rubric: splits, loading, augmentation, seen from outside."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from petseg_utils import IGNORE, InputError, augment, hold_out, load_pets, read_split

NAMES = [
    f"{breed}_{number}" for breed in ("pug", "Bengal", "Maine_Coon") for number in range(1, 31)
]


@pytest.fixture
def copied(sample, tmp_path):
    """Return a copy of the small stand-in dataset, to be damaged."""
    return shutil.copytree(sample, tmp_path / "oxford-iiit-pet")


def test_split_is_what_its_file_lists(copied):
    shutil.copy(copied / "images" / "pug_1.jpg", copied / "images" / "stray_1.jpg")
    for split in ("trainval", "test"):
        expected = sorted(
            line.split()[0]
            for line in (copied / "annotations" / f"{split}.txt").read_text().splitlines()
        )
        found = read_split(copied, split)
        assert found == expected, (
            f"expected the {len(expected)} names of {split}.txt, sorted, found {len(found)}"
        )
    limited = read_split(copied, "trainval", 10)
    assert len(set(limited)) == 10, f"expected 10 names with limit=10, found {len(set(limited))}"


def test_missing_file_is_named(copied):
    name = read_split(copied, "test")[3]
    (copied / "annotations" / "trimaps" / f"{name}.png").unlink()
    with pytest.raises(InputError, match=name):
        read_split(copied, "test")


def test_held_out_images_are_a_tenth_of_every_breed_and_no_others():
    rest, held = hold_out(NAMES, 0.1, seed=1)
    common = set(rest) & set(held)
    assert not common, f"expected no name on both sides, found {min(common)}"
    assert sorted(rest + held) == sorted(NAMES), (
        "expected every name on one side, found some on none"
    )
    found = {
        breed: sum(name.startswith(breed) for name in held)
        for breed in ("pug", "Bengal", "Maine_Coon")
    }
    assert set(found.values()) == {3}, f"expected 3 of 30 held out of every breed, found {found}"


def test_held_out_images_depend_on_the_seed_alone():
    first, again, other = (hold_out(NAMES, 0.1, seed=seed) for seed in (1, 1, 2))
    assert first == again, "expected the same images for the same seed, found others"
    assert first != other, "expected other images for another seed, found the same"


def test_masks_are_resized_by_nearest_neighbour_and_shifted(sample):
    names = read_split(sample, "test")
    pets = load_pets(sample, names, 32)
    assert (pets.images.dtype, pets.masks.dtype) == (torch.uint8, torch.uint8), (
        "expected uint8, found other dtypes"
    )
    for name, mask in zip(names, pets.masks, strict=True):
        trimap = Image.open(sample / "annotations" / "trimaps" / f"{name}.png")
        expected = np.array(trimap.resize((32, 32), Image.Resampling.NEAREST)) - 1
        wrong = int((mask.numpy() != expected).sum())
        assert wrong == 0, (
            f"expected the trimap by nearest neighbour minus 1, found {wrong} other pixels in {name}"
        )


def test_images_are_resized_smoothly_and_belong_to_their_names(sample):
    names = read_split(sample, "test")
    pets = load_pets(sample, names, 32, mask_side=48)
    assert list(pets.names) == names, "expected the names that were asked for, found others"
    assert pets.masks.shape[1:] == (48, 48), (
        f"expected masks of side 48, found {tuple(pets.masks.shape[1:])}"
    )
    for name, image in zip(names, pets.images, strict=True):
        photo = Image.open(sample / "images" / f"{name}.jpg").convert("RGB")
        expected = np.array(photo.resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
        error = np.abs(image.permute(1, 2, 0).numpy() - expected).mean()
        assert error < 4, (
            f"expected {name} resized bilinearly, found a mean difference of {error:.0f}"
        )


# ------------------------------------------------------------------- augmentation


@pytest.fixture
def moved() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 64 images, bright exactly where their mask is 0, with their masks, before and after augmentation."""
    torch.manual_seed(0)
    masks = torch.ones(64, 32, 32, dtype=torch.uint8)
    masks[:, 4:20, 2:10] = 0
    masks[:, 4:12, 10:28] = 2
    images = torch.where(masks == 0, 230, 30).byte().unsqueeze(1).repeat(1, 3, 1, 1)
    before = images.clone(), masks.clone()
    return *before, *augment(images, masks)


def test_mask_moves_with_its_image(moved):
    _, _, images, masks = moved
    bright = images.float().mean(1) > 130
    known = masks != IGNORE
    agree = (bright == (masks == 0))[known].float().mean().item()
    assert agree > 0.95, (
        f"expected the labels where the image has them, found {agree:.0%} of the pixels so"
    )


def test_augmentation_flips_and_moves(moved):
    _, before, _, after = moved
    flipped = sum(int((m[:, 16:] == 0).sum() > (m[:, :16] == 0).sum()) for m in after)
    assert 16 <= flipped <= 48, f"expected about half of 64 images flipped, found {flipped}"
    plain = [
        torch.equal(a, b) or torch.equal(a, b.flip(1)) for a, b in zip(after, before, strict=True)
    ]
    assert sum(plain) < 16, (
        f"expected most images moved as well, found {sum(plain)} of 64 that are not"
    )


def test_augmented_labels_are_classes_or_ignored(moved):
    images, masks = moved[2:]
    strangers = set(masks.unique().tolist()) - {0, 1, 2, IGNORE}
    assert not strangers, f"expected the labels 0, 1, 2 and {IGNORE}, found {min(strangers)}"
    assert IGNORE in masks, (
        f"expected {IGNORE} where pixels come from outside the photo, found none"
    )
    assert (images.dtype, masks.dtype) == (torch.uint8, torch.uint8), (
        "expected uint8, found other dtypes"
    )
    assert images.shape == (64, 3, 32, 32), (
        f"expected the shapes to stay, found {tuple(images.shape)}"
    )
