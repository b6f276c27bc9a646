"""Plain SVD of the compression error: low-rank correction that does not look at the inputs.

Yao et al. 2023 (ZeroQuant-V2), arXiv:2303.08302, section 5 (low rank compensation). The baseline that shows what
EoRA's eigenspace adds: the same base, the same bytes, the metric I instead of G^1/2.
Shapes: o = out_features, i = in_features, r = rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from calibration.statistics.collection import Statistics
from compress.families.correction import Correction
from compress.families.low_rank import Metric
from compress.families.quantiser import Quantiser
from compress.methods.gptq import GPTQ


@dataclass(frozen=True, kw_only=True)
class SVDResidual(Correction, name="svd_residual"):
    """The best low-rank approximation of a base method's weight error, inputs ignored."""

    paper: ClassVar[str] = "Yao et al. 2023 (ZeroQuant-V2), arXiv:2303.08302"

    def measure(self, residual: Tensor, stats: Statistics) -> Metric:  # noqa: ARG002  (what this baseline does without)
        """The identity metric, where EoRA has the Gram matrix."""
        return Metric.identity(residual.shape[1], residual.device)

    def rounding(self, bits: int) -> Quantiser:
        """GPTQ at so many bits, as for EoRA, so that the two differ in the metric of the correction alone."""
        return GPTQ(bits=bits).for_factors()
