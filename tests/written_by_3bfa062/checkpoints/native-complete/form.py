"""What every form is, and the plainest: the weight itself.

A form is what is stored instead of a weight. It knows its dense weight, its size, and how to run. The bias belongs to
the layer, not to the form. Shipped inside native checkpoints, as are its neighbours `quantised` and `forms`.

Shapes: o = out_features, i = in_features. Weights are (o, i).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Spec = Mapping[str, Any]
Device = torch.device | str | None


class Form(nn.Module, ABC):
    """Stands for a weight (o, i)."""

    kind: ClassVar[str]

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (int(shape[0]), int(shape[1]))

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight it stands for: (o, i), fp32."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What `empty` needs, beside the shape, to build this form again; JSON."""

    @abstractmethod
    def unpacked(self, dtype: torch.dtype) -> "Form":
        """A form with the same outputs to the bit for inputs of `dtype`, its codes expanded once."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o), in the dtype of x."""
        return F.linear(x, self.dense().to(x.dtype))

    def offset(self) -> Tensor | None:
        """What it adds to the outputs besides the weight's product: (o,), fp32. Not the layer's bias. None: nothing."""
        return None

    def n_bytes(self) -> int:
        """Bytes of the tensors it stores."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())


class Dense(Form):
    """The weight itself."""

    kind = "dense"

    def __init__(self, weight_oi: Tensor) -> None:
        super().__init__((weight_oi.shape[0], weight_oi.shape[1]))
        self.weight = nn.Parameter(weight_oi, requires_grad=False)

    def dense(self) -> Tensor:  # noqa: D102
        return self.weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.weight.to(x.dtype))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind}

    def unpacked(self, dtype: torch.dtype) -> "Form":  # noqa: D102
        return Dense(self.weight.detach().to(dtype))
