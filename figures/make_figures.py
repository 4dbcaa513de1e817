"""Draw the pictures that README and notebook show.

    python -m figures.make_figures          photographs the notebook as a reader sees it
    python -m figures.make_figures FOLDER   draws result.png from notebooks/oxford_run

FOLDER holds oxford-iiit-pet. The kept run itself draws history.png.
"""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from nbconvert import HTMLExporter
from PIL import Image

import petseg_utils as pets
from experiments.command import as_script
from experiments.compare import score_of
from experiments.read_runs import check_run

FIGURES = pets.ROOT / "figures"
NOTEBOOKS = pets.ROOT / "notebooks"
KEPT = NOTEBOOKS / "oxford_run"


def pick_by_rank(counts: dict[str, np.ndarray]) -> dict[str, str]:
    """Return the test images whose mean IoU is better than so many per cent of all, by a title.

    Images whose mask is all background are left out: there a pet was forgotten, and a net that
    finds it looks wrong.
    """
    whole = {name: nine for name, nine in counts.items() if nine[:3].any() or nine[6:].any()}
    ranking = sorted(whole, key=lambda name: score_of(whole[name], "mean_iou"))
    shares = (90, 75, 50, 25, 10)
    return {f"better than {share} %": ranking[len(ranking) * share // 100] for share in shares}


def plot_result(shown: pets.Pets, titles: list[str], labels: torch.Tensor) -> plt.Figure:
    """Plot photo, truth and prediction of each image below one another."""
    columns = {}
    for title, image, mask, label in zip(titles, shown.images, shown.masks, labels, strict=True):
        columns[title] = [image.permute(1, 2, 0).numpy(), pets.colorize(mask), pets.colorize(label)]
    alt = "Five photos of pets, each with its true mask and, nearly the same, the net's mask."
    return pets.plot_grid(columns, ["photo", "truth", "prediction"], alt, width=1.8)


def store(picture: Image.Image, name: str) -> None:
    """Store a picture in the folder figures/ with 256 colours, which take half the bytes."""
    # The median cut, which is Pillow's default, would grey the colours of small areas.
    small = picture.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    small.save(FIGURES / name, optimize=True)


def photograph_notebook(section: str = "See-the-U", width: int = 1200, height: int = 1150) -> None:
    """Photograph what a window shows of the notebook's page from a section's heading on.

    Errors: `InputError` without the browser Chromium.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        raise pets.InputError("there is no chromium to photograph the notebook with: install it.")
    exporter = HTMLExporter(template_file=str(NOTEBOOKS / "page.html.j2"))
    text, _ = exporter.from_filename(str(NOTEBOOKS / "pet_segmentation.ipynb"))
    # In a frame, since Chromium photographs a page from its top.
    size = f"width: {width}px; height: {height}px"
    frame = f'<body style="margin: 0"><iframe src="page.html#{section}" style="border: 0; {size}">'
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(text, encoding="utf-8")
        (Path(folder) / "frame.html").write_text(frame, encoding="utf-8")
        photo = Path(folder) / "photo.png"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={photo}"]
        options += [f"--window-size={width},{height}", (Path(folder) / "frame.html").as_uri()]
        subprocess.run([chromium, *options], check=True, timeout=60)
        store(Image.open(photo), "notebook.png")


def main(data_dir: str = "") -> None:
    """Photograph the notebook; or draw some of the kept net's predictions for test images."""
    if not data_dir:
        return photograph_notebook()
    model, recipe = pets.load_net(KEPT)
    precision = pets.pick_precision(recipe.PRECISION, torch.device("cpu"))
    folder = pets.find_dataset(data_dir)
    chosen = pick_by_rank(check_run(pets.read_run(KEPT)).counts["test"])
    names = list(chosen.values())
    shown = pets.load_pets(folder, names, recipe.SCORE_SIZE)  # may be finer than the net sees
    seen = pets.load_pets(folder, names, recipe.IMAGE_SIZE)
    size = shown.masks.shape[1:]
    labels, _ = pets.predict(model, seen.images, precision, size=size, flip=recipe.FLIP)
    drawn = io.BytesIO()
    plot_result(shown, list(chosen), labels).savefig(drawn, dpi=100)
    store(Image.open(drawn), "result.png")
    return None


if __name__ == "__main__":
    as_script(main, __doc__)
