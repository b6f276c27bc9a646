"""SparseGPT: prune column by column, and let the columns still to come make up for each weight that goes.

Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1. Needs: Gram. Cost: one Cholesky inverse (i^3) for each distinct
input and o i^2 for the sweep of each weight. Shapes: o = out_features, i = in_features, w = inputs of a run,
G = groups of values that share a scale.

A weight's score is what it costs to prune it with the columns after it making up for that, w_j^2 / [H_j^-1]_jj, H_j the
Gram of the inputs from j on; it is taken when the sweep comes to a run of columns, so that it knows what those before
did. Runs are the columns of 64 values, split so that none has more than 128; with 2:4 they are the fours.

With `--value-bits 8` or `4` what stays is rounded as the sweep passes (section 3.5), so that later columns make up for
that too. 64 values share a scale, in the order in which they are stored: those of one run, or of some, so that the grid
of the sweep is the grid on disk. A scale is found when the sweep comes to its first column; all scales of a row are
refitted together in the end, as GPTQ's are.

Differs from the authors' code: within a run every row keeps as many weights, because every row is to store as many
(theirs has one threshold for a run's weights in all rows); the Gram is shrunk towards its diagonal (see
`linalg.shrink_`; with `shrinkage` 0 it is theirs); damping is relative to the median of diag(G), not its mean; scales
(theirs: one of a row, from its largest weight) are searched and refitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.families.base import refuse_damping, refuse_shrinkage
from compress.families.pruner import Pruner
from compress.families.sparse_storage import GROUP, CodeBits, layout_of
from compress.forms.base import Form
from compress.forms.quantised import Quantised
from compress.forms.sparse import Along, Sparse
from compress.solvers.grid import Grid
from compress.solvers.grid_refit import refit_scales
from compress.solvers.linalg import conditioned_, inverse_factor
from compress.solvers.masks import Pattern, largest

MOST_COLUMNS = 128
"""The number of columns whose weights are compared with one another: the paper's."""


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Pruner, name="sparsegpt"):
    """Pruning with error feedback through the inverse Gram; rounding in the same sweep."""

    paper: ClassVar[str] = "Frantar & Alistarh 2023, arXiv:2301.00774"

    value_bits: CodeBits = field(
        default=CodeBits.AUTO,
        metadata={
            "help": "bits of a weight that stays; auto: as its dtype; 8 and 4: rounded during the sweep, "
            "so that later columns compensate"
        },
    )
    damping: float = field(
        default=0.01,
        metadata={"help": "ridge on the Gram matrix, as a share of its median diagonal"},
    )
    shrinkage: float = field(
        default=0.1,
        metadata={"help": "shrinks the off-diagonal of the Gram by this share (0.1: by 10 %)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)
        refuse_shrinkage(self.shrinkage)

    def pruned(self, weight_oi: Tensor, s: int, stats: Statistics) -> Tensor:
        """The weight as the sweep leaves it, not rounded.

        Raises LayerError for a Gram matrix that is singular or zero.
        """
        sweep = _Sweep(weight_oi, self._factor(stats))
        for runs in scale_groups(weight_oi.shape[1], s, self.pattern):
            sweep.over(runs)
        return sweep.rest_io.T

    @property
    def rounds_as_it_prunes(self) -> bool:
        """Whether values are rounded to integers in the sweep."""
        return self.value_bits in (CodeBits.INT_8, CodeBits.INT_4)

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """The sparse forms of the weights, each pruned by itself, rounded in the sweep if values are integers."""
        rounding = self.storage.rounding
        if rounding is None:
            return super().compress(weights, stats)
        return [self._rounded(weight, rounding.grid, stats) for weight in weights]

    def _rounded(self, weight_oi: Tensor, grid: Grid, stats: Statistics) -> Sparse:
        """Swept and rounded at once."""
        (o, i), s = weight_oi.shape, self.per_row or 0
        gram_ii = self._metric(stats)
        importance_i = gram_ii.diagonal().float()
        groups = scale_groups(i, s, self.pattern)
        sweep, scales = _Sweep(weight_oi, self._factor(stats)), []
        for runs in groups:
            rounding = sweep.rounding(runs, grid, importance_i)
            sweep.over(runs, rounding)
            scales.append(rounding.scale_o)
        scales_og = torch.stack(scales, 1)
        widths = [runs[-1].stop - runs[0].start for runs in groups]
        spread_oi = scales_og.repeat_interleave(torch.tensor(widths, device=scales_og.device), 1)
        steps_oi = (sweep.rest_io.T / spread_oi).round_()
        scales_og = refit_scales(weight_oi, steps_oi, scales_og, gram_ii, widths)
        mask_oi = sweep.kept_io.T
        codes = (steps_oi + grid.middle)[mask_oi].view(o, s).to(torch.uint8)
        values = Quantised.from_codes(codes, scales_og, None, bits=grid.bits, group_size=GROUP)
        return Sparse.from_lines(mask_oi, values, Along.ROWS, layout_of(self.pattern))

    def _metric(self, stats: Statistics) -> Tensor:
        """The mean Gram, shrunk and damped: (i, i), fp64."""
        return conditioned_(stats[Gram].mean_ii(), self.shrinkage, self.damping)

    def _factor(self, stats: Statistics) -> Tensor:
        key = ("inverse factor", self.damping, self.shrinkage)
        return stats.once(key, lambda: inverse_factor(self._metric(stats)))


@dataclass(frozen=True)
class Run:
    """Columns that follow one another, and how many weights every row keeps of them."""

    start: int
    stop: int
    kept: int


def scale_groups(i: int, s: int, pattern: Pattern) -> list[list[Run]]:
    """Runs of columns, grouped so that every row keeps 64 weights in each group and fewer in the last."""
    kept = [*range(0, s, GROUP), s]
    ends = [*(before * i // s for before in kept[:-1]), i]
    groups = []
    for (start, stop), (before, after) in zip(pairwise(ends), pairwise(kept), strict=True):
        width = stop - start
        n = width // 4 if pattern is Pattern.TWO_OF_FOUR else -(-width // MOST_COLUMNS)
        columns = pairwise(start + width * k // n for k in range(n + 1))
        counts = pairwise((after - before) * k // n for k in range(n + 1))
        groups.append(
            [Run(*part, more - less) for part, (less, more) in zip(columns, counts, strict=True)]
        )
    return groups


@dataclass(frozen=True)
class _Rounding:
    """A grid with the scale and zero point of each row, (o,) each."""

    grid: Grid
    scale_o: Tensor
    zero_o: Tensor

    def __call__(self, column_o: Tensor) -> Tensor:
        return (self.grid.codes(column_o, self.scale_o, self.zero_o) - self.zero_o) * self.scale_o


class _Sweep:
    """A weight during the sweep: pruned up to the current column, adjusted beyond.

    It is transposed, so that a column of the weight is contiguous in memory.
    """

    def __init__(self, weight_oi: Tensor, upper_ii: Tensor) -> None:
        self.rest_io = weight_oi.T.float().clone(memory_format=torch.contiguous_format)
        self.kept_io = torch.zeros_like(self.rest_io, dtype=torch.bool)
        self._upper = upper_ii

    def rounding(self, runs: Sequence[Run], grid: Grid, importance_i: Tensor) -> _Rounding:
        """The grid of these runs, with scales for the values that would stay if the sweep changed nothing before."""
        mask_ow = torch.cat([self._mask(run) for run in runs]).T
        members = slice(runs[0].start, runs[-1].stop)
        values = self.rest_io[members].T[mask_ow].view(len(mask_ow), -1)
        importance = importance_i[members].expand_as(mask_ow)[mask_ow].view_as(values)
        return _Rounding(grid, *grid.scales(values, importance))

    def over(self, runs: Sequence[Run], rounding: _Rounding | None = None) -> None:
        """Prunes these runs, and rounds the values that stay; the columns after them compensate for that."""
        start, stop = runs[0].start, runs[-1].stop
        errors_wo = torch.empty_like(self.rest_io[start:stop])
        for run in runs:
            self.kept_io[run.start : run.stop] = self._mask(run)
            for j in range(run.start, run.stop):
                column_o = self.rest_io[j]
                staying_o = column_o if rounding is None else rounding(column_o)
                left_o = torch.where(self.kept_io[j], staying_o, 0)
                error_o = (column_o - left_o) / self._upper[j, j]
                self.rest_io[j + 1 : stop].addr_(self._upper[j, j + 1 : stop], error_o, alpha=-1)
                self.rest_io[j] = left_o
                errors_wo[j - start] = error_o
        self.rest_io[stop:].addmm_(self._upper[start:stop, stop:].T, errors_wo, alpha=-1)

    def _mask(self, run: Run) -> Tensor:
        """The mask (w, o) of the weights in a run whose pruning would cost most."""
        members = slice(run.start, run.stop)
        scores_wo = self.rest_io[members] / self._upper.diagonal()[members, None]
        return largest(scores_wo.T, run.kept, Pattern.FREE).T
