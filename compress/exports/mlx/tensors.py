"""The three tensors in which MLX holds a quantised matrix, made of a form's codes as they are.

`weight` (o, i * bits / 32) uint32: the codes of each row as one stream of bits, the lowest first, which is what the
toolkit packs too; `scales` and `biases` (o, G): w = scales * code + biases. Groups have 32, 64 or 128 inputs there: the
scales of wider ones, and of whole rows, are repeated.

The numbers are stored in a dtype that holds them exactly, the model's own before others. MLX multiplies in the widest
dtype of input, scales and biases: fp16 scales in a bf16 model would be as exact, and make it compute, and keep its
cache, in fp32. Scales that the solvers choose have 8 significant bits at most, so bf16 holds them as well as fp16, and
it holds the biases of symmetric grids, a power of two times the scale, and offsets that were searched. It does not hold
scale * zero point, which takes fp16; and with more than 5 bits fp32.

Shapes: o = out_features, i = in_features, G = number of groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.bases.mlx import holds
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.int8 import Int8
from compress.forms.packing import pack
from compress.forms.quantised import Quantised

GROUPS = (128, 64, 32)
"""Inputs of a group, the largest first."""
LEAST = GROUPS[-1]
WIDE_ZEROS = 5
"""Bits up to which fp16 holds scale * zero point of the scales that the solvers choose."""
HALVES = (torch.bfloat16, torch.float16)
_MIDDLE = 128


def stored_group(group_size: int, n_inputs: int) -> int | None:
    """The group in which MLX holds groups of so many inputs; None if none of its own divides them."""
    size = min(group_size, n_inputs)
    if n_inputs % size:
        return None
    return next((own for own in GROUPS if size % own == 0), None)


def mlx_tensors(name: str, form: Form, preferred: torch.dtype, widest: int) -> Mapping[str, Tensor]:
    """`weight`, `scales` and `biases` of a form with codes.

    `preferred`: the dtype to store numbers in if it holds them exactly. `widest`: the bytes that were planned for a
    bias. Raises CheckpointError naming the layer for numbers that no dtype of so many bytes holds, and for a form
    without codes or with groups that MLX does not have.
    """
    if isinstance(form, Int8):
        codes = form.codes.to(torch.int32) + _MIDDLE
        words = pack(codes.T, 8).T.contiguous()
        size, scales_og = form.shape[1], form.scales[:, None]
        biases_og = scales_og.double() * -_MIDDLE
    elif isinstance(form, Quantised) and form.g_idx is None:
        words = form.qweight.T.contiguous()
        size, scales_og = form.group_size, form.scales.T
        offsets_go = form.offsets
        if offsets_go is None:
            offsets_go = -form.scales.double() * form.zeros()
        biases_og = offsets_go.double().T
    else:
        raise CheckpointError(f"mlx export: {name}: it has no codes for {form.describe()}")
    own = stored_group(size, form.shape[1])
    if own is None:
        raise CheckpointError(
            f"mlx export: {name}: groups of {size} of its {form.shape[1]} inputs; MLX has groups of 32, 64 and 128"
        )
    repeats = min(size, form.shape[1]) // own
    numbers = {"scales": scales_og.double(), "biases": biases_og}
    dtypes = _dtypes(name, numbers, preferred, widest)
    return {"weight": words.view(torch.uint32)} | {
        part: value.to(dtypes[part]).repeat_interleave(repeats, 1).contiguous()
        for part, value in numbers.items()
    }


def bytes_of(shape: tuple[int, int], bits: int, group_size: int, widths: tuple[int, int]) -> int:
    """Bytes of the three tensors; `widths`: of a scale and of a bias. The group is one that MLX can store."""
    o, i = shape
    own = stored_group(group_size, i)
    assert own is not None
    return o * i * bits // 8 + o * (i // own) * sum(widths)


def _dtypes(
    name: str, numbers: Mapping[str, Tensor], preferred: torch.dtype, widest: int
) -> Mapping[str, torch.dtype]:
    """The dtype of each part: one for both if there is one, fp32 for biases alone where that was planned."""
    order = dict.fromkeys((preferred, *HALVES))
    for dtype in order:
        if all(holds(dtype, value) for value in numbers.values()):
            return dict.fromkeys(numbers, dtype)
    if widest == torch.float32.itemsize and holds(torch.float32, numbers["biases"]):
        scales = next((one for one in order if holds(one, numbers["scales"])), None)
        if scales is not None:
            return {"scales": scales, "biases": torch.float32}
    raise CheckpointError(
        f"mlx export: {name}: neither bf16 nor fp16 holds its scales and what its zero points make of them exactly; "
        "compress the model anew with this version, whose scales they hold, or choose native"
    )
