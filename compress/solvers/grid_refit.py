"""Scales fitted together once codes are known: what an error in one group costs depends on those of the others.

Shapes: o = out_features, i = in_features, G = groups, u = unknowns of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.solvers.grid import DIGITS, MOST, stored_offsets, stored_scales

ROWS_AT_ONCE = 512
ENTRIES_AT_ONCE = 1 << 24
"""Entries of the normal matrices of an affine grid that are made at a time."""


def refit_scales(
    weight_oi: Tensor,
    steps_oi: Tensor,
    scales_og: Tensor,
    gram_ii: Tensor,
    widths: Sequence[int],
    digits: int = DIGITS,
) -> Tensor:
    """For each row, the scales of all groups that minimise (w - S q) G (w - S q)^T for its codes minus zero, q.

    Group g is the next `widths[g]` inputs; where a weight is pruned, q = 0. A G x G least-squares problem a row. The
    new scales replace the old where, rounded to `digits` significant bits, they lose less. Rows have nothing to do with
    one another: some at a time, so that what they need in fp64 is small beside the Gram.
    """
    parts = [each.split(ROWS_AT_ONCE) for each in (weight_oi, steps_oi, scales_og)]
    return torch.cat(
        [_refit_rows(w, q, s, gram_ii, widths, digits) for w, q, s in zip(*parts, strict=True)]
    )


def _refit_rows(
    weight_oi: Tensor,
    steps_oi: Tensor,
    scales_og: Tensor,
    gram_ii: Tensor,
    widths: Sequence[int],
    digits: int,
) -> Tensor:
    target_oi = weight_oi.double() @ gram_ii
    grouped = _by_group(target_oi.mul_(steps_oi), widths)
    normal_ogg = _normal_matrices(steps_oi, gram_ii, widths)
    old = scales_og.double()
    new = _solved(normal_ogg, grouped, old, digits)
    better = _row_loss(new, normal_ogg, grouped) < _row_loss(old, normal_ogg, grouped)
    return torch.where(better[:, None], new, old).float()


def refit_affine(
    weight_oi: Tensor,
    codes_oi: Tensor,
    grid_og: tuple[Tensor, Tensor],
    gram_ii: Tensor,
    widths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """For each row, scales and zeros of all groups that minimise (w - S c - b) G (w - S c - b)^T for its codes, c.

    `grid_og`: the scales and zeros of the codes, zero = -offset / scale, as those that are returned. Twice as many
    unknowns a row as groups: first all together, then the offsets b again for the scales as they are stored. The new
    ones replace the old where, stored, they lose less.
    """
    rows = max(1, min(ROWS_AT_ONCE, ENTRIES_AT_ONCE // (2 * len(widths)) ** 2))
    parts = [each.split(rows) for each in (weight_oi, codes_oi, *grid_og)]
    gram_ig = _by_group(gram_ii, widths)
    found = [
        _refit_affine_rows(w, c, (s, z), (gram_ii, gram_ig), widths)
        for w, c, s, z in zip(*parts, strict=True)
    ]
    scales, zeros = (torch.cat(each) for each in zip(*found, strict=True))
    return scales, zeros


def _refit_affine_rows(
    weight_oi: Tensor,
    codes_oi: Tensor,
    grid_og: tuple[Tensor, Tensor],
    grams: tuple[Tensor, Tensor],
    widths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Unknowns are the scales of codes less their group's mean m, and the weights at that mean: s (c - m) + d."""
    (gram_ii, gram_ig), n_groups = grams, len(widths)
    sizes = torch.tensor(widths, device=codes_oi.device)
    means_og = _by_group(codes_oi.double(), widths) / sizes
    steps_oi = codes_oi - means_og.repeat_interleave(sizes, 1)
    target_oi = weight_oi.double() @ gram_ii
    right_ou = torch.cat([_by_group(target_oi * steps_oi, widths), _by_group(target_oi, widths)], 1)
    mixed_ogg, level_gg = _mixed_matrices(steps_oi, gram_ig, widths), _by_group(gram_ig.T, widths)
    upper = torch.cat([_normal_matrices(steps_oi, gram_ii, widths), mixed_ogg], 2)
    lower = torch.cat([mixed_ogg.mT, level_gg.expand(len(codes_oi), -1, -1)], 2)
    normal_ouu = torch.cat([upper, lower], 1)
    old_scales, old_zeros = (each.double() for each in grid_og)
    old = torch.cat([old_scales, old_scales * (means_og - old_zeros)], 1)
    scales = _solved(normal_ouu, right_ou, old, DIGITS)[:, :n_groups]
    rest_og = right_ou[:, n_groups:] - (scales[:, None] @ mixed_ogg).squeeze(1)
    levels = torch.linalg.solve(level_gg, rest_og.T).T
    offsets = stored_offsets((levels - scales * means_og).float()).double()
    new = torch.cat([scales, offsets + scales * means_og], 1)
    better = _row_loss(new, normal_ouu, right_ou) < _row_loss(old, normal_ouu, right_ou)
    better &= (offsets.abs() <= MOST).all(1)
    return (
        torch.where(better[:, None], scales, old_scales).float(),
        torch.where(better[:, None], -offsets / scales, old_zeros).float(),
    )


def _solved(normal_ouu: Tensor, right_ou: Tensor, old_ou: Tensor, digits: int) -> Tensor:
    """The solution of the normal equations, rounded as scales are stored; the old where it cannot be one.

    A group whose codes are all the zero point has no say in its scale: it is pinned to the old one, by a 1 on the
    diagonal of `normal_ouu`, which stays there.
    """
    idle = normal_ouu.diagonal(dim1=1, dim2=2) == 0
    normal_ouu.diagonal(dim1=1, dim2=2).add_(idle.double())
    solved, info = torch.linalg.solve_ex(normal_ouu, torch.where(idle, old_ou, right_ou))
    rounded = stored_scales(solved.float(), digits).double()
    usable = (info == 0)[:, None] & (rounded.abs() <= MOST) & (solved != 0)
    return torch.where(usable, rounded, old_ou)


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


def _mixed_matrices(steps_oi: Tensor, gram_ig: Tensor, widths: Sequence[int]) -> Tensor:
    """q_g G_gh 1_h^T for all groups g, h of every row: (o, G, G)."""
    parts = zip(steps_oi.split(list(widths), dim=1), gram_ig.split(list(widths)), strict=True)
    return torch.stack([steps @ gram for steps, gram in parts], 1)


def _row_loss(values_ou: Tensor, normal_ouu: Tensor, right_ou: Tensor) -> Tensor:
    """The quadratic loss of each row, up to a constant: s N s - 2 s r."""
    return (
        (normal_ouu @ values_ou[:, :, None]).squeeze(2) * values_ou - 2 * right_ou * values_ou
    ).sum(1)


def _by_group(values_oi: Tensor, widths: Sequence[int]) -> Tensor:
    """Sums over the entries of each group: (o, i) -> (o, G)."""
    return torch.stack([part.sum(1) for part in values_oi.split(list(widths), dim=1)], 1)
