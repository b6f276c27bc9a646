"""The weight of a head that is the embeddings' own, stored there once.

Shapes: v = rows of the vocabulary, d = hidden size.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Builder, Form, Spec


class Tied(Form, name="tied"):
    """The form of an embedding module, read by a head: it takes no bytes here. `owner`: that module's path."""

    def __init__(self, shape: tuple[int, int], owner: str, module: nn.Module | None = None) -> None:
        super().__init__(shape)
        self.owner = owner
        # No child of this module: its tensors are stored there.
        vars(self)["_module"] = module

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: ARG003, D102
        return cls(shape, str(spec["owner"]))

    def link(self, find: Callable[[str], nn.Module | None]) -> None:  # noqa: D102
        module = find(self.owner)
        form = getattr(module, "form", None)
        if not isinstance(form, Form) or form.shape != self.shape:
            raise ValueError(f"config.json ties a head to {self.owner}, which is not there")
        vars(self)["_module"] = module

    @property
    def form(self) -> Form:
        """The embeddings' form as it is now. Raises RuntimeError before it is linked."""
        module: Any = vars(self)["_module"]
        if module is None:
            raise RuntimeError(f"a head that is tied to {self.owner} was never linked to it")
        form: Form = module.form
        return form

    def dense(self) -> Tensor:  # noqa: D102
        return self.form.dense()

    def rows(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.form.rows(index)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.form(x)
        return y

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind, "owner": self.owner}

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: ARG002
        """Itself: it has no codes, and follows what becomes of the embeddings' form."""
        return self

    def describe(self) -> str:  # noqa: D102
        return f"tied to {self.owner}"

    def label(self) -> str:
        """Empty: the embeddings' form says it."""
        return ""
