"""8-bit integers with one scale for each row, a byte each: for matrices whose rows are looked up.

Shapes: o = out_features, i = in_features, n = rows that are looked up.
"""

from typing import Any, Self

import torch
from torch import Tensor

from .base import Builder, Form, Spec, scales_spec, told_scales
from .dense import Dense


class Int8(Form, name="int8"):
    """W[o, i] = scales[o] * codes[o, i], codes in -128..127. Tensors: codes (o, i) int8, scales (o,) fp16 or bf16."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes_oi: Tensor, scales_o: Tensor) -> None:
        super().__init__((codes_oi.shape[0], codes_oi.shape[1]))
        self.register_buffer("codes", codes_oi)
        self.register_buffer("scales", scales_o)

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: D102
        codes = build.tensor(*shape, dtype=torch.int8)
        return cls(codes, build.scales(spec, shape[0]))

    def dense(self) -> Tensor:  # noqa: D102
        return self.codes.float().mul_(self.scales.float()[:, None])

    def rows(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.codes[index].float().mul_(self.scales[index].float()[:, None])

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind, **scales_spec(self.scales)}

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Dense(self.dense().to(dtype))

    def describe(self) -> str:  # noqa: D102
        return self.label() + told_scales(self.scales)

    def label(self) -> str:  # noqa: D102
        return "8-bit rows"
