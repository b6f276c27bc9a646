"""Measured values, and numbers as text for people: bytes, decimals, standard errors, counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

NOTHING = "-"
"""Placeholder in tables for a value that was not measured."""
_RUN_AWAY = 1e6


def megabytes(n_bytes: float | None) -> str:
    """Bytes in MB (10^6), in GB above a thousand of them, in kB below one."""
    if n_bytes is None:
        return NOTHING
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.1f} kB"
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def counted(n: int, noun: str) -> str:
    """A number of things: "1 layer", "2 layers"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def decimal(value: float, digits: int) -> str:
    """A number with so many digits after the point: "27.80"; from a million on in scientific notation."""
    return f"{value:.{digits}f}" if abs(value) < _RUN_AWAY else f"{value:.2e}"


def with_error(value: float | None, stderr: float | None, digits: int) -> str:
    """A value and its standard error: "27.80 ± 0.12"."""
    if value is None:
        return NOTHING
    return decimal(value, digits) + (f" ± {decimal(stderr, digits)}" if stderr is not None else "")


@dataclass(frozen=True)
class Measured:
    """A value and its standard error; the error is None where it is not known."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Written:
    """A value as text in three parts."""

    number: str
    error: str = ""
    """The standard error; empty where it is not known."""
    suffix: str = ""
    """Text behind the number: %, or a unit that depends on its size."""

    def __str__(self) -> str:
        error = f" ± {self.error}" if self.error else ""
        return f"{self.number}{error}{' ' if self.suffix else ''}{self.suffix}"


Format = Callable[[Measured], Written]


@dataclass(frozen=True)
class Decimals:
    """Writes values with so many digits after the point, after multiplying them by `scale`."""

    digits: int
    scale: float = 1.0
    suffix: str = ""

    def __call__(self, measured: Measured) -> Written:
        """The value and its error as text."""
        error = (
            "" if measured.stderr is None else decimal(self.scale * measured.stderr, self.digits)
        )
        return Written(decimal(self.scale * measured.value, self.digits), error, self.suffix)


@dataclass(frozen=True)
class Significant:
    """Writes values with so many significant digits, "5.472" and "291.0", and errors to the same place."""

    digits: int

    def __call__(self, measured: Measured) -> Written:
        """The value and its error as text."""
        size = abs(measured.value)
        whole = math.floor(math.log10(size)) + 1 if size >= 1 else 1
        return Decimals(max(0, self.digits - whole))(measured)


def in_bytes(measured: Measured) -> Written:
    """Writes bytes in kB, MB or GB."""
    number, suffix = megabytes(measured.value).split(" ")
    return Written(number, suffix=suffix)
