"""The shapes section: what the formulas predict, against the trace, PyTorch's counters and the gradients."""

import re
from itertools import takewhile

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from petseg_utils import UNet, analyse_shapes, conv_plus_conv, html_table, trace_shapes

SIZES = [
    (1, 1, 2),
    (3, 1, 10),
    (2, 2, 12),
    (5, 3, 8),
    (4, 3, 40),
    (1, 4, 64),
    (2, 5, 96),
    (1, 6, 64),
]


@pytest.mark.parametrize(("base_channels", "depth", "side"), SIZES)
def test_prediction_agrees_with_the_trace(base_channels, depth, side):
    model = UNet(base_channels, depth)
    steps = analyse_shapes(model, side)
    assert [step.name for step in steps] == list(trace_shapes(model, side))
    assert [step.predicted for step in steps] == [step.traced for step in steps]
    assert all(step.agrees for step in steps)


@pytest.mark.parametrize(("base_channels", "depth", "side"), SIZES)
def test_formulas_give_the_predicted_shapes(base_channels, depth, side):
    for step in analyse_shapes(UNet(base_channels, depth), side):
        height, width, channels = step.formula.split(" × ")
        channels = eval(channels.replace("b", "*b").removeprefix("*"), {"b": base_channels})
        assert height == width
        assert (channels, eval(width, {"N": side})) == step.predicted


def test_default_model_has_the_shapes_of_the_course():
    with torch.device("meta"):
        steps = {step.name: step for step in analyse_shapes(UNet(), 256)}
    assert steps["down5"].traced == (512, 16)
    assert steps["bottleneck"].traced == (512, 8)
    assert steps["concat5"].traced == (1024, 16)
    assert steps["up5"].traced == (256, 16)
    assert steps["upsample1"].traced == (
        32,
        256,
    )  # the course's table says that it halves the channels
    assert steps["out"].traced == (3, 256)
    assert [steps[name].formula for name in ("down1", "down3", "pool5")] == [
        "N × N × b",
        "N/4 × N/4 × 4b",
        "N/32 × N/32 × 16b",
    ]
    assert sum(step.flops for step in steps.values()) == pytest.approx(18.85e9, abs=0.005e9)


def part_of(model: UNet, step: str) -> nn.Module | None:
    """Return the module that a step's parameters are in, by the step's name."""
    kind, level = re.fullmatch(r"([a-z]+)(\d*)", step).groups()
    if kind in ("down", "up"):
        return model.downs[int(level) - 1] if kind == "down" else model.ups[-int(level)]
    return getattr(model, kind, None)


@pytest.mark.parametrize(("base_channels", "depth", "side"), SIZES)
def test_parameters_of_every_step_and_in_all_are_the_models(base_channels, depth, side):
    model = UNet(base_channels, depth)
    steps = analyse_shapes(model, side)
    for step in steps:
        part = part_of(model, step.name)
        assert step.parameters == (sum(p.numel() for p in part.parameters()) if part else 0), (
            step.name
        )
    assert sum(step.parameters for step in steps) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("switches", "fewer"), [({"norms": 1}, 2 * (3 + 6 + 6 + 3 + 3)), ({"skips": False}, 0)]
)
def test_switched_off_parts_are_predicted_too(switches, fewer):
    model = UNet(3, 2, **switches)
    steps = analyse_shapes(model, 20)
    assert all(step.agrees for step in steps)
    for step in steps:
        part = part_of(model, step.name)
        assert step.parameters == (sum(p.numel() for p in part.parameters()) if part else 0), (
            step.name
        )
    of_the_whole = sum(step.parameters for step in analyse_shapes(UNet(3, 2), 20))
    assert (
        of_the_whole - sum(step.parameters for step in steps) == fewer
    )  # a scale and a shift by channel and block


@pytest.mark.parametrize(("base_channels", "depth", "side"), SIZES)
def test_flops_are_those_of_pytorchs_own_counter(base_channels, depth, side):
    model = UNet(base_channels, depth).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    assert sum(step.flops for step in analyse_shapes(model, side)) == counter.get_total_flops()


def test_flops_of_a_step_are_two_per_weight_and_position():
    steps = {step.name: step for step in analyse_shapes(UNet(4, 2), 8)}
    assert steps["down1"].flops == 2 * 8 * 8 * 9 * (3 * 4 + 4 * 4)
    assert steps["bottleneck"].flops == 2 * 2 * 2 * 9 * (8 * 8 + 8 * 8)
    assert steps["out"].flops == 2 * 8 * 8 * (4 * 3)
    assert steps["pool1"].flops == steps["upsample1"].flops == steps["concat1"].flops == 0


def test_output_in_kib_is_that_of_the_output_in_float32():
    model = UNet(3, 2).eval()
    rows = {step.name: step.row for step in analyse_shapes(model, 32)}
    assert rows["out"]["output KiB"] == f"{model(torch.zeros(1, 3, 32, 32)).nbytes / 1024:.0f}"
    assert rows["concat2"]["output KiB"] == f"{torch.empty(12, 16, 16).nbytes / 1024:.0f}"


# ------------------------------------------------------------------- receptive field


def forward_step_by_step(model: UNet, x: Tensor) -> dict[str, Tensor]:
    """Return what every step of the forward pass puts out, in order."""
    outputs = {}
    for level, down in enumerate(model.downs, start=1):
        x = outputs[f"down{level}"] = down(x)
        x = outputs[f"pool{level}"] = model.pools[level - 1](x)
    x = outputs["bottleneck"] = model.bottleneck(x)
    for level, up in zip(range(model.depth, 0, -1), model.ups, strict=True):
        x = outputs[f"upsample{level}"] = model.upsamples[-level](x)
        x = outputs[f"concat{level}"] = torch.cat((x, outputs[f"down{level}"]), dim=1)
        x = outputs[f"up{level}"] = up(x)
    outputs["out"] = model.out(x)
    return outputs


def smooth(model: UNet) -> UNet:
    """Make every output depend on all the input it can see: positive weights, no biases, means for maxima."""
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    model.pools = nn.ModuleList(nn.AvgPool2d(2) for _ in model.pools)
    return model.double().eval()


@pytest.mark.parametrize(("depth", "side"), [(1, 32), (2, 96), (3, 192)])
def test_receptive_field_is_what_the_gradient_reaches_at_most(depth, side):
    model = smooth(UNet(1, depth))
    image = torch.ones(1, 3, side, side, dtype=torch.double, requires_grad=True)
    outputs = forward_step_by_step(model, image)
    assert torch.equal(outputs["out"], model(image))
    reached = {}
    for name, output in outputs.items():
        middle = output.shape[-1] // 2
        widths = []
        for place in range(
            middle, middle + 2**depth
        ):  # positions differ in how they lie to the coarser pixels
            pixel = output[0, :, place, place].sum()
            (gradient,) = torch.autograd.grad(pixel, image, retain_graph=True)
            touched = gradient[0].sum(0).any(0).nonzero()
            assert (
                0 < touched.min() <= touched.max() < side - 1
            )  # the image's edge cuts nothing off
            widths.append(int(touched.max() - touched.min()) + 1)
        reached[name] = max(widths)
    assert {step.name: step.receptive_field for step in analyse_shapes(model, side)} == reached


# ------------------------------------------------------------------- broken models


def disagreeing(model: UNet, side: int) -> tuple[list[str], list[str]]:
    """Return the names of the steps before the first that does not agree, and of all that don't agree."""
    steps = analyse_shapes(model, side)
    before = [step.name for step in takewhile(lambda step: step.agrees, steps)]
    return before, [step.name for step in steps if not step.agrees]


def test_wrong_channel_count_shows_where_it_is_made_and_stops_the_pass():
    model = UNet(4, 2)
    model.downs[1] = conv_plus_conv(4, 7)  # 8 would be right, and is what the bottleneck takes
    steps = {step.name: step for step in analyse_shapes(model, 16)}
    assert disagreeing(model, 16)[0] == ["down1", "pool1"]
    assert disagreeing(model, 16)[1] == list(steps)[2:]
    assert (steps["down2"].predicted, steps["down2"].traced) == ((8, 8), (7, 8))
    assert steps["pool2"].traced == (7, 4)
    assert all(steps[name].traced is None for name in list(steps)[4:])


def test_wrong_channel_count_on_the_way_up_leaves_the_way_down_in_agreement():
    model = UNet(4, 2)
    model.ups[0] = conv_plus_conv(16, 5)  # up2 must give 4
    before, wrong = disagreeing(model, 16)
    assert before == ["down1", "pool1", "down2", "pool2", "bottleneck", "upsample2", "concat2"]
    assert wrong == ["up2", "upsample1", "concat1", "up1", "out"]


def test_wrong_number_of_classes_shows_in_the_last_row_only():
    model = UNet(4, 2)
    model.out = nn.Conv2d(4, 5, kernel_size=1)
    assert disagreeing(model, 16)[1] == ["out"]


@pytest.mark.parametrize(
    ("side", "first_wrong"), [(18, "pool2"), (17, "pool1"), (4, "pool3"), (1, "pool1")]
)
def test_odd_size_shows_at_the_pooling_that_cannot_halve_it(side, first_wrong):
    model = UNet(2, 3)
    names = [step.name for step in analyse_shapes(model, side)]
    before, wrong = disagreeing(model, side)
    assert wrong[0] == first_wrong
    assert before + wrong == names


# ------------------------------------------------------------------- the table


def cells_of(table: str) -> list[list[str]]:
    """Return the text of a table's cells, row by row, without the header."""
    text = table.replace("&nbsp;", " ")
    return [
        re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.S)[1:]
    ]


def test_table_has_a_ticked_row_for_every_step():
    steps = analyse_shapes(UNet(4, 2), 16)
    table = html_table([step.row for step in steps])
    rows = cells_of(table)
    assert len(re.findall("<th>", table)) == len(rows[0])
    assert [row[0] for row in rows] == [step.name for step in steps]
    assert [row[4] for row in rows] == ["✓"] * len(steps)
    by_name = {row[0]: row for row in rows}
    assert by_name["pool2"][1:4] == ["N/4 × N/4 × 2b", "4 × 4 × 8", "4 × 4 × 8"]
    assert by_name["down1"][5] == f"{9 * (3 * 4 + 4 * 4) + 6 * 4}"
    assert by_name["out"][7] == "3"  # KiB: 3 channels of 16 x 16 pixels of 4 bytes


def test_table_of_a_broken_model_has_crosses_in_the_right_rows():
    model = UNet(4, 2)
    model.ups[0] = conv_plus_conv(16, 5)
    steps = analyse_shapes(model, 16)
    rows = cells_of(html_table([step.row for step in steps]))
    assert [row[4] for row in rows] == ["✓" if step.agrees else "✗" for step in steps]
    assert [row[4] for row in rows] == ["✓"] * 7 + ["✗"] * 5
    assert rows[-1][3] == "not reached"


def test_table_of_an_odd_size_shows_the_half_pixel():
    rows = cells_of(html_table([step.row for step in analyse_shapes(UNet(4, 1), 9)]))
    assert rows[1][2:5] == ["4.5 × 4.5 × 4", "4 × 4 × 4", "✗"]


def test_table_escapes_what_html_would_read():
    assert cells_of(html_table([{"<b>": "a < b & c"}])) == [["a &lt; b &amp; c"]]
    assert "<th>&lt;b&gt;</th>" in html_table([{"<b>": 1}])


def test_tracing_leaves_the_model_untouched():
    torch.manual_seed(0)
    model = UNet(2, 2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    analyse_shapes(model, 16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_trace_follows_a_forward_pass_that_counts_its_levels():
    class Recursive(UNet):
        def forward(self, x, level=0):
            if level == self.depth:
                return self.bottleneck(x)
            kept = self.downs[level](x)
            below = self.upsamples[-1 - level](self.forward(self.pools[level](kept), level + 1))
            x = self.ups[-1 - level](torch.cat((below, kept), dim=1))
            return x if level else self.out(x)

    assert all(step.agrees for step in analyse_shapes(Recursive(base_channels=4, depth=3), side=16))
