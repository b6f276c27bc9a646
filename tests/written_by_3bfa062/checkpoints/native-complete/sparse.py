"""Values where a mask has ones, zeros elsewhere: pruned weights, and the codes of a dictionary.

Shapes: o = out_features, i = in_features, n = lines, m = entries of a line, v = values of a line. A line is a row of
the weight, or a column. Shipped inside native checkpoints.
"""

import enum
import itertools
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


class Layout(enum.StrEnum):
    """How the places of the values are written down."""

    ENTRIES = "entries"
    """A bit for each entry."""
    FOURS = "fours"
    """Three bits for each four entries, two of which are values: which of `PAIRS` they are."""

    def words(self, n_entries: int) -> int:
        """32-bit words for so many entries."""
        return words_for(n_entries // 4, 3) if self is Layout.FOURS else words_for(n_entries, 1)


PAIRS = tuple(itertools.combinations(range(4), 2))


class Sparse(Form):
    """A weight (o, i) whose lines have the same number of values each, the others zero.

    Tensors: mask (words, 1) int32, its layout's numbers line after line; and those of `values`, a form (n, v) itself:
    the values of each line in order, in whatever stores them.
    """

    kind = "sparse"
    mask: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        along: Along,
        mask_words: Tensor,
        values: Form,
        layout: Layout = Layout.ENTRIES,
    ) -> None:
        super().__init__(shape)
        self.along, self.values, self.layout = along, values, layout
        self.register_buffer("mask", mask_words)

    @classmethod
    def from_lines(
        cls, mask_nm: Tensor, values: Form, along: Along, layout: Layout = Layout.ENTRIES
    ) -> Self:
        """From a mask (n, m), bool, with as many ones in each line as `values` (n, v) has.

        Raises ValueError if not, or if fours are asked for and have not two ones each.
        """
        counts, (n, v) = mask_nm.sum(1), values.shape
        if len(counts) != n or not bool((counts == v).all()):
            raise ValueError(
                f"{v} values for each of {n} lines, and {counts.min()} to {counts.max()} ones in {len(counts)} lines"
            )
        n_lines, m = mask_nm.shape
        shape = (n_lines, m) if along is Along.ROWS else (m, n_lines)
        return cls(shape, along, _packed(mask_nm, layout), values, layout)

    def lines(self) -> Tensor:
        """(n, m), bool: where the values are."""
        o, i = self.shape
        n, m = (o, i) if self.along is Along.ROWS else (i, o)
        if self.layout is Layout.FOURS:
            pairs = unpack(self.mask, 3, n * m // 4).squeeze(1)
            return _fours(self.mask.device)[pairs].view(n, m)
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
            "layout": self.layout.value,
            "per_line": self.values.shape[1],
            "values": self.values.spec(),
        }

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Dense(self.dense().to(dtype))


def _packed(mask_nm: Tensor, layout: Layout) -> Tensor:
    if layout is Layout.FOURS:
        return pack(_pairs_of(mask_nm)[:, None], 3)
    return pack(mask_nm.reshape(-1, 1), 1)


def _fours(device: Device) -> Tensor:
    """(6, 4), bool: the fours that `PAIRS` stand for."""
    pairs = torch.tensor(PAIRS, device=device)
    return torch.zeros(len(PAIRS), 4, dtype=torch.bool, device=device).scatter_(
        1, pairs, value=True
    )


def _pairs_of(mask_nm: Tensor) -> Tensor:
    """The number in `PAIRS` of each four, line after line. Raises ValueError for a four without just two ones."""
    if mask_nm.shape[1] % 4 or not bool((mask_nm.reshape(-1, 4).sum(1) == 2).all()):
        raise ValueError("not every four entries of a line have two values")
    weights = torch.tensor([8, 4, 2, 1], device=mask_nm.device)
    numbers = torch.zeros(16, dtype=torch.int64, device=mask_nm.device)
    numbers[(_fours(mask_nm.device) * weights).sum(1)] = torch.arange(6, device=mask_nm.device)
    return numbers[(mask_nm.reshape(-1, 4) * weights).sum(1)]


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
    layout = Layout(spec.get("layout", Layout.ENTRIES))
    words = torch.empty(layout.words(shape[0] * shape[1]), 1, dtype=torch.int32, device=device)
    return Sparse(shape, along, words, inner((n_lines, int(spec["per_line"]))), layout)


def empty_short(spec: Spec, shape: tuple[int, int], device: Device) -> Short:
    """The same for short floats."""
    bits = int(spec["bits"])
    words = torch.empty(words_for(shape[0] * shape[1], bits), 1, dtype=torch.int32, device=device)
    return Short(shape, bits, words)


def words_for(n: int, bits: int) -> int:
    """32-bit words that n packed numbers take."""
    return -(-n // CODES_A_ROW) * bits
