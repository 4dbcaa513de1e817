"""Score a run's weights.pt on the official test split again, and compare with its metrics.json.

python -m experiments.score FOLDER [RUN]   FOLDER holds oxford-iiit-pet; RUN is notebooks/oxford_run
unless given
"""

from pathlib import Path

import petseg_utils as pets
from experiments.command import as_script
from experiments.sweep import Run, check_run
from petseg_utils import InputError


def read_scored(run: Path) -> tuple[Run, pets.Recipe]:
    """Return a run and its recipe, both checked. Errors: `InputError` unless it is a run on the real dataset."""
    try:
        found = check_run(pets.read_run(run))
    except RecursionError:
        raise InputError(
            f"there is no complete run in {run} (nested too deep): make the run again."
        ) from None
    missing = pets.Recipe.model_fields.keys() - found.parameters.keys()
    if missing:
        raise InputError(
            f"{run} is of an older version, without {', '.join(sorted(missing))}: make the run again."
        )
    recipe = pets.Recipe(**found.parameters)
    if recipe.DATASET != "oxford":
        raise InputError(f"{run} is not of the real dataset: name a run with DATASET oxford.")
    return found, recipe


def main(data_dir: str, run: str = "notebooks/oxford_run") -> None:
    """Load the run's weights, predict the test split and print both scores; all that can be wrong is found first."""
    then, recipe = read_scored(pets.ROOT / run)
    device = pets.pick_device(recipe.DEVICE)
    model, _ = pets.load_net(pets.ROOT / run)
    folder = pets.find_dataset(data_dir)
    names = pets.read_split(folder, "test", recipe.LIMIT)
    if len(names) != then.test.images:
        raise InputError(
            f"{folder} has {len(names)} test images, but {run} was scored on {then.test.images}."
        )
    test = pets.load_pets(
        folder, names, recipe.IMAGE_SIZE, "test images", mask_side=recipe.SCORE_SIZE
    )
    pets.keep_freed_memory()  # this halves the time
    matrices = pets.evaluate(
        model.to(device), test, pets.pick_precision(recipe.PRECISION, device), flip=recipe.FLIP
    )
    now = pets.scores(matrices.sum(0))
    for name in ("pixel_accuracy", "mean_iou"):
        print(
            f"{name}: {now[name]:.6f} now, {getattr(then.test, name):.6f} then, on {len(names)} test images"
        )


if __name__ == "__main__":
    as_script(main, __doc__)
