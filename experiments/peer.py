"""Train a well-known library's U-Net beside ours: same images, steps, recipe and scores.

    python -m experiments.peer FOLDER   trains both; FOLDER holds oxford-iiit-pet
    python -m experiments.peer          prints the README's table from the kept result

The peer is segmentation_models_pytorch's Unet with a ResNet-18 encoder, which has about as many
parameters as ours, without pretrained weights; experiments/requirements.txt installs it. Both train
as the ablations do, at 32 base channels, with Muon and once more with AdamW. Prints the results and
writes runs/bench/peer.json; what the README quotes is kept in experiments/.
"""

import json
from pathlib import Path

import torch

import petseg_utils as pets
from experiments import ablations, sweep
from experiments.command import as_script
from experiments.tables import cut, markdown, write_json

KEPT = Path(__file__).with_suffix(".json")
NETS = {"ours": "this project's U-Net", "peer": "segmentation_models_pytorch's Unet, ResNet-18"}


def recipes() -> dict[str, pets.Recipe]:
    """Return the recipe of the ablations' base, with 32 base channels, for either optimiser."""
    grid = sweep.read_grid(ablations.GRIDS["ablations"])
    runs = {"Muon": "ablations_base_seed_0", "AdamW": "ablations_AdamW_at_2e-3_seed_0"}
    return {name: pets.Recipe(**grid[run] | {"BASE_CHANNELS": 32}) for name, run in runs.items()}


def load(folder: Path, recipe: pets.Recipe) -> tuple[pets.Pets, pets.Pets, pets.Pets]:
    """Return the training, validation and test images as the notebook would load them."""
    side, scored = recipe.IMAGE_SIZE, {"mask_side": recipe.SCORE_SIZE}
    names = pets.read_split(folder, "trainval", recipe.LIMIT)
    learned, held_out = pets.hold_out(names, seed=recipe.SEED)
    test = pets.read_split(folder, "test", recipe.LIMIT)
    return (
        pets.load_pets(folder, learned, side, "training images"),
        pets.load_pets(folder, held_out, side, "validation images", **scored),
        pets.load_pets(folder, test, side, "test images", **scored),
    )


def train_and_score(
    model: torch.nn.Module, splits: tuple[pets.Pets, pets.Pets, pets.Pets], recipe: pets.Recipe
) -> dict:
    """Train `model` by `recipe`; return the recipe, and the model's size, speed and scores."""
    train_pets, valid_pets, test_pets = splits
    device = pets.pick_device(recipe.DEVICE)
    history = pets.train(model.to(device), train_pets, valid_pets, recipe)
    batches = recipe.EPOCHS * pets.count_steps(len(train_pets.names), recipe.BATCH_SIZE)
    seconds = sum(row["seconds"] for row in history)
    precision = pets.pick_precision(recipe.PRECISION, device)
    matrices = pets.evaluate(model, test_pets, precision, flip=recipe.FLIP)
    return {
        "recipe": recipe.model_dump(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_second": batches * recipe.BATCH_SIZE / seconds,
        "test": pets.scores(matrices.sum(0)),
    }


def compare(data_dir: str) -> dict:
    """Train and score both nets with both optimisers. Errors: `InputError`."""
    try:
        import segmentation_models_pytorch as smp  # before the long work, and for it alone
    except ImportError:
        mend = "run pip install -r experiments/requirements.txt"
        raise pets.InputError(f"the peer is not installed: {mend}.") from None
    splits = load(pets.find_dataset(data_dir), recipes()["Muon"])
    makers = {
        "ours": lambda recipe: pets.UNet(recipe.BASE_CHANNELS, recipe.DEPTH),
        "peer": lambda _: smp.Unet("resnet18", encoder_weights=None, classes=len(pets.CLASSES)),
    }
    runs = []
    for optimiser, recipe in recipes().items():
        for net, make in makers.items():
            print(f"{NETS[net]}, {optimiser}")
            torch.manual_seed(recipe.SEED)
            result = train_and_score(make(recipe), splits, recipe)
            runs.append({"net": net, "optimiser": optimiser, **result})
    versions = {"smp": smp.__version__, "torch": torch.__version__}
    return {**versions, "threads": torch.get_num_threads(), "runs": runs}


def table(kept: dict) -> str:
    """Return a comparison's result as Markdown."""
    rows = []
    for run in kept["runs"]:
        accuracy, iou = run["test"]["pixel_accuracy"], run["test"]["mean_iou"]
        cells = [NETS[run["net"]], run["optimiser"], f"{run['parameters']:,}"]
        cells += [f"{cut(100 * accuracy, 2)} %", cut(iou, 3), cut(run["images_per_second"], 1)]
        rows.append(cells)
    heads = ["net", "optimiser", "parameters", "pixel accuracy", "mean IoU", "images a second"]
    return markdown(heads, rows)


def main(data_dir: str = "") -> None:
    """Train and score, if a folder is given, and print the table."""
    if data_dir:
        result = compare(data_dir)
        write_json(pets.ROOT / "runs" / "bench" / "peer.json", result)
    else:
        result = json.loads(KEPT.read_text(encoding="utf-8"))
    print(table(result))


if __name__ == "__main__":
    as_script(main, __doc__)
