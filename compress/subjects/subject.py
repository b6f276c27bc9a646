"""The subject of a run: a model, or a compressed checkpoint of one, behind one interface.

Stages call these methods and never ask which of the two it is.
Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor
from transformers import PretrainedConfig

from calibration.skeleton import PartLoader
from calibration.statistics.collection import Statistics
from calibration.text.data import Tokens
from calibration.walk import Block
from compress.config.recipe import Recipe
from compress.exports import Exporter, LayerExport
from compress.families.base import Compressor, Survey
from compress.families.low_rank import Factors
from compress.forms.base import Form
from compress.models.checkpoint import Tensors
from compress.models.resolve import SourceModel
from compress.planning.layer import PlannedLayer
from compress.planning.plan import Plan
from compress.report.report import BaseReport

Problem = tuple[Sequence[str], Sequence[Tensor], Statistics]
"""Names of layers that are solved together, their weights in fp32, and their statistics."""


@dataclass(frozen=True)
class Original:
    """The model that a recipe names, as it was found."""

    source: SourceModel
    reader: Tensors
    config: PretrainedConfig
    loader: PartLoader
    uncalled: frozenset[str] = frozenset()
    """Layers whose weight the model reads without calling them."""


@dataclass(frozen=True)
class Description:
    """A compressed layer as reports describe it."""

    terms: tuple[str, ...]
    """Each term of the form in a few words: "4-bit g64", "rank 32"."""
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Subject(ABC):
    """The thing that a run compresses or corrects. Layers have the names of the model in memory; weights are (o, i)."""

    original: Original
    """The model whose outputs a run keeps to."""
    notes: tuple[str, ...] = ()
    """Remarks for the report."""

    @property
    @abstractmethod
    def loader(self) -> PartLoader:
        """The loader of the tensors that no layer of the run replaces."""

    @abstractmethod
    def plan(self, recipe: Recipe, found: Mapping[str, Survey] = MappingProxyType({})) -> Plan:
        """The plan of the recipe's method, given what its survey found. Raises RecipeError or CheckpointError."""

    @abstractmethod
    def settled(self, recipe: Recipe, few: Tokens, device: torch.device) -> Self:
        """The subject with all that a few tokens tell of it. Raises RecipeError or CheckpointError."""

    # In the block loop

    @abstractmethod
    def residuals(
        self, layers: Sequence[PlannedLayer], weights: Sequence[Tensor], stats: Statistics
    ) -> list[Tensor]:
        """The errors that corrections of these layers have to make good: fp64, in the original's scale."""

    @abstractmethod
    def forms(
        self,
        names: Sequence[str],
        weights: Sequence[Tensor],
        method: Compressor,
        stats: Statistics,
    ) -> list[Form]:
        """Forms of layers that are solved together, given the original's weights in fp32. Raises LayerError."""

    def forms_of_alike(
        self, problems: Sequence[Problem], method: Compressor
    ) -> Sequence[Sequence[Form]]:
        """Forms of several such groups, equal in shapes and in their method, each with inputs of its own."""
        return [self.forms(names, weights, method, stats) for names, weights, stats in problems]

    @abstractmethod
    def dense(self, name: str, form: Form) -> Tensor:
        """The weight that a form stands for in a layer's place, in the original's scale."""

    @abstractmethod
    def uncorrected(self, name: str, form: Form) -> Tensor | None:
        """The weight that a form without its correction stands for; None where the run makes all of the form."""

    @abstractmethod
    def approximated(self, name: str, form: Form, weight: Tensor) -> tuple[Form, Tensor] | None:
        """The part of a form that the run has made, and the matrix that it approximates; None if there is none."""

    @abstractmethod
    def described(
        self, name: str, form: Form, written: Description, exports: Sequence[str]
    ) -> Description:
        """A description of a layer as these exports hold it; `written` describes its form alone."""

    @abstractmethod
    def untouched(self, layer: PlannedLayer) -> Description:
        """A description of a layer that an error has left as it was."""

    @abstractmethod
    def bias(self, name: str) -> Tensor | None:
        """A layer's bias as stored; None if it has none."""

    @abstractmethod
    def install(self, block: Block, replaced: Collection[str], device: torch.device) -> None:
        """Put everything into a finished block that is not the original's, layers that were replaced apart."""

    @abstractmethod
    def load_outside(self, device: torch.device) -> None:
        """Load everything outside the blocks."""

    @abstractmethod
    def replace_outside(self, device: torch.device) -> None:
        """Put everything outside the blocks that is not the original's into the place of the original's."""

    # On the way out

    @abstractmethod
    def exporters(
        self, folders: Mapping[str, Path], references: Mapping[str, str]
    ) -> list[Exporter]:
        """Writers of formats, by name, into their folders; `references` are what adapters beside them call these."""

    @abstractmethod
    def exported(self, form: Form) -> tuple[Form, Factors | None]:
        """A finished form, and the part of it that the subject has not, where it is a compressed checkpoint."""

    @abstractmethod
    def packed_layers(self) -> Iterator[tuple[str, Callable[[], Sequence[LayerExport]]]]:
        """Layers that the subject stores in forms by name, each read when it is called for, with heads tied to it."""

    @abstractmethod
    def report(self) -> BaseReport | None:
        """The report's section on a checkpoint that was corrected; None if the model itself was compressed."""
