"""Truncated SVD of the weight: the baseline of low-rank methods.

Eckart and Young 1936 (doi:10.1007/BF02288367): the rank-r matrix nearest to W in the Frobenius norm. Needs: nothing but
the weight. Cost: one symmetric eigenproblem of min(o, i) for each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from compress.families.factorisation import Factorisation
from compress.families.low_rank import Metric


@dataclass(frozen=True, kw_only=True)
class SVD(Factorisation, name="svd"):
    """Truncated SVD of the weight, inputs ignored: the baseline."""

    paper: ClassVar[str] = "Eckart and Young 1936, doi:10.1007/BF02288367"
    data_free: ClassVar[bool] = True

    @property
    def metric_needs(self) -> frozenset[type[Statistic]]:
        """No statistics: only the weight counts."""
        return frozenset()

    def measure(
        self,
        weights: Sequence[Tensor],
        stats: Statistics,  # noqa: ARG002  (what this baseline does without)
    ) -> Metric:
        """The identity metric."""
        return Metric.identity(weights[0].shape[1], weights[0].device)
