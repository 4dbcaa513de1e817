"""The data section: the stand-in dataset, splits, loading, augmentation. Damage: `test_faults`."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.datasets import OxfordIIITPet
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as oracle

from petseg_utils import (
    IGNORE,
    ROOT,
    augment,
    breed_of,
    draw_sample_pets,
    find_dataset,
    hold_out,
    load_pets,
    read_split,
)

SPLITS = {"trainval": 24, "test": 12}  # images in the stand-in that the fixture `sample` draws


# ------------------------------------------------------------------- the stand-in


def listed(folder: Path, file: str) -> list[str]:
    """Return the lines of a list of pictures, without comments."""
    text = (folder / "annotations" / f"{file}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("split", SPLITS)
def test_torchvision_reads_the_stand_in_with_the_same_content(sample, split):
    kinds = ["segmentation", "category", "binary-category"]
    theirs = OxfordIIITPet(sample.parent, split=split, target_types=kinds, download=False)
    ours = load_pets(sample, read_split(sample, split), 32)
    lines = listed(sample, split)
    assert len(theirs) == len(ours.names) == len(lines) == SPLITS[split]
    for line, (image, (trimap, category, species)) in zip(lines, theirs, strict=True):
        name = line.split()[0]
        index = ours.names.index(name)
        small = oracle.resize(oracle.pil_to_tensor(image), [32, 32], antialias=True)
        assert (ours.images[index].int() - small.int()).abs().max() <= 1
        labels = oracle.pil_to_tensor(trimap)
        mask = oracle.resize(labels, [32, 32], InterpolationMode.NEAREST_EXACT)[0] - 1
        assert torch.equal(ours.masks[index], mask)
        assert theirs.classes[category] == breed_of(name).replace("_", " ").title()
        assert theirs.bin_classes[species] == ("Cat" if name[0].isupper() else "Dog")


def test_list_names_every_picture_of_both_splits(sample):
    lines = listed(sample, "list")
    assert sorted(lines) == sorted(line for split in SPLITS for line in listed(sample, split))
    for folder, kind in (("images", "jpg"), ("annotations/trimaps", "png")):
        assert len(list((sample / folder).glob(f"*.{kind}"))) == len(lines)


def test_stand_in_shows_all_classes_and_different_sizes(sample):
    trimaps = [Image.open(path) for path in sorted((sample / "annotations" / "trimaps").iterdir())]
    assert all(set(np.unique(trimap)) == {1, 2, 3} for trimap in trimaps)
    assert len({trimap.size for trimap in trimaps}) > len(trimaps) / 2
    assert {trimap.width > trimap.height for trimap in trimaps} == {True, False}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_same_seed_draws_the_same_bytes_and_another_seed_does_not(tmp_path):
    first, again, other = (
        contents(draw_sample_pets(tmp_path / name, trainval=3, test=2, seed=seed, side=48))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert first.keys() == other.keys()
    pictures = [name for name in first if name.startswith("images")]
    assert len(pictures) == 5
    assert all(first[name] != other[name] for name in pictures)


def test_what_was_drawn_before_is_kept_until_other_arguments_are_given(tmp_path):
    folder = draw_sample_pets(tmp_path, trainval=2, test=1, side=48)
    marker = folder / "marker"
    marker.touch()
    assert draw_sample_pets(tmp_path, trainval=2, test=1, side=48) == folder
    assert marker.exists()
    draw_sample_pets(tmp_path, trainval=2, test=2, side=48)
    assert not marker.exists()
    assert len(read_split(folder, "test")) == 2
    assert not list(tmp_path.glob(".drawing-*"))  # nothing is left beside it


def test_folder_that_was_not_drawn_here_is_left_alone(tmp_path, complains):
    precious = tmp_path / "oxford-iiit-pet" / "annotations" / "README"
    precious.parent.mkdir(parents=True)
    precious.write_text("the real dataset", encoding="utf-8")
    with complains(tmp_path / "oxford-iiit-pet", "move it away"):
        draw_sample_pets(tmp_path, trainval=2, test=1, side=48)
    assert contents(tmp_path) == {"oxford-iiit-pet/annotations/README": b"the real dataset"}


@pytest.mark.parametrize("wrong", [{"trainval": 0}, {"test": 0}, {"side": 31}], ids=str)
def test_dataset_that_cannot_be_drawn_is_told(tmp_path, complains, wrong):
    with complains(*wrong):
        draw_sample_pets(tmp_path, **{"trainval": 2, "test": 1, "side": 48} | wrong)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------- splits


def test_limit_above_the_number_of_names_takes_them_all(sample):
    everything = read_split(sample, "trainval")
    assert read_split(sample, "trainval", limit=1000, seed=1) == everything


@pytest.mark.parametrize(("fraction", "of_ten"), [(0.1, 1), (0.2, 2), (0.01, 1)])
def test_hold_out_takes_at_least_one_image_of_every_breed(fraction, of_ten):
    names = [f"{breed}_{i}" for breed in ("pug", "Maine_Coon") for i in range(10)]
    held = hold_out(names, fraction, seed=3)[1]
    assert Counter(map(breed_of, held)) == {"pug": of_ten, "Maine_Coon": of_ten}


def test_breeds_only_image_stays_in_the_rest_and_both_sides_see_a_breed_of_two():
    rest, held = hold_out(["pug_1", "pug_2", "Bengal_1"], fraction=0.9)
    assert sorted(map(breed_of, rest)) == ["Bengal", "pug"]
    assert list(map(breed_of, held)) == ["pug"]


def test_hold_out_does_not_depend_on_the_order_of_names(sample):
    names = read_split(sample, "trainval")
    assert set(hold_out(names[::-1])[1]) == set(hold_out(names)[1])


# ------------------------------------------------------------------- datasets


def test_dataset_is_found_from_the_root_wherever_one_stands(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data_dir in (sample.parent, os.path.relpath(sample.parent, ROOT)):
        assert find_dataset(data_dir) == sample.resolve()


def test_missing_dataset_is_named_with_what_to_do(tmp_path, complains):
    with complains(tmp_path / "oxford-iiit-pet", "DATA_DIR", "DOWNLOAD"):
        find_dataset(tmp_path)


# ------------------------------------------------------------------- augmentation


@pytest.fixture(scope="module")
def painted() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (16, 3, 64, 64), red, green and blue where their masks say 0, 1 and 2."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(3, (16, 4, 4), generator=random, dtype=torch.uint8)
    masks = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return (torch.eye(3)[masks.long()].permute(0, 3, 1, 2) * 140 + 60).byte(), masks


@pytest.fixture(scope="module")
def augmented(painted) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `painted`, augmented."""
    torch.manual_seed(0)
    return augment(*painted)


def away_from_edges(masks: torch.Tensor) -> torch.Tensor:
    """Return where all the 5 x 5 pixels around have the same label."""
    labels = masks.float().unsqueeze(1)
    return (F.max_pool2d(labels, 5, 1, 2) == -F.max_pool2d(-labels, 5, 1, 2)).squeeze(1)


def test_augmentation_leaves_its_input_as_it_is(painted):
    before = [tensor.clone() for tensor in painted]
    augment(*painted)
    assert all(map(torch.equal, painted, before))


def test_every_pixel_has_the_colour_of_its_label_or_is_grey_and_ignored(augmented):
    images, masks = augmented
    assert masks.unique().tolist() == [0, 1, 2, IGNORE]
    outside, inner = masks == IGNORE, away_from_edges(masks)
    assert (inner & ~outside).float().mean() > 0.3
    red, green, blue = images.int().unbind(dim=1)
    grey = ((red - green).abs() <= 2) & ((green - blue).abs() <= 2)
    assert torch.equal(grey[inner], outside[inner])
    labels = images.argmax(dim=1)
    assert torch.equal(labels[inner & ~outside], masks[inner & ~outside].long())


def test_strength_scales_moves_and_colours(painted):
    outside, recoloured = [], []
    for strength in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        images, masks = augment(*painted, strength)
        outside.append((masks == IGNORE).double().mean().item())
        recoloured.append((images.amax((1, 2, 3)).double() - 200).abs().mean().item())
    assert outside[0] == recoloured[0] == 0
    assert 0.3 < outside[1] / outside[2] < 0.7
    assert 0.3 < recoloured[1] / recoloured[2] < 0.7


def test_without_strength_images_are_only_mirrored(painted):
    torch.manual_seed(0)
    mirrored = 0
    for given, given_mask, image, mask in zip(*painted, *augment(*painted, 0.0), strict=True):
        turned = torch.equal(image, given.flip(2))
        mirrored += turned
        assert torch.equal(image, given.flip(2) if turned else given)
        assert torch.equal(mask, given_mask.flip(1) if turned else given_mask)
    assert 3 < mirrored < 13  # of 16


# ------------------------------------------------------------------- the real dataset


def test_real_splits_have_3680_and_3669_images_and_no_overlap(oxford):
    trainval, test = read_split(oxford, "trainval"), read_split(oxford, "test")
    assert (len(trainval), len(test)) == (3680, 3669)
    assert set(trainval).isdisjoint(test)


def test_real_validation_images_come_from_all_37_breeds(oxford):
    rest, held = hold_out(read_split(oxford, "trainval"))
    assert len({breed_of(name) for name in rest}) == len({breed_of(name) for name in held}) == 37
    assert len(held) == pytest.approx(368, abs=19)


def test_real_images_load(oxford):
    pets = load_pets(oxford, read_split(oxford, "trainval", limit=50), 64)
    assert pets.images.shape == (50, 3, 64, 64)
    shares = torch.bincount(pets.masks.flatten().long(), minlength=3) / pets.masks.numel()
    assert shares.tolist() == pytest.approx([0.30, 0.59, 0.11], abs=0.1)  # those of all the images


def test_colour_alone_does_not_solve_the_stand_in(tmp_path):
    """Guess each pixel by its colour alone: hardly better than the majority class."""
    folder = draw_sample_pets(tmp_path, trainval=90, test=30, side=96)
    names = [read_split(folder, split) for split in ("trainval", "test")]
    train, test = (load_pets(folder, some, 64) for some in names)

    def colour(pets):  # 8 levels of red, green and blue
        return ((pets.images.long() // 32) * torch.tensor([64, 8, 1]).view(3, 1, 1)).sum(dim=1)

    counts = torch.bincount((colour(train) * 3 + train.masks).flatten(), minlength=512 * 3)
    counts = counts.view(512, 3)
    accuracy = (counts.argmax(dim=1)[colour(test)] == test.masks).float().mean()
    majority = (test.masks == 1).float().mean()
    assert accuracy < majority + 0.1
