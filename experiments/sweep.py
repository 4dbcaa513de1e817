"""Make many runs of the narrative notebook at once.

    make sweep GRID=mine.json CLUSTER=tcp://host:8786 WORKERS=2

GRID is JSON, {"base": {parameters}, "changes": {"name": {parameters}}, "seeds": [0, 1]}. Each
change is made with each seed. CLUSTER is the address of a Dask scheduler, of which
experiments/README.md tells; without it, workers of this machine's own do the work. Repeating the
command goes on where it stopped.
"""

import io
import json
import os
import socket
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import torch
import yaml
from dask import config as dask_config
from dask.system import CPU_COUNT
from distributed import Client, Future, as_completed, get_worker
from tqdm import tqdm

import petseg_utils as pets
from experiments.run_notebook import NARRATIVE, execute
from petseg_utils import InputError
from support.parameters import reason
from support.safe_files import git_name

GRID = '{"base": {parameters}, "changes": {"name": {parameters}}, "seeds": [0, 1]}'


def read_grid(path: Path) -> dict[str, dict]:
    """Return each run's parameters by its name, GRID_CHANGE_seed_SEED. Errors: `InputError`."""
    try:
        grid = {"base": {}, "seeds": [0]} | json.loads(path.read_text(encoding="utf-8"))
        runs = {
            f"{path.stem}_{name}_seed_{seed}": grid["base"] | change | {"SEED": seed}
            for name, change in grid["changes"].items()
            for seed in grid["seeds"]
        }
        if not runs or len(grid) > 3:
            raise ValueError(f"{len(runs)} runs, of {', '.join(grid)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no grid ({error}): it should hold {GRID}.") from None
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
    """Make runs, {name: parameters}, and return for each a dict: run, outcome, why.

    The outcome is "made", "kept" (it was there, complete) or "failed"; one that fails doesn't stop
    the others. An interrupted run goes on from its checkpoint. `cluster` is the address of a Dask
    scheduler; "" starts `workers` processes on this machine (0: one for each GPU, or else for each
    core). Errors: `InputError` before any run starts, for a wrong parameter and an unfit cluster.
    """
    recipes = check_runs(runs)
    outcomes: dict[str, dict] = {}
    workers = workers or min(torch.cuda.device_count() or CPU_COUNT, len(runs))
    with start_workers(cluster, workers) as client:
        threads = threads_by_host(client)
        futures = [client.submit(make_run, one, threads, key=one.RUN_NAME) for one in recipes]
        with tqdm(as_completed(futures), "runs", len(recipes), leave=False) as bar:
            bar.set_postfix_str(at_work(client))
            for future in bar:
                outcomes[future.key] = outcome_of(future)
                bar.set_postfix_str(at_work(client))
    return [outcomes[name] for name in runs]


def at_work(client: Client) -> str:
    """Return which runs the workers have in hand."""
    names = sorted(name for names in client.processing().values() for name in names)
    return f"at work: {', '.join(names)}"


def start_workers(cluster: str, workers: int) -> Client:
    """Return a client of the scheduler at `cluster`, or of new processes. Errors: `InputError`."""
    # No run waits for another on a worker, and no profiler takes 4 % of a core.
    dask_config.set({"distributed.scheduler.worker-saturation": 1.0})
    dask_config.set({"distributed.worker.profile.enabled": False})
    own = {"n_workers": workers, "threads_per_worker": 1}
    own |= {"dashboard_address": "127.0.0.1:0"}  # any free port
    own |= {"memory_limit": 0, "silence_logs": 50}  # the kernels need the memory
    try:
        return Client(cluster, timeout="10s") if cluster else Client(**own)
    except (OSError, ValueError) as error:
        what = f"no Dask scheduler answers at {cluster} ({reason(error)})"
        raise InputError(f"{what}: start one, or leave it out.") from None


def this_host() -> tuple[str, int]:
    """Return the name of the machine that this process runs on, and its number of cores."""
    return socket.gethostname(), CPU_COUNT


def threads_by_host(client: Client) -> dict[str, int]:
    """Return how many threads a run may have on each machine: its cores divided by its workers.

    Errors: `InputError` for workers that can't make runs.
    """
    threads = client.nthreads().values()
    if not threads or max(threads) > 1:
        what = "have more than one thread" if threads else "are missing"
        mend = "start some with --nthreads 1, since a run needs a process of its own"
        raise InputError(f"the scheduler's workers {what}: {mend}.")
    try:
        client.run_on_scheduler(this_host)
        hosts = client.run(this_host).values()
    except Exception as error:  # a worker's error comes back as a bare Exception
        what = f"the scheduler or a worker can't import this project ({error})"
        mend = "start them in its folder, with .venv/bin/python -m dask"
        raise InputError(f"{what}: {mend}.") from None
    shares = {host: max(1, cores // workers) for (host, cores), workers in Counter(hosts).items()}
    chosen = os.environ.get("OMP_NUM_THREADS")  # what a user asked for counts
    return dict.fromkeys(shares, int(chosen)) if chosen else shares


def make_run(recipe: pets.Recipe, threads: dict[str, int]) -> dict:
    """Make one run, in the process of a Dask worker, unless it is there; return its outcome.

    Dask calls this again if a worker is lost: the second call finds the first one's checkpoint.
    """
    folder = pets.ROOT / "runs" / recipe.RUN_NAME
    # Dask gives each worker one thread, and the kernel would inherit that.
    own = str(threads.get(socket.gethostname(), 1))
    os.environ.update(OMP_NUM_THREADS=own, MKL_NUM_THREADS=own, **gpu_of(get_worker().name))
    given = yaml.safe_dump(recipe.model_dump(exclude_defaults=True))
    outcome = "failed"
    try:
        if why := what_is_there(folder, recipe.model_dump()):
            outcome = "kept"
        else:
            with redirect_stdout(io.StringIO()):  # many runs at once have one bar
                options = ["-y", given, "--cwd", str(pets.ROOT)]
                execute(NARRATIVE, folder / "notebook.ipynb", options)
            outcome = "made"
    except InputError as error:
        why = str(error)
    return {"run": recipe.RUN_NAME, "outcome": outcome, "why": why}


def gpu_of(worker: str | int) -> dict[str, str]:
    """Return the environment that gives each of this machine's own workers a GPU of its own."""
    gpus = torch.cuda.device_count()
    if not gpus or "CUDA_VISIBLE_DEVICES" in os.environ or not isinstance(worker, int):
        return {}  # whoever starts workers by hand shares GPUs out
    return {"CUDA_VISIBLE_DEVICES": str(worker % gpus)}


def what_is_there(folder: Path, parameters: dict) -> str:
    """Return some words about the complete run with these parameters in a folder, "" without one.

    Errors: `InputError` if the folder holds a run with other parameters.
    """
    try:
        kept = pets.read_run(folder)
        theirs, code = {**kept["parameters"]}, kept.get("versions", {}).get("petseg_utils")
    except (InputError, LookupError, TypeError, AttributeError):
        return ""
    other = [
        f"{name} {theirs.get(name)}, not {value}"
        for name, value in parameters.items()
        if name not in pets.Recipe.PLACES and theirs.get(name) != value
    ]
    if other:
        what = f"there is another run in {folder}, with {'; '.join(other)}"
        raise InputError(f"{what}: give this one another name, or move that one away.")
    if not (folder / "notebook.ipynb").exists():  # written when the last cell is executed
        return ""
    same = code == git_name(Path(pets.__file__))
    return "complete" if same else "complete, made by another version of petseg_utils.py"


def outcome_of(future: Future) -> dict:
    """Return what `make_run` returned, or the same for a run of which Dask knows no result."""
    try:
        return future.result()
    except Exception as error:  # its worker died again and again, or the scheduler is gone ...
        told = f"{type(error).__name__}: {reason(error)}"
        why = f"Dask lost it, perhaps for want of memory ({told}): make the run alone to see why."
    return {"run": future.key, "outcome": "failed", "why": why}


def report(outcomes: list[dict]) -> str:
    """Return how many runs were made, kept and failed, and a line for each to be told of."""
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
