"""Masks, grids and the U: every figure says what it shows, and shows what it says."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from torch import nn

from petseg_utils import (
    CLASSES,
    COLORS,
    GREEN,
    IGNORE,
    RED,
    Step,
    UNet,
    analyse_shapes,
    colorize,
    conv_plus_conv,
    plot_grid,
    plot_unet,
)

pytestmark = pytest.mark.filterwarnings("error")  # such as a glyph that the font lacks


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def steps_of(depth: int, broken: bool = False) -> list[Step]:
    model = UNet(2, depth)
    if broken:
        model.bottleneck = conv_plus_conv(2 * 2 ** (depth - 1), 5)
    return analyse_shapes(model, 64)


def grid_of(pets) -> Figure:
    """Return two images beside their masks."""
    images = [image.permute(1, 2, 0).numpy() for image in pets.images[[6, 1]]]
    masks = [colorize(mask) for mask in pets.masks[[6, 1]]]
    return plot_grid({"image": images, "mask": masks}, ["a Bengal", "a pug"], "Two masks.")


FIGURES = {
    "grid": grid_of,
    "U-Net": lambda pets: plot_unet(steps_of(3)),
    "broken U-Net": lambda pets: plot_unet(steps_of(3, broken=True)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_has_alt_text_and_can_be_saved_without_a_warning(pets, tmp_path, name):
    figure = FIGURES[name](pets)
    assert isinstance(figure, Figure)
    assert figure.get_label().endswith(".")
    assert len(figure.get_label()) >= len("Two masks.")
    figure.savefig(tmp_path / "figure.png")
    pixels = plt.imread(tmp_path / "figure.png")
    assert len(np.unique(pixels)) > 10  # not blank


RGB = [to_rgb(color) for color in COLORS.values()]


def test_classes_have_a_colour_each_which_nothing_else_has():
    boxes = {to_rgb(patch.get_facecolor()) for patch in plot_unet(steps_of(2)).axes[0].patches}
    assert len(set(RGB)) == len(CLASSES) == 3
    assert len(boxes) > 3
    assert {to_rgb(GREEN), to_rgb(RED), *boxes}.isdisjoint(RGB)


def test_masks_are_coloured_by_class_and_grey_where_ignored():
    picture = colorize(torch.tensor([[0, 1], [2, IGNORE]], dtype=torch.uint8))
    assert picture.shape == (2, 2, 3)
    assert picture.reshape(4, 3).tolist() == [*map(list, RGB), [0.5, 0.5, 0.5]]


def test_mask_with_an_image_is_halfway_between_both(pets):
    image, mask = pets.images[0], pets.masks[0]
    expected = (image.permute(1, 2, 0).numpy() / 255 + colorize(mask)) / 2
    np.testing.assert_allclose(colorize(mask, image), expected)


def test_grid_shows_each_column_under_its_title_each_row_by_its_name_and_a_legend(pets):
    figure = grid_of(pets)
    axes = np.array(figure.axes).reshape(2, 2)
    assert [one.get_title() for one in axes[0]] == ["image", "mask"]
    assert [one.get_ylabel() for one in axes[:, 0]] == ["a Bengal", "a pug"]
    for row, index in zip(axes, (6, 1), strict=True):
        image, mask = (one.images[0].get_array() for one in row)
        np.testing.assert_array_equal(image, pets.images[index].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(mask, colorize(pets.masks[index]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(CLASSES)
    assert [patch.get_facecolor()[:3] for patch in legend.get_patches()] == RGB


def labels_of(figure: Figure) -> list:
    return [text for text in figure.axes[0].texts if not isinstance(text, Annotation)]


def shapes_in(figure: Figure) -> dict[str, str]:
    """Return the shape in the last line of every box's label, by the name in its first."""
    lines = [text.get_text().split("\n") for text in labels_of(figure)]
    return {first: last for first, *_, last in lines}


@pytest.fixture(params=range(2, 7), ids="depth {}".format)
def depth(request) -> int:
    return request.param


def test_u_has_a_labelled_box_for_every_step_that_is_no_resizing(depth):
    steps = steps_of(depth)
    figure = plot_unet(steps)
    (axes,) = figure.axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    arrows = [text for text in axes.texts if isinstance(text, Annotation)]
    drawn = [step for step in steps if not step.name.startswith(("pool", "upsample"))]
    expected = {step.name: "{1}×{1}×{0}".format(*step.traced) for step in drawn}
    labels = shapes_in(figure)
    assert labels.items() >= expected.items()
    assert len(drawn) == 3 * depth + 2
    assert len(boxes) == len(labels)
    assert len(arrows) == len(boxes) - 1 + depth  # from each to the next, and a skip a level
    assert f"{depth} levels" in figure.get_label()


def test_labels_of_the_u_neither_overlap_nor_leave_the_figure(depth):
    figure = plot_unet(steps_of(depth))
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    extents = [(one, one.get_window_extent()) for one in (*labels_of(figure), legend)]
    for index, (label, extent) in enumerate(extents):
        assert figure.bbox.x0 <= extent.x0 <= extent.x1 <= figure.bbox.x1, label
        assert figure.bbox.y0 <= extent.y0 <= extent.y1 <= figure.bbox.y1, label
        assert [other for other, place in extents[:index] if extent.overlaps(place)] == [], label


def test_boxes_of_the_u_grow_with_side_and_channels():
    figure = plot_unet(steps_of(2))
    boxes = dict(zip(shapes_in(figure), figure.axes[0].patches, strict=True))
    for larger, smaller, measure in (
        ("down1", "down2", Rectangle.get_height),
        ("down2", "down1", Rectangle.get_width),
        ("concat1", "up1", Rectangle.get_width),
    ):
        assert measure(boxes[larger]) / measure(boxes[smaller]) == pytest.approx(np.sqrt(2))


def test_broken_u_shows_what_was_traced_and_which_boxes_are_not_reached():
    labels = shapes_in(plot_unet(steps_of(2, broken=True)))
    assert labels["bottleneck"] == "16×16×5"
    missed = {name for name, shape in labels.items() if shape == "not reached"}
    assert missed == {"up2", "concat1", "up1", "out"}


def test_net_that_is_no_u_net_is_not_drawn(complains):
    with complains("follows the plan"):
        plot_unet(analyse_shapes(nn.Sequential(nn.Conv2d(3, 2, 7)), 64))
