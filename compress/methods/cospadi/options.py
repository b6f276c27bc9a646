"""Options of a dictionary method, which of them go together, and the bytes that so many atoms take."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from compress.errors import RecipeError
from compress.families.base import Compressor, refuse_damping
from compress.families.budget import KEEP, parse_bytes, refuse_keep
from compress.families.sparse_storage import AtomDtype, CodeBits, CodeStorage
from compress.solvers.masks import Pattern
from compress.solvers.rank_allocation import Importance
from compress.solvers.sparse_coding import Coded

RATIO = 2.5
DEPTH = 2
"""Default number of consecutive blocks that share a dictionary."""


class Share(enum.StrEnum):
    """Layers that share a dictionary."""

    NONE = "none"
    """Every layer has its own dictionary."""
    INPUTS = "inputs"
    """Layers that read the same tensor (q, k and v; gate and up) share one, under one metric."""
    DEPTH = "depth"
    """Layers share as with inputs, and with the same layers of the next blocks, under all of their metrics."""
    EXPERTS = "experts"
    """Layers share as with inputs, and those of experts with the same layers of their block's other experts."""

    @property
    def spans_inputs(self) -> bool:
        """Whether layers of several inputs share."""
        return self in (Share.DEPTH, Share.EXPERTS)


class AtomAllocation(enum.StrEnum):
    """The allocation of atoms to layers."""

    UNIFORM = "uniform"
    """Every layer keeps the same share of its bytes."""
    ERRORS = "errors"
    """Atoms go where they remove most weighted error for their bytes; layers may stay dense."""


class Solver(enum.StrEnum):
    """The solver for dictionary and codes."""

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
    """The options of CoSpaDi, with the refusal of those that do not go together."""

    keep: float | None = field(
        default=None,
        metadata={
            "resolves_to": KEEP,
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
    ratio: float | None = field(
        default=None,
        metadata={
            "resolves_to": RATIO,
            "help": "atoms for each nonzero of a code (k / s), 1 or more; with --pattern 2:4 it is 2",
        },
    )
    pattern: Pattern = field(
        default=Pattern.FREE,
        metadata={"help": "where nonzeros may be: anywhere in a line, or two of every four"},
    )
    coded: Coded = field(
        default=Coded.AUTO,
        metadata={
            "help": "which side has a code for each line: outputs, inputs, or the more numerous"
        },
    )
    share: Share = field(
        default=Share.INPUTS,
        metadata={
            "help": "which layers share a dictionary: those of one input; depth and experts: these, and the same "
            "layers of the next blocks, or of the block's other experts"
        },
    )
    depth: int | None = field(
        default=None,
        metadata={
            "resolves_to": DEPTH,
            "metavar": "BLOCKS",
            "help": "with --share depth: how many consecutive blocks share dictionaries, 2 or more",
        },
    )
    allocation: AtomAllocation | None = field(
        default=None,
        metadata={
            "resolves_to": AtomAllocation.UNIFORM,
            "help": "how atoms are spread over the layers",
        },
    )
    importance: Importance | None = field(
        default=None,
        metadata={
            "resolves_to": Importance.RELATIVE,
            "help": "what a unit of a layer's error costs with --allocation errors",
        },
    )
    solver: Solver = field(
        default=Solver.ADMM, metadata={"help": "how the dictionary and the codes are found"}
    )
    rounds: int | None = field(
        default=None,
        metadata={"help": "rounds of codes and dictionary in turn: 12 if not given, with ksvd 60"},
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
        default=0.01,
        metadata={"help": "ridge on the Gram matrix, as a share of its median diagonal"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)
        refuse_keep(self.keep)
        if self.budget is not None:
            parse_bytes(self.budget, "budget")
        if self.ratio is not None and not 1 <= self.ratio < 1000:
            raise RecipeError(
                f"must be at least 1 and below 1000 (e.g. {RATIO}), got {self.ratio}",
                option="ratio",
            )
        for name, least in {"rounds": 1, "atoms": 1, "depth": 2}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"must be {least} or more, got {value}", option=name)
        self._refuse_clashes()

    def idle(self) -> Mapping[str, str]:
        """The options without effect beside those that were given.

        A number of atoms for every dictionary leaves nothing to spread; a budget takes the place of the share; the
        others are for one pattern, share, solver or allocation.
        """
        found: dict[str, str] = {}
        if self.atoms is not None:
            reason = (
                f"beside --atoms {self.atoms}, which is for every dictionary; give one of the two"
            )
            found |= dict.fromkeys(("keep", "budget", "allocation", "importance"), reason)
        elif self.budget is not None:
            found["keep"] = f"beside --budget {self.budget}; give one of the two"
        if self.pattern is Pattern.TWO_OF_FOUR:
            found["ratio"] = f"with --pattern {self.pattern}, where two of every four are nonzero"
        if self.share is not Share.DEPTH:
            found["depth"] = f"with --share {self.share}; it is for --share depth"
        if not self.solver.iterates:
            found["rounds"] = f"with --solver {self.solver}, which has no rounds"
        if self.resolved_allocation is AtomAllocation.UNIFORM:
            found.setdefault(
                "importance", "with --allocation uniform; it is for --allocation errors"
            )
        return found

    def _refuse_clashes(self) -> None:
        """Raises RecipeError for options that cannot go together."""
        if self.share is Share.INPUTS and self.coded is Coded.INPUTS:
            raise RecipeError(
                "with a code for each input the dictionary is in the space of the outputs, which layers "
                "that read one input cannot share; use --share none, depth or experts",
                option="coded",
            )
        if self.share.spans_inputs and self.allocation is AtomAllocation.ERRORS:
            raise RecipeError(
                "errors are measured of dictionaries of one input; use --allocation uniform with "
                f"--share {self.share}",
                option="allocation",
            )
        if self.solver is Solver.KSVD and self.pattern is not Pattern.FREE:
            raise RecipeError(
                f"--solver ksvd does not support pattern {self.pattern}; use --solver admm",
                option="pattern",
            )
        if self.solver is Solver.KSVD and self.coded is Coded.INPUTS:
            raise RecipeError(
                "--solver ksvd does not support a code for each input; use --solver admm",
                option="coded",
            )

    def default_of(self, name: str) -> object:
        """The default of an option; the default of `rounds` depends on the solver."""
        return ROUNDS.get(self.solver) if name == "rounds" else super().default_of(name)

    @property
    def resolved_keep(self) -> float:
        """The share of bytes to keep: the given one, or the default."""
        return KEEP if self.keep is None else self.keep

    @property
    def resolved_ratio(self) -> float:
        """The number of atoms for each nonzero: the given one, or the default."""
        return RATIO if self.ratio is None else self.ratio

    @property
    def resolved_allocation(self) -> AtomAllocation:
        """The allocation of atoms: the given one, or the default."""
        return AtomAllocation.UNIFORM if self.allocation is None else self.allocation

    @property
    def resolved_importance(self) -> Importance:
        """The importance of a layer's error: the given one, or the default."""
        return Importance.RELATIVE if self.importance is None else self.importance

    @property
    def resolved_depth(self) -> int:
        """The number of consecutive blocks that share dictionaries: the given one, or the default."""
        return DEPTH if self.depth is None else self.depth

    @property
    def codes_inputs(self) -> bool:
        """Whether the solver supports a code for each input."""
        return self.solver is not Solver.KSVD

    @property
    def joins_layers(self) -> bool:
        """Whether layers share dictionaries."""
        return self.share is not Share.NONE

    @property
    def blocks_at_once(self) -> int:
        """The number of blocks that share dictionaries."""
        return self.resolved_depth if self.share is Share.DEPTH else 1

    def settled(self, dtype: AtomDtype, bits: CodeBits, coded: Coded, n_users: int) -> Self:
        """The method of layers with one dictionary: dtypes and side settled, sharing off for a single user."""
        share, depth = (self.share, self.depth) if n_users > 1 else (Share.NONE, None)
        return replace(
            self, dictionary_dtype=dtype, code_bits=bits, coded=coded, share=share, depth=depth
        )

    def with_atoms(self, k: int) -> Self:
        """The method with k atoms and nothing left to plan."""
        return replace(
            self,
            atoms=k,
            keep=None,
            budget=None,
            allocation=None,
            importance=None,
        )

    @abstractmethod
    def reader(self) -> Compressor:
        """The method of a layer that reads the dictionary which a layer of this method stores."""

    def nonzeros(self, k: int) -> int:
        """The number of nonzeros in a line's code with k atoms."""
        if self.pattern is Pattern.TWO_OF_FOUR:
            return k // 2
        return max(1, round(k / self.resolved_ratio))

    @property
    def storage(self) -> CodeStorage:
        """The storage of dictionary and codes, once planned."""
        return CodeStorage(getattr(torch, self.dictionary_dtype.value), self.code_bits)

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the dictionary, the values of the codes, and their mask."""
        return self.bytes_of([shape], self.atoms or 0)

    def bytes_of(self, shapes: Sequence[tuple[int, int]], k: int) -> int:
        """Bytes of layers with one dictionary of k atoms."""
        o, i = shapes[0]
        dictionary = (k, i) if self.coded is Coded.OUTPUTS else (o, k)
        return self.storage.dictionary_bytes(dictionary) + sum(
            self.code_bytes(shape, k) for shape in shapes
        )

    def code_bytes(self, shape: tuple[int, int], k: int) -> int:
        """Bytes of one layer's codes for k atoms."""
        n = shape[0 if self.coded is Coded.OUTPUTS else 1]
        return self.storage.code_bytes(n, k, self.nonzeros(k), self.pattern)
