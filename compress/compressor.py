"""What a compression method is: options as fields, statistics as needs, and pure mathematics.

A method is one file in `compress/methods/`: a frozen, keyword-only dataclass that subclasses `Compressor` with
`name=`. Importing the package walks the folder, and a broken file breaks the import; nothing else needs touching.
"""

from __future__ import annotations

import enum
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from calibration.stats import Gram, Statistic, Statistics
from compress.errors import RecipeError
from compress.forms import Form

METHODS: dict[str, type[Compressor]] = {}
"""Every method by name. The only registry."""


@dataclass(frozen=True)
class LayerShape:
    """What planning knows of a layer: its weight's shape (out, in) and the bytes it takes in the checkpoint."""

    shape: tuple[int, int]
    n_bytes: int


class Compressor(ABC):
    """Turns weights into forms. Subclasses are frozen keyword-only dataclasses; their fields are their options."""

    name: ClassVar[str]
    paper: ClassVar[str]

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            METHODS[name] = cls

    def __post_init__(self) -> None:
        """Take an enum option by its value too. Raises RecipeError listing the values there are."""
        for entry in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            kind, value = type(entry.default), getattr(self, entry.name)
            if issubclass(kind, enum.StrEnum) and not isinstance(value, kind):
                try:
                    object.__setattr__(self, entry.name, kind(value))
                except ValueError:
                    raise RecipeError(
                        f"method.{entry.name}: {value!r} is none of {', '.join(member.value for member in kind)}"
                    ) from None

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Statistics of the inputs that `compress` reads. The Gram is always there: errors are measured with it."""
        return frozenset({Gram})

    def plan(self, layers: Mapping[str, LayerShape]) -> dict[str, Compressor]:
        """Which compressor serves which layer, options resolved. Raises RecipeError for what can't work."""
        return dict.fromkeys(layers, self)

    @abstractmethod
    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """Forms for weights (o, i), fp32, that read the same input; all have the same i. Inputs are left unchanged.

        Weights that share an input come together, so that a method can factorise its Gram once, or quantise them as
        one stack. Raises LayerError if a weight can't be compressed.
        """

    @abstractmethod
    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of tensor data that the form of a weight (o, i) will take, once planned."""


def refuse_damping(damping: float) -> None:
    """Raises RecipeError for a ridge that is negative, not a number, or no share."""
    if not 0 <= damping < 100:
        raise RecipeError(
            f"method.damping: {damping} is not a share of the median diagonal (0.01 is usual)"
        )


def load_methods() -> Mapping[str, type[Compressor]]:
    """Import every file of `compress/methods/` and return the registry."""
    from compress import methods

    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    return METHODS
