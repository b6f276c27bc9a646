"""CoSpaDi: a dictionary instead of a subspace, every line of the weight a sparse combination of its atoms.

Shopkhoev et al. 2025, arXiv:2509.22075 (CoSpaDi: calibration-guided sparse dictionary learning). Needs: Gram. For
W (o, i) and G = L L^T it looks for W' = Z D with the least ||(W - Z D) L||_F, D (k, i), and s nonzeros in every row of
Z (o, k) (equations 2, 5, 6, of the transposed weight); or W' = D Z, D (o, k), and s nonzeros in every column of
Z (k, i), where that dictionary is the smaller one. Cost: one Cholesky of G, or one eigendecomposition of it, for each
input, and for each round some three products of k x k by k x n.

Differs from the paper, whose code is not public: bytes are those on disk, the mask included (theirs leave it out unless
codes have 14 bits); the solver is ADMM for the codes and least squares for the atoms (theirs, batched matching pursuit
and K-SVD, is `--solver ksvd`); codes of inputs are ours; after rounding the codes the dictionary is refitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from calibration.statistics.gradient_energy import GradientEnergy
from calibration.statistics.gram import Gram
from compress.errors import LayerError
from compress.families.base import Compressor, LayerShape, Survey, Trial
from compress.families.sparse_storage import joined
from compress.forms.base import Form
from compress.forms.shared import Common, Shared
from compress.forms.sparse import Sparse
from compress.methods.cospadi.curves import curves, lost_at, trials
from compress.methods.cospadi.options import ROUNDS, AtomAllocation, CoSpaDiOptions, Share, Solver
from compress.methods.cospadi.planner import AtomPlanner
from compress.methods.cospadi.stacking import stacked
from compress.solvers.dictionary_learning import alternating, oneshot
from compress.solvers.ksvd import ksvd
from compress.solvers.rank_allocation import Importance
from compress.solvers.sparse_coding import FreeLines, Lines


@dataclass(frozen=True, kw_only=True)
class CoSpaDi(CoSpaDiOptions, name="cospadi"):
    """Dictionary learning: a dictionary and sparse codes, fitted to the layer's outputs."""

    paper: ClassVar[str] = "Shopkhoev et al. 2025 (CoSpaDi), arXiv:2509.22075"

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """The statistics of a survey of error curves; none but which layers share an input, if only that matters."""
        if self.resolved_allocation is AtomAllocation.UNIFORM:
            return frozenset() if self.joins_layers else None
        fisher = {GradientEnergy} if self.resolved_importance is Importance.FISHER else set()
        return frozenset({Gram, *fisher})

    @property
    def weighs_by_divergence(self) -> bool:
        """Whether errors are weighted by the KL divergence that they were measured to cause."""
        return (
            self.resolved_allocation is AtomAllocation.ERRORS
            and self.resolved_importance is Importance.KL
        )

    def owners(self, layers: Mapping[str, LayerShape]) -> Mapping[str, str]:
        """The layers that read another's dictionary, each with the one that stores it."""
        return AtomPlanner(self, layers, 0).owners()

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """The error curve of each weight, if the plan compares any."""
        if self.resolved_allocation is AtomAllocation.UNIFORM:
            return [Survey() for _ in weights]
        return curves(self, weights, stats)

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """Trials of each weight with a dictionary at the share of bytes that `keep` says, after the first rounds."""
        return trials(self, weights, surveys, stats)

    def predicted_error(self, layer: LayerShape) -> float | None:
        """The relative error that the curve predicts for a planned layer (at most, for `admm`); None without one."""
        if layer.survey is None or not layer.survey.points or not self.atoms:
            return None
        energy = layer.survey.energy
        return math.sqrt(lost_at(layer.survey, self.atoms) / energy) if energy > 0 else 0.0

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """Each layer's method with atoms, side, dtypes and sharing settled.

        Raises RecipeError naming a layer without atoms.
        """
        return AtomPlanner(self, layers, rest_bytes).planned()

    def reader(self) -> _Reader:
        """The method of a layer that reads the dictionary which a layer of this method stores."""
        return _Reader(**{entry.name: getattr(self, entry.name) for entry in fields(self)})

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """One dictionary for all weights, stored in the first form; or a dictionary for each weight."""
        if self.share is Share.NONE:
            alone = (self._fitted([weight], stats) for weight in weights)
            return [joined(codes, dictionary) for [codes], dictionary in alone]
        codes, dictionary = self._fitted(weights, stats)
        n_readers = max(len(part) for part, _ in stats.by_input(weights))
        common = Common(dictionary, n_readers)
        readers = [Shared(common.shape, "", common) for _ in weights[1:]]
        return [joined(each, form) for each, form in zip(codes, [common, *readers], strict=True)]

    def _fitted(self, weights: Sequence[Tensor], stats: Statistics) -> tuple[list[Sparse], Form]:
        """The codes of each weight and their dictionary, in the storage of the plan."""
        k = self.atoms or 0
        s = self.nonzeros(k)
        stack = stacked(weights, stats, self.coded, self.damping)
        codes = stack.codes(self._solved(stack.lines(), k, s), s, self.pattern)
        stored = [self.storage.codes(each, s, self.pattern, stack.along) for each in codes]
        dictionary = stack.dictionary([each.dense() for each in stored])
        return stored, self.storage.dictionary(dictionary)

    def _solved(self, lines: Lines, k: int, s: int) -> Tensor:
        """The codes (n, k)."""
        if self.solver is Solver.ONESHOT:
            return oneshot(lines, k, s, self.pattern)[0]
        n_rounds = self.rounds or ROUNDS[self.solver]
        if self.solver is Solver.KSVD and isinstance(lines, FreeLines):
            return ksvd(lines, k, s, n_rounds)[0]
        return alternating(lines, k, s, self.pattern, n_rounds)[0]


@dataclass(frozen=True, kw_only=True)
class _Reader(CoSpaDi):
    """A planned layer whose dictionary another layer stores."""

    @property
    def together(self) -> Compressor:
        """The method of the layer that stores the dictionary."""
        return CoSpaDi(**{entry.name: getattr(self, entry.name) for entry in fields(self)})

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the layer's codes."""
        return self.code_bytes(shape, self.atoms or 0)

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:  # noqa: ARG002
        """Raises LayerError: without the layer that stores the dictionary there is none."""
        raise LayerError("the layer that was to store its dictionary could not be compressed")
