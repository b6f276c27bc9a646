"""Layers of 4-bit floating point, two codes a byte, with scales of groups of inputs, for formats.

NVFP4: groups of 16, scales E4M3, and one fp32 number for the layer. MXFP4: groups of 32, scales E8M0.
Shapes: o = out_features, i = in_features, G = number of groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.bases.base import Base, refuse_bad_scales
from compress.bases.floats import e2m1, e8m0, multiply_blocks
from compress.bases.scaled import FLOAT8
from compress.errors import CheckpointError

NVFP4_GROUP, MXFP4_GROUP = 16, 32


class Fp4Pairs(Base):
    """Reads tensors of E2M1 codes; a format says what they are called, and which way its global scale goes."""

    def _pairs_shape(self, name: str, part: str, size: int, dtype: torch.dtype) -> tuple[int, int]:
        """(o, i) from headers alone. Raises CheckpointError for other dtypes, and other scales than these groups'."""
        shape, found = self._shape_of(name, part), self.reader.dtype(f"{name}.{part}")
        if found != torch.uint8 or len(shape) != 2 or shape[1] * 2 % size:
            told = str(found).removeprefix("torch.")
            raise CheckpointError(
                f"{self.folder}: {name}.{part} is {told} {shape}; codes of 4 bits are packed in uint8, "
                f"(outputs, inputs / 2), with inputs in groups of {size}"
            )
        o, i = shape[0], shape[1] * 2
        facts = f"{o} outputs and {i} inputs in groups of {size}"
        self._refuse_shape(name, "weight_scale", (o, i // size), facts)
        scales = self.reader.dtype(f"{name}.weight_scale")
        if scales != dtype:
            told, right = (str(each).removeprefix("torch.") for each in (scales, dtype))
            raise CheckpointError(
                f"{self.folder}: {name}.weight_scale is stored as {told}; it must be {right} for groups of {size}"
            )
        return o, i

    def _nvfp4_shape(self, name: str, part: str, of_layer: str) -> tuple[int, int]:
        """(o, i) from headers alone; `of_layer`: the part that is the layer's own scale."""
        shape = self._pairs_shape(name, part, NVFP4_GROUP, FLOAT8)
        if self._shape_of(name, of_layer) not in ((), (1,)):
            self._refuse_shape(name, of_layer, (1,), "one scale a layer")
        return shape

    def _global_scale(self, name: str, part: str) -> Tensor:
        """(1, 1) fp32. Raises CheckpointError unless it is a number above 0."""
        scale = self._tensor(name, part)
        refuse_bad_scales(f"{self.folder}: {name}.{part}", scale)
        if not bool((scale > 0).all()):
            raise CheckpointError(
                f"{self.folder}: {name}.{part} is {float(scale)}; it must be above 0; the checkpoint is corrupt, "
                "download it again"
            )
        return scale.float().reshape(1, 1)

    def _nvfp4_scales(self, name: str) -> Tensor:
        """(o, G) fp32, without the layer's own."""
        scales = self._tensor(name, "weight_scale").float()
        refuse_bad_scales(f"{self.folder}: {name}.weight_scale", scales)
        return scales

    def _mxfp4_scales(self, name: str) -> Tensor:
        """(o, G) fp32."""
        return e8m0(f"{self.folder}: {name}.weight_scale", self._tensor(name, "weight_scale"))

    def _unpaired(self, name: str, part: str, scales_og: Tensor) -> Tensor:
        """(o, i) fp32: codes times the scales of their groups."""
        values = e2m1(self._tensor(name, part))
        return multiply_blocks(values, scales_og, (1, values.shape[1] // scales_og.shape[1]))
