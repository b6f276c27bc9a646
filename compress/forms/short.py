"""Floats of fewer than 16 bits.

Shapes: o = out_features, i = in_features.
"""

from typing import Any, Self

import torch
from torch import Tensor

from .base import Builder, Form, Spec
from .dense import Dense
from .packing import pack, unpack, words_for

BFLOAT16_BITS = 16


class Short(Form, name="short"):
    """Floats of fewer than 16 bits: bfloat16 with its last mantissa bits rounded away. (o, i), row after row.

    Tensors: short (ceil(o i / 32) * bits, 1) int32.
    """

    short: Tensor

    def __init__(self, shape: tuple[int, int], bits: int, words: Tensor) -> None:
        super().__init__(shape)
        self.bits = bits
        self.register_buffer("short", words)

    @classmethod
    def from_values(cls, values: Tensor, bits: int) -> Self:
        """Rounded to nearest, ties to even. Raises ValueError for values that do not fit, NaN among them."""
        patterns = _rounded_patterns(values, bits)
        packed = pack(patterns.reshape(-1, 1), bits)
        return cls((values.shape[0], values.shape[1]), bits, packed)

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: D102
        bits = int(spec["bits"])
        n_words = words_for(shape[0] * shape[1], bits)
        return cls(shape, bits, build.tensor(n_words, 1, dtype=torch.int32))

    def dense(self) -> Tensor:  # noqa: D102
        o, i = self.shape
        patterns = unpack(self.short, self.bits, o * i).view(o, i)
        return (patterns << (32 - self.bits)).view(torch.float32)

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind, "bits": self.bits}

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Dense(self.dense().to(dtype))

    def describe(self) -> str:  # noqa: D102
        return f"{self.bits}-bit floats"


def _rounded_patterns(values: Tensor, bits: int) -> Tensor:
    """The leading bits of each float32, as integers: sign, eight of exponent, and what is left of the mantissa."""
    if not 9 < bits < BFLOAT16_BITS:
        raise ValueError(f"{bits} bits hold no short float; 10 to 15 do")
    dropped = 32 - bits
    words = values.detach().float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    even = (words >> dropped) & 1
    patterns = (words + even + (1 << (dropped - 1)) - 1) >> dropped
    rounded = (patterns << dropped).to(torch.int64)
    finite = (rounded >> 23) & 0xFF
    if bool((finite == 0xFF).any()) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"values up to {float(values.abs().max()):.3g} do not fit {bits} bits")
    return patterns & ((1 << bits) - 1)
