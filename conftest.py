"""Wire pytest and nbval: where kernels find the module, what strict comparison leaves out."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
os.environ["TQDM_DISABLE"] = "1"  # before anything imports tqdm


def pytest_configure(config):
    """Put the root on the path of this process and of the kernels, which read no settings."""
    sys.path.insert(0, str(ROOT))
    if hasattr(config.option, "nbval_cell_timeout"):
        config.option.nbval_cell_timeout = 600  # seconds
        # The kernel of this environment, whatever name another one has left in a notebook.
        config.option.nbval_current_env = not config.option.nbval_kernel_name
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )


def pytest_collectstart(collector):
    """Leave stderr out of nbval's comparison: progress and warnings are not results."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
