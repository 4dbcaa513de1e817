"""Read complete runs, from their folders or from the lines of a table.

What comes from a file may be anything: a run is checked here, value by value, or left out. Its
scores and parameters have the same names everywhere, those of a table's columns: "test.mean_iou",
"parameters.SEED".
"""

import os
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

import petseg_utils as pets
from petseg_utils import InputError

COUNTS = [f"{true}_as_{predicted}" for true in pets.CLASSES for predicted in pets.CLASSES]
Whole = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
COLUMNS = {"name": str, "dataset.name": str, "training.seconds": Seconds}
COLUMNS |= {"model.parameters": Whole, "model.flops": Whole}  # FLOPs of one forward pass
COLUMNS |= {f"parameters.{name}": int for name in ("SEED", "IMAGE_SIZE", "SCORE_SIZE")}
SCORES = {"pixel_accuracy": Share, "mean_iou": Share, "images": Whole}
SCORES |= {f"iou.{name}": Share | None for name in pets.CLASSES}
COLUMNS |= {f"{split}.{name}": SCORES[name] for split in ("valid", "test") for name in SCORES}
Row = TypedDict("Row", COLUMNS)
HISTORY = {"epoch": float, "train_loss": float, "valid_pixel_accuracy": Share, "seconds": Seconds}
Epoch = TypedDict("Epoch", HISTORY)  # a line of history.csv


class Run(BaseModel):
    """A complete run."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    row: Row  # as in a table
    parameters: dict[str, bool | int | float | str]
    folder: str = ""  # from the project's root; "" for a line of a table
    history: list[Epoch] = []
    counts: dict[str, dict[str, np.ndarray]] = {}  # by split and image: a confusion matrix, (9,)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.row["name"]

    @property
    def seed(self) -> int:
        """The seed of its weights, batches and held-out images."""
        return self.row["parameters.SEED"]

    @property
    def recipe(self) -> str:
        """All that it was trained by except for its seed: runs that share it repeat one another."""
        names = self.parameters.keys() - pets.Recipe.PLACES - {"SEED"}
        return str([(name, self.parameters[name]) for name in sorted(names)])

    @property
    def test_of(self) -> tuple[str, int, int]:
        """What was scored, the same for runs to compare: dataset, masks' side, test images."""
        side = self.row["parameters.SCORE_SIZE"] or self.row["parameters.IMAGE_SIZE"]
        return self.row["dataset.name"], side, self.row["test.images"]


def find_runs(patterns: str) -> tuple[list[Run], list[str]]:
    """Return the runs of folders and tables (.csv), and a line for each that is broken.

    Patterns start at the project's root. Folders that hold no finished run don't count. Errors:
    `InputError` for patterns that no run fits.
    """
    if any(pattern.startswith("/") or ".." in pattern for pattern in patterns.split()):
        wanted = "folders or tables in the project, counted from its root"
        raise InputError(f"RUNS should be {wanted}, not {patterns!r}.")
    # Not `Path.glob`, which fails for a pattern that is too long or odd to fit anything.
    found = [path for pattern in patterns.split() for path in glob(pattern, root_dir=pets.ROOT)]
    runs, left_out = [], []
    for name in sorted(set(found)):
        path = pets.ROOT / name
        try:
            if path.suffix == ".csv":
                runs += read_table(path)
            elif (path / "metrics.json").exists():
                runs.append(read_folder(path, os.path.normpath(name)))
        except InputError as error:
            left_out.append(" ".join(f"{os.path.normpath(name)} is left out: {error}".split()))
    if not runs:
        raise InputError(f"no folder or table of {patterns!r} has a run: name others in RUNS.")
    return runs, left_out


def read_folder(path: Path, name: str = "") -> Run:
    """Return the run in a folder that the project's root knows as `name`. Errors: `InputError`."""
    with suppress(RecursionError):
        return check_run(pets.read_run(path), name)
    raise InputError(f"there is no complete run in {path} (nested too deep): make the run again.")


def check_run(given: dict, folder: str = "") -> Run:
    """Return a run that `read_run` or a table gave. Errors: `InputError`, with what is wrong."""
    try:
        metrics = {**given}
        history, counts = metrics.pop("history", []), read_counts(metrics.pop("images", []))
        (row,) = pd.json_normalize(metrics).to_dict("records")
        inner = [name.partition(".")[2] for name in row if name.startswith("parameters.")]
        parameters = {name: row[f"parameters.{name}"] for name in inner}
        return Run(row=row, parameters=parameters, folder=folder, history=history, counts=counts)
    except ValidationError as errors:
        error = errors.errors()[0]
        where = ".".join(map(str, error["loc"])).removeprefix("row.")
        told = f"its {where} is not what a run has ({error['msg']})"
    except (LookupError, ValueError, TypeError, OverflowError, AttributeError) as error:
        told = f"it is not what a run has ({type(error).__name__}: {error})"
    raise InputError(f"{told}: make the run again.")


def read_counts(images: list[dict[str, str]]) -> dict[str, dict[str, np.ndarray]]:
    """Return the confusion counts of the rows of images.csv by split and image, each (9,)."""
    counts: dict[str, dict[str, np.ndarray]] = {}
    if images:
        table = pd.DataFrame(images).astype(dict.fromkeys(COUNTS, np.int64))
        if (table[COUNTS] < 0).any(axis=None):
            raise ValueError("images.csv has negative counts")
        for split, rows in table.groupby("split"):
            counts[split] = dict(zip(rows["name"], rows[COUNTS].to_numpy(), strict=True))
    return counts


def to_table(runs: list[Run]) -> pd.DataFrame:
    """Return a table with a line for each run, without the parameters that say where it ran."""
    rows = []
    for run in runs:
        names = [name for name in run.parameters if name not in pets.Recipe.PLACES]
        rows.append(run.row | {f"parameters.{name}": run.parameters[name] for name in names})
    return pd.DataFrame(rows).round(6)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV."""
    text = table.to_csv(index=False, na_rep="null", lineterminator="\n")
    pets.write_atomically(path, lambda file: file.write(text.encode()))


def read_table(path: Path) -> list[Run]:
    """Return the runs that a table has a line for each of; further columns don't count.

    Errors: `InputError`.
    """
    try:
        # "" is a text, and a class that is not there has the IoU null.
        table = pd.read_csv(path, dtype={"name": str}, keep_default_na=False, na_values="null")
        table = table.astype(object).where(table.notna(), None)
        return [check_run(row) for row in table.to_dict("records")]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of runs ({error}): make it again.") from None
