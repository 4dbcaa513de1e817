"""Check the answers to the notebooks' quizzes: compute the truth, say why one is wrong.

A file of its own, so that a notebook does not show the answers beside the questions. The first
eight questions are asked in pet_segmentation.ipynb, the others in going_deeper.ipynb.
"""

from collections.abc import Callable
from numbers import Number

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import petseg_utils as pets

COURSE = {
    step.name: step for step in pets.analyse_shapes(pets.UNet(base_channels=32, depth=5), side=256)
}
UNANSWERED = "not answered yet"


def check(number: int, answer: object) -> None:
    """Print what there is to say about an answer; None, or a function that returns it, is none."""
    answered = answer is not None and answer is not ...
    print(f"{number}: {QUESTIONS[number](answer) if answered else UNANSWERED}")


def solution(number: int) -> None:
    """Print the solution of a question."""
    print(SOLUTIONS[number].strip())


def compare(answer: object, truth: object, mistakes: dict, otherwise: str) -> str:
    """Return a sentence on an answer: right, one of the well-known mistakes, or something else."""
    if not isinstance(answer, Number | str):
        return f"not yet: the answer is one number or word, not a {type(answer).__name__}"
    if isinstance(answer, str):
        answer = answer.strip().lower()
    if answer == truth:
        return "right"
    return f"not yet: {mistakes.get(answer, otherwise)}"


def channels(answer: int) -> str:
    """Check the channels after concat4."""
    truth = COURSE["concat4"].traced[0]
    mistakes = {
        truth // 2: "that is before the concatenation, which stacks the skip on it",
        2 * truth: "that is concat5, one level below",
        COURSE["up4"].traced[0]: "that is after the convolutions of up4",
    }
    return compare(answer, truth, mistakes, "look at the channels of down4, and at what joins them")


def positions(answer: float) -> str:
    """Check the factor by which the number of positions shrinks from down2 to down3."""
    before, after = (COURSE[name].traced[1] for name in ("down2", "down3"))
    truth = (before / after) ** 2
    mistakes = {
        before / after: "that is the side; positions are the side squared",
        1 / truth: "the other way round",
    }
    return compare(answer, truth, mistakes, "pooling 2 x 2 keeps one position of how many?")


def largest_side(answer: int) -> str:
    """Check the largest side below 600 that a U-Net of depth 5 takes."""
    net = pets.UNet(base_channels=1, depth=5)
    truth = next(
        n for n in range(599, 0, -1) if all(step.agrees for step in pets.analyse_shapes(net, n))
    )
    mistakes = {
        592: "592 can be halved four times, but not five",
        512: "it need not be a power of two, only a multiple of one: 32",
        599: "an odd side can't be halved even once",
        608: "that is not below 600",
    }
    return compare(answer, truth, mistakes, "five halvings must come out even")


def mixed_label(answer: str) -> str:
    """Check the class of a pixel halfway between pet and border, resized bilinearly."""
    pair = Image.fromarray(np.array([[1, 3]], dtype=np.uint8))
    between = pair.resize((3, 1), Image.Resampling.BILINEAR)
    truth = pets.CLASSES[between.getpixel((1, 0)) - 1]
    wrong = "bilinear interpolation averages the two values; which class has the value in between?"
    return compare(answer, truth, {}, wrong)


def dice_of_half(answer: float) -> str:
    """Check the Dice score of a class whose IoU is 0.5."""
    half = pets.scores(torch.tensor([[2, 1, 0], [1, 2, 0], [0, 0, 1]]))  # pet: TP 2, FP 1, FN 1
    mistakes = {
        0.5: "the two agree only at 0 and at 1: Dice counts the overlap twice",
        0.33: "that is the IoU of a Dice of 0.5",
        0.66: "two thirds round up",
    }
    rounded = round(answer, 2) if isinstance(answer, int | float) else answer
    return compare(rounded, round(half["dice"]["pet"], 2), mistakes, "write both in TP, FP and FN")


def even_loss(answer: float) -> str:
    """Check the cross-entropy of a net that gives three classes the same probability."""
    loss = F.cross_entropy(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)).item()
    mistakes = {
        0.33: "that is the probability; the loss is minus its logarithm",
        -1.1: "minus the logarithm of a number below 1 is above 0",
        1.58: "that is in bits: PyTorch takes the natural logarithm",
        0.48: "that is to base 10: PyTorch takes the natural logarithm",
    }
    rounded = round(answer, 2) if isinstance(answer, int | float) else answer
    return compare(rounded, round(loss, 2), mistakes, "it is -ln(1/3)")


def norm_parameters(answer: int) -> str:
    """Check how many parameters one BatchNorm of down1 learns."""
    truth = sum(p.numel() for p in pets.conv_plus_conv(3, 32)[1].parameters())
    mistakes = {
        truth // 2: "each channel has a scale and a shift",
        2 * truth: "mean and variance are measured, not learned",
        2: "two for each channel",
    }
    return compare(answer, truth, mistakes, "what does it learn for each of its channels?")


def depth_to_see_all(answer: int) -> str:
    """Check the smallest depth at which the bottleneck's middle can see all of 256 x 256."""

    def sees_all(depth: int) -> bool:
        steps = {step.name: step for step in pets.analyse_shapes(pets.UNet(1, depth), 256)}
        # The bottleneck's central pixels lie half a cell off the image's centre.
        return steps["bottleneck"].receptive_field >= 256 + 2**depth

    truth = min(depth for depth in range(2, 8) if sees_all(depth))
    near = "284 is more than 256, but the central pixel lies half a cell off the image's centre"
    mistakes = {truth - 1: near}
    return compare(answer, truth, mistakes, "compare the receptive field with 256 plus one cell")


def write_iou(answer: Callable) -> str:
    """Check a function from a confusion matrix (K, K), rows the truth, to every class's IoU."""
    matrix = torch.tensor([[50, 8, 2], [5, 90, 5], [1, 4, 20]])
    try:
        got = answer(matrix.clone())
        if got is None:
            return UNANSWERED
        got = torch.as_tensor(got, dtype=torch.float64)
    except Exception as error:  # whatever a learner's code may raise
        return f"not yet: it ends in {type(error).__name__}: {error}"
    hits, true, called = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    if got.shape != (3,):
        return f"not yet: one number for each class makes the shape (3,), not {tuple(got.shape)}"
    extra = "what is called the class by mistake belongs to the union, too (this is the recall)"
    missed = "what is missed of the class belongs to the union, too (this is the precision)"
    mistakes = {
        "the union counts the hits twice: subtract them once": hits / (true + called),
        "that is Dice": 2 * hits / (true + called),
        extra: hits / true,
        missed: hits / called,
    }
    if torch.allclose(got, hits / (true + called - hits).double()):
        return "right"
    near = (why for why, values in mistakes.items() if torch.allclose(got, values.double()))
    return f"not yet: {next(near, 'compare it by hand for one class: hits over union')}"


def write_level(answer: Callable) -> str:
    """Check a function (x, skip, up) that goes one level up: upsample, concatenate, convolve."""
    torch.manual_seed(0)
    x, skip = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 8, 8)
    up = pets.conv_plus_conv(16, 4).eval()
    with torch.no_grad():
        double = F.interpolate(x, scale_factor=2)
        truth, turned = (up(torch.cat(pair, dim=1)) for pair in ((double, skip), (skip, double)))
        smooth = up(torch.cat((F.interpolate(x, scale_factor=2, mode="bilinear"), skip), dim=1))
        try:
            got = answer(x.clone(), skip.clone(), up)
            if got is None:
                return UNANSWERED
            if got.shape != truth.shape:
                return f"not yet: the shape should be {tuple(truth.shape)}, not {tuple(got.shape)}"
        except Exception as error:  # whatever a learner's code may raise
            return f"not yet: it ends in {type(error).__name__}: {error}"
    if torch.allclose(got, truth, atol=1e-5):
        return "right"
    if torch.allclose(got, turned, atol=1e-5):
        return "not yet: the weights expect the upsampled tensor first and the skip second"
    if torch.allclose(got, smooth, atol=1e-5):
        return "not yet: this net upsamples by the nearest neighbour"
    return "not yet: the shape fits but the numbers don't; compare with UNet.forward"


QUESTIONS = {
    1: channels,
    2: largest_side,
    3: mixed_label,
    4: dice_of_half,
    5: even_loss,
    6: norm_parameters,
    7: write_iou,
    8: write_level,
    9: positions,
    10: depth_to_see_all,
}
SOLUTIONS = {
    1: "512. down4 keeps 8b = 256 channels, the upsampled tensor has as many, and the\n"
    "concatenation stacks both.",
    2: "576 = 18 · 32. Five halvings need a multiple of 2⁵ = 32; the side itself need not be a\n"
    "power of two.",
    3: "background: (1 + 3) / 2 = 2.",
    4: "0.67. Dice = 2 IoU / (1 + IoU) = 1 / 1.5.",
    5: "1.10 = ln 3, which is minus the logarithm of 1/3.",
    6: "64: a scale and a shift for each of 32 channels. Mean and variance are measured, not\n"
    "learned.",
    7: """
hits = matrix.diagonal()
return hits / (matrix.sum(0) + matrix.sum(1) - hits)

# The sum of the row and that of the column both count the hits; the union has them only once.""",
    8: """
x = F.interpolate(x, scale_factor=2)
return up(torch.cat((x, skip), dim=1))""",
    9: "4. Half the side in both directions leaves a quarter of the positions, and a quarter\n"
    "times four is one.",
    10: "6. At depth 5 it sees 284 pixels, but half a cell off the centre it would need\n"
    "256 + 32 = 288. (At depth 6 it sees 572.)",
}
