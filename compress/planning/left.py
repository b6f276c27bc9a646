"""Layers of the decoder blocks that no method compresses, each with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest

from torch import nn

from calibration.skeleton import PartLoader, language_model
from compress.models.layers import weight_oi

FEWEST, SHARE = 8, 32
"""A layer is small with fewer outputs or inputs than `FEWEST`, or with at most 1 / `SHARE` as many as the others."""

ROUTER = "a router, which no server quantises"
_ROUTERS = ("router", "gate")
"""What families call the layer that chooses experts; those of an MLP that multiply are called gate_proj."""


def left_alone(
    linears: Mapping[str, nn.Module], loader: PartLoader, uncalled: Collection[str]
) -> dict[str, str]:
    """The reason for each of the layers that stay whatever the method, by name.

    `uncalled`: layers whose weight is read without a call.
    """
    reasons, keys = {}, loader.keys_of()
    for name, layer in linears.items():
        shape = tuple(weight_oi(layer).shape)
        weight = f"{name}.weight"
        if name in uncalled:
            reasons[name] = "its weight is read without a call of the layer, so no inputs are seen"
        elif weight in loader.tied or weight in loader.tied.values():
            reasons[name] = "stands in several blocks, which share its weight"
        elif len(keys.get(weight, ())) != 1:
            reasons[name] = "made of several tensors of the checkpoint"
        elif is_router(name):
            reasons[name] = ROUTER
        elif is_small(shape):
            reasons[name] = (
                f"a small projection, which no server quantises: fewer than {FEWEST} outputs or inputs, or at most "
                f"1/{SHARE} as many as of the other"
            )
    return reasons


def is_router(name: str) -> bool:
    """Whether a layer of this name chooses experts, or weighs a shared one."""
    return name.rpartition(".")[2] in _ROUTERS or "router" in name.split(".")


def is_small(shape: tuple[int, ...]) -> bool:
    """Whether a weight is a gate or a projection to a few numbers, such as a step size for each head."""
    return min(shape) < FEWEST or min(shape) * SHARE <= max(shape)


def outside(name: str, loader: PartLoader) -> str:
    """The reason for a tensor that is not in the decoder blocks, by its name in the model."""
    model = loader.model
    if name not in loader.known:
        return "no part of the model as transformers has it, such as a draft head"
    tower = language_model(model)
    if model.config.get_text_config(decoder=True) is model.config or name.startswith(f"{tower}."):
        return "outside the decoder blocks"
    if model.get_submodule(name.rpartition(".")[0]) is model.get_output_embeddings():
        return "outside the decoder blocks"
    parts, beside = name.split("."), tower.split(".")
    depth = next(k for k, (part, other) in enumerate(zip_longest(parts, beside)) if part != other)
    return f"outside the language model, in {'.'.join(parts[: depth + 1])}"
