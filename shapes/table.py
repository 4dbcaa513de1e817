"""Put a net's plan, which is given, and what its forward pass did side by side in a table."""

from difflib import SequenceMatcher
from itertools import groupby, takewhile
from typing import NamedTuple

from torch import nn

from shapes.trace import Operation, Trace

Shape = tuple[int, float]  # (channels, side)


class Planned(NamedTuple):
    """An operation that a plan expects."""

    step: str  # that it is part of, like "down1": a key of STEPS and perhaps a number
    level: int  # 0 at the top; at level k the side is N / 2**k
    kind: str  # as in `Operation`
    kernel: int  # 0 for an operation without weights
    gives: Shape


class Step(NamedTuple):
    """One step of a net's forward pass for one image."""

    name: str
    level: int
    formula: str  # in N, the image side, and b, the base channels
    predicted: Shape | None  # None: the net is no U-Net of this plan
    traced: Shape | None  # None: the forward pass did not get here, or went another way
    parameters: int
    flops: int  # of the convolutions, 2 per multiply-add; all else is under 1 %
    receptive_field: int | None  # side in input pixels of what one output pixel can depend on

    @property
    def agrees(self) -> bool:
        """Whether the forward pass gave what the formula predicts."""
        return self.traced == self.predicted

    @property
    def row(self) -> dict[str, object]:
        """The step as a row for `html_table`; the output's KiB are those of float32."""
        told = [f"{s[1]:g} × {s[1]:g} × {s[0]}" if s else "" for s in self[3:5]]
        channels, side = self.predicted or self.traced or (0, 0)
        return {
            "step": self.name,
            "formula": self.formula,
            "predicted": told[0],
            "traced": told[1] or "not reached",
            "agree": "" if not self.predicted else "✓" if self.agrees else "✗",
            "parameters": f"{self.parameters:,}",
            "MFLOP": f"{self.flops / 1e6:,.1f}",
            "output KiB": f"{4 * channels * side**2 / 1024:,.0f}",
            "receptive field": self.receptive_field or "",
        }


def compare(plan: list[Planned], traced: Trace, model: nn.Module) -> list[Step]:
    """Return the plan's steps beside what was traced, or a net's own if it is too unlike it."""
    outputs = line_up(plan, traced)
    if outputs is None:
        return [
            Step(f"{one.kind} {i}", 0, "", None, one.gives, one.parameters, one.flops, None)
            for i, one in enumerate(traced.seen, 1)
        ]
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    norms = round(2 * norms / sum(one.kernel == 3 for one in plan))  # of each two convolutions
    (b, _), channels, done = plan[0].gives, 3, 0
    steps: list[Step] = []
    for name, operations in groupby(plan, key=lambda one: one.step):
        own = list(operations)
        level, shape = own[-1].level, own[-1].gives
        found = outputs[done : done + len(own)]
        parted = (gives for gives in found if gives != shape)
        seen = next(parted, found[-1] if len(found) == len(own) else None)
        done += len(own)
        size = f"N/{2**level}" if level else "N"
        multiple = shape[0] if name == "out" else f"{shape[0] // b}b" if shape[0] > b else "b"
        formula = f"{size} × {size} × {multiple}"
        both = costs(own, channels, norms)
        steps.append(Step(name, level, formula, shape, seen, *both, receptive_field(plan[:done])))
        channels = shape[0]
    return steps


def line_up(plan: list[Planned], traced: Trace) -> list[Shape | None] | None:
    """Return what is put out, up to the first not as planned, or None if all is too unlike."""
    expected = [one.kind for one in (plan[: len(traced.seen)] if traced.stopped else plan)]
    if SequenceMatcher(None, expected, [one.kind for one in traced.seen]).ratio() < 0.7:
        return None
    alike = takewhile(lambda pair: fits(*pair), zip(plan, traced.seen, strict=False))
    return [one.gives for _, one in alike]


def fits(planned: Planned, seen: Operation) -> bool:
    """Whether an operation does the planned one's work, if perhaps in another way."""
    stand_ins = {"pooling": "convolution", "upsampling": "transposed convolution"}
    stands_in = seen.stride > 1 and seen.kind == stand_ins.get(planned.kind)
    return seen.kind == planned.kind or stands_in


def costs(step: list[Planned], channels: int, norms: int) -> tuple[int, int]:
    """Return parameters and FLOPs of a step that takes `channels` and has `norms` BatchNorms."""
    parameters = flops = 0
    for operation in step:
        weights = operation.kernel**2 * channels * operation.gives[0]
        channels, side = operation.gives
        flops += int(2 * weights * side**2)
        parameters += weights + channels * (weights > 0)  # and a bias for every output channel
    # A BatchNorm has a scale and a shift for each channel.
    return parameters + norms * 2 * channels * (step[0].kernel == 3), flops


def receptive_field(path: list[Planned]) -> int:
    """Return the side, in input pixels, of what a pixel after the operations of `path` depends on.

    Counted from that pixel back to the image: a 3 x 3 convolution needs two pixels more in a row
    than it gives, a 2 x 2 pooling twice as many, and w upsampled pixels come from at most w // 2 +
    1 coarser ones.
    """
    width = 1
    for operation in reversed(path):
        width += max(operation.kernel - 1, 0)
        width = {"pooling": 2 * width, "upsampling": width // 2 + 1}.get(operation.kind, width)
    return width
