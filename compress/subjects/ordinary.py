"""A model that is compressed itself: methods make whole forms of its weights, and all else is its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from calibration.skeleton import PartLoader, decoder_blocks
from calibration.statistics.collection import Statistics
from calibration.text.data import Tokens
from calibration.walk import Block
from compress.config.recipe import Recipe
from compress.embeddings.plan import OutsideBlocks, narrowed, planned_tables
from compress.errors import RecipeError
from compress.exports import EXPORTS, Exporter, LayerExport
from compress.families.base import Compressor, Survey
from compress.families.correction import Correction
from compress.families.low_rank import Factors
from compress.forms.base import Form
from compress.planning.dense import stored_in_no_codes
from compress.planning.layer import PlannedLayer
from compress.planning.make import Linears, make_plan
from compress.planning.plan import Plan
from compress.report.report import BaseReport
from compress.subjects.subject import Description, Problem, Subject


@dataclass(frozen=True, kw_only=True)
class OrdinaryModel(Subject):
    """A model whose weights are compressed; statistics and everything that is copied are its own."""

    @property
    def loader(self) -> PartLoader:
        """The loader of the model's tensors."""
        return self.original.loader

    def plan(self, recipe: Recipe, found: Mapping[str, Survey] = MappingProxyType({})) -> Plan:
        """The plan of the method, without layers that no format would store in codes.

        Raises RecipeError too for a layer that an export format cannot hold.
        """
        plan = self._checked_plan(recipe, found)
        uncoded = stored_in_no_codes(plan.layers, recipe.export)
        return self._checked_plan(recipe, found, uncoded) if uncoded else plan

    def _checked_plan(
        self,
        recipe: Recipe,
        found: Mapping[str, Survey],
        left_out: Mapping[str, str] = MappingProxyType({}),
    ) -> Plan:
        plan = make_plan(
            self.loader,
            self.original.reader,
            recipe.method,
            (recipe.include, recipe.exclude),
            found,
            self.original.uncalled,
            partial(self._others, recipe),
            left_out,
        )
        shapes = {layer.name: layer.shape for layer in plan.layers}
        compressors = {layer.name: layer.compressor for layer in plan.layers}
        for name in recipe.export:
            self._refuse_stacked(name, compressors)
            EXPORTS[name].check(compressors, shapes)
            self._refuse_model(name, compressors, shapes)
            self._refuse_experts(name, compressors)
        return plan

    def _refuse_experts(self, export: str, compressors: Mapping[str, Compressor]) -> None:
        """Raises RecipeError for a format whose readers do not take the form of an expert's weight."""
        experts = tuple(f"{path}." for path in self.loader.experts)
        for name in (name for name in compressors if name.startswith(experts)):
            if problem := EXPORTS[export].problem_of_expert(compressors[name]):
                raise RecipeError(
                    f"{export} cannot hold {name}: {problem}; choose native or dense, a method without corrections, or "
                    "--exclude '*experts*'",
                    option="export",
                )

    def _refuse_model(
        self,
        export: str,
        compressors: Mapping[str, Compressor],
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        """Raises RecipeError for a format whose readers do not take the model."""
        source, config = self.original.source, self.loader.model.config
        if problem := EXPORTS[export].problem_of_model(source, config, compressors, shapes):
            raise RecipeError(
                f"{export} cannot hold {source.spec}: {problem}; choose another export",
                option="export",
            )

    def _refuse_stacked(self, export: str, layers: Collection[str]) -> None:
        """Raises RecipeError for a format that cannot hold an expert of a stack."""
        problem, slices = EXPORTS[export].problem_of_stacks(), self.loader.slices
        stacked = [name for name in layers if f"{name}.weight" in slices]
        if problem and stacked:
            raise RecipeError(
                f"{export} cannot hold {stacked[0]}, which {self.original.source.spec} stores in one tensor with "
                f"{len(stacked) - 1} more: {problem}; choose native or dense, or --exclude '*experts*'",
                option="export",
            )

    def _others(self, recipe: Recipe, linears: Linears) -> OutsideBlocks:
        """Embeddings and heads as the recipe asks, and what else is stored narrower."""
        reader, asked = self.original.reader, (recipe.embeddings, recipe.head)
        chosen = frozenset(linears.tensors.values())
        found = planned_tables(self.loader, reader, asked, recipe.export, recipe.method)
        tables = tuple(table for table in found if chosen.isdisjoint(table.tensors))
        keys = self.loader.keys_of()
        # Layers write their biases in the dtype that these have.
        layers = (*linears.tensors, *(t.head or t.name for t in tables))
        biases = [key for layer in layers for key in keys.get(f"{layer}.bias", ())]
        taken = chosen | {key for table in tables for key in table.tensors} | set(biases)
        return OutsideBlocks(tables, narrowed(reader, taken), recipe.export[0])

    def settled(self, recipe: Recipe, few: Tokens, device: torch.device) -> Self:
        """The model as it is: tokens tell nothing more of it."""
        del recipe, few, device
        return self

    def residuals(
        self, layers: Sequence[PlannedLayer], weights: Sequence[Tensor], stats: Statistics
    ) -> list[Tensor]:
        """The errors of the forms that the correction's base makes."""
        correction = layers[0].compressor
        assert isinstance(correction, Correction)  # a provisional plan gives every layer one
        forms = correction.resolved_base.compress(weights, stats)
        return [w.double() - form.dense().double() for w, form in zip(weights, forms, strict=True)]

    def forms(
        self,
        names: Sequence[str],
        weights: Sequence[Tensor],
        method: Compressor,
        stats: Statistics,
    ) -> list[Form]:
        """The forms that the method makes."""
        del names
        return method.compress(weights, stats)

    def forms_of_alike(
        self, problems: Sequence[Problem], method: Compressor
    ) -> Sequence[Sequence[Form]]:
        """The forms that the method makes of all of them at once."""
        return method.compress_alike([(weights, stats) for _, weights, stats in problems])

    def dense(self, name: str, form: Form) -> Tensor:
        """The dense form."""
        del name
        return form.dense()

    def uncorrected(self, name: str, form: Form) -> Tensor | None:
        """None: the run makes all of the form."""
        del name, form
        return None

    def approximated(self, name: str, form: Form, weight: Tensor) -> tuple[Form, Tensor] | None:
        """The whole form, which approximates the weight."""
        del name
        return form, weight

    def described(
        self, name: str, form: Form, written: Description, exports: Sequence[str]
    ) -> Description:
        """The form as it is written."""
        del name, form, exports
        return written

    def untouched(self, layer: PlannedLayer) -> Description:
        """The weight, as it was."""
        return Description(("left as it was",), layer.bytes_before)

    def bias(self, name: str) -> Tensor | None:
        """The bias in the checkpoint; the model in memory may have cast it to the dtype that it computes in."""
        keys = self._keys.get(f"{name}.bias", [])
        return self.original.reader[keys[0]] if keys else None

    def install(self, block: Block, replaced: Collection[str], device: torch.device) -> None:
        """Nothing to do: everything else is the original's."""

    def load_outside(self, device: torch.device) -> None:
        """Load the model's tensors outside the blocks."""
        prefix, _ = decoder_blocks(self.loader.model)
        self.loader.load_outside(f"{prefix}.", device)

    def replace_outside(self, device: torch.device) -> None:
        """Nothing to do: everything is the original's."""

    def exporters(
        self, folders: Mapping[str, Path], references: Mapping[str, str]
    ) -> list[Exporter]:
        """Writers by name; an adapter beside its checkpoint belongs to that."""
        return [
            EXPORTS[name](folder, self.original.source, references[name])
            for name, folder in folders.items()
        ]

    def exported(self, form: Form) -> tuple[Form, Factors | None]:
        """The form, with its correction if it has one."""
        return form, None

    def packed_layers(self) -> Iterator[tuple[str, Callable[[], Sequence[LayerExport]]]]:
        """No layer is packed."""
        yield from ()

    def report(self) -> BaseReport | None:
        """None: no other checkpoint was read."""
        return None

    @cached_property
    def _keys(self) -> dict[str, list[str]]:
        return self.loader.keys_of()
