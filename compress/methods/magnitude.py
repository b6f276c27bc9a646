"""Magnitude pruning: the largest weights of every row stay, unchanged.

Han et al. 2015, arXiv:1506.02626. The baseline of pruning: the inputs do not count. Shapes: o = out_features, i =
in_features.

Differs from the paper: a threshold for each row, not for each layer, so that every row stores as many; no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from calibration.statistics.collection import Statistics
from compress.families.pruner import Pruner
from compress.solvers.masks import largest


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner, name="magnitude"):
    """Keeps the largest weights of every row: the baseline of pruning."""

    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626"
    data_free: ClassVar[bool] = True

    def pruned(
        self,
        weight_oi: Tensor,
        s: int,
        stats: Statistics,  # noqa: ARG002  (the inputs do not count)
    ) -> Tensor:
        """The weight (o, i) with the s largest of every row, or two of every four."""
        return weight_oi * largest(weight_oi, s, self.pattern)
