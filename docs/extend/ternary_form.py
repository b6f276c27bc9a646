"""Weights of -1, 0 and 1 with a scale for each output. Shapes: o = out_features, i = in_features."""

from typing import Any, Self

import torch
from torch import Tensor

from compress.forms.base import Builder, Form, Spec
from compress.forms.dense import Dense
from compress.forms.packing import pack, unpack, words_for

BITS = 2


class Ternary(Form, name="ternary"):
    """W[o, i] = scales[o] * (codes[i, o] - 1)."""

    codes: Tensor
    scales: Tensor

    def __init__(self, shape: tuple[int, int], codes: Tensor, scales: Tensor) -> None:
        super().__init__(shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, weight_oi: Tensor) -> Self:
        """The form nearest to a weight whose scales are the mean magnitudes of its rows."""
        scales = weight_oi.abs().mean(1).float()
        codes = (weight_oi / scales[:, None]).round().clamp(-1, 1).to(torch.int64) + 1
        return cls((weight_oi.shape[0], weight_oi.shape[1]), pack(codes.T, BITS), scales)

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: ARG003
        """Room for what a checkpoint stores."""
        o, i = shape
        codes = build.tensor(words_for(i, BITS), o, dtype=torch.int32)
        return cls(shape, codes, build.tensor(o, dtype=torch.float32))

    def spec(self) -> dict[str, Any]:
        """Nothing but the name: the shape tells the rest."""
        return {"form": self.kind}

    def dense(self) -> Tensor:
        """The weight: (o, i), fp32."""
        codes_io = unpack(self.codes, BITS, self.shape[1])
        return ((codes_io - 1) * self.scales).T

    def unpacked(self, dtype: torch.dtype) -> Form:
        """The weight itself."""
        return Dense(self.dense().to(dtype))

    def describe(self) -> str:
        """For people."""
        return "ternary"
