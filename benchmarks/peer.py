"""Train a well-known library's U-Net beside ours: same images, same steps, same recipe, same scores.

    python benchmarks/peer.py FOLDER   trains both; FOLDER holds oxford-iiit-pet; needs benchmarks/requirements.txt
    python benchmarks/peer.py          prints the table of the README from the result that is kept

The peer is segmentation_models_pytorch's Unet with a ResNet-18 encoder, which has about as many parameters as ours,
without pretrained weights. Both train as the ablations do, at 32 base channels, with Muon and once more with AdamW.
Prints the results and writes runs/bench/peer.json; what the README quotes is kept in benchmarks/.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import ablations  # noqa: E402

import petseg_utils as pets  # noqa: E402

KEPT = ROOT / "benchmarks" / "peer.json"
COURSE = ablations.BASE | {"BASE_CHANNELS": 32}
OPTIMISERS = {"Muon": COURSE, "AdamW": COURSE | ablations.ADAMW}
NETS = {"ours": "this project's U-Net", "peer": "segmentation_models_pytorch's Unet, ResNet-18"}


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


def new_model(name: str, smp: ModuleType) -> torch.nn.Module:
    """Return an untrained net: 'ours', or the 'peer' of the package `smp`."""
    if name == "ours":
        return pets.UNet(COURSE["BASE_CHANNELS"], depth=5)
    model = smp.Unet("resnet18", encoder_weights=None, classes=len(pets.CLASSES))
    # What `pets.train` notes in a checkpoint's recipe; a peer has none of it.
    model.base_channels = model.depth = model.norms = model.skips = None
    return model


def import_peer() -> ModuleType:
    """Return the peer's package, which only a comparison needs. Errors: `InputError` if it is not installed."""
    try:
        return importlib.import_module("segmentation_models_pytorch")
    except ImportError:
        raise pets.InputError("the peer is not installed: run pip install -r benchmarks/requirements.txt.") from None


def train_and_score(model: torch.nn.Module, splits: tuple[pets.Pets, pets.Pets, pets.Pets], parameters: dict) -> dict:
    """Train `model` as notebook `parameters` say; return its size, speed and scores."""
    train_pets, valid_pets, test_pets = splits
    precision = pets.pick_precision("auto", pets.pick_device())
    epochs, batch_size = parameters["EPOCHS"], 16
    history = pets.train(
        model, train_pets, valid_pets, epochs=epochs, batch_size=batch_size, precision=precision,
        muon=parameters["MUON"], learning_rate=parameters["LEARNING_RATE"],
    )  # fmt: skip
    images = epochs * pets.count_steps(len(train_pets.names), batch_size) * batch_size
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_second": images / sum(row["seconds"] for row in history),
        "test": pets.scores(pets.evaluate(model, test_pets, precision=precision)),
    }


def compare(data_dir: str) -> dict:
    """Train and score both nets with both optimisers."""
    smp = import_peer()  # before the long work
    splits = load(data_dir)
    runs = []
    for optimiser, parameters in OPTIMISERS.items():
        for net, label in NETS.items():
            print(f"{label}, {optimiser}")
            torch.manual_seed(0)
            model = new_model(net, smp).to(pets.pick_device())
            runs.append({"net": net, "optimiser": optimiser, **train_and_score(model, splits, parameters)})
    versions = {"smp": smp.__version__, "torch": torch.__version__}
    return {"recipes": OPTIMISERS, **versions, "threads": torch.get_num_threads(), "runs": runs}


def table(kept: dict) -> str:
    """Return a comparison's result as Markdown."""
    lines = ["| net | optimiser | parameters | pixel accuracy | mean IoU | images a second |", "|---" * 6 + "|"]
    for run in kept["runs"]:
        cells = [NETS[run["net"]], run["optimiser"], f"{run['parameters']:,}"]
        cells += [f"{pets.cut(100 * run['test']['pixel_accuracy'], 2)} %", pets.cut(run["test"]["mean_iou"], 3)]
        lines.append(f"| {' | '.join([*cells, pets.cut(run['images_per_second'], 1)])} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    if not arguments:
        print(table(json.loads(KEPT.read_text())))
        return
    result = compare(arguments[0])
    pets.write_json(ROOT / "runs" / "bench" / "peer.json", result)
    print(table(result))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except pets.InputError as error:
        sys.exit(str(error))
