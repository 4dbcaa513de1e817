"""Say in sentences where a net's forward pass parts from a plan, and why."""

from collections.abc import Iterator

from shapes.table import Planned, fits, line_up
from shapes.trace import Operation, Trace

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
    return next((f"{fault}." for fault in faults(plan, traced)), "")


def faults(plan: list[Planned], traced: Trace) -> Iterator[str]:
    """Yield where a pass parts from the plan, and why; all after the first may follow from it."""
    seen, stopped = traced
    yield from faults_of_levels(plan, traced)
    if line_up(plan, traced) is None:
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


def faults_of_levels(plan: list[Planned], traced: Trace) -> Iterator[str]:
    """Yield what is wrong with how often the side is halved."""
    depth, side = max(planned.level for planned in plan), int(plan[0].gives[1])
    halves = (side & -side).bit_length() - 1  # how often 2 divides the side
    if halves < depth:
        often = ["not even once", "once only", "twice only", f"{halves} times only"][min(halves, 3)]
        yield f"the sides part at level {halves + 1}: {side} can be halved {often}"
    kinds = [one.kind for one in traced.seen]
    levels, ups = kinds.count("pooling"), kinds.count("upsampling")
    if levels == ups != depth and levels and not traced.stopped:
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
        cause *= before == "concatenation"
        yield f"{name} takes {seen.takes} channels, but what it is given has {has}{cause}"
    if seen.kernel != planned.kernel:
        is_, right = (f"{size} x {size}" for size in (seen.kernel, planned.kernel))
        yield f"{name} is {is_}, planned is {right}"
    if seen.stride > 1:
        yield f"{name} has a stride of {seen.stride}: only pooling halves the side"
    if seen.takes and gives[1] != side:
        stays = f"with padding={planned.kernel // 2} it stays"
        yield f"{name} makes the side {gives[1]} of {side}: {stays}"
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
