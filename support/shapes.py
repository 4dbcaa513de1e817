"""Hold what a net's forward pass did to a plan: a table of both, and a doctor who says what parts.

Which net it is, only the plan knows, which is given.
"""

from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby, takewhile
from typing import NamedTuple

from torch import nn

from support.trace import Operation, Trace

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


# ---------------------------------------------------------------------------------------- the table


def compare(plan: list[Planned], traced: Trace, model: nn.Module) -> list[Step]:
    """Return the plan's steps beside what was traced of a model.

    A net that is too unlike the plan has its traced operations as steps.
    """
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
        multiple = f"{shape[0] // b}b" if shape[0] > b else "b"
        formula = f"{size} × {size} × {shape[0] if name == 'out' else multiple}"
        both = costs(own, channels, norms)
        steps.append(Step(name, level, formula, shape, seen, *both, receptive_field(plan[:done])))
        channels = shape[0]
    return steps


def line_up(plan: list[Planned], traced: Trace) -> list[Shape | None] | None:
    """Return what the operations put out, up to the first that doesn't do what is planned.

    None says that the net is too unlike the plan to be compared.
    """
    expected = [one.kind for one in (plan[: len(traced.seen)] if traced.stopped else plan)]
    if SequenceMatcher(None, expected, [one.kind for one in traced.seen]).ratio() < 0.7:
        return None
    alike = takewhile(lambda pair: fits(*pair), zip(plan, traced.seen, strict=False))
    return [one.gives for _, one in alike]


def fits(planned: Planned, seen: Operation) -> bool:
    """Whether an operation does the planned one's work, if perhaps in another way."""
    stand_ins = {"pooling": "convolution", "upsampling": "transposed convolution"}
    return seen.kind == planned.kind or (
        seen.kind == stand_ins.get(planned.kind) and seen.stride > 1
    )


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
        if operation.kind == "convolution":
            width += operation.kernel - 1
        elif operation.kind == "pooling":
            width *= 2
        elif operation.kind == "upsampling":
            width = width // 2 + 1
    return width


# --------------------------------------------------------------------------------------- the doctor

FEW = "{step} has too few convolutions: planned are two"
STEPS = {  # what to say if an operation of a step is missing, and why it gives as many channels
    "down": (FEW, "each level down doubles them, from b"),
    "pool": ("no pooling on level {level}: the side isn't halved after {before}", ""),
    "bottleneck": (FEW, "the bottleneck keeps them"),
    "upsample": ("no upsampling on level {level}: the side isn't doubled", ""),
    "concat": (
        "no concatenation on level {level}: the skip is missing",
        "the skip has as many as what was upsampled",
    ),
    "up": (FEW, "each level up halves them, down to b"),
    "out": ("no 1 x 1 convolution at the end, after {before}", "one for each class"),
}


def first_fault(plan: list[Planned], traced: Trace) -> str:
    """Say in a sentence where a pass first parts from the plan, and why; "" if it doesn't."""
    first = next(faults(plan, *traced), "")
    return first and f"{first}."


def faults(plan: list[Planned], seen: list[Operation], stopped: str) -> Iterator[str]:
    """Yield where a pass parts from the plan, and why; all after the first may follow from it."""
    yield from faults_of_levels(plan, seen, stopped)
    if line_up(plan, Trace(seen, stopped)) is None:
        yield "the net is too unlike the plan to be compared with it: look at its trace"
    before, unknown = "the image", f"and the shape doctor doesn't know why ({stopped})"
    for index, planned in enumerate(plan):
        here, then = [*seen[index : index + 2], None, None][:2]
        kind = planned.step.rstrip("0123456789")
        missing, why = STEPS[kind]
        number = 1 + (planned.step == plan[index - 1].step)
        name = f"convolution {number} of {planned.step}" if planned.kernel == 3 else planned.step
        if here and fits(planned, here):
            yield from faults_of(name, planned, here, plan[index - 1].kind, why)
            if not here.gives:
                yield f"the pass stops at {name}, {unknown}"
        elif not here and stopped:
            yield f"the pass stops after {before}, {unknown}"
        elif then and fits(planned, then) and planned.kind != plan[index - 1].kind:
            yield f"one {here.kind} too many after {before}"
        else:
            level = planned.step.removeprefix(kind)
            yield missing.format(step=planned.step, level=level, before=before)
        before = name
    for one in seen[len(plan) :]:
        yield f"one {one.kind} too many after {before}"
    if stopped:
        yield f"the pass stops after {before}, {unknown}"


def faults_of_levels(plan: list[Planned], seen: list[Operation], stopped: str) -> Iterator[str]:
    """Yield what is wrong with how often the side is halved."""
    depth, side = max(planned.level for planned in plan), int(plan[0].gives[1])
    halves = (side & -side).bit_length() - 1  # how often 2 divides the side
    if halves < depth:
        often = ["not even once", "once only", "twice only", f"{halves} times only"][min(halves, 3)]
        yield f"the sides part at level {halves + 1}: {side} can be halved {often}"
    levels, ups = (sum(one.kind == kind for one in seen) for kind in ("pooling", "upsampling"))
    if levels == ups != depth and levels and not stopped:
        many = "many" if levels > depth else "few"
        yield f"the net has {levels} levels, planned are {depth}: too {many}"


def faults_of(name: str, planned: Planned, seen: Operation, before: str, why: str) -> Iterator[str]:
    """Yield what is wrong with an operation that is there as planned, causes first.

    `before` is the kind of the operation before it, and `why` says why it gives so many channels.
    """
    (has, side), sides = seen.given[0], [side for _, side in seen.given]
    gives = seen.gives or planned.gives  # where PyTorch stops, nobody knows
    if seen.kind != planned.kind:
        change = f" from {has} to {gives[0]} channels" if seen.gives else ""
        yield f"{name} is a {seen.kind}{change}: planned is {planned.kind}, without weights"
    if seen.takes not in (0, has):
        doubled = has == 2 * seen.takes
        cause = ": the concatenation doubles them" if doubled else ": it may be of another level"
        told = f"{name} takes {seen.takes} channels, but what it is given has {has}"
        yield told + cause * (before == "concatenation")
    if seen.kernel != planned.kernel:
        is_, right = (f"{size} x {size}" for size in (seen.kernel, planned.kernel))
        yield f"{name} is {is_}, planned is {right}"
    if seen.stride > 1:
        yield f"{name} has a stride of {seen.stride}: only pooling halves the side"
    if seen.takes and gives[1] != side:
        change = f"makes the side {gives[1]} of {side}"
        yield f"{name} {change}: with padding={planned.kernel // 2} it stays"
    if seen.dim != 1:
        yield f"{name} joins on dim {seen.dim}: the channels are dim 1"
    if len(set(sides)) > 1:
        late = 2 * min(sides) == planned.gives[1]
        skip = "from after the pooling" if late else "another level's"
        yield f"{name} is given the sides {' and '.join(map(str, sides))}: the skip is {skip}"
    if gives[0] != planned.gives[0]:
        yield f"{name} gives {gives[0]} channels, planned are {planned.gives[0]}: {why}"
    if gives[1] != planned.gives[1]:
        right = f"planned is {planned.gives[1]:g}: a factor of 2 is right"
        yield f"{name} gives the side {gives[1]}, {right}"
