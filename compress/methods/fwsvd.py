"""FWSVD: truncated SVD in which errors count by the Fisher information of the loss on the user's own text or task.

Hsu et al. 2022, arXiv:2207.00112 (ICLR), section 4: the empirical Fisher of every weight has no closed-form best
approximation, so a row of their W (in, out) shares its sum: with d_i = sum over outputs of E[(dL/dW)^2], it is the SVD
of W diag(d)^(1/2) in our (out, in). `metric="kronecker"` puts two full sides in the place of one diagonal, as GFWSVD
(Chekalina et al. 2025, arXiv:2505.17974): errors cost trace(C E G E^T), with C = E[g g^T] of the gradients by the
outputs and G = E[x x^T] of the inputs, per token, as in K-FAC (Martens and Grosse 2015, arXiv:1503.05671).

Needs: Fisher, or OutputGradients and Gram: a pass backwards through the original model, block by block. Cost: one
symmetric eigenproblem of min(o, i) for each weight; Kronecker: besides, a Cholesky factor of each side.

Exact in either metric. Differs from published codes: gradients are squared sample by sample (one of them squares the
gradient of the batch's mean, whose cross terms are no Fisher); the ridge is relative to the median; GFWSVD fits its
two sides to the weights' gradients by power iterations, ours are sums over tokens, so that they merge exactly.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from calibration.statistics.fisher import Fisher
from calibration.statistics.gram import Gram
from calibration.statistics.output_gradients import OutputGradients
from compress.errors import LayerError
from compress.families.base import refuse_damping
from compress.families.factorisation import Factorisation
from compress.families.low_rank import Metric
from compress.solvers.linalg import add_ridge_, cholesky, ridge


class FisherMetric(enum.StrEnum):
    """The approximation of the Fisher information of a weight."""

    ROWS = "rows"
    """The diagonal, summed over outputs: one importance for each input."""
    KRONECKER = "kronecker"
    """The second moments of gradients by outputs on the left, of inputs on the right."""


@dataclass(frozen=True, kw_only=True)
class FWSVD(Factorisation, name="fwsvd"):
    """Truncated SVD weighted by the Fisher information of the loss."""

    paper: ClassVar[str] = "Hsu et al. 2022 (FWSVD), arXiv:2207.00112"

    metric: FisherMetric = field(
        default=FisherMetric.ROWS,
        metadata={
            "help": "the paper's row sums, or the two-sided Kronecker approximation (GFWSVD)"
        },
    )
    damping: float = field(
        default=0.01,
        metadata={
            "help": "ridge on the Fisher (on both its sides), as a share of its median diagonal"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)

    @property
    def metric_needs(self) -> frozenset[type[Statistic]]:
        """The Fisher's row sums, or the moments of both its sides."""
        if self.metric is FisherMetric.ROWS:
            return frozenset({Fisher})
        return frozenset({OutputGradients, Gram})

    def measure(
        self,
        weights: Sequence[Tensor],  # noqa: ARG002  (the metric is the gradients')
        stats: Statistics,
    ) -> Metric:
        """The layer's own Fisher. Raises LayerError if the loss does not depend on the layer."""
        if any(kind not in stats for kind in self.metric_needs):
            raise LayerError("the loss does not depend on it, so it has no Fisher; --exclude it")
        if self.metric is FisherMetric.ROWS:
            fisher_i = stats[Fisher].mean_i()
            damped_i = fisher_i + ridge(fisher_i, self.damping, "row of its Fisher")
            return Metric.diagonal(damped_i.sqrt())
        right = stats.once(
            ("metric of the gram", self.damping),
            lambda: Metric.of(add_ridge_(stats[Gram].mean_ii(), self.damping)),
        )
        left_oo = stats[OutputGradients].mean_oo()
        left_oo.diagonal().add_(ridge(left_oo.diagonal(), self.damping, "gradient of its outputs"))
        return replace(right, left_oo=cholesky(left_oo))
