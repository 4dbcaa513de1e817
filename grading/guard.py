"""Keep the way to the grader out of a hand-in's reach, and see whether it changes what judges it.

The sandbox executes this file, once for each process, in a namespace that no module refers to. What
is reported goes through an audit hook: Python has no way to remove one or to look into it, so that
the pipe, and the secret that signs a report, can't be found. Before a report leaves, the hook
compares what judges with a snapshot taken before the hand-in's import, and looks at who calls.
"""

import builtins

# What a hand-in does to the builtins doesn't reach the functions defined below.
__builtins__ = {**vars(builtins)}

import sys
from os import _exit, scandir, stat, write
from sys import _getframe
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import NamedTuple

REPORT, START = "grading.report", "grading.start"
# fmt: off
WHOLE = ("__main__", "pytest", "_pytest", "pluggy", "grading")  # packages that judge as a whole
FUNCTIONS = (  # modules of which the functions judge
    "builtins", "json", "math", "os", "posixpath", "re", "sys",
    "numpy", "numpy.testing", "sklearn.metrics",
    "torch", "torch.nn.functional", "torch.testing",
)
CLASSES = {
    "pathlib": ["Path"], "torch": ["Tensor"], "torch.nn": ["BatchNorm2d", "Conv2d", "Module"],
}
SPYING = {  # no right hand-in does this
    "gc.get_objects", "gc.get_referents", "gc.get_referrers", "sys.setprofile", "sys.settrace",
}
# fmt: on


class Space(NamedTuple):
    """A namespace as it was: its functions, what they do, and the names that would hide others."""

    name: str
    content: dict
    kept: list[tuple[str, object]]
    functions: list[tuple[FunctionType, tuple]]
    hiding: set[str]


class Seen(NamedTuple):
    """What judges, as it was: namespaces, hooks, what finds modules, files; and who may report."""

    spaces: list[Space]
    hooks: list[tuple[str, list, list]]
    finders: dict[str, list]
    files: dict[str, tuple]
    folder: str
    callers: set[tuple[int, int]]


def open_channel(pipe: int, nonce: str, root: CodeType) -> None:
    """Make `sys.audit(REPORT, line, items)` write a signed line into the pipe.

    After `sys.audit(START, folder)` everything is compared first, and only pytest and the grader,
    called by the function whose code is `root`, may report.
    """
    seen, signature = None, nonce.encode() + b" "

    def stop(what: str) -> None:
        write(pipe, signature + b'{"tampered": "%s"}\n' % what.encode("ascii", "replace"))
        _exit(1)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event == REPORT:
            line, items = arguments
            if what := seen and (stranger(_getframe(1), root, seen.callers) or changed(seen)):
                stop(what)
            write(pipe, signature + line + b"\n")
            if seen and items:
                look_at_tests(seen, items)
        elif event == START and not seen:
            seen = look(arguments[0])
        elif seen and event in SPYING:
            stop(event)
        elif seen and event == "open" and str(arguments[0]).rstrip("'").endswith("mem"):
            stop(event)  # of /proc/self/mem, in which the secret could be found

    sys.addaudithook(hook)


# ------------------------------------------------------------------- the snapshot


def look(folder: str) -> Seen:
    """Return a snapshot of what judges, and of the files in the staged folder that do."""
    seen = Seen([], [], finders(), files_of(folder), folder, set())
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType):
            continue
        content, whole = vars(module), name.partition(".")[0] in WHOLE
        classes = [content[some] for some in CLASSES.get(name, ())]
        if whole:
            own = [some for some in content.values() if isinstance(some, type)]
            classes += [some for some in own if some.__module__ == name]
        if whole or name in FUNCTIONS:
            keep(seen, name, content, set(__builtins__))
        for some in classes:
            keep(seen, f"{name}.{some.__name__}", vars(some), names_of(some.__mro__[1:]))
    modules = {name: sys.modules[name] for name in (*FUNCTIONS, *WHOLE) if name in sys.modules}
    seen.spaces.append(Space("sys.modules", sys.modules, list(modules.items()), [], set()))
    for space in seen.spaces:
        if space.name.partition(".")[0] in WHOLE:
            for function, (code, *_) in space.functions:
                seen.callers.update((some, id(function.__globals__)) for some in codes(code))
    return seen


def keep(seen: Seen, name: str, content: dict, hiding: set[str]) -> None:
    """Add a namespace; a name of `hiding` that is new in it later on would hide something."""
    kept = [
        (key, value)
        for key, value in content.items()
        if callable(value) or isinstance(value, (staticmethod, classmethod, property, ModuleType))
    ]
    functions = [(some, parts(some)) for _, value in kept for some in plain(value)]
    seen.spaces.append(Space(name, content, kept, functions, hiding.difference(content)))


def look_at_tests(seen: Seen, items: list) -> None:
    """Add the tests that were collected, their modules, and the hooks that run them."""
    for module in {item.module for item in items}:
        keep(seen, module.__name__, vars(module), set(__builtins__))
    for item in items:
        keep(seen, item.name, vars(item), names_of(type(item).__mro__))
    for name, caller in vars(items[0].config.hook).items():
        hooks = getattr(caller, "_hookimpls", [])
        seen.hooks.append((name, hooks, list(hooks)))
        for number, hook in enumerate(hooks):
            keep(seen, f"{name} {number}", {"function": hook.function}, set())


def names_of(classes: tuple[type, ...]) -> set[str]:
    """Return the names of the methods that classes define."""
    return {name for some in classes for name, value in vars(some).items() if callable(value)}


def plain(value: object) -> list[FunctionType]:
    """Return the functions written in Python that a function, method or property consists of."""
    if type(value) in (staticmethod, classmethod):
        value = value.__func__
    elif type(value) is property:
        value = value.fget
    if type(value) is not FunctionType:
        return []
    return [value, *plain(vars(value).get("__wrapped__"))]


def parts(function: FunctionType) -> tuple:
    """Return what decides what a function does."""
    return function.__code__, function.__defaults__, function.__kwdefaults__


def codes(code: CodeType) -> list[int]:
    """Return the identities of a code object and of those within it."""
    inner = [some for some in code.co_consts if type(some) is CodeType]
    return [id(code), *(number for some in inner for number in codes(some))]


def files_of(folder: str) -> dict[str, tuple]:
    """Return the state of each of the grader's files in a staged folder."""
    paths = [f"{folder}/{name}" for name in ("conftest.py", "pyproject.toml")]
    for name in ("tests", "grading", "support", "shapes"):
        paths += [f"{folder}/{name}", *(entry.path for entry in scandir(f"{folder}/{name}"))]
    return {path: state(path) for path in paths}


def finders() -> dict[str, list]:
    """Return what finds modules, but for what pytest adds to find the tests."""
    pytests = sys.modules["_pytest.assertion.rewrite"].AssertionRewritingHook
    own = [finder for finder in sys.meta_path if type(finder) is not pytests]
    return {"sys.meta_path": own, "sys.path_hooks": list(sys.path_hooks)}


def state(path: str) -> tuple:
    """Return a file's number, size and time of change, which nobody can set back."""
    try:
        status = stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_ctime_ns


# ------------------------------------------------------------------- the comparison


def changed(seen: Seen) -> str:
    """Return the name of something that is no longer what it was, or nothing."""
    for space in seen.spaces:
        for key, value in space.kept:
            if space.content.get(key) is not value:
                return f"{space.name}.{key}"
        for function, was in space.functions:
            if parts(function) != was:
                return f"{space.name}.{function.__name__}"
        if new := space.hiding.intersection(space.content):
            return f"{space.name}.{min(new)}"
    for name, hooks, was in seen.hooks:
        if len(hooks) != len(was) or any(a is not b for a, b in zip(hooks, was, strict=True)):
            return name
    for (name, was), now in zip(seen.finders.items(), finders().values(), strict=True):
        # A package may add one behind them, as six does.
        if list(map(id, now[: len(was)])) != list(map(id, was)):
            return name
    for path, was in seen.files.items():
        if state(path) != was:
            return path.removeprefix(seen.folder + "/")
    return ""


def stranger(frame: FrameType | None, root: CodeType, callers: set[tuple[int, int]]) -> str:
    """Return who reports though it may not, or nothing: all callers are known, up to `root`."""
    while frame and frame.f_code is not root:
        if (id(frame.f_code), id(frame.f_globals)) not in callers:
            return f"a report from {frame.f_code.co_name}"
        frame = frame.f_back
    return "" if frame else "a report from elsewhere"
