"""Weights and inputs that look like a language model's: correlated channels, a few outliers."""

import torch
from torch import Tensor

from calibration.statistics import always_collected
from calibration.statistics.base import InputStatistic
from calibration.statistics.collection import Statistics
from calibration.statistics.fisher import Fisher
from compress.solvers.linalg import output_energy


def inputs(n_inputs: int, n_tokens: int = 2048, seed: int = 0) -> Tensor:
    """Correlated activations (t, i) with a decaying spectrum and two large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_inputs, n_inputs, generator=generator)
    mix = mix * torch.logspace(0, -1.5, n_inputs)[:, None]
    x = torch.randn(n_tokens, n_inputs, generator=generator) @ mix
    x[:, :2] *= 20
    return x


def weight(n_outputs: int, n_inputs: int, seed: int = 0) -> Tensor:
    """A weight (o, i) with heavier tails than a Gaussian's."""
    generator = torch.Generator().manual_seed(seed + 100)
    shape = (n_outputs, n_inputs)
    spread = torch.exp(0.4 * torch.randn(shape, generator=generator))
    return 0.05 * torch.randn(shape, generator=generator) * spread


def statistics(x: Tensor) -> Statistics:
    """All statistics of the inputs, and the Fisher of a layer that got gradients of no pattern."""
    stats = Statistics.of(x, 4, InputStatistic.among(always_collected()))
    return stats.joined(Statistics({Fisher: Fisher.of(x, gradients(x.shape[0], 24))}))


def gradients(n_tokens: int, n_outputs: int, seed: int = 0) -> Tensor:
    """Gradients of a loss by a layer's outputs (t, o): correlated, a few outputs matter more."""
    generator = torch.Generator().manual_seed(seed + 200)
    mix = torch.randn(n_outputs, n_outputs, generator=generator)
    mix = mix * torch.logspace(0, -1, n_outputs)[:, None]
    return 1e-3 * torch.randn(n_tokens, n_outputs, generator=generator) @ mix


def relative_output_error(weight_oi: Tensor, approximation_oi: Tensor, gram_ii: Tensor) -> float:
    """||(W - W') X||_F / ||W X||_F, from the Gram alone; 0 for a layer whose output is zero anyway."""
    total = output_energy(weight_oi, gram_ii)
    lost = output_energy(weight_oi.double() - approximation_oi.double(), gram_ii)
    return (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0
