"""A compressed checkpoint that is corrected: its forms take the places of the model's layers, and get corrections.

Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from calibration.layers import is_linear
from calibration.propagation import Propagate
from calibration.skeleton import PartLoader, decoder_blocks
from calibration.statistics.collection import Statistics
from calibration.text.data import Tokens
from calibration.walk import Block
from compress.bases import AsDense
from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.exports import EXPORTS, Exporter, LayerExport
from compress.exports.base import needs_base
from compress.families.base import Compressor, Survey
from compress.families.correction import Correction
from compress.families.correction_options import FULL_BITS
from compress.families.given import Given, Held
from compress.families.low_rank import Factors
from compress.forms.base import Form
from compress.forms.dense import Dense
from compress.forms.sum import Sum
from compress.forms.tied import Tied
from compress.models.layers import is_transposed
from compress.planning.layer import PlannedLayer
from compress.planning.make import make_plan
from compress.planning.plan import Plan
from compress.report.report import BaseReport, KeptTensor
from compress.subjects.rescaling import Rescaling, rescalings
from compress.subjects.subject import Description, Subject


@dataclass(frozen=True, kw_only=True)
class CorrectedBase(Subject):
    """A checked base checkpoint, and how what it holds gets into the model of the original."""

    spec: str
    """The value of the option base_checkpoint."""
    view: AsDense
    into: PartLoader
    """Loads the view into the model that the original is loaded into."""
    held: tuple[Held, ...]
    """Linear layers of the blocks that the base has changed: those that can be corrected."""
    packed_bytes: Mapping[str, int]
    """Bytes of the form of every packed layer, by its weight's name in the view."""
    changed: tuple[str, ...]
    """Tensors of the blocks that get no correction, and that are not the original's: norms."""
    reference: str
    """The name by which an adapter refers to the checkpoint: the folder as it was named, or the id of the hub."""
    revision: str | None
    """The commit, for a checkpoint of the hub."""
    rescalings: Mapping[str, Rescaling] = field(default_factory=dict)
    """The factors of layers whose inputs or outputs the base has rescaled, by name."""

    @property
    def loader(self) -> PartLoader:
        """The loader of the base's tensors."""
        return self.into

    @property
    def folder(self) -> Path:
        """The folder of the base."""
        return self.view.base.folder

    @property
    def fingerprint(self) -> str:
        """Sha256 of the base's files."""
        return self.view.base.reader.fingerprint

    def plan(self, recipe: Recipe, found: Mapping[str, Survey] = MappingProxyType({})) -> Plan:
        """Corrections of what the checkpoint holds, and the base's own tensors among those that are kept."""
        method, reader = recipe.method, self.original.reader
        assert isinstance(method, Correction)  # as the recipe has made sure
        text = f"{self.view.base.description}, sha256 {self.fingerprint[:12]}"
        on_top = replace(method, base=Given(stored_as=text, held=self.held))
        patterns = (recipe.include, recipe.exclude)
        plan = make_plan(
            self.original.loader, reader, on_top, patterns, found, self.original.uncalled
        )
        if not plan.layers:
            raise RecipeError(
                f"{self.spec} holds the original's own weights in the layers that are chosen, so there is nothing to "
                "correct; name the compressed checkpoint, or other layers",
                option="base_checkpoint",
            )
        return replace(
            plan,
            kept=tuple(self._kept({layer.name for layer in plan.layers})),
            original_bytes=reader.total_bytes,
            base_bytes=self.view.base.reader.total_bytes,
        )

    def settled(self, recipe: Recipe, few: Tokens, device: torch.device) -> Self:
        """The base with the rescaling of its layers found, if a norm in its blocks is not the original's."""
        if not self.changed:
            return self
        note = (
            f"the base checkpoint has moved scales between its norms and its layers ({len(self.changed)} norms differ "
            "from the original's, and what they feed makes up for it); corrections are made in the original's scale, "
            "then rescaled likewise"
        )
        found = rescalings(self, self.original.loader, few, device)
        if found:
            self._refuse_rescaled(recipe)
        return replace(self, rescalings=found, notes=(*self.notes, note))

    def _refuse_rescaled(self, recipe: Recipe) -> None:
        """Raises RecipeError if layers would have to be put among norms that are not yet the base's."""
        if recipe.propagate is Propagate.SUBLAYER:
            raise RecipeError(
                f"sublayer, but {self.spec} has moved scales between its norms and its layers, "
                "which come into a block together; use --propagate block",
                option="propagate",
            )
        method = recipe.method
        if isinstance(method, Correction) and method.widths != (FULL_BITS,):
            raise RecipeError(
                f"{self.spec} has moved scales between its norms and its layers, and a correction in their scale is "
                "not on a grid any more; use 16",
                option="method.adapter_bits",
            )

    def _kept(self, planned: Collection[str]) -> Iterable[KeptTensor]:
        prefix, _ = decoder_blocks(self.loader.model)
        layers = dict(self.packed_layers())
        for key in self.view:
            name = self.loader.memory_names[key]
            if name.removesuffix(".weight") in planned:
                continue
            reason = "the base checkpoint's own"
            if self.view.is_packed(key):
                reason = "packed in the base checkpoint, without a correction"
            elif not name.startswith(f"{prefix}."):
                reason = "outside the decoder blocks"
            shape, n_bytes = self.view.shape(key), self._copied_bytes(key, layers)
            yield KeptTensor(name=key, shape=shape, reason=reason, n_bytes=n_bytes)

    def _copied_bytes(self, key: str, packed: Collection[str]) -> int:
        """Bytes of a tensor in a copy of the base, where codes stay codes in linear layers alone."""
        if not self.view.is_packed(key):
            return self.view.nbytes(key)
        if self.loader.memory_names[key].removesuffix(".weight") in packed:
            return self.packed_bytes[key]
        return math.prod(self.view.shape(key)) * torch.float32.itemsize

    def form(self, name: str, device: torch.device) -> Form:
        """The base's form of a layer."""
        return self.view.form(self._key(f"{name}.weight")).to(device)

    def packed_layers(self) -> Iterator[tuple[str, Callable[[], Sequence[LayerExport]]]]:
        """The linear layers, and embeddings, that the base has packed."""
        modules = dict(self.loader.model.named_modules())
        for key in self.view:
            name = self.loader.memory_names[key].removesuffix(".weight")
            module = modules.get(name, nn.Identity())
            if self.view.is_packed(key) and (is_linear(module) or isinstance(module, nn.Embedding)):
                yield name, partial(self._as_it_is, name)

    def _as_it_is(self, name: str) -> list[LayerExport]:
        turned = is_transposed(self.loader.model.get_submodule(name))
        form = self.form(name, torch.device("cpu"))
        heads = [
            LayerExport(head, Tied(form.shape, owner), None, transposed=False, in_source=False)
            for head, owner in self.view.base.tied_heads.items()
            if owner == name
        ]
        return [LayerExport(name, form, self.bias(name), turned), *heads]

    def bias(self, name: str) -> Tensor | None:
        """The bias in the base, which may have changed it."""
        keys = self._keys.get(f"{name}.bias", [])
        return self.view[keys[0]] if keys else None

    def forms(
        self,
        names: Sequence[str],
        weights: Sequence[Tensor],
        method: Compressor,
        stats: Statistics,
    ) -> list[Form]:
        """The base's forms, each corrected towards the original's weight; alone where the plan has no correction.

        All of them are sums. Raises CheckpointError for a layer that cannot be read.
        """
        forms = [self.form(name, weights[0].device) for name in names]
        if not isinstance(method, Correction):
            return [Sum([form]) for form in forms]
        targets = method.targets(weights, stats)
        residuals = [
            self._residual(name, target, form)
            for name, target, form in zip(names, targets, forms, strict=True)
        ]
        corrections = method.corrections(residuals, stats)
        return [
            Sum([form] if correction is None else [form, self._in_place(name, correction)])
            for name, form, correction in zip(names, forms, corrections, strict=True)
        ]

    def residuals(
        self, layers: Sequence[PlannedLayer], weights: Sequence[Tensor], stats: Statistics
    ) -> list[Tensor]:
        """The errors of the base's forms."""
        del stats
        return [
            self._residual(layer.name, weight, self.form(layer.name, weight.device))
            for layer, weight in zip(layers, weights, strict=True)
        ]

    def _residual(self, name: str, weight: Tensor, form: Form) -> Tensor:
        """A layer's weight (o, i) less the form of the base: fp64, in the original's scale."""
        return weight.double() - self.dense(name, form).double()

    def _in_place(self, name: str, correction: Factors) -> Factors:
        return self.rescalings[name].in_base(correction) if name in self.rescalings else correction

    def dense(self, name: str, form: Form) -> Tensor:
        """The dense form, rescaled where the base has moved scales."""
        rescaling = self.rescalings.get(name)
        return form.dense() if rescaling is None else rescaling.as_original(form.dense())

    def uncorrected(self, name: str, form: Form) -> Tensor | None:
        """The weight that the base's form stands for."""
        return self.dense(name, _base_in(form))

    def approximated(self, name: str, form: Form, weight: Tensor) -> tuple[Form, Tensor] | None:
        """The correction, which approximates what the base lost."""
        correction = _correction_in(form)
        if correction is None:
            return None
        return correction, weight.double() - self.dense(name, _base_in(form))

    def described(
        self, name: str, form: Form, written: Description, exports: Sequence[str]
    ) -> Description:
        """The base's tensors stay what they are where an export does not hold them; else the form as it is written."""
        if not needs_base(exports):
            return written
        base = _base_in(form)
        key = self._key(f"{name}.weight")
        # Codes that no form holds are dense here; the base's own description says what they are.
        of_base = self.view.is_packed(key) and isinstance(base, Dense)
        first = self.view.base.description if of_base else written.terms[0]
        n_bytes = written.n_bytes + self.view.nbytes(key) - base.n_bytes()
        return Description((first, *written.terms[1:]), n_bytes)

    def untouched(self, layer: PlannedLayer) -> Description:
        """The base's own layer."""
        return Description(
            ("left as the base has it",), self.view.nbytes(self._key(f"{layer.name}.weight"))
        )

    def exported(self, form: Form) -> tuple[Form, Factors | None]:
        """The form with its correction, or the base's form alone."""
        correction = _correction_in(form)
        return (_base_in(form) if correction is None else form), correction

    def exporters(
        self, folders: Mapping[str, Path], references: Mapping[str, str]
    ) -> list[Exporter]:
        """Writers that take everything which no layer replaces from the base, to which adapters belong."""
        del references
        source = replace(self.original.source, has_own_head=bool(self.into.untied))
        given = (source, self.reference, self.view.whole, self.revision)
        return [EXPORTS[name](folder, *given) for name, folder in folders.items()]

    def report(self) -> BaseReport | None:
        """Format, producer and size of the base."""
        base = self.view.base
        return BaseReport(
            checkpoint=self.spec if self.revision else self.reference,
            format=base.description,
            producer=base.producer,
            fingerprint=self.fingerprint,
            tensor_bytes=base.reader.total_bytes,
            n_packed=len(base.layers),
            revision=self.revision,
            kind=base.format,
            unserved=base.unserved,
        )

    def install(self, block: Block, replaced: Collection[str], device: torch.device) -> None:
        """Load everything else of the block from the base."""
        prefix, _ = decoder_blocks(self.loader.model)
        self.loader.load([f"{prefix}.{k}." for k in block.indices], device, without=replaced)

    def load_outside(self, device: torch.device) -> None:
        """Load the base's tensors outside the blocks, with the head that it may have beside its embeddings."""
        prefix, _ = decoder_blocks(self.loader.model)
        self.loader.load_outside(f"{prefix}.", device)

    def replace_outside(self, device: torch.device) -> None:
        """Load the base's tensors over the original's."""
        self.load_outside(device)

    def _key(self, name: str) -> str:
        """The name in the view of a parameter of the model."""
        return self._keys[name][0]

    @cached_property
    def _keys(self) -> dict[str, list[str]]:
        return self.loader.keys_of()


def _base_in(form: Form) -> Form:
    """The base's form in one that `forms` made."""
    assert isinstance(form, Sum)
    base = form.terms[0]
    assert isinstance(base, Form)
    return base


def _correction_in(form: Form) -> Factors | None:
    """The correction in a form that `forms` made; None where there is none."""
    assert isinstance(form, Sum)
    if len(form.terms) == 1:
        return None
    correction = form.terms[-1]
    assert isinstance(correction, Factors)
    return correction
