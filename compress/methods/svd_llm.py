"""SVD-LLM, training-free: truncated SVD of the whitened weight.

Wang et al. 2025, arXiv:2403.07378, section 3.1 (truncation-aware data whitening), without the LoRA of its section 3.2.
Needs: Gram. Cost: one Cholesky (i^3 / 3) for each distinct input and one symmetric eigenproblem of min(o, i) for each
weight.

Exact: the loss squared on the calibration inputs is the tail of the whitened spectrum. DRONE (Chen et al. 2021) and the
uncentred output PCA reach the same optimum. Differs from the authors' code: their Gram is fp32 and on failure gets
(-lambda_min + 1e-6) I, which knows no scale; ours is fp64 with a ridge relative to its median diagonal. They invert the
Cholesky factor and take a full SVD in fp32; here it is never inverted where o <= i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.families.base import refuse_damping
from compress.families.factorisation import Factorisation
from compress.families.low_rank import Metric
from compress.solvers.linalg import add_ridge_


@dataclass(frozen=True, kw_only=True)
class SVDLLM(Factorisation, name="svd_llm"):
    """The rank-r weight nearest in its outputs on the calibration text."""

    paper: ClassVar[str] = "Wang et al. 2025 (SVD-LLM), arXiv:2403.07378"

    damping: float = field(
        default=0.01,
        metadata={"help": "ridge on the Gram matrix, as a share of its median diagonal"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)

    def measure(
        self,
        weights: Sequence[Tensor],  # noqa: ARG002  (the metric is the inputs')
        stats: Statistics,
    ) -> Metric:
        """The metric of the inputs' damped second moments."""
        return stats.once(
            ("metric of the gram", self.damping),
            lambda: Metric.of(add_ridge_(stats[Gram].mean_ii(), self.damping)),
        )
