"""How fast is a training step, and how does its cost grow? `make bench` runs this, in some five
minutes on two cores.

The project's step is measured against a plain one, against itself with the memory not kept, and
against the machine's own matrix product; then the share of the training loop that is no step, and
the cost by side, width, batch and number of images. What is compared takes turns, in a process
each, since to keep freed memory can't be undone in a process. Prints it, and writes
throughput_PRECISION.json and cost.png into runs/bench; what the README quotes is kept in
experiments/ and figures/.
"""

import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import petseg_utils as pets
from experiments.command import as_script
from experiments.sweep import cut, write_json

DEVICE = pets.pick_device()
PRECISION = pets.pick_precision("auto", DEVICE)
SIDE, BATCH, WIDTH, DEPTH, STEPS = 128, 16, 32, 5, 2  # of the headline figures
EXPECTED = {"side": 2, "width": 2, "batch": 1, "images": 1}  # slopes of log cost by log size
LABELS = {
    "side": "side of the images, pixels",
    "width": "base channels",
    "batch": "images in the one batch",
    "images": "images, in batches of 8",
}


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = perf_counter()
    work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return perf_counter() - start


def least_seconds(what: str, *works: Callable[[], float], rounds: int = 5) -> list[float]:
    """Return the least of several measurements by each of `works`, which take turns, after one to
    warm up.

    The least, since what disturbs a measurement only ever adds to it; in turns, so that a slow
    minute of the machine falls on all of them.
    """
    times = [[work() for work in works] for _ in tqdm(range(rounds + 1), what, leave=False)]
    return np.min(times[1:], axis=0).tolist()


def random_pets(count: int, side: int) -> pets.Pets:
    """Return images of noise: what they show makes no difference to the time."""
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    return pets.Pets(
        [f"noise_{i}" for i in range(count)], images, torch.randint(3, (count, side, side)).byte()
    )


def plain_step(side: int, batch: int, width: int) -> Callable[[], None]:
    """Return the step as one writes it first: float32, default layout, default optimiser, nothing in place."""
    model = pets.UNet(width, DEPTH).to(DEVICE).train()
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False
    return step_of(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        torch.float32,
        random_pets(batch, side),
    )


def fast_step(side: int, batch: int, width: int, muon: bool = False) -> Callable[[], None]:
    """Return the project's own step, with AdamW like the plain one, or with Muon."""
    training = start_training(width, muon)
    return step_of(training.model, training.optimizer, PRECISION, random_pets(batch, side))


def start_training(width: int, muon: bool = False) -> pets.Training:
    """Return a training set up as `pets.train` does, with AdamW unless `muon`."""
    layout = torch.contiguous_format if PRECISION is torch.float32 else torch.channels_last
    model = pets.UNet(width, DEPTH).to(DEVICE, memory_format=layout).train()
    recipe = pets.Recipe(MUON=muon, LEARNING_RATE=1e-3, BASE_CHANNELS=width)
    return pets.Training.start(model, recipe, total_steps=10**6)


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, precision: torch.dtype, data: pets.Pets
) -> Callable[[], None]:
    """Return `STEPS` training steps on one batch that is ready: no data, no augmentation, no average, no schedule."""
    images, masks = pets.to_input(data.images, DEVICE), data.masks.to(DEVICE).long()

    def steps() -> None:
        for _ in range(STEPS):
            with torch.autocast(DEVICE.type, precision, enabled=precision != torch.float32):
                logits = model(images)
            optimizer.zero_grad()
            pets.segmentation_loss(logits.float(), masks).backward()
            optimizer.step()

    return steps


def epoch(side: int, batch: int, width: int, images: int, augment: float) -> Callable[[], float]:
    """Return an epoch of `pets.train_epoch`, with AdamW like the steps."""
    training, data, bar = start_training(width), random_pets(images, side), tqdm(disable=True)
    recipe = pets.Recipe(
        IMAGE_SIZE=side, BASE_CHANNELS=width, BATCH_SIZE=batch, MUON=False, AUGMENT=augment
    )
    return lambda: pets.train_epoch(training, data, recipe, bar)


def matrix_product(precision: torch.dtype, size: int = 1024) -> float:
    """Return the FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=DEVICE).to(precision) for _ in range(2))
    return 2 * size**3 / least_seconds("matrix product", lambda: seconds_of(lambda: a @ b))[0]


HEADLINE = {  # what is measured: whether freed memory is kept, and what makes the work
    "plain": (False, lambda: plain_step(SIDE, BATCH, WIDTH)),
    "memory not kept": (False, lambda: fast_step(SIDE, BATCH, WIDTH)),
    "step": (True, lambda: fast_step(SIDE, BATCH, WIDTH)),
    "with Muon": (True, lambda: fast_step(SIDE, BATCH, WIDTH, muon=True)),
    "loop": (True, lambda: epoch(SIDE, BATCH, WIDTH, STEPS * BATCH, augment=1.0)),
}
WORK: list[Callable[[], object]] = []  # of this process, if it is one of those below


def set_up(name: str, threads: int) -> None:
    """Prepare a process to measure one thing."""
    torch.set_num_threads(threads)
    keep, make = HEADLINE[name]
    if keep:
        pets.keep_freed_memory()
    WORK.append(make())


def measure() -> float:
    """Return the seconds of the work that this process was set up for."""
    return seconds_of(WORK[0])


def in_turns() -> dict[str, float]:
    """Return the least seconds of each part of the headline, each measured in a process of its own, in turns."""
    spawn, threads = get_context("spawn"), torch.get_num_threads()
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, spawn, set_up, (name, threads)))
            for name in HEADLINE
        ]
        works = [lambda pool=pool: pool.submit(measure).result() for pool in pools]
        return dict(zip(HEADLINE, least_seconds("steps", *works), strict=True))


def headline() -> dict:
    """Measure the step and the loop, at the size of the headline figures, all over the same number of steps."""
    plain, before, step, with_muon, loop = in_turns().values()
    images = STEPS * BATCH
    forward = sum(s.flops for s in pets.analyse_shapes(pets.UNet(WIDTH, DEPTH), SIDE))
    flops = 3 * forward * images / step  # the backward pass takes twice the forward pass's
    products = {
        str(p).removeprefix("torch."): matrix_product(p) for p in (torch.float32, torch.bfloat16)
    }
    return {
        "side": SIDE,
        "batch": BATCH,
        "base_channels": WIDTH,
        "precision": str(PRECISION).removeprefix("torch."),
        "plain_images_per_second": images / plain,
        "step_images_per_second": images / step,
        "muon_step_images_per_second": images / with_muon,
        "loop_images_per_second": images / loop,
        "step_against_plain": plain / step,
        "step_against_memory_not_kept": before / step,
        "step_gflops": flops / 1e9,
        "matrix_product_gflops": {name: value / 1e9 for name, value in products.items()},
        "step_against_best_product": flops / max(products.values()),
        "share_of_training_loop_not_step": 1 - step / loop,
    }


def growth() -> dict[str, dict]:
    """Measure seconds by side, width, batch and number of images, the rest being held still."""
    pets.keep_freed_memory()

    def grow(sizes: list[int], *names: str) -> dict:
        """Let what `names` names grow along `sizes`."""
        still = {"side": 64, "batch": 8, "width": 32, "images": 8}
        epochs = [epoch(**still | dict.fromkeys(names, size), augment=0.0) for size in sizes]
        seconds = least_seconds(
            f"cost by {names[0]}", *(partial(seconds_of, one) for one in epochs)
        )
        slope = np.polyfit(np.log(sizes[1:]), np.log(seconds[1:]), 1)[
            0
        ]  # the smallest is mostly overhead
        return {"sizes": sizes, "seconds": seconds, "slope": float(slope)}

    return {
        "side": grow([32, 64, 128, 256], "side"),
        "width": grow([8, 16, 32, 64], "width"),
        "batch": grow([4, 8, 16, 32], "batch", "images"),  # one step each
        "images": grow([8, 16, 32, 64], "images"),
    }


def plot_growth(measured: dict[str, dict]) -> plt.Figure:
    """Plot seconds by size on logarithmic axes, and the slope that is expected, through the largest."""
    alt = "Seconds of training by side, width, batch and number of images, on logarithmic axes, with expected slopes."
    figure, panels = plt.subplots(
        1, 4, figsize=(12, 3.4), sharey=True, layout="constrained", label=alt
    )
    for axes, (name, line) in zip(panels, measured.items(), strict=True):
        sizes, seconds, slope = np.array(line["sizes"]), line["seconds"], EXPECTED[name]
        expected = seconds[-1] * (sizes / sizes[-1]) ** slope
        axes.loglog(sizes, expected, ":", color="grey", label=f"expected, slope {slope}")
        axes.loglog(
            sizes, seconds, "o-", color=pets.GREEN, label=f"measured, slope {line['slope']:.1f}"
        )
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel=LABELS[name], ylabel="seconds" if name == "side" else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def figures_of(measured: dict) -> dict[str, str]:
    """Return the headline figures by name, none rounded in our favour."""
    products, memory = measured["matrix_product_gflops"], measured["step_against_memory_not_kept"]
    muon = 100 * (measured["step_images_per_second"] / measured["muon_step_images_per_second"] - 1)
    return {
        "computed in": measured["precision"],
        "plain step, images a second": cut(measured["plain_images_per_second"], 2),
        "this project's step, images a second": cut(measured["step_images_per_second"], 2),
        "the step with Muon, images a second": cut(measured["muon_step_images_per_second"], 2),
        "what Muon adds to the step": f"{-float(cut(-muon, 1))} %",
        "the step against the plain one": f"{cut(measured['step_against_plain'], 2)} times as fast",
        "the step against itself, freed memory not kept": f"{cut(memory, 2)} times",
        "the step, GFLOP/s": cut(measured["step_gflops"], 0),
        **{
            f"matrix product in {name}, GFLOP/s": f"{value:.3g}" for name, value in products.items()
        },
        "the step against the faster product": f"{cut(100 * measured['step_against_best_product'], 0)} %",
        "share of the training loop that is no step": f"{100 * measured['share_of_training_loop_not_step']:.1f} %",
    }


def table(*measured: dict) -> str:
    """Return the headline figures as Markdown, with a column for each machine."""
    columns = [figures_of(one) for one in measured]
    rows = [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    return "\n".join(
        ["| measured |" + " |" * len(columns), "|---" * (1 + len(columns)) + "|", *rows]
    )


def main() -> None:
    """Measure, print, and write."""
    print(f"measuring on {DEVICE} with {torch.get_num_threads()} threads; keep the machine quiet")
    result = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    result |= {"headline": headline()}
    print(table(result["headline"]))
    result |= {"growth": growth()}
    for name, line in result["growth"].items():
        print(f"cost by {name:10} slope {line['slope']:.1f}, expected {EXPECTED[name]}")
    write_json(
        pets.ROOT / "runs" / "bench" / f"throughput_{result['headline']['precision']}.json", result
    )
    figure, path = plot_growth(result["growth"]), pets.ROOT / "runs" / "bench" / "cost.png"
    pets.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


if __name__ == "__main__":
    as_script(main, __doc__)
