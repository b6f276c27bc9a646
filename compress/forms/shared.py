"""One form for several layers: the layer that stores it, and those that read it there."""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Builder, Form, Spec

OBSTACLE = "shares what it stores with other layers, and cannot get a correction yet"


class _Memory:
    """The last product of a form, until everybody has had it, and its unpacked twin; copies remember nothing."""

    def __init__(self) -> None:
        self.read: weakref.ref[Tensor] | None = None
        self.version = -1
        self.product: Tensor | None = None
        self.left = 0
        self.twins: weakref.WeakValueDictionary[torch.dtype, Form] = weakref.WeakValueDictionary()

    def __reduce__(self) -> Any:
        return (_Memory, ())


class Common(Form, name="common"):
    """A form that several layers use, one of which stores it; those that read one tensor share one product.

    `n_readers`: how many read one tensor.
    """

    def __init__(self, form: Form, n_readers: int) -> None:
        super().__init__(form.shape)
        self.form, self.n_readers = form, n_readers
        self._memory = _Memory()

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: D102
        return cls(build.form(spec["of"], shape), int(spec["users"]))

    def dense(self) -> Tensor:  # noqa: D102
        return self.form.dense()

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o); of a tensor that was read a moment ago, what was found then.

        Only where no gradients are recorded, as then neither the tensor nor the form changes in between unnoticed.
        """
        memory = self._memory
        if self.n_readers == 1 or torch.is_grad_enabled() or x.is_inference():
            return self._product(x)
        if memory.read is None or memory.read() is not x or memory.version != x._version:
            memory.product, memory.left = self._product(x), self.n_readers
            memory.read, memory.version = weakref.ref(x), x._version
        product = memory.product
        memory.left -= 1
        if memory.left < 1:
            memory.read = memory.product = None
        assert product is not None
        return product

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = self.form(x)
        return product

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind, "users": self.n_readers, "of": self.form.spec()}

    def unpacked(self, dtype: torch.dtype) -> Form:
        """The same one for all users, as long as one of them holds it."""
        twin = self._memory.twins.get(dtype)
        if twin is None:
            twin = Common(self.form.unpacked(dtype), self.n_readers)
            self._memory.twins[dtype] = twin
        return twin

    def describe(self) -> str:  # noqa: D102
        return f"{self.form.describe()}, shared"

    def obstacle_to_correction(self) -> str:  # noqa: D102
        return OBSTACLE


class Shared(Form, name="shared"):
    """A form that another layer stores as a `Common`: it takes no bytes here.

    `owner` is the path of that in the model; it is known once the layers have names.
    """

    def __init__(self, shape: tuple[int, int], owner: str, form: Common | None) -> None:
        super().__init__(shape)
        self.owner = owner
        self._read(form)

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: ARG003, D102
        return cls(shape, str(spec["owner"]), None)

    def _read(self, form: Common | None) -> None:
        """Read another layer's form, which is no child of this module: its tensors are stored there."""
        vars(self)["_form"] = form

    def link(self, find: Callable[[str], nn.Module | None]) -> None:  # noqa: D102
        owner = find(self.owner)
        if not isinstance(owner, Common) or owner.shape != self.shape:
            raise ValueError(f"config.json lets a layer read {self.owner}, which is not there")
        self._read(owner)

    @property
    def form(self) -> Common:
        """The other layer's form. Raises RuntimeError before it is linked."""
        found: Common | None = vars(self)["_form"]
        if found is None:
            raise RuntimeError(f"a shared form that is to read {self.owner} was never linked to it")
        return found

    def dense(self) -> Tensor:  # noqa: D102
        return self.form.dense()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.form(x)
        return y

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.kind, "owner": self.owner}

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        twin = self.form.unpacked(dtype)
        assert isinstance(twin, Common)
        return Shared(self.shape, self.owner, twin)

    def describe(self) -> str:  # noqa: D102
        return f"read from {self.owner}"

    def obstacle_to_correction(self) -> str:  # noqa: D102
        return OBSTACLE
