"""The kinds of statistics, and the registry of them. Every field is a sum or a count, so statistics add.

Sums merge exactly whatever the order, the batch size or the process that collected them, and no sample weighs more
than another (a running mean with a fixed rate, as in the published EoRA code, lets the first of 64 samples fade to
0.377 of the last). Divide once, where the statistic is used.

A new statistic is one file: a frozen dataclass that subclasses one of `InputStatistic`, `PairStatistic`,
`HeldOutStatistic` and `GradientStatistic` with `name=`, and says how it is made of the tokens of one batch:

    @dataclass(frozen=True)
    class Cube(InputStatistic, name="cube"):
        sum_i: Tensor

        @classmethod
        def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
            cubes = x_ti.double().pow(3).sum(0)
            return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_i=cubes)

A method that lists it in its `needs` gets it as `stats[Cube]`; saved, it is found again by its name. Names of fields
say what is stored: `n_...` is a count; `sum_...` a tensor in fp64, whose sides follow: `i` and `j` input features, `o`
output features. A matrix `sum_ii` or `sum_oo` must be symmetric, for half of it is stored; else it is a `sum_ij`.

Shapes: t = tokens (padding already dropped), i = input features, o = output features.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from calibration.errors import InputError

STATISTICS: dict[str, type[Statistic]] = {}
"""Every statistic by name, once its module is imported; `load_statistics` imports all of them."""

SYMMETRIC = ("sum_ii", "sum_oo")
"""Fields that hold a symmetric matrix."""

OURS = "calibration."


class Collected(enum.StrEnum):
    """When a statistic is collected."""

    ALWAYS = "always"
    """In every pass over the original model, for methods of later runs: for statistics that many methods read."""
    WHEN_NEEDED = "when_needed"
    """When the method at hand needs it."""


@dataclass(frozen=True)
class Statistic(ABC):
    """Sums over the tokens that a layer saw, with their counts."""

    name: ClassVar[str]
    collected: ClassVar[Collected] = Collected.WHEN_NEEDED
    n_tokens: int
    n_sequences: int

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        """Register the class under its name. Raises TypeError for a name that another class has."""
        super().__init_subclass__(**kwargs)
        if not name:
            return
        known = STATISTICS.get(name)
        if known is not None and _place(known) != _place(cls):
            raise TypeError(
                f"statistic {name!r} of {_place(cls)}: {_place(known)} has that name; choose another"
            )
        cls.name = name
        STATISTICS[name] = cls

    @classmethod
    def among(cls, needs: Iterable[type[Statistic]] | None) -> frozenset[type[Self]]:
        """The subclasses of this one among those that a method needs."""
        return frozenset(kind for kind in needs or () if issubclass(kind, cls))

    @classmethod
    def identity(cls) -> str:
        """The key of saved sums: the statistic's name, and for one from outside a digest of its file.

        A statistic of this package changes together with the toolkit's version. Raises TypeError for a class without
        a name of its own, InputError for one that is defined in no file.
        """
        cls.refuse_unregistered()
        if cls.__module__.startswith(OURS):
            return cls.name
        try:
            source = Path(inspect.getfile(cls)).read_bytes()
        except (OSError, TypeError) as error:
            raise InputError(
                f"statistics: {cls.name!r} is defined in no file, so its saved sums could not be told from those of "
                "another version; define it in a file, or run with --statistics off"
            ) from error
        return f"{cls.name} {hashlib.sha256(source).hexdigest()[:16]}"

    @classmethod
    def refuse_unregistered(cls) -> None:
        """Raises TypeError for a class that its name does not lead back to."""
        if STATISTICS.get(cls.__dict__.get("name", "")) is not cls:
            raise TypeError(
                f"{_place(cls)} is not registered; define it as `class {cls.__name__}(..., name=...)`"
            )

    @classmethod
    def n_numbers(cls, shape: tuple[int, int]) -> int:
        """The number of fp64 values that are stored for a layer (o, i), counts apart.

        Raises TypeError for a field whose name does not tell; override this then.
        """
        sides, total = {"o": shape[0], "i": shape[1], "j": shape[1]}, 0
        for name in (field.name for field in fields(cls) if not field.name.startswith("n_")):
            letters = name.removeprefix("sum_")
            if letters == name or not letters or not set(letters) <= set(sides):
                raise TypeError(
                    f"statistic {cls.name!r}: the name of the field {name} does not tell its size; call it sum_ and "
                    "its sides (i, j: input features, o: output features), or override n_numbers"
                )
            n = math.prod(sides[letter] for letter in letters)
            total += (
                n if name not in SYMMETRIC else sides[letters[0]] * (sides[letters[0]] + 1) // 2
            )
        return total

    def __add__(self, other: Self) -> Self:
        """Field by field: of(a ++ b) == of(a) + of(b)."""
        return type(self)(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def scaled(self, factor: float) -> Self:
        """Sums and counts multiplied, in new memory; counts are rounded."""
        counts = {name: round(factor * n) for name, n in self.counts().items()}
        tensors = {name: factor * tensor for name, tensor in self.tensors().items()}
        return type(self)(**{**counts, **tensors})

    def absorb(self, other: Self) -> Self:
        """The sum, in the memory of self's tensors (a Gram of 11,008 inputs is 1 GB): do not use self after."""
        for name, tensor in self.tensors().items():
            tensor += getattr(other, name)
        counts = {name: n + getattr(other, name) for name, n in self.counts().items()}
        return type(self)(**{**counts, **self.tensors()})

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return type(self)(**{**self.counts(), **moved})

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def counts(self) -> dict[str, Any]:
        """The other fields by name."""
        return {
            f.name: v for f in fields(self) if not isinstance(v := getattr(self, f.name), Tensor)
        }


def _place(kind: type[Statistic]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True)
class Observation:
    """One batch of a tensor that layers read, padding dropped."""

    x_ti: Tensor
    n_sequences: int
    held_out_ti: Tensor | None = None
    """The part of `x_ti` that belongs to held-out sequences, if a statistic reads it."""
    n_held_out: int = 0
    """The number of held-out sequences."""
    original_ti: Tensor | None = None
    """The same tokens' inputs in the original model, if a statistic reads them."""


@dataclass(frozen=True)
class ObservedStatistic(Statistic):
    """A statistic that the forward pass collects; layers that read the same tensor share it."""

    @classmethod
    @abstractmethod
    def observed(cls, seen: Observation) -> Self:
        """The statistic of one batch."""

    def with_observed(self, seen: Observation) -> Self:
        """The sum with that of one more batch, in the memory of self's tensors: do not use self after."""
        return self.absorb(type(self).observed(seen))


@dataclass(frozen=True)
class InputStatistic(ObservedStatistic):
    """A statistic of what a layer reads."""

    @classmethod
    @abstractmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """The statistic of these tokens alone."""

    def with_tokens(self, x_ti: Tensor, n_sequences: int) -> Self:
        """The sum with that of these tokens, in the memory of self's tensors: do not use self after."""
        return self.absorb(type(self).of(x_ti, n_sequences))

    @classmethod
    def observed(cls, seen: Observation) -> Self:  # noqa: D102
        return cls.of(seen.x_ti, seen.n_sequences)

    def with_observed(self, seen: Observation) -> Self:  # noqa: D102
        return self.with_tokens(seen.x_ti, seen.n_sequences)


@dataclass(frozen=True)
class HeldOutStatistic(ObservedStatistic):
    """A statistic of what a layer reads in the sequences that are held out, to judge what was fitted without them."""

    @classmethod
    @abstractmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """The statistic of these tokens, all of them held out."""

    @classmethod
    def observed(cls, seen: Observation) -> Self:  # noqa: D102
        assert seen.held_out_ti is not None
        return cls.of(seen.held_out_ti, seen.n_held_out)


@dataclass(frozen=True)
class PairStatistic(ObservedStatistic):
    """A statistic of what a layer reads beside what it reads in the original model, token by token."""

    @classmethod
    @abstractmethod
    def between(cls, original_ti: Tensor, x_ti: Tensor, n_sequences: int) -> Self:
        """The statistic of these tokens, in the original and behind the compressed layers."""

    @classmethod
    def observed(cls, seen: Observation) -> Self:  # noqa: D102
        assert seen.original_ti is not None
        return cls.between(seen.original_ti, seen.x_ti, seen.n_sequences)


@dataclass(frozen=True)
class GradientStatistic(Statistic):
    """A statistic of the gradients of the loss, which a backward pass through the original model collects.

    The loss of a sample is the negative log-likelihood of its labels, summed over its tokens. Gradients come one sample
    at a time: the square of the gradient of a batch's mean is not the Fisher, its cross terms are of other samples.
    It belongs to one layer, even where that shares its input with others. x_ti is what the layer read, g_to the
    gradient of the sample's loss by what it wrote, in nats per activation.
    """

    @classmethod
    @abstractmethod
    def of(cls, x_ti: Tensor, g_to: Tensor) -> Self:
        """The statistic of one sample."""

    def with_sample(self, x_ti: Tensor, g_to: Tensor) -> Self:
        """The sum with that of one more sample, in the memory of self's tensors: do not use self after."""
        return self.absorb(type(self).of(x_ti, g_to))
