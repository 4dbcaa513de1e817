"""What each part buys: runs on the real dataset that differ in one thing from a base, and a table.

    python -m experiments.ablations FOLDER [GRID] [CLUSTER]   makes the runs and the table
    python -m experiments.ablations [GRID]                    prints the README's from kept results

FOLDER holds oxford-iiit-pet. GRID is ablations (unless given) or optimisers: the runs are those of
GRID.json, made as `make sweep` makes them, on this machine or on a Dask CLUSTER. The results are
kept in GRID.csv, a line for each run.
"""

import os
from pathlib import Path

import pandas as pd

import petseg_utils as pets
from experiments import sweep
from experiments.command import as_script
from experiments.compare import estimate
from experiments.read_runs import Run, find_runs, to_table, write_table
from experiments.tables import cut, markdown

GRIDS = {name: Path(__file__).with_name(f"{name}.json") for name in ("ablations", "optimisers")}


def make(data_dir: str, grid: str, cluster: str = "") -> int:
    """Make the runs of a grid and, if all are complete, the kept table; return 1 if one failed."""
    folder = os.path.relpath(pets.find_dataset(data_dir).parent, pets.ROOT)
    runs = sweep.read_grid(GRIDS[grid])
    for parameters in runs.values():
        parameters["DATA_DIR"] = folder
    outcomes = sweep.make_runs(runs, cluster)
    print(sweep.report(outcomes))
    if any(one["outcome"] == "failed" for one in outcomes):
        return 1
    found, _ = find_runs(" ".join(f"runs/{one['run']}" for one in outcomes))
    found.sort(key=lambda run: list(runs).index(run.name))  # in the order of the grid
    write_results(found, grid, GRIDS[grid].with_suffix(".csv"))
    return 0


def write_results(runs: list[Run], grid: str, path: Path) -> None:
    """Write the table that is kept, with the interval of each gain over the base of its seed."""
    bases = {run.seed: run for run in runs if run.name.startswith(f"{grid}_base_seed_")}
    table = to_table(runs)
    table["name"] = table["name"].str.removeprefix(f"{grid}_")
    for place, run in enumerate(runs):
        base = bases.get(run.seed, run)
        if base is not run:
            gain = estimate("pixel_accuracy", [run.counts["test"]], [base.counts["test"]])
            table.loc[place, ["gain_low", "gain_high"]] = [100 * gain.low, 100 * gain.high]
    write_table(path, table.round({"gain_low": 2, "gain_high": 2}))


def read_results(path: Path) -> pd.DataFrame:
    """Return the table that is kept, by change and seed, in its order."""
    kept = pd.read_csv(path, na_values=["null"])
    kept[["change", "seed"]] = kept["name"].str.rsplit("_seed_", n=1, expand=True)
    return kept.set_index(["change", "seed"])


def table(kept: pd.DataFrame) -> str:
    """Return the kept results as Markdown, a row a change: means over its seeds, and each gain."""
    points = 100 * (kept["test.pixel_accuracy"] - kept["test.pixel_accuracy"].loc["base"])
    seeds = list(kept.loc["base"].index)
    heads = ["changed", "pixel accuracy", *(f"gain, seed {seed}" for seed in seeds)]
    lines = []
    for change, runs in kept.groupby("change", sort=False):
        mean = runs.mean(numeric_only=True)
        cells = [change.replace("_", " "), f"{cut(100 * mean['test.pixel_accuracy'], 2)} %"]
        for seed in seeds:
            run = runs.loc[change, seed]
            gain = f"{points[change, seed]:+.2f} ({run['gain_low']:.2f} to {run['gain_high']:.2f})"
            cells.append("" if change == "base" else gain)
        cells += [cut(mean[f"test.{score}"], 3) for score in ("mean_iou", "iou.border")]
        cells += [f"{mean['model.flops'] / 1e9:.2f}", f"{mean['training.seconds']:.0f}"]
        lines.append(cells)
    return markdown([*heads, "mean IoU", "IoU border", "GFLOP", "seconds"], lines)


def main(data_dir: str = "", grid: str = "ablations", cluster: str = "") -> int:
    """Make the runs, if a folder is given, and print the table."""
    if data_dir in GRIDS:
        data_dir, grid = "", data_dir
    if grid not in GRIDS:
        raise pets.InputError(f"there is no grid {grid!r}: name {' or '.join(GRIDS)}.")
    if data_dir and make(data_dir, grid, cluster):
        return 1
    print(table(read_results(GRIDS[grid].with_suffix(".csv"))))
    return 0


if __name__ == "__main__":
    as_script(main, __doc__)
