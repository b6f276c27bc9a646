"""Moments of a layer's inputs in the original model together with those behind compressed layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from calibration.statistics.base import PairStatistic
from calibration.statistics.moments import cross_moments


@dataclass(frozen=True)
class CrossGram(PairStatistic, name="cross_gram"):
    """Sums over tokens of x x'^T and of x: x is the input in the original, x' that behind the compressed layers."""

    sum_ij: Tensor
    sum_i: Tensor

    @classmethod
    def between(cls, original_ti: Tensor, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i), (t, i) -> (i, i) and (i,), fp64."""
        cross = cross_moments(original_ti, x_ti)
        total = original_ti.sum(0, dtype=torch.float64)
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_ij=cross, sum_i=total)

    def mean_ij(self) -> Tensor:
        """E[x x'^T] per token: (i, i), fp64."""
        return self.sum_ij / max(self.n_tokens, 1)

    def mean_i(self) -> Tensor:
        """E[x] per token, of the original's inputs: (i,), fp64."""
        return self.sum_i / max(self.n_tokens, 1)
