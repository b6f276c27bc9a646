"""Scales fitted together once codes are known: what an error in one group costs depends on those of the others.

Shapes: o = out_features, i = in_features, G = groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.solvers.grid import to_fp16_values

ROWS_AT_ONCE = 512


def refit_scales(
    weight_oi: Tensor, steps_oi: Tensor, scales_og: Tensor, gram_ii: Tensor, widths: Sequence[int]
) -> Tensor:
    """For each row, the scales of all groups that minimise (w - S q) G (w - S q)^T for its codes minus zero, q.

    Group g is the next `widths[g]` inputs; where a weight is pruned, q = 0. A G x G least-squares problem a row. The
    new scales replace the old where, rounded to fp16, they lose less. Rows have nothing to do with one another: some
    at a time, so that what they need in fp64 is small beside the Gram.
    """
    parts = [each.split(ROWS_AT_ONCE) for each in (weight_oi, steps_oi, scales_og)]
    return torch.cat(
        [_refit_rows(w, q, s, gram_ii, widths) for w, q, s in zip(*parts, strict=True)]
    )


def _refit_rows(
    weight_oi: Tensor, steps_oi: Tensor, scales_og: Tensor, gram_ii: Tensor, widths: Sequence[int]
) -> Tensor:
    target_oi = weight_oi.double() @ gram_ii
    grouped = _by_group(target_oi.mul_(steps_oi), widths)
    normal_ogg = _normal_matrices(steps_oi, gram_ii, widths)
    old = scales_og.double()
    # A group whose codes are all the zero point has no say in its scale: pin it to the old one.
    idle = normal_ogg.diagonal(dim1=1, dim2=2) == 0
    normal_ogg.diagonal(dim1=1, dim2=2).add_(idle.double())
    right = torch.where(idle, old, grouped)
    solved, info = torch.linalg.solve_ex(normal_ogg, right)
    usable = (info == 0)[:, None] & torch.isfinite(solved) & (solved != 0)
    new = to_fp16_values(torch.where(usable, solved, old).float()).double()
    better = _row_loss(new, normal_ogg, grouped) < _row_loss(old, normal_ogg, grouped)
    return torch.where(better[:, None], new, old).float()


def _normal_matrices(steps_oi: Tensor, gram_ii: Tensor, widths: Sequence[int]) -> Tensor:
    """q_g G_gh q_h^T for all groups g, h of every row: (o, G, G), symmetric, so half of it is computed.

    In fp64: where one input channel outweighs the others a millionfold, fp32 would round away what they lose.
    """
    o, steps = len(steps_oi), steps_oi.double()
    n_groups = len(widths)
    normal_ogg = torch.empty(o, n_groups, n_groups, dtype=torch.float64, device=steps_oi.device)
    start = 0
    for group, width in enumerate(widths):
        members = slice(start, start + width)
        product = (steps[:, members] @ gram_ii[members, start:]).mul_(steps[:, start:])
        normal_ogg[:, group, group:] = _by_group(product, widths[group:])
        normal_ogg[:, group:, group] = normal_ogg[:, group, group:]
        start += width
    return normal_ogg


def _row_loss(scales_og: Tensor, normal_ogg: Tensor, right_og: Tensor) -> Tensor:
    """The quadratic loss of each row, up to a constant: s N s - 2 s r."""
    return (
        (normal_ogg @ scales_og[:, :, None]).squeeze(2) * scales_og - 2 * right_og * scales_og
    ).sum(1)


def _by_group(values_oi: Tensor, widths: Sequence[int]) -> Tensor:
    """Sums over the entries of each group: (o, i) -> (o, G)."""
    return torch.stack([part.sum(1) for part in values_oi.split(list(widths), dim=1)], 1)
