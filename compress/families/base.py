"""The base class of compression methods: options as fields, statistics as needs, and pure mathematics.

A method is one file in `compress/methods/`: a frozen, keyword-only dataclass that subclasses `Compressor` with `name=`.
It is found by its header and imported when it is first looked up; nothing else needs touching.

The options of a run are described by these classes before there is anything to compute, so torch waits for the first
object that holds a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from inspect import isabstract
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


def _fault(kind: type) -> str:
    """What a class lacks to be a method; empty for nothing."""
    if not issubclass(kind, Compressor):
        return "is no Compressor"
    if isabstract(kind):
        return f"lacks {', '.join(sorted(kind.__abstractmethods__))}"
    parameters = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return "is no frozen dataclass; write @dataclass(frozen=True, kw_only=True) above the class"
    if not getattr(kind, "paper", None):
        return "lacks its paper, which `compress methods` shows"
    for entry in fields(kind):
        if entry.default is MISSING and entry.default_factory is MISSING:
            return f"has the option {entry.name!r} without a default"
        if entry.name == "name":
            return "has an option called 'name', which is the method's own in recipes; call it otherwise"
    return ""


METHODS: Registry[Compressor] = Registry("compress.methods", "method", fault=_fault)
"""Every method by name."""


def _no_spectrum() -> Tensor:
    import torch

    return torch.zeros(0, dtype=torch.float64)


def _float32() -> torch.dtype:
    import torch

    return torch.float32


@dataclass(frozen=True)
class Survey:
    """Measurements of a layer that a plan compares it with other layers by."""

    spectrum: Tensor = field(default_factory=_no_spectrum)
    """Singular values in the method's metric, descending, fp64: dropping one costs its square."""
    cost: float = 1.0
    """The cost of a unit of squared error in this layer, if the method's importance measures one."""
    points: tuple[tuple[int, float], ...] = ()
    """Sizes, ascending, and the squared error at each, for methods without a spectrum."""
    energy: float = 0.0
    """The squared error of a zero weight, where there are points or the spectrum is a residual's."""
    rounding: tuple[tuple[int, float], ...] = ()
    """Width in bits and the share of what a correction captures that rounding its factors to that width loses."""
    reads: str = ""
    """The first of the layers that read the same tensor; it may be this layer."""

    @property
    def total(self) -> float:
        """The squared error of a zero weight."""
        return self.energy if self.points else self.residual

    @property
    def residual(self) -> float:
        """The squared error of dropping every singular value."""
        return float(self.spectrum.square().sum())


@dataclass(frozen=True)
class Trial:
    """A weight compressed alone, before there is a plan."""

    form: Form
    lost: float
    """The squared error of the form, above 0, in the unit of the survey's squared spectrum."""


@dataclass(frozen=True)
class LayerShape:
    """A layer as planning sees it: its weight's shape (out, in), and its bytes and dtype in the checkpoint."""

    shape: tuple[int, int]
    n_bytes: int
    dtype: torch.dtype = field(default_factory=_float32)
    survey: Survey | None = None
    """The layer's survey, once the method has asked for one."""


class Compressor(Options, ABC):
    """A compression method: it turns weights into forms.

    A subclass is a frozen, keyword-only dataclass of its options.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    data_free: ClassVar[bool] = False
    """Whether it makes as much of a weight without inputs: its forms depend on them little or not at all."""
    refused_choices: ClassVar[tuple[type, ...]] = ()
    """Classes that no option may hold, though its type would allow them."""

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            METHODS.register(name, cls)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Statistics of the inputs that `compress` reads.

        The Gram matrix is always there: errors are measured with it.
        """
        from calibration.statistics.gram import Gram

        return frozenset({Gram})

    @property
    def shifts_outputs(self) -> bool:
        """Whether its forms add an offset to the outputs, which no weight can hold."""
        return False

    @property
    def saves_bytes(self) -> bool:
        """Whether a form must be smaller than its weight for the plan to be accepted."""
        return True

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """Statistics of the original model that `survey` reads; None if the plan needs no survey."""
        return None

    @property
    def joins_layers(self) -> bool:
        """Whether the plan depends on which layers read the same tensor."""
        return False

    def owners(self, layers: Mapping[str, LayerShape]) -> Mapping[str, str]:  # noqa: ARG002  (see above)
        """For each layer that reads what another stores, the other's name.

        All of them are compressed together, with `Pooled` statistics if they read several inputs.
        """
        return {}

    @property
    def together(self) -> Compressor:
        """A key that is equal for weights compressed together; for the first of them it is the method itself."""
        return self

    @property
    def blocks_at_once(self) -> int:
        """The number of decoder blocks that are loaded together."""
        return 1

    @property
    def weighs_by_divergence(self) -> bool:
        """Whether the plan needs the KL divergence that each layer causes when it is compressed alone."""
        return False

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """Surveys of weights (o, i) that read one input, each with its statistics.

        Weights come one at a time, unless the method joins layers. Raises LayerError if a survey cannot be made.
        """
        raise NotImplementedError(f"{self.name} plans without a survey")

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """Forms of single weights, whose effect on the predictions is then measured.

        Raises LayerError if there is none.
        """
        raise NotImplementedError(f"{self.name} does not weigh by divergence")

    def plan(
        self,
        layers: Mapping[str, LayerShape],
        rest_bytes: int = 0,  # noqa: ARG002  (for methods that spend a budget)
    ) -> dict[str, Compressor]:
        """The compressor of each layer, with all options settled; layers that are left out stay as they are.

        `rest_bytes` is the size of everything else in the checkpoint. Before a survey the plan of a method that wants
        one is provisional: it has the bytes of the final plan. Raises RecipeError for a plan that cannot work.
        """
        return dict.fromkeys(layers, self)

    def leaves(self, layers: Mapping[str, LayerShape]) -> Mapping[str, str]:  # noqa: ARG002  (see above)
        """Layers that are too small for an option's default, which were not given, each with the reason: they stay."""
        return {}

    def predicted_error(self, layer: LayerShape) -> float | None:  # noqa: ARG002  (see above)
        """The relative output error that the plan expects of a layer; None if it expects nothing."""
        return None

    @abstractmethod
    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """Forms of weights (o, i), fp32, that read the same input; all have the same i. Inputs are left unchanged.

        Weights that share an input come together, so that a method can factorise its Gram matrix once, or quantise them
        as one stack; a method that reads a layer's own gradients gets each weight alone. Raises LayerError if a weight
        cannot be compressed.
        """

    def compress_alike(
        self, problems: Sequence[tuple[Sequence[Tensor], Statistics]]
    ) -> list[list[Form]]:
        """The forms of several groups of weights, each as `compress` takes it; all groups are equal in shapes.

        So come the experts of a mixture. A method whose steps are small for one of them solves them as a stack. Raises
        LayerError if one of them cannot be compressed.
        """
        return [self.compress(weights, stats) for weights, stats in problems]

    @abstractmethod
    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of tensor data that the form of a weight (o, i) will take, once planned."""


def refuse_damping(damping: float) -> None:
    """Raises RecipeError for a ridge that is negative, not a number, or 100 times the diagonal and more."""
    if not 0 <= damping < 100:
        raise RecipeError(
            f"must be at least 0 and below 100, a share of the median diagonal (e.g. 0.01), got {damping}",
            option="damping",
        )


def refuse_shrinkage(shrinkage: float) -> None:
    """Raises RecipeError for a value outside 0 to 1."""
    if not 0 <= shrinkage <= 1:
        raise RecipeError(
            f"must be between 0 and 1 (e.g. 0.1), got {shrinkage}", option="shrinkage"
        )
