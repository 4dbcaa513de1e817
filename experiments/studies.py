"""The studies that the README shows: what parts buy, Muon or AdamW, BatchNorm's statistics, a peer.

    python -m experiments.studies NAME FOLDER [CLUSTER]   makes its runs and keeps their results
    python -m experiments.studies NAME                    prints its table from the kept results

FOLDER holds oxford-iiit-pet. NAME is one of these:
- ablations, optimisers: the runs of NAME.json differ in one thing from a base. They are made as
  `make sweep` makes them, here or on a Dask CLUSTER. NAME.csv keeps a line for each.
- norm_statistics: the base is trained, and after every epoch the same averaged weights are scored
  twice on the held-out images, with statistics that training gathered and that were measured anew.
- peer: segmentation_models_pytorch's Unet with a ResNet-18 (experiments/requirements.txt) trains
  beside ours, from scratch, by the base's recipe at 32 base channels, with Muon and with AdamW.
"""

import json
import os
from copy import deepcopy
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import petseg_utils as pets
from experiments import sweep
from experiments.command import as_script
from experiments.compare import estimate
from experiments.read_runs import Run, find_runs, to_table, write_table
from experiments.tables import cut, markdown, write_json
from support.speed import precision_of

FOLDER = Path(__file__).parent
GRIDS = {name: FOLDER / f"{name}.json" for name in ("ablations", "optimisers")}

# ------------------------------------------------------------------------------- grids, by notebook


def make_grid(data_dir: str, grid: str, cluster: str = "") -> None:
    """Make the runs of a grid and, if all are complete, the kept table. Errors: `InputError`."""
    folder = os.path.relpath(pets.find_dataset(data_dir).parent, pets.ROOT)
    runs = sweep.read_grid(GRIDS[grid])
    outcomes = sweep.make_runs({run: runs[run] | {"DATA_DIR": folder} for run in runs}, cluster)
    print(sweep.report(outcomes))
    if any(one["outcome"] == "failed" for one in outcomes):
        raise pets.InputError("the kept table stays: see to what failed, and make the grid again.")
    found, _ = find_runs(" ".join(f"runs/{name}" for name in runs))
    found.sort(key=lambda run: list(runs).index(run.name))  # in the order of the grid
    write_results(found, grid, GRIDS[grid].with_suffix(".csv"))


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


def grid_table(kept: pd.DataFrame) -> str:
    """Return the kept results as Markdown, a row a change: means over its seeds, and each gain."""
    accuracy = kept["test.pixel_accuracy"]
    kept = kept.assign(gain=100 * (accuracy - accuracy.loc["base"]))
    rows = []
    for change, runs in kept.groupby("change", sort=False):
        mean = runs.mean(numeric_only=True)
        row = {"changed": change.replace("_", " ")}
        row["pixel accuracy"] = f"{cut(100 * mean['test.pixel_accuracy'], 2)} %"
        for (_, seed), run in runs.iterrows():
            gain = f"{run['gain']:+.2f} ({run['gain_low']:.2f} to {run['gain_high']:.2f})"
            row[f"gain, seed {seed}"] = "" if change == "base" else gain
        row["mean IoU"] = cut(mean["test.mean_iou"], 3)
        row["IoU border"] = cut(mean["test.iou.border"], 3)
        row["GFLOP"] = f"{mean['model.flops'] / 1e9:.2f}"
        row["seconds"] = f"{mean['training.seconds']:.0f}"
        rows.append(row)
    return markdown(rows)


# ------------------------------------------------------------------------------- BatchNorm, a peer


def load(folder: Path, recipe: pets.Recipe) -> tuple[pets.Pets, pets.Pets, pets.Pets]:
    """Return the training, validation and test images as the notebook would load them."""
    side, scored = recipe.IMAGE_SIZE, recipe.SCORE_SIZE
    names = pets.read_split(folder, "trainval", recipe.LIMIT)
    learned, held_out = pets.hold_out(names, recipe.HOLD_OUT, recipe.SEED)
    test = pets.read_split(folder, "test", recipe.LIMIT)
    return (
        pets.load_pets(folder, learned, side),
        pets.load_pets(folder, held_out, side, mask_side=scored),
        pets.load_pets(folder, test, side, mask_side=scored),
    )


def with_statistics_of(averaged: nn.Module, model: nn.Module) -> nn.Module:
    """Return a copy of the averaged weights with the statistics that training gave `model`."""
    averaged = deepcopy(averaged)
    averaged.load_state_dict(averaged.state_dict() | dict(model.named_buffers()))
    return averaged


def follow(folder: Path) -> dict[str, list[dict]]:
    """Train the ablations' base; return, by seed, both accuracies after every epoch."""
    grid, kept = sweep.read_grid(GRIDS["ablations"]), {}
    for seed in ("0", "1"):
        recipe = pets.Recipe(**grid[f"ablations_base_seed_{seed}"])
        train_pets, valid_pets, _ = load(folder, recipe)
        torch.manual_seed(recipe.SEED)
        model = pets.UNet(recipe.BASE_CHANNELS, recipe.DEPTH).to(pets.pick_device(recipe.DEVICE))
        precision = precision_of(model, recipe)
        steps = recipe.EPOCHS * pets.count_steps(len(train_pets.names), recipe.BATCH_SIZE)
        training = pets.Training.start(model, recipe, steps)
        kept[seed] = []
        for row in pets.epochs(training, train_pets, valid_pets, recipe, done=0):
            averaged = with_statistics_of(training.average.module, model)
            gathered = pets.scores(pets.evaluate(averaged, valid_pets, precision).sum(0))
            both = {"gathered": gathered["pixel_accuracy"], "measured": row["valid_pixel_accuracy"]}
            kept[seed].append(both)
    return kept


def norms_table(kept: dict[str, list[dict]]) -> str:
    """Return both accuracies after every epoch as Markdown, in columns for each seed."""
    rows = []
    for epoch, both in enumerate(zip(*kept.values(), strict=True), 1):
        row = {"epoch": str(epoch)}
        for seed, accuracies in zip(kept, both, strict=True):
            for kind, accuracy in accuracies.items():
                row[f"{kind}, seed {seed}"] = f"{cut(100 * accuracy, 2)} %"
        rows.append(row)
    return markdown(rows)


def peer_recipes() -> dict[str, pets.Recipe]:
    """Return the recipe of the ablations' base, with 32 base channels, for either optimiser."""
    grid = sweep.read_grid(GRIDS["ablations"])
    runs = {"Muon": "ablations_base_seed_0", "AdamW": "ablations_AdamW_at_2e-3_seed_0"}
    return {name: pets.Recipe(**grid[run] | {"BASE_CHANNELS": 32}) for name, run in runs.items()}


def train_and_score(
    model: nn.Module, splits: tuple[pets.Pets, pets.Pets, pets.Pets], recipe: pets.Recipe
) -> dict:
    """Train `model` by `recipe`; return the recipe, and the model's size, speed and scores."""
    train_pets, valid_pets, test_pets = splits
    model.to(pets.pick_device(recipe.DEVICE))
    history = pets.train(model, train_pets, valid_pets, recipe)
    batches = recipe.EPOCHS * pets.count_steps(len(train_pets.names), recipe.BATCH_SIZE)
    matrices = pets.evaluate(model, test_pets, precision_of(model, recipe), flip=recipe.FLIP)
    return {
        "recipe": recipe.model_dump(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_second": batches * recipe.BATCH_SIZE / sum(row["seconds"] for row in history),
        "test": pets.scores(matrices.sum(0)),
    }


def compare_nets(folder: Path) -> dict:
    """Train and score both nets with both optimisers. Errors: `InputError`."""
    try:
        import segmentation_models_pytorch as smp  # for this alone
    except ImportError:
        raise pets.InputError("first run pip install -r experiments/requirements.txt.") from None

    splits = load(folder, peer_recipes()["Muon"])
    peer = partial(smp.Unet, "resnet18", encoder_weights=None, classes=len(pets.CLASSES))
    nets = {
        "this project's U-Net": partial(pets.UNet, 32),
        "segmentation_models_pytorch's Unet, ResNet-18": peer,
    }
    runs = []
    for optimiser, recipe in peer_recipes().items():
        for net, make in nets.items():
            print(f"{net}, {optimiser}")
            torch.manual_seed(recipe.SEED)
            result = train_and_score(make(), splits, recipe)
            runs.append({"net": net, "optimiser": optimiser, **result})
    versions = {"smp": smp.__version__, "torch": torch.__version__}
    return {**versions, "threads": torch.get_num_threads(), "runs": runs}


def peer_table(kept: dict) -> str:
    """Return the comparison of the nets as Markdown."""
    rows = []
    for run in kept["runs"]:
        row = {"net": run["net"], "optimiser": run["optimiser"]}
        row["parameters"] = f"{run['parameters']:,}"
        row["pixel accuracy"] = f"{cut(100 * run['test']['pixel_accuracy'], 2)} %"
        row["mean IoU"] = cut(run["test"]["mean_iou"], 3)
        row["images a second"] = cut(run["images_per_second"], 1)
        rows.append(row)
    return markdown(rows)


STUDIES = {"norm_statistics": (follow, norms_table), "peer": (compare_nets, peer_table)}


def main(name: str, data_dir: str = "", cluster: str = "") -> None:
    """Make a study's results, if a folder is given, and print its table. Errors: `InputError`."""
    if name in GRIDS:
        if data_dir:
            make_grid(data_dir, name, cluster)
        print(grid_table(read_results(GRIDS[name].with_suffix(".csv"))))
    elif name in STUDIES:
        make, table = STUDIES[name]
        path = FOLDER / f"{name}.json"
        if data_dir:
            write_json(path, make(pets.find_dataset(data_dir)))
        print(table(json.loads(path.read_text(encoding="utf-8"))))
    else:
        there = ", ".join([*GRIDS, *STUDIES])
        raise pets.InputError(f"there is no study {name!r}: name one of {there}.")


if __name__ == "__main__":
    as_script(main, __doc__)
