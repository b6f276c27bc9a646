"""The plainest form: the weight itself."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Builder, Form, Spec


class Dense(Form, name="dense"):
    """The weight itself."""

    def __init__(self, weight_oi: Tensor) -> None:
        super().__init__((weight_oi.shape[0], weight_oi.shape[1]))
        self.weight = nn.Parameter(weight_oi, requires_grad=False)

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: ARG003, D102
        return cls(build.floats(*shape))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind}

    def dense(self) -> Tensor:  # noqa: D102
        return self.weight.detach().float()

    def rows(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.weight.detach()[index].float()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.weight.to(x.dtype))

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Dense(self.weight.detach().to(dtype))

    def describe(self) -> str:  # noqa: D102
        return f"{8 * self.weight.element_size()}-bit dense"
