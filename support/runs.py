"""The folder of a run, a contract: results and weights, written whole or not at all, read back."""

import csv
import json
from copy import deepcopy
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from support.checkpoints import load_tensors, save_tensors
from support.machine import room_for
from support.parameters import InputError
from support.safe_files import git_name, own_folder, write_atomically, write_csv

ROOT = Path(__file__).resolve().parent.parent


def open_run(recipe: BaseModel) -> Path:
    """Return runs/RUN_NAME, this process's alone until it ends. Errors: as in `own_folder`."""
    folder = ROOT / "runs" / recipe.RUN_NAME
    own_folder(folder, room_for(recipe))
    return folder


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the model's weights in float16, which halves the file and changes hardly any label."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        # What float16 can't hold stays as it is: a BatchNorm's variance may be above 65,504.
        if tensor.is_floating_point() and tensor.half().isfinite().all():
            weights[name] = tensor.half()
    save_tensors(path, weights)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load what `save_weights` wrote into a model with any names. Errors: `InputError`."""
    tensors = load_tensors(path)
    try:
        if tensors.keys() != model.state_dict().keys():
            tensors = dict(zip(names_in_use(model), tensors.values(), strict=True))
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, AttributeError, ValueError):
        what = "is damaged, or holds the weights of another architecture"
        raise InputError(f"{path} {what}: train again.") from None


def names_in_use(model: nn.Module) -> list[str]:
    """Return the names of a net's tensors, as in its state_dict, in the order of their use."""
    model = deepcopy(model).to("meta").eval()
    names: dict[str, None] = {}
    for prefix, part in model.named_modules():
        own = [name for name in part.state_dict() if "." not in name]
        own = {f"{prefix}.{name}".removeprefix("."): None for name in own}  # the net has no prefix
        part.register_forward_pre_hook(lambda *_, own=own: names.update(own))
    with torch.no_grad():
        model(torch.empty(1, 3, 256, 256, device="meta"))
    return list(names)


def write_run(folder: Path, metrics: dict, history: list[dict], images: list[dict]) -> None:
    """Write `history.csv`, `images.csv` and, last, `metrics.json`: a run that has it is whole.

    To `metrics` it adds the versions of torch and of the project's code, by git's names of files.
    """
    rooms = [*ROOT.glob("shapes/[!_]*.py"), *ROOT.glob("support/[!_]*.py")]
    code = {file.stem: git_name(file) for file in (ROOT / "petseg_utils.py", *sorted(rooms))}
    versions = {"torch": torch.__version__, **code}
    text = json.dumps({**metrics, "versions": versions}, indent=2) + "\n"
    write_csv(folder / "history.csv", history)
    write_csv(folder / "images.csv", images)
    write_atomically(folder / "metrics.json", lambda file: file.write(text.encode()))


def read_run(folder: Path) -> dict:
    """Return a run's metrics with its `name`, `history` and `images`, which an old run may lack.

    Errors: `InputError` if the folder holds no complete run.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        history = read_rows(folder / "history.csv")
        images = read_rows(folder / "images.csv") if (folder / "images.csv").exists() else []
        numbers = [{key: float(text) for key, text in row.items()} for row in history]
        if not numbers:
            raise ValueError("history.csv has no rows")
        return {"name": folder.name, **metrics, "history": numbers, "images": images}
    except (OSError, ValueError, TypeError) as error:
        why = f"there is no complete run in {folder} ({error})"
        raise InputError(f"{why}: make the run again.") from None


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table with a header."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
