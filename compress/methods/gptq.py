"""GPTQ: round column by column, and let the columns still to come make up for each rounding error.

Frantar et al. 2022, arXiv:2210.17323, algorithm 1. Needs: Gram. Cost: one Cholesky inverse (i^3) for each distinct
input and o i^2 for the sweep; layers that share an input are swept as one stack.
Shapes: o = out_features (stacked), i = in_features, G = groups.

Differs from the authors' code: scales are searched inside the sweep with the inputs' second moments as weights (theirs
take max-abs); the Gram is shrunk towards its diagonal (see `linalg.shrink_`; with `shrinkage` 0 it is theirs); damping
is relative to the median of diag(G), not its mean (outlier channels, see `linalg.add_ridge_`); once the codes are
known, all scales of a row (and offsets, on an affine grid) are refitted together by least squares in the metric of the
whole Gram, and kept where that helps after rounding to stored values.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.families.base import refuse_damping, refuse_shrinkage
from compress.families.quantiser import Quantiser, stacked
from compress.forms.base import Form
from compress.solvers.grid import Grid, Symmetry
from compress.solvers.grid_refit import refit_affine, refit_scales
from compress.solvers.linalg import conditioned_, inverse_factor

COLUMNS_AT_ONCE = 64


class ActOrder(enum.StrEnum):
    """The order in which columns are quantised."""

    NONE = "none"
    """The stored order. Groups are runs of stored columns; every kernel reads that."""
    DESC_ACT = "desc_act"
    """Largest diag(G) first, groups along that order: the checkpoint stores each column's group (desc_act)."""


@dataclass(frozen=True, kw_only=True)
class GPTQ(Quantiser, name="gptq"):
    """Rounding with error feedback through the inverse Gram, scales searched inside the sweep."""

    paper: ClassVar[str] = "Frantar et al. 2022, arXiv:2210.17323"

    damping: float = field(
        default=0.01,
        metadata={"help": "ridge on the Gram matrix, as a share of its median diagonal"},
    )
    shrinkage: float = field(
        default=0.1,
        metadata={"help": "shrinks the off-diagonal of the Gram by this share (0.1: by 10 %)"},
    )
    act_order: ActOrder = field(
        default=ActOrder.NONE,
        metadata={
            "help": "desc_act: columns with the largest activations first; the checkpoint stores each column's group"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)
        refuse_shrinkage(self.shrinkage)

    @property
    def in_order(self) -> bool:
        """Whether input i is in group i // group_size, so that no input's group is stored."""
        return self.act_order is ActOrder.NONE

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """Sweep the stack of weights once, then refit its scales."""
        weight_oi, rows = stacked(weights)
        gram, order = stats[Gram], None
        if self.act_order is ActOrder.DESC_ACT:
            order = gram.sum_ii.diagonal().argsort(descending=True, stable=True)
            weight_oi = weight_oi[:, order]
        size = self.group_of(weight_oi.shape[1])
        # The metric is made anew where it is needed, so that it is not in memory beside its factor.
        importance_i = self._metric(gram, order).diagonal().float()
        upper_ii = inverse_factor(self._metric(gram, order))
        codes, scales, zeros = sweep(weight_oi, upper_ii, importance_i, self.grid, size)
        del upper_ii
        widths = [part.shape[0] for part in importance_i.split(size)]
        metric_ii = self._metric(gram, order)
        if self.symmetry is Symmetry.AFFINE:
            scales, zeros = refit_affine(weight_oi, codes, (scales, zeros), metric_ii, widths)
        else:
            steps = codes - _spread(zeros, size, codes.shape[1])
            scales = refit_scales(weight_oi, steps, scales, metric_ii, widths, self.grid.digits)
        groups = None
        if order is not None:
            back = order.argsort()
            codes, groups = codes[:, back], (back // size)
        return self.forms(codes.to(torch.uint8), scales, zeros, rows, groups)

    def _metric(self, gram: Gram, order: Tensor | None) -> Tensor:
        """The mean Gram, shrunk and damped, in the order of the sweep: (i, i), fp64."""
        metric_ii = conditioned_(gram.mean_ii(), self.shrinkage, self.damping)
        return metric_ii if order is None else metric_ii[order][:, order]


def sweep(
    weight_oi: Tensor, upper_ii: Tensor, importance_i: Tensor, grid: Grid, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (o, i), scales and zeros (o, G), all fp32, of weights (o, i) fp32.

    `upper_ii` is the Gram's `inverse_factor`; `importance_i` weights squared errors in the search for scales. Works on
    the transpose, where a column of the weight is one run of memory.
    """
    rest_io = weight_oi.T.clone(memory_format=torch.contiguous_format)
    codes_io = torch.empty_like(rest_io)
    scales, zeros = [], []
    step = (
        size * -(-COLUMNS_AT_ONCE // size) if size <= 8 * COLUMNS_AT_ONCE else 2 * COLUMNS_AT_ONCE
    )
    for start in range(0, rest_io.shape[0], step):
        stop = min(start + step, rest_io.shape[0])
        errors_io = torch.empty_like(rest_io[start:stop])
        for j in range(start, stop):
            if j % size == 0:
                # Every earlier column's error has reached this group: a group never straddles two steps' starts.
                members = slice(j, j + size)
                scale, zero = grid.scales(rest_io[members].T, importance_i[members])
                scales.append(scale)
                zeros.append(zero)
            codes_io[j] = grid.codes(rest_io[j], scale, zero)
            error = (rest_io[j] - (codes_io[j] - zero) * scale) / upper_ii[j, j]
            rest_io[j + 1 : stop].addr_(upper_ii[j, j + 1 : stop], error, alpha=-1)
            errors_io[j - start] = error
        rest_io[stop:].addmm_(upper_ii[start:stop, stop:].T, errors_io, alpha=-1)
    return codes_io.T, torch.stack(scales, 1), torch.stack(zeros, 1)


def _spread(values_og: Tensor, size: int, n_inputs: int) -> Tensor:
    """The value of each entry's group: (o, G) -> (o, i)."""
    return values_og.repeat_interleave(size, dim=1)[:, :n_inputs]
