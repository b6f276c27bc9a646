"""LQER: low-rank correction of a compressed weight with each input scaled by how large it is.

Zhang et al. 2024 (LQER), arXiv:2402.02446, section 3.2; with `--scale rms` the closed form for uncorrelated inputs of
Zhang et al. 2024 (QERA-approx), arXiv:2410.06040, theorem 2. Needs: Gram, or the mean of |x|, and what its base needs.
Cost: one symmetric eigenproblem of min(o, i) for each weight. Between the plain SVD of the error, which does not look
at the inputs, and EoRA, which knows how they go together.

Differs from the authors' codes: every token weighs the same (LQER takes the largest mean magnitude of any sample);
channels that were never active count a little (theirs are cut off at 1e-4, whatever the scale); factors are balanced
before they are rounded to 16 bits, and after rounding A, B is refitted.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from calibration.statistics.abs_mean import AbsMean
from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from compress.families.correction import Correction
from compress.families.low_rank import Metric
from compress.families.quantiser import Quantiser
from compress.methods.gptq import GPTQ
from compress.solvers.linalg import refuse_dead

RIDGE = 1e-3


class Scale(enum.StrEnum):
    """The measure of an input's size."""

    RMS = "rms"
    """The root mean square: the optimum where inputs are uncorrelated (QERA-approx)."""
    MEAN_ABS = "mean-abs"
    """The mean magnitude, as in LQER."""


@dataclass(frozen=True, kw_only=True)
class LQER(Correction, name="lqer"):
    """The low-rank correction of a base method's error with each input weighted by its size."""

    paper: ClassVar[str] = "Zhang et al. 2024 (LQER), arXiv:2402.02446"

    scale: Scale = field(default=Scale.RMS, metadata={"help": "measure of an input's size"})

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The statistics of every correction, and the mean magnitudes if they are the scale."""
        return super().needs | ({AbsMean} if self.scale is Scale.MEAN_ABS else set())

    def measure(self, residual: Tensor, stats: Statistics) -> Metric:  # noqa: ARG002  (the metric is the statistics')
        """The diagonal metric of the inputs' sizes. Raises LayerError if no input was ever active."""
        size_i = self._sizes(stats)
        refuse_dead(size_i)
        return Metric.diagonal(size_i + RIDGE * size_i[size_i > 0].median())

    def rounding(self, bits: int) -> Quantiser:
        """GPTQ at so many bits, as for EoRA, so that the two differ in the metric of the correction alone."""
        return GPTQ(bits=bits).for_factors()

    def _sizes(self, stats: Statistics) -> Tensor:
        """The size of each input: (i,), fp64."""
        if self.scale is Scale.MEAN_ABS:
            size_i: Tensor = stats[AbsMean].mean_i()
            return size_i
        return self.moments(stats).diagonal().sqrt()
