"""A checkpoint whose stacks of experts appear as the tensors of each expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calibration.skeleton import PartLoader
from compress.models.checkpoint import Tensors


class Unstacked(Tensors):
    """The tensors of a checkpoint as a model's loader names them: of a stacked tensor, its slices."""

    def __init__(self, whole: Tensors, loader: PartLoader) -> None:
        self.folder, self.whole, self._loader = whole.folder, whole, loader

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, or the slice, read now."""
        return self._loader.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loader.tensors)

    def __len__(self) -> int:
        return len(self._loader.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._loader.tensors

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor's data; of a slice, its share of the stack's."""
        one = self._loader.slices.get(name)
        return self.whole.nbytes(name) if one is None else self.whole.nbytes(one.key) // one.share

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        one = self._loader.slices.get(name)
        return self.whole.dtype(name if one is None else one.key)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; of a slice (o, i) or (o,), whatever way round the stack is."""
        one = self._loader.slices.get(name)
        if one is None:
            return self.whole.shape(name)
        stack = torch.empty(self.whole.shape(one.key), device="meta")
        return tuple(one.take(stack).shape)

    @property
    def fingerprint(self) -> str:
        """Of the whole."""
        return self.whole.fingerprint

    @property
    def notes(self) -> tuple[str, ...]:
        """On the whole."""
        return self.whole.notes

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.whole.total_bytes


def unstacked(loader: PartLoader) -> Tensors:
    """The tensors that a loader was opened with, or these with slices in the place of the stacks that it found."""
    assert isinstance(loader.whole, Tensors)
    return Unstacked(loader.whole, loader) if loader.slices else loader.whole
