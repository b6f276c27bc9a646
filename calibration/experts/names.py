"""Where a checkpoint keeps the weights of each expert: in tensors of their own, or in slices of stacked ones.

transformers renames and stacks an expert's tensors on loading; the same rules tell here which expert's layer each of
them is. A stacked tensor appears as its slices, each under the name that the unstacked layer has in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibration.errors import InputError
from calibration.experts.module import DOWN, UP, Experts, Layout

_BIAS = "_bias"


@dataclass(frozen=True)
class Slice:
    """One expert's part of a stacked tensor of the checkpoint."""

    key: str
    """The stacked tensor's name."""
    layout: Layout
    expert: int
    projection: str

    def take(self, stack: Tensor) -> Tensor:
        """The weight (o, i) or bias (o,); a view. Raises InputError if the stack is of another shape."""
        expected: tuple[int, ...] = self.layout.stack_shape(self.projection)
        if self.key.endswith(_part(_BIAS)):
            expected = (expected[0], expected[2 if self.layout.transposed else 1])
        if tuple(stack.shape) != expected:
            raise InputError(
                f"{self.key}: its shape in the checkpoint is {tuple(stack.shape)}, but config.json makes it {expected}",
                option="model",
            )
        return self.layout.take(stack, self.expert, self.projection)

    @property
    def is_first(self) -> bool:
        """Whether it is the first of its stack."""
        among = (
            p
            for p in self.layout.projections
            if self._parameter(p) == self._parameter(self.projection)
        )
        return self.expert == 0 and self.projection == next(among)

    def _parameter(self, projection: str) -> str:
        return self.layout.parameter_of(projection)

    @property
    def share(self) -> int:
        """The number of slices of this size that the stack is made of."""
        both = self.layout.parameter_of(self.projection) != self.projection
        return self.layout.n_experts * (2 if both else 1)


class Sliced(Mapping[str, Tensor]):
    """A checkpoint's tensors, each stack of experts taken apart."""

    def __init__(self, tensors: Mapping[str, Tensor], slices: Mapping[str, Slice]) -> None:
        self.tensors, self.slices = tensors, slices
        self._stacks = {one.key for one in slices.values()}
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; the last stack is kept, for its slices are asked for one after the other."""
        if name not in self.slices:
            return self.tensors[name]
        one = self.slices[name]
        if self._last[0] != one.key:
            self._last = one.key, self.tensors[one.key]
        return one.take(self._last[1]).clone()

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self.tensors if name not in self._stacks)
        yield from self.slices

    def __len__(self) -> int:
        return len(self.tensors) - len(self._stacks) + len(self.slices)

    def __contains__(self, name: object) -> bool:
        return name in self.slices or (name in self.tensors and name not in self._stacks)

    def forget(self) -> None:
        """Let the last stack go."""
        self._last = ("", torch.empty(0))


def stacked_names(experts: Mapping[str, Experts]) -> dict[str, tuple[str, str]]:
    """The model's own names of stacked parameters: each with the module that stacks, and the name in it."""
    names: dict[str, tuple[str, str]] = {}
    for path, module in experts.items():
        leaves = {
            module.layout.parameter_of(projection) for projection in module.layout.projections
        }
        if module.layout.biased:
            leaves |= {f"{leaf}{_BIAS}" for leaf in leaves}
        names |= {f"{path}.{leaf}": (path, leaf) for leaf in leaves}
    return names


def own_name(path: str, layout: Layout, key: str, place: int, leaf: str) -> str:
    """The unstacked name of an expert's own tensor: the expert is the last number in the checkpoint's name for it.

    `place`: of the pattern that fits the tensor among those whose tensors become one parameter, `leaf`.
    """
    among = [p for p in layout.projections if layout.parameter_of(p) == leaf.removesuffix(_BIAS)]
    numbers = [part for part in key.split(".") if part.isdigit()]
    return f"{path}.{numbers[-1]}.{among[place]}.{_part(leaf)}"


def slices_of(
    path: str, layout: Layout, key: str, leaf: str, stored: Layout | None = None, place: int = 0
) -> dict[str, Slice]:
    """The slices of a stacked tensor by unstacked name.

    `stored`: how the checkpoint stacks, if otherwise than the model; `place`: as for `own_name`.
    """
    among = [p for p in layout.projections if layout.parameter_of(p) == leaf.removesuffix(_BIAS)]
    layout = stored or layout
    if layout.apart:
        among = among[place : place + 1]
    return {
        f"{path}.{number}.{projection}.{_part(leaf)}": Slice(key, layout, number, projection)
        for number in range(layout.n_experts)
        for projection in among
    }


def is_stacked(operations: Sequence[object]) -> bool:
    """Whether a tensor that these make into a model's own holds all experts, and not one."""
    return not any(type(one).__name__ == "MergeModulelist" for one in operations)


def stored_layout(
    layout: Layout, operations: Sequence[object], shape: Callable[[], tuple[int, ...]], leaf: str
) -> Layout:
    """How a checkpoint stacks, of which transformers makes the model's own stacks by these operations.

    `shape`: of the checkpoint's tensor. Raises InputError for an operation that is not known here.
    """
    for operation in operations:
        match type(operation).__name__:
            case "Transpose":
                always = not getattr(operation, "check_dims", False)
                if always or shape() != layout.stack_shape(leaf if leaf == DOWN else UP):
                    layout = replace(layout, transposed=not layout.transposed)
            case "Interleave":
                layout = replace(layout, interleaved=not layout.interleaved)
            case "Concatenate":
                layout = replace(layout, apart=True)
            case other:
                raise InputError(
                    f"transformers makes {leaf} of the checkpoint's tensors by {other}, so its experts cannot be told "
                    "apart; known are Transpose, Interleave and Concatenate",
                    option="model",
                )
    return layout


def _part(leaf: str) -> str:
    return "bias" if leaf.endswith(_BIAS) else "weight"
