"""The layer that takes the place of a compressed Linear."""

from torch import Tensor, nn

from .base import Form


class CompressedLinear(nn.Module):
    """y = form(x) + bias: takes the place of a Linear (or of GPT-2's Conv1D)."""

    def __init__(self, form: Form, bias: Tensor | None) -> None:
        super().__init__()
        self.form = form
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = form.shape

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.form(x)
        return y if self.bias is None else y + self.bias
