"""Plain SVD of the compression error: low-rank repair that does not look at the inputs.

Yao et al. 2023 (ZeroQuant-V2), arXiv:2303.08302, section 5 (low rank compensation). The baseline that shows what
EoRA's eigenspace adds: the same base, the same bytes, the metric I instead of G^1/2.
Shapes: o = out_features, i = in_features, r = rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from calibration.stats import Statistics
from compress.compressor import Compressor
from compress.factors import Metric, best_low_rank
from compress.forms import LowRank
from compress.methods.gptq import GPTQ
from compress.repair import Repair


@dataclass(frozen=True, kw_only=True)
class SVDResidual(Repair, name="svd_residual"):
    """The best low-rank approximation of a base method's weight error, inputs ignored."""

    paper: ClassVar[str] = "Yao et al. 2023 (ZeroQuant-V2), arXiv:2303.08302"

    base: Compressor = field(
        default_factory=GPTQ, metadata={"help": "method whose error is repaired"}
    )

    def repair(
        self,
        residuals: Sequence[Tensor],
        stats: Statistics,  # noqa: ARG002  (what this baseline does without)
    ) -> list[LowRank]:
        """EoRA's computation with the identity in the place of the Gram."""
        metric = Metric.identity(residuals[0].shape[1], residuals[0].device)
        return [best_low_rank(one, metric, self.rank, self.storage) for one in residuals]
