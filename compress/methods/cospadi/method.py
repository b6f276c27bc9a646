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
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from calibration.gradients import GradientEnergy
from calibration.stats import Gram, Statistic, Statistics
from compress.errors import LayerError, RecipeError
from compress.families.base import Compressor, LayerShape, Survey, Trial, refuse_damping
from compress.families.budget import refuse_share
from compress.families.quantities import parse_bytes
from compress.families.sparse_storage import AtomDtype, CodeBits, CodeStorage, joined
from compress.forms.factorised import Common, Form, Shared, Sparse
from compress.methods.cospadi.curves import curves, lost_at, trials
from compress.methods.cospadi.options import ROUNDS, Solver, refuse_idle
from compress.methods.cospadi.planner import DEPTH, AtomAllocation, AtomPlanner, Share, shared_by
from compress.methods.cospadi.stacking import stacked
from compress.solvers.dictionary_learning import alternating, oneshot
from compress.solvers.ksvd import ksvd
from compress.solvers.masks import Pattern
from compress.solvers.rank_allocation import Importance
from compress.solvers.sparse_coding import Coded, FreeLines, Lines


@dataclass(frozen=True, kw_only=True)
class CoSpaDi(Compressor, name="cospadi"):
    """A dictionary and sparse codes, fitted to the layer's outputs."""

    paper: ClassVar[str] = "Shopkhoev et al. 2025 (CoSpaDi), arXiv:2509.22075"

    keep: float = field(
        default=0.8,
        metadata={"help": "share of the layers' bytes that is kept, above 0 and below 1"},
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "bytes of the whole checkpoint (120MB); takes the place of --keep"},
    )
    atoms: int | None = field(
        default=None,
        metadata={"help": "atoms of every dictionary; takes the place of --keep"},
    )
    ratio: float = field(
        default=2.5, metadata={"help": "atoms for each nonzero of a code (k / s), 1 or more"}
    )
    pattern: Pattern = field(
        default=Pattern.FREE,
        metadata={"help": "where nonzeros may be: anywhere in a line, or two of every four"},
    )
    coded: Coded = field(
        default=Coded.AUTO,
        metadata={"help": "what has a code each: outputs, inputs, or the more numerous"},
    )
    share: Share = field(
        default=Share.INPUTS, metadata={"help": "which layers have one dictionary together"}
    )
    depth: int = field(
        default=DEPTH,
        metadata={"help": "blocks in a row that have dictionaries together, with --share depth"},
    )
    allocation: AtomAllocation = field(
        default=AtomAllocation.UNIFORM, metadata={"help": "how atoms are spread over the layers"}
    )
    importance: Importance = field(
        default=Importance.RELATIVE,
        metadata={"help": "what a unit of a layer's error costs in a plan by errors"},
    )
    solver: Solver = field(
        default=Solver.ADMM, metadata={"help": "how the dictionary and the codes are found"}
    )
    rounds: int | None = field(
        default=None,
        metadata={"help": "rounds of codes and dictionary in turn; default: 12, 60 for ksvd"},
    )
    dictionary_dtype: AtomDtype = field(
        default=AtomDtype.AUTO,
        metadata={"help": "dtype of the stored dictionary; auto: the weight's own"},
    )
    code_bits: CodeBits = field(
        default=CodeBits.AUTO,
        metadata={"help": "bits of a nonzero of the codes; auto: as the dictionary"},
    )
    damping: float = field(
        default=0.01, metadata={"help": "ridge on the Gram, as a share of its median diagonal"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)
        refuse_share(self.keep)
        if self.budget is not None:
            parse_bytes(self.budget, "method.budget")
        if not 1 <= self.ratio < 1000:
            raise RecipeError(
                f"method.ratio: {self.ratio} atoms for each nonzero; 1 or more, 2.5 say"
            )
        for name in ("rounds", "atoms"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"method.{name}: {value} is too small; 1 or more")
        refuse_idle(self)

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """What a plan by errors compares layers by; nothing but who reads the same tensor, if layers share."""
        if self.allocation is AtomAllocation.UNIFORM:
            return frozenset() if self.joins_layers else None
        fisher = {GradientEnergy} if self.importance is Importance.FISHER else set()
        return frozenset({Gram, *fisher})

    @property
    def weighs_by_divergence(self) -> bool:
        """Where errors cost what they were measured to do."""
        return self.allocation is AtomAllocation.ERRORS and self.importance is Importance.KL

    @property
    def codes_inputs(self) -> bool:
        """Whether the solver can."""
        return self.solver is not Solver.KSVD

    @property
    def joins_layers(self) -> bool:
        """Where layers share a dictionary."""
        return self.share is not Share.NONE

    def shared_by(self, name: str, layer: LayerShape) -> object:
        """The input that layers read, or its place in blocks in a row."""
        return shared_by(self, name, layer)

    @property
    def spans_blocks(self) -> bool:
        """Where layers of several blocks share one."""
        return self.share is Share.DEPTH

    @property
    def blocks_at_once(self) -> int:
        """Those that share one."""
        return self.depth if self.spans_blocks else 1

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """A curve of each weight's error, where the plan compares any."""
        if self.allocation is AtomAllocation.UNIFORM:
            return [Survey() for _ in weights]
        return curves(self, weights, stats)

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """At the share of the bytes that `keep` says, after the first rounds."""
        return trials(self, weights, surveys, stats)

    def predicted_error(self, layer: LayerShape) -> float | None:
        """What the curve tells of a planned layer, an upper bound for `admm`; None without one."""
        if layer.survey is None or not layer.survey.points or not self.atoms:
            return None
        energy = layer.survey.energy
        return math.sqrt(lost_at(layer.survey, self.atoms) / energy) if energy > 0 else 0.0

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """Settle atoms, sides and dtypes, and who shares. Raises RecipeError naming the layer that gets no atom."""
        return AtomPlanner(self, layers, rest_bytes).planned()

    def settled(self, dtype: AtomDtype, bits: CodeBits, coded: Coded, n_users: int) -> CoSpaDi:
        """For a dictionary with so many users."""
        share, depth = (self.share, self.depth) if n_users > 1 else (Share.NONE, DEPTH)
        return replace(
            self, dictionary_dtype=dtype, code_bits=bits, coded=coded, share=share, depth=depth
        )

    def with_atoms(self, k: int) -> CoSpaDi:
        """With nothing left to plan."""
        return replace(
            self,
            atoms=k,
            budget=None,
            allocation=AtomAllocation.UNIFORM,
            importance=Importance.RELATIVE,
        )

    def reader(self) -> _Reader:
        """For a layer that reads the dictionary which a layer with this plan stores."""
        return _Reader(**{entry.name: getattr(self, entry.name) for entry in fields(self)})

    def nonzeros(self, k: int) -> int:
        """Of a line, with k atoms."""
        if self.pattern is Pattern.TWO_OF_FOUR:
            return k // 2
        return max(1, round(k / self.ratio))

    @property
    def storage(self) -> CodeStorage:
        """What is stored in what, once planned."""
        return CodeStorage(getattr(torch, self.dictionary_dtype.value), self.code_bits)

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """The dictionary, the values of the codes, and their mask."""
        return self.bytes_of([shape], self.atoms or 0)

    def bytes_of(self, shapes: Sequence[tuple[int, int]], k: int) -> int:
        """Of layers with one dictionary."""
        o, i = shapes[0]
        dictionary = (k, i) if self.coded is Coded.OUTPUTS else (o, k)
        return self.storage.dictionary_bytes(dictionary) + sum(
            self.code_bytes(shape, k) for shape in shapes
        )

    def code_bytes(self, shape: tuple[int, int], k: int) -> int:
        """Of one layer's codes for k atoms."""
        n = shape[0 if self.coded is Coded.OUTPUTS else 1]
        return self.storage.code_bytes(n, k, self.nonzeros(k), self.pattern)

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """One dictionary for all weights, which the first form stores; or each weight's own."""
        if self.share is Share.NONE:
            alone = (self._fitted([weight], stats) for weight in weights)
            return [joined(codes, dictionary) for [codes], dictionary in alone]
        codes, dictionary = self._fitted(weights, stats)
        n_readers = max(len(part) for part, _ in stats.by_input(weights))
        common = Common(dictionary, n_readers)
        readers = [Shared(common.shape, "", common) for _ in weights[1:]]
        return [joined(each, form) for each, form in zip(codes, [common, *readers], strict=True)]

    def _fitted(self, weights: Sequence[Tensor], stats: Statistics) -> tuple[list[Sparse], Form]:
        """Each weight's codes and the dictionary, as they are stored."""
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
        """The owner's plan."""
        return CoSpaDi(**{entry.name: getattr(self, entry.name) for entry in fields(self)})

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """The codes."""
        return self.code_bytes(shape, self.atoms or 0)

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:  # noqa: ARG002
        """Raises LayerError: without the layer that stores the dictionary there is none."""
        raise LayerError("the layer that was to store its dictionary could not be compressed")
