"""Note what a notebook trains on and scores, which images its net sees, and the net's tensors.

A cell of the grader's imports this before all others.
"""

import functools
import importlib
import json
import os
import sys
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
petseg_utils = importlib.import_module("petseg_utils")
assert Path(petseg_utils.__file__).parent == HERE, (
    f"another module is in the way: {petseg_utils.__file__}"
)
grader = importlib.import_module("grading.notebook")
names_in_use = importlib.import_module("support.trace").names_in_use

WEIGHTS = HERE / "runs" / grader.RUN / "weights.pt"
SHOWN = os.open(HERE / "shown.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
NOTES = os.open(HERE / "calls.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def noted(name: str, **arguments: int) -> None:
    """Make a function of the module note the names of the images that it is given.

    `arguments` are those that hold images, with their positions.
    """
    function = getattr(petseg_utils, name)

    @functools.wraps(function)
    def spy(*args: object, **named: object) -> object:
        given = {
            key: named.get(key, args[place] if place < len(args) else None)
            for key, place in arguments.items()
        }
        names = {key: list(getattr(pets, "names", [])) for key, pets in given.items()}
        os.write(NOTES, (json.dumps({"call": name, **names}) + "\n").encode())
        return function(*args, **named)

    setattr(petseg_utils, name, spy)


def note_images(module: Module, inputs: tuple) -> None:
    """Note each image that the net sees until weights are saved, and whether it learns from it."""
    if not isinstance(module, petseg_utils.UNet) or inputs[0].device.type == "meta":
        return
    if WEIGHTS.exists():
        return
    kind = "learned" if module.training else "scored"
    for image in ((inputs[0].detach() + 1) * 127.5).round().byte().cpu().numpy():
        os.write(SHOWN, f"{kind} {sha256(image.tobytes()).hexdigest()}\n".encode())


noted("train", train_pets=1, valid_pets=2)
noted("evaluate", pets=1)
register_module_forward_pre_hook(note_images)
with suppress(Exception):  # what is wrong with the net, its own tests tell
    net = petseg_utils.UNet(grader.PARAMETERS["BASE_CHANNELS"], grader.PARAMETERS["DEPTH"])
    (HERE / "names.json").write_text(json.dumps(names_in_use(net)), encoding="utf-8")
