"""Show that no grade is vacuous: `python -m grading.mutate [--sample]` grades every mutant.

A seeded fault has to turn its criterion red, with a reason; a harmless variant has to keep all of its criteria green.
"""

import argparse
import os
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
    expected_tests,
    judge,
    plan,
    prepare,
    read_only,
    read_rubric,
)
from grading.mutants import MODULE_FAULTS, MODULE_HARMLESS, NOTEBOOK_FAULTS, NOTEBOOK_HARMLESS, Mutant
from grading.sandbox import run_jobs

OF_MODULE, OF_NOTEBOOK = (MODULE_FAULTS, MODULE_HARMLESS), (NOTEBOOK_FAULTS, NOTEBOOK_HARMLESS)
MOST_SECONDS = 1800
LIMIT_OF_ALL = 120
LIMIT = 30  # for a module's criterion: a mutant that hangs is seen sooner than a hand-in
UNSEEN = {"outputs"}  # takes a minute, and shows no more than that the notebook was run


def changed(source: str, changes: tuple[str, ...], name: str) -> str:
    """Return the source with every old text replaced by its new one. Errors: SystemExit if one isn't there once."""
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        if source.count(old) != 1:
            sys.exit(f"mutant {name!r}: its text is there {source.count(old)} times, not once: {old!r}")
        source = source.replace(old, new)
    return source


def write(mutant: Mutant, folder: Path, of_notebook: bool) -> tuple[Path, Path]:
    """Write a mutant's files and return their paths: the module and the notebook, one of them the project's own."""
    folder.mkdir(parents=True)
    if not of_notebook:
        path = folder / MODULE
        path.write_text(changed((ROOT / MODULE).read_text(), mutant.changes, mutant.name))
        return path, ROOT / NOTEBOOK
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    border = "\n#%%\n"
    sources = changed(border.join(cell.source for cell in notebook.cells), mutant.changes, mutant.name).split(border)
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
    path = folder / NOTEBOOK.name
    nbformat.write(notebook, path)
    return ROOT / MODULE, path


def criteria() -> dict[str, Criterion]:
    """Return the rubric's criteria by id, and all of the module's and all of the notebook's, each as one criterion."""
    rubric = [c._replace(seconds=c.seconds if c.notebook else LIMIT) for c in read_rubric().criteria]
    every = {}
    for name, of_notebook in (("all of the module", False), ("all of the notebook", True)):
        tests = [test for c in rubric if c.notebook == of_notebook and c.id not in UNSEEN for test in c.tests]
        every[name] = Criterion(name, 0, "", tests, of_notebook, seconds=LIMIT_OF_ALL)
    return {c.id: c for c in rubric} | every


def judge_mutants(chosen: list[tuple[Mutant, bool]]) -> list[Result]:
    """Return what each mutant got for its criterion, or a harmless variant for all of them."""
    prepare()
    rubric = criteria()
    expected = expected_tests(list(rubric.values()))
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as temporary:
        top = Path(temporary).resolve()
        jobs, judged = [], []
        for number, (mutant, of_notebook) in enumerate(chosen):
            criterion = rubric[mutant.criterion or f"all of the {'notebook' if of_notebook else 'module'}"]
            files = write(mutant, top / f"hand-in-{number}", of_notebook)
            jobs += plan(top / str(number), *files, [criterion])
            judged.append((criterion, top / str(number) / criterion.id))
        outcomes = run_jobs(jobs, read_only(), min(4, os.cpu_count() or 1), MOST_SECONDS)
        return [judge(criterion, expected[criterion.id], outcomes[str(f)], f) for criterion, f in judged]


def main() -> None:
    """Grade the mutants, print what came out, and exit with 1 if one survived or a harmless variant lost points."""
    parser = argparse.ArgumentParser(description="Grade seeded faults and harmless variants.")
    parser.add_argument("--sample", action="store_true", help="every sixth fault of the module, every second variant")
    parser.add_argument("--only", default="", help="only mutants whose name holds this")
    given = parser.parse_args()
    start = time.monotonic()
    everything = [
        (m, nb) for nb, tables in ((False, OF_MODULE), (True, OF_NOTEBOOK)) for table in tables for m in table
    ]
    chosen = [pair for pair in everything if given.only in pair[0].name]
    if given.sample:
        chosen = [(m, False) for m in (*MODULE_FAULTS[::6], *MODULE_HARMLESS[::2])]
    wrong = []
    for (mutant, _), (criterion, passed, why, _) in zip(chosen, judge_mutants(chosen), strict=True):
        right = passed != bool(mutant.criterion)
        wrong += [] if right else [mutant.name]
        print(f"{'ok   ' if right else 'WRONG'} {mutant.name}: {criterion.id}, {'green' if passed else why}")
    kinds = Counter("faults" if mutant.criterion else "harmless variants" for mutant, _ in chosen)
    print(f"{dict(kinds)}, {len(wrong)} judged wrongly {wrong}, in {time.monotonic() - start:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
