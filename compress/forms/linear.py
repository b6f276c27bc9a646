"""The layer that takes the place of a compressed Linear."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .base import Form


class CompressedLinear(nn.Module):
    """y = form(x) + bias: takes the place of a Linear (or of GPT-2's Conv1D), or of a layer that computes the same."""

    def __init__(self, form: Form, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: the one that the model computes in."""
        super().__init__()
        self.form = form
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = form.shape
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight (o, i), made at every read: for models that ask for its dtype, or multiply by it themselves.

        While transformers loads a model, the placeholder that stands for it.
        """
        held: Tensor | None = vars(self).get("weight")
        return self.form.dense().to(self._dtype) if held is None else held

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002  (torch's)
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device="cpu")).dtype
        return self

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.form(x)
        return y if self.bias is None else y + self.bias
