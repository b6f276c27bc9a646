"""Base formats: a compressed checkpoint of any tool, read as layers that are stored in forms, and ordinary tensors.

A format is one file in this folder, or in another distribution: a subclass of `Base` with `name=`. It says by itself
what it recognises, how it reads a layer, how people call it and how others load it; nothing else has to know it.

Shapes: o = out_features, i = in_features, G = number of groups of inputs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from compress.bases.folder import CheckpointFolder
from compress.errors import CheckpointError, PluginError
from compress.forms.base import Form
from compress.forms.dense import Dense
from compress.forms.quantised import Quantised
from compress.models.checkpoint import some
from compress.registry import Registry

BASES: Registry[Base] = Registry("compress.bases", "base format")
"""Every format by name."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How others load a checkpoint of a format, for model cards; nothing has a default, so that none is forgotten."""

    packages: tuple[str, ...]
    """Distributions that transformers needs for it."""
    imports: tuple[str, ...]
    """Statements that must run before `from_pretrained`."""
    arguments: Mapping[str, str]
    """Further arguments of `from_pretrained`, as code: {"device_map": '"auto"'}."""
    peft: bool
    """Whether PEFT puts an adapter on the model that transformers makes of it."""
    vllm: tuple[str, ...] | None
    """Further arguments of `vllm serve`; None: vLLM does not serve it."""


class Base(ABC):
    """A compressed checkpoint on disk; each layer's form is made when it is asked for, and nothing is kept.

    Layers go by the names that the checkpoint gives them.
    """

    format: ClassVar[str]
    """The name in the registry: "gptq", "plain"."""
    loading: ClassVar[Loading]
    """How others load it."""
    ordinary: ClassVar[bool] = False
    """Whether it is what a checkpoint is that no other format recognises."""
    loads_itself: ClassVar[bool] = False
    """Whether transformers loads it without a reader once the toolkit is imported."""
    published: ClassVar[bool] = False
    """Whether models exist in it alone, so that its dequantised weights count as an original."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Last words of the names of the tensors that take the place of a weight; the first of them is always there."""
    idle_parts: ClassVar[tuple[str, ...]] = ()
    """Last words of the names of tensors that no weight is made of, such as scales of a cache of keys and values."""

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        """`name` registers it. Raises PluginError if it lacks what a model card says of it."""
        super().__init_subclass__(**kwargs)
        if not name:
            return
        if not isinstance(getattr(cls, "loading", None), Loading):
            raise PluginError(
                f"{cls.__module__}.{cls.__qualname__}: a base format needs `loading`, a Loading that says how others "
                "load it"
            )
        cls.format = name
        BASES.register(name, cls)

    def __init__(self, folder: CheckpointFolder) -> None:
        """Raises CheckpointError for tensors that belong to no layer, and for settings that are not read."""
        self.folder, self.reader = folder.path, folder.reader
        self.config: dict[str, Any] = dict(self._model_config(folder))
        """The model's config.json without its quantisation."""
        self.settings: dict[str, Any] = dict(self._settings(folder))
        """The settings of its quantisation."""
        self.layers = self._find_layers()

    @classmethod
    def recognises(cls, folder: CheckpointFolder) -> bool:
        """Whether a folder holds a checkpoint of this format: its quantisation has the format's name, by default."""
        return folder.quant_method == cls.format

    @property
    def tied_heads(self) -> Mapping[str, str]:
        """Heads that read a packed layer's weight, by name, each with that layer; none in most formats."""
        return {}

    def _model_config(self, folder: CheckpointFolder) -> Mapping[str, Any]:
        return folder.model_config

    def _settings(self, folder: CheckpointFolder) -> Mapping[str, Any]:
        return folder.quantisation or {}

    @property
    @abstractmethod
    def grid(self) -> str:
        """Bits, group size and the like, in a few words: "4 bits, groups of 128"; empty if the format says it all."""

    @property
    def description(self) -> str:
        """Format and grid, for people: "gptq, 4 bits, groups of 128"."""
        return ", ".join(part for part in (self.format, self.grid) if part)

    @property
    def unserved(self) -> tuple[str, ...]:
        """Reasons for which the servers of the format refuse this checkpoint of it."""
        return ()

    @property
    def producer(self) -> str | None:
        """The tool that wrote it, if it says so."""
        return None

    @abstractmethod
    def form(self, name: str) -> Form:
        """The form of a layer's weight (o, i). Raises CheckpointError naming the tensor that is wrong."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, int]:
        """(o, i) of a layer, from headers alone where these tell. Raises CheckpointError."""

    def tensors_of(self, name: str) -> list[str]:
        """Names of the tensors that stand for a layer's weight."""
        return [f"{name}.{part}" for part in self.parts if f"{name}.{part}" in self.reader]

    def stored_bytes(self, name: str) -> int:
        """Bytes of a layer's weight in the checkpoint, without its bias."""
        return sum(self.reader.nbytes(tensor) for tensor in self.tensors_of(name))

    @property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Stacked experts that are made from other tensors: the name that a model gives each, with the tensors'."""
        return {}

    def stack_shape(self, name: str) -> tuple[int, ...]:
        """The shape that a model gives stacked experts, from headers alone. Raises CheckpointError."""
        raise KeyError(name)

    def stack(self, name: str) -> Tensor:
        """Stacked experts as a model has them, in fp32 or the dtype that is exact. Raises CheckpointError."""
        raise KeyError(name)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks for reports on what the weights do not tell of how engines compute."""
        return ()

    @property
    def idle(self) -> list[str]:
        """Names of the tensors that no weight is made of."""
        taken = self._taken()
        return [name for name in self.reader if name not in taken and self._is_idle(name)]

    @property
    def plain(self) -> list[str]:
        """Names of the tensors that are what they seem."""
        taken = self._taken()
        return [name for name in self.reader if name not in taken and not self._is_idle(name)]

    def _is_idle(self, name: str) -> bool:
        return name.rpartition(".")[2] in self.idle_parts

    def _taken(self) -> set[str]:
        """Names of the tensors that layers and stacked experts are made of."""
        taken = {tensor for name in self.layers for tensor in self.tensors_of(name)}
        return taken.union(*self.stacks.values())

    def _find_layers(self) -> tuple[str, ...]:
        """Names of the layers that are stored as something else than their weight."""
        if not self.parts:
            return ()
        first = f".{self.parts[0]}"
        names = [key.removesuffix(first) for key in self.reader if key.endswith(first)]
        if not names:
            raise CheckpointError(
                f"{self.folder}: its config says {self.format}, but no tensor's name ends in {first}; "
                "the two do not belong together, download the checkpoint again"
            )
        known = {None, *names}
        orphans = [key for key in self.reader if self._layer_of(key) not in known]
        if orphans:
            raise CheckpointError(
                f"{self.folder}: {some(orphans)} without the {self.parts[0]} that belongs to it; "
                "the checkpoint is incomplete, download it again"
            )
        return tuple(names)

    def _layer_of(self, key: str) -> str | None:
        """Whose part a tensor is by its name; None for a name that an ordinary tensor may have."""
        ends = (f".{part}" for part in self.parts if part != "weight")
        return next((key.removesuffix(end) for end in ends if key.endswith(end)), None)

    def _tensor(self, name: str, part: str) -> Tensor:
        """One of a layer's tensors. Raises CheckpointError if it is not there."""
        if f"{name}.{part}" not in self.reader:
            raise CheckpointError(
                f"{self.folder}: {name}.{part} is missing, and {name}.{self.parts[0]} is there; "
                "the checkpoint is incomplete, download it again"
            )
        return self.reader[f"{name}.{part}"]

    def _words(self, name: str, part: str) -> Tensor:
        """One of a layer's tensors of packed codes. Raises CheckpointError if it is not int32."""
        words = self._tensor(name, part)
        if words.dtype != torch.int32:
            dtype = str(words.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.folder}: {name}.{part} is stored as {dtype}; codes are packed in int32"
            )
        return words

    def _shape_of(self, name: str, part: str) -> tuple[int, ...]:
        if f"{name}.{part}" not in self.reader:
            self._tensor(name, part)
        return tuple(self.reader.shape(f"{name}.{part}"))

    def _refuse_shape(self, name: str, part: str, expected: tuple[int, ...], why: str) -> None:
        found = self._shape_of(name, part)
        if found != expected:
            raise CheckpointError(
                f"{self.folder}: {name}.{part} has the shape {found}; it must be {expected} for {why}"
            )


def refuse_bad_scales(name: str, scales: Tensor) -> None:
    """Raises CheckpointError naming the layer, or tensor, if a scale is no number."""
    dtype = str(scales.dtype).removeprefix("torch.")
    if not scales.dtype.is_floating_point:
        why = f"its scales are stored as {dtype}, not in floating point"
    elif not bool(torch.isfinite(scales).all()):
        why = f"its scales ({dtype}) are not all finite numbers"
    else:
        return
    raise CheckpointError(f"{name}: {why}; the checkpoint is corrupt, download it again")


def refuse_bad_groups(name: str, groups_i: Tensor, n_inputs: int, n_groups: int) -> None:
    """Raises CheckpointError naming the layer if the groups of its inputs are not what its scales are for."""
    if groups_i.dtype.is_floating_point:
        raise CheckpointError(f"{name}: g_idx is {groups_i.dtype}; groups are counted in integers")
    if groups_i.shape != (n_inputs,):
        raise CheckpointError(
            f"{name}: g_idx has the shape {tuple(groups_i.shape)}; it must be ({n_inputs},) for {n_inputs} inputs"
        )
    low, high = int(groups_i.min()), int(groups_i.max())
    if low < 0 or high >= n_groups:
        raise CheckpointError(
            f"{name}: g_idx names groups {low} to {high}; there are scales for 0 to {n_groups - 1}"
        )


def table_in(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An entry that is a table of names and values, empty if it is not there. Raises CheckpointError naming it."""
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{key} in its quantisation's config is {found!r}, which is not a mapping"
        )
    return found


def names_in(settings: Mapping[str, Any], key: str) -> list[str]:
    """An entry that is a list of names, empty if it is not there. Raises CheckpointError naming it."""
    found = settings.get(key) or []
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{key} in its quantisation's config is {found!r}, which is not a list of names"
        )
    return list(found)


def fits(pattern: str, name: str) -> bool:
    """Whether a regular expression of a config fits a name from its start. Raises CheckpointError naming it."""
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise CheckpointError(
            f"{pattern!r} in its quantisation's config is not a valid regular expression ({error})"
        ) from error


def is_whole(number: object, least: int) -> TypeGuard[int]:
    """Whether it is an integer of so much or more, and neither a truth value nor 4.0."""
    return type(number) is int and number >= least


def on_grid(
    codes_oi: Tensor,
    scales_og: Tensor,
    zeros_og: Tensor,
    *,
    bits: int,
    group_size: int,
    groups_i: Tensor,
) -> Form:
    """Codes (o, i) on a grid as the form that is exact.

    That is `Quantised` where fp16 holds the scales, else the dense weight as readers of the format compute it, in the
    scales' dtype.
    """
    in_order = torch.arange(codes_oi.shape[1]) // group_size
    ordered = torch.equal(groups_i.to(torch.int64), in_order)
    if exact_in_fp16(scales_og):
        symmetric = bool((zeros_og == 1 << (bits - 1)).all())
        return Quantised.from_codes(
            codes_oi,
            scales_og,
            None if symmetric else zeros_og,
            bits=bits,
            group_size=group_size,
            groups_i=None if ordered else groups_i,
        )
    columns = groups_i.to(torch.int64)
    steps_oi = codes_oi.float() - zeros_og.float()[:, columns]
    return Dense((steps_oi * scales_og.float()[:, columns]).to(scales_og.dtype))


def exact_in_fp16(scales: Tensor) -> bool:
    """Whether fp16 holds every one of them."""
    return torch.equal(scales.to(torch.float16).to(scales.dtype), scales)
