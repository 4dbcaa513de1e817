"""The notebook: what it looks like, what papermill makes of it, and that nbval can go red."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import petseg_utils as pets

NOTEBOOK = pets.ROOT / "notebooks" / "pet_segmentation.ipynb"
COMPARE = NOTEBOOK.with_name("compare_runs.ipynb")
CELLS = {path.stem: nbformat.read(path, as_version=4).cells for path in (NOTEBOOK, COMPARE)}
CODE = {stem: [cell for cell in cells if cell.cell_type == "code"] for stem, cells in CELLS.items()}
NARRATIVE = CODE[NOTEBOOK.stem]
(PARAMETERS_CELL,) = [cell for cell in NARRATIVE if "parameters" in cell.metadata.get("tags", [])]
EACH = pytest.mark.parametrize("stem", CELLS)
# How much there must be of what a test looks at, lest it pass for want of anything to look at.
FEWEST = {
    NOTEBOOK.stem: {"sections": 10, "shows": 31, "figures": 10},
    COMPARE.stem: {"sections": 7, "shows": 5, "figures": 3},
}
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
    output: Path, cwd: Path = pets.ROOT, notebook: Path = NOTEBOOK, **parameters
) -> subprocess.CompletedProcess:
    """Run a notebook through papermill, as a person would, from the folder `cwd`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def run_folder():
    """A run's folder in runs/, removed afterwards."""
    folder = pets.ROOT / "runs" / "test-notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- policy


@EACH
def test_one_h1_and_no_skipped_level(stem):
    levels = [level for level, _ in headings(stem)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


@EACH
def test_contents_name_every_section(stem):
    links = re.findall(r"\]\(#([^)]+)\)", CELLS[stem][0].source)
    assert links == [title.replace(" ", "-") for level, title in headings(stem) if level == 2]
    assert len(links) >= FEWEST[stem]["sections"]


@EACH
def test_links_to_files_resolve(stem):
    links = [link for cell in CELLS[stem] for link in re.findall(r"\]\(([^)#:]+)\)", cell.source)]
    assert links
    assert all((NOTEBOOK.parent / link).exists() for link in links)


@EACH
def test_code_cells_are_short(stem):
    for cell in CODE[stem]:
        lines = cell.source.splitlines()
        limit = len(pets.PARAMETERS) if cell is PARAMETERS_CELL else 15
        assert len(lines) <= limit, cell.source
        assert all(len(line) <= 100 for line in lines), cell.source


@EACH
def test_every_code_cell_was_executed_in_order(stem):
    assert [cell.execution_count for cell in CODE[stem]] == list(range(1, len(CODE[stem]) + 1))


@EACH
def test_cells_that_show_something_have_outputs(stem):
    """A notebook without stored outputs would pass nbval, and say nothing."""
    shows = [cell for cell in CODE[stem] if re.search(r"^(print|show|display|HTML)\(", cell.source, re.MULTILINE)]
    assert len(shows) >= FEWEST[stem]["shows"]
    assert all(cell.outputs for cell in shows)


def test_default_run_beats_the_majority_class_by_15_points():
    texts = [output.get("data", {}).get("text/html", "") for output in outputs(NOTEBOOK.stem)]
    (lead,) = [float(found[1]) for text in texts if (found := re.search(r"([+-][\d.]+) percentage points", text))]
    assert lead >= 15


def test_readme_pictures_and_links_exist():
    links = re.findall(r"\]\(([^):]+)\)", (pets.ROOT / "README.md").read_text())
    assert links
    assert all((pets.ROOT / link).exists() for link in links)


@EACH
def test_no_errors_stderr_or_progress_stored(stem):
    assert not [one for one in outputs(stem) if one.output_type == "error" or one.get("name") == "stderr"]
    assert not re.search(r"\d+%\|", json.dumps(outputs(stem)))


@EACH
def test_no_path_of_a_machine_stored(stem):
    shown = [{k: v for k, v in one.get("data", {}).items() if k != "image/png"} for one in outputs(stem)]
    texts = json.dumps([[cell.source for cell in CELLS[stem]], shown, [one.get("text") for one in outputs(stem)]])
    assert str(pets.ROOT) not in texts
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/|[A-Z]:\\\\)", texts)


@EACH
def test_figures_have_alt_text_and_the_same_caption(stem):
    figures = 0
    for cell in CODE[stem]:
        for number, output in enumerate(cell.outputs):
            if "image/png" not in output.get("data", {}):
                continue
            alt = output.metadata["image/png"]["alt"]
            assert len(alt) > 20
            assert cell.outputs[number + 1].data["text/markdown"] == f"*{alt}*"
            figures += 1
    assert figures >= FEWEST[stem]["figures"]


@EACH
def test_ignored_outputs_are_few(stem):
    tags = [tag for cell in CODE[stem] for tag in cell.metadata.get("tags", [])]
    assert sum(tag == "nbval-ignore-output" for tag in tags) <= 9
    assert not {"nbval-skip", "raises-exception", "nbval-raises-exception"} & set(tags)


def test_quiz_has_six_questions_with_checks_whose_code_is_folded():
    quiz = [cell for cell in NARRATIVE if "quiz" in cell.metadata.get("tags", [])]
    assert len(quiz) >= 6
    assert all(cell.metadata["jupyter"]["source_hidden"] for cell in quiz)
    assert all([output.text for output in cell.outputs] == ["right: True\n"] for cell in quiz)


def test_parameters_cell_documents_every_parameter():
    documented = re.findall(r"^(\w+): (\w+) = \S.*  # \S+", PARAMETERS_CELL.source, re.MULTILINE)
    assert [(name, kind) for name, kind in documented] == [(n, p[0].__name__) for n, p in pets.PARAMETERS.items()]


def test_defaults_are_valid():
    namespace: dict = {}
    exec(PARAMETERS_CELL.source, namespace)
    pets.check_parameters({name: namespace[name] for name in pets.PARAMETERS})


# ------------------------------------------------------------------------------------------------- papermill


def test_papermill_run_keeps_the_contract_and_can_be_resumed(run_folder):
    output = run_folder / "notebook.ipynb"
    done = papermill(output, cwd=NOTEBOOK.parent, **TINY, RUN_NAME=run_folder.name)
    assert done.returncode == 0, done.stderr[-2000:]

    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["parameters"] == {**metrics["parameters"], **TINY}
    assert set(metrics["parameters"]) == set(pets.PARAMETERS)
    sizes = metrics["dataset"]
    assert sizes["name"] == "sample" and sizes["train"] + sizes["valid"] == sizes["test"] == 60
    stored = torch.load(run_folder / "weights.pt", weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}
    assert metrics["model"]["parameters"] == sum(p.numel() for p in pets.UNet(4, 2).parameters())
    assert metrics["training"].keys() >= {"epochs", "steps", "seconds", "images_per_second", "device", "precision"}
    for split in ("valid", "test"):
        matrix = metrics[split]["confusion_matrix"]
        assert sum(map(sum, matrix)) == metrics[split]["images"] * 32**2
        assert metrics[split]["pixel_accuracy"] == sum(matrix[i][i] for i in range(3)) / sum(map(sum, matrix))
        assert list(metrics[split]["iou"]) == list(metrics[split]["dice"]) == list(pets.CLASSES)
    with (run_folder / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    assert len(list((run_folder / "figures").glob("*.png"))) >= 10
    assert (run_folder / "checkpoint.pt").is_file()

    resumed = papermill(output, **TINY, RUN_NAME=run_folder.name, RESUME=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    again = json.loads((run_folder / "metrics.json").read_text())
    assert again["test"] == metrics["test"]
    assert again["training"]["seconds"] == metrics["training"]["seconds"]  # not trained anew
    assert not (run_folder / "checkpoint.old.pt").exists()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"EPOCH": 3}, "there is no parameter EPOCH: the parameters are DATASET, "),
        ({"IMAGE_SIZE": 100}, "make it 96 or 128"),
        ({"DATASET": "oxford", "DATA_DIR": "nowhere"}, "set DATA_DIR to the folder that holds oxford-iiit-pet"),
    ],
)
def test_papermill_ends_a_mistake_in_one_sentence(tmp_path, run_folder, parameters, sentence):
    done = papermill(tmp_path / "notebook.ipynb", **parameters, RUN_NAME=run_folder.name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("InputError: ") and sentence in last
    assert not (run_folder / "checkpoint.pt").exists()


def test_comparison_shows_the_runs_it_is_given_sorted_by_score(tmp_path):
    output = tmp_path / "notebook.ipynb"
    runs = pets.ROOT / "benchmarks" / "ablations"
    done = papermill(output, notebook=COMPARE, RUNS="benchmarks/ablations/*", MAKE_RUNS=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = [one for cell in nbformat.read(output, as_version=4).cells for one in cell.get("outputs", [])]
    (table,) = [one.data["text/html"] for one in shown if "text/html" in one.get("data", {})]
    accuracy = {path.parent.name: json.loads(path.read_text())["test"] for path in runs.glob("*/metrics.json")}
    ranking = sorted(accuracy, key=lambda name: accuracy[name]["pixel_accuracy"], reverse=True)
    assert len(ranking) > 3
    assert re.findall(r"<tr><td>([^<]+)", table) == ranking
    header = re.findall(r"<th>(\w+)</th>", table)
    assert {"SKIPS", "SEED", "AUGMENT"} <= set(header) and not {"DATASET", "RUN_NAME", "DEVICE"} & set(header)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"RUNS": "runs/nowhere"}, "no folder of 'runs/nowhere'"),
        ({"RUN": "runs/*"}, "there is no parameter RUN: set RUNS or MAKE_RUNS."),
    ],
)
def test_comparison_ends_a_mistake_in_one_sentence(tmp_path, parameters, sentence):
    done = papermill(tmp_path / "notebook.ipynb", notebook=COMPARE, **parameters, MAKE_RUNS=False)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(f"InputError: {sentence}")


# ------------------------------------------------------------------------------------------------- nbval


def grade(project: Path) -> subprocess.CompletedProcess:
    """Grade a project's notebooks with strict nbval."""
    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "notebooks"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_nbval_goes_red_for_a_wrong_model_and_for_a_wrong_output(tmp_path):
    """Grade the counts of the course's net in a copy of the project, as it is and with a mistake."""
    for name in ("petseg_utils.py", "sample_pets.py", "conftest.py", "pyproject.toml"):
        shutil.copy(pets.ROOT / name, tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    wanted = ("import inspect", "net = pets.UNet(base_channels=32")  # set-up, and the counts
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(wanted)]
    assert len(notebook.cells) == len(wanted)
    (tmp_path / "notebooks").mkdir()
    copy = tmp_path / "notebooks" / "shapes.ipynb"
    nbformat.write(notebook, copy)
    assert grade(tmp_path).returncode == 0

    right = copy.read_text()
    assert right.count("13,385,475") == 1
    copy.write_text(right.replace("13,385,475", "13,385,476"))
    assert "1 failed" in grade(tmp_path).stdout

    copy.write_text(right)
    module = tmp_path / "petseg_utils.py"
    source = module.read_text()
    wrong = source.replace("base_channels * 2**level for level in range(depth)", "base_channels for _ in range(depth)")
    assert wrong != source
    module.write_text(wrong)
    assert "1 failed" in grade(tmp_path).stdout
