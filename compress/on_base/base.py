"""A run on top of a compressed checkpoint: its forms take the places of the model's layers, and get corrections.

Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from calibration.skeleton import PartLoader, decoder_blocks
from calibration.statistics.collection import Statistics
from calibration.walk import Block, is_linear
from compress.bases import AsDense
from compress.exports import LayerExport
from compress.families.correction import Correction
from compress.families.given import Given, Held
from compress.families.low_rank import Factors, as_low_rank
from compress.forms.base import Form
from compress.forms.dense import Dense
from compress.forms.low_rank import LowRank
from compress.forms.sum import Sum
from compress.models.layers import is_transposed
from compress.planning.plan import Plan
from compress.report.report import KeptTensor
from compress.solvers.linalg import to_storage

HEAD = "lm_head.weight"
M = TypeVar("M", bound=Correction)


@dataclass(frozen=True)
class Rescaling:
    """W_base ~ diag(rows) W diag(columns) for the weight W of the original: see `rescaling`."""

    rows_o: Tensor
    columns_i: Tensor

    def as_original(self, weight_oi: Tensor) -> Tensor:
        """A weight of the base, in the original's scale."""
        return weight_oi / self.rows_o[:, None] / self.columns_i

    def in_base(self, correction: Factors) -> LowRank:
        """A correction made in the original's scale, for the base's layer. Raises LayerError if a factor overflows."""
        factors = as_low_rank(correction)
        up, down = factors.up.weight.detach(), factors.down.weight.detach()
        return LowRank.from_factors(
            to_storage(up.float() * self.rows_o[:, None], up.dtype),
            to_storage(down.float() * self.columns_i, down.dtype),
        )


@dataclass(frozen=True)
class OnBase:
    """A checked base checkpoint, and how what it holds gets into the model."""

    view: AsDense
    loader: PartLoader
    """Of the view, into the model that the original is loaded into."""
    held: tuple[Held, ...]
    """Linear layers of the blocks that the base has changed: those that can be corrected."""
    packed_bytes: Mapping[str, int]
    """Of the form of every packed layer, by its weight's name in the view."""
    changed: tuple[str, ...]
    """Tensors within the blocks that no correction corrections, and that are not the original's: norms."""
    notes: tuple[str, ...]
    """What a reader of the report should know of it."""
    own_head: bool = False
    """Whether it has a head that is not its embeddings."""
    rescalings: Mapping[str, Rescaling] = field(default_factory=dict)
    """Of layers that read, or put out, something rescaled."""
    reference: str = ""
    """What an adapter is to call the checkpoint: the folder as it was named, or the id of the hub."""
    revision: str | None = None
    """The commit, for a checkpoint of the hub."""

    @property
    def fingerprint(self) -> str:
        """Sha256 of its files."""
        return self.view.base.reader.fingerprint

    def method(self, method: M) -> M:
        """The correction with what the checkpoint holds as its base."""
        text = f"{self.view.base.description}, sha256 {self.fingerprint[:12]}"
        return replace(method, base=Given(stored_as=text, held=self.held))

    def plan(self, plan: Plan, original_bytes: int) -> Plan:
        """The plan with the base's own tensors among those that are kept."""
        return replace(
            plan,
            kept=tuple(self._kept({layer.name for layer in plan.layers})),
            original_bytes=original_bytes,
            base_bytes=self.view.base.reader.total_bytes,
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
        """Of a tensor where it is copied to: codes stay codes in linear layers alone, elsewhere they are expanded."""
        if not self.view.is_packed(key):
            return self.view.nbytes(key)
        if self.loader.memory_names[key].removesuffix(".weight") in packed:
            return self.packed_bytes[key]
        return math.prod(self.view.shape(key)) * torch.float32.itemsize

    def described(self, name: str, form: Form) -> str | None:
        """How the base itself calls a layer whose codes no form holds, "bitsandbytes, nf4"; None where a form does."""
        if not self.view.is_packed(self._key(f"{name}.weight")) or not isinstance(form, Dense):
            return None
        return self.view.base.description

    def stored_bytes(self, name: str) -> int:
        """Of a layer's weight in the base checkpoint."""
        return self.view.nbytes(self._key(f"{name}.weight"))

    def form(self, name: str, device: torch.device) -> Form:
        """What stands for the weight of a layer, as the model calls it."""
        return self.view.form(self._key(f"{name}.weight")).to(device)

    def packed_layers(self) -> Iterator[tuple[str, Callable[[], LayerExport]]]:
        """Packed linear layers, as the model calls them, each to be read when it is called for."""
        modules = dict(self.loader.model.named_modules())
        for key in self.view:
            name = self.loader.memory_names[key].removesuffix(".weight")
            if self.view.is_packed(key) and is_linear(modules.get(name, nn.Identity())):
                yield name, partial(self._as_it_is, name)

    def _as_it_is(self, name: str) -> LayerExport:
        turned = is_transposed(self.loader.model.get_submodule(name))
        return LayerExport(name, self.form(name, torch.device("cpu")), self.bias(name), turned)

    def bias(self, name: str) -> Tensor | None:
        """As stored; None if the layer has none."""
        keys = self._keys.get(f"{name}.bias", [])
        return self.view[keys[0]] if keys else None

    def corrected(
        self, names: Sequence[str], weights: Sequence[Tensor], method: Correction, stats: Statistics
    ) -> list[Form]:
        """The base's forms of these layers, each corrected towards the original's weight (o, i), fp32.

        A sum of the base's form alone where there is no correction.

        Raises LayerError for a correction that cannot be had, CheckpointError for a layer that cannot be read.
        """
        forms = [self.form(name, weights[0].device) for name in names]
        targets = method.targets(weights, stats)
        residuals = [
            self.residual(name, target, form)
            for name, target, form in zip(names, targets, forms, strict=True)
        ]
        corrections = method.corrections(residuals, stats)
        return [
            Sum([form] if correction is None else [form, self._in_place(name, correction)])
            for name, form, correction in zip(names, forms, corrections, strict=True)
        ]

    def bare(self, names: Sequence[str], device: torch.device) -> list[Form]:
        """The base's forms of these layers, as sums without a correction."""
        return [Sum([self.form(name, device)]) for name in names]

    def residual(self, name: str, weight: Tensor, form: Form) -> Tensor:
        """What a form of the base lost of a layer's weight (o, i): fp64, in the original's scale."""
        return weight.double() - self.dense(name, form).double()

    def _in_place(self, name: str, correction: Factors) -> Factors:
        return self.rescalings[name].in_base(correction) if name in self.rescalings else correction

    def dense(self, name: str, form: Form) -> Tensor:
        """The weight (o, i) that a form stands for in a layer's place, in the original's scale."""
        rescaling = self.rescalings.get(name)
        return form.dense() if rescaling is None else rescaling.as_original(form.dense())

    def install(self, block: Block, replaced: Collection[str], device: torch.device) -> None:
        """Put everything else that the base has of a block in the original's place."""
        prefix, _ = decoder_blocks(self.loader.model)
        self.loader.load([f"{prefix}.{k}." for k in block.indices], device, without=replaced)

    def load_outside(self, device: torch.device) -> None:
        """Put what the base has outside the blocks in the original's place."""
        model = self.loader.model
        prefix, _ = decoder_blocks(model)
        self.loader.load_outside(f"{prefix}.", device)
        if self.own_head:  # which the original, whose config the model has, may tie
            weight = self.view[HEAD].to(device, model.dtype)
            model.get_output_embeddings().weight = nn.Parameter(weight, requires_grad=False)

    def _key(self, name: str) -> str:
        """In the view, of one of the model's parameters."""
        return self._keys[name][0]

    @cached_property
    def _keys(self) -> dict[str, list[str]]:
        return self.loader.keys_of()


def base_of(form: Form) -> Form:
    """What `corrected` added a correction to."""
    assert isinstance(form, Sum)
    base = form.terms[0]
    assert isinstance(base, Form)
    return base


def correction_of(form: Form) -> Factors | None:
    """What `corrected` added; None where there is no correction."""
    assert isinstance(form, Sum)
    if len(form.terms) == 1:
        return None
    correction = form.terms[-1]
    assert isinstance(correction, Factors)
    return correction
