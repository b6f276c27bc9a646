"""Low rank: two thin factors in the place of a weight.

Shapes: o = out_features, i = in_features, r = rank. Weights are (o, i).
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Builder, Form, Spec


class Factor(nn.Linear):
    """A thin Linear that follows the dtype of its input, so that 16-bit factors also run in fp32."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LowRank(Form, name="low_rank"):
    """up @ down: two thin Linears (o, r) and (r, i), which PEFT and quantisers can wrap.

    Methods that fit the outputs around their mean store what that adds as the bias of `up`.
    """

    trainable: ClassVar[bool] = True

    def __init__(self, up: Factor, down: Factor) -> None:
        super().__init__((up.out_features, down.in_features))
        self.down, self.up = down, up

    @classmethod
    def from_factors(cls, up_or: Tensor, down_ri: Tensor, offset_o: Tensor | None = None) -> Self:
        """Wrap the factors (o, r) and (r, i), in the dtype they are to be stored in."""
        return cls(_factor(up_or, offset_o), _factor(down_ri, None))

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: D102
        (o, i), r = shape, int(spec["rank"])
        offset = build.floats(o) if spec.get("offset") else None
        return cls.from_factors(build.floats(o, r), build.floats(r, i), offset)

    def spec(self) -> dict[str, Any]:  # noqa: D102
        spec: dict[str, Any] = {"form": self.kind, "rank": self.rank}
        return spec if self.up.bias is None else {**spec, "offset": True}

    @property
    def rank(self) -> int:
        """Columns of up, rows of down."""
        return self.down.out_features

    def dense(self) -> Tensor:  # noqa: D102
        return self.up.weight.detach().float() @ self.down.weight.detach().float()

    def rows(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.up.weight.detach()[index].float() @ self.down.weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.up(self.down(x))
        return y

    def offset(self) -> Tensor | None:  # noqa: D102
        return None if self.up.bias is None else self.up.bias.detach().float()

    def shifted(self, offset_o: Tensor) -> "LowRank":
        """The same form with this offset added to the outputs."""
        return LowRank.from_factors(self.up.weight.detach(), self.down.weight.detach(), offset_o)

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        bias = None if self.up.bias is None else self.up.bias.detach().to(dtype)
        return LowRank.from_factors(
            self.up.weight.detach().to(dtype), self.down.weight.detach().to(dtype), bias
        )

    def describe(self) -> str:  # noqa: D102
        return f"rank {self.rank}"


def _factor(weight: Tensor, bias: Tensor | None) -> Factor:
    linear = Factor(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
