"""Options of a dictionary method, which of them go together, and the bytes that so many atoms take."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from compress.errors import RecipeError
from compress.families.base import Compressor, refuse_damping
from compress.families.budget import refuse_share
from compress.families.quantities import parse_bytes
from compress.families.sparse_storage import AtomDtype, CodeBits, CodeStorage
from compress.solvers.masks import Pattern
from compress.solvers.rank_allocation import Importance
from compress.solvers.sparse_coding import Coded

DEPTH = 2
"""Blocks in a row that share, where any do."""


class Share(enum.StrEnum):
    """Which layers have one dictionary."""

    NONE = "none"
    """Each its own."""
    INPUTS = "inputs"
    """Those that read the same tensor (q, k and v; gate and up): one metric, one product with the dictionary."""
    DEPTH = "depth"
    """Those, and their like in the blocks that follow: one dictionary, found under all of their metrics."""


class AtomAllocation(enum.StrEnum):
    """How atoms are spread over the layers."""

    UNIFORM = "uniform"
    """The same share of every layer's bytes."""
    ERRORS = "errors"
    """Where they remove most weighted error for their bytes, layers left dense among the choices."""


class Solver(enum.StrEnum):
    """How codes and atoms are found."""

    ADMM = "admm"
    """Codes by ADMM, atoms by least squares, in turn."""
    KSVD = "ksvd"
    """The paper's: codes of outputs by matching pursuit, atoms by K-SVD. Takes hundreds of times as long."""
    ONESHOT = "oneshot"
    """Principal components, their largest coefficients, one fit."""

    @property
    def iterates(self) -> bool:
        """Whether there are rounds."""
        return self is not Solver.ONESHOT


ROUNDS = {Solver.ADMM: 12, Solver.KSVD: 60}


@dataclass(frozen=True, kw_only=True)
class CoSpaDiOptions(Compressor, ABC):
    """Options of CoSpaDi."""

    keep: float = field(
        default=0.8,
        metadata={
            "metavar": "SHARE",
            "help": "share of the layers' bytes that is kept, above 0 and below 1",
        },
    )
    budget: str | None = field(
        default=None,
        metadata={
            "metavar": "BYTES",
            "help": "bytes of the whole checkpoint (120MB); takes the place of --keep",
        },
    )
    atoms: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "atoms of every dictionary; takes the place of --keep"},
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
        metadata={
            "metavar": "BLOCKS",
            "help": "blocks in a row that have dictionaries together, with --share depth",
        },
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
            parse_bytes(self.budget, "budget")
        if not 1 <= self.ratio < 1000:
            raise RecipeError(
                f"{self.ratio} atoms for each nonzero; 1 or more, 2.5 say", option="ratio"
            )
        for name in ("rounds", "atoms"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{value} is too small; 1 or more", option=name)
        refuse_idle(self)

    @property
    def codes_inputs(self) -> bool:
        """Whether the solver can."""
        return self.solver is not Solver.KSVD

    @property
    def joins_layers(self) -> bool:
        """Where layers share a dictionary."""
        return self.share is not Share.NONE

    @property
    def spans_blocks(self) -> bool:
        """Where layers of several blocks share one."""
        return self.share is Share.DEPTH

    @property
    def blocks_at_once(self) -> int:
        """Those that share one."""
        return self.depth if self.spans_blocks else 1

    def settled(self, dtype: AtomDtype, bits: CodeBits, coded: Coded, n_users: int) -> Self:
        """For a dictionary with so many users."""
        share, depth = (self.share, self.depth) if n_users > 1 else (Share.NONE, DEPTH)
        return replace(
            self, dictionary_dtype=dtype, code_bits=bits, coded=coded, share=share, depth=depth
        )

    def with_atoms(self, k: int) -> Self:
        """With nothing left to plan."""
        return replace(
            self,
            atoms=k,
            budget=None,
            allocation=AtomAllocation.UNIFORM,
            importance=Importance.RELATIVE,
        )

    @abstractmethod
    def reader(self) -> Compressor:
        """For a layer that reads the dictionary which a layer with this plan stores."""

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


def refuse_idle(method: CoSpaDiOptions) -> None:
    """Raises RecipeError for an option that others would leave without effect."""
    if method.pattern is Pattern.TWO_OF_FOUR and method.ratio not in (2.0, 2.5):
        raise RecipeError(
            f"{method.ratio} does nothing where two of every four are nonzero", option="ratio"
        )
    if method.share is Share.INPUTS and method.coded is Coded.INPUTS:
        raise RecipeError(
            "inputs have a dictionary of outputs, which layers with one input cannot share; "
            "give --share none, or depth",
            option="coded",
        )
    _refuse_idle_depth(method)
    if method.solver is Solver.ONESHOT and method.rounds is not None:
        raise RecipeError(f"{method.rounds} does nothing with --solver oneshot", option="rounds")
    if method.solver is Solver.KSVD and method.pattern is not Pattern.FREE:
        raise RecipeError(
            f"{method.pattern} is nothing that ksvd can find; use --solver admm", option="pattern"
        )
    if method.solver is Solver.KSVD and method.coded is Coded.INPUTS:
        raise RecipeError("ksvd codes outputs only; use --solver admm", option="coded")
    if method.atoms is not None and (method.budget or method.allocation is AtomAllocation.ERRORS):
        raise RecipeError(
            f"{method.atoms} for every dictionary leave a budget or a plan by errors nothing to do",
            option="atoms",
        )
    if method.allocation is AtomAllocation.UNIFORM and method.importance is not Importance.RELATIVE:
        raise RecipeError(
            f"{method.importance} serves --allocation errors, and does nothing in a uniform plan",
            option="importance",
        )


def _refuse_idle_depth(method: CoSpaDiOptions) -> None:
    if method.share is not Share.DEPTH and method.depth != DEPTH:
        raise RecipeError(f"{method.depth} does nothing without --share depth", option="depth")
    if method.depth < 2:
        raise RecipeError(f"{method.depth} blocks share nothing; 2 or more", option="depth")
    if method.share is Share.DEPTH and method.allocation is AtomAllocation.ERRORS:
        raise RecipeError(
            "errors are measured of dictionaries within a block; use uniform with --share depth",
            option="allocation",
        )
