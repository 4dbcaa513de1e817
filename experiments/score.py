"""Score a run's weights.pt on the official test split again, and compare with its metrics.json.

    python -m experiments.score FOLDER [RUN]   RUN is notebooks/oxford_run unless given

FOLDER holds oxford-iiit-pet.
"""

import petseg_utils as pets
from experiments.command import as_script
from experiments.read_runs import read_folder
from petseg_utils import InputError


def main(data_dir: str, run: str = "notebooks/oxford_run") -> None:
    """Load a run's weights, predict the test split and print both scores, all checked first."""
    then = read_folder(pets.ROOT / run)
    model, recipe = pets.load_net(pets.ROOT / run)
    needed = {"SKIPS", "LIMIT", "IMAGE_SIZE", "SCORE_SIZE", "FLIP"}  # what scores depend on
    if missing := needed - then.parameters.keys():
        raise InputError(f"{run} doesn't tell {', '.join(sorted(missing))}: make the run again.")
    if recipe.DATASET != "oxford":
        raise InputError(f"{run} is not of the real dataset: name a run with DATASET oxford.")
    device = pets.pick_device(recipe.DEVICE)
    precision = pets.pick_precision(recipe.PRECISION, device)
    folder = pets.find_dataset(data_dir)
    names = pets.read_split(folder, "test", recipe.LIMIT)
    images = then.row["test.images"]
    if len(names) != images:
        what = f"{folder} has {len(names)} test images, but {run} was scored on {images}"
        raise InputError(f"{what}: name the dataset that it was scored on.")
    test = pets.load_pets(folder, names, recipe.IMAGE_SIZE, mask_side=recipe.SCORE_SIZE)
    matrices = pets.evaluate(model.to(device), test, precision, flip=recipe.FLIP)
    now = pets.scores(matrices.sum(0))
    for name in ("pixel_accuracy", "mean_iou"):
        both = f"{now[name]:.6f} now, {then.row[f'test.{name}']:.6f} then"
        print(f"{name}: {both}, on {images} test images")


if __name__ == "__main__":
    as_script(main, __doc__)
