"""Score a run's weights.pt on the official test split again, and compare with its metrics.json.

python benchmarks/score.py FOLDER [RUN]   FOLDER holds oxford-iiit-pet; RUN is notebooks/oxford_run unless given
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import petseg_utils as pets  # noqa: E402


def load_model(run: Path, given: dict) -> pets.UNet:
    """Return the net of a run, whose parameters are `given`, with its weights."""
    model = pets.UNet(given["BASE_CHANNELS"], given["DEPTH"], norms=given["NORMS"], skips=given["SKIPS"])
    pets.load_weights(run / "weights.pt", model)
    return model


def main(data_dir: str, run: Path = ROOT / "notebooks" / "oxford_run") -> None:
    """Load the run's weights, predict the test split and print both scores."""
    try:
        metrics = json.loads((Path(run) / "metrics.json").read_text())
    except (OSError, ValueError):
        raise pets.InputError(f"there is no readable metrics.json in {run}: name the folder of a run.") from None
    given = metrics["parameters"]
    model = load_model(Path(run), given)
    device = pets.pick_device()
    precision = pets.pick_precision(given["PRECISION"], device)
    folder = pets.find_dataset(data_dir)
    names = pets.read_split(folder, "test", given["LIMIT"])
    test = pets.load_pets(folder, names, given["IMAGE_SIZE"], "test images", mask_side=given["SCORE_SIZE"])
    again = pets.scores(pets.evaluate(model.to(device), test, precision=precision))
    for name in ("pixel_accuracy", "mean_iou"):
        print(f"{name}: {again[name]:.6f} now, {metrics['test'][name]:.6f} then, on {len(names)} test images")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except pets.InputError as error:
        sys.exit(str(error))
