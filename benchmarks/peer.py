"""Train a well-known library's U-Net beside ours: same images, same steps, same recipe, same scores.

    python benchmarks/peer.py FOLDER   FOLDER holds oxford-iiit-pet; needs benchmarks/requirements.txt

The peer is segmentation_models_pytorch's Unet with a ResNet-18 encoder, which has about as many parameters as ours,
without pretrained weights. Both train as the ablations do, at 32 base channels. Prints both results and writes
benchmarks/peer.json.
"""

import json
import sys
from pathlib import Path

import segmentation_models_pytorch as smp
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import ablations  # noqa: E402

import petseg_utils as pets  # noqa: E402

RECIPE = {"epochs": ablations.BASE["EPOCHS"], "batch_size": 16, "learning_rate": 2e-3}  # the notebook's defaults


def load(data_dir: str) -> tuple[pets.Pets, pets.Pets, pets.Pets]:
    """Return the training, validation and test images of the ablations."""
    folder = pets.find_dataset(data_dir)
    side, score_side, limit = (ablations.BASE[name] for name in ("IMAGE_SIZE", "SCORE_SIZE", "LIMIT"))
    learned, held_out = pets.hold_out(pets.read_split(folder, "trainval", limit))
    test = pets.read_split(folder, "test", limit)
    return (
        pets.load_pets(folder, learned, side, "training images"),
        pets.load_pets(folder, held_out, side, "validation images", mask_side=score_side),
        pets.load_pets(folder, test, side, "test images", mask_side=score_side),
    )


def new_model(name: str) -> torch.nn.Module:
    """Return an untrained net: 'ours' or 'peer'."""
    if name == "ours":
        return pets.UNet(base_channels=32, depth=5)
    model = smp.Unet("resnet18", encoder_weights=None, classes=len(pets.CLASSES))
    # What `pets.train` notes in a checkpoint's recipe; a peer has none of it.
    model.base_channels = model.depth = model.norms = model.skips = None
    return model


def compare(data_dir: str) -> dict:
    """Train and score both nets."""
    train_pets, valid_pets, test_pets = load(data_dir)
    device = pets.pick_device()
    precision = pets.pick_precision("auto", device)
    images = RECIPE["epochs"] * pets.count_steps(len(train_pets.names), RECIPE["batch_size"]) * RECIPE["batch_size"]
    results = {}
    for name in ("ours", "peer"):
        torch.manual_seed(0)
        model = new_model(name).to(device)
        history = pets.train(model, train_pets, valid_pets, **RECIPE, precision=precision)
        results[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "images_per_second": images / sum(row["seconds"] for row in history),
            "test": pets.scores(pets.evaluate(model, test_pets, precision=precision)),
        }
        print(
            f"{name}: {results[name]['test']['pixel_accuracy']:.2%}, {results[name]['images_per_second']:.0f} images/s"
        )
    return {"recipe": RECIPE, "smp": smp.__version__, "torch": torch.__version__, **results}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        result = compare(sys.argv[1])
    except pets.InputError as error:
        sys.exit(str(error))
    text = f"{json.dumps(result, indent=2)}\n"
    pets.write_atomically(ROOT / "benchmarks" / "peer.json", lambda file: file.write(text.encode()))
