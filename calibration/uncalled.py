"""Layers whose weight a model reads without calling them: they have no inputs that statistics could be collected of.

Mamba does so with its `dt_proj`. One forward pass of a few tokens through each kind of block tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibration.layers import is_linear
from calibration.skeleton import PartLoader, decoder_blocks
from calibration.stream import Stream
from calibration.text.data import Tokens

_TOKENS = 4


def uncalled_layers(
    model: PreTrainedModel, loader: PartLoader, device: torch.device
) -> frozenset[str]:
    """Names of linear layers of the blocks whose weight is read, though no call of the layer reads it.

    Loads what is outside the blocks, then a block of each kind, and puts them away again. A layer that no token has
    reached, as of an expert, is not among them. Raises InputError for a model that cannot be walked block by block.
    """
    prefix, blocks = decoder_blocks(model)
    loader.load_outside(f"{prefix}.", device)
    stream = Stream(model, blocks, [Tokens(torch.arange(1, _TOKENS + 1)[None], None, {})])
    loader.unload_outside(f"{prefix}.")
    found: dict[object, frozenset[str]] = {}
    names = set()
    for index, block in enumerate(blocks):
        kind = _kind(block)
        if kind not in found:
            loader.load([f"{prefix}.{index}."], device)
            with _watched(block) as reads:
                stream.run(index, 0)
            loader.unload(block)
            found[kind] = frozenset(name for name, read in reads.items() if read.only_weight)
        names |= {f"{prefix}.{index}.{name}" for name in found[kind]}
    return frozenset(names)


def _kind(block: nn.Module) -> object:
    """A key that is equal for blocks of the same parts."""
    return tuple(
        (name, type(part), *(tuple(p.shape) for p in part.parameters(recurse=False)))
        for name, part in block.named_modules()
    )


class _Reads:
    """What a forward pass does with a layer."""

    def __init__(self) -> None:
        self.called = self.read = False

    @property
    def only_weight(self) -> bool:
        """Whether the weight is read, and the layer not called."""
        return self.read and not self.called


@contextmanager
def _watched(block: nn.Module) -> Iterator[dict[str, _Reads]]:
    """Notes calls and reads of the block's linear layers, each of which has a class of its own meanwhile."""
    reads, kinds = {}, {}
    for name, layer in block.named_modules():
        if is_linear(layer):
            reads[name], kinds[name] = _Reads(), type(layer)
            layer.__class__ = _watching(type(layer), reads[name])
    try:
        yield reads
    finally:
        for name, kind in kinds.items():
            block.get_submodule(name).__class__ = kind


def _watching(kind: type[nn.Module], reads: _Reads) -> type[nn.Module]:
    def weight(layer: nn.Module) -> Tensor | None:
        reads.read = True
        return layer._parameters["weight"]

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        reads.called = True
        return nn.Module.__call__(layer, *args, **kwargs)

    return type(kind.__name__, (kind,), {"weight": property(weight), "__call__": call})
