"""Criteria of the rubric: splits, loading, augmentation, seen from outside."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import draw, expect
from PIL import Image
from torch import Tensor

from petseg_utils import IGNORE, InputError, augment, hold_out, load_pets, read_split

BREEDS = ("pug", "Bengal", "Maine_Coon")
NAMES = [f"{breed}_{number}" for breed in BREEDS for number in range(1, 31)]


@pytest.fixture
def copied(sample, tmp_path) -> Path:
    """Return a copy of the small stand-in dataset, to be damaged."""
    return shutil.copytree(sample, tmp_path / "oxford-iiit-pet")


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_split_is_what_its_file_lists(copied, split):
    shutil.copy(copied / "images" / "pug_1.jpg", copied / "images" / "stray_1.jpg")
    lines = (copied / "annotations" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    expected, found = sorted(line.split()[0] for line in lines), read_split(copied, split)
    expect(found == expected, f"the {len(expected)} names of {split}.txt, sorted", len(found))


def test_limit_draws_names_by_the_seed(sample):
    random = draw("limit")
    limit, seed = random.randint(8, 16), random.randrange(1000)
    names = read_split(sample, "trainval")
    some = [read_split(sample, "trainval", limit, s) for s in (seed, seed, seed + 1, seed + 2)]
    for found in some:
        expect(len(set(found)) == limit, f"{limit} names with limit={limit}")
        expect(found == sorted(set(found) & set(names)), "names of the split, sorted")
    expect(some[0] == some[1], "the same names for the same seed")
    expect(len(set(map(tuple, some))) == 3, "other names for another seed", "the same")
    expect(names[:limit] not in some, "names drawn by the seed", "the first ones")


def test_missing_file_is_named(copied):
    name = read_split(copied, "test")[3]
    (copied / "annotations" / "trimaps" / f"{name}.png").unlink()
    with pytest.raises(InputError, match=name):
        read_split(copied, "test")


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_held_out_images_are_a_share_of_every_breed_and_no_others(fraction):
    seed = draw("held out").randrange(1000)
    first, again, other = (hold_out(NAMES, fraction, seed=s) for s in (seed, seed, seed + 1))
    expect(first == again, "the same images for the same seed")
    expect(first != other, "other images for another seed", "the same")
    rest, held = first
    common = sorted({*rest} & {*held})
    expect(not common, "no name on both sides", common[:1])
    expect({*rest, *held} == {*NAMES}, "every name on one side")
    found = {breed: sum(name.startswith(breed) for name in held) for breed in BREEDS}
    count = round(30 * fraction)
    expect(set(found.values()) == {count}, f"{count} of 30 held out of every breed", found)


@pytest.mark.parametrize("resize", ["nearest", "bilinear"])
def test_masks_are_resized_by_nearest_neighbour_and_shifted(sample, resize):
    """Or bilinearly, if the mistake is asked for; at a side of their own, if that is."""
    random = draw(f"masks {resize}")
    names = read_split(sample, "test")
    how = "nearest neighbour" if resize == "nearest" else "resize='bilinear'"
    for mask_side in (0, random.randint(40, 60)):
        side = random.randint(20, 36)
        pets = load_pets(sample, names, side, mask_side=mask_side, resize=resize)
        size = 2 * [mask_side or side]
        dtypes = {pets.images.dtype, pets.masks.dtype}
        expect(dtypes == {torch.uint8}, "uint8", dtypes)
        expect(list(pets.masks.shape[1:]) == size, f"masks of side {size[0]}")
        for name, mask in zip(names, pets.masks, strict=True):
            trimap = Image.open(sample / "annotations" / "trimaps" / f"{name}.png")
            expected = np.array(trimap.resize(size, Image.Resampling[resize.upper()])) - 1
            wrong = int((mask.numpy() != expected).sum())
            expect(not wrong, f"the trimap by {how} minus 1", f"{wrong} other pixels in {name}")


def test_images_are_resized_smoothly_and_belong_to_their_names(sample):
    random = draw("images")
    names, side = read_split(sample, "test"), random.randint(20, 36)
    random.shuffle(names)
    pets = load_pets(sample, names, side, mask_side=side + 5)
    expect(list(pets.names) == names, "the names that were asked for")
    for name, image in zip(names, pets.images, strict=True):
        photo = Image.open(sample / "images" / f"{name}.jpg").convert("RGB")
        expected = np.array(photo.resize((side, side), Image.Resampling.BILINEAR), dtype=float)
        error = np.abs(image.permute(1, 2, 0).numpy() - expected).mean()
        expect(error < 2, f"{name} resized bilinearly", f"a mean difference of {error:.0f}")


@pytest.fixture(scope="module")
def moved() -> tuple[Tensor, Tensor, Tensor]:
    """Return masks, and 256 images, bright where their mask is 0, augmented with their masks."""
    torch.manual_seed(draw("moved").randrange(2**31))
    masks = torch.ones(256, 32, 32, dtype=torch.uint8)
    masks[:, 4:20, 2:10] = 0
    masks[:, 4:12, 10:28] = 2
    images = torch.where(masks == 0, 230, 30).byte().unsqueeze(1).repeat(1, 3, 1, 1)
    return masks, *augment(images, masks.clone())


def test_mask_moves_with_its_image(moved):
    _, images, masks = moved
    agree = ((images.float().mean(1) > 130) == (masks == 0))[masks != IGNORE].float().mean()
    expect(agree > 0.95, "the labels where the image has them", f"{agree:.0%} of the pixels so")


def test_augmentation_flips_and_moves(moved):
    before, _, after = moved
    flipped = sum(int((m[:, 16:] == 0).sum() > (m[:, :16] == 0).sum()) for m in after)
    expect(80 <= flipped <= 176, "about half of 256 images flipped", flipped)
    pairs = zip(after, before, strict=True)
    plain = sum(torch.equal(a, b) or torch.equal(a, b.flip(1)) for a, b in pairs)
    expect(plain < 64, "most images moved as well", f"{plain} of 256 that are not")


def test_augmented_labels_are_classes_or_ignored(moved):
    before, images, masks = moved
    strangers = set(masks.unique().tolist()) - {0, 1, 2, IGNORE}
    expect(not strangers, f"the labels 0, 1, 2 and {IGNORE}", strangers)
    expect(IGNORE in masks, f"{IGNORE} where pixels come from outside the photo", "none")
    dtypes = {images.dtype, masks.dtype}
    expect(dtypes == {torch.uint8}, "uint8", dtypes)
    shapes = (images.shape, masks.shape)
    expect(shapes == ((256, 3, 32, 32), before.shape), "the shapes to stay", shapes)


def test_half_the_strength_of_augmentation_moves_half_as_much():
    images, masks = torch.full((2048, 3, 16, 16), 127).byte(), torch.zeros(2048, 16, 16).byte()
    torch.manual_seed(draw("strength").randrange(2**31))
    outside = [(augment(images, masks, s)[1] == IGNORE).float().mean().item() for s in (0.5, 1)]
    share = outside[0] / outside[1]
    what = "about half as much from outside at half the strength"
    expect(0.35 < share < 0.7, what, f"{share:.0%}")
