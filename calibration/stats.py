"""Statistics of a layer's inputs. Every field is a sum or a count, so statistics add.

Sums merge exactly whatever the order, the batch size or the process that collected them, and no sample weighs more
than another (a running mean with a fixed rate, as in the published EoRA code, lets the first of 64 samples fade to
0.377 of the last). Divide once, where the statistic is used.

Shapes: t = tokens (padding already dropped), i = input features. Unit: the activations' own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from calibration.precision import cuda_products

T = TypeVar("T")

PRODUCT_ROWS = 4096
SMALLEST_PANEL = 128
N_PANELS = 8


@dataclass(frozen=True)
class Statistic(ABC):
    """Sums over the tokens that a layer saw, with their counts."""

    name: ClassVar[str]
    n_tokens: int
    n_sequences: int

    def __add__(self, other: Self) -> Self:
        """Field by field: of(a ++ b) == of(a) + of(b)."""
        return type(self)(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def absorb(self, other: Self) -> Self:
        """The sum, in the memory of self's tensors (a Gram of 11,008 inputs is 1 GB): do not use self after."""
        for name, tensor in self.tensors().items():
            tensor += getattr(other, name)
        return replace(
            self,
            n_tokens=self.n_tokens + other.n_tokens,
            n_sequences=self.n_sequences + other.n_sequences,
        )

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return type(self)(n_tokens=self.n_tokens, n_sequences=self.n_sequences, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}


@dataclass(frozen=True)
class InputStatistic(Statistic):
    """Of what a layer reads: layers that read the same tensor share it."""

    @classmethod
    @abstractmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """The statistic of these tokens alone."""

    def with_tokens(self, x_ti: Tensor, n_sequences: int) -> Self:
        """The sum with that of these tokens, in the memory of self's tensors: do not use self after."""
        return self.absorb(type(self).of(x_ti, n_sequences))


@dataclass(frozen=True)
class Gram(InputStatistic):
    """Second moment of the inputs: sum over tokens of x x^T (uncentred)."""

    name: ClassVar[str] = "gram"
    sum_ii: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i) -> (i, i), fp64; see `second_moments`."""
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_ii=second_moments(x_ti))

    def with_tokens(self, x_ti: Tensor, n_sequences: int) -> Self:
        """Without a second matrix in memory."""
        add_second_moments_(self.sum_ii, x_ti)
        return replace(
            self,
            n_tokens=self.n_tokens + x_ti.shape[0],
            n_sequences=self.n_sequences + n_sequences,
        )

    def mean_ii(self) -> Tensor:
        """E[x x^T] per token: (i, i), fp64."""
        return self.sum_ii / max(self.n_tokens, 1)


@dataclass(frozen=True)
class Mean(InputStatistic):
    """Sum over tokens of x."""

    name: ClassVar[str] = "mean"
    sum_i: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i) -> (i,), fp64."""
        return cls(
            n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_i=x_ti.sum(0, dtype=torch.float64)
        )

    def mean_i(self) -> Tensor:
        """E[x] per token: (i,), fp64."""
        return self.sum_i / max(self.n_tokens, 1)


@dataclass(frozen=True)
class AbsMean(InputStatistic):
    """Sum over tokens of abs(x)."""

    name: ClassVar[str] = "abs_mean"
    sum_i: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i) -> (i,), fp64."""
        total = x_ti.abs().sum(0, dtype=torch.float64)
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_i=total)

    def mean_i(self) -> Tensor:
        """E[abs(x)] per token: (i,), fp64."""
        return self.sum_i / max(self.n_tokens, 1)


@dataclass(frozen=True)
class CrossGram(Statistic):
    """What the original model gives a layer, beside what the compressed layers before it give: sums of x x'^T and of x.

    x is the input in the original, x' the input of the same token on the compressed path.
    """

    name: ClassVar[str] = "cross_gram"
    sum_ij: Tensor
    sum_i: Tensor

    @classmethod
    def between(cls, original_ti: Tensor, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i), (t, i) -> (i, i) and (i,), fp64; products in fp32 (TF32 off)."""
        n = x_ti.shape[1]
        cross = torch.zeros(n, n, dtype=torch.float64, device=x_ti.device)
        with cuda_products("ieee"):
            for ours, theirs in zip(
                x_ti.split(PRODUCT_ROWS), original_ti.split(PRODUCT_ROWS), strict=True
            ):
                cross += theirs.float().T @ ours.float()
        total = original_ti.sum(0, dtype=torch.float64)
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_ij=cross, sum_i=total)

    def mean_ij(self) -> Tensor:
        """E[x x'^T] per token: (i, i), fp64."""
        return self.sum_ij / max(self.n_tokens, 1)

    def mean_i(self) -> Tensor:
        """E[x] per token, of the original's inputs: (i,), fp64."""
        return self.sum_i / max(self.n_tokens, 1)


STATISTICS: Mapping[str, type[InputStatistic]] = {cls.name: cls for cls in (Gram, Mean, AbsMean)}


class Statistics(dict[type[Statistic], Any]):
    """The statistics of one input, by type: `stats[Gram]`."""

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int, needs: frozenset[type[Statistic]]) -> Self:
        """Observe these tokens with every statistic of inputs that is needed."""
        kinds = sorted(
            (kind for kind in needs if issubclass(kind, InputStatistic)), key=lambda k: k.name
        )
        return cls({kind: kind.of(x_ti, n_sequences) for kind in kinds})

    def joined(self, other: Statistics) -> Statistics:
        """These and those of one of the layers, sharing what is derived from these alone."""
        both = Statistics({**self, **other})
        both.__dict__["_derived"] = self.__dict__.setdefault("_derived", {})
        return both

    def once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """What `make` derives from these statistics, made at the first call with this key and kept as long as they are.

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
        """What belongs to weights, one item each, with the statistics of the input that these read: of all, this one.

        See `Pooled`.
        """
        yield items, self

    def __add__(self, other: Self) -> Self:
        """Statistic by statistic."""
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
        """How many weights, in order, read each input; every input has the same statistics and sizes."""
        (_, first), *others = inputs
        super().__init__(sum((stats for _, stats in others), start=first))
        self._inputs = inputs

    def by_input(self, items: Sequence[T]) -> Iterator[tuple[Sequence[T], Statistics]]:
        """Input by input."""
        done = 0
        for n_weights, stats in self._inputs:
            yield items[done : done + n_weights], stats
            done += n_weights


def second_moments(x_tn: Tensor) -> Tensor:
    """x^T x: (t, n) -> (n, n), fp64."""
    n = x_tn.shape[1]
    total = torch.zeros(n, n, dtype=torch.float64, device=x_tn.device)
    add_second_moments_(total, x_tn)
    return total


def add_second_moments_(total_nn: Tensor, x_tn: Tensor) -> None:
    """total += x^T x, in place: products in fp32 (TF32 off), a few thousand tokens each, summed in fp64.

    Only the panels on and below the diagonal are multiplied, about half of the work; the rest is their mirror, so that
    the sum is symmetric to the bit.
    """
    n = x_tn.shape[1]
    panel = max(SMALLEST_PANEL, -(-n // N_PANELS))
    with cuda_products("ieee"):  # a Gram squares the errors of TF32
        for rows in x_tn.split(PRODUCT_ROWS):
            rows_fp32 = rows.float()
            for start in range(0, n, panel):
                stop = min(start + panel, n)
                product = rows_fp32[:, start:stop].T @ rows_fp32[:, :stop]
                corner = product[:, start:].tril()
                corner += corner.tril(-1).T
                total_nn[start:stop, start:stop] += corner
                total_nn[start:stop, :start] += product[:, :start]
                total_nn[:start, start:stop] += product[:, :start].T
