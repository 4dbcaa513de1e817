"""Execute the notebook into a run's folder: python -m support.run_notebook NAME [papermill's options].

What `make run` calls. An executed notebook that is there is kept until the new one is complete, and whatever goes
wrong is told in one last sentence.
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

from support.parameters import InputError, check_folder_name, reason

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "pet_segmentation.ipynb"
PAGE = ROOT / "notebooks" / "page.html.j2"  # how the executed notebook looks in a browser


def run(name: str, options: list[str]) -> Path:
    """Execute the notebook into runs/`name`, and return where it is to be read. Errors: `InputError`."""
    check_folder_name(name, "NAME")
    folder = ROOT / "runs" / name
    draft = folder / "unfinished.ipynb"  # what stays of a run that fails
    try:
        # Imported here, for it takes seconds, before which a bad name is told.
        from filelock import FileLock, Timeout
        from nbconvert import HTMLExporter
        from nbconvert.preprocessors import CoalesceStreamsPreprocessor

        from support.safe_files import write_atomically

        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".notebook.lock", timeout=0):
            execute(draft, ["-r", "RUN_NAME", name, *options])
            exporter = HTMLExporter(template_file=str(PAGE), preprocessors=[CoalesceStreamsPreprocessor])
            page, _ = exporter.from_filename(str(draft))  # with one line for each progress bar
            write_atomically(folder / "notebook.html", lambda file: file.write(page.encode()))
            os.replace(draft, folder / "notebook.ipynb")
    except Timeout:
        raise InputError(f"another run is writing to {folder}: wait for it, or choose another NAME.") from None
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({reason(error)}): make room, or choose another NAME."
        ) from None
    except (KeyboardInterrupt, SystemExit):  # papermill exits when its kernel dies, as it does after Ctrl-C
        kept = folder / "checkpoint.pt"
        go_on = (
            f"{kept} keeps the complete epochs, to go on from with -p RESUME True" if kept.exists() else "start again"
        )
        raise InputError(f"the run was stopped, by Ctrl-C or for want of memory: {go_on}.") from None
    return folder / "notebook.html"


def execute(draft: Path, options: list[str]) -> None:
    """Let papermill execute the notebook into `draft`. Errors: `InputError`, for all that a cell can do, too."""
    import click
    from papermill.cli import papermill
    from papermill.exceptions import PapermillExecutionError

    command = ["--log-output", str(NOTEBOOK), str(draft), *options]
    try:
        with patch("traceback.print_exc"):  # by which papermill would tell of a dead kernel, at length
            papermill.main(command, standalone_mode=False)
    except PapermillExecutionError as error:
        if error.ename == "InputError":
            raise InputError(error.evalue) from None
        why = f"cell {error.exec_count} ended with {error.ename}: {reason(error.evalue)}"
        raise InputError(f"{why}; it is in {draft}.") from None
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise InputError(
            f"papermill does not understand its options ({error.format_message()}): correct them."
        ) from None


def quieten_kernel() -> None:
    """Keep this process's messages, but not the stack traces that its kernel prints when it is stopped."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a child inherits


if __name__ == "__main__":
    quieten_kernel()
    try:
        print(f"Done: open {run(sys.argv[1], sys.argv[2:])}")
    except InputError as error:
        sys.exit(f"\n{error}")
