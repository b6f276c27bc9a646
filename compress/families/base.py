"""What a compression method is: options as fields, statistics as needs, and pure mathematics.

A method is one file in `compress/methods/`: a frozen, keyword-only dataclass that subclasses `Compressor` with
`name=`. It is found by its header and imported when it is first looked up; nothing else needs touching.

The options of a run are described by these classes before there is anything to compute, so torch waits for the first
object that holds a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import RecipeError
from compress.families.options import Options
from compress.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calibration.statistics.base import Statistic
    from calibration.statistics.collection import Statistics
    from compress.forms.base import Form

METHODS: Registry[Compressor] = Registry("compress.methods", "method")
"""Every method by name."""


def _no_spectrum() -> Tensor:
    import torch

    return torch.zeros(0, dtype=torch.float64)


def _float32() -> torch.dtype:
    import torch

    return torch.float32


@dataclass(frozen=True)
class Survey:
    """What a plan compares layers by."""

    spectrum: Tensor = field(default_factory=_no_spectrum)
    """Of the weight, descending, fp64, in the method's metric: squares are what dropping them costs."""
    cost: float = 1.0
    """What a unit of squared error costs, where the method asked for something that tells."""
    points: tuple[tuple[int, float], ...] = ()
    """For methods without a spectrum: sizes, ascending, and the squared error that each costs."""
    energy: float = 0.0
    """The squared error of nothing in the weight's place, where there are points or the spectrum is a residual's."""
    rounding: tuple[tuple[int, float], ...] = ()
    """Of widths of a correction's factors, what rounding them costs, as a share of what the correction captures."""
    reads: str = ""
    """The first of the layers that read the same tensor, itself perhaps."""

    @property
    def total(self) -> float:
        """The squared error of nothing in the weight's place."""
        return self.energy if self.points else self.residual

    @property
    def residual(self) -> float:
        """The squared error of leaving out all that the spectrum is of."""
        return float(self.spectrum.square().sum())


@dataclass(frozen=True)
class Trial:
    """A weight compressed alone, before there is a plan."""

    form: Form
    lost: float
    """What that costs, in the unit of the survey's squared spectrum; above 0."""


@dataclass(frozen=True)
class LayerShape:
    """What planning knows of a layer: its weight's shape (out, in), bytes and dtype in the checkpoint."""

    shape: tuple[int, int]
    n_bytes: int
    dtype: torch.dtype = field(default_factory=_float32)
    survey: Survey | None = None
    """What was found of it, once the method has asked."""


class Compressor(Options, ABC):
    """Turns weights into forms. Subclasses are frozen keyword-only dataclasses; their fields are their options."""

    name: ClassVar[str]
    paper: ClassVar[str]
    refused_choices: ClassVar[tuple[type, ...]] = ()
    """Classes that none of its options may hold, though their type would allow it."""

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            METHODS.register(name, cls)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Statistics of the inputs that `compress` reads. The Gram is always there: errors are measured with it."""
        from calibration.statistics.gram import Gram

        return frozenset({Gram})

    @property
    def shifts_outputs(self) -> bool:
        """Whether its forms add an offset to the outputs, which no weight can hold."""
        return False

    @property
    def saves_bytes(self) -> bool:
        """Whether its forms are to be smaller than the weights, or else not planned."""
        return True

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """Statistics of the original model that `survey` reads; None if the plan needs no survey."""
        return None

    @property
    def joins_layers(self) -> bool:
        """Whether its plan wants to know which layers read the same tensor."""
        return False

    def shared_by(self, name: str, layer: LayerShape) -> object:  # noqa: ARG002  (see above)
        """What is equal for layers that may store something in common; the name alone, where none do."""
        return name

    @property
    def together(self) -> Compressor:
        """What is equal for weights that are compressed together; itself for the first of them."""
        return self

    @property
    def spans_blocks(self) -> bool:
        """Whether weights of several decoder blocks are to be compressed together, with their `Pooled` statistics."""
        return False

    @property
    def blocks_at_once(self) -> int:
        """How many decoder blocks are loaded together."""
        return 1

    @property
    def weighs_by_divergence(self) -> bool:
        """Whether its plan wants to know what each layer, compressed alone, does to the predictions."""
        return False

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """What the plan compares weights (o, i) with one input by, each with its statistics.

        One at a time, unless the method joins layers. Raises LayerError if it cannot be had.
        """
        raise NotImplementedError(f"{self.name} plans without a survey")

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """Forms to measure with what an error of each of these weights does. Raises LayerError if there is none."""
        raise NotImplementedError(f"{self.name} does not weigh by divergence")

    def plan(
        self,
        layers: Mapping[str, LayerShape],
        rest_bytes: int = 0,  # noqa: ARG002  (for methods that spend a budget)
    ) -> dict[str, Compressor]:
        """Which compressor serves which layer, options resolved; layers left out stay as they are.

        `rest_bytes`: what the checkpoint holds besides. Before a survey the plan of a method that wants one is
        provisional, of the bytes that it will have. Raises RecipeError for what can't work.
        """
        return dict.fromkeys(layers, self)

    def predicted_error(self, layer: LayerShape) -> float | None:  # noqa: ARG002  (see above)
        """The relative output error that is expected of a planned layer, if the plan can tell."""
        return None

    @abstractmethod
    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """Forms for weights (o, i), fp32, that read the same input; all have the same i. Inputs are left unchanged.

        Weights that share an input come together, so that a method can factorise its Gram once, or quantise them as
        one stack; a method that reads gradients, a layer's own, gets each alone.
        Raises LayerError if one can't be compressed.
        """

    @abstractmethod
    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of tensor data that the form of a weight (o, i) will take, once planned."""


def refuse_damping(damping: float) -> None:
    """Raises RecipeError for a ridge that is negative, not a number, or no share."""
    if not 0 <= damping < 100:
        raise RecipeError(
            f"{damping} is not a share of the median diagonal (0.01 is usual)", option="damping"
        )


def refuse_shrinkage(shrinkage: float) -> None:
    """Raises RecipeError for a value outside 0 to 1."""
    if not 0 <= shrinkage <= 1:
        raise RecipeError(f"{shrinkage} is not between 0 and 1 (0.1 is usual)", option="shrinkage")
