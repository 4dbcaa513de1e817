"""The notebooks: their looks, what papermill makes of the narrative, and that nbval can go red."""

import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
import torch

import petseg_utils

NOTEBOOK = petseg_utils.ROOT / "notebooks" / "pet_segmentation.ipynb"
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


def papermill(
    output: Path, cwd: Path = petseg_utils.ROOT, **parameters
) -> subprocess.CompletedProcess:
    """Run the narrative through papermill, as a person would, from the folder `cwd`."""
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(output), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


# ------------------------------------------------------------------- policy


@EACH
def test_one_h1_and_no_skipped_level(stem):
    levels = [level for level, _ in headings(stem)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@EACH
def test_contents_name_every_section(stem):
    links = [link for cell in CELLS[stem] for link in re.findall(r"\]\(#([^)]+)\)", cell.source)]
    assert links == [title.replace(" ", "-") for level, title in headings(stem) if level == 2]
    assert len(links) >= FEWEST[stem]["sections"]


@EACH
def test_links_to_files_resolve(stem):
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
    assert str(petseg_utils.ROOT) not in texts
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
    expected = []
    for name, field in petseg_utils.Recipe.model_fields.items():
        default = field.default
        told = json.dumps(default) if isinstance(default, str) else repr(default)
        expected.append(f"{name}: {type(default).__name__} = {told}  # {field.description}")
    lines = PARAMETERS_CELL.source.splitlines()
    assert [line for line in lines if not line.startswith("#")] == expected
    assert [n for n, line in enumerate(lines) if line.startswith("#")] == [8]


# ------------------------------------------------------------------- papermill


def test_papermill_run_keeps_the_contract_and_can_be_resumed(run_folder):
    """RESUME trains anew without a checkpoint, and goes on with one: here nothing is left to do."""
    output = run_folder / "notebook.ipynb"
    given = TINY | {"RUN_NAME": run_folder.name, "RESUME": True}
    done = papermill(output, cwd=NOTEBOOK.parent, **given)
    assert done.returncode == 0, done.stderr[-2000:]

    run = petseg_utils.read_run(run_folder)
    assert run["parameters"] == petseg_utils.Recipe(**given).model_dump()
    sizes = run["dataset"]
    assert sizes["name"] == "sample"
    assert sizes["train"] + sizes["valid"] == sizes["test"] == 60
    model = petseg_utils.UNet(4, 2)
    petseg_utils.load_weights(run_folder / "weights.pt", model)
    assert run["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    expected = {"epochs", "steps", "seconds", "images_per_second", "device", "precision"}
    assert run["training"].keys() >= expected
    for split in ("valid", "test"):
        matrix = torch.tensor(run[split]["confusion_matrix"])
        assert matrix.sum() == run[split]["images"] * 32**2
        assert run[split].items() >= petseg_utils.scores(matrix).items()
        names = [row["name"] for row in run["images"] if row["split"] == split]
        assert len(set(names)) == run[split]["images"] == sizes[split]
    assert [row["epoch"] for row in run["history"]] == [1]
    assert len(list((run_folder / "figures").glob("*.png"))) >= 10
    assert (run_folder / "checkpoint.pt").is_file()
    # A tiny run is none of the defaults, so it has no bounds.
    assert not re.search(r"within [\d.]+ to", output.read_text(encoding="utf-8"))

    resumed = papermill(output, **given)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    again = petseg_utils.read_run(run_folder)
    assert again["test"] == run["test"]
    assert again["history"] == run["history"]  # with the same seconds: not trained anew
    assert not (run_folder / "checkpoint.old.pt").exists()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"EPOCH": 3}, "there is no parameter EPOCH: the parameters are DATASET, "),
        ({"IMAGE_SIZE": 100}, "make it 96 or 128"),
        ({"DATASET": "oxford", "DATA_DIR": "nowhere"}, "set DATA_DIR to the folder that holds it"),
    ],
)
def test_papermill_ends_a_mistake_in_one_sentence(tmp_path, run_folder, parameters, sentence):
    done = papermill(tmp_path / "notebook.ipynb", **parameters, RUN_NAME=run_folder.name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("InputError: ")
    assert sentence in last
    assert not (run_folder / "checkpoint.pt").exists()


# ------------------------------------------------------------------- nbval


def grade(project: Path) -> subprocess.CompletedProcess:
    """Grade a project's notebooks with strict nbval."""
    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "notebooks"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_nbval_goes_red_for_a_wrong_model_and_for_a_wrong_output(tmp_path):
    """Grade the counts of the course's net in a copy of the project, right and with a mistake."""
    for path in (*petseg_utils.ROOT.glob("*.py"), petseg_utils.ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    counts = [
        cell
        for cell in NARRATIVE
        if cell.source.startswith("net = pets.UNet(base_channels=32, depth=5)")
    ]
    imports = "import petseg_utils as pets\nfrom IPython.display import HTML"
    first = nbformat.v4.new_code_cell(imports, execution_count=1)
    (tmp_path / "notebooks").mkdir()
    copy = tmp_path / "notebooks" / "shapes.ipynb"
    kernel = nbformat.read(NOTEBOOK, as_version=4).metadata
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *counts], metadata=kernel), copy)
    assert "2 passed" in grade(tmp_path).stdout

    right = copy.read_text(encoding="utf-8")
    assert right.count("13,385,475") == 1
    copy.write_text(right.replace("13,385,475", "13,385,476"))
    assert "1 failed" in grade(tmp_path).stdout

    copy.write_text(right)
    module = tmp_path / "petseg_utils.py"
    source = module.read_text(encoding="utf-8")
    wrong = source.replace(
        "base_channels * 2**level for level in range(depth)", "base_channels for _ in range(depth)"
    )
    assert wrong != source
    module.write_text(wrong)
    assert "1 failed" in grade(tmp_path).stdout
