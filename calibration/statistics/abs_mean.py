"""The mean magnitude of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from calibration.statistics.base import Collected, InputStatistic


@dataclass(frozen=True)
class AbsMean(InputStatistic, name="abs_mean"):
    """Sum over tokens of abs(x)."""

    collected: ClassVar[Collected] = Collected.ALWAYS
    sum_i: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i) -> (i,), fp64."""
        total = x_ti.abs().sum(0, dtype=torch.float64)
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_i=total)

    def mean_i(self) -> Tensor:
        """E[abs(x)] per token: (i,), fp64."""
        return self.sum_i / max(self.n_tokens, 1)
