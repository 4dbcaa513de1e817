"""Seeded faults, each with the criterion that has to catch it, and harmless variants, which cost no
points.

A change is text of the module, or of a notebook's cells, and what takes its place. A text that is
no longer there exactly once is an error: then the mutant has to follow the source.
"""

from collections.abc import Callable
from typing import NamedTuple

from nbformat import NotebookNode

REASONS = {  # what the grader has to say, by criterion, unless a mutant has a reason of its own
    "block": "(convolution, BatchNorm, LeakyReLU of slope 0.2) twice",
    "shapes": "13,385,475 parameters",
    "gradients": "a gradient for every parameter",
    "options": "7 BatchNorms with norms=1",
    "pooling": "the largest of each 2 x 2 pixels",
    "upsampling": "the nearest neighbour, each pixel four times",
    "concatenation": "(upsampled, skip) on the channels",
    "skips": "the tensor that was pooled on the same level",
    "sides": "Sizes of tensors must match",
    "split": "names of trainval.txt, sorted",
    "hold-out": "no name on both sides",
    "masks": "the trimap by nearest neighbour minus 1",
    "images": "resized bilinearly",
    "augmentation": "the labels where the image has them",
    "confusion": "rows the truth",
    "scores": "the iou",
    "cross-entropy": "for these logits",
    "dice": "with Dice",
    "ignore": "as without them",
    "input": "inputs from -1 to 1",
    "predict": "the most probable label of each pixel",
    "eval-mode": "the net in evaluation mode",
    "flip": "labels averaged over both images",
    "evaluate": "the counts of each image's own prediction",
    "learning": "the loss to fall to a third",
    "epochs": "every image once",
    "steps": "the logits of backward, step and fresh gradients",
    "schedule": "a rise and a fall over 20 steps",
    "average": "other weights with AVERAGE",
    "switches": "images as they are",
    "small-sides": "an epoch at the sides 8, 12 and 16 each",
    "honest": "depend on the validation images",
    "resume": "the same history",
    "files": "all weights to survive",
    "executes": "found ZeroDivisionError: division by zero in code cell",
    "weights": "of the test pixels right",
    "metrics": "pixel_accuracy",
    "submission": "what the saved weights predict",
    "honest-split": "no test image in train_pets",
    "figures": "something to see",
}


class Mutant(NamedTuple):
    """Changes to a source, and the criterion that turns red by them; "" for a harmless variant."""

    criterion: str
    name: str
    why: str  # what the grader's reason has to hold
    changes: tuple[str, ...] = ()  # old, new, old, new, ...
    mark: Callable[[list[NotebookNode]], None] = lambda cells: (
        None
    )  # changes what a notebook stores beside its sources


def fault(criterion: str, name: str, *changes: str, why: str = "") -> Mutant:
    return Mutant(criterion, name, why or REASONS[criterion], changes)


def harmless(name: str, *changes: str) -> Mutant:
    return Mutant("", name, "", changes)


BN2 = "        nn.BatchNorm2d(out_channels) if norms == 2 else nn.Identity(),\n"
CONV2 = "        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),\n"
LEAKY = "        nn.LeakyReLU(0.2, inplace=True),\n"
CAT = "x = torch.cat((x, kept.pop()), dim=1)"
SHIFT = "torch.from_numpy(np.array(trimap)) - 1"
PAIRS = "pairs = [transform(tv_tensors.Image(i), tv_tensors.Mask(m)) for i, m in zip(images, masks, strict=True)]"
FORWARD = """        kept = []
        for down, pool in zip(self.downs, self.pools, strict=True):
            x = down(x)
            kept.append(x if self.skips else torch.zeros_like(x))
            x = pool(x)  # (B, c, n, n) -> (B, c, n/2, n/2)
        x = self.bottleneck(x)
        for upsample, up in zip(self.upsamples, self.ups, strict=True):
            x = upsample(x)  # (B, c, n, n) -> (B, c, 2n, 2n)
            x = torch.cat((x, kept.pop()), dim=1)  # (B, c, n, n) twice -> (B, 2c, n, n)
            x = up(x)  # (B, 2c, n, n) -> (B, c/2, n, n); at the top (B, c, n, n)
        return self.out(x)
"""
PREDICTED = (
    "        labels, _ = predict(model, images, precision, size=masks.shape[1:], flip=flip)\n"
)
RECURSIVE = """        return self.out(self.level(x, 0))

    def level(self, x: Tensor, k: int) -> Tensor:
        if k == self.depth:
            return self.bottleneck(x)
        kept = self.downs[k](x)
        below = self.upsamples[-1 - k](self.level(self.pools[k](kept), k + 1))
        skip = kept if self.skips else torch.zeros_like(kept)
        return self.ups[-1 - k](torch.cat((below, skip), dim=1))
"""
MAKE = "    return nn.Sequential(\n        nn.Conv2d(in"
HOSTILE = "\nROOT = Path(__file__).resolve().parent\n"

MODULE_FAULTS = (
    # the block
    fault("block", "slope 0.01", LEAKY + CONV2, LEAKY.replace("0.2", "0.01") + CONV2),
    fault("block", "ReLU at the end", BN2 + LEAKY, BN2 + "        nn.ReLU(inplace=True),\n"),
    fault("block", "no activation at the end", BN2 + LEAKY, BN2),
    fault(
        "block",
        "no padding",
        LEAKY + CONV2,
        LEAKY + CONV2.replace("padding=1", "padding=0"),
        why="found (1, 6, 6, 6)",
    ),
    fault("block", "activation before the norm", BN2 + LEAKY, LEAKY + BN2),
    fault("block", "GroupNorm", BN2, BN2.replace("BatchNorm2d(", "GroupNorm(1, ")),
    # the net
    fault(
        "shapes",
        "the same channels everywhere",
        "base_channels * 2**level for level in range(depth)",
        "base_channels for level in range(depth)",
    ),
    fault(
        "shapes",
        "logits at half the side",
        "        return self.out(x)\n",
        "        return F.max_pool2d(self.out(x), 2)\n",
        why="found (2, 3, 1, 1)",
    ),
    fault(
        "shapes",
        "always three classes",
        "nn.Conv2d(base_channels, num_classes, kernel_size=1)",
        "nn.Conv2d(base_channels, 3, kernel_size=1)",
        why="for 21 classes",
    ),
    fault(
        "shapes",
        "a hundred parameters more",
        "nn.Conv2d(base_channels, num_classes, kernel_size=1)",
        "nn.Conv2d(base_channels, num_classes, kernel_size=1)\n        self.extra = nn.Parameter(torch.zeros(100))",
    ),
    fault(
        "gradients",
        "a layer that is not used",
        "        return self.out(x)\n",
        "        return F.conv2d(x, self.out.weight.detach(), self.out.bias)\n",
    ),
    fault(
        "gradients",
        "detached bottleneck",
        "x = self.bottleneck(x)",
        "x = self.bottleneck(x).detach()",
    ),
    fault("options", "norms ignored", " if norms == 2 else nn.Identity()", ""),
    fault(
        "options",
        "skips ignored",
        "x if self.skips else torch.zeros_like(x)",
        "x",
        why="zeros in the place of the skips with skips=False",
    ),
    fault("pooling", "average pooling", "nn.MaxPool2d(2)", "nn.AvgPool2d(2)"),
    fault("pooling", "every second pixel", "nn.MaxPool2d(2)", "nn.MaxPool2d(1, stride=2)"),
    fault("upsampling", "bilinear upsampling", 'mode="nearest") for _', 'mode="bilinear") for _'),
    fault("concatenation", "skip first", CAT, "x = torch.cat((kept.pop(), x), dim=1)"),
    fault(
        "skips",
        "skips of zeros",
        "kept.append(x if self.skips else",
        "kept.append(0 * x if self.skips else",
    ),
    fault("skips", "the upsampled twice", CAT, "x = torch.cat((x, kept.pop() * 0 + x), dim=1)"),
    fault(
        "skips", "skips of a shifted row", CAT, "x = torch.cat((x, kept.pop().roll(1, 2)), dim=1)"
    ),
    fault(
        "skips",
        "skip of the wrong level",
        CAT,
        "x = torch.cat((x, F.interpolate(kept[0][:, :1], x.shape[2:]).expand_as(kept.pop())), dim=1)",
    ),
    fault(
        "sides",
        "odd sides accepted",
        "            check_side(side, self.depth)\n",
        "            pass\n",
    ),
    # data
    fault(
        "split",
        "the folder decides",
        "    return sorted(np.random",
        '    names = [path.stem for path in (folder / "images").glob("*.jpg") if path.stem not in others]\n'
        "    return sorted(np.random",
    ),
    fault(
        "split",
        "missing files pass",
        "    if missing:\n",
        "    if False:\n",
        why="an InputError, found none",
    ),
    fault(
        "hold-out",
        "held-out images trained on",
        "return [name for name in names if name not in held], [",
        "return names, [",
    ),
    fault(
        "hold-out",
        "breeds ignored",
        "if breed_of(name) == breed)",
        'if breed_of(name) == "pug")',
        why="of every breed",
    ),
    fault(
        "hold-out",
        "seed ignored",
        "    random = np.random.default_rng(seed)\n    held",
        "    random = np.random.default_rng(0)\n    held",
        why="other images for another seed",
    ),
    fault(
        "masks",
        "masks bilinear",
        "Image.Resampling[resize.upper()]",
        "Image.Resampling.BILINEAR",
        why="by nearest neighbour minus 1",
    ),
    fault("masks", "labels shifted twice", SHIFT, "torch.from_numpy(np.array(trimap)) - 2"),
    fault("masks", "border merged", SHIFT, f"({SHIFT}).clamp(max=1)"),
    fault(
        "masks",
        "masks mirrored, images not",
        "return image, trimap\n",
        "return image, trimap.transpose(Image.Transpose.FLIP_LEFT_RIGHT)\n",
    ),
    fault(
        "images",
        "photos by nearest neighbour",
        "image.resize((side, side), Image.Resampling.BILINEAR)",
        "image.resize((side, side), Image.Resampling.NEAREST)",
    ),
    fault(
        "images",
        "photos of others",
        "return Pets(names, images, masks, folder)",
        "return Pets(names, images.roll(1, 0), masks, folder)",
    ),
    fault(
        "augmentation",
        "image moved without its mask",
        PAIRS,
        PAIRS.replace("tv_tensors.Mask(m)", "m"),
    ),
    fault(
        "augmentation", "border filled with pet", "tv_tensors.Mask: IGNORE}", "tv_tensors.Mask: 0}"
    ),
    fault(
        "augmentation",
        "nothing flipped",
        "v2.RandomHorizontalFlip(), move",
        "move",
        why="about half of 64 images flipped",
    ),
    fault(
        "augmentation",
        "nothing done",
        PAIRS,
        "pairs = list(zip(images, masks, strict=True))",
        why="about half of 64 images flipped",
    ),
    # scores
    fault(
        "confusion",
        "rows are the prediction",
        "truth[known] * len(CLASSES) + predicted[known]",
        "predicted[known] * len(CLASSES) + truth[known]",
    ),
    fault(
        "confusion",
        "IGNORE counted as pet",
        "    known = truth != IGNORE\n",
        "    truth = truth.where(truth != IGNORE, 0)\n    known = truth != IGNORE\n",
    ),
    fault(
        "scores",
        "accuracy hard-coded",
        "int(right.sum()) / int(matrix.sum())",
        "0.921",
        why="the pixel accuracy",
    ),
    fault(
        "scores",
        "IoU without false positives",
        "union = matrix.sum(0) + matrix.sum(1) - right",
        "union = matrix.sum(1)",
    ),
    fault("scores", "IoU of one class wrong", "    dice = [", "    iou[2] = iou[1]\n    dice = ["),
    fault(
        "scores",
        "absent class scores zero",
        "int(tp) / int(all_) if all_ else None",
        "int(tp) / int(all_) if all_ else 0.0",
        why="(None) for a class that is not there",
    ),
    fault("scores", "Dice is IoU", "2 * value / (1 + value)", "value", why="the dice"),
    # the loss
    fault(
        "cross-entropy",
        "softmax before the loss",
        "F.cross_entropy(logits, masks,",
        "F.cross_entropy(logits.softmax(1), masks,",
    ),
    fault(
        "cross-entropy",
        "constant loss",
        "return cross_entropy + dice_weight",
        "return 0 * cross_entropy + dice_weight",
    ),
    fault("dice", "Dice by image", "sum(dim=(0, 2, 3))  # (K,)", "mean(dim=(0, 2, 3))  # (K,)"),
    fault(
        "dice",
        "Dice forgotten",
        "return cross_entropy + dice_weight * (1",
        "return cross_entropy + 0 * (1",
    ),
    fault(
        "dice",
        "Dice added instead of one minus Dice",
        "dice_weight * (1 - (",
        "dice_weight * (0 + (",
    ),
    fault(
        "ignore",
        "Dice counts IGNORE",
        "probabilities = logits.softmax(dim=1) * known",
        "probabilities = logits.softmax(dim=1)",
    ),
    fault(
        "ignore",
        "cross-entropy counts IGNORE",
        "F.cross_entropy(logits, masks, ignore_index=IGNORE)",
        "F.cross_entropy(logits, masks.where(masks != IGNORE, 0))",
    ),
    # prediction
    fault("input", "input not centred", "float() / 127.5 - 1", "float() / 255"),
    fault("predict", "least probable label", "likely.max(dim=1)", "likely.min(dim=1)"),
    fault(
        "predict",
        "logits instead of probabilities",
        ".softmax(dim=1)  # (B, K, H, W)",
        "  # (B, K, H, W)",
        why="the probability of that label",
    ),
    fault(
        "predict",
        "labels resized",
        'size, mode="bilinear")',
        "size)",
        why="the labels of logits resized bilinearly",
    ),
    fault(
        "predict",
        "only the first batch",
        "for start in tqdm(range(0, len(images), 32)",
        "for start in tqdm(range(0, 32, 32)",
    ),
    fault("eval-mode", "no eval()", "    model.eval()\n\n", "    model.train()\n\n"),
    fault(
        "flip",
        "answer not flipped back",
        "probabilities(images[part].flip(3)).flip(3)",
        "probabilities(images[part].flip(3))",
    ),
    fault("flip", "flipping ignored", "        if flip:\n", "        if False:\n"),
    fault(
        "evaluate",
        "the prediction of another image",
        PREDICTED,
        PREDICTED + "        labels = labels.roll(1, 0)\n",
    ),
    fault("evaluate", "truth as prediction", PREDICTED, "        labels = masks\n"),
    # the loop
    fault("learning", "optimiser idle", "        optimizer.step()\n", ""),
    fault("learning", "no backward", "        loss.backward()\n", ""),
    fault(
        "learning",
        "another image's mask",
        "images, masks = pets.images[batch], pets.masks[batch]",
        "images, masks = pets.images[batch], pets.masks[batch.flip(0)]",
    ),
    fault(
        "epochs",
        "images drawn with replacement",
        "torch.randperm(len(pets.names)).split",
        "torch.randint(len(pets.names), (len(pets.names),)).split",
    ),
    fault(
        "epochs",
        "always the same order",
        "torch.randperm(len(pets.names)).split",
        "torch.arange(len(pets.names)).split",
        why="another order in every epoch",
    ),
    fault(
        "epochs",
        "short batches kept",
        "            break  # a smaller batch would upset BatchNorm\n",
        "            pass\n",
        why="batches of 3 and 3",
    ),
    fault(
        "epochs",
        "only some epochs",
        "enumerate(sides, 1))[done:]",
        "enumerate(sides, 1))[done:-1]",
        why="a row for each of 3 epochs",
    ),
    fault("steps", "gradients added up", "        optimizer.zero_grad()\n", ""),
    fault(
        "steps",
        "loss of the last batch",
        "return sum(losses) / len(losses)",
        "return losses[-1]",
        why="a loss of",
    ),
    fault(
        "steps",
        "NaN goes on",
        "if not math.isfinite(losses[-1]):",
        "if False:",
        why="an InputError, found none",
    ),
    fault(
        "steps", "weight decay 0.5", '"weight_decay": recipe.WEIGHT_DECAY}', '"weight_decay": 5.0}'
    ),
    fault("schedule", "schedule idle", "        schedule.step()\n", ""),
    fault("schedule", "linear decay ignored", " if recipe.LINEAR_DECAY else 1", " if False else 1"),
    fault("average", "average frozen", "        average.update_parameters(model)\n", ""),
    fault(
        "average",
        "last weights returned",
        "    model.load_state_dict(training.average.module.state_dict())\n",
        "",
    ),
    fault(
        "average",
        "statistics frozen",
        "        update_bn(",
        "        model = deepcopy(model)\n        update_bn(",
        why="of the net returned",
    ),
    fault("switches", "augmentation always", "        if recipe.AUGMENT:\n", "        if True:\n"),
    fault(
        "switches",
        "augmentation at full strength",
        "augment(images, masks, recipe.AUGMENT)",
        "augment(images, masks)",
        why="AUGMENT 0.001",
    ),
    fault(
        "small-sides",
        "small epochs ignored",
        "        if side == recipe.IMAGE_SIZE:\n",
        "        if True:\n",
    ),
    fault(
        "small-sides",
        "small images by nearest neighbour, from larger ones",
        "return train_again, valid_again",
        "train_again = train_again._replace(images=F.interpolate(train_pets.images.float(), side).byte())\n"
        "        return train_again, valid_again",
        why="as load_pets gives them at the side 8",
    ),
    fault(
        "honest",
        "trained on the validation images",
        "loss = train_epoch(training, seen, recipe, bar)",
        "loss = train_epoch(training, seen, recipe, bar) + 0 * train_epoch(training, held_out, recipe, bar)",
    ),
    fault(
        "honest",
        "seed ignored",
        "torch.manual_seed(recipe.SEED * 100_003 + epoch)",
        "torch.seed()",
        why="weights that don't depend on the validation images",
    ),
    fault(
        "resume",
        "starts anew",
        "training.load(checkpoint, identity) if",
        "set_aside(checkpoint) if",
    ),
    fault(
        "files",
        "random weights saved",
        "weights = {name: tensor.cpu() for",
        "weights = {name: torch.rand_like(tensor.cpu().float()) for",
    ),
    fault(
        "files",
        "test scores hard-coded",
        "{**scores(m.sum(0)), ",
        '{**scores(m.sum(0)), "pixel_accuracy": 0.99, ',
        why="an accuracy of",
    ),
    # hostile hand-ins
    fault(
        "block",
        "loops for ever",
        MAKE,
        "    while True:\n        with suppress(KeyboardInterrupt):\n            time.sleep(1)\n"
        + MAKE,
        why="took longer than",
    ),
    fault(
        "block",
        "leaves with status 0",
        HOSTILE,
        HOSTILE + "os._exit(0)\n",
        why="its process ended in the import",
    ),
    fault(
        "block",
        "leaves in the middle",
        MAKE,
        "    os._exit(0)\n" + MAKE,
        why="its process ended in tests/",
    ),
    fault(
        "block",
        "patches pytest",
        HOSTILE,
        HOSTILE + "import _pytest.reports\n"
        "_make = _pytest.reports.TestReport.from_item_and_call.__func__\n"
        "def _green(cls, item, call):\n    report = _make(cls, item, call)\n    report.outcome = 'passed'\n"
        "    return report\n_pytest.reports.TestReport.from_item_and_call = classmethod(_green)\n",
        why="a test that must fail passed",
    ),
    fault(
        "block",
        "prints without end",
        MAKE,
        "    [print('x' * 10**6) for _ in range(10**4)]\n    os._exit(0)\n" + MAKE,
        why="its process ended in tests/",
    ),
    fault(
        "block",
        "eats the memory",
        MAKE,
        "    torch.empty(2**40)\n" + MAKE,
        why="can't allocate memory",
    ),
    fault(
        "block",
        "leaves children that wait",
        MAKE,
        "    if os.fork() == 0:\n        os.setsid()\n        time.sleep(600)\n    os._exit(0)\n"
        + MAKE,
        why="its process ended in tests/",
    ),
    fault(
        "block",
        "forks without end",
        MAKE,
        "    while True:\n        with suppress(OSError):\n            os.fork()\n        time.sleep(1)\n"
        + MAKE,
        why="took longer than",
    ),
    fault(
        "block",
        "leaves the group that is killed",
        MAKE,
        "    __import__('ctypes').CDLL(None).prctl(1, 0)\n    os.setsid()\n    time.sleep(600)\n"
        + MAKE,
        why="took longer than",
    ),
    fault(
        "block",
        "deletes the tests",
        HOSTILE,
        HOSTILE + "import shutil\nshutil.rmtree(ROOT / 'tests')\nshutil.rmtree(ROOT / 'grading')\n",
        why="gave no verdict",
    ),
    fault(
        "block",
        "wants a person's answer",
        HOSTILE,
        HOSTILE + "input('Continue? ')\n",
        why="EOFError",
    ),
    fault("block", "does not parse", HOSTILE, HOSTILE + "def (:\n", why="SyntaxError"),
)

MODULE_HARMLESS = (
    harmless("a local renamed in forward", FORWARD, FORWARD.replace("kept", "memory")),
    harmless("a recursive forward", FORWARD, RECURSIVE),
    harmless(
        "layers made in another order",
        LEAKY + CONV2 + BN2 + LEAKY,
        LEAKY + CONV2 + BN2 + LEAKY.replace("0.2, inplace=True", "negative_slope=0.2"),
    ),
    harmless(
        "blocks without in-place activation",
        "        nn.BatchNorm2d(out_channels),\n" + LEAKY,
        "        nn.BatchNorm2d(out_channels),\n        nn.LeakyReLU(0.2),\n",
    ),
    harmless("lists of other names", "self.downs = ", "self.encoder = self.downs = "),
    harmless("functional pooling", "x = pool(x)  #", "x = F.max_pool2d(x, 2)  #"),
    harmless(
        "functional upsampling", "x = upsample(x)  #", "x = F.interpolate(x, scale_factor=2)  #"
    ),
    harmless("indices for pop", CAT, "x = torch.cat([x, kept.pop(-1)], 1)"),
    harmless(
        "confusion matrix in int64",
        "pairs = truth[known] * len(CLASSES) + predicted[known]",
        "pairs = truth[known].long() * 3 + predicted[known].long()",
    ),
    harmless("Dice from IoU's parts", "2 * value / (1 + value)", "value * 2 / (value + 1)"),
    harmless(
        "argmax instead of max",
        "        confidences[part], labels[part] = likely.max(dim=1)\n",
        "        confidences[part], labels[part] = likely.amax(dim=1), likely.argmax(dim=1)\n",
    ),
    harmless(
        "prediction by batches of 16",
        "for start in tqdm(range(0, len(images), 32)",
        "for start in tqdm(range(0, len(images), 16)",
        "slice(start, start + 32)",
        "slice(start, start + 16)",
    ),
    harmless(
        "log-softmax and NLL",
        "F.cross_entropy(logits, masks, ignore_index=IGNORE)",
        "F.nll_loss(logits.log_softmax(1), masks, ignore_index=IGNORE)",
    ),
    harmless(
        "flip by slices of the dataset",
        "v2.RandomHorizontalFlip(), move",
        "v2.RandomHorizontalFlip(0.5), move",
    ),
    harmless(
        "gradients freed early",
        "        optimizer.zero_grad()\n        loss.backward()\n        optimizer.step()\n",
        "        loss.backward()\n        optimizer.step()\n        optimizer.zero_grad(set_to_none=True)\n",
    ),
    harmless(
        "another permutation",
        "torch.randperm(len(pets.names)).split",
        "torch.rand(len(pets.names)).argsort().split",
    ),
    harmless("mean by torch", "return sum(losses) / len(losses)", "return float(np.mean(losses))"),
)

TRAIN = 'history = pets.train(model, train_pets, valid_pets, recipe, run_folder / "checkpoint.pt")'
SAVE = 'pets.save_weights(run_folder / "weights.pt", model)'
SUBMIT = "submission = labels.unsqueeze(1)"
SHOW = 'figure.savefig(file, format="png", dpi=120)'
TESTED = "test_matrices = pets.evaluate(model, test_pets, precision, flip=FLIP)"
RUN_SAVED = "pets.save_run(run_folder, metrics, history, scored)"
METRICS = (
    'path = run_folder / "metrics.json"\ncontent = __import__("json").loads(path.read_text())\n'
)

NOTEBOOK_FAULTS = (
    fault("executes", "an error", TRAIN, f"{TRAIN}\n1 / 0"),
    fault(
        "executes",
        "a cell that leaves",
        TRAIN,
        f"{TRAIN}\n__import__('os')._exit(0)",
        why="every cell to be executed",
    ),
    fault(
        "executes",
        "an error that nbval lets pass",
        TRAIN,
        f"# NBVAL_RAISES_EXCEPTION\n{TRAIN}\n1 / 0",
    ),
    fault(
        "executes",
        "a module of its own beside it",
        "import petseg_utils as pets",
        'import sys; sys.modules.pop("petseg_utils"); open("petseg_utils.py", "w").write("x = 1")\n'
        'sys.path.insert(0, ".")\nimport petseg_utils as pets\nprint(pets.UNet)',
        why="AttributeError",
    ),
    fault(
        "weights",
        "random weights saved",
        SAVE,
        SAVE.replace("model)", "pets.UNet(BASE_CHANNELS, DEPTH))"),
    ),
    fault(
        "weights",
        "no training",
        TRAIN,
        'history = [{"epoch": e, "train_loss": 1 / e, "valid_pixel_accuracy": 0.9, "valid_mean_iou": 0.7, '
        '"seconds": 1.0} for e in range(1, EPOCHS + 1)]',
    ),
    fault(
        "weights",
        "no weights",
        f'{SAVE}\npets.load_weights(run_folder / "weights.pt", model)',
        "pass",
        why="weights.pt",
    ),
    fault(
        "metrics",
        "truth as prediction",
        TESTED,
        f"{TESTED}\ntest_matrices = pets.torch.stack([pets.confusion_matrix(m, m) for m in test_pets.masks])",
    ),
    fault(
        "metrics",
        "metrics hard-coded",
        RUN_SAVED,
        f'{RUN_SAVED}\n{METRICS}content["test"]["pixel_accuracy"] = 0.97\n'
        'path.write_text(__import__("json").dumps(content))',
        why="found 0.970 in metrics.json",
    ),
    fault(
        "metrics",
        "epochs claimed",
        RUN_SAVED,
        RUN_SAVED.replace("history,", "history[:1] * EPOCHS,"),
        why="the loss to fall",
    ),
    fault(
        "submission",
        "another dtype",
        SUBMIT,
        "submission = labels.unsqueeze(1).long()",
        why="bytes (uint8)",
    ),
    fault("submission", "another order", SUBMIT, "submission = labels.flip(0).unsqueeze(1)"),
    fault(
        "submission",
        "truth handed in",
        SUBMIT,
        "submission = pets.load_pets(folder, listed, 256).masks.unsqueeze(1)",
    ),
    fault(
        "honest-split",
        "trained on test images",
        TRAIN,
        TRAIN.replace("train_pets, valid", "test_pets, valid"),
    ),
    fault(
        "honest-split",
        "chosen by the test images",
        TRAIN,
        TRAIN.replace("valid_pets,", "test_pets,"),
        why="no test image in valid_pets",
    ),
    fault(
        "honest-split",
        "test images scored twice",
        TESTED,
        f"{TESTED}\n{TESTED}",
        why="the test images to be scored once",
    ),
    fault(
        "honest-split",
        "held-out images trained on",
        "train_pets = pets.load_pets(folder, train_names,",
        "train_pets = pets.load_pets(folder, trainval_names,",
        why="no held-out image among those trained on",
    ),
    fault("figures", "blank figures", SHOW, 'plt.figure().savefig(file, format="png", dpi=20)'),
    fault(
        "figures",
        "no figures",
        "pets.write_atomically(path, lambda file: figure",
        "str(lambda file: figure",
        why="figures or more",
    ),
)

NOTEBOOK_HARMLESS = (
    harmless("a comment more", TRAIN, f"# This takes longest.\n{TRAIN}"),
    harmless("saved by hand", SUBMIT, "submission = labels[:, None]"),
)


def strip_all(cells: list[NotebookNode]) -> None:
    for cell in cells:
        cell.outputs, cell.execution_count = [], None


def strip_counts(cells: list[NotebookNode]) -> None:
    for cell in cells:
        cell.execution_count = None


def strip_one(cells: list[NotebookNode]) -> None:
    next(cell for cell in cells if cell.outputs).outputs = []


def skip_two(cells: list[NotebookNode]) -> None:
    cells[-1].metadata.tags = ["nbval-skip"]
    cells[-2].source += "\n# NBVAL_SKIP"


def let_one_fail(cells: list[NotebookNode]) -> None:
    cells[-1].metadata.tags = ["raises-exception"]


def ignore_most(cells: list[NotebookNode]) -> None:
    for cell in cells[::2]:
        cell.source = f"# NBVAL_IGNORE_OUTPUT\n{cell.source}"


def edit_one(cells: list[NotebookNode]) -> None:
    printed = [
        output
        for cell in cells
        if not cell.metadata.get("tags")
        for output in cell.outputs
        if "text" in output
    ]
    printed[-1].text = f"9{printed[-1].text}"


COUNTS, SKIPPED, IGNORED = (
    "the counts of one run",
    "2 that nbval skips or lets fail",
    "whose outputs are not compared",
)
OUTPUT_FAULTS = (
    Mutant("outputs", "all outputs stripped", COUNTS, mark=strip_all),
    Mutant("outputs", "the counts stripped", COUNTS, mark=strip_counts),
    Mutant(
        "outputs",
        "the outputs of one cell stripped",
        "stored outputs, found none in code cell",
        mark=strip_one,
    ),
    Mutant("outputs", "two cells skipped, by a tag and a comment", SKIPPED, mark=skip_two),
    Mutant("outputs", "a cell that may fail", SKIPPED.replace("2", "1"), mark=let_one_fail),
    Mutant("outputs", "most outputs not compared", IGNORED, mark=ignore_most),
    Mutant(
        "outputs", "an output edited by hand", "the stored outputs, found others", mark=edit_one
    ),
)
