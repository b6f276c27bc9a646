"""ADMM pruning: which weights stay and what they become, found together under the inputs' second moments.

Boza 2024, arXiv:2401.02938 ("Fast and effective weight update for pruned large language models"). Needs: Gram. For
every row of W (o, i) it looks for s nonzeros with the least ||(W - W') L||, L L^T = G: ADMM, whose steps are a product
with (G + rho I)^-1 and the s largest entries, then conjugate gradients on the weights that stay. Cost: one Cholesky
factor of G for each distinct input; for each weight 10 inverses (i^3) and some 40 products of o x i by i x i.

Differs from the authors' code: G is scaled to a diagonal of ones and damped by its median; rho grows tenfold (theirs
stays, and the number of zeros grows); the last step is conjugate gradients (theirs: more of ADMM's own).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from compress.families.base import refuse_damping
from compress.families.pruner import Pruner
from compress.methods.cospadi.stacking import damped
from compress.solvers.linalg import cholesky
from compress.solvers.masks import largest
from compress.solvers.sparse_coding import FreeLines, Steps

PENALTIES = [0.1 * 10 ** (level / 9) for level in range(10)]
"""Small at first, so that the mask can change, then so large that weights and mask agree. Squared errors of the demo
model's layers against 30 steps at one penalty: 0.95 times those at 1, 0.7 at .3."""
STEPS, POLISH_STEPS = 3, 10


@dataclass(frozen=True, kw_only=True)
class ADMM(Pruner, name="admm"):
    """Pruning whose mask and remaining weights are found together."""

    paper: ClassVar[str] = "Boza 2024, arXiv:2401.02938"

    damping: float = field(
        default=0.01,
        metadata={"help": "ridge on the Gram matrix, as a share of its median diagonal"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)

    def pruned(self, weight_oi: Tensor, s: int, stats: Statistics) -> Tensor:
        """The weight (o, i) with s nonzeros in every row, by ADMM on its rows in the scaled Gram matrix."""
        factor_ii, root_i = stats.once(("scaled factor", self.damping), lambda: self._scaled(stats))
        scaled = weight_oi * root_i
        lines = FreeLines(scaled @ factor_ii)
        found, dual = scaled * largest(scaled, s, self.pattern), torch.zeros_like(scaled)
        for penalty, following in zip(PENALTIES, [*PENALTIES[1:], 1.0], strict=True):
            steps = Steps(STEPS, penalty)
            found = lines.code(factor_ii, found, s, self.pattern, steps, dual)
            dual *= penalty / following
        return lines.polished(factor_ii, found, POLISH_STEPS) / root_i

    def _scaled(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of the Gram matrix scaled to a diagonal of ones, and the roots of its diagonal before."""
        gram_ii = damped(stats, self.damping)
        root_i = gram_ii.diagonal().sqrt()
        gram_ii /= root_i * root_i[:, None]
        return cholesky(gram_ii).float(), root_i.float()
