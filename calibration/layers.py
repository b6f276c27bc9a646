"""The linear layers of a model, recognised by what they compute and not by their class."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_PROBE = 5, 7
"""Outputs and inputs of the weight that an unknown layer is tried with."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b of its `weight`: nn.Linear, GPT-2's Conv1D, or a class that does the same.

    Any other class (Falcon's, a subclass; one that calls F.linear) is tried on random values.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return False
    if set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules:
        return False
    return _computes_a_product(module)


def _computes_a_product(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    (o, i), tried = _PROBE, copy.copy(module)
    weight, x = torch.randn(o, i, generator=generator), torch.randn(2, 3, i, generator=generator)
    bias = None if module._parameters.get("bias") is None else torch.randn(o, generator=generator)
    tried._parameters = {"weight": _constant(weight)}
    if "bias" in module._parameters:
        tried._parameters["bias"] = None if bias is None else _constant(bias)
    vars(tried).update(
        {n: v for n, v in (("in_features", i), ("out_features", o)) if hasattr(tried, n)}
    )
    try:
        with torch.no_grad():
            found = tried.forward(x)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return False
    if not isinstance(found, Tensor) or found.shape != (2, 3, o):
        return False
    return torch.allclose(found, nn.functional.linear(x, weight, bias), atol=1e-5)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
