"""Device and dtype of a run, from the names in its recipe."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from compress.errors import RecipeError
from compress.models.dtype import Dtype


def settle_device(name: str) -> torch.device:
    """The device that a name means. Raises RecipeError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError):
        device = torch.device("meta")
    if device.type == "meta":  # it holds no data, so nothing can be computed on it
        there = ", ".join(["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))])
        there += ", mps" if torch.backends.mps.is_available() else ""
        raise RecipeError(f"{name!r} can't be used here; there is {there}", option="device")
    return device


def settle_dtype(dtype: Dtype, config: PretrainedConfig) -> torch.dtype:
    """The dtype to compute in: the one asked for, else the checkpoint's own, else float32."""
    if dtype is not Dtype.AUTO:
        return getattr(torch, dtype.value)  # type: ignore[no-any-return]
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
