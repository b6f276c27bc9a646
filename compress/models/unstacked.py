"""A checkpoint whose stacks of experts appear as the tensors of each expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calibration.skeleton import PartLoader
from compress.models.checkpoint import Reader


class UnstackedReader(Reader):
    """The tensors of a folder as a model's loader names them: of a stacked tensor, its slices."""

    def __init__(self, whole: Reader, loader: PartLoader) -> None:  # it opens no file itself
        vars(self).update(vars(whole))
        self.whole, self._loader = whole, loader

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
        return super().nbytes(name) if one is None else super().nbytes(one.key) // one.share

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        one = self._loader.slices.get(name)
        return super().dtype(name if one is None else one.key)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; of a slice (o, i) or (o,), whatever way round the stack is."""
        one = self._loader.slices.get(name)
        if one is None:
            return super().shape(name)
        stack = torch.empty(super().shape(one.key), device="meta")
        return tuple(one.take(stack).shape)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.whole.total_bytes


def unstacked(loader: PartLoader) -> Reader:
    """The reader that a loader was opened with, or one with slices in the place of the stacks that it found."""
    assert isinstance(loader.whole, Reader)
    return UnstackedReader(loader.whole, loader) if loader.slices else loader.whole
