"""How fast is a training step, and how does its cost grow? `make bench`, five minutes on two cores.

The project's step is measured against a plain one, against itself with the memory not kept, and
against the machine's own matrix product; then the share of the training loop that is no step, and
the cost by side, width, batch and number of images. What is compared takes turns, in a process
each, since to keep freed memory can't be undone in a process. Prints it, and writes
throughput_PRECISION.json and cost.png into runs/bench; what is quoted is kept in experiments/ and
figures/.
"""

import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing import get_context
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import petseg_utils as pets
from experiments.command import as_script
from experiments.tables import cut, markdown, write_json

DEVICE = pets.pick_device()
PRECISION = pets.pick_precision("auto", DEVICE)
SIDE, BATCH, STEPS = 128, 16, 2  # of the headline figures, with the course's net
PLAIN = pets.Recipe(IMAGE_SIZE=SIDE, BASE_CHANNELS=32, MUON=False, LEARNING_RATE=1e-3)
GROWING = {  # what grows, along which sizes, the slope of log cost to expect, an axis's label
    "side": (["side"], [32, 64, 128, 256], 2, "side of the images, pixels"),
    "width": (["width"], [8, 16, 32, 64], 2, "base channels"),
    "batch": (["batch", "images"], [4, 8, 16, 32], 1, "images in the one batch"),
    "images": (["images"], [8, 16, 32, 64], 1, "images, in batches of 8"),
}


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = perf_counter()
    work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return perf_counter() - start


def least_seconds(what: str, *works: Callable[[], float], rounds: int = 5) -> list[float]:
    """Return the least measurement by each of `works`, which take turns, after one to warm up.

    The least, since what disturbs a measurement only ever adds to it; in turns, so that a slow
    minute of the machine falls on all of them.
    """
    times = [[work() for work in works] for _ in tqdm(range(rounds + 1), what, leave=False)]
    return np.min(times[1:], axis=0).tolist()


def random_pets(count: int, side: int) -> pets.Pets:
    """Return images of noise: what they show makes no difference to the time."""
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    masks = torch.randint(3, (count, side, side)).byte()
    return pets.Pets([f"noise_{i}" for i in range(count)], images, masks)


def plain_step() -> Callable[[], None]:
    """Return the step as one writes it first: float32, defaults, nothing in place."""
    model = pets.UNet(PLAIN.BASE_CHANNELS).to(DEVICE).train()
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False
    return steps_of(model, torch.optim.AdamW(model.parameters(), lr=1e-3), torch.float32)


def fast_step(recipe: pets.Recipe = PLAIN) -> Callable[[], None]:
    """Return the project's own step."""
    training = start_training(recipe)
    return steps_of(training.model, training.optimizer, PRECISION)


def start_training(recipe: pets.Recipe) -> pets.Training:
    """Return a training set up as `pets.train` does, but for the memory that is kept."""
    layout = torch.contiguous_format if PRECISION is torch.float32 else torch.channels_last
    model = pets.UNet(recipe.BASE_CHANNELS).to(DEVICE, memory_format=layout).train()
    return pets.Training.start(model, recipe, total_steps=10**6)


def steps_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, precision: torch.dtype
) -> Callable[[], None]:
    """Return `STEPS` bare steps on one ready batch: no augmentation, no average, no schedule."""
    data = random_pets(BATCH, SIDE)
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
    sizes = {"IMAGE_SIZE": side, "BASE_CHANNELS": width, "BATCH_SIZE": batch}
    recipe = PLAIN.but(**sizes, AUGMENT=augment)
    training, data, bar = start_training(recipe), random_pets(images, side), tqdm(disable=True)
    return lambda: pets.train_epoch(training, data, recipe, bar)


def matrix_product(precision: torch.dtype, size: int = 1024) -> float:
    """Return the FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=DEVICE).to(precision) for _ in range(2))
    return 2 * size**3 / least_seconds("matrix product", lambda: seconds_of(lambda: a @ b))[0]


HEADLINE = {  # what is measured: whether freed memory is kept, and what makes the work
    "plain": (False, plain_step),
    "memory not kept": (False, fast_step),
    "step": (True, fast_step),
    "with Muon": (True, lambda: fast_step(PLAIN.but(MUON=True))),
    "loop": (True, lambda: epoch(SIDE, BATCH, PLAIN.BASE_CHANNELS, STEPS * BATCH, augment=1.0)),
}


@cache
def work_of(name: str, threads: int) -> Callable[[], object]:
    """Return the work of one part of the headline, for which its process is set up once."""
    torch.set_num_threads(threads)
    keep, make = HEADLINE[name]
    if keep:
        pets.keep_freed_memory()
    return make()


def measure(name: str, threads: int) -> float:
    """Return the seconds of one part of the headline."""
    return seconds_of(work_of(name, threads))


def in_turns() -> dict[str, float]:
    """Return the least seconds of each part of the headline, in turns, each in its own process."""
    spawn, threads = get_context("spawn"), torch.get_num_threads()
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, spawn)) for name in HEADLINE}
        works = [
            lambda name=name, pool=pool: pool.submit(measure, name, threads).result()
            for name, pool in pools.items()
        ]
        return dict(zip(HEADLINE, least_seconds("steps", *works), strict=True))


def headline() -> dict:
    """Measure the step and the loop, at the size of the headline figures."""
    plain, before, step, with_muon, loop = in_turns().values()
    images = STEPS * BATCH
    forward = sum(s.flops for s in pets.analyse_shapes(pets.UNet(PLAIN.BASE_CHANNELS), SIDE))
    flops = 3 * forward * images / step  # the backward pass takes twice the forward pass's
    products = {name_of(p): matrix_product(p) for p in (torch.float32, torch.bfloat16)}
    return {
        "side": SIDE,
        "batch": BATCH,
        "base_channels": PLAIN.BASE_CHANNELS,
        "precision": name_of(PRECISION),
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


def name_of(precision: torch.dtype) -> str:
    """Return a precision's name, "float32"."""
    return str(precision).removeprefix("torch.")


def grow(name: str) -> dict:
    """Measure seconds as one thing grows and the rest stays, and the slope of their logs."""
    names, sizes, *_ = GROWING[name]
    still = {"side": 64, "batch": 8, "width": 32, "images": 8}
    epochs = [epoch(**still | dict.fromkeys(names, size), augment=0.0) for size in sizes]
    seconds = least_seconds(f"cost by {name}", *(partial(seconds_of, one) for one in epochs))
    slope, _ = np.polyfit(np.log(sizes[1:]), np.log(seconds[1:]), 1)  # the smallest: overhead
    return {"sizes": sizes, "seconds": seconds, "slope": float(slope)}


def plot_growth(measured: dict[str, dict]) -> plt.Figure:
    """Plot seconds by size, and the expected slope through the largest, on logarithmic axes."""
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.4), sharey=True, layout="constrained")
    for axes, (name, line) in zip(panels, measured.items(), strict=True):
        *_, slope, label = GROWING[name]
        sizes, seconds = np.array(line["sizes"]), line["seconds"]
        expected = seconds[-1] * (sizes / sizes[-1]) ** slope
        axes.loglog(sizes, expected, ":", color="grey", label=f"expected, slope {slope}")
        told = f"measured, slope {line['slope']:.1f}"
        axes.loglog(sizes, seconds, "o-", color=pets.GREEN, label=told)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel=label, ylabel="seconds" if name == "side" else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def figures_of(one: dict) -> dict[str, str]:
    """Return the headline figures by name, none rounded in our favour."""
    muon = 100 * (one["step_images_per_second"] / one["muon_step_images_per_second"] - 1)
    memory = cut(one["step_against_memory_not_kept"], 2)
    figures = {
        "plain step, images a second": cut(one["plain_images_per_second"], 2),
        "this project's step, images a second": cut(one["step_images_per_second"], 2),
        "the step with Muon, images a second": cut(one["muon_step_images_per_second"], 2),
        "what Muon adds to the step": f"{-float(cut(-muon, 1))} %",
        "the step against the plain one": f"{cut(one['step_against_plain'], 2)} times as fast",
        "the step against itself, freed memory not kept": f"{memory} times",
        "the step, GFLOP/s": cut(one["step_gflops"], 0),
    }
    for name, value in one["matrix_product_gflops"].items():
        figures[f"matrix product in {name}, GFLOP/s"] = f"{value:.3g}"
    best, rest = one["step_against_best_product"], one["share_of_training_loop_not_step"]
    figures["the step against the faster product"] = f"{cut(100 * best, 0)} %"
    figures["share of the training loop that is no step"] = f"{100 * rest:.1f} %"
    return figures


def table(*measured: dict) -> str:
    """Return the headline figures as Markdown, with a column for each machine."""
    columns = [figures_of(one) for one in measured]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return markdown(["computed in", *(one["precision"] for one in measured)], rows)


def main() -> None:
    """Measure, print, and write."""
    threads, folder = torch.get_num_threads(), pets.ROOT / "runs" / "bench"
    print(f"measuring on {DEVICE} with {threads} threads; keep the machine quiet")
    result = {"machine": platform.machine(), "threads": threads, "torch": torch.__version__}
    result["headline"] = headline()
    print(table(result["headline"]))
    pets.keep_freed_memory()
    result["growth"] = {name: grow(name) for name in GROWING}
    for name, line in result["growth"].items():
        print(f"cost by {name:10} slope {line['slope']:.1f}, expected {GROWING[name][2]}")
    write_json(folder / f"throughput_{name_of(PRECISION)}.json", result)
    figure = plot_growth(result["growth"])
    picture = folder / "cost.png"
    pets.write_atomically(picture, lambda file: figure.savefig(file, format="png", dpi=120))


if __name__ == "__main__":
    as_script(main, __doc__)
