"""Score a run's weights.pt on the official test split again, and compare with its metrics.json.

python benchmarks/score.py FOLDER [RUN]   FOLDER holds oxford-iiit-pet; RUN is notebooks/oxford_run unless given
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import petseg_utils as pets  # noqa: E402


def read_metrics(run: Path) -> dict:
    """Return a run's metrics. Errors: `InputError` if they are missing or of another dataset."""
    try:
        metrics = json.loads((run / "metrics.json").read_text())
        given = metrics["parameters"]
        missing = pets.PARAMETERS.keys() - given.keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise pets.InputError(f"there is no readable metrics.json in {run}: name the folder of a run.") from None
    if missing:
        raise pets.InputError(f"{run} is of an older version, without {', '.join(sorted(missing))}: run it again.")
    if given["DATASET"] != "oxford":
        raise pets.InputError(f"{run} is not of the real dataset: name a run with DATASET oxford.")
    return metrics


def load_model(run: Path, given: dict) -> pets.UNet:
    """Return the net of a run, whose parameters are `given`, with its weights."""
    model = pets.UNet(given["BASE_CHANNELS"], given["DEPTH"], norms=given["NORMS"], skips=given["SKIPS"])
    pets.load_weights(run / "weights.pt", model)
    return model


def main(data_dir: str, run: str = "notebooks/oxford_run") -> None:
    """Load the run's weights, predict the test split and print both scores."""
    metrics = read_metrics(pets.locate(run))
    given = metrics["parameters"]
    model = load_model(pets.locate(run), given)
    device = pets.pick_device()
    precision = pets.pick_precision(given["PRECISION"], device)
    folder = pets.find_dataset(data_dir)
    names = pets.read_split(folder, "test", given["LIMIT"])
    test = pets.load_pets(folder, names, given["IMAGE_SIZE"], "test images", mask_side=given["SCORE_SIZE"])
    again = pets.scores(pets.evaluate(model.to(device), test, flip=given["FLIP"], precision=precision))
    for name in ("pixel_accuracy", "mean_iou"):
        print(f"{name}: {again[name]:.6f} now, {metrics['test'][name]:.6f} then, on {len(names)} test images")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except pets.InputError as error:
        sys.exit(str(error))
