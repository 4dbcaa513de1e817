"""The shapes section: predictions against the trace, PyTorch's counts, gradients; the doctor."""

import re
from copy import deepcopy
from itertools import takewhile

import pytest
import torch
from course_unet import UNet as CourseUNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import same_weights
from petseg_utils import UNet, analyse_shapes, conv_plus_conv, diagnose, html_table, trace_shapes

SIZES = [(1, 1, 2), (3, 1, 10), (2, 2, 12), (5, 3, 8), (4, 3, 40), (2, 5, 96), (1, 6, 64)]


@pytest.mark.parametrize("style", [UNet, CourseUNet])
@pytest.mark.parametrize(("base_channels", "depth", "side"), SIZES)
def test_prediction_agrees_with_the_trace_and_pytorchs_counts(style, base_channels, depth, side):
    model = style(base_channels, depth).eval()
    steps = analyse_shapes(model, side)
    assert diagnose(model, side) == ""
    for step in steps:
        assert step.agrees
        assert step.predicted == step.traced
        height, width, channels = step.formula.split(" × ")
        channels = eval(channels.replace("b", "*b").removeprefix("*"), {"b": base_channels})
        assert height == width
        assert (channels, eval(width, {"N": side})) == step.traced
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    flops = [sum(one.flops for one in found) for found in (steps, trace_shapes(model, side)[0])]
    assert flops == [counter.get_total_flops()] * 2
    assert sum(step.parameters for step in steps) == sum(p.numel() for p in model.parameters())


def test_default_model_has_the_shapes_of_the_course():
    with torch.device("meta"):
        steps = {step.name: step for step in analyse_shapes(UNet(), 256)}
    for name, formula, traced in (
        ("down5", "N/16 × N/16 × 16b", (512, 16)), ("bottleneck", "N/32 × N/32 × 16b", (512, 8)),
        ("concat5", "N/16 × N/16 × 32b", (1024, 16)), ("up5", "N/16 × N/16 × 8b", (256, 16)),
        ("upsample1", "N × N × b", (32, 256)),  # the course's table says that it halves them
        ("out", "N × N × 3", (3, 256)),
    ):  # fmt: skip
        assert (steps[name].formula, steps[name].traced) == (formula, traced)
    assert sum(step.flops for step in steps.values()) == pytest.approx(18.85e9, abs=0.005e9)


@pytest.mark.parametrize("switches", [{}, {"norms": 1}, {"skips": False}])
def test_parameters_of_every_step_are_the_models(switches):
    model = UNet(3, 2, **switches)
    assert analyse_shapes(CourseUNet(3, 2, **switches), 20) == analyse_shapes(model, 20)
    parts = {f"down{i}": down for i, down in enumerate(model.downs, 1)}
    parts |= {f"up{i}": up for i, up in enumerate(model.ups[::-1], 1)}
    parts |= {"bottleneck": model.bottleneck, "out": model.out}
    for step in analyse_shapes(model, 20):
        own = parts[step.name].parameters() if step.name in parts else []
        assert step.agrees
        assert step.parameters == sum(parameter.numel() for parameter in own), step.name


# ------------------------------------------------------------------- receptive field


@pytest.mark.parametrize(("depth", "side"), [(1, 32), (2, 96), (3, 192)])
def test_receptive_field_is_what_the_gradient_reaches_at_most(depth, side):
    """In a net that shows all its steps can see: positive weights, means for maxima."""
    model, outputs = CourseUNet(1, depth).double().eval(), []
    model.downsample = nn.AvgPool2d(2)
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    for name, part in model.named_children():
        part.register_forward_hook(lambda _module, _given, output: outputs.append(output))
        if re.fullmatch(r"up\d", name):
            part.register_forward_pre_hook(lambda _module, given: outputs.append(given[0]))
    image = torch.ones(1, 3, side, side, dtype=torch.double, requires_grad=True)
    model(image)
    steps, reached = analyse_shapes(UNet(1, depth), side), []
    for output in outputs:
        middle = output.shape[-1] // 2
        widths = []
        for place in range(middle, middle + 2**depth):  # they differ in how they lie to coarse ones
            pixel = output[0, :, place, place].sum()
            (gradient,) = torch.autograd.grad(pixel, image, retain_graph=True)
            touched = gradient[0].sum(0).any(0).nonzero()
            assert 0 < touched.min() <= touched.max() < side - 1  # the edge cuts nothing off
            widths.append(int(touched.max() - touched.min()) + 1)
        reached.append(max(widths))
    assert reached == [step.receptive_field for step in steps]


# ------------------------------------------------------------------- the doctor


def pool(x: Tensor, _level: int) -> Tensor:
    return F.max_pool2d(x, 2)


def upsample(x: Tensor, _level: int) -> Tensor:
    return F.interpolate(x, scale_factor=2)


def join(x: Tensor, kept: dict[int, Tensor], level: int) -> Tensor:
    return torch.cat((x, kept[level]), dim=1)


class Flawed(UNet):
    """A U-Net (b = 4, depth 3) with other parts: modules by their names, functions on level 2."""

    def __init__(self, **parts: object) -> None:
        super().__init__(base_channels=4, depth=3)
        self.do = {name: parts.pop(name, None) for name in ("pool", "upsample", "join")}
        for name, part in parts.items():
            self.set_submodule(name.replace("_", "."), part)

    def at(self, level: int, right: object) -> object:
        return self.do[right.__name__] if level == 2 and self.do[right.__name__] else right

    def forward(self, x: Tensor) -> Tensor:
        kept = {}
        for level, down in enumerate(self.downs, start=1):
            x = kept[level] = down(x)
            x = self.at(level, pool)(x, level)
        x = self.bottleneck(x)
        for level, up in zip((3, 2, 1), self.ups, strict=True):
            x = self.at(level, upsample)(x, level)
            x = up(self.at(level, join)(x, kept, level))
        return self.out(x)


def conv(*channels: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(*channels, **{"kernel_size": 3, "padding": 1} | options)


block, no_skip = conv_plus_conv, lambda x, kept, k: x
FAULTS = [  # what is replaced, and the sentence or how it begins
    ({"ups_1": block(8, 4)}, "convolution 1 of up2 takes 8 channels, but what it is given has 16: "
     "the concatenation doubles them."),
    ({"ups_0": block(8, 4)}, "convolution 1 of up3 takes 8 channels, but what it is given has 32: "
     "it may be of another level."),
    ({"downs_0_0": conv(1, 4)}, "convolution 1 of down1 takes 1 channels, but what it is given"),
    ({"join": no_skip}, "no concatenation on level 2: the skip is missing."),
    ({"join": no_skip, "ups_1": block(8, 4)}, "no concatenation on level 2: the skip is missing."),
    ({"join": lambda x, kept, k: x + kept[k]}, "no concatenation on level 2"),
    ({"join": lambda x, kept, k: join(x, kept, 3)},
     "concat2 is given the sides 16 and 8: the skip is from after the pooling."),
    ({"join": lambda x, kept, k: join(x, kept, 1)},
     "concat2 is given the sides 16 and 32: the skip is another level's."),
    ({"join": lambda x, kept, k: torch.cat((x, kept[k], kept[k]), 1)},
     "concat2 gives 24 channels, planned are 16: the skip has as many as what was upsampled."),
    ({"join": lambda x, kept, k: torch.cat((x, kept[k]), -2)},
     "concat2 joins on dim 2: the channels are dim 1."),
    ({"pool": lambda x, k: x}, "no pooling on level 2: the side isn't halved after"),
    ({"pool": lambda x, k: pool(pool(x, k), k)}, "one pooling too many after pool2."),
    ({"pool": lambda x, k: F.max_pool2d(x, 4)}, "pool2 gives the side 4, planned is 8: a factor"),
    ({"pool": lambda x, k: conv(8, 8, stride=2)(x)},
     "pool2 is a convolution from 8 to 8 channels: planned is pooling, without weights."),
    ({"upsample": lambda x, k: x}, "no upsampling on level 2: the side isn't doubled."),
    ({"upsample": lambda x, k: upsample(upsample(x, k), k)},
     "one upsampling too many after upsample2."),
    ({"upsample": lambda x, k: nn.ConvTranspose2d(8, 4, 2, stride=2)(x)},
     "upsample2 is a transposed convolution from 8 to 4 channels: planned is upsampling"),
    ({"downs_1_0": conv(4, 8, padding=0)},
     "convolution 1 of down2 makes the side 14 of 16: with padding=1 it stays."),
    ({"downs_1_0": conv(4, 8, kernel_size=5, padding=2)},
     "convolution 1 of down2 is 5 x 5, planned is 3 x 3."),
    ({"downs_1_3": conv(8, 8, stride=2)}, "convolution 2 of down2 has a stride of 2: only pooling"),
    ({"downs_1": conv(4, 8)}, "down2 has too few convolutions: planned are two."),
    ({"ups_1": conv(16, 4)}, "up2 has too few convolutions: planned are two."),
    ({"downs_1_5": conv(8, 8)}, "one convolution too many after convolution 2 of down2."),
    ({"downs_1": block(4, 7)}, "convolution 1 of down2 gives 7 channels, planned are 8: each level "
     "down doubles them, from b."),
    ({"bottleneck": block(16, 32)}, "convolution 1 of bottleneck gives 32 channels, planned are"),
    ({"ups_0": block(32, 16)}, "convolution 1 of up3 gives 16 channels, planned are 8: each level "
     "up halves them, down to b."),
    ({"out": nn.Conv2d(4, 5, 1)}, "out gives 5 channels, planned are 3: one for each class."),
    ({"out": conv(4, 3)}, "out is 3 x 3, planned is 1 x 1."),
    ({"out": nn.Identity()}, "no 1 x 1 convolution at the end, after convolution 2 of up1."),
    ({"out": nn.Sequential(nn.Conv2d(4, 3, 1), conv(3, 3))}, "one convolution too many after out."),
    ({"downs_1_1": nn.BatchNorm2d(7)}, "the pass stops after convolution 1 of down2, and the shape "
     "doctor doesn't know why (running_mean should contain 8 elements not 7)."),
    ({"out": nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(4))},
     "the pass stops after out, and the shape doctor doesn't know why"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "sentence"), FAULTS)
def test_doctor_says_where_a_net_first_parts_from_the_plan_and_why(parts, sentence):
    told = diagnose(Flawed(**parts), 32)
    assert told.startswith(sentence)
    assert told.endswith(".")


@pytest.mark.parametrize("style", [UNet, CourseUNet])
@pytest.mark.parametrize(("side", "given", "sentence"), [
    (32, {"depth": 2}, "the net has 3 levels, planned are 2: too many."),
    (32, {"depth": 4}, "the net has 3 levels, planned are 4: too few."),
    (32, {"base_channels": 8}, "convolution 1 of down1 gives 4 channels, planned are 8"),
    (32, {"num_classes": 2}, "out gives 3 channels, planned are 2: one for each class."),
    (100, {}, "the sides part at level 3: 100 can be halved twice only."),
    (7, {}, "the sides part at level 1: 7 can be halved not even once."),
])  # fmt: skip
def test_doctor_knows_sizes_and_sides(style, side, given, sentence):
    assert diagnose(style(4, 3), side, **given).startswith(sentence)


def test_net_that_is_no_such_u_net_gets_its_trace_without_a_prediction():
    halving = conv(3, 8, stride=2), nn.MaxPool2d(2), conv(8, 16, stride=2), nn.AvgPool2d(2)
    net = nn.Sequential(*halving, nn.Flatten(), nn.Linear(256, 5))
    rows = [step.row for step in analyse_shapes(net, 64)]
    assert [row["step"].split()[0] for row in rows] == ["convolution", "pooling"] * 2
    assert [row["traced"] for row in rows][:3] == ["32 × 32 × 8", "16 × 16 × 8", "8 × 8 × 16"]
    assert {row["predicted"] + row["agree"] for row in rows} == {""}
    assert sum(step.parameters for step in analyse_shapes(net, 64)) == 3 * 8 * 9 + 8 + 8 * 144 + 16
    assert "too unlike the plan" in diagnose(net, 64)


# ------------------------------------------------------------------- the table


@pytest.mark.parametrize(("parts", "ticked", "wrong"), [
    ({"ups_1": block(8, 4)}, 12, {"up2": "not reached", "out": "not reached"}),
    ({"downs_1": block(4, 7)}, 2, {"down2": "16 × 16 × 7", "pool2": "8 × 8 × 7"}),
    ({"downs_1_0": conv(4, 7)}, 2, {"down2": "16 × 16 × 7", "pool2": "not reached"}),
    ({"out": nn.Conv2d(4, 5, 1)}, 16, {"out": "32 × 32 × 5"}),
])  # fmt: skip
def test_table_has_its_first_cross_where_the_net_parts_from_the_plan(parts, ticked, wrong):
    rows = [step.row for step in analyse_shapes(Flawed(**parts), 32)]
    assert len(list(takewhile(lambda row: row["agree"] == "✓", rows))) == ticked
    assert {row["step"]: row["traced"] for row in rows}.items() >= wrong.items()


def test_side_that_cannot_be_halved_shows_half_pixels():
    rows = {step.name: step.row for step in analyse_shapes(UNet(4, 1), 9)}
    assert rows["pool1"]["predicted"] == "4.5 × 4.5 × 4"
    assert {row["agree"] for row in rows.values()} == {"✗"}


def test_table_has_a_row_for_every_step_and_escapes_what_html_would_read():
    steps = analyse_shapes(UNet(4, 2), 16)
    table = html_table([step.row for step in steps]).replace("&nbsp;", " ")
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    assert [row[0] for row in rows] == [step.name for step in steps]
    assert rows[3][:5] == ["pool2", "N/4 × N/4 × 2b", "4 × 4 × 8", "4 × 4 × 8", "✓"]
    assert rows[-1][7] == "3"  # KiB: 3 channels of 16 x 16 pixels of 4 bytes
    escaped = html_table([{"<b>": "a < b & c"}])
    assert "<th>&lt;b&gt;</th>" in escaped
    assert "a &lt; b &amp; c" in escaped.replace("&nbsp;", " ")


def test_tracing_leaves_the_model_untouched():
    model = UNet(2, 2).train()
    before = deepcopy(model)
    analyse_shapes(model, 16)
    assert same_weights(model, before)
    assert all(module.training for module in model.modules())
