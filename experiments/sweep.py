"""Make many runs of the narrative notebook at once.

    make sweep GRID=mine.json CLUSTER=tcp://host:8786 WORKERS=2

GRID is JSON, {"base": {parameters}, "changes": {"name": {parameters}}, "seeds": [0, 1]}. Each
change is made with each seed. CLUSTER is the address of a Dask scheduler; without it, workers of
this machine's own do the work. Repeating the command goes on where it stopped.
"""

import io
import json
import os
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
        wanted = '{"base": {parameters}, "changes": {"name": {parameters}}, "seeds": [0, 1]}'
        raise InputError(f"{path} is no grid ({error}): it should hold {wanted}.") from None
    return runs


def make_runs(runs: dict[str, dict], cluster: str = "", workers: int = 0) -> list[dict]:
    """Make runs, {name: parameters}, and return for each a dict: run, outcome, why.

    The outcome is "made", "kept" (it was there, complete) or "failed"; one that fails doesn't stop
    the others. An interrupted run goes on from its checkpoint. `cluster` is the address of a Dask
    scheduler; "" starts `workers` processes on this machine (0: one for each GPU, or else for each
    core). Errors: `InputError` before any run starts, for a wrong parameter and an unfit cluster.
    """
    recipes = []
    for name, parameters in runs.items():
        try:
            recipes.append(pets.Recipe(**parameters | {"RUN_NAME": name, "RESUME": True}))
        except InputError as error:
            raise InputError(f"the run {name}: {error}") from None
    workers = workers or min(torch.cuda.device_count() or CPU_COUNT, len(runs))
    with start_workers(cluster, workers) as client:
        check_workers(client)
        futures = [client.submit(make_run, recipe, key=recipe.RUN_NAME) for recipe in recipes]
        done = tqdm(as_completed(futures), "runs", len(recipes), leave=False)
        outcomes = {future.key: outcome_of(future) for future in done}
    return [outcomes[name] for name in runs]


def start_workers(cluster: str, workers: int) -> Client:
    """Return a client of the scheduler at `cluster`, or of new processes. Errors: `InputError`."""
    # No run waits for another on a worker, no profiler takes 4 % of a core, and the cores are
    # shared out to the workers, from which the kernels inherit, unless OMP_NUM_THREADS is given.
    dask_config.set({"distributed.scheduler.worker-saturation": 1.0})
    dask_config.set({"distributed.worker.profile.enabled": False})
    threads = max(1, CPU_COUNT // workers)
    dask_config.set({"distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": threads})
    own = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    own |= {"memory_limit": 0, "silence_logs": 50}  # the kernels need the memory
    try:
        return Client(cluster, timeout="10s") if cluster else Client(**own)
    except (OSError, ValueError) as error:
        what = f"no Dask scheduler answers at {cluster} ({reason(error)})"
        raise InputError(f"{what}: start one, or leave it out.") from None


def check_workers(client: Client) -> None:
    """Raise `InputError` unless a scheduler has workers that can make runs, one at a time each."""
    mend = "start them in its folder, with .venv/bin/python -m dask, workers with --nthreads 1"
    threads = client.nthreads().values()
    if not threads or max(threads) > 1:
        what = "have more than one thread" if threads else "are missing"
        raise InputError(f"this project's workers {what}: {mend}.")
    try:
        client.run_on_scheduler(gpu_of, 0)  # or any other function: Dask would wait for ever
        client.run(gpu_of, 0)
    except Exception as error:  # a worker's error comes back as a bare Exception
        what = f"the scheduler or a worker can't import this project ({error})"
        raise InputError(f"{what}: {mend}.") from None


def make_run(recipe: pets.Recipe) -> dict:
    """Make one run, in the process of a Dask worker, unless it is there; return its outcome.

    Dask calls this again if a worker is lost: the second call finds the first one's checkpoint.
    """
    folder = pets.ROOT / "runs" / recipe.RUN_NAME
    os.environ.update(gpu_of(get_worker().name))
    given = yaml.safe_dump(recipe.model_dump(exclude_defaults=True))
    outcome = "failed"
    try:
        if why := what_is_there(folder, recipe.model_dump()):
            outcome = "kept"
        else:
            with redirect_stdout(io.StringIO()):  # many runs at once have one bar
                execute(NARRATIVE, folder / "notebook.ipynb", ["-y", given])
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
        why = f"its worker failed ({reason(error)}): make the run alone to see why."
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
