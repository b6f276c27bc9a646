"""A compressed checkpoint seen as the ordinary one that it stands for, every tensor made when it is asked for.

So that what finds, places and checks the weights of a model serves compressed checkpoints too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibration.skeleton import PartLoader
from compress.bases.base import Base
from compress.forms.base import Form
from compress.forms.dense import Dense

WEIGHT = ".weight"


class AsDense(Mapping[str, Tensor]):
    """The tensors that an ordinary checkpoint of this model has, from a compressed one.

    A packed layer's weight is fp32, turned where the model stores it as (i, o). Biases that are nought where the model
    has none are left out: old writers store them for every layer.
    """

    def __init__(self, base: Base, model: PreTrainedModel) -> None:
        """`model` may be a skeleton."""
        self.base = base
        modules = dict(model.named_modules())
        prefix = f"{model.base_model_prefix}."
        self._modules = {**{n.removeprefix(prefix): m for n, m in modules.items()}, **modules}
        self._packed = {f"{name}{WEIGHT}": name for name in base.layers}
        # A dictionary keeps the order.
        self._plain = dict.fromkeys(n for n in base.plain if not self._is_idle_bias(n))

    def _is_idle_bias(self, name: str) -> bool:
        layer, _, leaf = name.rpartition(".")
        if leaf != "bias" or layer not in self.base.layers:
            return False
        has_none = getattr(self._modules.get(layer), "bias", 0) is None
        return has_none and not bool(self.base.reader[name].any())

    def __getitem__(self, name: str) -> Tensor:
        if name in self.base.stacks:
            return self.base.stack(name)
        if name not in self._packed:
            return self.base.reader[name]
        weight = self.base.form(self._packed[name]).dense().contiguous()
        return weight.T.contiguous() if self._is_turned(self._packed[name]) else weight

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._packed
        yield from self.base.stacks

    def __len__(self) -> int:
        return len(self._plain) + len(self._packed) + len(self.base.stacks)

    def __contains__(self, name: object) -> bool:
        return name in self._packed or name in self._plain or name in self.base.stacks

    @property
    def whole(self) -> AsDense:
        """The view with stacked experts as the checkpoint has them: this one."""
        return self

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is made from others."""
        return name in self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the model gives a tensor. Raises CheckpointError if the packed tensors do not tell."""
        if name in self.base.stacks:
            return self.base.stack_shape(name)
        if name not in self._packed:
            return self.base.reader.shape(name)
        o, i = self.base.shape(self._packed[name])
        return (i, o) if self._is_turned(self._packed[name]) else (o, i)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype; int32 for codes."""
        coded = name in self._packed or name in self.base.stacks
        return torch.int32 if coded else self.base.reader.dtype(name)

    def nbytes(self, name: str) -> int:
        """Bytes in the checkpoint, scales and zero points included."""
        if name in self._packed:
            return self.base.stored_bytes(self._packed[name])
        if name in self.base.stacks:
            return sum(map(self.base.reader.nbytes, self.base.stacks[name]))
        return self.base.reader.nbytes(name)

    def form(self, name: str) -> Form:
        """The form of the weight (o, i) of this name."""
        if name in self._packed:
            return self.base.form(self._packed[name])
        weight = self.base.reader[name]
        turned = self._is_turned(name.removesuffix(WEIGHT))
        return Dense(weight.T.contiguous() if turned else weight)

    def _is_turned(self, layer: str) -> bool:
        return isinstance(self._modules.get(layer), Conv1D)


class SlicedView(AsDense):
    """The same with stacked experts taken apart, as the loader of a model's tensors names them."""

    def __init__(self, whole: AsDense, loader: PartLoader) -> None:
        self.base, self.stacked, self._loader = whole.base, whole, loader

    @property
    def whole(self) -> AsDense:
        """The view with the stacks as the checkpoint has them."""
        return self.stacked

    def __getitem__(self, name: str) -> Tensor:
        return self._loader.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loader.tensors)

    def __len__(self) -> int:
        return len(self._loader.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._loader.tensors

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is made from others; biases of experts are not."""
        one = self._loader.slices.get(name)
        if one is None:
            return self.stacked.is_packed(name)
        return name.endswith(WEIGHT) and one.key in self.base.stacks

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the model gives a tensor; of a slice (o, i) or (o,)."""
        one = self._loader.slices.get(name)
        if one is None:
            return self.stacked.shape(name)
        return tuple(one.take(torch.empty(self.stacked.shape(one.key), device="meta")).shape)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype; int32 for codes."""
        one = self._loader.slices.get(name)
        return self.stacked.dtype(name if one is None else one.key)

    def nbytes(self, name: str) -> int:
        """Bytes in the checkpoint; of a slice, its share of the stack's."""
        one = self._loader.slices.get(name)
        if one is None:
            return self.stacked.nbytes(name)
        return self.stacked.nbytes(one.key) // one.share

    def form(self, name: str) -> Form:
        """The form of the weight (o, i) of this name; of a slice the dense one."""
        return Dense(self[name]) if name in self._loader.slices else self.stacked.form(name)
