"""ASVD: truncated SVD of the weight with its inputs scaled by how large they are.

Yuan et al. 2023, arXiv:2312.05821, equation 8: SVD of W S with S = diag(E|x|)^alpha. Needs: the mean of |x|.
Cost: one symmetric eigenproblem of min(o, i) for each weight.

Differs from the authors' code: a full eigenproblem in fp64 (theirs is `torch.svd_lowrank` without oversampling, 4 %
more error); the ridge is relative to the median (theirs adds 1e-6, whatever the scale); ranks come from the plan
(theirs from the perplexity with each layer compressed alone, hours on an A100); a failure is an error, not a random
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from calibration.statistics.abs_mean import AbsMean
from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from compress.errors import RecipeError
from compress.families.factorisation import Factorisation
from compress.families.low_rank import Metric
from compress.solvers.linalg import refuse_dead

RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ASVD(Factorisation, name="asvd"):
    """Truncated SVD with each input weighted by a power of its mean magnitude."""

    paper: ClassVar[str] = "Yuan et al. 2023 (ASVD), arXiv:2312.05821"

    alpha: float = field(
        default=0.5, metadata={"help": "power of the mean magnitude, 0 (plain SVD) to 1"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"must be between 0 and 1, got {self.alpha}", option="alpha")

    @property
    def metric_needs(self) -> frozenset[type[Statistic]]:
        """The inputs' mean magnitudes."""
        return frozenset({AbsMean})

    def measure(
        self,
        weights: Sequence[Tensor],  # noqa: ARG002  (the metric is the inputs')
        stats: Statistics,
    ) -> Metric:
        """The metric diag(E|x| + ridge)^(2 alpha). Raises LayerError if no input was ever active."""
        magnitude_i = stats[AbsMean].mean_i()
        refuse_dead(magnitude_i)
        live = magnitude_i[magnitude_i > 0]
        return Metric.diagonal((magnitude_i + RIDGE * live.median()) ** self.alpha)
