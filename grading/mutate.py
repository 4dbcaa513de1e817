"""Show that no grade is vacuous: `python -m grading.mutate [NAME] [--sample]` grades the mutants.

A seeded fault has to turn its criterion red, with a reason; a harmless variant has to keep all of
its criteria green. NAME is a part of the names, or of the criteria, of those that are graded.
"""

import argparse
import sys
import time
import tomllib
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import nbformat

from grading import grade as grader
from grading.grade import MODULE, NOTEBOOK, ROOT, Criterion, HandIn, Result

LIMIT = 30  # for a module's criterion: a mutant that hangs is seen sooner than a hand-in
BORDER = "\n#%%\n"  # between the cells of a notebook


class Mutant(NamedTuple):
    """Changes to a source, and the criterion that turns red by them; "" for a harmless variant."""

    kind: str  # of what it changes, "module" or "notebook"
    name: str
    criterion: str = ""
    why: str = ""  # what the grader's reason has to hold
    changes: Sequence[tuple[str, str]] = ()  # of an old text into a new one
    append: str = ""  # to the module
    mark: str = ""  # Python that changes what code `cells` store beside their sources


def read_mutants() -> list[Mutant]:
    """Return all mutants, those of the module first."""
    table = tomllib.loads((ROOT / "grading" / "mutants.toml").read_text(encoding="utf-8"))
    mutants = []
    for kind in ("module", "notebook"):
        for row in table[kind]:
            if "old" in row:
                row["changes"] = [(row.pop("old"), row.pop("new"))]
            row.setdefault("why", table["reasons"].get(row.get("criterion"), ""))
            mutants.append(Mutant(kind, **row))
    return mutants


@cache  # so that 200 mutants parse the notebook once
def sources() -> dict[str, str]:
    """Return the text that mutants change, by their kind."""
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    cells = BORDER.join(cell.source for cell in notebook.cells)
    return {"module": (ROOT / MODULE).read_text(encoding="utf-8"), "notebook": cells}


def lost_texts(chosen: list[Mutant]) -> list[str]:
    """Return a line for each text of the mutants that isn't there exactly once."""
    text = sources()
    return [
        f"mutant {m.name!r} of {m.criterion or 'none'}: its text is there {count} times: {old!r}"
        for m in chosen
        for old, _ in m.changes
        if (count := text[m.kind].count(old)) != 1
    ]


def hand_in_of(mutant: Mutant) -> HandIn:
    """Return the project's module or notebook as the mutant has it."""
    source = sources()[mutant.kind]
    for old, new in mutant.changes:
        source = source.replace(old, new)
    if mutant.append:
        source = f"{source}\n\n{mutant.append}"
    if mutant.kind == "module":
        return HandIn({MODULE: source.encode()})
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    for cell, text in zip(notebook.cells, source.split(BORDER), strict=True):
        cell.source = text
    exec(mutant.mark, {"cells": [c for c in notebook.cells if c.cell_type == "code"]})
    shared = "" if mutant.changes else "as it is"  # other outputs, the same code
    return HandIn({NOTEBOOK: nbformat.writes(notebook).encode()}, shared)


def criteria() -> dict[str, Criterion]:
    """Return the criteria by id, and the whole module's and the whole notebook's, each as one."""
    rows = grader.read_rubric().criteria
    every = {c.id: c if c.notebook else c._replace(seconds=LIMIT) for c in rows}
    of_module = [c for c in rows if not c.notebook]
    # The outputs that a harmless variant stores are those of another notebook.
    of_notebook = [c for c in rows if c.notebook and c.id != "outputs"]
    every["all of the module"] = grader.join("all of the module", of_module)
    every["all of the notebook"] = grader.join("all of the notebook", of_notebook)
    return every


def judge_mutants(chosen: list[Mutant]) -> list[Result]:
    """Return what each mutant got for its criterion, or a harmless variant for all of them."""
    grader.prepare()
    rubric = criteria()
    expected = grader.expected_tests(list(rubric.values()))
    judged = [rubric[mutant.criterion or f"all of the {mutant.kind}"] for mutant in chosen]
    hand_ins = [(hand_in_of(mutant), [c]) for mutant, c in zip(chosen, judged, strict=True)]
    outcomes = grader.attempt(hand_ins, seconds=1800)
    return [
        grader.judge(c, expected[c.id], outcome[c.id])
        for c, outcome in zip(judged, outcomes, strict=True)
    ]


def main() -> None:
    """Grade the mutants and print what came out; exit with 1 if one was judged wrongly."""
    parser = argparse.ArgumentParser(description="Grade seeded faults and harmless variants.")
    parser.add_argument("name", nargs="?", default="", help="part of a mutant's criterion: name")
    parser.add_argument("--sample", action="store_true", help="some of those of the module")
    given = parser.parse_args()
    start = time.monotonic()
    chosen = [m for m in read_mutants() if given.name in f"{m.criterion}: {m.name}"]
    if given.sample:
        of_module = [m for m in chosen if m.kind == "module"]
        faults = [m for m in of_module if m.criterion]
        chosen = faults[::12] + [m for m in of_module if not m.criterion][::4]
    if lost := lost_texts(chosen):
        sys.exit("\n".join([*lost, "These mutants have to follow the source: mend mutants.toml."]))
    wrong = []
    for mutant, (criterion, passed, why, _) in zip(chosen, judge_mutants(chosen), strict=True):
        right = passed != bool(mutant.criterion) and mutant.why in why
        wrong += [] if right else [mutant.name]
        verdict = "green" if passed else why if right else f"{why}; it should say {mutant.why!r}"
        print(f"{'ok   ' if right else 'WRONG'} {mutant.name}: {criterion.id}, {verdict}")
    minutes = (time.monotonic() - start) / 60
    print(f"{len(chosen)} graded, {len(wrong)} judged wrongly {wrong}, in {minutes:.1f} min")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
