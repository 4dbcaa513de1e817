"""Start one of the Makefile's commands: python -m experiments.command run, compare, photo or sweep.

Their arguments follow. Whatever goes wrong ends in one sentence, and so does Ctrl-C, even in the
seconds in which the modules are loading.
"""

import os
import signal
import sys
from collections.abc import Callable
from pkgutil import resolve_name

COMMANDS = {
    "run": "experiments.run_notebook:run",
    "compare": "experiments.run_notebook:compare",
    "photo": "experiments.photo:main",
    "sweep": "experiments.sweep:main",
}


def as_script(main: Callable[..., object], usage: str | None) -> None:
    """Call `main` with the command line's arguments and exit: a mistake ends in one sentence."""
    # Here, like all that takes a while to load: until `stop` is in place, Ctrl-C leaves a trace.
    import inspect

    from support.parameters import InputError

    try:
        inspect.signature(main).bind(*sys.argv[1:])
    except TypeError:
        sys.exit(usage)
    try:
        sys.exit(main(*sys.argv[1:]))
    except InputError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: what is complete is kept; the same command goes on from there.")


def stop(*_: object) -> None:
    """End at once, for an exception would be lost, or changed, in a module that is half loaded."""
    os.write(2, b"\nInterrupted before it began: nothing was done.\n")
    os._exit(1)


if __name__ == "__main__":
    usual = signal.signal(signal.SIGINT, stop)
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    command = resolve_name(COMMANDS[sys.argv.pop(1)])
    signal.signal(signal.SIGINT, usual)
    as_script(command, sys.modules[command.__module__].__doc__)
