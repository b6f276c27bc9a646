"""Layers of compressed-tensors' pack-quantized: integer codes in words of 32 bits, in either of its two layouts.

Tensors of a layer: weight_packed (o, words) int32, codes along the inputs, the first in the lowest bits, each with
2**(bits - 1) added; weight_scale (o, G); weight_shape (2,): o and i; weight_zero_point (words, G) int32, packed along
the outputs likewise, absent from symmetric grids; weight_g_idx (i,), where activation order has mixed the groups.
A word holds 32 // bits whole codes in files of compressed-tensors before 0.18; since then the codes of a row are one
stream of bits that crosses words. They are the same where bits divide 32, and are told apart by the number of words.
Facts: compressed-tensors' `pack_quantized` compressor; a zero point and its code are both shifted, so that the stored
numbers can be subtracted as they are.
Shapes: o = out_features, i = in_features, G = number of groups of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from compress.bases.base import Base, is_whole, on_grid, refuse_bad_groups, refuse_bad_scales
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.packing import WORD, unpack

DENSE_SINCE = (0, 18)
"""The version of compressed-tensors from which on codes cross words."""


class Layout(Enum):
    """How codes lie in words."""

    WHOLE = "whole codes a word"
    ACROSS = "codes that cross words"

    def words(self, n: int, bits: int) -> int:
        """Words that n codes take."""
        if self is Layout.ACROSS:
            return -(-n * bits // WORD)
        return -(-n // (WORD // bits))

    def codes(self, words_nm: Tensor, bits: int, n: int) -> Tensor:
        """The codes of every row: (m, words) int32 -> (m, n) int32."""
        if self is Layout.WHOLE:
            return fields(words_nm, bits)[:, :n]
        missing = -words_nm.shape[1] % bits
        return unpack(torch.nn.functional.pad(words_nm, (0, missing)).T.contiguous(), bits, n).T


class PackedWords(Base):
    """Reads layers of packed integers; a format says the bits and groups of each."""

    def _packed_shape(self, name: str, weights: Mapping[str, Any]) -> tuple[int, int]:
        """(o, i), from weight_shape, with which the packed words must agree."""
        stored = self._tensor(name, "weight_shape")
        if stored.shape != (2,) or stored.dtype.is_floating_point or int(stored.min()) < 1:
            raise CheckpointError(
                f"{self.folder}: {name}.weight_shape is {stored.tolist()}; it is [outputs, inputs]"
            )
        o, i = (int(n) for n in stored)
        self._layout(name, (o, i), self._bits(name, weights))
        return o, i

    def _packed_form(self, name: str, weights: Mapping[str, Any]) -> Form:
        """The quantised weight, its codes packed in the toolkit's order."""
        (o, i), bits = self._packed_shape(name, weights), self._bits(name, weights)
        size = weights.get("group_size")
        if weights.get("strategy") == "channel" or size in (None, 0, -1):
            size = i
        if not is_whole(size, 1):
            raise CheckpointError(
                f"{self.folder}: {name} has group_size {size!r}; it must be at least 1, or -1 for whole rows"
            )
        n_groups = -(-i // size)
        facts = f"{o} outputs and {i} inputs in groups of {size}"
        self._refuse_shape(name, "weight_scale", (o, n_groups), facts)
        scales_og = self._tensor(name, "weight_scale")
        refuse_bad_scales(f"{self.folder}: {name}", scales_og)
        groups_i = self._groups_of_inputs(name, i, size)
        refuse_bad_groups(f"{self.folder}: {name}", groups_i, i, n_groups)
        layout = self._layout(name, (o, i), bits)
        return on_grid(
            layout.codes(self._words(name, "weight_packed"), bits, i),
            scales_og,
            self._zeros(name, (o, n_groups), weights, layout),
            bits=bits,
            group_size=size,
            groups_i=groups_i.to(torch.int64),
        )

    def _zeros(
        self, name: str, shape: tuple[int, int], weights: Mapping[str, Any], layout: Layout
    ) -> Tensor:
        (o, n_groups), part, bits = shape, "weight_zero_point", self._bits(name, weights)
        if f"{name}.{part}" not in self.reader:
            if not weights.get("symmetric", True):
                self._tensor(name, part)
            return torch.full(shape, 1 << (bits - 1), dtype=torch.int32)
        if not self._has_packed_zeros(name):  # of a symmetric grid: nought, unpacked
            zeros = self._tensor(name, part)
            self._refuse_shape(name, part, shape, "its scales")
            if zeros.dtype.is_floating_point:
                raise CheckpointError(
                    f"{self.folder}: {name}.{part} is stored as {zeros.dtype}; zero points are integers"
                )
            return zeros.to(torch.int32) + (1 << (bits - 1))
        rows = layout.words(o, bits)
        facts = f"{o} outputs and {bits} bits, {layout.value} as in weight_packed"
        self._refuse_shape(name, part, (rows, n_groups), facts)
        return layout.codes(self._words(name, part).T, bits, o).T

    def _has_packed_zeros(self, name: str) -> bool:
        key = f"{name}.weight_zero_point"
        return key in self.reader and self.reader.dtype(key) == torch.int32

    def _layout(self, name: str, shape: tuple[int, int], bits: int) -> Layout:
        """How a layer's codes lie in words, by their number; where that does not tell, by the writer's version.

        Raises CheckpointError for a number that is neither's, and where nothing tells.
        """
        (o, i), found = shape, self._shape_of(name, "weight_packed")
        fitting = [each for each in Layout if found == (o, each.words(i, bits))]
        if not fitting:
            across, whole = ((o, each.words(i, bits)) for each in (Layout.ACROSS, Layout.WHOLE))
            old = "" if across == whole else f", or {whole} as written before 0.18,"
            self._refuse_shape(name, "weight_packed", across, f"{shape} and {bits} bits{old}")
        longest = max(i, o) if self._has_packed_zeros(name) else i
        if len(fitting) == 1 or WORD % bits == 0 or longest <= WORD // bits:
            return fitting[0]
        if self._has_packed_zeros(name):
            rows = self._shape_of(name, "weight_zero_point")[0]
            fitting = [each for each in fitting if rows == each.words(o, bits)] or fitting
        return fitting[0] if len(fitting) == 1 else self._layout_by_version(name)

    def _layout_by_version(self, name: str) -> Layout:
        version = str(self.settings.get("version") or "")
        told = re.match(r"(\d+)\.(\d+)", version)
        if told is None:
            raise CheckpointError(
                f"{self.folder}: {name}.weight_packed has as many words whether codes cross them or not, and version "
                f"in its quantisation's config, by which to tell, is {version or 'missing'}; a version of "
                "compressed-tensors such as 0.18.0 is right"
            )
        is_new = (int(told[1]), int(told[2])) >= DENSE_SINCE
        return Layout.ACROSS if is_new else Layout.WHOLE

    def _groups_of_inputs(self, name: str, n_inputs: int, size: int) -> Tensor:
        in_order = torch.arange(n_inputs) // size
        if f"{name}.weight_g_idx" not in self.reader:
            return in_order
        found = self._tensor(name, "weight_g_idx")
        return in_order if bool((found == -1).all()) else found  # -1: never set

    def _bits(self, name: str, weights: Mapping[str, Any]) -> int:
        bits = weights.get("num_bits")
        if not isinstance(bits, int) or bits not in range(2, 9):
            raise CheckpointError(f"{self.folder}: {name} has {bits!r} bits; 2 to 8 are supported")
        return bits


def fields(words_nm: Tensor, bits: int) -> Tensor:
    """The 32 // bits codes of every word, the lowest first: (n, m) int32 -> (n, m * (32 // bits)) int32."""
    shifts = torch.arange(0, WORD - bits + 1, bits, dtype=torch.int32)
    codes = (words_nm[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words_nm.shape[0], -1)
