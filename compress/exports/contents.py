"""The contents of an export for `inspect`, read from headers where these tell."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from compress.bases import Base
from compress.callbacks import Progress
from compress.forms.dense import Dense
from compress.models.checkpoint import Reader


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A layer's weight, a correction of it, or another tensor."""

    name: str
    """The layer's name, for a weight or a correction of one; else the tensor's."""
    shape: tuple[int, ...]
    """(out, in) for a layer."""
    stored: str
    """A dtype, or a form in short: "4-bit g64 + rank 32"."""
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Layers, their corrections, and all other tensors of an export."""

    format: str
    """"gptq, 4 bits, groups of 128"."""
    producer: str | None
    """The tool that wrote it, if it says so."""
    layers: tuple[StoredTensor, ...]
    """Those that are stored in forms; empty for an export that holds corrections alone."""
    others: tuple[StoredTensor, ...]
    corrections: tuple[StoredTensor, ...] = ()
    """Low-rank corrections that are stored apart from the layers: "rank 8"."""


def contents_of_base(base: Base, progress: Progress) -> Contents:
    """Contents of a checkpoint that a base reader knows, whoever wrote it."""
    layers = []
    for index, name in enumerate(base.layers):
        progress("read layers", index, len(base.layers))
        # Each is read, and let go: only its codes tell whether it has zeros, or groups in another order.
        form = base.form(name)
        layers.append(
            StoredTensor(
                name=name,
                shape=form.shape,
                stored=base.description if isinstance(form, Dense) else form.describe(),
                n_bytes=base.stored_bytes(name),
            )
        )
    progress("read layers", len(base.layers), len(base.layers))
    taken = {tensor for name in base.layers for tensor in base.tensors_of(name)}
    taken = taken.union(*base.stacks.values())
    stacks = [
        StoredTensor(
            name=name,
            shape=base.stack_shape(name),
            stored=base.description,
            n_bytes=sum(map(base.reader.nbytes, parts)),
        )
        for name, parts in base.stacks.items()
    ]
    return Contents(
        format=base.description,
        producer=base.producer or None,
        layers=tuple(layers),
        others=(*stacks, *other_tensors(base.reader, taken)),
    )


def other_tensors(reader: Reader, taken: Collection[str]) -> tuple[StoredTensor, ...]:
    """The tensors of a checkpoint that belong to no layer."""
    return tuple(
        StoredTensor(
            name=name,
            shape=tuple(reader.shape(name)),
            stored=dtype_name(reader.dtype(name)),
            n_bytes=reader.nbytes(name),
        )
        for name in reader
        if name not in taken
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
