"""Criteria of the rubric: the block and the U-Net, seen from outside.

Nothing here knows a name inside the hand-in's net. What its convolutions are given, in the order in
which they run, shows all that is between them: pooling, upsampling and skips.
"""

import pytest
import torch
from doctor import told_by_the_doctor
from drawn import draw, expect
from torch import Tensor, nn
from torch.nn import functional as F

from petseg_utils import InputError, UNet, conv_plus_conv

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def run_order(model: nn.Module, kind: type, images: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Run the model; return its modules of a kind, as they ran, with copies of what they got."""
    calls = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        calls.append((module, inputs[0].detach().clone()))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, kind)]
    with torch.no_grad():
        model(images.clone())
    for hook in hooks:
        hook.remove()
    return calls


# ------------------------------------------------------------------- what a net computes


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 5, 7), (3, 4, 1, 1)])
def test_block_changes_only_the_channels(shape):
    expected = (shape[0], 6, *shape[2:])
    found = tuple(conv_plus_conv(4, 6).eval()(torch.zeros(shape)).shape)
    expect(found == expected, f"the shape {expected} for an input {shape}", found)


class ByHand:
    """A net computed by functions from its convolutions and BatchNorms, in order of use."""

    def __init__(self, model: nn.Module, images: Tensor, training: bool) -> None:
        torch.manual_seed(draw("norms").randrange(2**31))
        self.model, self.images = model.train(training), images
        calls = run_order(model, (nn.Conv2d, nn.BatchNorm2d), images)
        self.layers = [layer for layer, _ in calls]
        self.norms = [layer for layer in self.layers if isinstance(layer, nn.BatchNorm2d)]
        self.statistics = []
        for norm in self.norms:  # unlike new ones
            kept = norm.running_mean is not None
            expect(kept, "BatchNorm to keep statistics", "none")
            for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                values.copy_(0.5 + torch.rand_like(values))

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
        expect(self.layers, "two convolutions in every block", "too few")
        layer = self.layers.pop(0)
        expect(isinstance(layer, nn.Conv2d), "a convolution", layer)
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
    right = by_hand.agrees(by_hand.block(images))
    expect(right, "(convolution, BatchNorm, LeakyReLU of slope 0.2) twice", "other values")


def check_net(depth: int, training: bool, norms: int = 2, skips: bool = True) -> None:
    """Check a net of a width and at a size that are drawn, layer by layer."""
    random = draw(f"net {norms} {skips}")
    height, width = random.sample([side * 2**depth for side in (2, 3, 4)], 2)
    images = torch.randn(2, 3, height, width)
    model = UNet(random.randint(2, 5), depth, norms=norms, skips=skips)
    by_hand = ByHand(model, images, training)
    count = norms * (2 * depth + 1)
    found = len(by_hand.norms)
    expect(found == count, f"{count} BatchNorms with norms={norms}", found)
    what = f"the logits of its layers at depth {depth}, computed one after the other"
    if not skips:
        what += ", with zeros in the place of the skips with skips=False"
    expect(by_hand.agrees(by_hand.net(images, depth, skips)), what)


@MODES
def test_net_computes_what_its_layers_say(training):
    check_net(draw("depth").randint(1, 3), training)


@MODES
@pytest.mark.parametrize("option", [{"norms": 1}, {"skips": False}], ids=str)
def test_options_leave_out_norms_and_skips(option, training):
    check_net(3, training, **option)


# ------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("base_channels", "depth", "side", "classes"),
    [(1, 1, 2, 3), (2, 2, 20, 3), (5, 3, 24, 3), (2, 5, 32, 3), (2, 1, 4, 21)],
)
@told_by_the_doctor(UNet)
def test_logits_have_the_side_of_the_images(base_channels, depth, side, classes):
    found = tuple(UNet(base_channels, depth, classes).eval()(torch.zeros(2, 3, side, side)).shape)
    expected = (2, classes, side, side)
    expect(found == expected, f"logits {expected} for {classes} classes", found)


@told_by_the_doctor(UNet)
def test_default_net_has_the_parameters_of_the_course():
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in UNet().parameters())
    expect(found == 13_385_475, "13,385,475 parameters", f"{found:,}")


@pytest.mark.parametrize("depth", [1, 2, 4])
@told_by_the_doctor(UNet)
def test_channels_double_on_the_way_down_and_halve_on_the_way_up(depth):
    widths = [4 * 2**level for level in range(depth)]
    expected = [*zip([3, *widths], [*widths, widths[-1]], strict=True)]
    expected += [(2 * width, max(width // 2, 4)) for width in reversed(widths)]
    calls = run_order(UNet(4, depth), nn.Conv2d, torch.zeros(2, 3, 32, 32))
    convolutions = [convolution for convolution, _ in calls]
    pairs = zip(convolutions[:-1:2], convolutions[1::2], strict=False)
    found = [(first.in_channels, second.out_channels) for first, second in pairs]
    expect(found == expected, f"blocks with the channels {expected}", found)


# ------------------------------------------------------------------- between the blocks


@pytest.fixture(params=[1, 3], ids="depth {}".format)
def levels(request) -> list[tuple[Tensor, Tensor]]:
    """Return, for every level from the top, what the level below gets and what the way up gets."""
    torch.manual_seed(0)
    depth = request.param
    given = [x for _, x in run_order(UNet(3, depth), nn.Conv2d, torch.randn(2, 3, 16, 16))]
    expected = 4 * depth + 3
    expect(len(given) == expected, f"{expected} convolutions at depth {depth}", len(given))
    down, up = given[: 2 * depth + 2 : 2], given[2 * depth + 2 : -1 : 2]
    return list(zip(down[1:], reversed(up), strict=True))


def halves(joined: Tensor) -> list[Tensor]:
    """Return both halves of the channels, first the one that is alike in every 2 x 2 pixels."""

    def unlike(half: Tensor) -> Tensor:
        return (half[..., ::2, ::2] - half[..., 1::2, 1::2]).abs().sum()

    return sorted(joined.chunk(2, dim=1), key=unlike)


def test_pooling_keeps_the_largest_of_four(levels):
    for below, joined in levels:
        four = halves(joined)[1].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
        expect(four.shape == below.shape, "half the side below", "another")
        right = torch.allclose(four, below)
        expect(right, "the largest of each 2 x 2 pixels", "other values")


def test_upsampling_repeats_every_pixel(levels):
    for _, joined in levels:
        upsampled, _ = halves(joined)
        repeated = F.interpolate(upsampled[..., ::2, ::2], scale_factor=2)
        right = torch.equal(upsampled, repeated)
        expect(right, "the nearest neighbour, each pixel four times", "other values")


def test_concatenation_puts_the_upsampled_first(levels):
    for _, joined in levels:
        right = torch.equal(joined.chunk(2, dim=1)[0], halves(joined)[0])
        expect(right, "(upsampled, skip) on the channels", "another order")


def test_skip_is_what_the_same_level_kept(levels):
    for below, joined in levels:
        pooled = [F.max_pool2d(half, 2) for half in joined.chunk(2, dim=1)]
        right = any(torch.allclose(half, below) for half in pooled if half.shape == below.shape)
        expect(right, "the tensor that was pooled on the same level", "another")


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = UNet(3, 3)
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    # BatchNorm subtracts the mean, so the bias of a convolution before it has no influence.
    blocks = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    idle = {id(convolution.bias) for convolution in blocks}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        reached = gradient is not None and (id(parameter) in idle or gradient.abs().max() > 1e-6)
        expect(reached, "a gradient for every parameter", f"none for {name}")


@pytest.mark.parametrize(
    ("side", "depth", "sides"), [(33, 5, ("32", "64")), (34, 2, ("32", "36")), (3, 2, ("4",))]
)
def test_side_that_cannot_be_halved_is_refused(side, depth, sides):
    with pytest.raises(InputError) as caught:
        UNet(1, depth).eval()(torch.zeros(1, 3, side, side))
    told = all(wanted in str(caught.value) for wanted in sides)
    expect(told, f"the sides that work, {' and '.join(sides)}", caught.value)
