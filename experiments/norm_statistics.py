"""What it is worth to measure BatchNorm's statistics anew for the averaged weights.

    python -m experiments.norm_statistics FOLDER   trains the base of the ablations, scores it
    python -m experiments.norm_statistics          prints the README's table from the kept result

FOLDER holds oxford-iiit-pet. After every epoch the same averaged weights are scored twice on the
held-out images, with statistics that training gathered and that were measured anew. Writes
norm_statistics.json.
"""

import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

import petseg_utils as pets
from experiments import ablations, peer, sweep
from experiments.command import as_script
from experiments.tables import cut, markdown, write_json

KEPT = Path(__file__).with_suffix(".json")


def with_statistics_of(averaged: nn.Module, model: nn.Module) -> nn.Module:
    """Return a copy of the averaged weights with the statistics that training gave `model`."""
    averaged = deepcopy(averaged)
    averaged.load_state_dict(averaged.state_dict() | dict(model.named_buffers()))
    return averaged


def follow(folder: Path, recipe: pets.Recipe) -> list[dict]:
    """Train by `recipe` and return both accuracies of the averaged weights after every epoch."""
    train_pets, valid_pets, _ = peer.load(folder, recipe)
    device = pets.pick_device(recipe.DEVICE)
    precision = pets.pick_precision(recipe.PRECISION, device)
    torch.manual_seed(recipe.SEED)
    model = pets.UNet(recipe.BASE_CHANNELS, recipe.DEPTH).to(device)
    steps = recipe.EPOCHS * pets.count_steps(len(train_pets.names), recipe.BATCH_SIZE)
    training = pets.Training.start(model, recipe, steps)
    rows = []
    for row in pets.epochs(training, train_pets, valid_pets, recipe, done=0):
        gathered = with_statistics_of(training.average.module, model)
        old = pets.scores(pets.evaluate(gathered, valid_pets, precision).sum(0))
        rows.append({"gathered": old["pixel_accuracy"], "measured": row["valid_pixel_accuracy"]})
    return rows


def table(kept: dict[str, list[dict]]) -> str:
    """Return both accuracies after every epoch as Markdown, in columns for each seed."""
    columns = {
        f"{kind}, seed {seed}": [f"{cut(100 * row[kind], 2)} %" for row in rows]
        for seed, rows in kept.items()
        for kind in ("gathered", "measured")
    }
    epochs = enumerate(zip(*columns.values(), strict=True), 1)
    return markdown(["epoch", *columns], [[str(epoch), *cells] for epoch, cells in epochs])


def main(data_dir: str = "") -> None:
    """Train, if a folder is given, and print the table."""
    if data_dir:
        folder = pets.find_dataset(data_dir)
        grid = sweep.read_grid(ablations.GRIDS["ablations"])
        recipes = [pets.Recipe(**grid[f"ablations_base_seed_{seed}"]) for seed in (0, 1)]
        write_json(KEPT, {str(recipe.SEED): follow(folder, recipe) for recipe in recipes})
    print(table(json.loads(KEPT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    as_script(main, __doc__)
