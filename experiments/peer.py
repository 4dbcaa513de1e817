"""Train a well-known library's U-Net beside ours: same images, same steps, same recipe, same
scores.

    python -m experiments.peer FOLDER   trains both; FOLDER holds oxford-iiit-pet; needs
    experiments/requirements.txt python -m experiments.peer          prints the table of the README
    from the result that is kept

The peer is segmentation_models_pytorch's Unet with a ResNet-18 encoder, which has about as many
parameters as ours, without pretrained weights. Both train as the ablations do, at 32 base channels,
with Muon and once more with AdamW. Prints the results and writes runs/bench/peer.json; what the
README quotes is kept in experiments/.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

import petseg_utils as pets
from experiments import ablations
from experiments.command import as_script
from experiments.sweep import cut, write_json

KEPT = Path(__file__).with_suffix(".json")
NETS = {"ours": "this project's U-Net", "peer": "segmentation_models_pytorch's Unet, ResNet-18"}


def recipes() -> dict[str, pets.Recipe]:
    """Return the recipe of the ablations' base, with 32 base channels, for either optimiser."""
    grid = json.loads(ablations.GRIDS["ablations"].read_text())
    muon = pets.Recipe(**grid["base"]).but(BASE_CHANNELS=32)
    return {"Muon": muon, "AdamW": muon.but(**grid["changes"]["AdamW_at_2e-3"])}


def load(folder: Path, recipe: pets.Recipe) -> tuple[pets.Pets, pets.Pets, pets.Pets]:
    """Return the training, validation and test images as the notebook would load them."""
    learned, held_out = pets.hold_out(
        pets.read_split(folder, "trainval", recipe.LIMIT), seed=recipe.SEED
    )
    scored = {"mask_side": recipe.SCORE_SIZE}
    test = pets.read_split(folder, "test", recipe.LIMIT)
    return (
        pets.load_pets(folder, learned, recipe.IMAGE_SIZE, "training images"),
        pets.load_pets(folder, held_out, recipe.IMAGE_SIZE, "validation images", **scored),
        pets.load_pets(folder, test, recipe.IMAGE_SIZE, "test images", **scored),
    )


def new_model(name: str, smp: ModuleType, recipe: pets.Recipe) -> torch.nn.Module:
    """Return an untrained net: 'ours', or the 'peer' of the package `smp`."""
    torch.manual_seed(recipe.SEED)
    if name == "ours":
        return pets.UNet(recipe.BASE_CHANNELS, recipe.DEPTH)
    return smp.Unet("resnet18", encoder_weights=None, classes=len(pets.CLASSES))


def import_peer() -> ModuleType:
    """Return the peer's package, which only a comparison needs. Errors: `InputError` if it is not installed."""
    try:
        return importlib.import_module("segmentation_models_pytorch")
    except ImportError:
        raise pets.InputError(
            "the peer is not installed: run pip install -r experiments/requirements.txt."
        ) from None


def train_and_score(
    model: torch.nn.Module, splits: tuple[pets.Pets, pets.Pets, pets.Pets], recipe: pets.Recipe
) -> dict:
    """Train `model` by `recipe`; return the recipe, and the model's size, speed and scores."""
    train_pets, valid_pets, test_pets = splits
    device = pets.pick_device(recipe.DEVICE)
    history = pets.train(model.to(device), train_pets, valid_pets, recipe)
    images = (
        recipe.EPOCHS
        * pets.count_steps(len(train_pets.names), recipe.BATCH_SIZE)
        * recipe.BATCH_SIZE
    )
    matrices = pets.evaluate(
        model, test_pets, pets.pick_precision(recipe.PRECISION, device), flip=recipe.FLIP
    )
    return {
        "recipe": recipe.model_dump(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_second": images / sum(row["seconds"] for row in history),
        "test": pets.scores(matrices.sum(0)),
    }


def compare(data_dir: str) -> dict:
    """Train and score both nets with both optimisers. Errors: `InputError`."""
    smp = import_peer()  # before the long work
    folder = pets.find_dataset(data_dir)
    splits = load(folder, recipes()["Muon"])
    runs = []
    for optimiser, recipe in recipes().items():
        for net, label in NETS.items():
            print(f"{label}, {optimiser}")
            model = new_model(net, smp, recipe)
            runs.append(
                {"net": net, "optimiser": optimiser, **train_and_score(model, splits, recipe)}
            )
    versions = {"smp": smp.__version__, "torch": torch.__version__}
    return {**versions, "threads": torch.get_num_threads(), "runs": runs}


def table(kept: dict) -> str:
    """Return a comparison's result as Markdown."""
    lines = [
        "| net | optimiser | parameters | pixel accuracy | mean IoU | images a second |",
        "|---" * 6 + "|",
    ]
    for run in kept["runs"]:
        cells = [NETS[run["net"]], run["optimiser"], f"{run['parameters']:,}"]
        cells += [
            f"{cut(100 * run['test']['pixel_accuracy'], 2)} %",
            cut(run["test"]["mean_iou"], 3),
        ]
        lines.append(f"| {' | '.join([*cells, cut(run['images_per_second'], 1)])} |")
    return "\n".join(lines)


def main(data_dir: str = "") -> None:
    """Train and score, if a folder is given, and print the table."""
    if data_dir:
        result = compare(data_dir)
        write_json(pets.ROOT / "runs" / "bench" / "peer.json", result)
    else:
        result = json.loads(KEPT.read_text())
    print(table(result))


if __name__ == "__main__":
    as_script(main, __doc__)
