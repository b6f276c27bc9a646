"""The storage of dictionaries and sparse codes, and its exact bytes."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.errors import LayerError
from compress.families.low_rank import FactorDtype
from compress.families.rounding import Rounding
from compress.forms.base import Form
from compress.forms.dense import Dense
from compress.forms.packing import words_for
from compress.forms.product import Product
from compress.forms.short import Short
from compress.forms.sparse import Along, Layout, Sparse
from compress.solvers.linalg import to_storage
from compress.solvers.masks import Pattern, largest

GROUP = 64
"""Values of a code, or entries of a dictionary's row, that share a scale where they are integers."""


class CodeBits(enum.StrEnum):
    """Bits of a nonzero value; its position costs a bit for every entry, zero or not, and 3/4 of a bit with 2:4."""

    AUTO = "auto"
    """The width of the dictionary's dtype."""
    FULL = "32"
    HALF = "16"
    """bfloat16, or float16 where the dictionary is."""
    SHORT_14 = "14"
    """bfloat16 without its last two bits: with two atoms to a nonzero these pay for the mask."""
    SHORT_13 = "13"
    INT_8 = "8"
    """Integers with an fp16 scale for each 64."""
    INT_4 = "4"

    def beside(self, dtype: FactorDtype | AtomDtype) -> CodeBits:
        """The bits that `auto` stands for beside a dtype; any other as they are."""
        if self is not CodeBits.AUTO:
            return self
        return CodeBits.FULL if dtype == "float32" else CodeBits.HALF


class AtomDtype(enum.StrEnum):
    """The dtype of a stored dictionary."""

    AUTO = "auto"
    """The dtype of the weight."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT_8 = "int8"
    """Integers with an fp16 scale for each 64, half of bfloat16's bytes at about its precision."""


WORD_BYTES = 4


ROUNDED_ATOMS = Rounding(bits=8, group_size=GROUP)


def layout_of(pattern: Pattern) -> Layout:
    """The mask layout that takes the fewest bits for a pattern."""
    return Layout.FOURS if pattern is Pattern.TWO_OF_FOUR else Layout.ENTRIES


@dataclass(frozen=True)
class CodeStorage:
    """The storage of dictionaries in a settled dtype and codes of a settled number of bits."""

    dtype: torch.dtype
    """The dtype of the dictionary; int8 stands for integers with scales."""
    bits: CodeBits
    option: str = "--dictionary-dtype"
    """The command-line option that settles the dtype."""

    def dictionary_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a dictionary (k, i) or (o, k)."""
        if self.dtype is torch.int8:
            return ROUNDED_ATOMS.planned_bytes(shape)
        return shape[0] * shape[1] * self.dtype.itemsize

    def code_bytes(self, n: int, k: int, s: int, pattern: Pattern) -> int:
        """Bytes of n lines with s nonzeros among k entries: values and mask."""
        return self._value_bytes(n, s) + layout_of(pattern).words(n * k) * WORD_BYTES

    def _value_bytes(self, n: int, s: int) -> int:
        if self.rounding is not None:
            return self.rounding.planned_bytes((n, s))
        if self.bits in (CodeBits.SHORT_14, CodeBits.SHORT_13):
            return words_for(n * s, int(self.bits)) * WORD_BYTES
        return n * s * self._float.itemsize

    @property
    def rounding(self) -> Rounding | None:
        """The quantiser of the values of each line; None where they are floats."""
        if self.bits in (CodeBits.INT_8, CodeBits.INT_4):
            return Rounding(bits=int(self.bits), group_size=GROUP)
        return None

    @property
    def _float(self) -> torch.dtype:
        """The dtype of codes that are floats."""
        if self.bits is CodeBits.FULL:
            return torch.float32
        return self.dtype if self.dtype.itemsize == 2 else torch.bfloat16

    def codes(self, codes_nk: Tensor, s: int, pattern: Pattern, along: Along) -> Sparse:
        """The stored form of codes: s values of every line. Raises LayerError for values that do not fit."""
        mask = largest(codes_nk, s, pattern)
        values = codes_nk[mask].view(len(codes_nk), -1)
        return Sparse.from_lines(mask, self._stored(values), along, layout_of(pattern))

    def _stored(self, values: Tensor) -> Form:
        if self.rounding is not None:
            return self.rounding.compress([values], _alike(values))[0]
        if self.bits in (CodeBits.SHORT_14, CodeBits.SHORT_13):
            try:
                return Short.from_values(values, int(self.bits))
            except ValueError as error:
                raise LayerError(f"its codes: {error}") from error
        return Dense(to_storage(values, self._float, self.option))

    def dictionary(self, atoms: Tensor) -> Form:
        """The stored form of a dictionary. Raises LayerError for values that do not fit."""
        if self.dtype is torch.int8:
            return ROUNDED_ATOMS.compress([atoms.float()], _alike(atoms))[0]
        return Dense(to_storage(atoms, self.dtype, self.option))


def _alike(values: Tensor) -> Statistics:
    """Statistics by which every value of a row has the same weight."""
    eye = torch.eye(values.shape[1], dtype=torch.float64, device=values.device)
    return Statistics({Gram: Gram(n_tokens=1, n_sequences=1, sum_ii=eye)})


def joined(codes: Sparse, dictionary: Form) -> Product:
    """The product of codes and dictionary: codes of outputs stand before their dictionary, codes of inputs after it."""
    if codes.along is Along.ROWS:
        return Product(codes, dictionary)
    return Product(dictionary, codes)
