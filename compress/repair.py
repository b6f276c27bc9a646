"""Low-rank repair of another method's error: what EoRA and its baseline share."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calibration.stats import Gram, Statistic, Statistics
from compress.compressor import Compressor, LayerShape
from compress.errors import RecipeError
from compress.forms import Form, LowRank, Sum
from compress.quantities import parse_bytes

RANK_STEP = 8
FACTOR_BYTES = 2


class FactorDtype(enum.StrEnum):
    """What the low-rank factors are stored in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Repair(Compressor, ABC):
    """Options of every method that adds a low-rank path to a base method's form."""

    base: Compressor
    rank: int = field(default=32, metadata={"help": "rank of the repair of every layer"})
    budget: str | None = field(
        default=None,
        metadata={
            "help": "bytes for all repairs together (20MB, 0.5GiB); takes the place of the rank"
        },
    )
    factor_dtype: FactorDtype = field(
        default=FactorDtype.FLOAT16, metadata={"help": "dtype of the stored factors"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise RecipeError(f"method.rank: {self.rank} is not a rank; 1 or more")
        if isinstance(self.base, Repair):
            raise RecipeError(
                f"method.base: {self.base.name} is itself a repair; give the method that compresses"
            )

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of the stored factors."""
        return torch.float16 if self.factor_dtype is FactorDtype.FLOAT16 else torch.bfloat16

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Gram, and what the base needs."""
        return self.base.needs | {Gram}

    def plan(self, layers: Mapping[str, LayerShape]) -> dict[str, Compressor]:
        """Plan the base and settle the rank. Raises RecipeError for ranks that can't be."""
        bases = self.base.plan(layers)
        rank = (
            self.rank
            if self.budget is None
            else self._rank_for(parse_bytes(self.budget, "method.budget"), layers)
        )
        thin = {name: min(layer.shape) for name, layer in layers.items() if min(layer.shape) < rank}
        if thin:
            name, smallest = min(thin.items(), key=lambda entry: entry[1])
            raise RecipeError(
                f"method.rank: {rank} is above min(out, in) of {len(thin)} layers, such as {name} "
                f"{layers[name].shape}; {smallest} is the most, or --exclude them"
            )
        return {name: replace(self, base=bases[name], rank=rank, budget=None) for name in layers}

    def _rank_for(self, budget: int, layers: Mapping[str, LayerShape]) -> int:
        """The largest rank, a multiple of 8 or the full one, whose factors fit the budget in all layers together."""
        a_rank = sum(sum(layer.shape) for layer in layers.values()) * FACTOR_BYTES
        most = min(min(layer.shape) for layer in layers.values())
        paid, least = budget // a_rank, min(RANK_STEP, most)
        if paid < least:
            raise RecipeError(
                f"method.budget: {budget} bytes do not pay for rank {least}, which takes {least * a_rank}"
            )
        if paid > most:
            raise RecipeError(
                f"method.budget: {budget} bytes pay for rank {paid}, but the thinnest layer has at most rank {most}; "
                f"give {most * a_rank} bytes or less, or --exclude thin layers"
            )
        return paid if paid == most else paid // RANK_STEP * RANK_STEP

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """The base's forms, each with a low-rank path for what it lost as it is stored."""
        bases = self.base.compress(weights, stats)
        residuals = [
            w.double() - base.dense().double() for w, base in zip(weights, bases, strict=True)
        ]
        return [
            Sum([base, path])
            for base, path in zip(bases, self.repair(residuals, stats), strict=True)
        ]

    @abstractmethod
    def repair(self, residuals: Sequence[Tensor], stats: Statistics) -> list[LowRank]:
        """A path of rank `rank` for each residual (o, i), fp64; they share their input."""

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """The base's bytes and two factors in 16 bits."""
        return self.base.planned_bytes(shape) + self.rank * sum(shape) * FACTOR_BYTES
