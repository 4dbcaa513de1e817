"""Put runs side by side: what a change was worth, and whether it is more than chance.

`compare_runs.ipynb` shows it. The interval is a bootstrap of our own: scipy's draws the images one
by one, where a draw here is a row of counts, so that one matrix product scores two thousand draws.
"""

import html
import re
from functools import lru_cache, partial
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

import petseg_utils as pets
from experiments.read_runs import Run
from experiments.tables import cut
from petseg_utils import InputError

# --------------------------------------------------------------------------------------- statistics


def score_of(counts: np.ndarray, score: str) -> np.ndarray:
    """Return "pixel_accuracy", "mean_iou" or, say, "iou.border" by confusion counts (..., K * K).

    A class that is not there has the IoU NaN, and does not count in the mean.
    """
    matrix = counts.reshape(*counts.shape[:-1], len(pets.CLASSES), len(pets.CLASSES))
    right = matrix.diagonal(axis1=-2, axis2=-1)
    if score == "pixel_accuracy":
        return right.sum(-1) / counts.sum(-1)
    union = matrix.sum(-1) + matrix.sum(-2) - right
    iou = np.divide(right, union, out=np.full(right.shape, np.nan), where=union > 0)
    if score == "mean_iou":
        return np.nanmean(iou, axis=-1)
    return iou[..., pets.CLASSES.index(score.removeprefix("iou."))]


class Estimate(NamedTuple):
    """A score, or the difference of two, and its 95 % interval: NaN without images' counts."""

    value: float
    low: float = np.nan
    high: float = np.nan

    @property
    def points(self) -> str:
        """The difference of two scores in percentage points."""
        value, low, high = (f"{100 * number:+.2f}" for number in self)
        return value if np.isnan(self.low) else f"{value} ({low} to {high})"

    @property
    def verdict(self) -> str:
        """What the interval says about a gain."""
        return "yes" if self.low > 0 else "no, it harms" if self.high < 0 else "can't be told"


@lru_cache(maxsize=2)
def resample(images: int, times: int = 2000) -> np.ndarray:
    """Return how often images occur: once, then in draws with replacement, (1 + times, B)."""
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), times)
    return np.vstack([np.ones(images), draws])  # floats multiply fast, and are exact up to 2**53


def estimate(
    score: str, runs: list[dict[str, np.ndarray]], bases: list[dict[str, np.ndarray]] | None = None
) -> Estimate:
    """Return the mean score of runs, or its gain over their bases, with a bootstrap interval.

    A run is given by the confusion counts of its images, {name: (K * K,)}. Runs and bases are
    paired: a draw has the same images for all, so that what is hard for every net cancels out. The
    interval says what other images might have given, not what other seeds might.
    Errors: `InputError` for a run and a base with other images.
    """
    if bases and any(run.keys() != base.keys() for run, base in zip(runs, bases, strict=True)):
        mend = "compare runs with the same LIMIT and SEED"
        raise InputError(f"a run and its base were scored on other images: {mend}.")
    names = sorted({name for run in runs for name in run})
    none = np.zeros(len(pets.CLASSES) ** 2)  # another seed may have held out other images

    def drawn(side: list[dict[str, np.ndarray]]) -> np.ndarray:
        rows = (np.array([counts.get(name, none) for name in names]) for counts in side)
        return np.mean([score_of(resample(len(names)) @ one, score) for one in rows], axis=0)

    scores = drawn(runs) - drawn(bases) if bases else drawn(runs)
    return Estimate(float(scores[0]), *map(float, np.nanpercentile(scores[1:], [2.5, 97.5])))


# --------------------------------------------------------------------------------------- comparison


class Repeated(NamedTuple):
    """Runs that differ in their seed alone; scores have their names in a table, "test.mean_iou"."""

    name: str
    runs: list[Run]

    def mean(self, score: str) -> float:
        """Return the mean of a score over the seeds; a class that is not there counts 0."""
        return float(np.mean([run.row[score] or 0 for run in self.runs]))

    def shown(self, score: str) -> str:
        """Return the mean in percent, cut, and of several seeds half of the range, rounded up."""
        every = [100 * run.row[score] for run in self.runs]
        spread = f" ± {-float(cut((min(every) - max(every)) / 2, 2)):.2f}" if len(every) > 1 else ""
        return cut(float(np.mean(every)), 2) + spread

    def gain(self, base: "Repeated", split: str, score: str = "mean_iou") -> Estimate:
        """Return the gain on a split over a base, over the seeds that both have."""
        seeds = {run.seed: run for run in base.runs}
        own = [run for run in self.runs if run.seed in seeds]
        if not own:
            return Estimate(np.nan)
        sides = [own, [seeds[run.seed] for run in own]]
        if all(split in run.counts for side in sides for run in side):
            return estimate(score, *([run.counts[split] for run in side] for side in sides))
        means = [Repeated("", side).mean(f"{split}.{score}") for side in sides]
        return Estimate(means[0] - means[1])


def group_runs(runs: list[Run]) -> dict[tuple, list[Repeated]]:
    """Return the runs by what they were tested on, folded over seeds, the best validation first."""
    found: dict[tuple, dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: (run.test_of, run.recipe, run.seed)):
        found.setdefault(run.test_of, {}).setdefault(run.recipe, []).append(run)
    groups = {}
    for test_of, recipes in found.items():
        rows = [
            Repeated(re.sub(r"_seed_\d+$", "", same[0].name), same) for same in recipes.values()
        ]
        groups[test_of] = sorted(rows, key=lambda row: -row.mean("valid.mean_iou"))
    return groups


def find_base(rows: list[Repeated], base: str) -> Repeated | None:
    """Return the row called `base`, or whose name ends in _`base`."""
    return next((row for row in rows if row.name == base or row.name.endswith(f"_{base}")), None)


def comparison(rows: list[Repeated], base: Repeated | None) -> list[dict[str, object]]:
    """Return rows for `html_table`: scores in percent, gains over the base in points.

    Of the parameters, those are shown in which the rows differ.
    """
    parameters = pd.DataFrame([row.runs[0].parameters for row in rows], dtype=object).fillna("–")
    parameters = parameters.drop(columns=[*pets.Recipe.PLACES, "SEED"], errors="ignore")
    different = parameters.columns[parameters.astype(str).nunique() > 1]

    def gain(row: Repeated, split: str) -> str:
        return row.gain(base, split).points if base and base is not row else "–"

    return [
        {
            "run": row.name,
            "place": place + 1,
            "seeds": ", ".join(str(run.seed) for run in row.runs),
            "validation mean IoU, %": row.shown("valid.mean_iou"),
            "gain (95 %)": gain(row, "valid"),
            "test mean IoU, %": row.shown("test.mean_iou"),
            "test gain (95 %)": gain(row, "test"),
            "test accuracy, %": row.shown("test.pixel_accuracy"),
            "net's parameters": f"{row.runs[0].row['model.parameters']:,}",
            "GFLOP": f"{row.runs[0].row['model.flops'] / 1e9:.3g}",
            "seconds": f"{row.mean('training.seconds'):.0f}",
            **parameters.loc[place, different],
        }
        for place, row in enumerate(rows)
    ]


def links(rows: list[Repeated]) -> str:
    """Return HTML with links to the runs' notebooks, as seen from a folder of the project."""
    runs = [run for row in rows for run in row.runs]
    linked = [
        f'<a href="../{quote(run.folder)}/notebook.ipynb">{html.escape(run.name)}</a>'
        for run in runs
        if (pets.ROOT / run.folder / "notebook.ipynb").is_file()
    ]
    return f"<p>Notebooks: {', '.join(linked)}</p>" if linked else ""


def pareto_front(costs: list[float], gains: list[float]) -> list[int]:
    """Return which points no other beats at no more cost, from the cheapest to the dearest."""
    points = pd.DataFrame({"cost": costs, "gain": gains})
    gain = points.sort_values(["cost", "gain"], ascending=[True, False])["gain"]
    return gain.index[gain > gain.cummax().shift(fill_value=-np.inf)].tolist()


def moved_most(run: Run, base: Run, count: int = 2) -> dict[str, float]:
    """Return by how much right pixels changed on the test images that gained and lost most."""
    right = partial(score_of, score="pixel_accuracy")
    own, others = (pd.Series(one.counts["test"]).map(right) for one in (run, base))
    change = (own - others).dropna().sort_values(ascending=False, kind="stable")
    return {**change[:count], **change[-count:]}
