"""One form for several layers: the layer that stores it, and those that read it there.

Shipped inside native checkpoints.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from .form import Form


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


class Common(Form):
    """A form that several layers use, one of which stores it; those that read one tensor share one product.

    `n_readers`: how many read one tensor.
    """

    kind = "common"

    def __init__(self, form: Form, n_readers: int) -> None:
        super().__init__(form.shape)
        self.form, self.n_readers = form, n_readers
        self._memory = _Memory()

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


class Shared(Form):
    """A form that another layer stores as a `Common`: it takes no bytes here.

    `owner` is the path of that in the model; it is known once the layers have names.
    """

    kind = "shared"

    def __init__(self, shape: tuple[int, int], owner: str, form: Common | None) -> None:
        super().__init__(shape)
        self.owner = owner
        self.link(form)

    def link(self, form: Common | None) -> None:
        """Read there. No child of this module: its tensors are the owner's."""
        vars(self)["_form"] = form

    @property
    def form(self) -> Common:
        """What it reads. Raises RuntimeError before it is linked."""
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
