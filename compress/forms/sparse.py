"""Values where a mask has ones, zeros elsewhere: pruned weights, and the codes of a dictionary.

Shapes: o = out_features, i = in_features, n = lines, m = entries of a line, v = values of a line. A line is a row of
the weight, or a column.
"""

import enum
import itertools
from typing import Any, Self

import torch
from torch import Tensor

from .base import Builder, Device, Form, Spec
from .dense import Dense
from .packing import pack, unpack, words_for


class Along(enum.StrEnum):
    """The direction of the lines."""

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


class Sparse(Form, name="sparse"):
    """A weight (o, i) whose lines have the same number of values each, the others zero.

    Tensors: mask (words, 1) int32, its layout's numbers line after line; and those of `values`, a form (n, v) itself:
    the values of each line in order, in whatever stores them.
    """

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

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: D102
        along = Along(spec["along"])
        layout = Layout(spec.get("layout", Layout.ENTRIES))
        words = build.tensor(layout.words(shape[0] * shape[1]), 1, dtype=torch.int32)
        n_lines = shape[0] if along is Along.ROWS else shape[1]
        values = build.form(spec["values"], (n_lines, int(spec["per_line"])))
        return cls(shape, along, words, values, layout)

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

    def describe(self) -> str:  # noqa: D102
        (o, i), n_values = self.shape, self.values.shape[1]
        kept = f"{n_values} of {i} in a row"
        if self.along is Along.COLUMNS:
            kept = f"{n_values} of {o} in a column"
        return kept if isinstance(self.values, Dense) else f"{kept}, {self.values.describe()}"


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
