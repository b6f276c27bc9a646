"""Statistics of the gradients of the loss, for each layer: what the Fisher-weighted methods are made of.

The loss of a sample is the negative log-likelihood of its labels, summed over its tokens. Gradients come one sample at
a time: the square of the gradient of a batch's mean is not the Fisher, its cross terms are of other samples.

Shapes: t = tokens of one sample (padding dropped), i = input features, o = output features; x_ti what the layer read,
g_to the gradient of the sample's loss by what it wrote. Unit: nats per activation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from calibration.precision import cuda_products
from calibration.stats import Statistic, add_second_moments_, second_moments


@dataclass(frozen=True)
class GradientStatistic(Statistic):
    """Sums over samples; of one layer, even where it shares its input with others."""

    @classmethod
    @abstractmethod
    def of(cls, x_ti: Tensor, g_to: Tensor) -> Self:
        """The statistic of one sample."""

    def with_sample(self, x_ti: Tensor, g_to: Tensor) -> Self:
        """The sum with that of one more sample, in the memory of self's tensors: do not use self after."""
        return self.absorb(type(self).of(x_ti, g_to))


@dataclass(frozen=True)
class Fisher(GradientStatistic):
    """The empirical Fisher of the weight, its diagonal, summed over outputs: sum over samples and o of (dL/dW[o, i])^2.

    Hsu et al. 2022, arXiv:2207.00112, equations 3 and 5: the importance that a row of their weight (in, out) shares.
    """

    name: ClassVar[str] = "fisher"
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


@dataclass(frozen=True)
class OutputGradients(GradientStatistic):
    """Second moment of the gradients by the outputs: sum over tokens of g g^T, K-FAC's left factor."""

    name: ClassVar[str] = "output_gradients"
    sum_oo: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, g_to: Tensor) -> Self:
        """(t, i), (t, o) -> (o, o), fp64."""
        return cls(n_tokens=x_ti.shape[0], n_sequences=1, sum_oo=second_moments(g_to))

    def with_sample(self, x_ti: Tensor, g_to: Tensor) -> Self:
        """Without a second matrix in memory."""
        add_second_moments_(self.sum_oo, g_to)
        return replace(
            self, n_tokens=self.n_tokens + x_ti.shape[0], n_sequences=self.n_sequences + 1
        )

    def mean_oo(self) -> Tensor:
        """E[g g^T] per token: (o, o), fp64."""
        return self.sum_oo / max(self.n_tokens, 1)


@dataclass(frozen=True)
class GradientEnergy(GradientStatistic):
    """Squared gradients by the outputs: sum over tokens of g^2."""

    name: ClassVar[str] = "gradient_energy"
    sum_o: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, g_to: Tensor) -> Self:
        """(t, i), (t, o) -> (o,), fp64."""
        squares = g_to.double().square_().sum(0)
        return cls(n_tokens=x_ti.shape[0], n_sequences=1, sum_o=squares)

    def mean(self) -> float:
        """Over tokens and outputs."""
        return float(self.sum_o.mean()) / max(self.n_tokens, 1)


GRADIENTS: Mapping[str, type[GradientStatistic]] = {
    cls.name: cls for cls in (Fisher, OutputGradients, GradientEnergy)
}

CHEAP: frozenset[type[GradientStatistic]] = frozenset({Fisher, GradientEnergy})
"""A few numbers for each layer: collected whoever asks, for the next who does."""
EVERY = frozenset(GRADIENTS.values())


def of_gradients(
    needs: frozenset[type[Statistic]] | None,
) -> frozenset[type[GradientStatistic]]:
    """Those among what a method needs that come from gradients."""
    return frozenset(kind for kind in needs or () if issubclass(kind, GradientStatistic))
