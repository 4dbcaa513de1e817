"""Draw the pictures that README and notebook show.

python figures/make_figures.py          photographs the notebook as a reader sees it
python figures/make_figures.py FOLDER   draws result.png from notebooks/oxford_run and the dataset
                                        that FOLDER holds

cost.png is drawn by `make bench`, and history.png by the kept run itself.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import petseg_utils as pets
from experiments.read_runs import check_run

FIGURES = Path(__file__).resolve().parent
NOTEBOOKS = FIGURES.parent / "notebooks"
KEPT = NOTEBOOKS / "oxford_run"


def pick_by_rank(counts: dict[str, np.ndarray]) -> dict[str, str]:
    """Return test images by how they rank: "better than 90 %" of all by mean IoU, and so on.

    Images whose mask is all background are left out: there a pet was forgotten, and a net that
    finds it looks wrong.
    """
    ious = {}
    for name, nine in counts.items():
        matrix = torch.from_numpy(nine).view(len(pets.CLASSES), -1)
        if matrix[0].any() or matrix[2].any():
            ious[name] = pets.scores(matrix)["mean_iou"]
    ranking = sorted(ious, key=ious.get)
    shares = (90, 75, 50, 25, 10)
    return {f"better than {share} %": ranking[len(ranking) * share // 100] for share in shares}


def plot_result(shown: pets.Pets, titles: list[str], labels: torch.Tensor) -> plt.Figure:
    """Plot photo, truth and prediction of each image below one another."""
    columns = {}
    for title, image, mask, label in zip(titles, shown.images, shown.masks, labels, strict=True):
        columns[title] = [image.permute(1, 2, 0).numpy(), pets.colorize(mask), pets.colorize(label)]
    alt = "Five photos of pets, each with its true mask and, nearly the same, the net's."
    return pets.plot_grid(columns, ["photo", "truth", "prediction"], alt, width=1.8)


def photograph_notebook(section: str = "See-the-U") -> None:
    """Photograph what 1,200 pixels across show of the notebook, from a section's heading on."""
    # Here, since the other figures do without a browser.
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "nbconvert", "--to", "html"]
    command += ["--template-file", NOTEBOOKS / "page.html.j2", NOTEBOOKS / "pet_segmentation.ipynb"]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        subprocess.run([*command, "--output-dir", folder], check=True)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 1150})
        page.goto((Path(folder) / "pet_segmentation.html").as_uri())
        page.evaluate("heading => document.getElementById(heading).scrollIntoView()", section)
        page.screenshot(path=FIGURES / "notebook.png")
        browser.close()


def main(data_dir: str = "") -> None:
    """Photograph the notebook; or draw some of the kept net's predictions for test images."""
    if not data_dir:
        return photograph_notebook()
    model, recipe = pets.load_net(KEPT)
    precision = pets.pick_precision(recipe.PRECISION, torch.device("cpu"))
    folder = pets.find_dataset(data_dir)
    chosen = pick_by_rank(check_run(pets.read_run(KEPT)).counts["test"])
    names = list(chosen.values())
    shown = pets.load_pets(folder, names, recipe.SCORE_SIZE)  # finer than what the net sees
    seen = pets.load_pets(folder, names, recipe.IMAGE_SIZE)
    size = shown.masks.shape[1:]
    labels, _ = pets.predict(model, seen.images, precision, size=size, flip=recipe.FLIP)
    plot_result(shown, list(chosen), labels).savefig(FIGURES / "result.png", dpi=100)
    return None


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except pets.InputError as error:
        sys.exit(str(error))
