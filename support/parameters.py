"""Parameters of a notebook, declared once, and mistakes, told in one sentence."""

import os
import re
import reprlib
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class InputError(ValueError):
    """A mistake a user can make, in one sentence: what is wrong, where, and what to do."""

    def __init__(self, sentence: str) -> None:
        # One line, whatever a file's name holds, and no name so long that nobody reads it.
        sentence = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", sentence)
        sentence = re.sub(r"(\S{100})\S{100,}(\S{100})", r"\1…\2", sentence)
        if len(sentence) > 2500:
            sentence = f"{sentence[:1200]} … {sentence[-1200:]}"
        super().__init__(sentence)

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
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = text.strip().partition("\n")[0]
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_folder_name(name: str, parameter: str) -> None:
    """Raise `InputError` unless `name`, given by `parameter`, can name a folder on every system."""
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(os.fsencode(name)) > 100:
        wanted = "a folder's name of letters, digits and _ . + -, of at most 100 bytes"
        raise InputError(f"{parameter} should be {wanted}, not {brief(name)}.")


def read_sides(parameter: str, text: str) -> list[int]:
    """Return the sides that "2 at 64, 3 at 128" names, 64 twice and 128 three times."""
    part = r"([1-9]\d{0,2}) at ([1-9]\d{0,3})"
    if not re.fullmatch(f"({part}(, {part})*)?", text):
        raise InputError(f'{parameter} should be like "2 at 64, 3 at 128", not {brief(text)}.')
    return [int(side) for count, side in re.findall(part, text) for _ in range(int(count))]


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

    Errors: `InputError` for an unknown name, a wrong type, and a value that is out of range or
    doesn't fit another.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def __init__(self, **given: object) -> None:
        try:
            super().__init__(**given)
        except ValidationError as errors:
            error = errors.errors()[0]
            if error["type"] == "value_error":  # our own, of values that don't fit together
                raise error["ctx"]["error"] from None
            name = "".join(map(str, error["loc"]))
            if error["type"] == "extra_forbidden":
                known = f"the parameters are {', '.join(type(self).model_fields)}"
                raise InputError(f"there is no parameter {name}: {known}.") from None
            wanted = error["msg"].partition(" ")[2]  # without pydantic's "Input" or "String"
            raise InputError(f"{name} {wanted}, not {brief(error['input'])}.") from None

    @classmethod
    def of_notebook(cls, variables: dict) -> Self:
        """Return the parameters among a notebook's variables, its `globals()`.

        Papermill writes what it was given into a cell of its own: only there does a misspelt name
        show. Errors: `InputError`.
        """
        cells = [cell for cell in variables["In"] if cell.startswith("# Parameters\n")]
        injected = re.findall(r"^(\w+) = ", cells[-1], re.MULTILINE) if cells else []
        return cls(**{name: variables[name] for name in (*cls.model_fields, *injected)})

    def but(self, **changes: object) -> Self:
        """Return the same with some parameters changed. Errors: `InputError`."""
        return type(self)(**self.model_dump() | changes)
