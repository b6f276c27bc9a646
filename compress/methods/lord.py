"""LoRD: each layer projected on the principal components of its own outputs, and their mean put back.

Kaushal, Vaidhya and Rish 2023, arXiv:2309.14021, by Atomic Feature Mimicking (Yu and Wu 2023, AAAI; arXiv:2401.16811):
with Cov(y) = U S U^T, y is replaced by U_r U_r^T (y - E[y]) + E[y], so A = U_r^T W, B = U_r, and a bias takes what the
projection does to the mean. Needs: Gram, Mean. Cost: one Cholesky for each distinct input and one symmetric
eigenproblem of min(o, i) for each weight.

Exact: the loss squared on the calibration outputs is the tail of the spectrum of Cov(y). Centring never loses more than
the uncentred solution (SVD-LLM's), and costs one number for each output. Differs from the authors' code:
Cov(y) = W Cov(x) W^T comes from the inputs' statistics, which q, k and v share, not from hooks on outputs; Cov(x) has a
ridge relative to its median diagonal; the eigenproblem is the smaller of the two sides; after rounding A, B and the
bias are refitted.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from calibration.statistics.cross_gram import CrossGram
from calibration.statistics.gram import Gram
from calibration.statistics.mean import Mean
from compress.families.base import refuse_damping
from compress.families.factorisation import Factorisation
from compress.families.low_rank import Metric, covariance
from compress.families.target import FitTarget
from compress.forms.base import Form
from compress.solvers.linalg import add_ridge_, to_storage


class Centre(enum.StrEnum):
    """The point that outputs are fitted around."""

    MEAN = "mean"
    """Their mean; it goes into a bias."""
    NONE = "none"
    """Zero: no bias."""


@dataclass(frozen=True, kw_only=True)
class LoRD(Factorisation, name="lord"):
    """PCA of the centred outputs; the mean goes into a bias (Atomic Feature Mimicking)."""

    paper: ClassVar[str] = "Kaushal et al. 2023 (LoRD), arXiv:2309.14021"

    damping: float = field(
        default=0.01,
        metadata={"help": "ridge on the covariance, as a share of its median diagonal"},
    )

    centre: Centre = field(
        default=Centre.MEAN,
        metadata={
            "help": "fit outputs around their mean, kept in a bias, or around none (as svd_llm)"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)

    @property
    def shifts_outputs(self) -> bool:
        """Whether outputs are fitted around their mean."""
        return self.centre is Centre.MEAN

    @property
    def metric_needs(self) -> frozenset[type[Statistic]]:
        """The Gram matrix and the mean of the inputs."""
        return frozenset({Gram, Mean})

    def measure(
        self,
        weights: Sequence[Tensor],  # noqa: ARG002  (the metric is the inputs')
        stats: Statistics,
    ) -> Metric:
        """The inputs' damped covariance, or second moments where it is not centred."""
        return stats.once(
            ("metric", self.centre, self.damping),
            lambda: Metric.of(add_ridge_(self._moments(stats), self.damping)),
        )

    def _moments(self, stats: Statistics) -> Tensor:
        """The covariance (i, i) of the inputs, fp64, or their second moments without centring."""
        return covariance(stats) if self.centre is Centre.MEAN else stats[Gram].mean_ii()

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """The corrections, each with the bias that makes the mean output exact if it is centred."""
        metric, seen = self.measure(weights, stats), stats
        if self.centre is Centre.MEAN and self.factor_quantizer is not None:
            # What quantises the factors sees what they see: inputs around their mean.
            gram = stats[Gram]
            centred = replace(gram, sum_ii=covariance(stats) * gram.n_tokens)
            seen = Statistics({Gram: centred})
        forms: list[Form] = []
        for weight, target in zip(weights, self.targets(weights, stats), strict=True):
            correction = self.fit(target, metric, seen)
            if self.centre is Centre.MEAN:
                missing_o = (
                    weight.double() @ self._goal_i(stats)
                    - correction.dense().double() @ stats[Mean].mean_i()
                )
                correction = correction.shifted(to_storage(missing_o, self.storage))
            forms.append(correction)
        return forms

    def target_moments(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Covariances, where it is centred."""
        gram_ii, cross_ii = super().target_moments(stats)
        if self.centre is Centre.MEAN:
            mean_i = stats[Mean].mean_i()
            gram_ii, cross_ii = (
                covariance(stats),
                cross_ii.addr_(stats[CrossGram].mean_i(), mean_i, alpha=-1),
            )
        return gram_ii, cross_ii

    def _goal_i(self, stats: Statistics) -> Tensor:
        """The mean input whose output the mean output is to be."""
        mean_i: Tensor = stats[Mean if self.target is FitTarget.LAYER else CrossGram].mean_i()
        return mean_i

    def overhead(self, shape: tuple[int, int]) -> int:
        """The numbers of the bias."""
        return shape[0] if self.centre is Centre.MEAN else 0
