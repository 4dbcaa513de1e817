"""What a terminal shows of a notebook that papermill executes, and of the run at its end.

One bar, with the section's heading and the state of the bar that its cell shows; where no terminal
is, a line for each section. All that papermill itself tells goes to a file.
"""

import json
import logging
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.log import logger
from tqdm import tqdm
from traitlets.config import Config

from experiments.tables import cut

BAR = "{percentage:3.0f} %|{bar:10}| {desc}"
STATE = re.compile(r"([^\r\n:]+): +\d+%\|[^|]*\| \S+ \[\S+<([\d:]+), [^,\]]+(?:, ([^\]]*))?\]")


def state_of(text: str) -> str:
    """Return the last state of the bars of tqdm that a cell wrote, "" without one."""
    states = STATE.findall(text)
    if not states:
        return ""
    what, left, figures = states[-1]
    return ", ".join(filter(None, [what, f"{left} left", figures]))


class Progress(logging.Handler):
    """Tells which section of a notebook is executed, and the state of the bar that a cell shows."""

    def __init__(self, bar: tqdm | None) -> None:
        super().__init__(logging.WARNING)  # papermill logs so what a cell writes to stderr
        self.bar = bar
        self.section = ""

    def start_cell(self, cell: NotebookNode, **_: object) -> None:
        """Tell the heading of a section that begins with this cell."""
        headings = re.findall(r"^##? +(.+)", cell.source, re.MULTILINE)
        if cell.cell_type == "markdown" and headings:
            self.section = headings[-1]
            if self.bar is None:
                print(self.section, flush=True)
        if self.bar is not None:
            self.bar.set_description_str(self.section)  # the state of the last cell's bar is over

    def emit(self, record: logging.LogRecord) -> None:
        """Show the state of a bar."""
        state = state_of(record.getMessage())
        if state and self.bar is not None:
            self.bar.set_description_str(f"{self.section}: {state}")


class Engine(NBClientEngine):
    """Papermill's own engine, which shows its progress."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, **options: object
    ) -> None:
        """Execute a notebook; a kernel that dies, as by Ctrl-C, is an interrupt."""
        progress = Progress(nb_man.pbar)
        if nb_man.pbar is not None:
            nb_man.pbar.bar_format, nb_man.pbar.leave = BAR, False
        logger.addHandler(progress)
        options["on_cell_start"] = progress.start_cell
        options["extra_arguments"] = ["--log-level=CRITICAL"]  # the kernel's would break a bar
        try:
            with TemporaryDirectory() as sockets:
                if sys.platform != "win32":
                    # Kernels that start at the same moment may draw the same ports (papermill's
                    # issue 511), so their sockets are files.
                    files = {"transport": "ipc", "ip": f"{sockets}/kernel"}
                    options["config"] = Config(KernelManager=files)
                super().execute_managed_notebook(nb_man, kernel_name, **options)
        except DeadKernelError:
            raise KeyboardInterrupt from None
        finally:
            logger.removeHandler(progress)


def show_progress(log: Path) -> list[str]:
    """Let all that is logged go to a file, and return papermill's options for the bar."""
    options = {"filemode": "w", "encoding": "utf-8", "format": "%(message)s", "level": "INFO"}
    logging.basicConfig(filename=log, force=True, **options)
    logging.raiseExceptions = False  # of a log that a full disk cuts short
    papermill_engines.register("progress", Engine)
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return ["--engine", "progress", "--progress-bar" if terminal else "--no-progress-bar"]


def fault_of(error: PapermillExecutionError, draft: Path) -> str:
    """Return one sentence on the cell that ended a notebook, with its line if only that tells."""
    if error.ename == "InputError":
        return error.evalue
    what = f"cell {error.exec_count} ended with {error.ename}"
    if error.evalue.strip():
        what += f": {error.evalue.strip().splitlines()[0][:200]}"
    else:  # a bare assert, say: the line that the stack trace points at
        trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
        line = re.search(r"^-+> *(\d+) (.*)$", trace, re.MULTILINE)
        what += f" in its line {line[1]}, {line[2].strip()}" if line else ""
    return f"{what}; it is in {draft}."


def scores_of(metrics: Path) -> str:
    """Return the test scores of a run, cut, and the seconds of its training, a line each."""
    run = json.loads(metrics.read_text(encoding="utf-8"))
    test = run["test"]
    ious = {name: "–" if iou is None else cut(iou, 3) for name, iou in test["iou"].items()}
    return "\n".join([
        f"test images     {test['images']:,} ({run['dataset']['name']})",
        f"pixel accuracy  {cut(100 * test['pixel_accuracy'], 2)} %",
        f"mean IoU        {cut(test['mean_iou'], 3)}",
        f"IoU             {', '.join(f'{name} {iou}' for name, iou in ious.items())}",
        f"training        {run['training']['seconds']:.0f} s",
    ])  # fmt: skip
