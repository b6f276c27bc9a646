"""Options of methods that put two thin layers in the place of a weight, and the bytes that a rank takes.

Shapes: o = out_features, i = in_features, r = rank. A weight of o i entries becomes r (o + i): it gets smaller below
the break-even rank, o i / (o + i).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from compress.errors import RecipeError
from compress.families.base import Compressor, LayerShape
from compress.families.budget import KEEP, parse_bytes, refuse_keep
from compress.families.low_rank import FactorDtype, settled_dtype
from compress.families.quantiser import Quantiser
from compress.families.target import FitTarget
from compress.solvers.rank_allocation import Allocation, Importance

FLOOR = 0.5
RANK_MULTIPLE = 8
_PLANS_READING = {
    "importance": (Allocation.BY_TYPE, Allocation.SPECTRUM),
    "floor": (Allocation.SPECTRUM,),
}
"""The allocations in which an option has an effect."""


@dataclass(frozen=True, kw_only=True)
class FactorisationOptions(Compressor, ABC):
    """Options of every method that replaces a weight by two factors."""

    keep: float | None = field(
        default=None,
        metadata={
            "resolves_to": KEEP,
            "metavar": "SHARE",
            "help": "share of the compressed layers' bytes that is kept, above 0 and below 1",
        },
    )
    budget: str | None = field(
        default=None,
        metadata={
            "metavar": "BYTES",
            "help": "bytes of the whole checkpoint (120MB); takes the place of --keep",
        },
    )
    rank: int | None = field(
        default=None, metadata={"help": "rank of every layer; takes the place of --keep"}
    )
    ranks: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "LAYERS=RANK",
            "help": "ranks of some layers, which the allocation leaves: LAYERS=96, LAYERS=dense; the last match counts",
        },
    )
    allocation: Allocation | None = field(
        default=None,
        metadata={
            "resolves_to": Allocation.UNIFORM,
            "help": "how ranks are spread over the layers; all but uniform need a survey of the layers' spectra",
        },
    )
    importance: Importance | None = field(
        default=None,
        metadata={
            "resolves_to": Importance.RELATIVE,
            "help": "what a unit of a layer's error costs with --allocation by_type or spectrum",
        },
    )
    floor: float | None = field(
        default=None,
        metadata={
            "resolves_to": FLOOR,
            "help": "with --allocation spectrum: every layer keeps at least this share of its uniform rank, or is "
            "left dense",
        },
    )
    rank_multiple: int | None = field(
        default=None,
        metadata={
            "resolves_to": RANK_MULTIPLE,
            "help": "ranks are multiples of it, for which kernels are fast",
        },
    )
    factor_dtype: FactorDtype | None = field(
        default=None,
        metadata={
            "resolves_to": FactorDtype.AUTO,
            "help": "dtype of the stored factors; auto: the weight's own",
        },
    )
    target: FitTarget = field(
        default=FitTarget.LAYER,
        metadata={
            "help": "what a layer's outputs are fitted to, on inputs from the compressed layers before it: the "
            "weight's own outputs on them (layer), or the original model's (original)"
        },
    )
    factor_quantizer: Quantiser | None = field(
        default=None, metadata={"help": "method that stores the factors in fewer bits"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_keep(self.keep)
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise RecipeError(
                f"must be between 0 and 1 (e.g. {FLOOR}), got {self.floor}", option="floor"
            )
        for entry in self.ranks:
            parse_rank(entry)
        if self.budget is not None:
            parse_bytes(self.budget, "budget")
        for name in ("rank", "rank_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"must be 1 or more, got {value}", option=name)

    def idle(self) -> Mapping[str, str]:
        """The options without effect beside those that were given.

        One rank for every layer leaves nothing to spread; a budget takes the place of the share; importance and floor
        are for some allocations only; factors that a quantiser stores have no dtype.
        """
        found = {}
        if self.factor_quantizer is not None and not self.shifts_outputs:
            found["factor_dtype"] = (
                f"beside --factor-quantizer {self.factor_quantizer.name}, which stores the factors; give one of the two"
            )
        if self.rank is not None:
            spreads = ("keep", "budget", "allocation", "importance", "floor", "rank_multiple")
            reason = (
                f"beside --rank {self.rank}, which is the rank of every layer; give one of the two"
            )
            return found | dict.fromkeys(spreads, reason)
        if self.budget is not None:
            found["keep"] = f"beside --budget {self.budget}; give one of the two"
        for name, serving in _PLANS_READING.items():
            if self.resolved_allocation not in serving:
                found[name] = (
                    f"with --allocation {self.resolved_allocation}; it is for --allocation {' or '.join(serving)}"
                )
        return found

    @property
    def resolved_keep(self) -> float:
        """The share of bytes to keep: the given one, or the default."""
        return KEEP if self.keep is None else self.keep

    @property
    def resolved_allocation(self) -> Allocation:
        """The allocation of ranks: the given one, or the method's default."""
        if self.allocation is not None:
            return self.allocation
        default = self.default_of("allocation")
        assert isinstance(default, Allocation)  # every factorisation has one
        return default

    @property
    def resolved_importance(self) -> Importance:
        """The importance of a layer's error: the given one, or the default."""
        return Importance.RELATIVE if self.importance is None else self.importance

    @property
    def resolved_floor(self) -> float:
        """The least share of the uniform rank: the given one, or the default."""
        return FLOOR if self.floor is None else self.floor

    @property
    def resolved_multiple(self) -> int:
        """The number that ranks are multiples of: the given one, or the default."""
        return RANK_MULTIPLE if self.rank_multiple is None else self.rank_multiple

    def stored_as(self, layer: LayerShape) -> Self:
        """The method with the dtype of this layer's factors settled, and their group size if they are quantised."""
        asked = self.factor_dtype or FactorDtype.AUTO
        dtype = settled_dtype(asked, layer.dtype, "factor_dtype")
        quantizer = self.factor_quantizer.for_factors() if self.factor_quantizer else None
        idle = "factor_dtype" in self.idle()
        return replace(self, factor_dtype=None if idle else dtype, factor_quantizer=quantizer)

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of the stored factors, once planned; of no effect where a quantiser stores all there is."""
        settled = self.factor_dtype or FactorDtype.FLOAT32
        dtype: torch.dtype = getattr(torch, settled.value)
        return dtype

    def overhead(self, shape: tuple[int, int]) -> int:  # noqa: ARG002  (for methods that have one)
        """Numbers that a factorised weight (o, i) stores besides the factors."""
        return 0

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the two factors at the planned rank, and of what the method adds."""
        return self.factor_bytes(shape, self.rank or 0)

    def factor_bytes(self, shape: tuple[int, int], rank: int) -> int:
        """Bytes of the two factors at a rank, and of what the method adds, once dtype and groups are settled."""
        added = self.overhead(shape) * self.storage.itemsize
        if self.factor_quantizer is None:
            return rank * sum(shape) * self.storage.itemsize + added
        up, down = (shape[0], rank), (rank, shape[1])
        return (
            self.factor_quantizer.planned_bytes(up)
            + self.factor_quantizer.planned_bytes(down)
            + added
        )


def parse_rank(entry: str) -> tuple[str, int | None]:
    """A pattern and its rank, None for dense, from `LAYERS=RANK`. Raises RecipeError for anything else."""
    pattern, _, value = entry.rpartition("=")
    if pattern and value == "dense":
        return pattern, None
    if not pattern or not value.isdecimal() or int(value) < 1:
        raise RecipeError(
            f"{entry!r} is not LAYERS=RANK, such as q_proj=96 or layers.0=dense", option="ranks"
        )
    return pattern, int(value)
