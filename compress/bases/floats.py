"""Numbers of 4 and 8 bits in floating point: codes, and scales of blocks of them.

E4M3: 8 bits, a dtype of torch. E2M1: 4 bits, 1 of sign, 2 of exponent, 1 of mantissa; two codes a byte, the first in
the low half. E8M0: a byte b that stands for 2**(b - 127), 255 for no number: scales in powers of two ("ue8m0").
Facts: OCP Microscaling Formats (MX) specification 1.0, sections 5.3 and 5.4.
Shapes: o = out_features, i = in_features, R, C = blocks down and across.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import CheckpointError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the codes 0 to 7; 8 to 15 are these with a minus."""
E8M0_BIAS = 127
E8M0_NAN = 255
Block = tuple[int, int]
"""Rows and columns that share a scale."""


def e2m1(pairs: Tensor) -> Tensor:
    """(..., n) uint8 -> (..., 2 n) fp32."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = torch.stack([pairs & 0xF, pairs >> 4], dim=-1).flatten(-2)
    return table[codes.int()]


def e8m0(name: str, scales: Tensor) -> Tensor:
    """Bytes, or torch's dtype of them -> fp32. Raises CheckpointError naming the tensor for one that is no number."""
    powers = scales.view(torch.uint8)
    if bool((powers == E8M0_NAN).any()):
        raise CheckpointError(
            f"{name} has scales of {E8M0_NAN}, which stands for no number; the checkpoint is corrupt, download it again"
        )
    return torch.ldexp(torch.ones(powers.shape), powers.int() - E8M0_BIAS)


def are_powers_of_two(scales: Tensor) -> bool:
    """Whether every scale is 2 to a whole number."""
    mantissas, _ = torch.frexp(scales.float())
    return bool((mantissas == 0.5).all())


def blocks_of(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """(..., o, i) -> (..., R, C); the last block of a row or a column may be partial."""
    *stack, o, i = shape
    return (*stack, -(-o // block[0]), -(-i // block[1]))


def multiply_blocks(values_oi: Tensor, scales_rc: Tensor, block: Block) -> Tensor:
    """Multiply every block by its scale, in place: (..., o, i) fp32 by (..., R, C)."""
    (rows, columns), i = block, values_oi.shape[-1]
    scales = scales_rc.float()
    if scales.shape[-1] == 1:
        return values_oi.mul_(scales.repeat_interleave(rows, -2)[..., : values_oi.shape[-2], :])
    if rows == 1 and i % columns == 0:
        values_oi.unflatten(-1, (-1, columns)).mul_(scales[..., None])
        return values_oi
    for k in range(scales.shape[-2]):
        across = scales[..., k, :].repeat_interleave(columns, -1)[..., None, :i]
        values_oi[..., k * rows : (k + 1) * rows, :].mul_(across)
    return values_oi
