"""Layers whose weight is stored in 8 bits of floating point, with the scales of its blocks beside it, for formats.

Shapes: o = out_features, i = in_features, R, C = blocks down and across.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.bases.base import Base, refuse_bad_scales
from compress.bases.floats import Block, blocks_of, e8m0, multiply_blocks
from compress.errors import CheckpointError

FLOAT8 = torch.float8_e4m3fn
_BYTES = (torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8))
"""Dtypes of scales in powers of two; torch has one of its own since 2.7."""


class ScaledWeights(Base):
    """Reads tensors of E4M3 numbers; a format says what the tensors of scales are called, and of which blocks."""

    def _float8_shape(self, tensor: str, scales: str, block: Block) -> tuple[int, ...]:
        """(..., o, i) from headers alone. Raises CheckpointError for another dtype, or scales of other blocks."""
        for key, other in ((tensor, scales), (scales, tensor)):
            if key not in self.reader:
                raise CheckpointError(
                    f"{self.folder}: {key} is missing, and {other} is there; the checkpoint is incomplete, download "
                    "it again"
                )
        shape, dtype = tuple(self.reader.shape(tensor)), self.reader.dtype(tensor)
        if dtype != FLOAT8 or len(shape) < 2:
            found = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.folder}: {tensor} is {found} {shape}, and {scales} lies beside it; it must be float8_e4m3fn "
                "(outputs, inputs)"
            )
        expected, found_scales = blocks_of(shape, block), tuple(self.reader.shape(scales))
        whole = set(expected[:-2]) <= {1} and expected[-1] == 1
        if found_scales != expected and not (whole and _flat(found_scales) == _flat(expected)):
            raise CheckpointError(
                f"{self.folder}: {scales} has the shape {found_scales}; it must be {expected} for {shape} in blocks of "
                f"{block[0]} x {block[1]}"
            )
        return shape

    def _scaled(self, tensor: str, scales: str, block: Block) -> Tensor:
        """(..., o, i) fp32: numbers times the scales of their blocks. Raises CheckpointError as `_float8_shape`."""
        shape = self._float8_shape(tensor, scales, block)
        multipliers = self._scales(scales).reshape(blocks_of(shape, block))
        weight = multiply_blocks(self.reader[tensor].float(), multipliers, block)
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{self.folder}: {tensor} holds NaN, or overflows when it is multiplied by {scales}; the checkpoint is "
                "corrupt, download it again"
            )
        return weight

    def _scales(self, tensor: str) -> Tensor:
        """A tensor of scales in floating point."""
        stored = self.reader[tensor]
        if stored.dtype in _BYTES:
            return e8m0(f"{self.folder}: {tensor}", stored)
        refuse_bad_scales(f"{self.folder}: {tensor}", stored)
        return stored.float()

    def _refuse_bare(self, taken: set[str]) -> None:
        """Raises CheckpointError naming a tensor of 8-bit numbers that is among no layer's: its scales are missing."""
        for name in self.reader:
            if self.reader.dtype(name) == FLOAT8 and name not in taken:
                raise CheckpointError(
                    f"{self.folder}: {name} is stored as float8_e4m3fn, and the scales that belong to it are missing; "
                    "the checkpoint is incomplete, download it again"
                )


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without sizes of 1: how (), (1,) and (1, 1) are the same, and (o,) and (o, 1)."""
    return tuple(size for size in shape if size != 1)
