"""Blocks of 32 weights as ggml stores them: which type holds the codes of a form exactly, and their bytes.

A block lies along the inputs of one output. Its fields follow one another: a scale d (fp16), an offset m (fp16) in
types that have one, the fifth bits of all codes in types of 5 bits, then the codes, those of the first half of the
block in the low halves of bytes. Values: d * (q - 8) in Q4_0, d * (q - 16) in Q5_0, d * q in Q8_0, and d * q + m in
Q4_1 and Q5_1.

Shapes: o = outputs, i = inputs, n = blocks of an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.forms.int8 import Int8
from compress.forms.quantised import Quantised

BLOCK = 32
Bytes = NDArray[np.uint8]
"""(o, bytes of an output); or (e, o, bytes) for a stack of experts."""


@dataclass(frozen=True)
class BlockType:
    """A type of blocks of codes."""

    name: str
    bits: int
    n_bytes: int
    """Bytes of a block."""
    has_offset: bool

    def bytes_of(self, shape: tuple[int, int]) -> int:
        """Bytes of a weight (o, i)."""
        o, i = shape
        return o * (i // BLOCK) * self.n_bytes


Q4_0 = BlockType("Q4_0", 4, 18, has_offset=False)
Q4_1 = BlockType("Q4_1", 4, 20, has_offset=True)
Q5_0 = BlockType("Q5_0", 5, 22, has_offset=False)
Q5_1 = BlockType("Q5_1", 5, 24, has_offset=True)
Q8_0 = BlockType("Q8_0", 8, 34, has_offset=False)
TYPES = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0)


def symmetric_type(bits: int) -> BlockType:
    """The narrowest type that holds codes of a symmetric grid: a narrow grid is a part of a wider one."""
    return next(kind for kind in TYPES if not kind.has_offset and kind.bits >= bits)


def offset_type(bits: int) -> BlockType | None:
    """The narrowest type that holds codes of a grid with zero points or offsets; None if there is none."""
    return next((kind for kind in TYPES if kind.has_offset and kind.bits >= bits), None)


def type_of(form: Quantised) -> BlockType | None:
    """The type that holds a form; None if none does."""
    return symmetric_type(form.bits) if form.symmetric else offset_type(form.bits)


def problem_of_groups(group_size: int, n_inputs: int) -> str:
    """Why groups of inputs are not made of whole blocks; empty if they are."""
    if n_inputs % BLOCK:
        return f"its {n_inputs} inputs are no multiple of {BLOCK}, the size of a block"
    if group_size < n_inputs and group_size % BLOCK:
        return f"groups of {group_size} are not made of whole blocks of {BLOCK} inputs"
    return ""


def quantised_blocks(form: Quantised, kind: BlockType) -> Bytes:
    """The bytes (o, n * bytes of a block) of codes on a grid, no value changed.

    Raises ValueError for a scale or an offset that is no number in fp16.
    """
    codes_on = _blocks(form.codes().T)
    group_n = torch.arange(codes_on.shape[1]) * BLOCK // form.group_size
    scales_on = form.scales.T[:, group_n]
    fields = [_half(scales_on, "a scale")]
    if kind.has_offset:
        fields.append(_half(_offsets(form).T[:, group_n], "an offset"))
        shift = 0
    else:
        # The middle of the form's grid is that of the type's.
        shift = (1 << (kind.bits - 1)) - (1 << (form.bits - 1))
    return _joined([*fields, *_packed(codes_on + shift, kind)])


def row_blocks(form: Int8) -> Bytes:
    """The bytes in Q8_0 of rows that have one scale each. Raises ValueError as `quantised_blocks`."""
    codes_on = form.codes.reshape(form.shape[0], -1, BLOCK)
    scales_on = form.scales[:, None].expand(codes_on.shape[:2])
    return _joined([_half(scales_on, "a scale"), codes_on.contiguous().numpy().view(np.uint8)])


def _offsets(form: Quantised) -> Tensor:
    """What codes of 0 stand for: (G, o)."""
    if form.offsets is not None:
        return form.offsets
    return -form.scales.float() * form.zeros().float()


def _blocks(codes_oi: Tensor) -> Tensor:
    o, i = codes_oi.shape
    return codes_oi.reshape(o, i // BLOCK, BLOCK)


def _half(values_on: Tensor, what: str) -> Bytes:
    """Numbers as fp16: (o, n, 2). Raises ValueError for one that it does not hold."""
    half = values_on.to(torch.float16)
    lost = half.float() != values_on.float()
    if bool(lost.any()):
        value = float(values_on[lost][0])
        raise ValueError(f"{what} of {value:.6g} is no fp16 number")
    return half.contiguous().numpy()[..., None].view(np.uint8)


def _packed(codes_on: Tensor, kind: BlockType) -> list[Bytes]:
    """The fields of codes: (o, n, bytes) each."""
    codes = codes_on.contiguous().numpy()
    if kind.bits == 8:
        return [(codes - (1 << 7)).astype(np.int8).view(np.uint8)]
    unsigned: Bytes = codes.astype(np.uint8)
    first, second = unsigned[..., : BLOCK // 2], unsigned[..., BLOCK // 2 :]
    nibbles: Bytes = ((first & 15) | (second << 4)).astype(np.uint8)
    if kind.bits == 4:
        return [nibbles]
    return [np.packbits(unsigned >> 4, axis=-1, bitorder="little"), nibbles]


def _joined(fields: list[Bytes]) -> Bytes:
    blocks = np.concatenate(fields, axis=-1)
    return blocks.reshape(len(blocks), -1)
