"""Draw the pictures that README and notebook show.

python figures/make_figures.py          photographs the notebook as a reader sees it
python figures/make_figures.py FOLDER   draws result.png from notebooks/oxford_run; FOLDER holds oxford-iiit-pet

cost.png is drawn by `make bench`, and history.png by the kept run itself.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import petseg_utils as pets  # noqa: E402

NOTEBOOKS = ROOT / "notebooks"
KEPT = NOTEBOOKS / "oxford_run"


def pick_by_rank(test: pets.Pets, matrices: torch.Tensor) -> dict[str, int]:
    """Return the test images whose mean IoU is better than so many per cent of all, by what to call them.

    Images whose mask is all background are left out: there a pet was forgotten, and no net can be right.
    """
    iou = torch.tensor([pets.scores(matrix)["mean_iou"] for matrix in matrices])
    empty = (test.masks == pets.CLASSES.index("background")).flatten(1).all(dim=1)
    ranking = [i for i in iou.argsort().tolist() if not empty[i]]
    return {f"better than {share} %": ranking[len(ranking) * share // 100] for share in (90, 75, 50, 25, 10)}


def plot_result(shown: pets.Pets, titles: list[str], labels: torch.Tensor) -> plt.Figure:
    """Plot photo, truth and prediction of each image below one another."""
    columns = {}
    for title, image, mask, label in zip(titles, shown.images, shown.masks, labels, strict=True):
        columns[title] = [image.permute(1, 2, 0).numpy(), pets.colorize(mask), pets.colorize(label)]
    alt = "Five photos of pets, each with its true mask and, nearly the same, the mask that the net predicts."
    return pets.plot_grid(columns, ["photo", "truth", "prediction"], alt, width=1.8)


def photograph_notebook(section: str = "See-the-U") -> None:
    """Photograph what a window 1,200 pixels wide shows of the notebook's page from a section's heading on."""
    from playwright.sync_api import sync_playwright  # here, since the other figures do without a browser

    page_of = ["nbconvert", "--to", "html", "--template-file", NOTEBOOKS / "page.html.j2", "--output-dir"]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        subprocess.run([sys.executable, "-m", *page_of, folder, NOTEBOOKS / "pet_segmentation.ipynb"], check=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1150})
        page.goto((Path(folder) / "pet_segmentation.html").as_uri())
        page.evaluate("heading => document.getElementById(heading).scrollIntoView()", section)
        page.screenshot(path=ROOT / "figures" / "notebook.png")
        browser.close()


def main(data_dir: str = "") -> None:
    """Photograph the notebook; or score the test split with the kept net, and draw some of its predictions."""
    if not data_dir:
        return photograph_notebook()
    model, recipe = pets.load_net(KEPT)
    precision = pets.pick_precision(recipe.PRECISION, torch.device("cpu"))
    folder = pets.find_dataset(data_dir)
    names = pets.read_split(folder, "test")
    test = pets.load_pets(folder, names, recipe.IMAGE_SIZE, mask_side=recipe.SCORE_SIZE)
    matrices = pets.evaluate(model, test, precision, flip=recipe.FLIP)
    print(f"pixel accuracy on the test split: {pets.scores(matrices.sum(0))['pixel_accuracy']:.6f}")
    chosen = pick_by_rank(test, matrices)
    images, size = test.images[[*chosen.values()]], test.masks.shape[1:]
    labels, _ = pets.predict(model, images, precision, size=size, flip=recipe.FLIP)
    shown = pets.load_pets(folder, [names[i] for i in chosen.values()], recipe.SCORE_SIZE)  # finer than the net saw
    plot_result(shown, list(chosen), labels).savefig(ROOT / "figures" / "result.png", dpi=100)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except pets.InputError as error:
        sys.exit(str(error))
