"""Show that no grade is vacuous: `python -m grading.mutate [--sample]` grades every mutant.

A seeded fault has to turn its criterion red, with a reason; a harmless variant has to keep all of
its criteria green.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nbformat

from grading.grade import (
    MODULE,
    NOTEBOOK,
    ROOT,
    Criterion,
    Result,
    attempt,
    expected_tests,
    judge,
    prepare,
    read_rubric,
)
from grading.mutants import (
    MODULE_FAULTS,
    MODULE_HARMLESS,
    NOTEBOOK_FAULTS,
    NOTEBOOK_HARMLESS,
    OUTPUT_FAULTS,
    Mutant,
)

OF_MODULE, OF_NOTEBOOK = (
    (*MODULE_FAULTS, *MODULE_HARMLESS),
    (*NOTEBOOK_FAULTS, *NOTEBOOK_HARMLESS, *OUTPUT_FAULTS),
)
MOST_SECONDS = 1800
LIMIT_OF_ALL = 120
LIMIT = 30  # for a module's criterion: a mutant that hangs is seen sooner than a hand-in
UNSEEN = {"outputs"}  # of a harmless variant: its stored outputs are those of another notebook


def changed(source: str, changes: tuple[str, ...], name: str) -> str:
    """Return the source with every old text replaced by its new one. Errors: SystemExit if one isn't there once."""
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        if source.count(old) != 1:
            sys.exit(
                f"mutant {name!r}: its text is there {source.count(old)} times, not once: {old!r}"
            )
        source = source.replace(old, new)
    return source


def write(mutant: Mutant, path: Path) -> None:
    """Write the project's module or notebook, as the path's suffix says, with a mutant's changes."""
    if path.suffix == ".py":
        path.write_text(changed((ROOT / MODULE).read_text(), mutant.changes, mutant.name))
        return
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    border = "\n#%%\n"
    sources = changed(
        border.join(cell.source for cell in notebook.cells), mutant.changes, mutant.name
    ).split(border)
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
    mutant.mark([cell for cell in notebook.cells if cell.cell_type == "code"])
    nbformat.write(notebook, path)


def criteria() -> dict[str, Criterion]:
    """Return the rubric's criteria by id, and all of the module's and all of the notebook's, each as one criterion."""
    rubric = [
        c._replace(seconds=c.seconds if c.notebook else LIMIT) for c in read_rubric().criteria
    ]
    every = {}
    for name, of_notebook in (("all of the module", False), ("all of the notebook", True)):
        tests = [
            test
            for c in rubric
            if c.notebook == of_notebook and c.id not in UNSEEN
            for test in c.tests
        ]
        every[name] = Criterion(name, 0, "", tests, of_notebook, seconds=LIMIT_OF_ALL)
    return {c.id: c for c in rubric} | every


def judge_mutants(chosen: list[Mutant]) -> list[Result]:
    """Return what each mutant got for its criterion, or a harmless variant for all of them."""
    prepare()
    rubric = criteria()
    expected = expected_tests(list(rubric.values()))
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        hand_ins, judged = [], []
        for number, mutant in enumerate(chosen):
            kind, own = ("notebook", NOTEBOOK) if mutant in OF_NOTEBOOK else ("module", MODULE)
            judged.append(rubric[mutant.criterion or f"all of the {kind}"])
            path = Path(temporary).resolve() / f"{number}{own.suffix}"
            write(mutant, path)
            pair = (path, ROOT / NOTEBOOK) if kind == "module" else (ROOT / MODULE, path)
            hand_ins.append((*pair, [judged[-1]]))
        outcomes = attempt(hand_ins, MOST_SECONDS)
        return [
            judge(c, expected[c.id], outcome[c.id])
            for c, outcome in zip(judged, outcomes, strict=True)
        ]


def main() -> None:
    """Grade the mutants, print what came out, and exit with 1 if one survived or a harmless variant lost points."""
    parser = argparse.ArgumentParser(description="Grade seeded faults and harmless variants.")
    parser.add_argument(
        "--sample",
        action="store_true",
        help="every sixth fault of the module, every second variant",
    )
    parser.add_argument(
        "--only", default="", help="only mutants whose criterion or name holds this"
    )
    given = parser.parse_args()
    start = time.monotonic()
    chosen = [m for m in (*OF_MODULE, *OF_NOTEBOOK) if given.only in f"{m.criterion}: {m.name}"]
    if given.sample:
        chosen = [*MODULE_FAULTS[::6], *MODULE_HARMLESS[::2]]
    wrong = []
    for mutant, (criterion, passed, why, _) in zip(chosen, judge_mutants(chosen), strict=True):
        right = passed != bool(mutant.criterion) and mutant.why in why
        wrong += [] if right else [mutant.name]
        verdict = "green" if passed else why if right else f"{why}; it should say {mutant.why!r}"
        print(f"{'ok   ' if right else 'WRONG'} {mutant.name}: {criterion.id}, {verdict}")
    kinds = Counter("faults" if mutant.criterion else "harmless variants" for mutant in chosen)
    print(
        f"{dict(kinds)}, {len(wrong)} judged wrongly {wrong}, in {time.monotonic() - start:.0f} s"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
