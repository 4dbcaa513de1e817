"""`make run`: what its terminal shows, and the recipes by name."""

import json
import logging
import re
import shutil
from functools import partial

import nbformat
import pytest
import yaml
from papermill.engines import NBClientEngine, papermill_engines
from tqdm import tqdm

import petseg_utils as pets
from experiments import run_notebook, terminal
from experiments.tables import cut
from support import machine

RECIPES = {path.stem: path for path in (pets.ROOT / "recipes").glob("*.yaml")}
TOLD = {name: path.read_text(encoding="utf-8") for name, path in RECIPES.items()}
KEPT = pets.ROOT / "notebooks" / "oxford_run" / "metrics.json"
BAR = "\repoch 2/6:   3%|▎ | 3/108 [00:01<00:12,  2.2it/s, loss=0.618, valid accuracy=0.869]"
STATE = "epoch 2/6, 00:12 left, loss=0.618, valid accuracy=0.869"


@pytest.mark.parametrize(("text", "told"), [
    ("", ""), ("a warning: 5 | 6\n", ""), ("predict:   0%|     | 0/9 [00:00<?, ?it/s]", ""),
    ("\rscore:  50%|##   | 5/10 [00:02<01:02,  2.0it/s]", "score, 01:02 left"),
    ("a:  9%|  | 1/9 [00:01<00:09, 1s/it]\rb: 99%|# | 8/9 [01:00<00:01, 2it/s]", "b, 00:01 left"),
    ("runs:  50%|# | 1/2 [00:02<00:02, 2.0s/it, at work: a, b]", "runs, 00:02 left, at work: a, b"),
    (BAR, STATE),
])  # fmt: skip
def test_the_last_state_of_a_cells_bar_is_told(text, told):
    assert terminal.state_of(text) == told


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """Return what executes two sections, as on a terminal or not, and gives what was printed."""
    monkeypatch.setattr(run_notebook, "quieten_kernel", lambda: None)  # pytest has stderr
    monkeypatch.setattr(logging.root, "handlers", [])  # what is logged goes to a file
    monkeypatch.setattr(logging, "raiseExceptions", True)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}

    def show(*options: str) -> tuple[str, str]:
        cells = [
            nbformat.v4.new_code_cell("A: int = 1", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_markdown_cell("# Title"),
            nbformat.v4.new_markdown_cell("## Train the net\n\n### Not this"),
            nbformat.v4.new_code_cell(f"import sys\nprint({BAR!r}, file=sys.stderr)"),
            nbformat.v4.new_code_cell("print('hello')\nassert A == 1"),
        ]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, tmp_path / "two.ipynb")
        run_notebook.execute(tmp_path / "two.ipynb", tmp_path / "notebook.ipynb", [*options])
        return capsys.readouterr()

    return show


def test_without_a_terminal_each_section_is_a_line_and_scores_and_page_follow(show, tmp_path):
    shutil.copy(KEPT, tmp_path)
    printed, _ = show()
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert all(word in log for word in ("Executing Cell 5", "hello", "valid accuracy"))
    *sections, images, accuracy, iou, ious, seconds, done = printed.splitlines()
    assert sections == ["Title", "Train the net"]
    assert images.endswith("(oxford)")
    assert accuracy.endswith(" 93.15 %")
    assert iou.endswith(" 0.806")
    assert ious.endswith(" pet 0.874, background 0.933, border 0.610")
    assert seconds.endswith(" 6860 s")
    assert done == f"Done: open {tmp_path / 'notebook.html'}"
    assert papermill_engines.get_engine(None) is NBClientEngine  # for all else in this process
    assert show("--prepare-only")[0] == f"{done}\n"  # the scores are of another run then


def test_a_terminal_has_one_bar_with_section_and_state(show, monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", partial(tqdm, disable=False))  # conftest.py disables bars
    printed, bar = show("--progress-bar")
    assert printed.count("\n") == 1
    assert "\n" not in bar
    states = [state.split("| ")[-1].strip() for state in bar.split("\r")]
    assert "Train the net" in states
    assert f"Train the net: {STATE}" in states


def test_best_is_the_kept_run():
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    recipes = [pets.Recipe(**it) for it in (yaml.safe_load(TOLD["best"]), kept["parameters"])]
    best, used = (recipe.model_dump(exclude=pets.Recipe.PLACES) for recipe in recipes)
    assert best == used
    assert f"{cut(100 * kept['test']['pixel_accuracy'], 2)} %" in TOLD["best"]
    assert f"mean IoU {cut(kept['test']['mean_iou'], 3)}" in TOLD["best"]
    assert f"{kept['training']['seconds'] / 60:.0f} minutes" in TOLD["best"]


@pytest.mark.parametrize("name", ["quick", "laptop", "best"])
def test_a_recipe_is_valid_and_tells_the_memory_that_a_run_forecasts(name):
    recipe = pets.Recipe(**yaml.safe_load(TOLD[name]))
    told = re.search(r"Memory: ([\d.]+) GB", TOLD[name])
    images = {"train": 3311, "valid": 369, "test": 3669}
    forecast = machine.forecast(recipe.but(DEVICE="cpu"), images)
    assert float(told[1]) == pytest.approx(forecast / 1e9, abs=0.06)


def test_a_recipe_by_name_and_the_data_come_before_papermills_own_options(complains):
    own = ["-p", "SMALL_EPOCHS", "1 at 64", "-p", "SEED", "1"]
    files = ["-f", str(RECIPES["best"]), "-r", "DATA_DIR", "a b"]
    assert run_notebook.read(["--data", "a b", *own, "--recipe", "best"]) == [*files, *own]
    with complains("--recipe", "invalid choice: 'bset'", "best", "laptop", "quick"):
        run_notebook.read(["--recipe", "bset"])
    with complains("--data"):
        run_notebook.read(["--data"])


def test_a_wrong_value_ends_in_the_sentence_of_the_validation(
    run_folder, tmp_path, monkeypatch, complains
):
    monkeypatch.setattr(run_notebook, "quieten_kernel", lambda: None)
    monkeypatch.setattr(run_notebook, "RECIPES", tmp_path)
    (tmp_path / "mine.yaml").write_text("EPOCHS: 0\n", encoding="utf-8")
    with complains("EPOCHS should be"):
        run_notebook.run(run_folder.name, "--recipe", "mine")
