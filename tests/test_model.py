"""The model section, beside what the rubric's tests of the model ask of every hand-in."""

from copy import deepcopy

import pytest
import torch
from course_unet import UNet as CourseUNet

from petseg_utils import UNet, conv_plus_conv, load_weights, save_weights


@pytest.mark.parametrize("norms", [1, 2])
def test_activation_in_place_changes_no_output_and_no_gradient(norms):
    torch.manual_seed(0)
    block = conv_plus_conv(2, 3, norms)
    copied = deepcopy(block)
    for layer in copied[2::3]:
        layer.inplace = False
    ours = torch.randn(2, 2, 6, 6, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    outputs = block(ours), copied(theirs)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    pairs = zip((ours, *block.parameters()), (theirs, *copied.parameters()), strict=True)
    for mine, yours in pairs:
        torch.testing.assert_close(mine.grad, yours.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("switches", [{}, {"norms": 1}, {"skips": False}])
def test_net_gives_what_one_in_the_courses_style_gives(switches, training):
    torch.manual_seed(0)
    ours, theirs = (style(2, 3, **switches).train(training) for style in (UNet, CourseUNet))
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(ours(images), theirs(images))


def test_weights_are_loaded_into_a_net_with_other_names(tmp_path):
    ours, theirs = UNet(2, 3).eval(), CourseUNet(2, 3).eval()
    save_weights(tmp_path / "weights.pt", ours)
    for net in (ours, theirs):
        load_weights(tmp_path / "weights.pt", net)
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(ours(images), theirs(images))


def test_weights_have_the_names_of_the_kept_run():
    names = list(UNet(1, 2).state_dict())
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    blocks = ("downs.0", "downs.1", "bottleneck", "ups.0", "ups.1")
    assert parts == [f"{block}.{layer}" for block in blocks for layer in (0, 1, 3, 4)] + ["out"]


@pytest.mark.parametrize(
    ("side", "depth", "words"),
    [
        (33, 5, "make it 32 or 64."),
        (34, 2, "make it 32 or 36."),
        (7, 1, "make it 6 or 8."),
        (3, 2, "make it 4."),
        (16, 5, "make it 32."),
    ],
)
def test_side_that_cannot_be_halved_is_told_with_sides_that_work(complains, side, depth, words):
    with complains(f"depth {depth}", str(side), words):
        UNet(1, depth).eval()(torch.zeros(1, 3, side, side))
