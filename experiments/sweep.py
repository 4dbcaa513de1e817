"""Make many runs of the narrative notebook at once, and say what they differ by and whether the
difference is real.

    make sweep GRID=mine.json CLUSTER=tcp://host:8786 WORKERS=2

GRID is a JSON file: {"base": {parameters}, "changes": {"name": {parameters}, ...}, "seeds": [0,
1]}. Each change is made with each seed. CLUSTER is the address of a Dask scheduler; without it,
this machine's own workers do the work. Repeating the command goes on where it stopped. A scheduler
and its workers, on any number of machines that share the project's folder, are started in that
folder:

    .venv/bin/python -m dask scheduler
    .venv/bin/python -m dask worker tcp://host:8786 --nthreads 1

A file of its own, since nobody has to read it to learn about segmentation. Papermill executes the
notebook, Dask spreads the runs over processes and gives a lost worker's run to another.
"""

import csv
import html
import json
import os
import re
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import ROUND_FLOOR, Decimal
from functools import lru_cache
from glob import glob
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, NamedTuple, Self
from urllib.parse import quote
from uuid import uuid4

import numpy as np
import papermill
import torch
from dask import config as dask_config
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, as_completed, get_worker
from distributed.scheduler import KilledWorker
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tqdm import tqdm
from traitlets.config import Config

import petseg_utils as pets
from petseg_utils import InputError
from support.safe_files import git_name

NOTEBOOK = pets.ROOT / "notebooks" / "pet_segmentation.ipynb"


def cut(value: float, digits: int) -> str:
    """Return `value` with so many decimals, never rounded up: a score shown is a score that was reached."""
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR))


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    pets.write_atomically(
        path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode())
    )


# -------------------------------------------------------------------------------------- making runs


def read_grid(path: Path) -> dict[str, dict]:
    """Return the parameters of each run of a grid, by the run's name: FILE_CHANGE_seed_SEED. Errors: `InputError`."""
    try:
        grid = json.loads(path.read_text())
        strangers = grid.keys() - {"base", "changes", "seeds"}
        changes, seeds = grid["changes"].items(), grid.get("seeds", [0])
        runs = {
            f"{path.stem}_{name}_seed_{seed}": grid.get("base", {}) | change | {"SEED": seed}
            for name, change in changes
            for seed in seeds
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        wanted = '{"base": {parameters}, "changes": {"name": {parameters}}, "seeds": [0, 1]}'
        raise InputError(f"{path} is no grid ({error}): it should hold {wanted}.") from None
    if strangers or not runs:
        what = f"has the key {min(strangers)}" if strangers else "has no runs"
        raise InputError(f'{path} {what}, but a grid has "base", and some "changes" and "seeds".')
    return runs


def check_runs(runs: dict[str, dict]) -> list[pets.Recipe]:
    """Return the recipe of each run. Errors: `InputError` that names the run."""
    recipes = []
    for name, parameters in runs.items():
        try:
            recipes.append(pets.Recipe(**parameters | {"RUN_NAME": name, "RESUME": True}))
        except InputError as error:
            raise InputError(f"the run {name}: {error}") from None
    return recipes


def make_runs(runs: dict[str, dict], cluster: str = "", workers: int = 0) -> list[dict]:
    """Make a set of runs, {name: parameters}, and return for each a dict: run, outcome, why,
    seconds.

    The outcome is "made", "kept" (it was there, complete) or "failed"; one that fails doesn't stop
    the others. An interrupted run goes on from its checkpoint. `cluster` is the address of a Dask
    scheduler; "" starts `workers` processes on this machine (0: one for each GPU, or else for each
    core). Errors: `InputError` before any run starts, for a parameter that is wrong and a cluster
    that can't be used.
    """
    recipes = check_runs(runs)
    outcomes: dict[str, dict] = {}
    with start_workers(
        cluster, workers or min(torch.cuda.device_count() or CPU_COUNT, len(runs))
    ) as client:
        threads = threads_by_host(client)
        topic = f"runs-{uuid4().hex}"  # a scheduler that already runs may serve others, too
        bar = tqdm(desc="runs", total=len(recipes), leave=False)
        started: set[str] = set()

        def show() -> None:
            bar.set_postfix_str("at work: " + ", ".join(sorted(started - outcomes.keys())))

        def note_start(event: tuple[float, str]) -> None:
            started.add(event[1])
            show()

        client.subscribe_topic(topic, note_start)
        futures = {
            client.submit(
                make_run, recipe.model_dump(), threads, topic, key=f"{topic}-{recipe.RUN_NAME}"
            ): recipe
            for recipe in recipes
        }
        for future in as_completed(futures):
            name = futures[future].RUN_NAME
            outcomes[name] = outcome_of(future, name)
            bar.update()
            show()
        bar.close()
    return [outcomes[name] for name in runs]


@contextmanager
def start_workers(cluster: str, workers: int) -> Iterator[Client]:
    """Give a client of the scheduler at `cluster`, or of `workers` processes that end with it. Errors: `InputError`."""
    if not cluster:
        settings = {
            "scheduler.allowed-failures": 3,  # a worker that dies takes its run along; after three more the run fails
            "scheduler.worker-saturation": 1.0,
            "worker.profile.enabled": False,  # it takes 4 % of a core from each run
        }
        dask_config.set({f"distributed.{name}": value for name, value in settings.items()})
        # Any free port for Dask's own page; no limit of memory, which the kernels need, not the
        # workers.
        page = "127.0.0.1:0"
        options = {
            "threads_per_worker": 1,
            "dashboard_address": page,
            "memory_limit": 0,
            "silence_logs": 50,
        }
        with LocalCluster(n_workers=workers, **options) as own, Client(own) as client:
            yield client
        return
    try:
        client = Client(cluster, timeout="10s")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no Dask scheduler answers at {cluster} ({reason}): start one, or leave it out."
        ) from None
    with client:
        threads = client.nthreads().values()
        if not threads or max(threads) > 1:
            what = f"the workers of {cluster} {'have more than one thread' if threads else 'are missing'}"
            raise InputError(
                f"{what}: start some with --nthreads 1, since a run needs a process of its own."
            )
        check_imports(client, cluster)
        yield client


def check_imports(client: Client, cluster: str) -> None:
    """Check that the scheduler and its workers find this project's modules. Errors: `InputError`."""
    try:
        client.run_on_scheduler(this_host)
        client.run(this_host)
    except Exception as error:  # a worker's error comes back as a bare Exception
        where = (
            f"the scheduler at {cluster} or one of its workers can't import this project ({error})"
        )
        raise InputError(
            f"{where}: start them in its folder, with .venv/bin/python -m dask."
        ) from None


def this_host() -> tuple[str, int]:
    """Return the name of the machine that this process runs on, and its number of cores."""
    return socket.gethostname(), CPU_COUNT


def threads_by_host(client: Client) -> dict[str, int]:
    """Return how many threads a run may have on each machine: its cores divided by its workers."""
    hosts = client.run(this_host).values()
    shares = {host: max(1, cores // workers) for (host, cores), workers in Counter(hosts).items()}
    chosen = os.environ.get("OMP_NUM_THREADS")  # what a user asked for counts
    return dict.fromkeys(shares, int(chosen)) if chosen else shares


def make_run(parameters: dict, threads: dict[str, int], topic: str) -> dict:
    """Make one run, in the process of a Dask worker, unless it is there; return its outcome.

    Dask may call this twice for a run, if a worker was lost: the second call finds the first one's
    checkpoint.
    """
    worker = get_worker()
    name, start = parameters["RUN_NAME"], perf_counter()
    worker.log_event(topic, name)
    folder = pets.ROOT / "runs" / name
    try:
        outcome, why = "kept", what_is_there(folder, parameters)
        if not why:
            # Dask gives each worker one thread, and the kernel would inherit that.
            own = str(threads.get(socket.gethostname(), 1))
            os.environ.update(OMP_NUM_THREADS=own, MKL_NUM_THREADS=own, **gpu_of(worker.name))
            execute(parameters, folder)
            outcome = "made"
    except InputError as error:
        outcome, why = "failed", str(error)
    return {"run": name, "outcome": outcome, "why": why, "seconds": perf_counter() - start}


def gpu_of(worker: str | int) -> dict[str, str]:
    """Return the environment that gives each of this machine's own workers, which are numbered, a GPU of its own."""
    gpus = torch.cuda.device_count()
    given = "CUDA_VISIBLE_DEVICES" in os.environ  # by whoever started the workers
    return (
        {"CUDA_VISIBLE_DEVICES": str(int(worker) % gpus)}
        if gpus and not given and str(worker).isdigit()
        else {}
    )


def what_is_there(folder: Path, parameters: dict) -> str:
    """Return "" unless the folder holds the complete run with these parameters, or else a few words
    about it.

    Errors: `InputError` if it holds a run with other parameters.
    """
    try:
        kept = pets.read_run(folder)
        theirs, code = {**kept["parameters"]}, kept.get("versions", {}).get("petseg_utils")
    except (InputError, LookupError, TypeError, AttributeError):
        return ""
    own = {name: value for name, value in parameters.items() if name not in pets.Recipe.PLACES}
    other = [
        f"{name} {theirs.get(name)}, not {value}"
        for name, value in own.items()
        if theirs.get(name) != value
    ]
    if other:
        where = f"there is another run in {folder}, with {'; '.join(other)}"
        raise InputError(f"{where}: give this one another name, or move that one away.")
    if not ran_to_its_end(folder / "notebook.ipynb"):
        return ""
    same = code == git_name(Path(pets.__file__))
    return "complete" if same else "complete, made by another version of petseg_utils.py"


def ran_to_its_end(notebook: Path) -> bool:
    """Return whether papermill executed the notebook's last cell; results are there some cells before that."""
    try:
        record = json.loads(notebook.read_text())["metadata"]["papermill"]
        return bool(record["end_time"]) and not record["exception"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def execute(parameters: dict, folder: Path) -> None:
    """Execute the notebook with `parameters` into its run's folder. Errors: `InputError` if a cell fails."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "notebook.ipynb"
    given = {
        name: value
        for name, value in parameters.items()
        if value != pets.Recipe.model_fields[name].default
    }
    try:
        with warnings.catch_warnings(action="ignore"), TemporaryDirectory() as sockets:
            # Sockets that are files: kernels that start at the same moment may draw the same ports
            # (papermill's 511).
            private = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
            quiet = [
                "--log-level=CRITICAL"
            ]  # a kernel's log would stand in the middle of the progress bar
            papermill.execute_notebook(
                NOTEBOOK,
                output,
                given,
                request_save_on_cell_execute=False,  # once at its end: a hundred runs share one disk
                progress_bar=False,
                cwd=pets.ROOT,
                config=private,
                extra_arguments=quiet,
            )
    except PapermillExecutionError as error:
        told = (
            error.evalue
            if error.ename == "InputError"
            else f"{error.ename}: {error.evalue}, see {output}."
        )
        raise InputError(" ".join(told.split())) from None
    except DeadKernelError:
        raise InputError(
            "its kernel died, perhaps for want of memory: make the run alone to see where."
        ) from None
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error}): make room, or change its permissions."
        ) from None


def outcome_of(future: object, name: str) -> dict:
    """Return what `make_run` returned, or the same for a run of which Dask knows no result."""
    try:
        return future.result()
    except KilledWorker:
        why = "its worker died again and again, perhaps for want of memory: make the run alone to see why."
    except Exception as error:  # the scheduler is gone, or the workers are of another version
        why = f"Dask lost it ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]}): make the sweep again."
    return {"run": name, "outcome": "failed", "why": why, "seconds": 0.0}


def report(outcomes: list[dict]) -> str:
    """Return how many runs were made, kept and failed, and a line for each that failed or is of another version."""
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    lines = [", ".join(f"{counts[outcome]} {outcome}" for outcome in ("made", "kept", "failed"))]
    told = [outcome for outcome in outcomes if outcome["why"] not in ("", "complete")]
    return "\n".join(lines + [f"{one['outcome']} {one['run']}: {one['why']}" for one in told])


def main(grid: str, cluster: str = "", workers: str = "0") -> int:
    """Make the runs of a grid, tell what became of them, and return 1 if one failed."""
    if not workers.isdigit():
        raise InputError(f"WORKERS should be a number of processes, not {workers}.")
    outcomes = make_runs(read_grid(Path(grid)), cluster, int(workers))
    print(report(outcomes))
    return int(any(outcome["outcome"] == "failed" for outcome in outcomes))


# ----------------------------------------------------------------------------------- comparing runs

Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Scored(BaseModel):
    """The scores of a split."""

    pixel_accuracy: Share
    mean_iou: Share
    iou: dict[str, Share | None]
    images: int = Field(ge=1)

    @model_validator(mode="after")
    def has_the_classes(self) -> Self:
        """Check that the classes are ours."""
        if list(self.iou) != list(pets.CLASSES):
            raise ValueError(f"the classes should be {', '.join(pets.CLASSES)}")
        return self


class Dataset(BaseModel):
    """What a run was trained on."""

    name: str


class Model(BaseModel):
    """The size of a net."""

    parameters: int = Field(ge=1)
    flops: int = Field(ge=1)  # of one image's forward pass


class Times(BaseModel):
    """How long a training took."""

    seconds: Seconds


class Epoch(BaseModel):
    """A line of history.csv."""

    epoch: float
    train_loss: float
    valid_pixel_accuracy: Share
    seconds: Seconds


class Run(BaseModel):
    """A complete run, checked field by field: what comes from a file may be anything."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    folder: str = ""  # from the project's root; "" for a line of a table
    parameters: dict[str, bool | int | float | str]
    dataset: Dataset
    model: Model
    training: Times
    valid: Scored
    test: Scored
    history: list[Epoch] = []
    counts: dict[
        str, dict[str, np.ndarray]
    ] = {}  # by split and image: the nine counts of a confusion matrix, (9,)

    @property
    def recipe(self) -> str:
        """All that the run was trained by except for its seed: runs that share it are repetitions of one another."""
        return json.dumps(
            {k: v for k, v in self.parameters.items() if k not in pets.Recipe.PLACES | {"SEED"}}
        )

    @property
    def seed(self) -> int:
        """The seed of its weights, batches and held-out images."""
        return int(self.parameters["SEED"])

    @property
    def test_of(self) -> tuple[str, int, int]:
        """What the scores are of, and only runs that share it can be compared: dataset, masks' side, test images."""
        side = int(self.parameters["SCORE_SIZE"] or self.parameters["IMAGE_SIZE"])
        return self.dataset.name, side, self.test.images


def find_runs(patterns: str) -> tuple[list[Run], list[str]]:
    """Return the runs that folders and tables (.csv), patterns from the project's root, hold; and
    what was left out.

    What was left out is a line for each run that is broken. Folders that hold no finished run don't
    count. Errors: `InputError` for patterns that no run fits.
    """
    if any(pattern.startswith("/") or ".." in pattern for pattern in patterns.split()):
        raise InputError(
            f"RUNS should be folders or tables in the project, counted from its root, not {patterns!r}."
        )
    # Not `Path.glob`, which raises an error for a pattern that is too long or odd to fit anything.
    paths = sorted(
        {
            pets.ROOT / path
            for pattern in patterns.split()
            for path in glob(pattern, root_dir=pets.ROOT)
        }
    )
    runs, left_out = [], []
    for path in paths:
        try:
            if path.suffix == ".csv":
                runs += read_table(path)
            elif (path / "metrics.json").exists():
                runs.append(check_run(pets.read_run(path), os.path.relpath(path, pets.ROOT)))
        except (InputError, RecursionError, csv.Error) as error:
            told = " ".join(f"{os.path.relpath(path, pets.ROOT)} is left out: {error}".split())
            left_out.append(told.removesuffix(".") + ".")
    if not runs:
        raise InputError(
            f"no folder or table of {patterns!r} has a complete run: name others in RUNS."
        )
    return runs, left_out


def check_run(given: dict, folder: str = "") -> Run:
    """Return a run that `read_run` or a table gave, checked. Errors: `InputError` that says what is wrong in it."""
    try:
        counts: dict[str, dict] = {}
        for row in given.get("images", []):
            matrix = np.array(
                [
                    row[f"{true}_as_{predicted}"]
                    for true in pets.CLASSES
                    for predicted in pets.CLASSES
                ]
            )
            counts.setdefault(row["split"], {})[row["name"]] = matrix.astype(np.int64)
        run = Run(**given | {"folder": folder, "counts": counts})
        _ = run.recipe, run.seed, run.test_of
        if any((matrix < 0).any() for split in counts.values() for matrix in split.values()):
            raise ValueError("images.csv has negative counts")
        if given.get("history") == []:  # a table's line has none
            raise ValueError("history.csv has no epochs")
    except ValidationError as errors:
        error = errors.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise InputError(
            f"its {where} is not what a run has ({error['msg']}): make the run again."
        ) from None
    except (KeyError, ValueError, TypeError, OverflowError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"it is not what a run has ({told}): make the run again.") from None
    return run


def to_row(run: Run) -> dict[str, str]:
    """Return a run as the line of a table: what matters of its metrics, under names like "test.mean_iou"."""
    row = {"name": run.name}
    parts = run.model_dump(include={"dataset", "model", "training", "valid", "test", "parameters"})
    parts["parameters"] = {
        key: value for key, value in run.parameters.items() if key not in pets.Recipe.PLACES
    }

    def flatten(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(f"{prefix}.{key}", inner)
        else:
            number = round(value, 6) if isinstance(value, float) else value
            row[prefix] = value if isinstance(value, str) else json.dumps(number)

    for name, part in parts.items():
        flatten(name, part)
    return row


def read_table(path: Path) -> list[Run]:
    """Return the runs that a table has a line for each of; further columns don't count. Errors: `InputError`."""

    def value_of(text: str) -> object:
        try:
            return json.loads(text)
        except ValueError:
            return text

    runs = []
    try:
        for row in csv.DictReader(path.read_text().splitlines()):
            metrics: dict = {"name": row.pop("name")}
            for key, text in row.items():
                *parents, last = key.split(".")
                part = metrics
                for parent in parents:
                    part = part.setdefault(parent, {})
                part[last] = value_of(text)
            runs.append(check_run(metrics))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no table of runs ({error}): make it again.") from None
    return runs


# --------------------------------------------------------------------------------------- statistics


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the share of pixels that are right, by confusion counts (..., K * K)."""
    return counts[..., :: len(pets.CLASSES) + 1].sum(-1) / counts.sum(-1)


def iou(counts: np.ndarray) -> np.ndarray:
    """Return the IoU of each class, (..., K), by confusion counts (..., K * K); NaN for a class that is not there."""
    matrix = counts.reshape(*counts.shape[:-1], len(pets.CLASSES), len(pets.CLASSES))
    right = matrix.diagonal(axis1=-2, axis2=-1)
    union = matrix.sum(-1) + matrix.sum(-2) - right
    return np.divide(right, union, out=np.full(right.shape, np.nan), where=union > 0)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that are there, by confusion counts (..., K * K)."""
    return np.nanmean(iou(counts), axis=-1)


def border_iou(counts: np.ndarray) -> np.ndarray:
    """Return the IoU of the border, by confusion counts (..., K * K)."""
    return iou(counts)[..., -1]


# The same scores of a whole split, for runs whose images' counts are not known.
WHOLE: dict[Callable, Callable[[Scored], float]] = {
    pixel_accuracy: lambda split: split.pixel_accuracy,
    mean_iou: lambda split: split.mean_iou,
    border_iou: lambda split: split.iou["border"] or 0.0,
}


class Estimate(NamedTuple):
    """A score, or the difference of two, with its 95 % interval; NaN where the images' counts are not known."""

    value: float
    low: float
    high: float

    @property
    def points(self) -> str:
        """The difference of two scores in percentage points."""
        value, low, high = (f"{100 * number:+.2f}" for number in self)
        return value if np.isnan(self.low) else f"{value} ({low} to {high})"

    @property
    def verdict(self) -> str:
        """What the interval says about a gain."""
        return "yes" if self.low > 0 else "no, it harms" if self.high < 0 else "can't be told"


@lru_cache(maxsize=2)
def resample(images: int, times: int = 2000) -> np.ndarray:
    """Return how often each image occurs in so many draws of as many images, with replacement: (times, images)."""
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), times)
    return draws.astype(np.float64)  # floats multiply fast, and pixel counts stay exact up to 2**53


def estimate(
    score: Callable[[np.ndarray], np.ndarray],
    runs: list[dict[str, np.ndarray]],
    bases: list[dict] | None = None,
) -> Estimate:
    """Return the mean score of runs, or its difference from that of their bases, with a bootstrap
    interval over images.

    A run is given by the confusion counts of its images, {name: (K * K,)}. Runs and bases are
    paired: a draw has the same images for all, so that what is hard for every net cancels out. The
    interval says what other images might have given, not what other seeds might. Errors:
    `InputError` for a run and a base with other images.
    """
    if bases and any(run.keys() != base.keys() for run, base in zip(runs, bases, strict=True)):
        raise InputError(
            "a run and its base were scored on other images: compare runs with the same LIMIT and SEED."
        )
    names = sorted({name for run in runs for name in run})
    weights = np.vstack([np.ones(len(names)), resample(len(names))])  # first the images as they are

    def scored(counts: dict[str, np.ndarray]) -> np.ndarray:
        none = np.zeros(len(pets.CLASSES) ** 2)  # another seed may have held out other images
        return score(weights @ np.array([counts.get(name, none) for name in names]))

    drawn = np.mean([scored(run) for run in runs], axis=0)
    if bases:
        drawn = drawn - np.mean([scored(base) for base in bases], axis=0)
    return Estimate(float(drawn[0]), *map(float, np.nanpercentile(drawn[1:], [2.5, 97.5])))


# --------------------------------------------------------------------------------------- comparison


class Repeated(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run]

    def mean(self, score: Callable[[Run], float]) -> float:
        """Return the mean of a score over the seeds."""
        return float(np.mean([score(run) for run in self.runs]))

    def shown(self, score: Callable[[Run], float]) -> str:
        """Return the mean of a score in percent, cut, and, of several seeds, half of their range, rounded up."""
        every = [100 * score(run) for run in self.runs]
        spread = f" ± {-float(cut((min(every) - max(every)) / 2, 2)):.2f}" if len(every) > 1 else ""
        return cut(float(np.mean(every)), 2) + spread

    def gain(self, base: "Repeated", split: str, score: Callable = mean_iou) -> Estimate:
        """Return the gain over a base on a split, over the seeds that both have; without images' counts no interval."""
        seeds = {run.seed: run for run in base.runs}
        pairs = [(run, seeds[run.seed]) for run in self.runs if run.seed in seeds]
        if not pairs:
            return Estimate(*[float("nan")] * 3)
        if all(split in run.counts for pair in pairs for run in pair):
            own, others = ([run.counts[split] for run in runs] for runs in zip(*pairs, strict=True))
            return estimate(score, own, others)
        change = np.mean(
            [WHOLE[score](getattr(a, split)) - WHOLE[score](getattr(b, split)) for a, b in pairs]
        )
        return Estimate(float(change), float("nan"), float("nan"))


def group_runs(runs: list[Run]) -> dict[tuple, list[Repeated]]:
    """Return the runs by what they were tested on, folded over their seeds, the best on the validation images first."""
    groups: dict[tuple, list[Repeated]] = {}
    ordered = sorted(runs, key=lambda run: (run.test_of, run.recipe, run.seed))
    for (test_of, _), same in groupby(ordered, key=lambda run: (run.test_of, run.recipe)):
        repeated = list(same)
        name = re.sub(r"_seed_\d+$", "", repeated[0].name)
        groups.setdefault(test_of, []).append(Repeated(name, repeated))
    for rows in groups.values():
        rows.sort(key=lambda row: -row.mean(lambda run: run.valid.mean_iou))
    return groups


def find_base(rows: list[Repeated], base: str) -> Repeated | None:
    """Return the row called `base`, or whose name ends in _`base`."""
    return next((row for row in rows if row.name == base or row.name.endswith(f"_{base}")), None)


def differing(runs: list[Run]) -> list[str]:
    """Return the parameters in which runs differ, but for the places and the seed."""
    names = dict.fromkeys(name for run in runs for name in run.parameters)
    names = [name for name in names if name not in pets.Recipe.PLACES | {"SEED"}]
    return [name for name in names if len({str(run.parameters.get(name, "–")) for run in runs}) > 1]


def comparison(rows: list[Repeated], base: Repeated | None) -> list[dict[str, object]]:
    """Return the rows of a table for `html_table`: scores in percent, gains over the base in points."""
    different = differing([run for row in rows for run in row.runs])
    table = []
    for place, row in enumerate(rows, 1):
        first = row.runs[0]
        gains = [
            row.gain(base, split).points if base and base is not row else "–"
            for split in ("valid", "test")
        ]
        table.append({
            "run": row.name, "place": place, "seeds": ", ".join(str(run.seed) for run in row.runs),
            "validation mean IoU, %": row.shown(lambda run: run.valid.mean_iou), "gain (95 %)": gains[0],
            "test mean IoU, %": row.shown(lambda run: run.test.mean_iou), "test gain (95 %)": gains[1],
            "test accuracy, %": row.shown(lambda run: run.test.pixel_accuracy),
            "net's parameters": f"{first.model.parameters:,}", "GFLOP": f"{first.model.flops / 1e9:.3g}",
            "seconds": f"{row.mean(lambda run: run.training.seconds):.0f}",
            **{name: first.parameters.get(name, "–") for name in different},
        })  # fmt: skip
    return table


def links(rows: list[Repeated]) -> str:
    """Return HTML with a link to the notebook of each run that has a folder, from a folder of the project."""
    found = [
        run
        for row in rows
        for run in row.runs
        if (pets.ROOT / run.folder / "notebook.ipynb").is_file()
    ]
    linked = [
        f'<a href="../{quote(run.folder)}/notebook.ipynb">{html.escape(run.name)}</a>'
        for run in found
    ]
    return f"<p>Notebooks: {', '.join(linked)}</p>" if linked else ""


def pareto_front(costs: list[float], gains: list[float]) -> list[int]:
    """Return which points no other beats at no more cost, from the cheapest to the dearest."""
    front = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if not front or gains[i] > gains[front[-1]]:
            front.append(i)
    return front


def moved_most(run: Run, base: Run, count: int = 2) -> dict[str, float]:
    """Return the test images whose share of right pixels gained most, then those that lost most: {name: change}."""
    own, others = run.counts.get("test", {}), base.counts.get("test", {})
    both = [name for name in own if name in others]
    change = {
        name: float(pixel_accuracy(own[name]) - pixel_accuracy(others[name])) for name in both
    }
    ranked = sorted(change, key=lambda name: -change[name])
    return {name: change[name] for name in dict.fromkeys(ranked[:count] + ranked[-count:])}
