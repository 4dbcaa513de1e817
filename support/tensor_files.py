"""Write files of tensors, and read them without trusting them: nothing else here opens one."""

import io
import math
import zipfile
from pathlib import Path

import torch

from support.parameters import InputError
from support.safe_files import write_atomically


def save_tensors(path: Path, content: dict) -> None:
    """Write a file for `load_tensors`: a zip archive, in which every part has a checksum."""
    write_atomically(path, lambda file: torch.save(content, file))


def load_tensors(path: Path) -> dict:
    """Read what `torch.save` wrote, compare its checksums, and run no code that it may hold.

    Errors: `InputError`.
    """
    try:
        data = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(data) as archive:
            parts = archive.infolist()
            size = sum(part.file_size for part in parts)  # more than there is in a bomb
            marked = any(part.external_attr for part in parts)  # torch reads past these, too
            if size > len(data.getbuffer()) or marked or archive.testzip():
                raise ValueError("a wrong size, mark or checksum, which torch would read past")
        data.seek(0)
        content = torch.load(data, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not finite(content):
            raise ValueError("no dictionary, or one with numbers that are none")
        return content
    except FileNotFoundError:
        what = "name the folder of a run that has it"
        raise InputError(f"there is no file {path}: {what}.") from None
    except Exception:  # zipfile and torch have two dozen ways to fail on a damaged file
        raise InputError(f"{path} is damaged, or not of this project: train again.") from None


def finite(value: object) -> bool:
    """Return whether no NaN and no infinity is in tensors, numbers and containers of them."""
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)
