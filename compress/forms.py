"""Forms: what is stored instead of a weight. Each knows its dense weight, its size, and how to run.

Shapes: o = out_features, i = in_features, r = rank, G = number of groups. Weights are (o, i).
The bias belongs to the layer, not to the form: `CompressedLinear` is a form plus a bias.

Shipped inside native checkpoints (imports torch and its neighbour `packing` only), so that the file that wrote a
checkpoint is the file that reads it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .packing import CODES_A_ROW, pack, unpack

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


class Quantised(Form):
    """Integer codes on a grid: W[o, i] = scales[g, o] * (codes[i, o] - zeros[g, o]), g = the group of input i.

    Symmetric: no zeros are stored, they are all 2**(bits - 1); a scale may then be negative, which puts the longer
    side of the grid, -2**(bits - 1), where the weights need it. Without `g_idx`, input i is in group i // group_size
    (the last group may be shorter). Tensors: qweight (ceil(i / 32) * bits, o) int32, scales (G, o) fp16,
    qzeros (G, ceil(o / 32) * bits) int32, g_idx (i,) int32.
    """

    kind = "quantised"
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    g_idx: Tensor | None

    def __init__(
        self, shape: tuple[int, int], bits: int, group_size: int, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__(shape)
        self.bits, self.group_size = bits, group_size
        for name in ("qweight", "scales", "qzeros", "g_idx"):
            self.register_buffer(name, tensors.get(name))

    @classmethod
    def from_codes(
        cls,
        codes_oi: Tensor,
        scales_og: Tensor,
        zeros_og: Tensor | None,
        *,
        bits: int,
        group_size: int,
        groups_i: Tensor | None = None,
    ) -> Self:
        """Pack codes (o, i), scales (o, G) and zeros (o, G, None when symmetric); `groups_i` (i,) if not in order."""
        o, i = codes_oi.shape
        tensors = {
            "qweight": pack(codes_oi.T, bits),
            "scales": scales_og.T.to(torch.float16).contiguous(),
        }
        if zeros_og is not None:
            tensors["qzeros"] = pack(zeros_og, bits).T.contiguous()
        if groups_i is not None:
            tensors["g_idx"] = groups_i.to(torch.int32)
        return cls((o, i), bits, group_size, tensors)

    @property
    def symmetric(self) -> bool:
        """Whether every zero is 2**(bits - 1), and none is stored."""
        return self.qzeros is None

    def codes(self) -> Tensor:
        """(i, o) int32."""
        return unpack(self.qweight, self.bits, self.shape[1])

    def zeros(self) -> Tensor:
        """(G, o) int32."""
        if self.qzeros is None:
            return torch.full_like(self.scales, 1 << (self.bits - 1), dtype=torch.int32)
        return unpack(self.qzeros.T.contiguous(), self.bits, self.shape[0]).T

    def groups(self) -> Tensor:
        """(i,) int64: the group of each input."""
        if self.g_idx is not None:
            return self.g_idx.to(torch.int64)
        return torch.arange(self.shape[1], device=self.qweight.device) // self.group_size

    def dense(self) -> Tensor:  # noqa: D102
        values_io, scales, zeros = self.codes().float(), self.scales.float(), self.zeros().float()
        i, o = values_io.shape
        if self.g_idx is None and i % self.group_size == 0:
            grouped = values_io.view(-1, self.group_size, o)
            grouped.sub_(zeros[:, None]).mul_(scales[:, None])
        else:
            groups = self.groups()
            values_io.sub_(zeros[groups]).mul_(scales[groups])
        return values_io.T  # as it lies in memory: transposing it costs more than all of the above

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {
            "form": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "ordered": self.g_idx is None,
        }

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Dense(self.dense().to(dtype))


class Factor(nn.Linear):
    """A thin Linear that follows the dtype of its input, so that 16-bit factors also run in fp32."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.weight.to(x.dtype))


class LowRank(Form):
    """up @ down: two thin Linears (o, r) and (r, i), which PEFT and quantisers can wrap."""

    kind = "low_rank"

    def __init__(self, up: Factor, down: Factor) -> None:
        super().__init__((up.out_features, down.in_features))
        self.down, self.up = down, up

    @classmethod
    def from_factors(cls, up_or: Tensor, down_ri: Tensor) -> Self:
        """Wrap the factors (o, r) and (r, i), in the dtype they are to be stored in."""
        return cls(_factor(up_or), _factor(down_ri))

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
        return {"form": self.kind, "rank": self.rank}

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return LowRank.from_factors(
            self.up.weight.detach().to(dtype), self.down.weight.detach().to(dtype)
        )


def _factor(weight: Tensor) -> Factor:
    linear = Factor(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


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
            return LowRank.from_factors(torch.empty(o, r, dtype=dtype, device=device), down)
        case "sum":
            return Sum([empty(term, shape, dtype, device) for term in spec["terms"]])
        case "quantised":
            return _empty_quantised(spec, shape, device)
    raise ValueError(
        f"form {spec['form']!r} is unknown to this version; known: dense, low_rank, quantised, sum"
    )


def _empty_quantised(spec: Spec, shape: tuple[int, int], device: Device) -> Quantised:
    (o, i), bits, group_size = shape, int(spec["bits"]), int(spec["group_size"])
    n_groups = -(-i // group_size)
    codes = partial(torch.empty, dtype=torch.int32, device=device)
    tensors = {
        "qweight": codes(-(-i // CODES_A_ROW) * bits, o),
        "scales": torch.empty(n_groups, o, dtype=torch.float16, device=device),
    }
    if not spec["symmetric"]:
        tensors["qzeros"] = codes(n_groups, -(-o // CODES_A_ROW) * bits)
    if not spec["ordered"]:
        tensors["g_idx"] = codes(i)
    return Quantised(shape, bits, group_size, tensors)
