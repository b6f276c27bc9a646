"""Low-rank repair of another method's error: what EoRA and its baseline share."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calibration.stats import Anchor, Gram, Mean, Statistic, Statistics
from compress.compressor import Compressor, LayerShape, Survey, Trial
from compress.errors import RecipeError
from compress.factors import covariance, shifted
from compress.forms import Form, LowRank, Sum
from compress.quantities import parse_bytes

RANK_STEP = 8
FACTOR_BYTES = 2
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; it computes with that many whatever an adapter has."""


class FactorDtype(enum.StrEnum):
    """What the low-rank factors are stored in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class RanksFor(enum.StrEnum):
    """Who is to serve the paths."""

    ANY = "any"
    VLLM = "vllm"


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
    ranks_for: RanksFor = field(
        default=RanksFor.ANY,
        metadata={
            "help": "vllm: the rank rounded up (a budget's: down) to one that vLLM serves: "
            + ", ".join(map(str, VLLM_RANKS))
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise RecipeError(f"method.rank: {self.rank} is not a rank; 1 or more")
        if Anchor in self.base.needs:
            raise RecipeError(
                "method.base.anchor: dense fits the original's outputs, a repair the weight's own; use none"
            )
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
        """The Gram, what the base needs, and the mean if the base puts one back."""
        return self.base.needs | {Gram} | ({Mean} if self.shifts_outputs else set())

    @property
    def shifts_outputs(self) -> bool:
        """As its base."""
        return self.base.shifts_outputs

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """The base's."""
        return self.base.surveys

    @property
    def saves_bytes(self) -> bool:
        """As its base."""
        return self.base.saves_bytes

    @property
    def joins_layers(self) -> bool:
        """The base's."""
        return self.base.joins_layers

    def shared_by(self, name: str, layer: LayerShape) -> object:
        """As its base."""
        return self.base.shared_by(name, layer)

    @property
    def together(self) -> Compressor:
        """As its base."""
        return replace(self, base=self.base.together)

    @property
    def spans_blocks(self) -> bool:
        """As its base."""
        return self.base.spans_blocks

    @property
    def blocks_at_once(self) -> int:
        """As its base."""
        return self.base.blocks_at_once

    @property
    def weighs_by_divergence(self) -> bool:
        """The base's."""
        return self.base.weighs_by_divergence

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """The base's."""
        return self.base.trials(weights, surveys, stats)

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """The base's."""
        return self.base.survey(weights, stats)

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """Plan the base and settle the rank; layers that the base leaves need no repair.

        Raises RecipeError for ranks that can't be.
        """
        bases = self.base.plan(layers, rest_bytes)
        layers = {name: layer for name, layer in layers.items() if name in bases}
        rank = (
            self._served(self.rank)
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

    def _served(self, rank: int) -> int:
        """The rank, or the next one that is served. Raises RecipeError above the last of them."""
        if self.ranks_for is RanksFor.ANY:
            return rank
        enough = [served for served in VLLM_RANKS if served >= rank]
        if not enough:
            raise RecipeError(
                f"method.rank: {rank} is above {VLLM_RANKS[-1]}, the most that vLLM serves; lower it, or give "
                "--ranks-for any"
            )
        return enough[0]

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
        if self.ranks_for is RanksFor.VLLM:
            return max(served for served in VLLM_RANKS if served <= max(paid, VLLM_RANKS[0]))
        return paid if paid == most else paid // RANK_STEP * RANK_STEP

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """The base's forms, each with a low-rank path for what it lost as it is stored.

        A base that makes the mean output exact leaves its outputs' variation to be repaired; its offset is then that
        of both together, or the mean would be counted twice.
        """
        bases = self.base.compress(weights, stats)
        residuals = [
            w.double() - base.dense().double() for w, base in zip(weights, bases, strict=True)
        ]
        paths = self.paths(residuals, stats)
        if self.shifts_outputs:
            mean_i = stats[Mean].mean_i()
            bases = [
                shifted(base, (residual - path.dense().double()) @ mean_i)
                for base, residual, path in zip(bases, residuals, paths, strict=True)
            ]
        return [Sum([base, path]) for base, path in zip(bases, paths, strict=True)]

    def paths(self, residuals: Sequence[Tensor], stats: Statistics) -> list[LowRank]:
        """A path for each residual (o, i), fp64, by the statistics of the input that its layer reads."""
        return [path for part, own in stats.by_input(residuals) for path in self.repair(part, own)]

    def moments(self, stats: Statistics) -> Tensor:
        """What an error of the path costs: E[x x^T], or the covariance where the mean is put back. (i, i), fp64."""
        return covariance(stats) if self.shifts_outputs else stats[Gram].mean_ii()

    @abstractmethod
    def repair(self, residuals: Sequence[Tensor], stats: Statistics) -> list[LowRank]:
        """A path of rank `rank` for each residual (o, i), fp64; they share their input."""

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """The base's bytes and two factors in 16 bits."""
        return self.base.planned_bytes(shape) + self.rank * sum(shape) * FACTOR_BYTES
