"""The tensors of a layer of integers in compressed-tensors' pack-quantized, as written since its version 0.18.

weight_packed (o, words) int32: the codes of a row as one stream of bits that crosses words, the first lowest;
weight_scale (o, G); weight_shape (2,) int64: o and i; weight_zero_point (words, G) int32: packed along the outputs,
absent from symmetric grids. Codes and zero points are stored as the toolkit has them, 2**(bits - 1) above
compressed-tensors' signed integers.
Shapes: o = out_features, i = in_features, G = number of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.forms.packing import WORD
from compress.forms.quantised import Quantised

SHAPE_BYTES = 16


def packed_tensors(form: Quantised) -> dict[str, Tensor]:
    """The tensors of a layer by the last part of their names; groups must be in order."""
    (o, i), bits = form.shape, form.bits
    tensors = {
        "weight_packed": _rows(form.qweight.T, words_of(i, bits)),
        "weight_scale": form.scales.T.contiguous(),
        "weight_shape": torch.tensor([o, i], dtype=torch.int64),
    }
    if form.qzeros is not None:
        zeros_wg = form.qzeros.T[: words_of(o, bits)]
        tensors["weight_zero_point"] = zeros_wg.contiguous()
    return tensors


def packed_bytes(shape: tuple[int, int], bits: int, n_groups: int, *, zero_points: int) -> int:
    """Bytes of these tensors, scales in 16 bits; `zero_points`: how many each row has, 0 or `n_groups`."""
    o, i = shape
    codes, zeros = o * words_of(i, bits), zero_points * words_of(o, bits)
    return (codes + zeros) * (WORD // 8) + 2 * o * n_groups + SHAPE_BYTES


def words_of(n: int, bits: int) -> int:
    """Words of 32 bits that a stream of n codes takes."""
    return -(-n * bits // WORD)


def _rows(words_ow: Tensor, n_words: int) -> Tensor:
    """The first words of every row: the toolkit fills rows of 32 codes up, this format only the last word."""
    return words_ow[:, :n_words].contiguous()
