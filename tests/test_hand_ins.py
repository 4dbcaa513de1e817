"""Right hand-ins from other environments, in other styles and on odd datasets lose no points."""

import json
import re
import subprocess
import sys
from pathlib import Path

import course_unet
import nbformat
import numpy as np
import papermill
import pytest
import torch
from PIL import Image
from tiny import new_net

import petseg_utils as pets
from grading import notebook as grader
from grading import test_notebook as criteria
from grading.grade import NOTEBOOK, grader_files, stage
from grading.mutate import read_mutants
from support.runs import names_in_use

SOURCES = [
    'DATASET: str = "oxford"\nDEVICE: str = "cuda"\nDATA_DIR = "/home/me"\nEPOCHS: int = 99',
    "print(DATASET, DEVICE, DATA_DIR, EPOCHS)",
    "print(6 * 7)",
]
AS_NEW = "import logging, torch\nprint(torch.rand(1).item(), logging.root.handlers)"


def small_notebook() -> dict:
    """Return a notebook of a few cells, as JSON has it, that was run from top to bottom."""
    cells = [nbformat.v4.new_code_cell(source, execution_count=n)
             for n, source in enumerate(SOURCES, 1)]  # fmt: skip
    cells[0].metadata["tags"] = ["parameters"]
    cells[1].outputs = [nbformat.v4.new_output("stream", text="oxford cpu data 99\n")]
    cells[2].outputs = [nbformat.v4.new_output("stream", text="42\n")]
    cells.insert(1, nbformat.v4.new_markdown_cell("A text."))
    return json.loads(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))


def write(folder, content: dict, *, encoding: str = "utf-8", lines: str = "\n"):
    """Write a notebook, whose sources have these line ends, too, and return its path."""
    path = folder / NOTEBOOK
    path.parent.mkdir(exist_ok=True)
    for cell in content["cells"]:
        cell["source"] = [line.replace("\n", lines) for line in cell["source"]]
    path.write_bytes(json.dumps(content, indent=1).replace("\n", lines).encode(encoding))
    return path


CONDA = {"kernelspec": {"name": "conda-env-dl-py", "language": "python", "display_name": "[dl]"}}
COLAB = {"colab": {"provenance": []}, "accelerator": "GPU"}
VSCODE = {"vscode": {"interpreter": {"hash": "0"}}, "orig_nbformat": 4}
EDITORS = {  # what the notebook gets, what each cell gets, what becomes of ids, the format 4.what
    "conda": (CONDA, {}, "kept", 5),
    "no kernel": ({}, {}, "kept", 5),
    "Colab": (COLAB, {"id": "0", "cellView": "form", "tags": [], "colab": {}}, "lost", 0),
    "VS Code": (VSCODE, {"vscode": {"languageId": "python"}}, "kept", 5),
    "double ids": ({}, {}, "same", 5),
    **{f"format 4.{minor}": ({}, {}, "lost", minor) for minor in range(6)},
}


def edit(content: dict, editor: str) -> None:
    """Change a notebook as an editor does."""
    metadata, of_cells, ids, content["nbformat_minor"] = EDITORS[editor]
    content["metadata"] |= metadata
    for cell in content["cells"]:
        cell["metadata"] |= of_cells
        cell["id"] = cell["id"] if ids == "kept" else ids
        if ids == "lost":
            del cell["id"]


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize(("encoding", "lines"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
@pytest.mark.filterwarnings("ignore")  # nbformat tells of what it mends
def test_notebook_of_any_editor_reads_alike(tmp_path, editor, encoding, lines):
    content = small_notebook()
    edit(content, editor)
    found = grader.read(write(tmp_path, content, encoding=encoding, lines=lines))
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code] == SOURCES
    assert [cell.metadata.tags for cell in code] == [["parameters"], [], []]
    assert [cell.execution_count for cell in code] == [1, 2, 3]
    assert len({cell.id for cell in found.cells}) == 4
    assert found.metadata.kernelspec.name == "python3"
    nbformat.validate(found)


# ----------------------------------------------------------------------------- executing and nbval


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """Return a folder staged for the grader, whose criteria look there."""
    stage(tmp_path, grader_files() | {Path("grading/spy.py"): b""})
    monkeypatch.setenv("PYTHONPATH", "")  # the grader sets it: so it is put back
    monkeypatch.chdir(tmp_path)
    for name in ("RUN_FOLDER", "FOLDER", "STORED"):
        monkeypatch.setattr(criteria, name, tmp_path)
    return tmp_path


def test_grader_sets_where_and_on_what_and_goes_on_after_a_cell_that_fails(staged):
    content = small_notebook()
    edit(content, "conda")
    content["cells"][0]["metadata"] = {}  # the tag is lost
    content["cells"].insert(2, nbformat.v4.new_code_cell("x = 6\nassert x == 7"))
    write(staged, content, encoding="utf-8-sig")
    grader.execute(staged, staged)
    assert [grader.printed(cell) for cell in criteria.executed()] == [
        "", "", f"sample cpu data {grader.PARAMETERS['EPOCHS']}\n", "42\n"
    ]  # fmt: skip
    with pytest.raises(pytest.fail.Exception, match="Error: assert x == 7 in code cell 2, "):
        criteria.test_notebook_runs_to_its_end()


def test_cell_that_ends_the_kernel_is_named(staged):
    content = small_notebook()
    content["cells"].insert(2, nbformat.v4.new_code_cell("import os; os._exit(0)"))
    write(staged, content)
    grader.execute(staged, staged)
    with pytest.raises(pytest.fail.Exception, match="ended its kernel in code cell 2, 'import os"):
        criteria.test_notebook_runs_to_its_end()


OUTPUT_FAULTS = [mutant for mutant in read_mutants() if mutant.criterion == "outputs"]


@pytest.mark.parametrize("fault", OUTPUT_FAULTS, ids=lambda fault: fault.name)
def test_stored_outputs_fail_with_the_reason(staged, fault):
    text = json.dumps(small_notebook()).replace("oxford", "sample")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.write(notebook, staged / "executed.ipynb")  # what the grader saw
    exec(fault.mark, {"cells": [cell for cell in notebook.cells if cell.cell_type == "code"]})
    write(staged, json.loads(nbformat.writes(notebook)))
    with pytest.raises(AssertionError, match=re.escape(fault.why)) as told:
        criteria.test_stored_outputs_reproduce()
    assert ("no tag of nbval" in str(told.value)) == ("others" in fault.why)  # it has none


def test_outputs_are_compared_whatever_the_kernel_and_the_device_are_called(staged):
    """Those of pictures that the grader doesn't have need only be there."""
    content = small_notebook()
    edit(content, "conda")
    content["cells"][-1]["source"] = [AS_NEW]
    drawn = torch.rand(1, generator=torch.Generator()).item()
    content["cells"][-1]["outputs"][0]["text"] = [f"{drawn} []\n"]
    assert criteria.strict_nbval(grader.read(write(staged, content))) == (3, [])
    nbformat.write(grader.cleaned(grader.read(staged / NOTEBOOK)), staged / "executed.ipynb")
    write(staged, content, encoding="utf-8-sig", lines="\r\n")
    criteria.test_stored_outputs_reproduce()


def test_projects_own_nbval_takes_the_kernel_of_this_environment(staged):
    content = small_notebook()
    edit(content, "conda")
    content["cells"] = [cell for cell in content["cells"] if cell["source"] == ["print(6 * 7)"]]
    write(staged, content)
    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", NOTEBOOK]
    done = subprocess.run(command, cwd=staged, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


# ---------------------------------------------------------------------------- nets in other styles


def test_weights_fit_the_graders_net_however_a_hand_in_names_its_layers(staged):
    torch.manual_seed(0)
    sizes = [grader.PARAMETERS[name] for name in ("BASE_CHANNELS", "DEPTH")]
    net = course_unet.UNet(*sizes, norms=grader.PARAMETERS["NORMS"])
    (staged / "names.json").write_text(json.dumps(names_in_use(net)), encoding="utf-8")
    pets.save_weights(staged / "weights.pt", net)
    images = torch.randn(2, 3, 32, 32)
    expected, found = net.eval()(images), criteria.model.__wrapped__().eval()(images)
    assert torch.allclose(expected, found, atol=5e-3)  # weights are kept in half precision


def test_weights_of_a_net_of_another_size_are_told(staged):
    pets.save_weights(staged / "weights.pt", course_unet.UNet(4, 2))
    with pytest.raises(AssertionError, match=r"of a UNet\(8, 4, norms=1\), found those of another"):
        criteria.model.__wrapped__()


# ------------------------------------------------------------------------- the numbers of a run


@pytest.fixture
def scored(staged, monkeypatch):
    """Return the arguments of the criterion of the metrics, for a run of a net without training."""
    monkeypatch.chdir(pets.ROOT)
    drawn = pets.draw_sample_pets(staged / "new", trainval=60, test=12, side=48)
    monkeypatch.setattr(criteria, "DATASET", drawn)
    monkeypatch.setattr(criteria, "LIMIT", 50)
    monkeypatch.setitem(grader.PARAMETERS, "LIMIT", 50)
    recipe = pets.Recipe(**grader.PARAMETERS)
    pets.save_weights(staged / "weights.pt", new_net(recipe))
    names = criteria.names.__wrapped__()
    model = criteria.model.__wrapped__()
    counts = criteria.rescored.__wrapped__(names, model)
    steps = pets.analyse_shapes(model, criteria.SIDE)
    costs = {key: sum(getattr(step, key) for step in steps) for key in ("parameters", "flops")}
    sizes = {split: len(of_split) for split, of_split in names.items()}
    metrics = {"parameters": recipe.model_dump(), "dataset": sizes, "model": costs}
    metrics["training"] = {"epochs": 8, "steps": 16, "seconds": 4.0, "images_per_second": 64.0}
    metrics["training"] |= {"device": "cpu", "precision": "float32"}
    loaded = {split: pets.load_pets(drawn, names[split], 32) for split in counts}
    history = [{"epoch": 1, "train_loss": 1.0, "seconds": 4.0}]
    pets.save_run(staged, metrics, history, {s: (loaded[s], counts[s]) for s in counts})
    return names, model, counts


def leaves(content: dict) -> list[tuple[dict, str]]:
    """Return where each number or text of nested dicts lies: in what, and under which key."""
    found = [(content, key) for key, value in content.items() if not isinstance(value, dict)]
    return found + [leaf for value in content.values() if isinstance(value, dict)
                    for leaf in leaves(value)]  # fmt: skip


def test_every_number_of_metrics_that_is_wrong_is_told(staged, scored):
    names, model, counts = scored

    def judge():
        for split in counts:
            criteria.test_metrics_are_what_the_weights_score(counts, split)
        criteria.test_metrics_say_what_was_done(names, model)

    judge()
    content = json.loads((staged / "metrics.json").read_text(encoding="utf-8"))
    del content["versions"]
    content["parameters"] = dict(grader.PARAMETERS)  # how to train is the learner's
    for part, key in leaves(content):
        kept = part[key]
        part[key] = [[0] * 3] * 3 if isinstance(kept, list) else "x" if isinstance(kept, str) else 9
        (staged / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
        part[key] = kept
        with pytest.raises(AssertionError, match=rf"\b{key}\b"):
            judge()


# ---------------------------------------------------------------------------------- whole hand-ins

STYLES = {  # text of the module, and what a learner wrote
    "LeakyReLU(0.2, inplace=True)": "LeakyReLU(0.2)",
    "    cross_entropy = F.cross_entropy(logits, masks, ignore_index=IGNORE)\n": (
        "    likely = logits.log_softmax(dim=1).exp().log()  # keeps three tensors more\n"
        "    cross_entropy = F.nll_loss(likely, masks, ignore_index=IGNORE)\n"
    ),
    "        self.bottleneck = conv_plus_conv(channels[-1], channels[-1], norms)\n": "",
    "        self.out = nn.Conv2d(": (
        "        self.bottleneck = conv_plus_conv(channels[-1], channels[-1], norms)\n"
        "        self.out = nn.Conv2d("
    ),
    "range(0, len(images), 32)": "range(0, len(images), 1)",
    "slice(start, start + 32)": "slice(start, start + 1)",
}


def test_right_work_in_other_styles_gets_all_points(tmp_path):
    """A class of one hand-in in many styles, run on other data and a device the grader lacks."""
    (own := tmp_path / "own").mkdir()
    source = (pets.ROOT / "petseg_utils.py").read_text(encoding="utf-8")
    for old, new in STYLES.items():
        assert old in source, old
        source = source.replace(old, new)
    source += next(m.append for m in read_mutants() if m.name == "blocks nested in a class")
    text = (pets.ROOT / NOTEBOOK).read_text(encoding="utf-8")
    text = text.replace(r"DATASET: str = \"sample\"", r"DATASET: str = \"oxford\"")
    notebook = json.loads(text.replace(r"DEVICE: str = \"auto\"", r"DEVICE: str = \"cuda\""))
    edit(notebook, "conda")
    edit(notebook, "Colab")
    write(own, notebook, encoding="utf-8-sig", lines="\r\n")
    (own / "petseg_utils.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "grading", "--hand-ins", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=pets.ROOT, capture_output=True, text=True)
    table = (tmp_path / "out" / "grades.csv").read_text(encoding="utf-8")
    assert table.endswith(",100,100,True,\n"), table + done.stderr  # no reason, as none is lost


# ---------------------------------------------------------------------------------- other datasets


def test_dataset_without_a_border_is_trained_on_and_scored(tmp_path, run_folder):
    folder = pets.draw_sample_pets(tmp_path, trainval=40, test=20, seed=0, side=48)
    for path in (folder / "annotations" / "trimaps").glob("*.png"):
        trimap = np.array(Image.open(path))
        Image.fromarray(np.where(trimap == 3, 1, trimap)).save(path)
    small = {"IMAGE_SIZE": 16, "BASE_CHANNELS": 2, "DEPTH": 2, "EPOCHS": 1, "BATCH_SIZE": 8}
    given = {"DATASET": "oxford", "DATA_DIR": str(tmp_path), "RUN_NAME": run_folder.name, **small}
    output = str(tmp_path / "executed.ipynb")
    papermill.execute_notebook(pets.ROOT / NOTEBOOK, output, given, progress_bar=False)
    test = pets.read_run(run_folder)["test"]
    assert test["confusion_matrix"][2] == [0, 0, 0]
    assert test["iou"]["border"] in (0, None)  # predicted nevertheless, or nowhere
    assert len(list((run_folder / "figures").glob("*.png"))) >= 10
