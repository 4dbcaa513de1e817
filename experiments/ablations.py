"""What each part buys: runs on the real dataset that differ from a base in one thing, and the table
of their scores.

    python -m experiments.ablations FOLDER [GRID] [CLUSTER]   makes the runs and the table; FOLDER
    holds oxford-iiit-pet python -m experiments.ablations [GRID]                    prints the table
    of the README from the kept results

GRID is ablations (unless given) or optimisers: the runs are those of GRID.json, made as `make
sweep` makes them, on this machine or on a Dask CLUSTER. The results are kept in GRID.csv, a line
for each run.
"""

import csv
import os
from pathlib import Path

import petseg_utils as pets
from experiments import sweep
from experiments.command import as_script

GRIDS = {name: Path(__file__).with_name(f"{name}.json") for name in ("ablations", "optimisers")}


def make(data_dir: str, grid: str, cluster: str = "") -> int:
    """Make the runs of a grid and, once all are complete, the table that is kept; return 1 if one failed."""
    folder = os.path.relpath(pets.find_dataset(data_dir).parent, pets.ROOT)
    runs = {
        name: parameters | {"DATA_DIR": folder}
        for name, parameters in sweep.read_grid(GRIDS[grid]).items()
    }
    outcomes = sweep.make_runs(runs, cluster)
    print(sweep.report(outcomes))
    if any(one["outcome"] == "failed" for one in outcomes):
        return 1
    folders = " ".join(f"runs/{one['run']}" for one in outcomes)
    write_results(sweep.find_runs(folders)[0], grid, GRIDS[grid].with_suffix(".csv"))
    return 0


def write_results(runs: list[sweep.Run], grid: str, path: Path) -> None:
    """Write the table that is kept: each run's line has the interval of its gain over the base of the same seed."""
    found = {run.name: run for run in runs}
    rows = []
    for name in filter(found.get, sweep.read_grid(GRIDS[grid])):  # in the order of the grid
        run, base = found[name], found.get(f"{grid}_base_seed_{found[name].seed}")
        low = high = ""
        if base and base is not run and run.counts and base.counts:
            gain = sweep.estimate(sweep.pixel_accuracy, [run.counts["test"]], [base.counts["test"]])
            low, high = (f"{100 * bound:.2f}" for bound in gain[1:])
        rows.append(
            sweep.to_row(run)
            | {"name": name.removeprefix(f"{grid}_"), "gain_low": low, "gain_high": high}
        )
    pets.write_csv(path, rows)


def read_results(path: Path) -> dict[str, dict[int, dict[str, str]]]:
    """Return the lines of the table that is kept, by change and seed."""
    kept: dict[str, dict[int, dict[str, str]]] = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        change, _, seed = row["name"].rpartition("_seed_")
        kept.setdefault(change, {})[int(seed)] = row
    return kept


def gain(row: dict[str, str], base: dict[str, str]) -> str:
    """Return the gain of a run over the base of its seed in points of pixel accuracy, with its 95 % interval."""
    points = 100 * (float(row["test.pixel_accuracy"]) - float(base["test.pixel_accuracy"]))
    return "" if row is base else f"{points:+.2f} ({row['gain_low']} to {row['gain_high']})"


def table(kept: dict[str, dict[int, dict[str, str]]]) -> str:
    """Return the kept results as Markdown: a row for each change, with means over its seeds and the gain of each."""
    seeds = list(kept["base"])
    names = [
        "changed",
        "pixel accuracy",
        *(f"gain, seed {seed}" for seed in seeds),
        "mean IoU",
        "IoU border",
    ]
    lines = [f"| {' | '.join([*names, 'GFLOP', 'seconds'])} |", "|---" * (len(names) + 2) + "|"]
    for change, rows in kept.items():

        def mean(column: str, rows: dict[int, dict[str, str]] = rows) -> float:
            return sum(float(row[column]) for row in rows.values()) / len(rows)

        cells = [change.replace("_", " "), f"{sweep.cut(100 * mean('test.pixel_accuracy'), 2)} %"]
        cells += [gain(rows[seed], kept["base"][seed]) for seed in seeds]
        cells += [sweep.cut(mean(f"test.{score}"), 3) for score in ("mean_iou", "iou.border")]
        cells += [f"{mean('model.flops') / 1e9:.2f}", f"{mean('training.seconds'):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
