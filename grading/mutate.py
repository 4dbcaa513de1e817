"""Show that no grade is vacuous: `python -m grading.mutate [NAME] [--sample]` grades the mutants.

A seeded fault has to turn its criterion red, with a reason; a harmless variant has to keep all of
its criteria green. NAME is a part of the names, or of the criteria, of those that are graded.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nbformat

from grading import grade
from grading.grade import MODULE, NOTEBOOK, ROOT, Criterion, Result
from grading.mutants import MODULE_FAULTS, MODULE_HARMLESS, OF_MODULE, OF_NOTEBOOK, Mutant

MOST_SECONDS = 1800
LIMIT_OF_ALL = 120
LIMIT = 30  # for a module's criterion: a mutant that hangs is seen sooner than a hand-in
UNSEEN = {"outputs"}  # of a harmless variant: its stored outputs are those of another notebook
BORDER = "\n#%%\n"  # between the cells of a notebook


def sources() -> dict[str, str]:
    """Return the text that mutants change, by their kind."""
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    cells = BORDER.join(cell.source for cell in notebook.cells)
    return {"module": (ROOT / MODULE).read_text(encoding="utf-8"), "notebook": cells}


def kind_of(mutant: Mutant) -> str:
    return "notebook" if mutant in OF_NOTEBOOK else "module"


def lost_texts(chosen: list[Mutant]) -> list[str]:
    """Return a line for each text of the mutants that isn't there exactly once."""
    text = sources()
    return [
        f"mutant {m.name!r} of {m.criterion or 'none'}: its text is there {count} times: {old!r}"
        for m in chosen
        for old in m.changes[::2]
        if (count := text[kind_of(m)].count(old)) != 1
    ]


def changed(source: str, mutant: Mutant) -> str:
    """Return the source with every old text replaced by its new one, and what is appended."""
    for old, new in zip(mutant.changes[::2], mutant.changes[1::2], strict=True):
        source = source.replace(old, new)
    return f"{source}\n\n{mutant.append}" if mutant.append else source


def write(mutant: Mutant, path: Path) -> None:
    """Write the project's module or notebook, as the path's suffix says, as the mutant has it."""
    source = changed(sources()[kind_of(mutant)], mutant)
    if path.suffix == ".py":
        path.write_text(source, encoding="utf-8")
        return
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    for cell, text in zip(notebook.cells, source.split(BORDER), strict=True):
        cell.source = text
    mutant.mark([cell for cell in notebook.cells if cell.cell_type == "code"])
    nbformat.write(notebook, path)


def criteria() -> dict[str, Criterion]:
    """Return the criteria by id, and the whole module's and the whole notebook's, each as one."""
    every = {}
    for c in grade.read_rubric().criteria:
        every[c.id] = c if c.notebook else c._replace(seconds=LIMIT)
    for kind in ("module", "notebook"):
        some = [c for c in every.values() if c.notebook == (kind == "notebook")]
        tests = [test for c in some if c.id not in UNSEEN for test in c.tests]
        name = f"all of the {kind}"
        every[name] = Criterion(name, 0, "", tests, kind == "notebook", seconds=LIMIT_OF_ALL)
    return every


def judge_mutants(chosen: list[Mutant]) -> list[Result]:
    """Return what each mutant got for its criterion, or a harmless variant for all of them."""
    grade.prepare()
    rubric = criteria()
    expected = grade.expected_tests(list(rubric.values()))
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        hand_ins, judged = [], []
        for number, mutant in enumerate(chosen):
            kind = kind_of(mutant)
            judged.append(rubric[mutant.criterion or f"all of the {kind}"])
            own = NOTEBOOK if kind == "notebook" else MODULE
            path = Path(temporary).resolve() / f"{number}{own.suffix}"
            write(mutant, path)
            pair = (path, ROOT / NOTEBOOK) if kind == "module" else (ROOT / MODULE, path)
            shared = "" if mutant.changes else "as it is"  # other outputs, the same code
            hand_ins.append((grade.HandIn(*pair, run=shared), [judged[-1]]))
        outcomes = grade.attempt(hand_ins, MOST_SECONDS)
        return [
            grade.judge(c, expected[c.id], outcome[c.id])
            for c, outcome in zip(judged, outcomes, strict=True)
        ]


def main() -> None:
    """Grade the mutants and print what came out; exit with 1 if one was judged wrongly."""
    parser = argparse.ArgumentParser(description="Grade seeded faults and harmless variants.")
    parser.add_argument("name", nargs="?", default="", help="part of a mutant's criterion: name")
    sampled = "every twelfth fault of the module, every fourth variant"
    parser.add_argument("--sample", action="store_true", help=sampled)
    given = parser.parse_args()
    start = time.monotonic()
    chosen = [m for m in (*OF_MODULE, *OF_NOTEBOOK) if given.name in f"{m.criterion}: {m.name}"]
    if given.sample:
        chosen = [*MODULE_FAULTS[::12], *MODULE_HARMLESS[::4]]
    if lost := lost_texts(chosen):
        sys.exit("\n".join([*lost, "These mutants have to follow the source: mend mutants.toml."]))
    wrong = []
    for mutant, (criterion, passed, why, _) in zip(chosen, judge_mutants(chosen), strict=True):
        right = passed != bool(mutant.criterion) and mutant.why in why
        wrong += [] if right else [mutant.name]
        verdict = "green" if passed else why if right else f"{why}; it should say {mutant.why!r}"
        print(f"{'ok   ' if right else 'WRONG'} {mutant.name}: {criterion.id}, {verdict}")
    kinds = dict(Counter("faults" if m.criterion else "harmless variants" for m in chosen))
    print(f"{kinds}, {len(wrong)} judged wrongly {wrong}, in {time.monotonic() - start:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
