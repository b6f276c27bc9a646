"""Stacks of experts in a source: put together again from their parts, and proof that each part came."""

from __future__ import annotations

from torch import Tensor

from calibration.experts.names import Slice


class Stacks:
    """The stacked tensors of a source whose slices come one by one."""

    def __init__(self) -> None:
        self._noted: dict[str, set[tuple[int, str]]] = {}
        self._parts: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}

    def noted(self, one: Slice) -> str | None:
        """Take note of a slice; the name of its stack if it was the last."""
        parts = self._noted.setdefault(one.key, set())
        parts.add((one.expert, one.projection))
        return one.key if len(parts) == one.share else None

    def put(self, one: Slice, value: Tensor) -> tuple[str, Tensor] | None:
        """Put a weight (o, i) or bias (o,) in its place; the stack with its name if it was the last."""
        shape = one.layout.stack_shape(one.projection)
        if value.ndim == 1:
            shape = (shape[0], shape[2 if one.layout.transposed else 1])  # type: ignore[assignment]
        if one.key not in self._parts:
            self._parts[one.key] = value.new_empty(shape)
        one.layout.put(self._parts[one.key], one.expert, one.projection, value)
        self._filled[one.key] = self._filled.get(one.key, 0) + 1
        return (one.key, self._parts.pop(one.key)) if self._filled[one.key] == one.share else None
