"""Weights and inputs that look like a language model's: correlated channels, a few outliers."""

import torch
from torch import Tensor

from calibration.stats import STATISTICS, Statistics


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
    """All statistics of the inputs."""
    return Statistics.of(x, 4, frozenset(STATISTICS.values()))
