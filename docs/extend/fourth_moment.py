"""Pruning by weight times the fourth moment of its input: a method that brings a statistic of its own.

Shapes: t = tokens, o = out_features, i = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from calibration.statistics.base import InputStatistic, Statistic
from calibration.statistics.collection import Statistics
from compress.families.pruner import Pruner
from compress.solvers.masks import largest

POWER = 4


@dataclass(frozen=True)
class FourthMoment(InputStatistic, name="fourth_moment"):
    """Sum over tokens of x^4, and how many activations were exactly 0."""

    sum_i: Tensor
    n_zeros: int = 0

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i) -> (i,), fp64."""
        return cls(
            n_tokens=x_ti.shape[0],
            n_sequences=n_sequences,
            sum_i=x_ti.double().pow(POWER).sum(0),
            n_zeros=int((x_ti == 0).sum()),
        )


@dataclass(frozen=True, kw_only=True)
class ByFourthMoment(Pruner, name="by_fourth_moment"):
    """Pruning by the size of a weight times the fourth moment of its input."""

    paper: ClassVar[str] = "none"

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The fourth moment too."""
        return super().needs | {FourthMoment}

    def pruned(self, weight_oi: Tensor, s: int, stats: Statistics) -> Tensor:
        """The s weights of every row with the highest score, as they are."""
        moment_i = stats[FourthMoment].sum_i.to(weight_oi)
        return weight_oi * largest(weight_oi * moment_i, s, self.pattern)
