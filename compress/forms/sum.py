"""The sum of several forms."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Builder, Form, Spec


class Sum(Form, name="sum"):
    """Forms of one shape, added: a quantised base and its low-rank correction, say."""

    def __init__(self, terms: Sequence[Form]) -> None:
        super().__init__(terms[0].shape)
        self.terms = nn.ModuleList(terms)

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: D102
        return cls([build.form(term, shape) for term in spec["terms"]])

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind, "terms": [term.spec() for term in self._forms()]}

    def _forms(self) -> list[Form]:
        return [term for term in self.terms if isinstance(term, Form)]

    def dense(self) -> Tensor:  # noqa: D102
        total = self._forms()[0].dense()
        for term in self._forms()[1:]:
            total = total + term.dense()
        return total

    def rows(self, index: Tensor) -> Tensor:  # noqa: D102
        total = self._forms()[0].rows(index)
        for term in self._forms()[1:]:
            total = total + term.rows(index)
        return total

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        total: Tensor = self.terms[0](x)
        for term in list(self.terms)[1:]:
            total = total + term(x)
        return total

    def offset(self) -> Tensor | None:  # noqa: D102
        found = [offset for term in self._forms() if (offset := term.offset()) is not None]
        return torch.stack(found).sum(0) if found else None

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Sum([term.unpacked(dtype) for term in self._forms()])

    def describe(self) -> str:  # noqa: D102
        return " + ".join(term.describe() for term in self._forms())

    def label(self) -> str:  # noqa: D102
        return ""
