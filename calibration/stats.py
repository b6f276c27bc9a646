"""Statistics of a layer's inputs. Every field is a sum or a count, so statistics add.

Sums merge exactly whatever the order, the batch size or the process that collected them, and no sample weighs more
than another (a running mean with a fixed rate, as in the published EoRA code, lets the first of 64 samples fade to
0.377 of the last). Divide once, where the statistic is used.

Shapes: t = tokens (padding already dropped), i = input features. Unit: the activations' own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

PRODUCT_ROWS = 4096
SMALLEST_PANEL = 128
N_PANELS = 8


@dataclass(frozen=True)
class Statistic(ABC):
    """Sums over the tokens that a layer saw, with their counts."""

    name: ClassVar[str]
    n_tokens: int
    n_sequences: int

    @classmethod
    @abstractmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """The statistic of these tokens alone."""

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
class Gram(Statistic):
    """Second moment of the inputs: sum over tokens of x x^T (uncentred)."""

    name: ClassVar[str] = "gram"
    sum_ii: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """Products in fp32 (TF32 off), a few thousand tokens each, summed in fp64. (t, i) -> (i, i).

        Only the panels on and below the diagonal are multiplied, about half of the work; the rest is their mirror.
        """
        n_inputs = x_ti.shape[1]
        panel = max(SMALLEST_PANEL, -(-n_inputs // N_PANELS))
        total = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=x_ti.device)
        with full_fp32_products():
            for rows in x_ti.split(PRODUCT_ROWS):
                rows_fp32 = rows.float()
                for start in range(0, n_inputs, panel):
                    stop = min(start + panel, n_inputs)
                    total[start:stop, :stop] += rows_fp32[:, start:stop].T @ rows_fp32[:, :stop]
        total.tril_()
        total += total.tril(-1).T
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_ii=total)

    def mean_ii(self) -> Tensor:
        """E[x x^T] per token: (i, i), fp64."""
        return self.sum_ii / max(self.n_tokens, 1)


@dataclass(frozen=True)
class Mean(Statistic):
    """Sum over tokens of x."""

    name: ClassVar[str] = "mean"
    sum_i: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i) -> (i,), fp64."""
        return cls(
            n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_i=x_ti.sum(0, dtype=torch.float64)
        )


@dataclass(frozen=True)
class AbsMean(Statistic):
    """Sum over tokens of abs(x)."""

    name: ClassVar[str] = "abs_mean"
    sum_i: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """(t, i) -> (i,), fp64."""
        total = x_ti.abs().sum(0, dtype=torch.float64)
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_i=total)


STATISTICS: Mapping[str, type[Statistic]] = {cls.name: cls for cls in (Gram, Mean, AbsMean)}


class Statistics(dict[type[Statistic], Any]):
    """The statistics of one input, by type: `stats[Gram]`."""

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int, needs: frozenset[type[Statistic]]) -> Self:
        """Observe these tokens with every statistic that is needed."""
        return cls(
            {kind: kind.of(x_ti, n_sequences) for kind in sorted(needs, key=lambda k: k.name)}
        )

    def __add__(self, other: Self) -> Self:
        """Statistic by statistic."""
        return type(self)({kind: value + other[kind] for kind, value in self.items()})

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)({kind: value.to(device) for kind, value in self.items()})

    def absorb(self, other: Self) -> Self:
        """The sum, in self's memory (see `Statistic.absorb`)."""
        return type(self)({kind: value.absorb(other[kind]) for kind, value in self.items()})


class full_fp32_products:  # noqa: N801  (a context manager, named as what it does)
    """Within it, fp32 matrix products use fp32: TF32 keeps 10 bits, and a Gram squares its errors."""

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before
