"""The model section: the U-Net's shapes, parameters, gradients and wiring."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from petseg_utils import UNet, check_side, conv_plus_conv


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 5, 7), (3, 1, 1)])
def test_conv_plus_conv_changes_only_the_channels(shape):
    count, height, width = shape
    assert conv_plus_conv(4, 6).eval()(torch.zeros(count, 4, height, width)).shape == (
        count,
        6,
        height,
        width,
    )


def test_conv_plus_conv_is_convolution_norm_and_activation_twice():
    layers = list(conv_plus_conv(4, 6))
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 2
    assert [layer.kernel_size for layer in layers[::3]] == [(3, 3)] * 2
    assert [layer.in_channels for layer in layers[::3]] == [4, 6]
    assert [layer.num_features for layer in layers[1::3]] == [6, 6]
    assert [layer.negative_slope for layer in layers[2::3]] == [0.2] * 2


def test_one_norm_leaves_out_the_second():
    assert [type(layer) for layer in conv_plus_conv(4, 6, norms=1)][4] is nn.Identity
    norms = [
        sum(isinstance(module, nn.BatchNorm2d) for module in UNet(2, 3, norms=norms).modules())
        for norms in (1, 2)
    ]
    assert norms == [7, 14]  # three blocks down, the bottleneck, three up


@pytest.mark.parametrize("norms", [1, 2])
def test_activation_in_place_changes_no_output_and_no_gradient(norms):
    torch.manual_seed(0)
    block = conv_plus_conv(2, 3, norms)
    copied = deepcopy(block)
    for layer in copied[2::3]:
        layer.inplace = False
    ours, theirs = (
        torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    given = ours.clone()
    outputs = [one(x.requires_grad_()) for one, x in ((block, ours), (copied, theirs))]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(ours, given)
    for mine, yours in zip(
        (ours, *block.parameters()), (theirs, *copied.parameters()), strict=True
    ):
        torch.testing.assert_close(mine.grad, yours.grad)


@pytest.mark.parametrize("skips", [True, False])
def test_without_skips_only_what_pooling_keeps_has_influence(skips):
    torch.manual_seed(0)
    model = UNet(2, 2, skips=skips).eval()
    kept = []
    for down in model.downs:
        down.register_forward_hook(
            lambda _m, _i, output: (output.retain_grad(), kept.append(output))[1]
        )
    model(torch.randn(1, 3, 16, 16)).square().sum().backward()
    for output in kept:
        used = (output.grad != 0).float().mean().item()
        assert used > 0.9 if skips else 0 < used <= 0.25  # max pooling passes one of four on


@pytest.mark.parametrize("base_channels", [1, 2, 5])
@pytest.mark.parametrize(
    ("depth", "side"), [(1, 2), (1, 14), (2, 4), (2, 20), (3, 8), (3, 24), (5, 32)]
)
def test_logits_have_the_size_of_the_images(base_channels, depth, side):
    model = UNet(base_channels, depth).eval()
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 3, side, side)


@pytest.mark.parametrize("num_classes", [1, 3, 21])
def test_number_of_classes_is_free(num_classes):
    assert UNet(2, 1, num_classes)(torch.zeros(2, 3, 4, 4)).shape == (2, num_classes, 4, 4)


def test_default_model_has_the_parameters_of_the_course():
    with torch.device("meta"):
        model = UNet()
    assert (model.base_channels, model.depth) == (32, 5)
    assert sum(parameter.numel() for parameter in model.parameters()) == 13_385_475


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_level_down_doubles_the_channels_and_every_level_up_halves_them(depth):
    model = UNet(4, depth)
    kept = [4 * 2**level for level in range(depth)]
    assert [down[3].out_channels for down in model.downs] == kept
    assert model.bottleneck[3].out_channels == kept[-1]
    assert [up[0].in_channels for up in model.ups] == [2 * channels for channels in reversed(kept)]
    assert [up[3].out_channels for up in model.ups] == [*reversed(kept[:-1]), 4]


@pytest.mark.parametrize("depth", [1, 3])
def test_gradients_reach_every_parameter(depth):
    torch.manual_seed(0)
    model = UNet(3, depth)
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # BatchNorm subtracts the mean, so the bias of the convolution before it has no influence.
        if not name.endswith(("0.bias", "3.bias")):
            assert parameter.grad.abs().max() > 1e-6, name


def test_concatenation_puts_the_upsampled_before_the_skip():
    model = UNet(2, 1).eval()
    caught = {}
    model.downs[0].register_forward_hook(
        lambda _module, _inputs, output: caught.update(skip=output)
    )
    model.bottleneck.register_forward_hook(
        lambda _module, _inputs, output: caught.update(bottom=output)
    )
    model.ups[0].register_forward_pre_hook(lambda _module, inputs: caught.update(joined=inputs[0]))
    model(torch.randn(1, 3, 8, 8))
    upsampled = (
        caught["bottom"].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    )  # the nearest neighbour
    assert torch.equal(caught["joined"], torch.cat((upsampled, caught["skip"]), dim=1))


def test_pooling_keeps_the_largest_of_four():
    model = UNet(2, 1).eval()
    caught = {}
    model.downs[0].register_forward_hook(
        lambda _module, _inputs, output: caught.update(kept=output)
    )
    model.bottleneck.register_forward_pre_hook(
        lambda _module, inputs: caught.update(pooled=inputs[0])
    )
    model(torch.randn(1, 3, 8, 8))
    assert torch.equal(
        caught["pooled"], caught["kept"].unflatten(3, (4, 2)).unflatten(2, (4, 2)).amax((3, 5))
    )


@pytest.mark.parametrize(
    ("side", "depth", "words"),
    [
        (33, 5, "make it 32 or 64"),
        (34, 2, "make it 32 or 36"),
        (7, 1, "make it 6 or 8"),
        (6, 2, "make it 4 or 8"),
        (3, 2, "make it 4."),
        (16, 5, "make it 32."),
    ],
)
def test_side_that_cannot_be_halved_is_told_with_sides_that_work(complains, side, depth, words):
    with complains(f"depth {depth}", str(side), words):
        UNet(1, depth).eval()(torch.zeros(1, 3, side, side))
    with complains(f"depth {depth}", str(side), words):
        check_side(side, depth)
