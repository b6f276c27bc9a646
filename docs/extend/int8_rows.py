"""A base format of somebody else's: int8 codes with one scale for each row.

Tensors of a layer: codes (o, i) int8, -127 to 127; row_scale (o,) fp16. The weight is their product.
Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

import torch

from compress.bases import Base, Loading
from compress.bases.base import on_grid, refuse_bad_scales
from compress.errors import CheckpointError
from compress.forms.base import Form

BITS = 8
MIDDLE = 1 << (BITS - 1)


class Int8Rows(Base, name="int8-rows"):
    """`"quantization_config": {"quant_method": "int8-rows"}` in config.json."""

    parts = ("codes", "row_scale")
    loading = Loading(
        packages=("int8-rows",), imports=("import int8_rows",), arguments={}, peft=True, vllm=None
    )

    @property
    def grid(self) -> str:
        """All layers have the same."""
        return f"{BITS} bits, whole rows"

    def shape(self, name: str) -> tuple[int, int]:
        """From the header of codes."""
        o, i = self._shape_of(name, "codes")
        return o, i

    def form(self, name: str) -> Form:
        """Codes from 1 to 255, with 128 for zero."""
        o, i = self.shape(name)
        codes_oi = self._tensor(name, "codes")
        if codes_oi.dtype != torch.int8:
            raise CheckpointError(
                f"{self.folder}: {name}.codes is {codes_oi.dtype}; it must be int8"
            )
        self._refuse_shape(name, "row_scale", (o,), f"{o} outputs")
        scales_o = self._tensor(name, "row_scale")
        refuse_bad_scales(f"{self.folder}: {name}", scales_o)
        return on_grid(
            codes_oi.int() + MIDDLE,
            scales_o[:, None],
            torch.full((o, 1), MIDDLE),
            bits=BITS,
            group_size=i,
            groups_i=torch.zeros(i, dtype=torch.int64),
        )
