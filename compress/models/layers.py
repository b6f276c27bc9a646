"""The border between a model's layers and the mathematics, which sees weights as (out, in) only."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import LayerError, RecipeError


def weight_oi(layer: nn.Module) -> Tensor:
    """The weight of a Linear or a Conv1D (GPT-2, stored transposed) as (out, in); a view."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def is_transposed(layer: nn.Module) -> bool:
    """Whether the checkpoint stores the weight as (in, out)."""
    return isinstance(layer, Conv1D)


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias (out,), or None."""
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def block_and_place(name: str) -> tuple[int, str]:
    """The number of a layer's block, and what its name is within: `model.layers.3.mlp.up_proj` -> 3, `mlp.up_proj`."""
    _, *found = re.split(r"\.(\d+)\.", name, maxsplit=1)
    return (int(found[0]), found[1]) if found else (0, name)


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


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a layer's full name or a run of its dotted parts: `k_proj`, `layers.0`, `*.mlp.*`."""
    return any(
        fnmatchcase(name, glob)
        for glob in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    )


def select(
    names: Iterable[str], include: Sequence[str], exclude: Sequence[str]
) -> Mapping[str, str | None]:
    """For each layer, None if it is compressed, else the reason why not.

    Raises RecipeError for a pattern that matches nothing, and where nothing is left to compress.
    """
    known = list(names)
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in known):
                raise RecipeError(
                    f"{option}: {pattern!r} matches no linear layer of the decoder blocks; there are "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in known}))}, such as {known[0]}"
                    if known
                    else f"{option}: {pattern!r} matches nothing: the decoder blocks hold no linear layer"
                )
    reasons: dict[str, str | None] = {}
    for name in known:
        excluded = next((pattern for pattern in exclude if matches(name, pattern)), None)
        if excluded is not None:
            reasons[name] = f"excluded by {excluded!r}"
        elif include and not any(matches(name, pattern) for pattern in include):
            reasons[name] = "not among --include"
        else:
            reasons[name] = None
    if known and all(reason is not None for reason in reasons.values()):
        raise RecipeError("include/exclude: together they leave no layer to compress")
    return reasons
