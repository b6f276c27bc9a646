"""DSnoT: swaps pruned and kept weights of another method's mask for as long as that lowers the error.

Zhang et al. 2023, arXiv:2310.08915 (Dynamic Sparse No Training), algorithm 1. Needs: the Gram matrix; the mean with
`--criterion mean`; what its base needs. Cost: o i^2 once and o i for each cycle. Shapes: o = out_features, r = of these
some rows, i = in_features.

A weight that is taken back has the value that it had in the model; those that stay keep the base's. No row ever loses
more than it did with the base, in what is stored: rows that would stay as the base left them.

Differs from the paper: the criterion is the change of a row's squared error, which the Gram matrix gives exactly
(theirs, with `--criterion mean`, is an estimate from the means and variances of the inputs, and may raise the error);
of the masks that a row goes through it keeps the best, where theirs stops below a threshold in the unit of the outputs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.statistics.mean import Mean
from compress.errors import RecipeError
from compress.families.base import Compressor, LayerShape
from compress.families.pruner import Pruner
from compress.forms.base import Form
from compress.methods.wanda import Wanda
from compress.solvers.masks import Pattern, largest

ROWS_AT_ONCE = 512


class Criterion(enum.StrEnum):
    """The quantity that decides which weights are swapped."""

    ERROR = "error"
    """The change of the squared error of the row's output, exactly."""
    MEAN = "mean"
    """The change of the mean error of the row's output, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class DSnoT(Compressor, name="dsnot"):
    """Swaps pruned and kept weights of another method's mask; no weight update."""

    paper: ClassVar[str] = "Zhang et al. 2023, arXiv:2310.08915"

    base: Pruner = field(
        default_factory=Wanda, metadata={"help": "pruning method whose mask is improved"}
    )
    cycles: int = field(default=50, metadata={"help": "the most swaps in a row"})
    criterion: Criterion = field(
        default=Criterion.ERROR,
        metadata={
            "help": "what decides a swap: the squared error of the outputs, or their mean error (the paper's)"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 1:
            raise RecipeError(f"must be 1 or more (e.g. 50), got {self.cycles}", option="cycles")
        if self.base.rounds_as_it_prunes:
            raise RecipeError(
                f"{self.base.value_bits} makes {self.base.name} round while it prunes, for a mask that dsnot would "
                "change; give 16, or another base",
                option="base.value_bits",
            )

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Gram matrix, the base's statistics, and the inputs' mean if that is the criterion."""
        return self.base.needs | {Gram} | ({Mean} if self.criterion is Criterion.MEAN else set())

    def plan(
        self,
        layers: Mapping[str, LayerShape],
        rest_bytes: int = 0,  # noqa: ARG002  (shares decide the bytes, not a budget)
    ) -> dict[str, Compressor]:
        """The base's plan: the mask changes, not the number of weights that stay."""
        return {
            name: replace(self, base=self.base.settled(name, layer))
            for name, layer in layers.items()
        }

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the base's form."""
        return self.base.planned_bytes(shape)

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """The sparse forms of the weights, each improved by itself."""
        return [self._improved(weight, stats) for weight in weights]

    def _improved(self, weight_oi: Tensor, stats: Statistics) -> Form:
        gram_ii, base = stats[Gram].mean_ii(), self.base
        first_oi = base.pruned(weight_oi, base.per_row or 0, stats)
        mask_oi = largest(first_oi, base.per_row or 0, base.pattern)
        gram, choose = gram_ii.float(), self._choice(stats)
        parts = [each.split(ROWS_AT_ONCE) for each in (weight_oi, first_oi, mask_oi)]
        found_oi = torch.cat(
            [_Rows(gram, *part).improved(choose, self.cycles) for part in zip(*parts, strict=True)]
        )
        before, after = (
            _lost(weight_oi.double() - base.stored(each).dense(), gram_ii)
            for each in (first_oi, found_oi)
        )
        return base.stored(torch.where((after < before)[:, None], found_oi, first_oi))

    def _choice(self, stats: Statistics) -> Choice:
        if self.criterion is Criterion.MEAN:
            mean_i = stats[Mean].mean_i().float()
            return lambda rows: by_mean(rows, self.base.pattern, mean_i)
        return lambda rows: by_error(rows, self.base.pattern)


class _Rows:
    """Rows of a weight with their mask, values and output error."""

    def __init__(
        self, gram_ii: Tensor, target_ri: Tensor, values_ri: Tensor, kept_ri: Tensor
    ) -> None:
        self.gram, self.moments = gram_ii, gram_ii.diagonal()
        self.target, self.values, self.kept = target_ri, values_ri.clone(), kept_ri.clone()
        self.error = target_ri - values_ri
        self.pull = self.error @ gram_ii
        """Half of the gradient of the squared error, by the error of each weight."""

    def improved(self, choose: Choice, cycles: int) -> Tensor:
        """The values with the least squared error of those that so many cycles go through."""
        best, least = self.values.clone(), self._lost()
        for _ in range(cycles):
            grown, dropped, moves = choose(self)
            if not bool(moves.any()):
                break
            self._swap(grown, dropped, moves.nonzero().squeeze(1))
            lost = self._lost()
            best = torch.where((lost < least)[:, None], self.values, best)
            least = torch.minimum(lost, least)
        return best

    def _lost(self) -> Tensor:
        return (self.error * self.pull).sum(1)

    def _swap(self, grown_r: Tensor, dropped_r: Tensor, rows: Tensor) -> None:
        """Takes one weight back and prunes another in each of these rows."""
        grown, dropped = grown_r[rows], dropped_r[rows]
        more, less = self.target[rows, grown], self.values[rows, dropped]
        self.kept[rows, grown], self.kept[rows, dropped] = True, False
        self.values[rows, grown], self.values[rows, dropped] = more, 0.0
        self.error[rows, grown] -= more
        self.error[rows, dropped] += less
        self.pull[rows] += less[:, None] * self.gram[dropped] - more[:, None] * self.gram[grown]


Choice = Callable[[_Rows], tuple[Tensor, Tensor, Tensor]]
"""A function from rows to the weight to take back, the weight to prune, and whether to swap: (r,) each."""


def by_error(rows: _Rows, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """The weight whose return lowers the squared error most, then the one whose going raises it least.

    With 2:4 the best pair of a four. Only where both together lower it.
    """
    growing = rows.target * (rows.target * rows.moments - 2 * rows.pull)
    growing = growing.masked_fill(rows.kept, torch.inf)
    if pattern is Pattern.TWO_OF_FOUR:
        return _best_pair(rows, growing)
    change, grown = growing.min(1)
    pull = rows.pull - rows.target.gather(1, grown[:, None]) * rows.gram[grown]
    dropping = rows.values * (rows.values * rows.moments + 2 * pull)
    more, dropped = dropping.masked_fill(~rows.kept, torch.inf).min(1)
    return grown, dropped, change + more < 0


def _best_pair(rows: _Rows, growing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best swap within a group of four, for each row."""
    n = growing.shape[1] // 4
    dropping = rows.values * (rows.values * rows.moments + 2 * rows.pull)
    dropping = dropping.masked_fill(~rows.kept, torch.inf)
    blocks = rows.gram.view(n, 4, n, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    # A pair costs its two parts, and what they do to one another.
    change = growing.view(-1, n, 4, 1) + dropping.view(-1, n, 1, 4)
    change -= 2 * rows.target.view(-1, n, 4, 1) * rows.values.view(-1, n, 1, 4) * blocks
    least, place = change.flatten(1).min(1)
    four, pair = 4 * (place // 16), place % 16
    return four + pair // 4, four + pair % 4, least < 0


def by_mean(rows: _Rows, pattern: Pattern, mean_i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's: two weights that bring the mean error towards zero (i,: the inputs' means).

    Back comes the one with the largest W E[x] / Var[x]; the one with the least |W| times its input's size goes. With
    2:4, of one four.
    """
    sign = (rows.error @ mean_i).sign()[:, None]
    variance_i = rows.moments - mean_i.square()
    steady_i = torch.where(variance_i > 0, mean_i / variance_i, 0)
    gain = (sign * rows.target * steady_i).masked_fill(rows.kept, -torch.inf)
    size = rows.values.abs() * rows.moments.sqrt()
    size = size.masked_fill(~rows.kept | (sign * rows.values * mean_i >= 0), torch.inf)
    if pattern is Pattern.TWO_OF_FOUR:
        closed = torch.isinf(size.view(len(size), -1, 4)).all(2)
        gain = gain.masked_fill(closed.repeat_interleave(4, 1), -torch.inf)
    most, grown = gain.max(1)
    if pattern is Pattern.TWO_OF_FOUR:
        four_i = torch.arange(size.shape[1], device=size.device) // 4
        size = size.masked_fill(four_i != grown[:, None] // 4, torch.inf)
    least, dropped = size.min(1)
    return grown, dropped, (most > 0) & torch.isfinite(least)


def _lost(error_oi: Tensor, gram_ii: Tensor) -> Tensor:
    """The squared error of each row's output: (o,), fp64."""
    return ((error_oi @ gram_ii) * error_oi).sum(1)
