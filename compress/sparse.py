"""Values where a mask has ones, zeros elsewhere: pruned weights, and the codes of a dictionary.

Shapes: o = out_features, i = in_features, n = lines, m = entries of a line, v = values of a line. A line is a row of
the weight, or a column. Shipped inside native checkpoints.
"""

import enum
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from .form import Dense, Device, Form, Spec
from .packing import CODES_A_ROW, pack, unpack

BFLOAT16_BITS = 16


class Along(enum.StrEnum):
    """What a line is."""

    ROWS = "rows"
    """A row of the weight: the inputs of one output."""
    COLUMNS = "columns"
    """A column: the outputs of one input."""


class Sparse(Form):
    """A weight (o, i) whose lines have the same number of values each, the others zero.

    Tensors: mask (ceil(o i / 32), 1) int32, one bit for each entry, line after line; and those of `values`, a form
    (n, v) itself: the values of each line in order, in whatever stores them.
    """

    kind = "sparse"
    mask: Tensor

    def __init__(
        self, shape: tuple[int, int], along: Along, mask_words: Tensor, values: Form
    ) -> None:
        super().__init__(shape)
        self.along, self.values = along, values
        self.register_buffer("mask", mask_words)

    @classmethod
    def from_lines(cls, mask_nm: Tensor, values: Form, along: Along) -> Self:
        """From a mask (n, m), bool, with as many ones in each line as `values` (n, v) has. Raises ValueError if not."""
        counts, (n, v) = mask_nm.sum(1), values.shape
        if len(counts) != n or not bool((counts == v).all()):
            raise ValueError(
                f"{v} values for each of {n} lines, and {counts.min()} to {counts.max()} ones in {len(counts)} lines"
            )
        n_lines, m = mask_nm.shape
        shape = (n_lines, m) if along is Along.ROWS else (m, n_lines)
        return cls(shape, along, pack(mask_nm.reshape(-1, 1), 1), values)

    def lines(self) -> Tensor:
        """(n, m), bool: where the values are."""
        o, i = self.shape
        n, m = (o, i) if self.along is Along.ROWS else (i, o)
        return unpack(self.mask, 1, n * m).view(n, m).bool()

    def dense(self) -> Tensor:  # noqa: D102
        mask_nm = self.lines()
        values = self.values.dense()
        lines = torch.zeros(mask_nm.shape, device=values.device)
        lines.masked_scatter_(mask_nm, values)
        return lines if self.along is Along.ROWS else lines.T

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {
            "form": self.kind,
            "along": self.along.value,
            "per_line": self.values.shape[1],
            "values": self.values.spec(),
        }

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Dense(self.dense().to(dtype))


class Short(Form):
    """Floats of fewer than 16 bits: bfloat16 with its last mantissa bits rounded away. (o, i), row after row.

    Tensors: short (ceil(o i / 32) * bits, 1) int32.
    """

    kind = "short"
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

    def dense(self) -> Tensor:  # noqa: D102
        o, i = self.shape
        patterns = unpack(self.short, self.bits, o * i).view(o, i)
        return (patterns << (32 - self.bits)).view(torch.float32)

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind, "bits": self.bits}

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Dense(self.dense().to(dtype))


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


def empty_sparse(
    spec: Spec, shape: tuple[int, int], device: Device, inner: Callable[[tuple[int, int]], Form]
) -> Sparse:
    """A form of this spec with uninitialised tensors; `inner` makes that of its values, of a shape."""
    along = Along(spec["along"])
    n_lines = shape[0] if along is Along.ROWS else shape[1]
    words = _empty_words(shape[0] * shape[1], 1, device)
    return Sparse(shape, along, words, inner((n_lines, int(spec["per_line"]))))


def empty_short(spec: Spec, shape: tuple[int, int], device: Device) -> Short:
    """The same for short floats."""
    bits = int(spec["bits"])
    return Short(shape, bits, _empty_words(shape[0] * shape[1], bits, device))


def _empty_words(n: int, bits: int, device: Device) -> Tensor:
    return torch.empty(words_for(n, bits), 1, dtype=torch.int32, device=device)


def words_for(n: int, bits: int) -> int:
    """32-bit words that n packed numbers take."""
    return -(-n // CODES_A_ROW) * bits
