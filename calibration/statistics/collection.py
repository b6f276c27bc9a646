"""The statistics of one input together, by type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from calibration.statistics.base import (
    InputStatistic,
    Observation,
    ObservedStatistic,
    Statistic,
)

T = TypeVar("T")


class Statistics(dict[type[Statistic], Any]):
    """The statistics of one input, by type: `stats[Gram]`."""

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int, needs: frozenset[type[Statistic]]) -> Self:
        """Every statistic among the needs that these tokens alone determine."""
        return cls.observed(Observation(x_ti, n_sequences), InputStatistic.among(needs))

    @classmethod
    def observed(cls, seen: Observation, needs: frozenset[type[Statistic]]) -> Self:
        """Every statistic among the needs that a forward pass collects, of one batch."""
        kinds = sorted(ObservedStatistic.among(needs), key=lambda kind: kind.name)
        return cls({kind: kind.observed(seen) for kind in kinds})

    def observe(self, seen: Observation) -> None:
        """Add one more batch to each, in the memory of their tensors."""
        for kind, value in self.items():
            self[kind] = value.with_observed(seen)

    def joined(self, other: Statistics) -> Statistics:
        """These statistics together with others of one of the layers; what `once` derived stays shared with these."""
        both = Statistics({**self, **other})
        both.__dict__["_derived"] = self.__dict__.setdefault("_derived", {})
        return both

    def once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """The result of `make`, called at the first call with this key and kept as long as the statistics are.

        Layers that share an input share what is derived of it, a factor of its Gram say, whatever their ranks.
        """
        derived: dict[tuple[object, ...], Any] = self.__dict__.setdefault("_derived", {})
        if key not in derived:
            derived[key] = make()
        found: T = derived[key]
        return found

    def forget(self) -> None:
        """Let go of what was derived: a Cholesky factor is as large as its Gram."""
        self.__dict__.pop("_derived", None)

    def by_input(self, items: Sequence[T]) -> Iterator[tuple[Sequence[T], Statistics]]:
        """Split items, one for each weight, by the input that the weights read: here, all read the same.

        See `Pooled`.
        """
        yield items, self

    def __add__(self, other: Self) -> Self:
        """Add statistic by statistic."""
        return type(self)({kind: value + other[kind] for kind, value in self.items()})

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)({kind: value.to(device) for kind, value in self.items()})

    def absorb(self, other: Self) -> Self:
        """The sum, in self's memory (see `Statistic.absorb`)."""
        return type(self)({kind: value.absorb(other[kind]) for kind, value in self.items()})


class Pooled(Statistics):
    """The sums over several inputs, for weights that have something in common though each reads its own."""

    def __init__(self, inputs: Sequence[tuple[int, Statistics]]) -> None:
        """`inputs`: how many weights, in order, read each input, and its statistics, all of one size."""
        (_, first), *others = inputs
        super().__init__(sum((stats for _, stats in others), start=first))
        self._inputs = inputs

    def by_input(self, items: Sequence[T]) -> Iterator[tuple[Sequence[T], Statistics]]:
        """Split items by the input that the weights read."""
        done = 0
        for n_weights, stats in self._inputs:
            yield items[done : done + n_weights], stats
            done += n_weights
