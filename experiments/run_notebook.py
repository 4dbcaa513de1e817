"""Execute a notebook into runs/: what `make run` and `make compare` call, with a run's NAME and
papermill's options.

An executed notebook that is there is kept until the new one is complete, and whatever goes wrong is
told in one last sentence.
"""

import logging
import os
import sys
from pathlib import Path
from unittest.mock import patch

import click
import nbformat
from filelock import Timeout
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.cli import papermill
from papermill.exceptions import PapermillExecutionError

from support.parameters import InputError, check_folder_name, reason
from support.safe_files import lock, write_atomically

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
PAGE = NOTEBOOKS / "page.html.j2"  # how the executed notebook looks in a browser


def run(name: str, *options: str) -> None:
    """Execute the narrative into the folder runs/`name`. Errors: `InputError`."""
    check_folder_name(name, "NAME")
    output = ROOT / "runs" / name / "notebook.ipynb"
    execute(NOTEBOOKS / "pet_segmentation.ipynb", output, ["-r", "RUN_NAME", name, *options])


def compare(*options: str) -> None:
    """Execute the comparison into runs/compare.ipynb. Errors: `InputError`."""
    execute(NOTEBOOKS / "compare_runs.ipynb", ROOT / "runs" / "compare.ipynb", list(options))


def execute(notebook: Path, output: Path, options: list[str]) -> None:
    """Execute a notebook, and write a page of it for a browser beside `output`. Errors: `InputError`."""
    draft = output.with_name("unfinished.ipynb")  # what stays of a run that fails
    page = output.with_suffix(".html")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock(output.with_name(".notebook.lock"))
        draft.unlink(
            missing_ok=True
        )  # one that is left by an earlier run would be taken for this one's
        once = (
            "--no-request-save-on-cell-execute"  # twice a cell would take a tenth of the whole time
        )
        call_papermill(["--log-output", once, str(notebook), str(draft), *options], draft)
        executed = nbformat.read(draft, as_version=4)
        tidy, _ = CoalesceStreamsPreprocessor().preprocess(
            executed, {}
        )  # of a progress bar, only its last state
        text, _ = HTMLExporter(template_file=str(PAGE)).from_notebook_node(tidy)
        write_atomically(page, lambda file: file.write(text.encode()))
        write_atomically(output, lambda file: file.write(nbformat.writes(tidy).encode()))
        draft.unlink()
    except Timeout:
        raise InputError(
            f"another run is writing to {output}: wait for it, or choose another NAME."
        ) from None
    except OSError as error:
        why = f"{output} cannot be written ({reason(error)})"
        raise InputError(f"{why}: make room, or choose another NAME.") from None
    except (
        KeyboardInterrupt,
        SystemExit,
    ):  # papermill exits when its kernel dies, as it does after Ctrl-C
        kept = output.with_name("checkpoint.pt")
        go_on = "start again"
        if kept.exists():
            go_on = f"{kept} keeps the complete epochs, to go on from with -p RESUME True"
        raise InputError(
            f"the run was stopped, by Ctrl-C or for want of memory: {go_on}."
        ) from None
    print(f"Done: open {page}")


def call_papermill(command: list[str], draft: Path) -> None:
    """Let papermill execute a notebook into `draft`. Errors: `InputError`, for all that a cell can do, too."""
    quieten_kernel()
    logging.getLogger(
        "asyncio"
    ).disabled = True  # after Ctrl-C it may tell, last and at length, of what was cut off
    try:
        with patch(
            "traceback.print_exc"
        ):  # by which papermill would tell of a dead kernel, at length
            papermill.main(command, standalone_mode=False)
    except PapermillExecutionError as error:
        if error.ename == "InputError":
            raise InputError(error.evalue) from None
        why = f"cell {error.exec_count} ended with {error.ename}: {reason(error.evalue)}"
        raise InputError(f"{why}; it is in {draft}.") from None
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        why = f"papermill does not understand its options ({error.format_message()})"
        raise InputError(f"{why}: correct them.") from None
    finally:
        print(file=sys.stderr)  # below the progress bar


def quieten_kernel() -> None:
    """Keep this process's messages, but not the stack traces that its kernel prints when it is stopped."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a child inherits
