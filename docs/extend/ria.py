"""RIA: pruning by relative importance and activations.

Zhang et al. 2024, "Plug-and-Play", ICLR 2024: a weight counts by its share of its row and of its column, times
the size of its input to a power. Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.errors import RecipeError
from compress.families.pruner import Pruner
from compress.solvers.masks import largest

TINY = 1e-12
"""Keeps an empty row or column from dividing by zero."""


@dataclass(frozen=True, kw_only=True)
class RIA(Pruner, name="ria"):
    """Pruning by a weight's share of its row and column, times the size of its input to a power."""

    paper: ClassVar[str] = "Zhang et al. 2024 (RIA), ICLR 2024"

    power: float = field(default=0.5, metadata={"help": "power of the input's size; 0 ignores it"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power < 0:
            raise RecipeError(f"{self.power} is negative; 0 or more (0.5 is usual)", option="power")

    def pruned(self, weight_oi: Tensor, s: int, stats: Statistics) -> Tensor:
        """The s weights of every row with the highest score, as they are."""
        size_oi = weight_oi.abs()
        share_oi = size_oi / size_oi.sum(1, keepdim=True).clamp_min(TINY)
        share_oi = share_oi + size_oi / size_oi.sum(0, keepdim=True).clamp_min(TINY)
        input_i = stats[Gram].mean_ii().diagonal().sqrt().to(weight_oi)
        return weight_oi * largest(share_oi * input_i**self.power, s, self.pattern)
