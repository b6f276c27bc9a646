"""The empirical Fisher information of a layer's weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from calibration.precision import cuda_products
from calibration.statistics.base import Collected, GradientStatistic


@dataclass(frozen=True)
class Fisher(GradientStatistic, name="fisher"):
    """The empirical Fisher of the weight, its diagonal, summed over outputs: sum over samples and o of (dL/dW[o, i])^2.

    Hsu et al. 2022, arXiv:2207.00112, equations 3 and 5: the importance that a row of their weight (in, out) shares.
    """

    collected: ClassVar[Collected] = Collected.ALWAYS
    sum_i: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, g_to: Tensor) -> Self:
        """(t, i), (t, o) -> (i,), fp64."""
        with cuda_products("ieee"):
            gradient_oi = g_to.float().T @ x_ti.float()
        squares = gradient_oi.square_().sum(0, dtype=torch.float64)
        return cls(n_tokens=x_ti.shape[0], n_sequences=1, sum_i=squares)

    def mean_i(self) -> Tensor:
        """Mean over samples: (i,), fp64."""
        return self.sum_i / max(self.n_sequences, 1)
