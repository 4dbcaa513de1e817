"""What each part buys: re-runs of the notebook on the real dataset through papermill, each with one change.

    python benchmarks/ablations.py FOLDER [NAME ...]   makes the table's runs, or some; FOLDER holds oxford-iiit-pet
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
    "MUON": True,
    "LEARNING_RATE": 1e-2,
}
ADAMW = {"MUON": False, "LEARNING_RATE": 2e-3}
REFERENCE = {"MUON": False, "WEIGHT_DECAY": 0.0, "LEARNING_RATE": 1e-3, "ONE_CYCLE": False}
REFERENCE |= {"DICE_WEIGHT": 0.0, "AVERAGE": False, "AUGMENT": False}
# name: (what is different, in words, and as parameters)
CHANGES: dict[str, tuple[str, dict]] = {
    "base": ("nothing: the base", {}),
    "reference": ("the reference's recipe", REFERENCE),
    "adamw": ("AdamW at 2e-3 instead of Muon", ADAMW),
    "adamw_5e-3": ("AdamW at 5e-3 instead of Muon", ADAMW | {"LEARNING_RATE": 5e-3}),
    "adamw_1e-2": ("AdamW at 1e-2 instead of Muon", ADAMW | {"LEARNING_RATE": 1e-2}),
    "constant_rate": ("constant learning rate and momentum", {"ONE_CYCLE": False}),
    "no_average": ("no moving average", {"AVERAGE": False}),
    "no_dice": ("cross-entropy alone", {"DICE_WEIGHT": 0.0}),
    "no_augmentation": ("no augmentation", {"AUGMENT": False}),
    "bilinear_masks": ("training masks resized bilinearly", {"MASK_RESIZE": "bilinear"}),
    "no_skips": ("no skip connections", {"SKIPS": False}),
    "one_norm": ("one BatchNorm per block", {"NORMS": 1}),
    "width_8": ("8 base channels", {"BASE_CHANNELS": 8}),
    "width_32": ("32 base channels", {"BASE_CHANNELS": 32}),
    "depth_3": ("depth 3", {"DEPTH": 3}),
    "depth_4": ("depth 4", {"DEPTH": 4}),
    "size_128": ("images of 128 px", {"IMAGE_SIZE": 128}),
    "size_256": ("images of 256 px", {"IMAGE_SIZE": 256}),
}
AGAIN = "_seed_1"  # ends the name of a change's second run: other weights, batches and held-out images
RUNS = {name: BASE | change for name, (_, change) in CHANGES.items()}
RUNS |= {name + AGAIN: parameters | {"SEED": 1} for name, parameters in RUNS.items()}


def run(name: str, data_dir: Path) -> None:
    """Make the run called `name`. Errors: `InputError` if the run fails."""
    folder = ROOT / "runs" / f"ablation_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    parameters = RUNS[name] | {"DATA_DIR": os.path.relpath(data_dir, ROOT)}
    options = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "papermill", ROOT / "notebooks" / "pet_segmentation.ipynb"]
    command += [folder / "notebook.ipynb", "-r", "RUN_NAME", folder.name, *options]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise pets.InputError(f"the run {name} failed: see above, or the last cell of {folder / 'notebook.ipynb'}.")


def read_kept() -> dict[str, dict]:
    """Return the kept runs' metrics by name."""
    paths = {name: RESULTS / name / "metrics.json" for name in RUNS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def gain(kept: dict[str, dict], name: str) -> float:
    """Return the gain of a run in percentage points of accuracy, against the base with the same seed.

    Of the base itself with another seed, it is what the seed gains.
    """
    base = f"base{AGAIN}" if name.endswith(AGAIN) and name != f"base{AGAIN}" else "base"
    return 100 * (kept[name]["test"]["pixel_accuracy"] - kept[base]["test"]["pixel_accuracy"])


def spread() -> str:
    """Return by how many points the gain in one row differs between two seeds, at most; rounded up."""
    kept = read_kept()
    twice = [name for name in CHANGES if name + AGAIN in kept]
    return f"{math.ceil(100 * max(abs(gain(kept, name) - gain(kept, name + AGAIN)) for name in twice)) / 100:.2f}"


def table() -> str:
    """Return the kept results as Markdown; gains are percentage points against the base of the same seed."""
    kept = read_kept()
    lines = ["| changed | pixel accuracy | gain | another seed | mean IoU | IoU border | GFLOP |", "|---" * 7 + "|"]
    for name, (words, _) in CHANGES.items():
        if name not in kept:
            continue
        test, again = kept[name]["test"], name + AGAIN
        cells = [words, f"{pets.cut(100 * test['pixel_accuracy'], 2)} %", f"{gain(kept, name):+.2f}"]
        cells += [f"{gain(kept, again):+.2f}" if again in kept else ""]
        cells += [pets.cut(score, 3) for score in (test["mean_iou"], test["iou"]["border"])]
        cells += [f"{kept[name]['model']['flops'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    if not arguments:
        print(table())
        return
    data_dir, *names = arguments
    unknown = set(names) - set(RUNS)
    if unknown:
        raise pets.InputError(f"there is no run {', '.join(sorted(unknown))}: name some of {', '.join(RUNS)}.")
    folder = pets.find_dataset(data_dir).parent
    for name in names or read_kept():
        run(name, folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except pets.InputError as error:
        sys.exit(str(error))
