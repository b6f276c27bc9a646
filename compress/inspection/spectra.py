"""Spectra of weights as they are on disk: how many directions hold a weight's energy. No text is needed.

Each weight is read, decomposed in fp32 and let go. Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.callbacks import Progress
from compress.errors import LayerError
from compress.inspection.checkpoint import Ordinary


@dataclass(frozen=True, kw_only=True)
class EffectiveRanks:
    """How a weight's energy is spread over its singular values s_1 >= s_2 >= ..."""

    full: int
    """Full rank, min(o, i)."""
    numerical: int
    """Singular values above s_1 max(o, i) eps, eps of fp32; the others are rounding (Golub and Van Loan)."""
    stable: float
    """sum of s_k^2 over s_1^2 (Rudelson and Vershynin 2007)."""
    holds_90: int
    """The fewest singular values that hold 90 % of the energy, the sum of s_k^2."""
    holds_99: int
    """The fewest singular values that hold 99 % of the energy."""


def effective_ranks(weight_oi: Tensor) -> EffectiveRanks:
    """Effective ranks of one weight (o, i). Raises LayerError for one that holds NaN or infinity."""
    if not bool(torch.isfinite(weight_oi).all()):
        raise LayerError("it holds NaN or infinity; the checkpoint is damaged, download it again")
    values = torch.linalg.svdvals(weight_oi.float()).double()
    energies = values.square()
    total = float(energies.sum())
    threshold = float(values[0]) * max(weight_oi.shape) * torch.finfo(torch.float32).eps
    return EffectiveRanks(
        full=min(weight_oi.shape),
        numerical=int((values > threshold).sum()),
        stable=total / float(energies[0]) if total > 0 else 0.0,
        holds_90=_holding(energies, 0.90),
        holds_99=_holding(energies, 0.99),
    )


def _holding(energies: Tensor, share: float) -> int:
    """The fewest of the descending energies that sum up to a share of them; 0 if there is none."""
    total = float(energies.sum())
    return int((energies.cumsum(0) < share * total).sum()) + 1 if total > 0 else 0


def weight_spectra(model: Ordinary, *, progress: Progress) -> Iterator[tuple[str, EffectiveRanks]]:
    """Effective ranks of the compressible layers by name. Raises LayerError naming a layer that holds no numbers."""
    tensors = model.linears.tensors
    for index, (name, tensor) in enumerate(tensors.items()):
        progress("spectra", index, len(tensors))
        try:
            yield name, effective_ranks(model.reader[tensor])
        except LayerError as error:
            raise LayerError(f"layer {name}: {error}") from error
    progress("spectra", len(tensors), len(tensors))
