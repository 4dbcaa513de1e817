"""Parameters of a notebook, declared once, and mistakes, told in one sentence.

A file of its own, since nothing here is about segmentation; `petseg_utils` passes it on.
"""

import os
import re
import reprlib
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class InputError(ValueError):
    """A mistake a user can make, in one sentence: what is wrong, where, and what to do."""

    def __init__(self, sentence: str) -> None:
        sentence = re.sub(
            r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", sentence
        )  # one line, whatever a name holds
        sentence = re.sub(
            r"(\S{100})\S{100,}(\S{100})", r"\1…\2", sentence
        )  # and no name whole that nobody reads
        super().__init__(
            sentence if len(sentence) <= 2500 else f"{sentence[:1200]} … {sentence[-1200:]}"
        )

    def _render_traceback_(self) -> list[str]:
        """Let Jupyter and papermill show the sentence alone: the stack would only hide it."""
        return [f"InputError: {self}"]


def brief(value: object) -> str:
    """Return a value as one short line for a sentence, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # of an integer of more than 4,300 digits
        return "more digits than Python writes"


def reason(error: Exception) -> str:
    """Return why something failed, as one short line for a sentence."""
    text = (
        (getattr(error, "strerror", None) or str(error) or type(error).__name__)
        .strip()
        .partition("\n")[0]
    )
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_folder_name(name: str, parameter: str) -> None:
    """Raise `InputError` unless `name`, which `parameter` gave, can be a folder's name on every system."""
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(os.fsencode(name)) > 100:
        wanted = "a folder's name of letters, digits and _ . + -, of at most 100 bytes"
        raise InputError(f"{parameter} should be {wanted}, not {brief(name)}.")


def param(
    default: object,
    meaning: str,
    least: float | None = None,
    most: float | None = None,
    **bounds: float,
) -> object:
    """Declare a parameter: default, meaning, range, and other bounds by pydantic's names."""
    return Field(default, description=meaning, ge=least, le=most, **bounds)


class Parameters(BaseModel):
    """A notebook's parameters, under the names of its variables: type, default, range and meaning.

    Errors: `InputError` for an unknown name, a wrong type, a value out of range, or values that
    don't fit together.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def __init__(self, **given: object) -> None:
        try:
            super().__init__(**given)
        except ValidationError as errors:
            error = errors.errors()[0]
            name, value = "".join(map(str, error["loc"])), brief(error["input"])
            sentence = f"{name} {error['msg'].partition(' ')[2]}, not {value}."  # without "Input" or "String"
            if error["type"] == "extra_forbidden":
                sentence = f"there is no parameter {name}: the parameters are {', '.join(type(self).model_fields)}."
            raise (
                error["ctx"]["error"] if error["type"] == "value_error" else InputError(sentence)
            ) from None

    @classmethod
    def of_notebook(cls, variables: dict) -> Self:
        """Return the parameters that a notebook's variables, its `globals()`, spell. Errors: `InputError`."""
        # Papermill writes what it was given into a cell of its own: only there does a misspelt name
        # show.
        cells = [cell for cell in variables["In"] if cell.startswith("# Parameters\n")]
        injected = re.findall(r"^(\w+) = ", cells[-1], re.MULTILINE) if cells else []
        return cls(**{name: variables[name] for name in (*cls.model_fields, *injected)})

    def but(self, **changes: object) -> Self:
        """Return the same with some parameters changed. Errors: `InputError`."""
        return type(self)(**self.model_dump() | changes)
