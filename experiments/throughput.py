"""How fast is a training step? `make bench`, a few minutes on two cores.

Prints the table of the README and writes throughput_PRECISION.json into runs/bench; what is quoted
is kept in experiments/.
"""

import platform
from collections.abc import Callable
from time import perf_counter

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import petseg_utils as pets
from experiments.command import as_script
from experiments.tables import cut, markdown, write_json

DEVICE = pets.pick_device()
PRECISION = pets.pick_precision("auto", DEVICE)
NAME = str(PRECISION).removeprefix("torch.")
SIDE, BATCH, STEPS = 128, 16, 2  # of the headline figures, with the course's net
PLAIN = pets.Recipe(IMAGE_SIZE=SIDE, BASE_CHANNELS=32, MUON=False, LEARNING_RATE=1e-3)


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = perf_counter()
    work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return perf_counter() - start


def least_seconds(rounds: int = 5, **works: Callable[[], object]) -> dict[str, float]:
    """Return the least seconds of each of `works`, which take turns, after a round to warm up.

    The least, since what disturbs a measurement only ever adds to it; in turns, so that a slow
    minute of the machine falls on all of them.
    """
    turns = tqdm(range(rounds + 1), ", ".join(works), leave=False)
    times = [{name: seconds_of(work) for name, work in works.items()} for _ in turns]
    return pd.DataFrame(times[1:]).min().to_dict()


def random_pets(count: int, side: int) -> pets.Pets:
    """Return images of noise: what they show makes no difference to the time."""
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    masks = torch.randint(3, (count, side, side)).byte()
    return pets.Pets([f"noise_{i}" for i in range(count)], images, masks)


def start_training(recipe: pets.Recipe) -> pets.Training:
    """Return a training set up as `pets.train` does, but for the memory that is kept."""
    layout = torch.contiguous_format if PRECISION is torch.float32 else torch.channels_last
    model = pets.UNet(recipe.BASE_CHANNELS).to(DEVICE, memory_format=layout).train()
    return pets.Training.start(model, recipe, total_steps=10**6)


def steps_of(plain: bool = False, **changes: object) -> Callable[[], None]:
    """Return `STEPS` bare steps on one ready batch: no augmentation, no average, no schedule.

    They are the project's own, or plain, as one writes them first: float32, nothing in place.
    """
    training = start_training(PLAIN.but(**changes))
    model, optimizer, precision = training.model, training.optimizer, PRECISION
    if plain:
        model = pets.UNet(PLAIN.BASE_CHANNELS).to(DEVICE).train()
        for module in model.modules():
            if isinstance(module, nn.LeakyReLU):
                module.inplace = False
        optimizer, precision = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.float32
    data = random_pets(BATCH, SIDE)
    images, masks = data.images.to(DEVICE), data.masks.to(DEVICE).long()

    def steps() -> None:
        for _ in range(STEPS):
            logits = pets.run_model(model, images, precision)
            optimizer.zero_grad()
            pets.segmentation_loss(logits, masks).backward()
            optimizer.step()

    return steps


def epoch() -> Callable[[], float]:
    """Return an epoch of `pets.train_epoch`, with AdamW and as many steps."""
    training, data = start_training(PLAIN), random_pets(STEPS * BATCH, SIDE)
    return lambda: pets.train_epoch(training, data, PLAIN, tqdm(disable=True))


def matrix_product(precision: str, size: int = 1024) -> float:
    """Return the FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=DEVICE).to(getattr(torch, precision)) for _ in range(2))
    return 2 * size**3 / least_seconds(matrix_product=lambda: a @ b)["matrix_product"]


def headline() -> dict:
    """Measure the step and the loop, at the size of the headline figures."""
    seconds = least_seconds(plain=steps_of(plain=True), memory_not_kept=steps_of())
    pets.keep_freed_memory()  # which can't be undone
    seconds |= least_seconds(step=steps_of(), muon_step=steps_of(MUON=True), loop=epoch())
    each = {name: STEPS * BATCH / least for name, least in seconds.items()}
    forward = sum(s.flops for s in pets.analyse_shapes(pets.UNet(PLAIN.BASE_CHANNELS), SIDE))
    return {
        "precision": NAME,
        **{f"{name}_images_per_second": value for name, value in each.items()},
        "step_against_memory_not_kept": each["step"] / each["memory_not_kept"],
        "step_gflops": 3 * forward * each["step"] / 1e9,  # the way back takes twice the way there's
        "matrix_product_gflops": {p: matrix_product(p) / 1e9 for p in ("float32", "bfloat16")},
    }


def table(*measured: dict) -> str:
    """Return the headline figures as Markdown, a column a machine, none rounded in our favour."""
    columns = {}
    for one in measured:
        plain, step, muon, loop = (
            one[f"{name}_images_per_second"] for name in ("plain", "step", "muon_step", "loop")
        )
        products = one["matrix_product_gflops"]
        columns[one["precision"]] = {
            "plain step, images a second": cut(plain, 2),
            "this project's step, images a second": cut(step, 2),
            "the step with Muon, images a second": cut(muon, 2),
            "what Muon adds to the step": f"{-float(cut(100 - 100 * step / muon, 1))} %",
            "the step against the plain one": f"{cut(step / plain, 2)} times as fast",
            "the step against itself, freed memory not kept":
                f"{cut(one['step_against_memory_not_kept'], 2)} times",
            "the step, GFLOP/s": cut(one["step_gflops"], 0),
            **{f"matrix product in {name}, GFLOP/s": f"{products[name]:.3g}" for name in products},
            "the step against the faster product":
                f"{cut(100 * one['step_gflops'] / max(products.values()), 0)} %",
            "share of the training loop that is no step": f"{100 * (1 - loop / step):.1f} %",
        }  # fmt: skip
    shown = pd.DataFrame(columns).rename_axis("computed in").reset_index()
    return markdown(shown.to_dict("records"))


def main() -> None:
    """Measure, print, and write."""
    threads = torch.get_num_threads()
    print(f"measuring on {DEVICE} with {threads} threads; keep the machine quiet")
    machine = {"machine": platform.machine(), "threads": threads, "torch": torch.__version__}
    result = machine | {"headline": headline()}
    print(table(result["headline"]))
    write_json(pets.ROOT / "runs" / "bench" / f"throughput_{NAME}.json", result)


if __name__ == "__main__":
    as_script(main, __doc__)
