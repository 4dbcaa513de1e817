"""What each part buys: runs on the real dataset that differ from a base in one thing, and the table of their scores.

    python -m benchmarks.ablations FOLDER [CLUSTER]   makes the runs and the table; FOLDER holds oxford-iiit-pet
    python -m benchmarks.ablations                    prints the table of the README from the results that are kept

The runs are those of ablations.json, made as `make sweep` makes them, on this machine or on a Dask CLUSTER. The results
are kept in ablations.csv, a line for each run.
"""

import csv
import os
from pathlib import Path

import petseg_utils as pets
from support import sweep
from support.command import as_script

GRID = Path(__file__).with_suffix(".json")
RESULTS = GRID.with_suffix(".csv")


def make(data_dir: str, cluster: str = "") -> int:
    """Make the runs of the grid and the table of those that are complete; return 1 if one failed."""
    folder = os.path.relpath(pets.find_dataset(data_dir).parent, pets.ROOT)
    grid = {name: parameters | {"DATA_DIR": folder} for name, parameters in sweep.read_grid(GRID).items()}
    outcomes = sweep.make_runs(grid, cluster)
    print(sweep.report(outcomes))
    complete = [one["run"] for one in outcomes if one["outcome"] != "failed"]
    if complete:
        write_results(sweep.find_runs(" ".join(f"runs/{name}" for name in complete))[0])
    return int(len(complete) < len(grid))


def write_results(runs: list[sweep.Run], path: Path = RESULTS) -> None:
    """Write the table that is kept: each run's line has the interval of its gain over the base of the same seed."""
    found = {run.name: run for run in runs}
    rows = []
    for name in filter(found.get, sweep.read_grid(GRID)):  # in the order of the grid
        run, base = found[name], found.get(f"{GRID.stem}_base_seed_{found[name].seed}")
        low = high = ""
        if base and base is not run and run.counts and base.counts:
            gain = sweep.estimate(sweep.pixel_accuracy, [run.counts["test"]], [base.counts["test"]])
            low, high = (f"{100 * bound:.2f}" for bound in gain[1:])
        own = {"name": name.removeprefix(f"{GRID.stem}_"), "gain_low": low, "gain_high": high}
        rows.append(sweep.to_row(run) | own)
    pets.write_csv(path, rows)


def read_results(path: Path = RESULTS) -> dict[str, dict[str, str]]:
    """Return the lines of the table that is kept, by the runs' names: CHANGE_seed_SEED."""
    return {row["name"]: row for row in csv.DictReader(path.read_text().splitlines())}


def percent(row: dict[str, str], score: str) -> str:
    """Return a score of the test images in percent, cut."""
    return sweep.cut(100 * float(row[f"test.{score}"]), 2)


def gain(kept: dict[str, dict[str, str]], name: str) -> str:
    """Return a run's gain in points of pixel accuracy over the base of its seed, with its interval where it is known.

    It is the difference of the scores that are shown, so that rows add up. Of the base with another seed, it is what
    the seed gains.
    """
    change, _, seed = name.rpartition("_seed_")
    base = kept["base_seed_0" if change == "base" else f"base_seed_{seed}"]
    points = float(percent(kept[name], "pixel_accuracy")) - float(percent(base, "pixel_accuracy"))
    low, high = kept[name].get("gain_low"), kept[name].get("gain_high")
    return f"{points:+.2f}" + (f" ({float(low):+.2f} to {float(high):+.2f})" if low else "")


def table(kept: dict[str, dict[str, str]]) -> str:
    """Return the kept results as Markdown, a row for each change of the grid."""
    lines = ["| changed | pixel accuracy | gain | another seed | mean IoU | IoU border | GFLOP |", "|---" * 7 + "|"]
    for name, row in kept.items():
        change, _, seed = name.rpartition("_seed_")
        if seed != "0":
            continue
        again = f"{change}_seed_1"
        cells = [change.replace("_", " "), f"{percent(row, 'pixel_accuracy')} %", gain(kept, name)]
        cells += [gain(kept, again) if again in kept else ""]
        cells += [sweep.cut(float(row[f"test.{score}"]), 3) for score in ("mean_iou", "iou.border")]
        cells += [f"{int(row['model.flops']) / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(data_dir: str = "", cluster: str = "") -> int:
    """Make the runs, if a folder is given, and print the table."""
    failed = make(data_dir, cluster) if data_dir else 0
    print(table(read_results()))
    return failed


if __name__ == "__main__":
    as_script(main, __doc__)
