"""The Gram matrix of the calibration sequences that are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from calibration.statistics.base import HeldOutStatistic
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.statistics.moments import second_moments


@dataclass(frozen=True)
class HeldOut(HeldOutStatistic, name="held_out"):
    """The part of the Gram that comes from the held-out sequences: sum over their tokens of x x^T."""

    sum_ii: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """Held-out tokens (t, i) -> (i, i), fp64."""
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_ii=second_moments(x_ti))

    def mean_ii(self) -> Tensor:
        """E[x x^T] per token: (i, i), fp64."""
        return self.sum_ii / max(self.n_tokens, 1)


def without_held_out(stats: Statistics) -> Statistics:
    """The same statistics with the held-out sequences taken out of the Gram; unchanged if none are held out."""
    if HeldOut not in stats:
        return stats
    whole, aside = stats[Gram], stats[HeldOut]
    rest = Gram(
        n_tokens=whole.n_tokens - aside.n_tokens,
        n_sequences=whole.n_sequences - aside.n_sequences,
        sum_ii=whole.sum_ii - aside.sum_ii,
    )
    parted = Statistics(stats)
    parted[Gram] = rest
    del parted[HeldOut]
    return parted
