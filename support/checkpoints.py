"""Checkpoints, and files of tensors: nothing else here opens a file that `torch.save` wrote."""

import io
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from support.parameters import InputError
from support.safe_files import write_atomically
from support.speed import precision_of


def save_tensors(path: Path, content: dict) -> None:
    """Write a file for `load_tensors`: a zip archive, in which every part has a checksum."""
    write_atomically(path, lambda file: torch.save(content, file))


def load_tensors(path: Path) -> dict:
    """Read what `torch.save` wrote, by its checksums, running no code. Errors: `InputError`."""
    try:
        data = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(data) as archive:
            parts = archive.infolist()
            size = sum(part.file_size for part in parts)  # more than there is in a bomb
            marked = any(part.external_attr for part in parts)  # torch reads past these, too
            if size > len(data.getbuffer()) or marked or archive.testzip():
                raise ValueError("a wrong size, mark or checksum, which torch would read past")
        data.seek(0)
        content = torch.load(data, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not finite(content):
            raise ValueError("no dictionary, or one with numbers that are none")
        return content
    except FileNotFoundError:
        what = "name the folder of a run that has it"
        raise InputError(f"there is no file {path}: {what}.") from None
    except Exception:  # zipfile and torch have two dozen ways to fail on a damaged file
        raise InputError(f"{path} is damaged, or not of this project: train again.") from None


def finite(value: object) -> bool:
    """Return whether no NaN and no infinity is in tensors, numbers and containers of them."""
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def identify(model: nn.Module, train_pets: tuple, valid_pets: tuple, recipe: BaseModel) -> dict:
    """Return all that a training depends on, to tell whether a checkpoint belongs to it."""
    return {
        **recipe.model_dump(exclude=recipe.PLACES | {"FLIP"}),  # FLIP only changes the scoring
        "PRECISION": str(precision_of(model, recipe)).removeprefix("torch."),
        "images": list(train_pets.images.shape),
        "sum of labels": int(train_pets.masks.sum()),  # of other images of the same shape, another
        "validation masks": list(valid_pets.masks.shape),
    }


def save_checkpoint(path: Path, parts: dict, identity: dict, history: list[dict]) -> None:
    """Write all that going on needs: the state of each part, and what the training was of."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save_tensors(path, {**states, "recipe": identity, "history": history})


def resume(path: Path, parts: dict, identity: dict, go_on: bool) -> list[dict]:
    """Bring `parts` of a training to the state that a checkpoint keeps, and return its history.

    Unless it should `go_on`, the checkpoint is set aside. Errors: `InputError` if it is damaged,
    or, naming all that differs, of another training.
    """
    if not go_on:
        set_aside(path)
        return []
    saved = load_tensors(path)
    try:
        theirs = saved["recipe"]
        if other := [key for key in identity if theirs.get(key) != identity[key]]:
            told = "; ".join(f"{key} {theirs.get(key)}, not {identity[key]}" for key in other)
            what = f"{path} is of another run, with {told}"
            raise InputError(f"{what}: set RESUME to False, or these.")
        rows = [{key: float(value) for key, value in row.items()} for row in saved["history"]]
        epochs = [row["epoch"] for row in rows]
        if epochs != list(range(1, len(epochs) + 1)):
            raise ValueError("the epochs are not numbered from 1")
        for name, part in parts.items():
            if saved[name].keys() != part.state_dict().keys():
                raise KeyError(name)
            part.load_state_dict(saved[name])
        for weight, state in parts["optimizer"].state.items():
            if {tensor.shape for tensor in state.values() if tensor.ndim} != {weight.shape}:
                raise ValueError("the optimiser is that of other weights")
        return saved["history"]
    except InputError:
        raise
    except Exception:  # in somebody else's file, anything may be missing or of a wrong type
        raise InputError(f"{path} is no checkpoint of this net: set RESUME to False.") from None


def set_aside(checkpoint: Path) -> None:
    """Keep a former checkpoint as `checkpoint.old.pt`, unless the one kept there went further."""
    old = checkpoint.with_suffix(".old.pt")
    if count_epochs(checkpoint) >= count_epochs(old):
        os.replace(checkpoint, old)


def count_epochs(checkpoint: Path) -> int:
    """Return how many epochs a checkpoint has, -1 for a file that is none."""
    with suppress(InputError, LookupError, TypeError):
        return len(load_tensors(checkpoint)["history"])
    return -1


@contextmanager
def undone_if_stopped(
    model: nn.Module, recipe: object, checkpoint: Path | None, history: list[dict]
) -> Iterator[None]:
    """Give the model its first weights back if the training stops, so that it can be called again.

    `model.interrupted` then is the recipe of what was stopped. Errors: `InputError`, for Ctrl-C or
    the notebook's stop button, which says what `checkpoint` keeps.
    """
    first = deepcopy(model.state_dict())
    try:
        yield
    except (KeyboardInterrupt, InputError) as error:
        model.load_state_dict(first)
        model.interrupted = recipe
        if isinstance(error, InputError):
            raise
        kept = f"{checkpoint} keeps {len(history)}" if checkpoint and history else "none was kept"
        how = "run this cell again to go on, or the notebook with RESUME True"
        raise InputError(f"interrupted: of {recipe.EPOCHS} epochs, {kept}: {how}.") from None
    model.interrupted = None
