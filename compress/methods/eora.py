"""EoRA: low-rank correction of a compressed weight in the eigenspace of its inputs.

Liu et al. 2024, arXiv:2410.21271, algorithm 1 and theorem 1; the same optimum is QERA-exact (Zhang et al. 2024,
arXiv:2410.06040) and CALDERA's lemma 4.2 (Saha et al. 2024, arXiv:2405.18886). Needs: Gram, and what its base needs.
Cost: one Cholesky (i^3) for each distinct input and one symmetric eigenproblem of min(o, i) for each weight.
Shapes: o = out_features, i = in_features, r = rank.

Exact: B A minimises ||(W - W' - B A) X||_F over all matrices of rank r; any factor L of the Gram, L L^T = G, gives the
same product, so a Cholesky factor serves and an eigendecomposition of G is not needed. Differs from the authors' code:
every token weighs the same (theirs forgets early batches: the first of 64 weighs 0.377 of the last), the Gram is
shrunk towards its diagonal (see `linalg.shrink_`; with `shrinkage` 0 it is theirs), damping is a ridge relative to the
median of diag(G) (theirs replaces negative eigenvalues only), factors are balanced before they are rounded to 16 bits,
and after rounding A, B is refitted in closed form.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from calibration.statistics.output_gradients import OutputGradients
from compress.errors import LayerError
from compress.families.base import refuse_damping, refuse_shrinkage
from compress.families.correction import Correction
from compress.families.low_rank import Metric
from compress.families.quantiser import Quantiser
from compress.methods.gptq import GPTQ
from compress.solvers.linalg import cholesky, conditioned_, ridge


class OutputSide(enum.StrEnum):
    """The weighting of errors by the output they occur in."""

    NONE = "none"
    """Every output counts the same, as in the paper."""
    FISHER = "fisher"
    """Outputs count by the loss's gradients: min ||F^1/2 (W - W' - B A) G^1/2||, F their second moments (K-FAC)."""


@dataclass(frozen=True, kw_only=True)
class EoRA(Correction, name="eora"):
    """The exact low-rank correction of a base method's error on the calibration inputs."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2410.21271"

    damping: float = field(
        default=0.01,
        metadata={"help": "ridge on the Gram matrix, as a share of its median diagonal"},
    )
    shrinkage: float = field(
        default=0.1,
        metadata={"help": "shrinks the off-diagonal of the Gram by this share (0.1: by 10 %)"},
    )
    output_side: OutputSide = field(
        default=OutputSide.NONE,
        metadata={
            "help": "fisher: weight errors by the second moments of the loss's gradients at the outputs, which takes a "
            "backward pass"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)
        refuse_shrinkage(self.shrinkage)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The statistics of every correction, and gradients by the outputs if these count."""
        gradients = {OutputGradients} if self.output_side is OutputSide.FISHER else set()
        return super().needs | gradients

    def measure(self, residual: Tensor, stats: Statistics) -> Metric:  # noqa: ARG002  (the metric is the statistics')
        """One Cholesky factor for all layers with one input, whatever their ranks; the output side is each layer's own.

        Raises LayerError if the loss does not depend on the layer.
        """
        right = stats.once(
            (
                "metric of a correction",
                self.shifts_outputs,
                self.holdout,
                self.damping,
                self.shrinkage,
            ),
            lambda: Metric.of(conditioned_(self.moments(stats), self.shrinkage, self.damping)),
        )
        if self.output_side is OutputSide.NONE:
            return right
        if OutputGradients not in stats:
            raise LayerError("the loss does not depend on it, so it has no Fisher; --exclude it")
        left_oo = stats[OutputGradients].mean_oo()
        left_oo.diagonal().add_(ridge(left_oo.diagonal(), self.damping, "gradient of its outputs"))
        return replace(right, left_oo=cholesky(left_oo))

    def rounding(self, bits: int) -> Quantiser:
        """GPTQ at so many bits: A by the Gram matrix of the inputs, B by that of A x."""
        quantiser = GPTQ(bits=bits, damping=self.damping, shrinkage=self.shrinkage)
        return quantiser.for_factors()
