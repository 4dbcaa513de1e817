"""Note the operations of any net's forward pass and the shapes they make; hold them to a plan.

A file of its own, since nothing here knows which net it is; `petseg_utils` passes it on.
"""

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
    """An operation that a plan expects, with what to say where it isn't as planned."""

    name: str
    kind: str  # a value of KINDS
    gives: tuple[int, float]  # (channels, side)
    kernel: int  # of a convolution
    missing: str  # the sentence for another kind of operation in its place
    rule: str  # how many channels it gives, and why


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


def first_fault(plan: list[Planned], seen: list[Operation], stopped: str) -> str:
    """Say in a sentence where a pass first parts from the plan, and why; "" if it doesn't."""
    if line_up(plan, seen, stopped) is None:
        return "the net is too unlike the plan to be compared with it: look at its trace."
    before = "the image"
    for index, planned in enumerate(plan):
        here = seen[index : index + 2]
        if here and fits(planned, here[0]):
            after_concatenation = index > 0 and seen[index - 1].kind == "concatenation"
            told = fault(planned, here[0], stopped, after_concatenation)
        elif not here and stopped:
            told = f"the pass stops after {before}, and {UNKNOWN} ({stopped})"
        elif here[1:] and fits(planned, here[1]) and planned.kind != plan[index - 1].kind:
            told = f"one {here[0].kind} too many after {before}"
        else:
            told = planned.missing.format(before=before)
        if told:
            return f"{told}."
        before = planned.name
    if seen[len(plan) :]:
        return f"one {seen[len(plan)].kind} too many after {before}."
    return f"the pass stops after {before}, and {UNKNOWN} ({stopped})." if stopped else ""


def fault(planned: Planned, seen: Operation, stopped: str, after_concatenation: bool) -> str:
    """Say what is wrong with an operation that is there as planned; "" if nothing is."""
    name, (channels, side) = planned.name, planned.gives
    if seen.kind != planned.kind:
        change = f"from {seen.given[0][0]} to {seen.gives[0]} channels" if seen.gives else ""
        return f"{name} is a {seen.kind} {change}: planned is {planned.kind}, without weights"
    if seen.kind == "convolution":
        told = fault_of_convolution(planned, seen, after_concatenation)
    else:
        told = fault_of_concatenation(planned, seen)
    if told or seen.gives == planned.gives:
        return told
    if not seen.gives:
        return f"the pass stops at {name}, and {UNKNOWN} ({stopped})"
    if seen.gives[0] != channels:
        return f"{name} gives {seen.gives[0]} channels, planned are {channels}: {planned.rule}"
    return f"{name} gives the side {seen.gives[1]}, planned is {side:g}: a factor of 2 is right"


def fault_of_convolution(planned: Planned, seen: Operation, after_concatenation: bool) -> str:
    """Say what is wrong with a convolution, beside how many channels it gives."""
    name, (has, side) = planned.name, seen.given[0]
    if seen.takes != has:
        told = f"{name} takes {seen.takes} channels, but what it is given has {has}"
        if not after_concatenation:
            return told
        doubled = "the concatenation doubles them"
        return f"{told}: {doubled if has == 2 * seen.takes else 'it may be of another level'}"
    if seen.kernel != planned.kernel:
        is_, right = (f"{size} x {size}" for size in (seen.kernel, planned.kernel))
        return f"{name} is {is_}, planned is {right}"
    if seen.stride > 1:
        return f"{name} has a stride of {seen.stride}: only pooling halves the side"
    if seen.gives and seen.gives[1] != side:
        change = f"makes the side {seen.gives[1]} of {side}"
        return f"{name} {change}: with padding={planned.kernel // 2} it stays"
    return ""


def fault_of_concatenation(planned: Planned, seen: Operation) -> str:
    """Say what is wrong with a concatenation, beside how many channels it gives."""
    sides = [side for _, side in seen.given]
    if seen.dim != 1:
        return f"{planned.name} joins on dim {seen.dim}: the channels are dim 1"
    if len(set(sides)) > 1:
        told = f"{planned.name} is given the sides {' and '.join(map(str, sides))}"
        late = "from after the pooling" if 2 * min(sides) == planned.gives[1] else "another level's"
        return f"{told}: the skip is {late}"
    return ""
