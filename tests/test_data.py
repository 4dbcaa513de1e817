"""The data section: the stand-in dataset, splits, loading, augmentation. Damage: `test_faults`."""

import os
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


@pytest.mark.parametrize("split", SPLITS)
def test_torchvision_reads_the_stand_in_with_the_same_content(sample, split):
    kinds = ["segmentation", "category", "binary-category"]
    theirs = OxfordIIITPet(sample.parent, split=split, target_types=kinds, download=False)
    ours = load_pets(sample, read_split(sample, split), 32)
    assert len(theirs) == len(ours.names) == SPLITS[split]
    for path, (image, (trimap, category, species)) in zip(theirs._images, theirs, strict=True):
        name = path.stem
        index = ours.names.index(name)
        small = oracle.resize(oracle.pil_to_tensor(image), [32, 32], antialias=True)
        assert (ours.images[index].int() - small.int()).abs().max() <= 1
        labels = oracle.pil_to_tensor(trimap)
        mask = oracle.resize(labels, [32, 32], InterpolationMode.NEAREST_EXACT)[0] - 1
        assert torch.equal(ours.masks[index], mask)
        assert theirs.classes[category] == breed_of(name).replace("_", " ").title()
        assert theirs.bin_classes[species] == ("Cat" if name[0].isupper() else "Dog")


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


@pytest.mark.parametrize("fraction", [0.01, 0.9])
def test_breeds_only_image_stays_in_the_rest_and_both_sides_see_a_breed_of_two(fraction):
    rest, held = hold_out(["pug_1", "pug_2", "Bengal_1"], fraction)
    assert sorted(map(breed_of, rest)) == ["Bengal", "pug"]
    assert list(map(breed_of, held)) == ["pug"]


def test_hold_out_does_not_depend_on_the_order_of_names(sample):
    names = read_split(sample, "trainval")
    assert set(hold_out(names[::-1])[1]) == set(hold_out(names)[1])


def test_dataset_is_found_from_the_root_wherever_one_stands(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data_dir in (sample.parent, os.path.relpath(sample.parent, ROOT)):
        assert find_dataset(data_dir) == sample.resolve()


def test_missing_dataset_is_named_with_what_to_do(tmp_path, complains):
    with complains(tmp_path / "oxford-iiit-pet", "DATA_DIR", "DOWNLOAD"):
        find_dataset(tmp_path)


@pytest.fixture(scope="module")
def painted() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (16, 3, 64, 64), red, green and blue where their masks say 0, 1 and 2."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(3, (16, 4, 4), generator=random, dtype=torch.uint8)
    masks = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return (torch.eye(3)[masks.long()].permute(0, 3, 1, 2) * 140 + 60).byte(), masks


def away_from_edges(masks: torch.Tensor) -> torch.Tensor:
    """Return where all the 5 x 5 pixels around have the same label."""
    labels = masks.float().unsqueeze(1)
    return (F.max_pool2d(labels, 5, 1, 2) == -F.max_pool2d(-labels, 5, 1, 2)).squeeze(1)


def test_every_pixel_has_the_colour_of_its_label_or_is_grey_and_ignored(painted):
    torch.manual_seed(0)
    images, masks = augment(*painted)
    assert masks.unique().tolist() == [0, 1, 2, IGNORE]
    outside, inner = masks == IGNORE, away_from_edges(masks)
    assert (inner & ~outside).float().mean() > 0.3
    red, green, blue = images.int().unbind(dim=1)
    grey = ((red - green).abs() <= 2) & ((green - blue).abs() <= 2)
    assert torch.equal(grey[inner], outside[inner])
    labels = images.argmax(dim=1)
    assert torch.equal(labels[inner & ~outside], masks[inner & ~outside].long())


def test_strength_scales_colours(painted):
    recoloured = []
    for strength in (0.5, 1.0):
        torch.manual_seed(0)
        images, _ = augment(*painted, strength)
        recoloured.append((images.amax((1, 2, 3)).double() - 200).abs().mean().item())
    assert 0.3 < recoloured[0] / recoloured[1] < 0.7


def test_without_strength_images_are_only_mirrored_and_the_input_stays(painted):
    torch.manual_seed(0)
    mirrored = 0
    before = [tensor.clone() for tensor in painted]
    for given, given_mask, image, mask in zip(*before, *augment(*painted, 0.0), strict=True):
        turned = torch.equal(image, given.flip(2))
        mirrored += turned
        assert torch.equal(image, given.flip(2) if turned else given)
        assert torch.equal(mask, given_mask.flip(1) if turned else given_mask)
    assert 3 < mirrored < 13  # of 16
    assert all(map(torch.equal, painted, before))


def test_real_dataset_loads_and_has_its_images_breeds_and_labels(oxford):
    trainval, test = read_split(oxford, "trainval"), read_split(oxford, "test")
    assert (len(trainval), len(test)) == (3680, 3669)
    rest, held = hold_out(trainval)
    assert len(set(map(breed_of, rest))) == len(set(map(breed_of, held))) == 37
    assert len(held) == pytest.approx(368, abs=19)
    pets = load_pets(oxford, read_split(oxford, "trainval", limit=50), 64)
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
