"""The data section: the stand-in dataset, splits, loading, augmentation. Damage: `test_faults`."""

import os
import shutil
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
    IMAGE_FILE,
    ROOT,
    TRIMAP_FILE,
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


@pytest.mark.parametrize("split", SPLITS)
def test_torchvision_reads_the_stand_in_with_the_same_content(sample, split):
    theirs = OxfordIIITPet(sample.parent, split=split, target_types="segmentation", download=False)
    listed = [
        line.split()[0]
        for line in (sample / "annotations" / f"{split}.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    ours = load_pets(sample, read_split(sample, split), 32)
    assert len(theirs) == len(ours.names) == SPLITS[split]
    for name, (image, trimap) in zip(listed, theirs, strict=True):
        index = ours.names.index(name)
        expected_image = oracle.resize(oracle.pil_to_tensor(image), [32, 32], antialias=True)
        expected_mask = oracle.resize(
            oracle.pil_to_tensor(trimap), [32, 32], InterpolationMode.NEAREST_EXACT
        )[0]
        assert (ours.images[index].int() - expected_image.int()).abs().max() <= 1
        assert torch.equal(ours.masks[index], expected_mask - 1)


def test_torchvision_finds_the_categories_that_the_names_tell(sample):
    theirs = OxfordIIITPet(
        sample.parent, target_types=["category", "binary-category"], download=False
    )
    lines = [
        line.split()
        for line in (sample / "annotations" / "trainval.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    for (name, *_), (_, (category, species)) in zip(lines, theirs, strict=True):
        assert theirs.classes[category] == breed_of(name).replace("_", " ").title()
        assert theirs.bin_classes[species] == ("Cat" if name[0].isupper() else "Dog")


def test_list_names_every_picture_of_both_splits(sample):
    texts = {
        name: (sample / "annotations" / f"{name}.txt").read_text(encoding="utf-8")
        for name in ("list", *SPLITS)
    }
    listed = [line for line in texts["list"].splitlines() if not line.startswith("#")]
    assert sorted(listed) == sorted((texts["trainval"] + texts["test"]).splitlines())
    for folder, kind in (("images", "jpg"), ("annotations/trimaps", "png")):
        assert len(list((sample / folder).glob(f"*.{kind}"))) == len(listed)


def test_stand_in_shows_all_classes_and_different_sizes(sample):
    trimaps = [Image.open(path) for path in sorted((sample / "annotations" / "trimaps").iterdir())]
    assert all(set(np.unique(trimap)) == {1, 2, 3} for trimap in trimaps)
    assert len({trimap.size for trimap in trimaps}) > len(trimaps) / 2
    assert {trimap.width > trimap.height for trimap in trimaps} == {True, False}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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


def test_folder_that_cannot_be_written_to_is_told(tmp_path, complains):
    (tmp_path / "data").touch()  # a file where a folder should be: root, too, is refused
    with complains(tmp_path / "data" / "oxford-iiit-pet", "writable"):
        draw_sample_pets(tmp_path / "data", trainval=2, test=1, side=48)


@pytest.mark.parametrize("wrong", [{"trainval": 0}, {"test": 0}, {"side": 31}], ids=str)
def test_dataset_that_cannot_be_drawn_is_told(tmp_path, complains, wrong):
    with complains(*wrong):
        draw_sample_pets(tmp_path, **{"trainval": 2, "test": 1, "side": 48} | wrong)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------- splits


def test_limit_draws_some_of_the_names_by_the_seed(sample):
    everything = read_split(sample, "trainval")
    some = read_split(sample, "trainval", limit=10, seed=1)
    assert len(set(some)) == 10
    assert set(some) < set(everything)
    assert some == sorted(some) == read_split(sample, "trainval", limit=10, seed=1)
    assert some != read_split(sample, "trainval", limit=10, seed=2)
    assert read_split(sample, "trainval", limit=1000) == everything


def test_breed_is_all_before_the_last_underscore():
    assert [breed_of(name) for name in ("pug_7", "Maine_Coon_12")] == ["pug", "Maine_Coon"]


@pytest.mark.parametrize(
    ("fraction", "of_thirty", "of_ten"), [(0.1, 3, 1), (0.2, 6, 2), (0.01, 1, 1)]
)
def test_hold_out_takes_the_fraction_of_every_breed_and_at_least_one_image(
    fraction, of_thirty, of_ten
):
    names = [f"pug_{i}" for i in range(30)] + [f"Maine_Coon_{i}" for i in range(10)]
    rest, held = hold_out(names, fraction, seed=3)
    assert sorted(rest + held) == sorted(names)
    assert set(rest).isdisjoint(held)
    assert [breed_of(name) for name in held].count("pug") == of_thirty
    assert [breed_of(name) for name in held].count("Maine_Coon") == of_ten


def test_breeds_only_image_stays_in_the_rest_and_both_sides_see_a_breed_of_two():
    rest, held = hold_out(["pug_1", "pug_2", "Bengal_1"], fraction=0.9)
    assert sorted(map(breed_of, rest)) == ["Bengal", "pug"]
    assert list(map(breed_of, held)) == ["pug"]


def test_hold_out_depends_on_the_seed_and_not_on_the_order_of_names(sample):
    names = read_split(sample, "trainval")
    held = hold_out(names, seed=0)[1]
    assert set(hold_out(names[::-1], seed=0)[1]) == set(held)
    assert any(set(hold_out(names, seed=seed)[1]) != set(held) for seed in range(1, 5))


# ------------------------------------------------------------------- loading


@pytest.mark.parametrize("side", [16, 64, 100])
def test_pets_are_uint8_squares_with_labels_0_1_2_in_the_order_of_names(sample, side):
    names = read_split(sample, "test")[::-1]
    pets = load_pets(sample, names, side)
    assert pets.names == names
    assert pets.images.shape == (len(names), 3, side, side)
    assert pets.masks.shape == (len(names), side, side)
    assert pets.images.dtype == pets.masks.dtype == torch.uint8
    assert pets.masks.unique().tolist() == [0, 1, 2]
    assert torch.equal(pets.masks[-1], load_pets(sample, names[-1:], side).masks[0])


def test_bilinear_masks_make_the_mistake_and_leave_the_images(dataset, name):
    trimap = np.ones((64, 64), np.uint8)
    trimap[:, 20:] = 3  # in the middle of one of 24 columns
    Image.fromarray(trimap).save(trimap_of(dataset, name))
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image_of(dataset, name))
    right, wrong = (load_pets(dataset, [name], 24, resize=how) for how in ("nearest", "bilinear"))
    assert wrong.masks.unique().tolist() == [0, 1, 2]  # background where there is none
    assert torch.equal(right.images, wrong.images)


@pytest.mark.parametrize("resize", ["nearest", "bilinear"])
def test_masks_can_be_finer_than_their_images(sample, resize):
    names = read_split(sample, "test")[:3]
    pets = load_pets(sample, names, 16, mask_side=48, resize=resize)
    assert torch.equal(pets.images, load_pets(sample, names, 16).images)
    assert torch.equal(pets.masks, load_pets(sample, names, 48, resize=resize).masks)


def test_shrunk_images_are_antialiased(dataset, name):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = (
        255  # one pixel wide: picking single pixels would give black or white, the mean is grey
    )
    Image.fromarray(stripes).save(image_of(dataset, name), "PNG")
    Image.new("L", (64, 64), 2).save(trimap_of(dataset, name))
    inner = load_pets(dataset, [name], 8).images[..., 1:-1]
    assert inner.float().sub(127.5).abs().max() < 15


# ------------------------------------------------------------------- broken files


@pytest.fixture
def dataset(sample, tmp_path) -> Path:
    """Return a copy of the stand-in that a test may damage."""
    return Path(shutil.copytree(sample, tmp_path / "copy" / "oxford-iiit-pet"))


@pytest.fixture
def name(sample) -> str:
    """Return the name of a picture in the stand-in."""
    return read_split(sample, "test")[1]


def image_of(dataset: Path, name: str) -> Path:
    return dataset / IMAGE_FILE.format(name)


def trimap_of(dataset: Path, name: str) -> Path:
    return dataset / TRIMAP_FILE.format(name)


def test_dataset_is_found_below_its_data_dir(sample):
    assert find_dataset(sample.parent) == sample.resolve()


def test_relative_data_dir_counts_from_the_root_wherever_one_stands(sample, tmp_path, monkeypatch):
    relative = os.path.relpath(sample.parent, ROOT)
    monkeypatch.chdir(tmp_path)
    assert find_dataset(relative) == sample.resolve()


def test_missing_dataset_is_named_with_what_to_do(tmp_path, complains):
    with complains(tmp_path / "oxford-iiit-pet", "DATA_DIR", "DOWNLOAD"):
        find_dataset(tmp_path)


# ------------------------------------------------------------------- augmentation


@pytest.fixture(scope="module")
def painted() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (16, 3, 64, 64), red where their masks (16, 64, 64) say 0, green at 1 and blue at 2."""
    coarse = torch.randint(
        3, (16, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
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


def test_augmentation_keeps_shapes_types_and_its_input(painted):
    before = [tensor.clone() for tensor in painted]
    results = augment(*painted)
    for given, copy, result in zip(painted, before, results, strict=True):
        assert torch.equal(given, copy)
        assert type(result) is torch.Tensor
        assert (result.shape, result.dtype) == (given.shape, given.dtype)


def test_image_and_mask_move_together(painted, augmented):
    images, masks = augmented
    compared = away_from_edges(masks) & (masks != IGNORE)
    assert compared.float().mean() > 0.3
    assert torch.equal(images.argmax(dim=1)[compared], masks[compared].long())
    assert (masks != painted[1]).float().mean() > 0.2  # and they did move


def test_pixels_from_outside_the_photo_are_grey_and_ignored(augmented):
    images, masks = augmented
    assert masks.unique().tolist() == [0, 1, 2, IGNORE]
    red, green, blue = images.int().unbind(dim=1)
    grey = ((red - green).abs() <= 2) & ((green - blue).abs() <= 2)
    assert torch.equal(grey[away_from_edges(masks)], (masks == IGNORE)[away_from_edges(masks)])


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


def test_augmentation_follows_the_seed(painted):
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(*painted))
    for first, again, other in zip(*results, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_every_image_is_augmented_differently(painted):
    images, masks = (tensor[:1].expand(4, *tensor.shape[1:]) for tensor in painted)
    moved = augment(images, masks)[1]
    assert len({bytes(mask.numpy()) for mask in moved}) == 4


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
    """Guess each pixel by its colour alone, learned from other pictures: hardly better than the majority class."""
    folder = draw_sample_pets(tmp_path, trainval=90, test=30)
    train, test = (
        load_pets(folder, read_split(folder, split), 64) for split in ("trainval", "test")
    )

    def colour(pets):  # 8 levels of red, green and blue
        return ((pets.images.long() // 32) * torch.tensor([64, 8, 1]).view(3, 1, 1)).sum(dim=1)

    counts = torch.bincount((colour(train) * 3 + train.masks).flatten(), minlength=512 * 3).view(
        512, 3
    )
    accuracy = (counts.argmax(dim=1)[colour(test)] == test.masks).float().mean()
    majority = (test.masks == 1).float().mean()
    assert accuracy < majority + 0.1
