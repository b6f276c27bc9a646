"""Options of methods that put two thin layers in the place of a weight, and the bytes that a rank takes.

Shapes: o = out_features, i = in_features, r = rank. A weight of o i entries becomes r (o + i): it gets smaller below
the break-even rank, o i / (o + i).
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from compress.errors import RecipeError
from compress.families.base import Compressor, LayerShape
from compress.families.budget import refuse_share
from compress.families.low_rank import FactorDtype, settled_dtype
from compress.families.quantiser import Quantiser
from compress.families.quantities import parse_bytes
from compress.families.target import FitTarget
from compress.solvers.rank_allocation import Allocation, Importance

FLOOR = 0.5


@dataclass(frozen=True, kw_only=True)
class FactorisationOptions(Compressor, ABC):
    """Options of every method that replaces a weight by two factors."""

    keep: float = field(
        default=0.8,
        metadata={
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
            "help": "ranks of some layers, which the plan then leaves: LAYERS=96, LAYERS=dense; the last match counts",
        },
    )
    allocation: Allocation = field(
        default=Allocation.UNIFORM,
        metadata={"help": "how ranks are spread over the layers; all but uniform look at spectra"},
    )
    importance: Importance = field(
        default=Importance.RELATIVE,
        metadata={"help": "what a unit of a layer's error costs in by_type and spectrum plans"},
    )
    floor: float = field(
        default=FLOOR,
        metadata={
            "help": "share of the uniform rank below which a spectrum plan lets no layer fall"
        },
    )
    rank_multiple: int = field(
        default=8, metadata={"help": "ranks are multiples of it, which kernels like"}
    )
    factor_dtype: FactorDtype = field(
        default=FactorDtype.AUTO,
        metadata={"help": "dtype of the stored factors; auto: the weight's own"},
    )
    target: FitTarget = field(
        default=FitTarget.LAYER,
        metadata={
            "help": "outputs to fit: the weight's own, or the original model's (dense), from inputs as they have become"
        },
    )
    factor_quantizer: Quantiser | None = field(
        default=None, metadata={"help": "method that stores the factors in fewer bits"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_share(self.keep)
        if not 0 <= self.floor <= 1:
            raise RecipeError(f"{self.floor} is no share between 0 and 1", option="floor")
        self._refuse_idle()
        for entry in self.ranks:
            parse_rank(entry)
        if self.budget is not None:
            parse_bytes(self.budget, "budget")
        for name in ("rank", "rank_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{value} is too small; 1 or more", option=name)

    def _refuse_idle(self) -> None:
        """Raises RecipeError for an option that this plan would not look at."""
        plans = {
            "importance": (Importance.RELATIVE, (Allocation.BY_TYPE, Allocation.SPECTRUM)),
            "floor": (FLOOR, (Allocation.SPECTRUM,)),
        }
        if self.rank is not None:
            spreads = {"budget": self.budget, "allocation": self.allocation}
            idle = [name for name in spreads if spreads[name] not in (None, Allocation.UNIFORM)]
            if idle:
                raise RecipeError(
                    f"{self.rank} is one rank for every layer, so {idle[0]} {spreads[idle[0]]} would "
                    "do nothing; give one of the two",
                    option="rank",
                )
        for name, (default, serving) in plans.items():
            value = getattr(self, name)
            if value != default and self.allocation not in serving:
                raise RecipeError(
                    f"{value} does nothing in a {self.allocation} plan; "
                    f"it serves --allocation {' or '.join(serving)}",
                    option=name,
                )

    def stored_as(self, layer: LayerShape) -> Self:
        """With the dtype of this layer's factors settled, and their groups if they are quantised."""
        dtype = settled_dtype(self.factor_dtype, layer.dtype, "factor_dtype")
        quantizer = self.factor_quantizer.for_factors() if self.factor_quantizer else None
        return replace(self, factor_dtype=dtype, factor_quantizer=quantizer)

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of the stored factors, once planned."""
        dtype: torch.dtype = getattr(torch, self.factor_dtype.value)
        return dtype

    def overhead(self, shape: tuple[int, int]) -> int:  # noqa: ARG002  (for methods that have one)
        """Numbers that a factorised weight (o, i) stores besides the factors."""
        return 0

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Two factors, and what the method adds."""
        return self.factor_bytes(shape, self.rank or 0)

    def factor_bytes(self, shape: tuple[int, int], rank: int) -> int:
        """The same at another rank, once dtype and groups are settled."""
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
    """A pattern and its rank, None for dense. Raises RecipeError for anything else."""
    pattern, _, value = entry.rpartition("=")
    if pattern and value == "dense":
        return pattern, None
    if not pattern or not value.isdecimal() or int(value) < 1:
        raise RecipeError(
            f"{entry!r} is not PATTERN=RANK, such as q_proj=96 or layers.0=dense", option="ranks"
        )
    return pattern, int(value)
