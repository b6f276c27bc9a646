"""Wanda: weights with the largest product of their size and their input's size stay, unchanged.

Sun et al. 2023, arXiv:2306.11695, equation 1: |W_ij| ||X_j||, compared within an output's row. Needs: the Gram matrix's
diagonal. Cost: one sort of the weight. Shapes: o = out_features, i = in_features.

The score is the cost of pruning the weight alone, were the inputs not correlated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.families.pruner import Pruner
from compress.solvers.linalg import refuse_dead
from compress.solvers.masks import largest


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruner, name="wanda"):
    """Keeps the weights with the largest product of their size and their input's size."""

    paper: ClassVar[str] = "Sun et al. 2023, arXiv:2306.11695"

    def pruned(self, weight_oi: Tensor, s: int, stats: Statistics) -> Tensor:
        """The s highest scores of every row, or two of every four. Raises LayerError if every input is zero."""
        root_i = stats.once(("input sizes",), lambda: _sizes(stats))
        return weight_oi * largest(weight_oi * root_i, s, self.pattern)


def _sizes(stats: Statistics) -> Tensor:
    """The root mean square of each input over the tokens: (i,) fp32."""
    moments_i = stats[Gram].mean_ii().diagonal()
    refuse_dead(moments_i)
    sizes_i: Tensor = moments_i.sqrt().float()
    return sizes_i
