"""What each part buys: re-runs of the notebook on the real dataset through papermill, each with one change.

    python benchmarks/ablations.py FOLDER [NAME ...]   runs all, or those named; FOLDER holds oxford-iiit-pet
    python benchmarks/ablations.py                     prints the table of the README from the results that are kept

A run's folder is runs/ablation_NAME; metrics.json and history.csv of ours are kept in benchmarks/ablations/NAME.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import petseg_utils as pets  # noqa: E402

RESULTS = ROOT / "benchmarks" / "ablations"
# Small enough for two CPU cores: 800 images of each split, always the same; SEED draws which tenth validates.
BASE = {
    "DATASET": "oxford",
    "LIMIT": 800,
    "IMAGE_SIZE": 64,
    "SCORE_SIZE": 256,
    "BASE_CHANNELS": 16,
    "EPOCHS": 5,
    "MUON": False,
    "LEARNING_RATE": 2e-3,
}
REFERENCE = {"ONE_CYCLE": False, "LEARNING_RATE": 1e-3, "WEIGHT_DECAY": 0.0, "DICE_WEIGHT": 0.0, "AVERAGE": False}
# name: (what is different, in words, and as parameters)
CHANGES: dict[str, tuple[str, dict]] = {
    "base": ("nothing: the base", {}),
    "base_seed_1": ("another seed", {"SEED": 1}),
    "reference": ("the reference's recipe", REFERENCE | {"AUGMENT": False}),
    "bilinear_masks": ("training masks resized bilinearly", {"MASK_RESIZE": "bilinear"}),
    "no_skips": ("no skip connections", {"SKIPS": False}),
    "one_norm": ("one BatchNorm per block", {"NORMS": 1}),
    "one_norm_seed_1": ("one BatchNorm per block, another seed", {"NORMS": 1, "SEED": 1}),
    "width_8": ("8 base channels", {"BASE_CHANNELS": 8}),
    "width_32": ("32 base channels", {"BASE_CHANNELS": 32}),
    "depth_3": ("depth 3", {"DEPTH": 3}),
    "depth_4": ("depth 4", {"DEPTH": 4}),
    "depth_4_seed_1": ("depth 4, another seed", {"DEPTH": 4, "SEED": 1}),
    "constant_rate": ("constant learning rate, 2e-3", {"ONE_CYCLE": False}),
    "no_average": ("no moving average", {"AVERAGE": False}),
    "no_average_seed_1": ("no moving average, another seed", {"AVERAGE": False, "SEED": 1}),
    "no_dice": ("cross-entropy alone", {"DICE_WEIGHT": 0.0}),
    "no_dice_seed_1": ("cross-entropy alone, another seed", {"DICE_WEIGHT": 0.0, "SEED": 1}),
    "no_augmentation": ("no augmentation", {"AUGMENT": False}),
    "size_128": ("images of 128 px", {"IMAGE_SIZE": 128}),
    "size_256": ("images of 256 px", {"IMAGE_SIZE": 256}),
}


def run(name: str, data_dir: Path) -> None:
    """Run the notebook with the change called `name`. Errors: `InputError` if the run fails."""
    folder = ROOT / "runs" / f"ablation_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    parameters = BASE | CHANGES[name][1] | {"DATA_DIR": os.path.relpath(data_dir, ROOT)}
    options = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "papermill", ROOT / "notebooks" / "pet_segmentation.ipynb"]
    command += [folder / "notebook.ipynb", "-r", "RUN_NAME", folder.name, *options]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise pets.InputError(f"the run {name} failed: see above, or the last cell of {folder / 'notebook.ipynb'}.")


def read_kept() -> dict[str, dict]:
    """Return the kept runs' metrics by name."""
    paths = {name: RESULTS / name / "metrics.json" for name in CHANGES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def gain(kept: dict[str, dict], name: str) -> float:
    """Return the gain of a run in percentage points of accuracy, against the base with the same seed."""
    base = "base_seed_1" if name.endswith("_seed_1") and name != "base_seed_1" else "base"
    return 100 * (kept[name]["test"]["pixel_accuracy"] - kept[base]["test"]["pixel_accuracy"])


def spread() -> str:
    """Return by how many points the gain of one change differs between two seeds, at most; rounded up."""
    kept = read_kept()
    seeds = [name for name in kept if f"{name}_seed_1" in kept]
    return f"{math.ceil(100 * max(abs(gain(kept, name) - gain(kept, f'{name}_seed_1')) for name in seeds)) / 100:.2f}"


def table() -> str:
    """Return the kept results as Markdown; gains are percentage points against the base of the same seed."""
    kept = read_kept()
    lines = ["| changed | pixel accuracy | gain | mean IoU | IoU border | GFLOP |", "|---|---|---|---|---|---|"]
    for name, metrics in kept.items():
        test = metrics["test"]
        cells = [CHANGES[name][0], f"{pets.cut(100 * test['pixel_accuracy'], 2)} %", f"{gain(kept, name):+.2f}"]
        cells += [pets.cut(score, 3) for score in (test["mean_iou"], test["iou"]["border"])]
        cells += [f"{metrics['model']['flops'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    if not arguments:
        print(table())
        return
    data_dir, *names = arguments
    unknown = set(names) - set(CHANGES)
    if unknown:
        raise pets.InputError(f"there is no run {', '.join(sorted(unknown))}: name some of {', '.join(CHANGES)}.")
    folder = pets.find_dataset(data_dir).parent
    for name in names or CHANGES:
        run(name, folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except pets.InputError as error:
        sys.exit(str(error))
