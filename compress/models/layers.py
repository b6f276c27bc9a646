"""The border between a model's layers and the mathematics, which sees weights as (out, in) only."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import LayerError


def weight_oi(layer: nn.Module) -> Tensor:
    """The weight of a Linear or a Conv1D (GPT-2, stored transposed) as (out, in); a view."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def is_transposed(layer: nn.Module) -> bool:
    """Whether the checkpoint stores the weight as (in, out)."""
    return isinstance(layer, Conv1D)


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias (out,), or None."""
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def refuse_not_finite(module: nn.Module, name: str, stored: torch.dtype | None = None) -> None:
    """Raises LayerError naming the first loaded parameter that holds NaN or infinity; an empty name is no prefix.

    `stored`: the checkpoint's dtype, if known. Only float16, and only where it is not the checkpoint's own, can have
    made an infinity of a sound value.
    """
    for part, parameter in module.named_parameters():
        if parameter.is_meta or bool(torch.isfinite(parameter).all()):
            continue
        full = f"{name}.{part}" if name else part
        remedy = "the original is damaged, download or convert it again"
        if parameter.dtype is torch.float16 and stored is not torch.float16:
            raise LayerError(
                f"{full}: the weight holds NaN or infinity in float16; either it does not fit float16, then --dtype "
                f"bfloat16 or float32 helps, or {remedy}"
            )
        raise LayerError(f"{full}: the checkpoint's weight holds NaN or infinity; {remedy}")
