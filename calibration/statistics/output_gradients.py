"""Second moments of the gradients by a layer's outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from calibration.statistics.base import GradientStatistic
from calibration.statistics.moments import add_second_moments_, second_moments


@dataclass(frozen=True)
class OutputGradients(GradientStatistic, name="output_gradients"):
    """Second moment of the gradients by the outputs: sum over tokens of g g^T, K-FAC's left factor."""

    sum_oo: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, g_to: Tensor) -> Self:
        """(t, i), (t, o) -> (o, o), fp64."""
        return cls(n_tokens=x_ti.shape[0], n_sequences=1, sum_oo=second_moments(g_to))

    def with_sample(self, x_ti: Tensor, g_to: Tensor) -> Self:
        """Add this sample without a second matrix in memory."""
        add_second_moments_(self.sum_oo, g_to)
        return replace(
            self, n_tokens=self.n_tokens + x_ti.shape[0], n_sequences=self.n_sequences + 1
        )

    def mean_oo(self) -> Tensor:
        """E[g g^T] per token: (o, o), fp64."""
        return self.sum_oo / max(self.n_tokens, 1)
