"""Squared gradients by a layer's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from calibration.statistics.base import Collected, GradientStatistic


@dataclass(frozen=True)
class GradientEnergy(GradientStatistic, name="gradient_energy"):
    """Squared gradients by the outputs: sum over tokens of g^2."""

    collected: ClassVar[Collected] = Collected.ALWAYS
    sum_o: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, g_to: Tensor) -> Self:
        """(t, i), (t, o) -> (o,), fp64."""
        squares = g_to.double().square_().sum(0)
        return cls(n_tokens=x_ti.shape[0], n_sequences=1, sum_o=squares)

    def mean(self) -> float:
        """The mean over tokens and outputs."""
        return float(self.sum_o.mean()) / max(self.n_tokens, 1)
