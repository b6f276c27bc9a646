"""GPTQ: round column by column, and let the columns still to come make up for each rounding error.

Frantar et al. 2022, arXiv:2210.17323, algorithm 1. Needs: Gram. Cost: one Cholesky inverse (i^3) for each distinct
input and o i^2 for the sweep; layers that share an input are swept as one stack, experts of equal shapes at once.
Shapes: o = out_features (stacked), i = in_features, G = groups, e = stacks with an input each: experts of a mixture.

Differs from the authors' code: scales are searched inside the sweep with the inputs' second moments as weights (theirs
take max-abs); the Gram is shrunk towards its diagonal (see `linalg.shrink_`; with `shrinkage` 0 it is theirs); damping
is relative to the median of diag(G), not its mean (outlier channels, see `linalg.add_ridge_`); once the codes are
known, all scales of a row (and offsets, on an affine grid) are refitted together by least squares in the metric of the
whole Gram, and kept where that helps after rounding to stored values.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
        [forms] = self.compress_alike([(weights, stats)])
        return forms

    def compress_alike(
        self, problems: Sequence[tuple[Sequence[Tensor], Statistics]]
    ) -> list[list[Form]]:
        """One sweep over all of them: its steps are small for one expert, and as many for a hundred."""
        grams = [stats[Gram] for _, stats in problems]
        orders = [self._order(gram) for gram in grams]
        stacks = [stacked(weights) for weights, _ in problems]
        weights_eoi = torch.stack(
            [
                weight if order is None else weight[:, order]
                for (weight, _), order in zip(stacks, orders, strict=True)
            ]
        )
        size = self.group_of(weights_eoi.shape[2])
        # The metric is made anew where it is needed, so that it is not in memory beside its factor.
        metrics = [partial(self._metric, *each) for each in zip(grams, orders, strict=True)]
        importance_ei = torch.stack([metric().diagonal().float() for metric in metrics])
        uppers_eii = _stacked_factors(metrics)
        found = sweep(weights_eoi, uppers_eii, importance_ei, self.grid, size)
        del uppers_eii
        return [
            self._refitted(weight, (codes, scales, zeros), metric(), order, rows)
            for weight, codes, scales, zeros, metric, order, (_, rows) in zip(
                weights_eoi, *found, metrics, orders, stacks, strict=True
            )
        ]

    def _refitted(
        self,
        weight_oi: Tensor,
        found: tuple[Tensor, Tensor, Tensor],
        metric_ii: Tensor,
        order: Tensor | None,
        rows: Sequence[int],
    ) -> list[Form]:
        """The forms of one sweep's codes (o, i), with scales and zeros (o, G) fitted again."""
        codes, scales, zeros = found
        size = self.group_of(codes.shape[1])
        widths = [part.shape[1] for part in codes.split(size, 1)]
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

    def _order(self, gram: Gram) -> Tensor | None:
        """The order of the sweep, where it is not the stored one: (i,) int64."""
        if self.act_order is ActOrder.NONE:
            return None
        return gram.sum_ii.diagonal().argsort(descending=True, stable=True)

    def _metric(self, gram: Gram, order: Tensor | None) -> Tensor:
        """The mean Gram, shrunk and damped, in the order of the sweep: (i, i), fp64."""
        metric_ii = conditioned_(gram.mean_ii(), self.shrinkage, self.damping)
        return metric_ii if order is None else metric_ii[order][:, order]


def _stacked_factors(metrics: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The `inverse_factor` of each metric (i, i): (e, i, i) fp32. One is never copied: 127 MB at 5,632 inputs."""
    if len(metrics) == 1:
        return inverse_factor(metrics[0]())[None]
    first_ii = inverse_factor(metrics[0]())
    factors_eii = first_ii.new_empty(len(metrics), *first_ii.shape)
    factors_eii[0] = first_ii
    for factor_ii, metric in zip(factors_eii[1:], metrics[1:], strict=True):
        factor_ii.copy_(inverse_factor(metric()))
    return factors_eii


def sweep(
    weights_eoi: Tensor, uppers_eii: Tensor, importance_ei: Tensor, grid: Grid, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (e, o, i), scales and zeros (e, o, G), all fp32, of e weights (o, i), fp32, that have nothing in common.

    `uppers_eii` are their Grams' inverse factors; `importance_ei` weights squared errors in the search for scales.
    Works on the transposes, where a column of a weight is one run of memory.
    """
    rest_eio = weights_eoi.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    codes_eio = torch.empty_like(rest_eio)
    scales, zeros = [], []
    step = (
        size * -(-COLUMNS_AT_ONCE // size) if size <= 8 * COLUMNS_AT_ONCE else 2 * COLUMNS_AT_ONCE
    )
    for start in range(0, rest_eio.shape[1], step):
        stop = min(start + step, rest_eio.shape[1])
        errors_eio = torch.empty_like(rest_eio[:, start:stop])
        for j in range(start, stop):
            if j % size == 0:
                # Every earlier column's error has reached this group: a group never straddles two steps' starts.
                members = slice(j, j + size)
                scale, zero = _scales(grid, rest_eio[:, members], importance_ei[:, members])
                scales.append(scale)
                zeros.append(zero)
            code = grid.codes(rest_eio[:, j], scale, zero)
            codes_eio[:, j] = code
            error = (rest_eio[:, j] - (code - zero) * scale) / uppers_eii[:, j, j, None]
            errors_eio[:, j - start] = error
            later = uppers_eii[:, j, j + 1 : stop, None]
            rest_eio[:, j + 1 : stop].baddbmm_(later, error[:, None], alpha=-1)
        later = uppers_eii[:, start:stop, stop:].transpose(1, 2)
        rest_eio[:, stop:].baddbmm_(later, errors_eio, alpha=-1)
    return codes_eio.transpose(1, 2), torch.stack(scales, 2), torch.stack(zeros, 2)


def _scales(grid: Grid, weights_ego: Tensor, importance_eg: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros (e, o) of one group of each row, all rows of all weights searched as one list."""
    e, g, o = weights_ego.shape
    rows_ng = weights_ego.transpose(1, 2).reshape(e * o, g)
    # One weight's importance is one vector, which the search need not repeat for each row.
    importance = importance_eg[0] if e == 1 else importance_eg.repeat_interleave(o, 0)
    scale, zero = grid.scales(rows_ng, importance)
    return scale.view(e, o), zero.view(e, o)


def _spread(values_og: Tensor, size: int, n_inputs: int) -> Tensor:
    """The value of each entry's group: (o, G) -> (o, i)."""
    return values_og.repeat_interleave(size, dim=1)[:, :n_inputs]
