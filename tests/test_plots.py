"""The plots section: every figure says what it shows, and shows what it says, in the same colours."""

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
    IGNORE,
    UNet,
    analyse_shapes,
    class_patches,
    colorize,
    conv_plus_conv,
    overlay,
    plot_confusion,
    plot_grid,
    plot_history,
    plot_predictions,
    plot_samples,
    plot_unet,
    shape_text,
)

pytestmark = pytest.mark.filterwarnings("error")  # such as a glyph that the font lacks

HISTORY = [
    {"epoch": 1, "train_loss": 1.5, "valid_pixel_accuracy": 0.55, "valid_mean_iou": 0.3, "seconds": 1.0},
    {"epoch": 2, "train_loss": 0.9, "valid_pixel_accuracy": 0.75, "valid_mean_iou": 0.5, "seconds": 1.0},
]
MATRIX = torch.tensor([[60, 30, 10], [5, 190, 5], [0, 0, 0]])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def steps_of(depth: int, broken: bool = False):
    model = UNet(2, depth)
    if broken:
        model.bottleneck = conv_plus_conv(2 * 2 ** (depth - 1), 5)
    return analyse_shapes(model, 64)


FIGURES = {
    "grid": lambda pets: plot_grid({"mask": [colorize(pets.masks[0])]}, ["pug"], "One mask."),
    "samples": lambda pets: plot_samples(pets, range(3)),
    "one sample": lambda pets: plot_samples(pets, [5]),
    "predictions": lambda pets: plot_predictions(pets, 2 - pets.masks, [0, 7], ["best", "worst"]),
    "history": lambda pets: plot_history(HISTORY, {"majority class": 0.58, "88.1 % of the course": 0.881}),
    "history of one epoch": lambda pets: plot_history(HISTORY[:1], {}),
    "confusion": lambda pets: plot_confusion(MATRIX),
    **{f"U-Net of depth {depth}": lambda pets, depth=depth: plot_unet(steps_of(depth)) for depth in range(2, 7)},
    "broken U-Net": lambda pets: plot_unet(steps_of(3, broken=True)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_has_alt_text_and_can_be_saved_without_a_warning(pets, tmp_path, name):
    figure = FIGURES[name](pets)
    assert isinstance(figure, Figure)
    assert figure.get_label().endswith(".")
    assert len(figure.get_label()) >= len("One mask.")
    figure.savefig(tmp_path / "figure.png")
    pixels = plt.imread(tmp_path / "figure.png")
    assert len(np.unique(pixels)) > 10  # not blank


# ------------------------------------------------------------------- colours


def test_classes_have_a_colour_each():
    assert len({to_rgb(color) for color in COLORS}) == len(COLORS) == len(CLASSES) == 3


def test_masks_are_coloured_by_class_and_grey_where_ignored():
    picture = colorize(torch.tensor([[0, 1], [2, IGNORE]], dtype=torch.uint8))
    assert picture.shape == (2, 2, 3)
    assert picture.reshape(4, 3).tolist() == [*map(list, map(to_rgb, COLORS)), [0.5, 0.5, 0.5]]


def test_legend_has_the_colours_of_the_masks():
    assert [(patch.get_label(), patch.get_facecolor()[:3]) for patch in class_patches()] == [
        (name, to_rgb(color)) for name, color in zip(CLASSES, COLORS, strict=True)
    ]


def test_nothing_but_the_classes_has_their_colours():
    curves = [line.get_color() for axes in plot_history(HISTORY, {"a line": 0.5}).axes for line in axes.lines]
    boxes = [patch.get_facecolor() for patch in plot_unet(steps_of(2)).axes[0].patches]
    assert len({to_rgb(color) for color in curves + boxes}) > 3
    assert {to_rgb(color) for color in curves + boxes}.isdisjoint(map(to_rgb, COLORS))


def test_overlay_is_halfway_between_image_and_mask(pets):
    image, mask = pets.images[0], pets.masks[0]
    expected = (image.permute(1, 2, 0).numpy() / 255 + colorize(mask)) / 2
    np.testing.assert_allclose(overlay(image, mask), expected)


def test_every_picture_grid_has_the_legend_of_the_classes(pets):
    for figure in (plot_samples(pets, [0]), plot_predictions(pets, pets.masks, [0], ["one"])):
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == list(CLASSES)
        assert [patch.get_facecolor()[:3] for patch in legend.get_patches()] == list(map(to_rgb, COLORS))


# ------------------------------------------------------------------- pictures


def shown(figure: Figure) -> list[np.ndarray]:
    """Return the pictures of a figure, from left to right and from top to bottom."""
    return [axes.images[0].get_array() for axes in figure.axes]


def test_samples_are_image_mask_and_overlay_titled_by_breed(pets):
    figure = plot_samples(pets, [6, 1])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "mask", "overlay"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["Bengal", "pug"]
    expected = []
    for index in (6, 1):
        image, mask = pets.images[index], pets.masks[index]
        expected += [image.permute(1, 2, 0).numpy(), colorize(mask), overlay(image, mask)]
    for picture, wanted in zip(shown(figure), expected, strict=True):
        np.testing.assert_array_equal(picture, wanted)


def test_predictions_are_image_truth_prediction_and_white_errors(pets):
    predicted = pets.masks.clone()
    predicted[3, 2, 5] = (predicted[3, 2, 5] + 1) % 3
    figure = plot_predictions(pets, predicted, [3], ["a pug"])
    assert [axes.get_title() for axes in figure.axes] == ["image", "truth", "prediction", "error"]
    assert figure.axes[0].get_ylabel() == "a pug"
    image, truth, prediction, error = shown(figure)
    np.testing.assert_array_equal(image, pets.images[3].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(truth, colorize(pets.masks[3]))
    np.testing.assert_array_equal(prediction, colorize(predicted[3]))
    assert np.argwhere(error.any(axis=-1)).tolist() == [[2, 5]]
    assert error.max() == 1


# ------------------------------------------------------------------- curves, matrix


@pytest.mark.parametrize("count", [0, 1, 4])
def test_history_has_its_curves_and_all_the_lines(count):
    lines = {f"line {i}": 0.5 + i / 10 for i in range(count)}
    figure = plot_history(HISTORY, lines)
    left, right = figure.axes
    (loss,) = left.lines
    assert loss.get_xydata().tolist() == [[1, 1.5], [2, 0.9]]
    accuracy, iou, *others = right.lines
    assert accuracy.get_xydata().tolist() == [[1, 0.55], [2, 0.75]]
    assert iou.get_xydata().tolist() == [[1, 0.3], [2, 0.5]]
    assert [line.get_ydata()[0] for line in others] == list(lines.values())
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend == ["pixel accuracy", "mean IoU", *lines]
    assert all(name in figure.get_label() for name in lines)


def test_alt_text_of_a_history_without_lines_is_whole():
    assert not plot_history(HISTORY, {}).get_label().removesuffix(".").rstrip().endswith("for")


def test_confusion_shows_the_shares_of_each_true_class():
    axes = plot_confusion(MATRIX).axes[0]
    expected = [[0.6, 0.3, 0.1], [0.025, 0.95, 0.025], [0, 0, 0]]  # no pixel is border
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(j, i): f"{expected[i][j]:.1%}" for i in range(3) for j in range(3)}
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in axis] == list(CLASSES)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


# ------------------------------------------------------------------- the U


def labels_of(figure: Figure) -> list:
    return [text for text in figure.axes[0].texts if not isinstance(text, Annotation)]


@pytest.mark.parametrize("depth", range(2, 7))
def test_u_has_a_labelled_box_for_every_step_that_is_no_resizing(depth):
    steps = steps_of(depth)
    figure = plot_unet(steps)
    (axes,) = figure.axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    arrows = [text for text in axes.texts if isinstance(text, Annotation)]
    drawn = {step.name: step.traced for step in steps if not step.name.startswith(("pool", "upsample"))}
    labels = dict(text.get_text().split("\n") for text in labels_of(figure))
    assert labels == {name: shape_text(shape).replace(" ", "") for name, shape in drawn.items()}
    assert len(boxes) == len(drawn) == 3 * depth + 2
    assert len(arrows) == 4 * depth + 1  # a residual, down, up and into the convolutions, per level; and out
    assert f"{depth} levels" in figure.get_label()


@pytest.mark.parametrize("depth", range(2, 7))
def test_labels_of_the_u_neither_overlap_nor_leave_the_figure(depth):
    figure = plot_unet(steps_of(depth))
    figure.draw_without_rendering()
    extents = [(text.get_text().split("\n")[0], text.get_window_extent()) for text in labels_of(figure)]
    legend = ("legend", figure.axes[0].get_legend().get_window_extent())
    for index, (name, extent) in enumerate([*extents, legend]):
        assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= extent.y0 and extent.y1 <= figure.bbox.y1, name
        assert [other for other, place in extents[:index] if extent.overlaps(place)] == [], name


def test_boxes_of_the_u_grow_with_side_and_channels():
    figure = plot_unet(steps_of(2))
    names = [text.get_text().split("\n")[0] for text in labels_of(figure)]
    boxes = dict(zip(names, figure.axes[0].patches, strict=True))
    assert boxes["down2"].get_height() / boxes["down1"].get_height() == pytest.approx(np.sqrt(1 / 2))
    assert boxes["down2"].get_width() / boxes["down1"].get_width() == pytest.approx(np.sqrt(2))
    assert boxes["concat1"].get_width() / boxes["up1"].get_width() == pytest.approx(np.sqrt(2))


def test_broken_u_says_which_boxes_are_not_reached():
    labels = dict(text.get_text().split("\n") for text in labels_of(plot_unet(steps_of(2, broken=True))))
    assert labels["bottleneck"] == "16×16×5"
    assert {name for name, shape in labels.items() if shape == "not reached"} == {
        "up2",
        "concat1",
        "up1",
        "out",
    }


def test_u_of_a_wrong_number_of_classes_shows_what_was_traced():
    model = UNet(4, 2)
    model.out = nn.Conv2d(4, 7, kernel_size=1)
    labels = dict(text.get_text().split("\n") for text in labels_of(plot_unet(analyse_shapes(model, 64))))
    assert labels["out"] == "64×64×7"
