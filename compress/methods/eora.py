"""EoRA: low-rank repair of a compressed weight in the eigenspace of its inputs.

Liu et al. 2024, arXiv:2410.21271, algorithm 1 and theorem 1; the same optimum is QERA-exact (Zhang et al. 2024,
arXiv:2410.06040) and CALDERA's lemma 4.2 (Saha et al. 2024, arXiv:2405.18886). Needs: Gram, and what its base needs.
Cost: one Cholesky (i^3) for each distinct input and one symmetric eigenproblem of min(o, i) for each weight.
Shapes: o = out_features, i = in_features, r = rank.

Exact: B A minimises ||(W - W' - B A) X||_F over all rank-r paths; any factor L of the Gram, L L^T = G, gives the same
product, so a Cholesky factor serves and an eigendecomposition of G is not needed. Differs from the authors' code:
every token weighs the same (theirs forgets early batches: the first of 64 weighs 0.377 of the last), damping is a
ridge relative to the median of diag(G) (theirs replaces negative eigenvalues only), factors are balanced before they
are rounded to 16 bits, and after rounding A, B is refitted in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from calibration.stats import Statistics
from compress.compressor import Compressor, refuse_damping
from compress.factors import Metric
from compress.linalg import add_ridge_
from compress.methods.gptq import GPTQ
from compress.quantiser import Quantiser
from compress.repair import Repair


@dataclass(frozen=True, kw_only=True)
class EoRA(Repair, name="eora"):
    """The exact low-rank repair of what a base method lost on the calibration inputs."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2410.21271"

    base: Compressor = field(
        default_factory=GPTQ, metadata={"help": "method whose error is repaired"}
    )
    damping: float = field(
        default=0.01, metadata={"help": "ridge on the Gram, as a share of its median diagonal"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)

    def measure(self, residual: Tensor, stats: Statistics) -> Metric:  # noqa: ARG002  (the metric is the inputs')
        """One Cholesky factor for all layers with one input, whatever their ranks."""
        return stats.once(
            ("metric of a repair", self.shifts_outputs, self.guard, self.damping),
            lambda: Metric.of(add_ridge_(self.moments(stats), self.damping)),
        )

    def rounding(self, bits: int) -> Quantiser:
        """GPTQ: A by the Gram of the inputs, B by that of A x."""
        return GPTQ(bits=bits, damping=self.damping).for_factors()
