"""How a net computes fastest on this machine: number format, layout in memory, freed memory."""

import ctypes
from contextlib import suppress

import torch
from pydantic import BaseModel
from torch import nn


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in; 'auto' takes bfloat16 unless that is emulated, and slow."""
    if name != "auto":
        return getattr(torch, name)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = any(features.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def precision_of(model: nn.Module, recipe: BaseModel) -> torch.dtype:
    """Return the dtype in which a recipe lets a model compute, where it lies."""
    return pick_precision(recipe.PRECISION, next(model.parameters()).device)


def keep_freed_memory() -> None:
    """Tell glibc's malloc, where there is one, to keep what is freed, for the next training step.

    By default the memory of large tensors goes back to Linux after each use and returns as new
    pages of zeros, which slows the step down on the CPU.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of memory of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back what is free at the end of the heap


def prepare(model: nn.Module, recipe: BaseModel) -> None:
    """Lay the model out in memory as training is fastest, and keep what is freed."""
    precision = precision_of(model, recipe)
    # bfloat16 units want the channels of a pixel side by side; float32 on AVX2 is faster without.
    fast = torch.channels_last if precision == torch.bfloat16 else torch.contiguous_format
    model.to(memory_format=fast)
    keep_freed_memory()
