"""The grader's own shape doctor, so that no hand-in's copy of it speaks in the grader's reasons."""

import os
import runpy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from torch import nn

HERE = Path(__file__).resolve().parent.parent


@cache
def own_module() -> dict:
    """Return what the grader's petseg_utils.py defines, by name."""
    return runpy.run_path(os.environ.get("GRADERS_MODULE", HERE / "petseg_utils.py"))


@contextmanager
def told_by_the_doctor(style: type[nn.Module]) -> Iterator[None]:
    """Let the reason why a test of this class fails end with what the shape doctor says."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError, LookupError) as error:
        said = ""
        with suppress(Exception):  # of a class that can't make one
            diagnose = own_module()["diagnose"]
            said = diagnose(style(4, 3), 32, base_channels=4, depth=3, num_classes=3)
        if not said:
            raise
        why = str(error).partition("\n")[0]
        if not isinstance(error, AssertionError):
            why = f"expected no error, found {type(error).__name__}"  # which the doctor explains
        raise AssertionError(f"{why.rstrip('.')}; the shape doctor says: {said}") from None
