"""The Gram matrix of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from calibration.statistics.base import Collected, InputStatistic
from calibration.statistics.moments import add_second_moments_, second_moments


@dataclass(frozen=True)
class Gram(InputStatistic, name="gram"):
    """Second moment of the inputs: sum over tokens of x x^T (uncentred)."""

    collected: ClassVar[Collected] = Collected.ALWAYS
    sum_ii: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i) -> (i, i), fp64; see `second_moments`."""
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_ii=second_moments(x_ti))

    def with_tokens(self, x_ti: Tensor, n_sequences: int) -> Self:
        """Add these tokens without a second matrix in memory."""
        add_second_moments_(self.sum_ii, x_ti)
        return replace(
            self,
            n_tokens=self.n_tokens + x_ti.shape[0],
            n_sequences=self.n_sequences + n_sequences,
        )

    def mean_ii(self) -> Tensor:
        """E[x x^T] per token: (i, i), fp64."""
        return self.sum_ii / max(self.n_tokens, 1)
