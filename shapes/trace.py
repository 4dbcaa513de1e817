"""Note the operations of any net's forward pass and the shapes that they make."""

from copy import deepcopy
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


class Operation(NamedTuple):
    """An operation of a forward pass; shapes are (channels, side)."""

    kind: str  # a value of KINDS, or "transposed convolution"
    given: list[tuple[int, int]]  # what it was given: two or more for a concatenation
    gives: tuple[int, int] | None  # None: PyTorch stopped the pass here
    takes: int = 0  # channels that a convolution's weights are made for
    kernel: int = 0
    stride: int = 1
    parameters: int = 0
    flops: int = 0  # of a convolution, 2 per multiply-add
    dim: int = 1  # that a concatenation joins on


class Trace(NamedTuple):
    """What a forward pass did."""

    seen: list[Operation]
    stopped: str  # why it didn't get to its end; "" if it did


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
            if kind and all(x.ndim == 4 for x in inputs):  # a classifier's last layers have no side
                output = result[0] if isinstance(result, tuple) else result
                self.seen.append(describe(kind, args, inputs, output))
        return result


def describe(kind: str, args: tuple, inputs: list[Tensor], output: Tensor | None) -> Operation:
    """Describe an operation by the arguments that PyTorch gives it."""
    given = [tuple(x.shape[1::2]) for x in inputs]
    gives = None if output is None else tuple(output.shape[1::2])
    if kind == "concatenation":
        return Operation(kind, given, gives, dim=args[1] % 4 if args[1:] else 0)
    if kind != "convolution":
        return Operation(kind, given, gives)
    _, weight, bias, stride, _padding, _dilation, transposed, _more, groups = args
    side = given[0][1] if transposed else gives[1] if gives else 0
    kind = "transposed convolution" if transposed else kind
    takes = weight.shape[0] if transposed else weight.shape[1] * groups
    parameters = weight.numel() + (0 if bias is None else bias.numel())
    flops = 2 * weight.numel() * side**2
    return Operation(kind, given, gives, takes, weight.shape[3], stride[0], parameters, flops)


def trace_shapes(model: nn.Module, side: int) -> Trace:
    """Return the operations that an RGB image of `side` pixels goes through, and why they stop.

    What is run is a copy of the model on torch's meta device, which knows shapes but computes
    nothing, so any size is free.
    """
    model = deepcopy(model).to("meta").eval()
    tracer = Tracer()
    try:
        with torch.no_grad(), torch.device("meta"), tracer:
            model(torch.empty(1, 3, side, side))
    except (RuntimeError, ValueError, LookupError) as error:
        return Trace(tracer.seen, reason(error).rstrip("."))
    return Trace(tracer.seen, "")


def sizes_of(model: nn.Module, traced: Trace) -> dict[str, int]:
    """Return base channels, depth and classes of a U-Net: its attributes, or else as it looks."""
    convolutions = [part.out_channels for part in model.modules() if isinstance(part, nn.Conv2d)]
    depth = sum(operation.kind == "pooling" for operation in traced.seen)
    if traced.stopped:  # perhaps on the way down: a level has four convolutions
        depth = round((len(convolutions) - 3) / 4)
    looks = {"base_channels": [*convolutions, 1][0], "depth": max(depth, 1), "num_classes": 3}
    return {name: getattr(model, name, size) for name, size in looks.items()}
