"""Note the operations of any net's forward pass and the shapes they make; hold them to a plan.

Which net it is, only the plan knows, which is given.
"""

from collections.abc import Iterator
from copy import deepcopy
from difflib import SequenceMatcher
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from support.parameters import reason

KINDS = {  # what PyTorch calls the operations that make shapes, and what people call them
    "convolution": "convolution",
    "max_pool2d_with_indices": "pooling",
    "avg_pool2d": "pooling",
    "_adaptive_avg_pool2d": "pooling",
    "upsample_nearest2d": "upsampling",
    "upsample_bilinear2d": "upsampling",
    "cat": "concatenation",
}
STAND_INS = {"pooling": "convolution", "upsampling": "transposed convolution"}  # with a stride
UNKNOWN = "the shape doctor doesn't know why"


class Operation(NamedTuple):
    """An operation of a forward pass; shapes are (channels, side)."""

    kind: str  # a value of KINDS, or "transposed convolution"
    given: list[tuple[int, int]]  # what it was given: two or more for a concatenation
    gives: tuple[int, int] | None  # None: PyTorch stopped the pass here
    takes: int = 0  # channels that a convolution's weights are made for
    kernel: int = 0
    stride: int = 1
    dim: int = 1  # that a concatenation joins on
    parameters: int = 0
    flops: int = 0  # of a convolution, 2 per multiply-add


class Planned(NamedTuple):
    """An operation that a plan expects."""

    step: str  # that it is part of, like "down1"
    level: int  # how often the side of the image is halved
    kind: str  # a value of KINDS
    kernel: int  # 0 for an operation without weights
    channels: int  # that it gives

    @property
    def kind_of_step(self) -> str:
        """The step's name without the number of its level."""
        return self.step.rstrip("0123456789")

    def gives(self, side: int) -> tuple[int, float]:
        """Return (channels, side) of what it gives for an image of `side` pixels."""
        return self.channels, side / 2**self.level


class Step(NamedTuple):
    """One step of a net's forward pass for one image; shapes are (channels, side)."""

    name: str
    level: int  # 0 at the top; at level k the side is N / 2**k
    formula: str  # in N, the image side, and b, the base channels
    predicted: tuple[int, float] | None  # None: the net is no U-Net of this plan
    traced: tuple[int, int] | None  # None: the forward pass did not get here, or went another way
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


# ---------------------------------------------------------------------------------------- the trace


class Tracer(TorchDispatchMode):
    """While it is entered, every operation on a batch of images is noted in `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Operation] = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None) -> object:
        """Carry out an operation, and note it even if it fails."""
        kind = KINDS.get(function.overloadpacket.__name__)
        result = None
        try:
            result = function(*args, **(kwargs or {}))
        finally:
            inputs = args[0] if kind == "concatenation" else args[:1]
            # A classifier's last layers have no side.
            if kind and all(x.ndim == 4 for x in inputs):
                output = result[0] if isinstance(result, tuple) else result
                gives = None if output is None else shape_of(output)
                self.seen.append(describe(kind, args, [shape_of(x) for x in inputs], gives))
        return result


def shape_of(x: Tensor) -> tuple[int, int]:
    """Return channels and side of a batch of square images."""
    return x.shape[1], x.shape[3]


def describe(
    kind: str, args: tuple, given: list[tuple[int, int]], gives: tuple[int, int] | None
) -> Operation:
    """Describe an operation by the arguments that PyTorch gives it."""
    if kind == "concatenation":
        return Operation(kind, given, gives, dim=args[1] % 4 if args[1:] else 0)
    if kind != "convolution":
        return Operation(kind, given, gives)
    _, weight, bias, stride, _padding, _dilation, transposed, _more, groups = args
    side = given[0][1] if transposed else gives[1] if gives else 0
    return Operation(
        "transposed convolution" if transposed else kind,
        given,
        gives,
        takes=weight.shape[0] if transposed else weight.shape[1] * groups,
        kernel=weight.shape[3],
        stride=stride[0],
        parameters=weight.numel() + (0 if bias is None else bias.numel()),
        flops=2 * weight.numel() * side**2,
    )


def trace_shapes(model: nn.Module, side: int) -> tuple[list[Operation], str]:
    """Return the operations that an RGB image of `side` pixels goes through, and why they stop.

    The reason is "" for a pass that got to its end. What is run is a copy of the model on torch's
    meta device, which knows shapes but computes nothing, so any size is free.
    """
    model = deepcopy(model).to("meta").eval()
    tracer = Tracer()
    try:
        with torch.no_grad(), torch.device("meta"), tracer:
            model(torch.empty(1, 3, side, side))
    except (RuntimeError, ValueError, LookupError) as error:
        return tracer.seen, reason(error).rstrip(".")
    return tracer.seen, ""


def names_in_use(model: nn.Module) -> list[str]:
    """Return the names of a net's tensors, as in its state_dict, in the order of their use."""
    model = deepcopy(model).to("meta").eval()
    names: list[str] = []

    def note_all(part: nn.Module, prefix: str) -> None:
        own = [f"{prefix}.{name}" for name in part.state_dict() if "." not in name]
        part.register_forward_pre_hook(lambda *_: names.extend(own))

    for prefix, part in model.named_modules():
        note_all(part, prefix)
    with torch.no_grad():
        model(torch.empty(1, 3, 256, 256, device="meta"))
    return list(dict.fromkeys(names))


# --------------------------------------------------------------------------------------- the doctor

FEW = "{step} has too few convolutions: planned are two"
STEPS = {  # by a step's name: what to say if an operation of it is missing, and why its channels
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


def fits(planned: Planned, seen: Operation) -> bool:
    """Whether an operation does the planned one's work, if perhaps in another way."""
    stand_in = seen.kind == STAND_INS.get(planned.kind) and seen.stride > 1
    return seen.kind == planned.kind or stand_in


def line_up(
    plan: list[Planned], seen: list[Operation], stopped: str
) -> list[tuple[int, int] | None] | None:
    """Return what the operations put out, up to the first that doesn't do what is planned.

    None says that the net is too unlike the plan to be compared.
    """
    expected = [planned.kind for planned in (plan[: len(seen)] if stopped else plan)]
    if SequenceMatcher(None, expected, [one.kind for one in seen]).ratio() < 0.7:
        return None
    alike = takewhile(lambda pair: fits(*pair), zip(plan, seen, strict=False))
    return [one.gives for _, one in alike]


def faults(plan: list[Planned], seen: list[Operation], stopped: str, side: int) -> Iterator[str]:
    """Yield where a pass parts from the plan, and why; all after the first may follow from it."""
    yield from faults_of_levels(plan, seen, stopped, side)
    if line_up(plan, seen, stopped) is None:
        yield "the net is too unlike the plan to be compared with it: look at its trace"
    before, unknown = "the image", f"{UNKNOWN} ({stopped})"
    for index, planned in enumerate(plan):
        here = seen[index : index + 2]
        first = planned.step != plan[index - 1].step
        name = f"convolution {2 - first} of {planned.step}" if planned.kernel == 3 else planned.step
        if here and fits(planned, here[0]):
            after = seen[index - 1].kind if index else ""
            yield from faults_of_operation(name, planned, here[0], after, side)
            if not here[0].gives:
                yield f"the pass stops at {name}, and {unknown}"
        elif not here and stopped:
            yield f"the pass stops after {before}, and {unknown}"
        elif here[1:] and fits(planned, here[1]) and planned.kind != plan[index - 1].kind:
            yield f"one {here[0].kind} too many after {before}"
        else:
            missing, _ = STEPS[planned.kind_of_step]
            level = planned.step.removeprefix(planned.kind_of_step)
            yield missing.format(step=planned.step, level=level, before=before)
        before = name
    if seen[len(plan) :]:
        yield f"one {seen[len(plan)].kind} too many after {before}"
    if stopped:
        yield f"the pass stops after {before}, and {unknown}"


def faults_of_levels(
    plan: list[Planned], seen: list[Operation], stopped: str, side: int
) -> Iterator[str]:
    """Yield what is wrong with how often the side is halved."""
    depth = max(planned.level for planned in plan)
    halves = (side & -side).bit_length() - 1  # how often 2 divides the side
    if halves < depth:
        often = ["not even once", "once only", "twice only", f"{halves} times only"][min(halves, 3)]
        yield f"the sides part at level {halves + 1}: {side} can be halved {often}"
    levels, ups = (sum(one.kind == kind for one in seen) for kind in ("pooling", "upsampling"))
    if levels == ups != depth and levels and not stopped:
        many = "many" if levels > depth else "few"
        yield f"the net has {levels} levels, planned are {depth}: too {many}"


def faults_of_operation(
    name: str, planned: Planned, seen: Operation, after: str, image_side: int
) -> Iterator[str]:
    """Yield what is wrong with an operation that is there as planned, `after` that kind."""
    channels, side = planned.gives(image_side)
    if seen.kind != planned.kind:
        change = f"from {seen.given[0][0]} to {seen.gives[0]} channels" if seen.gives else ""
        yield f"{name} is a {seen.kind} {change}: planned is {planned.kind}, without weights"
    if seen.kind == "convolution":
        yield from faults_of_convolution(name, planned, seen, after)
    if seen.kind == "concatenation":
        yield from faults_of_concatenation(name, seen, side)
    if seen.gives and seen.gives[0] != channels:
        _, why = STEPS[planned.kind_of_step]
        yield f"{name} gives {seen.gives[0]} channels, planned are {channels}: {why}"
    if seen.gives and seen.gives[1] != side:
        yield f"{name} gives the side {seen.gives[1]}, planned is {side:g}: a factor of 2 is right"


def faults_of_convolution(
    name: str, planned: Planned, seen: Operation, after: str
) -> Iterator[str]:
    """Yield what is wrong with a convolution, beside how many channels it gives."""
    has, side = seen.given[0]
    if seen.takes != has:
        doubled = has == 2 * seen.takes
        why = ": the concatenation doubles them" if doubled else ": it may be of another level"
        told = f"{name} takes {seen.takes} channels, but what it is given has {has}"
        yield told + why * (after == "concatenation")
    if seen.kernel != planned.kernel:
        is_, right = (f"{size} x {size}" for size in (seen.kernel, planned.kernel))
        yield f"{name} is {is_}, planned is {right}"
    if seen.stride > 1:
        yield f"{name} has a stride of {seen.stride}: only pooling halves the side"
    if seen.gives and seen.gives[1] != side:
        change = f"makes the side {seen.gives[1]} of {side}"
        yield f"{name} {change}: with padding={planned.kernel // 2} it stays"


def faults_of_concatenation(name: str, seen: Operation, planned_side: float) -> Iterator[str]:
    """Yield what is wrong with a concatenation, beside how many channels it gives."""
    sides = [side for _, side in seen.given]
    if seen.dim != 1:
        yield f"{name} joins on dim {seen.dim}: the channels are dim 1"
    if len(set(sides)) > 1:
        told = f"{name} is given the sides {' and '.join(map(str, sides))}"
        late = "from after the pooling" if 2 * min(sides) == planned_side else "another level's"
        yield f"{told}: the skip is {late}"
