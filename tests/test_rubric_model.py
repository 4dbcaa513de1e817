"""Criteria of the rubric: the block and the U-Net, seen from outside.

Nothing here knows a name inside the hand-in's net. What its convolutions are given, in the order in
which they run, shows all that is between them: pooling, upsampling and skips.
"""

import pytest
import torch
from doctor import told_by_the_doctor
from drawn import draw
from torch import Tensor, nn
from torch.nn import functional as F

from petseg_utils import InputError, UNet, conv_plus_conv


def run_order(model: nn.Module, kind: type, images: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Run the model; return its modules of a kind, as they ran, with copies of what they got."""
    calls = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: calls.append((module, inputs[0].detach().clone()))
        )
        for module in model.modules()
        if isinstance(module, kind)
    ]
    with torch.no_grad():
        model(images.clone())
    for hook in hooks:
        hook.remove()
    return calls


@pytest.fixture(params=[1, 3], ids="depth {}".format)
def levels(request) -> list[tuple[Tensor, Tensor]]:
    """Return, for every level from the top, what the level below gets and what the way up gets."""
    torch.manual_seed(0)
    depth = request.param
    given = [x for _, x in run_order(UNet(3, depth), nn.Conv2d, torch.randn(2, 3, 16, 16))]
    expected = 4 * depth + 3
    assert len(given) == expected, (
        f"expected {expected} convolutions at depth {depth}, found {len(given)}"
    )
    down, up = given[: 2 * depth + 2 : 2], given[2 * depth + 2 : -1 : 2]
    return list(zip(down[1:], reversed(up), strict=True))


# ------------------------------------------------------------------- the block


def test_block_changes_only_the_channels():
    for shape in ((1, 4, 8, 8), (2, 4, 5, 7), (3, 4, 1, 1)):
        expected = (shape[0], 6, *shape[2:])
        found = conv_plus_conv(4, 6).eval()(torch.zeros(shape)).shape
        assert found == expected, (
            f"expected the shape {expected} for an input {shape}, found {tuple(found)}"
        )


MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


class ByHand:
    """A net computed by functions from its convolutions and BatchNorms, in order of use."""

    def __init__(self, model: nn.Module, images: Tensor, training: bool) -> None:
        torch.manual_seed(draw("norms").randrange(2**31))
        self.model, self.images = model.train(training), images
        layers = [layer for layer, _ in run_order(model, (nn.Conv2d, nn.BatchNorm2d), images)]
        self.norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        for norm in self.norms:  # unlike new ones
            assert norm.running_mean is not None, (
                "expected BatchNorm to keep statistics, found none"
            )
            for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                values.copy_(0.5 + torch.rand_like(values))
        self.layers, self.statistics = layers, []

    def block(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.convolution(x, padding=1)
            if self.layers and isinstance(self.layers[0], nn.BatchNorm2d):
                norm = self.layers.pop(0)
                kept = [norm.running_mean.clone(), norm.running_var.clone()]
                x = F.batch_norm(x, *kept, norm.weight, norm.bias, self.model.training)
                self.statistics += kept
            x = F.leaky_relu(x, 0.2)
        return x

    def convolution(self, x: Tensor, padding: int = 0) -> Tensor:
        assert self.layers, "expected two convolutions in every block, found too few"
        layer = self.layers.pop(0)
        assert isinstance(layer, nn.Conv2d), f"expected a convolution, found {layer}"
        return F.conv2d(x, layer.weight, layer.bias, padding=padding)

    def net(self, x: Tensor, depth: int, skips: bool) -> Tensor:
        kept = []
        for _ in range(depth):
            kept.append(self.block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.block(x)
        for skip in reversed(kept):
            upsampled = F.interpolate(x, scale_factor=2)
            x = self.block(torch.cat((upsampled, skip if skips else 0 * skip), 1))
        return self.convolution(x)

    def agrees(self, expected: Tensor) -> bool:
        """Return whether the model puts out what is expected, and leaves such statistics."""
        with torch.no_grad():
            found = self.model(self.images.clone())
        left = [kept for norm in self.norms for kept in (norm.running_mean, norm.running_var)]
        pairs = [(found, expected), *zip(left, self.statistics, strict=True)]
        return not self.layers and all(torch.allclose(*p, rtol=1e-3, atol=1e-3) for p in pairs)


@MODES
def test_block_computes_convolution_norm_and_activation_twice(training):
    random = draw("block")
    images = torch.randn(3, random.randint(2, 5), 6, random.randint(7, 11))
    block = conv_plus_conv(images.shape[1], random.randint(6, 9))
    by_hand = ByHand(block, images, training)
    assert by_hand.agrees(by_hand.block(images)), (
        "expected (convolution, BatchNorm, LeakyReLU of slope 0.2) twice, found other values"
    )


@MODES
@pytest.mark.parametrize(("norms", "skips"), [(2, True), (1, True), (2, False)])
def test_net_computes_what_its_layers_say(norms, skips, training):
    random = draw(f"net {norms} {skips}")
    depth, base_channels = random.randint(1, 3), random.randint(2, 5)
    height, width = random.sample([side * 2**depth for side in (2, 3, 4)], 2)
    images = torch.randn(2, 3, height, width)
    model = UNet(base_channels, depth, norms=norms, skips=skips)
    by_hand = ByHand(model, images, training)
    assert by_hand.agrees(by_hand.net(images, depth, skips)), (
        f"expected the logits of its layers at depth {depth}, norms={norms}, skips={skips}, "
        "computed one after the other, found others"
    )


# ------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("base_channels", "depth", "side"), [(1, 1, 2), (2, 2, 20), (5, 3, 24), (2, 5, 32)]
)
@told_by_the_doctor(UNet)
def test_logits_have_the_side_of_the_images(base_channels, depth, side):
    found = UNet(base_channels, depth).eval()(torch.zeros(2, 3, side, side)).shape
    assert found == (2, 3, side, side), (
        f"expected logits {(2, 3, side, side)}, found {tuple(found)}"
    )


@told_by_the_doctor(UNet)
def test_number_of_classes_is_free():
    found = UNet(2, 1, 21).eval()(torch.zeros(2, 3, 4, 4)).shape
    assert found == (2, 21, 4, 4), (
        f"expected logits {(2, 21, 4, 4)} for 21 classes, found {tuple(found)}"
    )


@told_by_the_doctor(UNet)
def test_default_net_has_the_parameters_of_the_course():
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in UNet().parameters())
    assert found == 13_385_475, f"expected 13,385,475 parameters, found {found:,}"


@pytest.mark.parametrize("depth", [1, 2, 4])
@told_by_the_doctor(UNet)
def test_channels_double_on_the_way_down_and_halve_on_the_way_up(depth):
    widths = [4 * 2**level for level in range(depth)]
    expected = [*zip([3, *widths], widths, strict=False), (widths[-1], widths[-1])]
    expected += [(2 * width, max(width // 2, 4)) for width in reversed(widths)]
    convolutions = [
        conv for conv, _ in run_order(UNet(4, depth), nn.Conv2d, torch.zeros(2, 3, 32, 32))
    ]
    found = [
        (a.in_channels, b.out_channels)
        for a, b in zip(convolutions[:-1:2], convolutions[1::2], strict=False)
    ]
    assert found == expected, f"expected blocks with the channels {expected}, found {found}"


def test_options_leave_out_norms_and_skips():
    found = [
        sum(isinstance(m, nn.BatchNorm2d) for m in UNet(2, 3, norms=norms).modules())
        for norms in (1, 2)
    ]
    assert found == [7, 14], (
        f"expected 7 BatchNorms with norms=1 and 14 with norms=2, found {found}"
    )
    torch.manual_seed(0)
    for conv, given in run_order(UNet(3, 2, skips=False), nn.Conv2d, torch.randn(2, 3, 16, 16))[
        6:-1:2
    ]:
        skip = given[:, conv.in_channels // 2 :]
        assert skip.abs().max() == 0, (
            "expected zeros in the place of the skips with skips=False, found others"
        )


# ------------------------------------------------------------------- between the blocks


def halves(joined: Tensor) -> tuple[Tensor, Tensor]:
    """Return both halves of the channels, first the one that is alike in every 2 x 2 pixels."""
    return tuple(
        sorted(
            joined.chunk(2, dim=1),
            key=lambda x: (x[..., ::2, ::2] - x[..., 1::2, 1::2]).abs().sum(),
        )
    )


def test_pooling_keeps_the_largest_of_four(levels):
    for below, joined in levels:
        four = halves(joined)[1].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        assert four.amax((3, 5)).shape == below.shape, "expected half the side below, found another"
        assert torch.allclose(four.amax((3, 5)), below), (
            "expected the largest of each 2 x 2 pixels, found other values"
        )


def test_upsampling_repeats_every_pixel(levels):
    for _, joined in levels:
        upsampled, _ = halves(joined)
        for dy, dx in ((0, 1), (1, 0), (1, 1)):
            same = torch.equal(upsampled[..., ::2, ::2], upsampled[..., dy::2, dx::2])
            assert same, "expected the nearest neighbour, each pixel four times, found other values"


def test_concatenation_puts_the_upsampled_first(levels):
    for _, joined in levels:
        first = joined.chunk(2, dim=1)[0]
        assert torch.equal(first, halves(joined)[0]), (
            "expected (upsampled, skip) on the channels, found another order"
        )


def test_skip_is_what_the_same_level_kept(levels):
    for below, joined in levels:
        pooled = [F.max_pool2d(half, 2) for half in joined.chunk(2, dim=1)]
        found = any(torch.allclose(half, below) for half in pooled if half.shape == below.shape)
        assert found, "expected the tensor that was pooled on the same level, found another"


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = UNet(3, 3)
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    # BatchNorm subtracts the mean, so the bias of a convolution before it has no influence.
    idle = {
        id(m.bias) for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    }
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and (
            id(parameter) in idle or parameter.grad.abs().max() > 1e-6
        )
        assert reached, f"expected a gradient for every parameter, found none for {name}"


@pytest.mark.parametrize(
    ("side", "depth", "sides"), [(33, 5, ("32", "64")), (34, 2, ("32", "36")), (3, 2, ("4",))]
)
def test_side_that_cannot_be_halved_is_refused(side, depth, sides):
    with pytest.raises(InputError) as caught:
        UNet(1, depth).eval()(torch.zeros(1, 3, side, side))
    for wanted in sides:
        assert wanted in str(caught.value), (
            f"expected the sides that work, {' and '.join(sides)}, found {caught.value}"
        )
