"""Rounding to nearest: every weight to the nearest point of its group's grid.

The baseline of quantisation: no error is carried from one column to the next. Scales are searched with diag(G). Shapes:
o = out_features, i = in_features, g = group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.families.quantiser import Quantiser, stacked
from compress.forms.base import Form


@dataclass(frozen=True, kw_only=True)
class Rounding(Quantiser):
    """Rounding to nearest, with scales searched for the least weighted error."""

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """Round each group on the grid whose scale loses least in the metric diag(G)."""
        weight_oi, rows = stacked(weights)
        i = weight_oi.shape[1]
        size = self.group_of(i)
        importance_i = stats[Gram].mean_ii().diagonal().float()
        codes, scales, zeros = [], [], []
        for start in range(0, i, size):
            part = weight_oi[:, start : start + size]
            scale, zero = self.grid.scales(part, importance_i[start : start + size])
            codes.append(self.grid.codes(part, scale[:, None], zero[:, None]))
            scales.append(scale)
            zeros.append(zero)
        stack = torch.cat(codes, 1).to(torch.uint8), torch.stack(scales, 1), torch.stack(zeros, 1)
        return self.forms(*stack, rows)
