"""Draw masks, grids of pictures, tables and the U of a U-Net, in colours that all can tell apart.

A figure's label, `figure.get_label()`, is its alt text: what it shows, for those who can't see it.
"""

import html
from collections.abc import Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from support.parameters import InputError

# From Okabe and Ito's palette, for colour-blind readers: no class shares its colour with anything.
COLORS = {"pet": "#E69F00", "background": "#0072B2", "border": "#1A1A1A"}
GREEN, RED, SKY = "#009E73", "#D55E00", "#56B4E9"
YELLOW, PINK, GREY = "#F0E442", "#CC79A7", "#555555"
ARROWS = {
    "next": {"color": GREY},
    "max pooling 2 × 2": {"color": SKY},
    "upsampling × 2": {"color": RED},
    "skip": {"color": GREY, "linestyle": "--"},
}
BOXES = {  # the colour of each kind of step, and what the legend says of it
    "image": ("white", "image"),
    "down": (SKY, "down: two convolutions"),
    "bottleneck": (GREEN, "bottleneck: two convolutions"),
    "concat": ("#CCCCCC", "concatenation with the skip"),
    "up": (YELLOW, "up: two convolutions"),
    "out": (PINK, "out: 1 × 1 convolution"),
}


def colorize(mask: Tensor, image: Tensor | None = None) -> np.ndarray:
    """Return labels (N, N) as an RGB picture (N, N, 3) of floats; what is no class is grey.

    With an image (3, N, N) uint8, the picture is halfway between the image and the mask.
    """
    palette = np.full((256, 3), 0.5)
    palette[: len(COLORS)] = [to_rgb(color) for color in COLORS.values()]
    colored = palette[mask.numpy()]
    return colored if image is None else (image.permute(1, 2, 0).numpy() / 255 + colored) / 2


def plot_grid(columns: dict[str, list], rows: list[str], alt: str, width: float = 2.2) -> Figure:
    """Plot columns of RGB pictures (H, W, 3), `width` inches each, by title, with a legend."""
    height, width_in_pixels = next(iter(columns.values()))[0].shape[:2]
    size = (width * len(columns), width * len(rows) * height / width_in_pixels + 0.6)
    figure = plt.figure(figsize=size, layout="constrained", label=alt)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title, fontsize=10)
        for i, picture in enumerate(pictures):
            axes[i, j].imshow(picture)
            axes[i, j].set(xticks=[], yticks=[])
    for i, title in enumerate(rows):
        axes[i, 0].set_ylabel(title, fontsize=9)
    patches = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(COLORS), frameon=False)
    return figure


def html_table(rows: list[dict]) -> str:
    """Return rows with the same keys as an HTML table, all escaped; a wide one scrolls in a box."""
    lines = [[f"<th>{html.escape(str(title))}</th>" for title in rows[0]]]
    for row in rows:
        cells = [html.escape(str(cell)).replace(" ", "&nbsp;") for cell in row.values()]
        lines.append([f"<td>{cell}</td>" for cell in cells])
    body = "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f'<div style="overflow-x:auto"><table>{body}</table></div>'


def plot_unet(steps: Sequence) -> Figure:
    """Draw the U from the steps of `analyse_shapes`, in a loop over those that follow one another.

    A box's height grows with the side and its width with the channels (square roots, so that small
    ones stay visible). Errors: `InputError` for the steps of a net that is no such U-Net.
    """
    if not all(step.predicted for step in steps):
        raise InputError("only a U-Net that follows the plan can be drawn: show its table instead.")
    depth = max(step.level for step in steps)
    alt = (
        f"The U-Net drawn as a U: {depth} levels down on the left, the bottleneck, "
        f"{depth} levels up on the right, and an arrow across each level for its skip. "
        "Every box is labelled with its formula and its shape."
    )
    size = (3.5 + 1.7 * depth, 2.2 + 0.9 * depth)
    figure, axes = plt.subplots(figsize=size, layout="constrained", label=alt)
    pixels = (3, int(steps[0].predicted[1]))
    image = steps[0]._replace(name="image", formula="N × N × 3", predicted=pixels, traced=pixels)
    drawn = [image, *(step for step in steps if not step.name.startswith(("pool", "upsample")))]
    largest = np.sqrt([step.predicted for step in drawn]).max(axis=0)  # channels, and side
    boxes = {step.name: draw_box(axes, step, depth, largest) for step in drawn}
    for before, after in pairwise(drawn):
        kind = ("next", "max pooling 2 × 2", "upsampling × 2")[np.sign(after.level - before.level)]
        draw_arrow(axes, boxes[before.name], boxes[after.name], kind)
    for level in range(1, depth + 1):
        draw_arrow(axes, boxes[f"down{level}"], boxes[f"concat{level}"], "skip")
    handles = [Patch(facecolor=c, edgecolor="black", label=text) for c, text in BOXES.values()]
    handles += [plt.Line2D([], [], **ARROWS[kind], label=kind) for kind in list(ARROWS)[1:]]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": 3, "fontsize": 9}
    axes.legend(handles=handles, frameon=False, **below)
    axes.set(xlim=(-2.2, 2 * depth + 3.8), ylim=(-1.6 * depth - 1.1, 1.2))
    axes.axis("off")
    return figure


def draw_box(axes: plt.Axes, step: tuple, depth: int, largest: np.ndarray) -> plt.Rectangle:
    """Draw and return a step's box with its formula and traced shape, dotted if not reached."""
    # The arms lean to the bottleneck.
    left, right, y = step.level, 2 * depth + 1.2 - step.level, -1.6 * step.level
    kind = step.name.rstrip("0123456789")
    x, dx, dy = {  # dx and dy say on which side of the box its label stands
        "image": (-1.6, 0, -1),
        "down": (left, -1 if step.level else 0, 0 if step.level else 1),
        "bottleneck": (left + 0.1, 0, -1),
        "concat": (right, 0, 1),
        "up": (right + 0.9, 0, -1),
        "out": (right + 1.9, 0, 1),
    }[kind]
    w, h = np.sqrt(step.traced or step.predicted) / largest * (0.35, 0.5)  # half of each
    text = f"{step.name}\n{step.formula}\n{step.row['traced']}".replace(" × ", "×")
    ha, va = ("center", "left", "right")[dx], ("center", "bottom", "top")[dy]
    at = x + dx * (w + 0.08), y + dy * (h + 0.06) - 0.2 * abs(dx)
    axes.text(*at, text, ha=ha, va=va, fontsize=9.5)
    color, line = (BOXES[kind][0], "-") if step.traced else ("none", ":")
    box = plt.Rectangle((x - w, y - h), 2 * w, 2 * h, ec="black", fc=color, linestyle=line)
    return axes.add_patch(box)


def draw_arrow(axes: plt.Axes, start: plt.Rectangle, end: plt.Rectangle, kind: str) -> None:
    """Draw an arrow of one of the kinds in `ARROWS` from one box's edge to another's."""
    style = {"arrowstyle": "->", "lw": 1.5, "patchA": start, "patchB": end, **ARROWS[kind]}
    axes.annotate("", end.get_center(), start.get_center(), arrowprops=style)
