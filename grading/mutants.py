"""Seeded faults and harmless variants, read from mutants.toml, and their marks on a notebook."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nbformat import NotebookNode

TABLE = Path(__file__).with_name("mutants.toml")


class Mutant(NamedTuple):
    """Changes to a source, and the criterion that turns red by them; "" for a harmless variant."""

    criterion: str
    name: str
    why: str  # what the grader's reason has to hold
    changes: tuple[str, ...]  # old, new, old, new, ...
    append: str  # to the module
    mark: Callable[[list[NotebookNode]], None]  # changes what a notebook stores beside its sources


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
    outputs = [o for cell in cells if not cell.metadata.get("tags") for o in cell.outputs]
    last = [output for output in outputs if "text" in output][-1]
    last.text = f"9{last.text}"


def no_mark(cells: list[NotebookNode]) -> None:
    pass


MARKS = (strip_all, strip_counts, strip_one, skip_two, let_one_fail, ignore_most, edit_one, no_mark)


def read(kind: str) -> list[Mutant]:
    """Return the mutants of a "module" or of a "notebook"."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    marks = {mark.__name__: mark for mark in MARKS}
    mutants = []
    for row in table[kind]:
        criterion = row.get("criterion", "")
        why = row.get("why", table["reasons"].get(criterion, ""))
        pairs = row.get("changes", [[row["old"], row["new"]]] if "old" in row else [])
        texts = tuple(text for pair in pairs for text in pair)
        mark = marks[row.get("mark", "no_mark")]
        mutants.append(Mutant(criterion, row["name"], why, texts, row.get("append", ""), mark))
    return mutants


OF_MODULE, OF_NOTEBOOK = read("module"), read("notebook")
MODULE_FAULTS = [mutant for mutant in OF_MODULE if mutant.criterion]
MODULE_HARMLESS = [mutant for mutant in OF_MODULE if not mutant.criterion]
OUTPUT_FAULTS = [mutant for mutant in OF_NOTEBOOK if mutant.criterion == "outputs"]
NOTEBOOK_FAULTS = [m for m in OF_NOTEBOOK if m.criterion not in ("", "outputs")]
NOTEBOOK_HARMLESS = [mutant for mutant in OF_NOTEBOOK if not mutant.criterion]
