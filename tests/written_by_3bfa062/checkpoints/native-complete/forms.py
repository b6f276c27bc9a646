"""Forms: what is stored instead of a weight. Here those made of factors and of other forms, and the layer around one.

Shapes: o = out_features, i = in_features, r = rank. Weights are (o, i).
The bias belongs to the layer, not to the form: `CompressedLinear` is a form plus a bias.

Shipped inside native checkpoints (it and its neighbours import torch only), so that the file that wrote a
checkpoint is the file that reads it.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .form import Dense, Device, Form, Spec
from .quantised import Quantised, empty_quantised
from .sharing import Common, Shared
from .sparse import Along, Short, Sparse, empty_short, empty_sparse

__all__ = [
    "Along",
    "Common",
    "CompressedLinear",
    "Dense",
    "Factor",
    "Form",
    "LowRank",
    "Product",
    "Quantised",
    "Shared",
    "Short",
    "Sparse",
    "Spec",
    "Sum",
    "empty",
]


class Factor(nn.Linear):
    """A thin Linear that follows the dtype of its input, so that 16-bit factors also run in fp32."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LowRank(Form):
    """up @ down: two thin Linears (o, r) and (r, i), which PEFT and quantisers can wrap.

    Methods that fit the outputs around their mean store what that adds as the bias of `up`.
    """

    kind = "low_rank"

    def __init__(self, up: Factor, down: Factor) -> None:
        super().__init__((up.out_features, down.in_features))
        self.down, self.up = down, up

    @classmethod
    def from_factors(cls, up_or: Tensor, down_ri: Tensor, offset_o: Tensor | None = None) -> Self:
        """Wrap the factors (o, r) and (r, i), in the dtype they are to be stored in."""
        return cls(_factor(up_or, offset_o), _factor(down_ri, None))

    @property
    def rank(self) -> int:
        """Columns of up, rows of down."""
        return self.down.out_features

    def dense(self) -> Tensor:  # noqa: D102
        return self.up.weight.detach().float() @ self.down.weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.up(self.down(x))
        return y

    def spec(self) -> dict[str, Any]:  # noqa: D102
        spec: dict[str, Any] = {"form": self.kind, "rank": self.rank}
        return spec if self.up.bias is None else {**spec, "offset": True}

    def offset(self) -> Tensor | None:  # noqa: D102
        return None if self.up.bias is None else self.up.bias.detach().float()

    def shifted(self, offset_o: Tensor) -> "LowRank":
        """The same, adding this to the outputs."""
        return LowRank.from_factors(self.up.weight.detach(), self.down.weight.detach(), offset_o)

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        bias = None if self.up.bias is None else self.up.bias.detach().to(dtype)
        return LowRank.from_factors(
            self.up.weight.detach().to(dtype), self.down.weight.detach().to(dtype), bias
        )


def _factor(weight: Tensor, bias: Tensor | None) -> Factor:
    linear = Factor(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class Product(Form):
    """up @ down of two forms (o, r) and (r, i): factors that are stored in few bits themselves, say.

    `shift` (o,), or None, is what it adds to the outputs.
    """

    kind = "product"

    def __init__(self, up: Form, down: Form, shift_o: Tensor | None = None) -> None:
        super().__init__((up.shape[0], down.shape[1]))
        self.down, self.up = down, up
        self.shift = None if shift_o is None else nn.Parameter(shift_o, requires_grad=False)

    @property
    def rank(self) -> int:
        """Columns of up, rows of down."""
        return self.down.shape[0]

    def dense(self) -> Tensor:  # noqa: D102
        return self.up.dense() @ self.down.dense()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.up(self.down(x))
        return y if self.shift is None else y + self.shift.to(x.dtype)

    def offset(self) -> Tensor | None:  # noqa: D102
        return None if self.shift is None else self.shift.detach().float()

    def spec(self) -> dict[str, Any]:  # noqa: D102
        factors = {"rank": self.rank, "up": self.up.spec(), "down": self.down.spec()}
        offset = {} if self.shift is None else {"offset": True}
        return {"form": self.kind, **factors, **offset}

    def shifted(self, offset_o: Tensor) -> "Product":
        """The same, adding this to the outputs."""
        return Product(self.up, self.down, offset_o)

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        shift = None if self.shift is None else self.shift.detach().to(dtype)
        return Product(self.up.unpacked(dtype), self.down.unpacked(dtype), shift)


class Sum(Form):
    """Forms add: a quantised base and the low-rank path that repairs it, say."""

    kind = "sum"

    def __init__(self, terms: Sequence[Form]) -> None:
        super().__init__(terms[0].shape)
        self.terms = nn.ModuleList(terms)

    def _forms(self) -> list[Form]:
        return [term for term in self.terms if isinstance(term, Form)]

    def dense(self) -> Tensor:  # noqa: D102
        total = self._forms()[0].dense()
        for term in self._forms()[1:]:
            total = total + term.dense()
        return total

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        total: Tensor = self.terms[0](x)
        for term in list(self.terms)[1:]:
            total = total + term(x)
        return total

    def offset(self) -> Tensor | None:  # noqa: D102
        found = [offset for term in self._forms() if (offset := term.offset()) is not None]
        return torch.stack(found).sum(0) if found else None

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind, "terms": [term.spec() for term in self._forms()]}

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Sum([term.unpacked(dtype) for term in self._forms()])


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


def empty(spec: Spec, shape: tuple[int, int], dtype: torch.dtype, device: Device) -> Form:
    """A form of this spec with uninitialised tensors, ready to be loaded. `dtype` is that of its floats, except scales.

    Raises ValueError if the spec names a form that this version does not know.
    """
    o, i = shape
    match spec["form"]:
        case "dense":
            return Dense(torch.empty(o, i, dtype=dtype, device=device))
        case "low_rank":
            r = int(spec["rank"])
            down = torch.empty(r, i, dtype=dtype, device=device)
            offset = torch.empty(o, dtype=dtype, device=device) if spec.get("offset") else None
            return LowRank.from_factors(torch.empty(o, r, dtype=dtype, device=device), down, offset)
        case "product":
            return _empty_product(spec, shape, dtype, device)
        case "sum":
            return Sum([empty(term, shape, dtype, device) for term in spec["terms"]])
        case "quantised":
            return empty_quantised(spec, shape, device)
        case "sparse":
            return empty_sparse(
                spec, shape, device, lambda inner: empty(spec["values"], inner, dtype, device)
            )
        case "short":
            return empty_short(spec, shape, device)
        case "common":
            return Common(empty(spec["of"], shape, dtype, device), int(spec["users"]))
        case "shared":
            return Shared(shape, str(spec["owner"]), None)
    known = "common, dense, low_rank, product, quantised, shared, short, sparse, sum"
    raise ValueError(f"form {spec['form']!r} is unknown to this version; known: {known}")


def _empty_product(
    spec: Spec, shape: tuple[int, int], dtype: torch.dtype, device: Device
) -> Product:
    (o, i), r = shape, int(spec["rank"])
    up = empty(spec["up"], (o, r), dtype, device)
    down = empty(spec["down"], (r, i), dtype, device)
    shift = torch.empty(o, dtype=dtype, device=device) if spec.get("offset") else None
    return Product(up, down, shift)
