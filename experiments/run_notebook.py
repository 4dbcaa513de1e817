"""Execute a notebook into runs/, with a run's NAME and papermill's options.

    python -m experiments.command run NAME --recipe best --data FOLDER -p SEED 1

`make run` and `make compare` call this. An executed notebook that is there is kept until the new
one is complete, and whatever goes wrong is told in one last sentence.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import nbformat
from filelock import FileLock, Timeout
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.cli import papermill
from papermill.exceptions import PapermillExecutionError

from experiments.terminal import fault_of, scores_of, show_progress
from support.parameters import InputError, check_folder_name, reason
from support.safe_files import lock, write_atomically

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
NARRATIVE = NOTEBOOKS / "pet_segmentation.ipynb"
RECIPES = ROOT / "recipes"  # parameters of runs, by name
PAGE = NOTEBOOKS / "page.html.j2"  # how the executed notebook looks in a browser


def run(name: str, *options: str) -> None:
    """Execute the narrative into the folder runs/`name`. Errors: `InputError`."""
    check_folder_name(name, "NAME")
    quieten_kernel()
    output = ROOT / "runs" / name / "notebook.ipynb"
    execute(NARRATIVE, output, ["-r", "RUN_NAME", name, *read(options)])


def read(options: Sequence[str]) -> list[str]:
    """Return a run's options as papermill knows them: --recipe NAME, --data FOLDER, and its own.

    Errors: `InputError` for a recipe that there is not.
    """
    recipes = {path.stem: ["-f", str(path)] for path in sorted(RECIPES.glob("*.yaml"))}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", choices=recipes)
    parser.add_argument("--data")
    try:
        chosen, others = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name} {error.message}.") from None
    data = ["-r", "DATA_DIR", chosen.data] if chosen.data else []
    return [*recipes.get(chosen.recipe, []), *data, *others]


def compare(*options: str) -> None:
    """Execute the comparison into runs/compare.ipynb. Errors: `InputError`."""
    quieten_kernel()
    execute(NOTEBOOKS / "compare_runs.ipynb", ROOT / "runs" / "compare.ipynb", list(options))


def execute(notebook: Path, output: Path, options: list[str]) -> None:
    """Execute a notebook into `output`, with a page for a browser beside. Errors: `InputError`."""
    draft = output.with_name("unfinished.ipynb")  # what stays of a run that fails
    page = output.with_suffix(".html")
    claim = output.with_name(".notebook.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock(claim)
        draft.unlink(missing_ok=True)  # that of an earlier run would be taken for this one's
        once = "--no-request-save-on-cell-execute"  # twice a cell takes a tenth of the whole time
        shown = show_progress(output.with_name("log.txt"))
        command = [*shown, "--log-output", once, str(notebook), str(draft), *options]
        call_papermill(command, draft)
        if not draft.exists():
            return  # an option like --help-notebook printed what it was asked for
        executed = nbformat.read(draft, as_version=4)
        # Of a progress bar, only the last state is kept.
        tidy, _ = CoalesceStreamsPreprocessor().preprocess(executed, {})
        text, _ = HTMLExporter(template_file=str(PAGE)).from_notebook_node(tidy)
        write_atomically(page, lambda file: file.write(text.encode()))
        write_atomically(output, lambda file: file.write(nbformat.writes(tidy).encode()))
        draft.unlink()
    except Timeout:
        what = "wait for it, or choose another NAME"
        raise InputError(f"another run is writing to {output}: {what}.") from None
    except OSError as error:
        why = f"{output} cannot be written ({reason(error)})"
        raise InputError(f"{why}: make room, or choose another NAME.") from None
    except KeyboardInterrupt:
        kept = output.with_name("checkpoint.pt")
        go_on = f"{kept} keeps the complete epochs, to go on from with -p RESUME True"
        why = "the run was stopped, by Ctrl-C or for want of memory"
        raise InputError(f"{why}: {go_on if kept.exists() else 'start again'}.") from None
    finally:
        FileLock(claim, is_singleton=True).release()  # a sweep's process makes other runs, too
    metrics = output.with_name("metrics.json")
    executed_now = tidy.metadata.get("papermill", {}).get("end_time")  # not by --prepare-only
    if executed_now and metrics.exists():
        print(scores_of(metrics))
    print(f"Done: open {page}")


def call_papermill(command: list[str], draft: Path) -> None:
    """Let papermill execute a notebook into `draft`.

    Errors: `InputError` for a cell that fails and for papermill's options, and `OSError` if the
    draft cannot be written.
    """
    try:
        papermill.main(command, standalone_mode=False)
    except PapermillExecutionError as error:
        raise InputError(fault_of(error, draft)) from None
    except SystemExit:
        return  # --help-notebook has printed what it was asked for
    except click.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:  # of the options, the kernel, the engine, files, YAML, time limits
        own = isinstance(error, OSError) and error.filename in (None, str(draft))
        if own and not isinstance(error, TimeoutError):
            raise
        file = getattr(error, "filename", "") or ""
        told = error.format_message() if isinstance(error, click.ClickException) else reason(error)
        why = " ".join([told.strip("'").rstrip(".:"), file]).strip()
        what = f"papermill cannot do what its options ask for ({why})"
        raise InputError(f"{what}: correct them.") from None


def quieten_kernel() -> None:
    """Keep this process's messages, but not the stack traces of its kernel when it is stopped."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a child inherits
