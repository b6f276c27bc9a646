"""The base of all forms, their registry, and the builder that makes empty ones for a checkpoint to be loaded into.

A form is an nn.Module that is stored instead of a weight. It knows its dense weight, its size and how to run. The bias
belongs to the layer, not to the form (`linear.CompressedLinear` is a form and a bias).

A new form is one file, here or in another distribution (entry points of the group `compress.forms`; the entry's name is
the form's, its value the module):

    from compress.forms.base import Builder, Form, Spec

    class Ternary(Form, name="ternary"):
        ...

A native checkpoint brings the files of its forms along, so that it loads where the toolkit is not installed. Therefore
a form's file imports torch, the standard library and `compress.forms` only, the latter as `from compress.forms.NAME
import ...`, which becomes a relative import when it is shipped; anything else is refused at export.

Shapes: o = out_features, i = in_features. Weights are (o, i).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Spec = Mapping[str, Any]
"""The JSON that describes a form in config.json: `form`, its name, and whatever its `empty` needs."""
Device = torch.device | str | None

ROWS_AT_ONCE = 1 << 15
"""Rows of a weight that are expanded together."""

SCALES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Dtypes of scales by their name in a spec. Where fp16 has not the range, all of a weight's are bfloat16."""

REGISTERED: "dict[str, type[Form]]" = {}
"""The forms whose modules have been imported, by name."""


class Form(nn.Module, ABC):
    """A module that stands for a weight (o, i)."""

    kind: ClassVar[str]
    """Its name in checkpoints."""
    trainable: ClassVar[bool] = False
    """Whether fine-tuning may train its parameters."""

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        """Register the class under its name. Raises TypeError for a name that another class has."""
        super().__init_subclass__(**kwargs)
        if not name:
            return
        known = REGISTERED.get(name)
        if known is not None and place_of(known) != place_of(cls):
            raise TypeError(
                f"form {name!r} of {place_of(cls)}: {place_of(known)} has that name; choose another"
            )
        cls.kind = name
        REGISTERED[name] = cls

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (int(shape[0]), int(shape[1]))

    @classmethod
    @abstractmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: "Builder") -> Self:
        """The form of this spec and shape with uninitialised tensors, which `build` makes.

        Raises KeyError, TypeError or ValueError for a spec that this version cannot read.
        """

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON from which `empty` builds this form again, given the shape; it holds `"form": self.kind`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight that it stands for: (o, i), fp32."""

    @abstractmethod
    def unpacked(self, dtype: torch.dtype) -> "Form":
        """A form with the same outputs to the bit for inputs of `dtype`, its codes expanded once."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for people that say how the weight is stored: "4-bit g64 + rank 32"."""

    def label(self) -> str:
        """The storage in even fewer words, without ranks and the like; empty for a form whose parts say it all."""
        return self.kind.replace("_", " ")

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o), in the dtype of x. A weight of many rows, a head's, is expanded a part at a time."""
        if self.shape[0] <= ROWS_AT_ONCE or type(self).rows is Form.rows:
            return F.linear(x, self.dense().to(x.dtype))
        parts = torch.arange(self.shape[0], device=x.device).split(ROWS_AT_ONCE)
        return torch.cat([F.linear(x, self.rows(part).to(x.dtype)) for part in parts], -1)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, for an `index` (n,): (n, i), fp32."""
        return self.dense()[index]

    def offset(self) -> Tensor | None:
        """A vector that it adds to the outputs besides the weight's product: (o,), fp32. It is not the layer's bias."""
        return None

    def n_bytes(self) -> int:
        """Bytes of the tensors that it stores."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def parts(self) -> "Iterator[Form]":
        """The form itself and every form within it."""
        return (module for module in self.modules() if isinstance(module, Form))

    def obstacle_to_correction(self) -> str:
        """Why a layer of this form can have no correction, as what follows the layer's name; empty if it can."""
        if self.offset() is not None:
            return "adds an offset to its outputs, which a correction would count twice"
        inner = (part.obstacle_to_correction() for part in self.parts() if part is not self)
        return next(filter(None, inner), "")

    def link(self, find: "Callable[[str], nn.Module | None]") -> None:
        """Connect the form to others that it reads: called once the model is built; `find` takes a module's path.

        Raises ValueError if one is not there.
        """


def place_of(form: type[Form]) -> str:
    """The dotted name of a class, with its module."""
    return f"{form.__module__}.{form.__qualname__}"


def scales_spec(scales: Tensor) -> dict[str, str]:
    """The entry of a spec for the dtype of scales: none for fp16."""
    name = str(scales.dtype).removeprefix("torch.")
    return {} if name == "float16" else {"scales": name}


def told_scales(scales: Tensor) -> str:
    """What a description adds for scales that are not fp16."""
    return "".join(f", {name} scales" for name in scales_spec(scales).values())


@dataclass(frozen=True)
class Builder:
    """Makes forms with uninitialised tensors, ready to be loaded."""

    forms: Mapping[str, type[Form]]
    dtype: torch.dtype
    """The dtype of floats for which a form has none of its own: the model's."""
    device: Device

    def form(self, spec: Spec, shape: tuple[int, int]) -> Form:
        """The form of a spec, whatever its class. Raises ValueError for a name that is unknown."""
        name = spec["form"]
        if name not in self.forms:
            known = ", ".join(sorted(self.forms))
            raise ValueError(
                f"form {name!r} is unknown here; known: {known}; import the module that defines it, install the "
                "distribution that does, or use the code shipped with the checkpoint (trust_remote_code=True)"
            )
        return self.forms[name].empty(spec, shape, self)

    def floats(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the builder's dtype."""
        return self.tensor(*shape, dtype=self.dtype)

    def scales(self, spec: Spec, *shape: int) -> Tensor:
        """An uninitialised tensor of scales: fp16 unless the spec names another dtype."""
        return self.tensor(*shape, dtype=SCALES[spec.get("scales", "float16")])

    def tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of a dtype that is the form's own choice."""
        return torch.empty(*shape, dtype=dtype, device=self.device)
