"""The notebooks: their looks, what papermill makes of the narrative, and that nbval can go red."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from papermill import inspect_notebook

from petseg_utils import ROOT, Recipe, read_run

NOTEBOOK = ROOT / "notebooks" / "pet_segmentation.ipynb"
# How much there must be of what a test looks at, lest it pass for want of anything to look at.
FEWEST = {
    "pet_segmentation": {"sections": 11, "shows": 28, "figures": 11, "files": 6, "results": 10},
    "going_deeper": {"sections": 7, "shows": 9, "figures": 3, "files": 1, "results": 3},
    "compare_runs": {"sections": 7, "shows": 1, "figures": 3, "files": 1, "results": 0},
}
PATHS = [NOTEBOOK.with_name(f"{stem}.ipynb") for stem in FEWEST]
CELLS = {path.stem: nbformat.read(path, as_version=4).cells for path in PATHS}
CODE = {stem: [cell for cell in cells if cell.cell_type == "code"] for stem, cells in CELLS.items()}
NARRATIVE = CODE[NOTEBOOK.stem]
(PARAMETERS_CELL,) = [cell for cell in NARRATIVE if "parameters" in cell.metadata.get("tags", [])]
EACH = pytest.mark.parametrize("stem", CELLS)
TINY = {"IMAGE_SIZE": 32, "BASE_CHANNELS": 4, "DEPTH": 2, "EPOCHS": 1, "LIMIT": 60, "BATCH_SIZE": 8}


def headings(stem: str) -> list[tuple[int, str]]:
    """Return the level and the title of every heading."""
    texts = [cell.source for cell in CELLS[stem] if cell.cell_type == "markdown"]
    found = [match for text in texts for match in re.findall(r"^(#+) (.+)$", text, re.MULTILINE)]
    return [(len(marks), title) for marks, title in found]


def outputs(stem: str) -> list[dict]:
    """Return all stored outputs."""
    return [output for cell in CODE[stem] for output in cell.outputs]


def papermill(output: Path, cwd: Path = ROOT, **parameters) -> subprocess.CompletedProcess:
    """Run the narrative through papermill, as a person would, from the folder `cwd`."""
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(output), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@EACH
def test_one_h1_no_skipped_level_contents_of_every_section_and_links_resolve(stem):
    levels = [level for level, _ in headings(stem)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    links = [link for cell in CELLS[stem] for link in re.findall(r"\]\(#([^)]+)\)", cell.source)]
    assert links == [title.replace(" ", "-") for level, title in headings(stem) if level == 2]
    assert len(links) >= FEWEST[stem]["sections"]
    links = [link for cell in CELLS[stem] for link in re.findall(r"\]\(([^)#:]+)\)", cell.source)]
    assert len(links) >= FEWEST[stem]["files"]
    assert all((NOTEBOOK.parent / link).exists() for link in links)


@EACH
def test_code_cells_are_short(stem):
    for cell in CODE[stem]:
        lines = cell.source.splitlines()
        most = 10 if "plt.subplots(" in cell.source and stem == NOTEBOOK.stem else 15
        assert len(lines) <= most or cell is PARAMETERS_CELL, cell.source


@EACH
def test_notebook_was_run_in_order_and_what_shows_something_has_outputs(stem):
    """A notebook without stored outputs would pass nbval, and say nothing."""
    assert [cell.execution_count for cell in CODE[stem]] == list(range(1, len(CODE[stem]) + 1))
    call = re.compile(r"^(print|show|display|HTML)\(", re.MULTILINE)
    shows = [cell for cell in CODE[stem] if call.search(cell.source)]
    assert len(shows) >= FEWEST[stem]["shows"]
    assert all(cell.outputs for cell in shows)


def test_default_run_is_within_its_bounds():
    """And the cell says so itself: strict nbval compares it on every machine."""
    told = "".join(output.get("text", "") for output in outputs(NOTEBOOK.stem))
    within = re.findall(r"^(\w+) within [\d.]+ to [\d.]+: (\w+)$", told, re.MULTILINE)
    assert within == [("pixel_accuracy", "True"), ("mean_iou", "True")]


@EACH
def test_no_error_progress_or_path_of_a_machine_is_stored(stem):
    stored = deepcopy(outputs(stem))
    for output in stored:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        output.get("data", {}).pop("image/png", None)
    texts = json.dumps([[cell.source for cell in CELLS[stem]], stored])
    assert str(ROOT) not in texts
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/|[A-Z]:\\\\|\d+%\|)", texts)


@EACH
def test_figures_have_alt_text_that_is_the_caption_and_the_result_below_them(stem):
    pairs = [pair for cell in CODE[stem] for pair in pairwise(cell.outputs)]
    pairs = [pair for pair in pairs if "image/png" in pair[0].get("data", {})]
    results = 0
    for figure, said in pairs:
        text = said.data["text/markdown"]
        caption, result = re.fullmatch(r"\*([^*]{20,})\*(.*)", text).groups()
        assert figure.metadata["image/png"]["alt"] == caption + result
        results += bool(re.search(r"\d", result))
    assert len(pairs) == sum("image/png" in one.get("data", {}) for one in outputs(stem))
    assert len(pairs) >= FEWEST[stem]["figures"]
    assert results >= FEWEST[stem]["results"]


@EACH
def test_ignored_outputs_are_few(stem):
    tags = [tag for cell in CODE[stem] for tag in cell.metadata.get("tags", [])]
    assert sum(tag == "nbval-ignore-output" for tag in tags) <= 14
    assert not {"nbval-skip", "raises-exception", "nbval-raises-exception"} & set(tags)


def test_parameters_cell_is_that_of_the_recipe():
    """One source for every default: name, type, default, meaning, in order; the learner's first."""
    keys = ("name", "inferred_type_name", "default", "help")
    told = inspect_notebook(str(NOTEBOOK)).values()
    expected = []
    for name, field in Recipe.model_fields.items():
        default = field.default
        default = json.dumps(default) if isinstance(default, str) else repr(default)
        expected.append((name, type(field.default).__name__, default, field.description))
    assert [tuple(one[key] for key in keys) for one in told] == expected
    lines = PARAMETERS_CELL.source.splitlines()
    assert [n for n, line in enumerate(lines) if line.startswith("#")] == [8]


def test_papermill_run_keeps_the_contract_and_can_be_resumed(run_folder):
    """RESUME trains anew without a checkpoint, and goes on with one: here nothing is left to do.

    What metrics.json says is graded as a hand-in's, in `test_hand_ins`.
    """
    output = run_folder / "notebook.ipynb"
    given = TINY | {"RUN_NAME": run_folder.name, "RESUME": True}
    done = papermill(output, cwd=NOTEBOOK.parent, **given)
    assert done.returncode == 0, done.stderr[-2000:]

    run = read_run(run_folder)
    assert run["parameters"] == Recipe(**given).model_dump()
    assert run["dataset"]["name"] == "sample"
    assert [row["epoch"] for row in run["history"]] == [1]
    assert len(list((run_folder / "figures").glob("*.png"))) >= 10
    assert (run_folder / "checkpoint.pt").is_file()
    # A tiny run is none of the defaults, so it has no bounds.
    assert not re.search(r"within [\d.]+ to", output.read_text(encoding="utf-8"))

    resumed = papermill(output, **given)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    again = read_run(run_folder)
    assert again["test"] == run["test"]
    assert again["history"] == run["history"]  # with the same seconds: not trained anew
    assert not (run_folder / "checkpoint.old.pt").exists()


def test_papermill_ends_a_mistake_in_one_sentence(tmp_path, run_folder):
    done = papermill(tmp_path / "notebook.ipynb", EPOCH=3, RUN_NAME=run_folder.name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("InputError: there is no parameter EPOCH: the parameters are DATASET, ")
    assert not (run_folder / "checkpoint.pt").exists()


def test_nbval_goes_red_for_a_wrong_model_and_for_a_wrong_output(tmp_path):
    """Strict nbval on the counts of the course's net, right and with a mistake."""
    (counts,) = [c for c in NARRATIVE if c.source.startswith("net = pets.UNet(base_channels=32")]
    assert str(counts.outputs).count("13,385,475") == 1
    wrong = nbformat.from_dict(json.loads(json.dumps(counts).replace("13,385,475", "13,385,476")))
    imports = "import petseg_utils as pets\nfrom IPython.display import HTML"
    narrower = "from functools import partial\npets.UNet = partial(pets.UNet, norms=1)"
    for name, first, second in (
        ("right", imports, counts),
        ("wrong_output", imports, wrong),
        ("wrong_model", f"{imports}\n{narrower}", counts),
    ):
        cells = [nbformat.v4.new_code_cell(first, execution_count=1), second]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    options = "--nbval -p no:cacheprovider -p conftest"
    command = [sys.executable, "-m", "pytest", *options.split()]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert set(re.findall(r"^FAILED (\w+)", said, re.MULTILINE)) == {"wrong_output", "wrong_model"}
    assert "2 failed, 4 passed" in said
