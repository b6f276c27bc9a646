"""Building a form from its spec, with empty tensors for a checkpoint to be loaded into."""

import torch

from .base import Builder, Device, Form, Spec
from .registered import FORMS


def empty(spec: Spec, shape: tuple[int, int], dtype: torch.dtype, device: Device) -> Form:
    """The form of a spec with uninitialised tensors. `dtype`: of floats whose dtype the form leaves to the model.

    Raises ValueError for a form that this version does not know, KeyError, TypeError or ValueError for a spec that it
    cannot read.
    """
    return Builder(FORMS, dtype, device).form(spec, shape)
