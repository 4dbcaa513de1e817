"""Faults that people report: odd photos, containers, papermill's options, and other locales."""

import math
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import petseg_utils as pets
from experiments import photo, run_notebook
from support import machine

# ------------------------------------------------------------------------------------------- photos


@pytest.mark.parametrize(("path", "words"), [
    ("x" * 300, "decoded"), ("nul\0.jpg", "decoded"), ("", "decoded"), ("/tmp", "decoded"),
    ("/nowhere/cat.jpg", "there is no file /nowhere/cat.jpg"),
    ("~/nothing.jpg", f"there is no file {Path.home()}/nothing.jpg"),
])  # fmt: skip
def test_photo_that_is_none_is_told(complains, path, words):
    with complains(words):
        pets.open_image(path)


TURNED = Image.Exif()
TURNED[0x112] = 6
TURN = {"exif": TURNED.tobytes()}
PHOTOS = {
    "HEIC, turned": ("heic", "RGB", (30, 40), TURN),
    "AVIF, turned": ("avif", "RGB", (30, 40), TURN),
    "JPEG, CMYK": ("jpg", "CMYK", (40, 30), {}),
    "JPEG, 20 : 1": ("jpg", "RGB", (200, 10), {}),
    "WebP, turned": ("webp", "RGB", (30, 40), TURN),
    "WebP, animated": (
        "webp", "RGB", (40, 30), {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]},
    ),
    "GIF, transparent": ("gif", "P", (40, 30), {"transparency": 0}),
    "PNG, transparent": ("png", "RGBA", (40, 30), {}),
    "PNG, 1 x 1": ("png", "RGB", (1, 1), {}),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", PHOTOS)
def test_any_photo_is_opened_as_rgb_and_the_right_way_up(tmp_path, kind):
    suffix, mode, size, options = PHOTOS[kind]
    stored = size[::-1] if "exif" in options else size
    grey = Image.new("RGB", stored, (102, 102, 102)).convert(mode)
    grey.save(tmp_path / f"photo.{suffix}", **options)
    image = pets.open_image(tmp_path / f"photo.{suffix}")
    assert (image.mode, image.size) == ("RGB", size)
    assert np.abs(np.array(image).astype(int) - 102).max() < 9


@pytest.mark.parametrize("strip", [1, 50, 333, 10**6])
@pytest.mark.parametrize("views", [1, 2])
def test_labels_in_strips_are_those_of_the_whole_photo(strip, views):
    logits = torch.randn(views, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for height, width in ((37, 50), (8, 8), (5, 3), (1, 100)):
        at_once = F.interpolate(logits, (height, width), mode="bilinear")
        likely = at_once.softmax(dim=1).mean(dim=0)
        labels = photo.label(logits, height, width, strip).long()
        chosen = likely.gather(0, labels[None])[0]
        assert torch.allclose(chosen, likely.amax(0), atol=1e-6)  # the same, but for ties


def test_no_photo_takes_the_place_of_anothers_pictures(tmp_path, monkeypatch, capsys):
    def background(picture: Image.Image) -> torch.Tensor:
        return torch.ones(picture.size[::-1], dtype=torch.uint8)

    monkeypatch.setattr(pets, "ROOT", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(photo, "segment", background)
    shades = {"a/same.jpg": 10, "b/same.png": 100, "b/same_2.png": 200}
    for name, shade in shades.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 6), shade).save(tmp_path / name, **TURN)
    for name in [*shades, *shades]:  # a second time, over its own
        photo.main(f"~/{name}")
    stems = ["same", "same_2", "same_2_2"]
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    assert made == {f"{stem}_{kind}.png" for stem in stems for kind in photo.KINDS}
    blue = (0x00, 0x72, 0xB2)  # of the background
    for stem, shade in zip(stems, shades.values(), strict=True):
        overlay = pets.open_image(tmp_path / "runs" / f"{stem}_overlay.png")
        halfway = [(shade + channel) / 2 for channel in blue]
        assert overlay.size == (6, 4)
        assert overlay.getpixel((0, 0)) == pytest.approx(halfway, abs=2)
    with Image.open(tmp_path / "runs" / "same_mask.png") as mask:
        assert np.array(mask).tolist() == 4 * [6 * [1]]  # a label, the right way up
        assert mask.convert("RGB").getpixel((0, 0)) == blue
    assert "0% of the photo is pet" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- containers

MEMORY = {  # a limit of 3 GB, of which 2.5 GB are used, 0.5 GB of these by files
    "max": "3000000000\n", "current": "2500000000\n", "stat": "anon 1\ninactive_file 500000000\n",
}  # fmt: skip
MEMORY_1 = {
    "limit_in_bytes": MEMORY["max"],
    "usage_in_bytes": MEMORY["current"],
    "stat": "inactive_file 7\ntotal_inactive_file 500000000\n",
}
UNLIMITED_1 = {"limit_in_bytes": "9223372036854771712\n", "usage_in_bytes": "5\n", "stat": ""}


def memory(files: dict[str, str], folder: str = "") -> dict[str, str]:
    return {f"{folder}memory.{name}": text for name, text in files.items()}


def quota_1(quota: str) -> dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000\n"}


GROUPS = {  # what /proc/self/cgroup says, files below /sys/fs/cgroup, free bytes, processors of 8
    "none": ("", {}, math.inf, 8),
    "2": ("0::/", memory(MEMORY), 1e9, 8),
    "2, unlimited": ("0::/", {"memory.max": "max", "cpu.max": "max 100000"}, math.inf, 8),
    "2, a group above": (
        "0::/user/mine", memory(MEMORY, "user/") | {"user/cpu.max": "200000 100000\n"}, 1e9, 2,
    ),
    "2, half a processor": ("0::/a", {"a/cpu.max": "50000 100000\n"}, math.inf, 1),
    "2, one and a half": ("0::/a", {"a/cpu.max": "150000 100000\n"}, math.inf, 2),
    "2, more than there are": ("0::/a", {"a/cpu.max": "900000 9000\n"}, math.inf, 8),
    "2, of another process": ("0::/mine", {"other/cpu.max": "1 1\n"}, math.inf, 8),
    "1": ("7:memory:/x", memory(MEMORY_1, "memory/x/"), 1e9, 8),
    "1, seen from inside": (
        "3:cpu,cpuacct:/docker/7\n2:memory:/docker/7",
        memory(MEMORY_1, "memory/") | quota_1("300000\n"), 1e9, 3,
    ),
    "1, unlimited": (
        "3:cpu:/\n2:memory:/", memory(UNLIMITED_1, "memory/") | quota_1("-1\n"), math.inf, 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", GROUPS)
def test_limits_of_a_container_count(monkeypatch, tmp_path, version):
    said, files, free, cpus = GROUPS[version]
    (tmp_path / "own").write_text(said, encoding="utf-8")
    for name, text in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "tree")
    own = SimpleNamespace(rss=2e8, vms=3e8)  # of 4 GB that the machine has left
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9))
    process = machine.psutil.Process
    monkeypatch.setattr(process, "memory_info", lambda self: own)
    monkeypatch.setattr(process, "cpu_affinity", lambda self: [*range(8)], raising=False)
    assert machine.usable_cpus() == cpus
    assert machine.free_memory() == min(free, 4e9) + own.rss


@pytest.mark.parametrize(("threads", "cpus", "expected"), [(4, 2, 2), (2, 8, 2), (1, 8, 1)])
def test_torch_gets_no_more_threads_than_may_run(monkeypatch, threads, cpus, expected):
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "usable_cpus", lambda: cpus)
    try:
        torch.set_num_threads(threads)  # as OMP_NUM_THREADS does
        machine.pick_device("cpu")
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------- papermill


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Return what executes a notebook of two cells, the second one given, in an odd folder."""
    monkeypatch.setattr(run_notebook, "quieten_kernel", lambda: None)  # pytest has stderr
    folder = tmp_path / "mein Ördner 猫"
    folder.mkdir()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    first = nbformat.v4.new_code_cell("A: int = 1", metadata={"tags": ["parameters"]})

    def execute(source: str, *options: str) -> Path:
        cells = [first, nbformat.v4.new_code_cell(source)]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / "two.ipynb")
        run_notebook.execute(folder / "two.ipynb", folder / "done.ipynb", [*options])
        return folder / "done.html"

    return execute


@pytest.mark.parametrize(("options", "words"), [
    (["-k", "nokernel"], "nokernel"), (["-f", "missing.yaml"], "missing.yaml"),
    (["-y", "{"], "parsing"), (["-y", "- 1"], "sequence"), (["-b", "x"], "base64"),
    (["--cwd", "/nowhere"], "/nowhere"), (["--no-such-option"], "no-such-option"),
    (["--execution-timeout", "1"], "timed out"),
], ids=str)  # fmt: skip
def test_option_of_papermill_that_fails_is_told(execute, complains, options, words):
    with complains(words, "its options"):
        execute("import time; time.sleep(60)", *options)


@pytest.mark.parametrize("option", ["--help-notebook", "--version", "--prepare-only"])
def test_option_of_papermill_that_executes_nothing_is_no_fault(execute, option):
    execute("1 / 0", option)


@pytest.mark.parametrize(("source", "words"), [
    ("B = 3\nassert A == B", "cell 2 ended with AssertionError in its line 2, assert A == B"),
    ("assert A == 3, 'A is odd'", "AssertionError: A is odd"),
    ("raise KeyError", "KeyError in its line 1"),
    ("int('a\\nb')", "ValueError: invalid literal"),
    ("class InputError(ValueError): ...\nraise InputError('a b.')", "a b."),  # loaded twice
], ids=str)  # fmt: skip
def test_cell_that_fails_is_told_with_its_reason_or_line(execute, complains, source, words):
    with complains(words) as caught:
        execute(source)
    assert "str" not in str(caught.value).split()


@pytest.mark.parametrize("options", [["-f", "params.yaml"], ["-y", "A: 7"], ["-p", "A", "7"]])
def test_parameters_reach_a_notebook_in_an_odd_folder(execute, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/proc/nowhere")  # where nobody may write
    Path("params.yaml").write_text("A: 7\n", encoding="utf-8")
    assert execute("assert A == 7", *options).exists()


# ------------------------------------------------------------------------------------------ locales


def test_text_is_read_as_utf_8_whatever_the_locale(execute, monkeypatch):
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for name, value in (ascii_locale | {"PYTHONPATH": str(pets.ROOT)}).items():
        monkeypatch.setenv(name, value)
    page = pets.ROOT / "notebooks" / "explorer.html"
    cells = nbformat.read(pets.ROOT / "notebooks" / "going_deeper.ipynb", 4).cells
    lines = [line for cell in cells for line in cell.source.splitlines()]
    (reads,) = [line for line in lines if line.startswith("page = ")]
    execute(
        "import locale\nassert locale.getpreferredencoding(False) == 'ANSI_X3.4-1968'\n"
        f"import petseg_utils as pets\n{reads}\n"
        f"assert page.encode() == open({str(page)!r}, 'rb').read()"
    )
