"""The product of two forms: low-rank factors that are quantised themselves, or a dictionary and its sparse codes.

Shapes: o = out_features, i = in_features, r = rank, or atoms of a dictionary. Weights are (o, i).
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Builder, Form, Spec
from .shared import Common, Shared
from .sparse import Sparse


class Product(Form, name="product"):
    """up @ down of two forms (o, r) and (r, i).

    `shift` (o,), or None, is added to the outputs.
    """

    def __init__(self, up: Form, down: Form, shift_o: Tensor | None = None) -> None:
        super().__init__((up.shape[0], down.shape[1]))
        self.down, self.up = down, up
        self.shift = None if shift_o is None else nn.Parameter(shift_o, requires_grad=False)

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: D102
        (o, i), r = shape, int(spec["rank"])
        shift = build.floats(o) if spec.get("offset") else None
        return cls(build.form(spec["up"], (o, r)), build.form(spec["down"], (r, i)), shift)

    def spec(self) -> dict[str, Any]:  # noqa: D102
        factors = {"rank": self.rank, "up": self.up.spec(), "down": self.down.spec()}
        offset = {} if self.shift is None else {"offset": True}
        return {"form": self.kind, **factors, **offset}

    @property
    def rank(self) -> int:
        """Columns of up, rows of down."""
        return self.down.shape[0]

    def dense(self) -> Tensor:  # noqa: D102
        return self.up.dense() @ self.down.dense()

    def rows(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.up.rows(index) @ self.down.dense()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.up(self.down(x))
        return y if self.shift is None else y + self.shift.to(x.dtype)

    def offset(self) -> Tensor | None:  # noqa: D102
        return None if self.shift is None else self.shift.detach().float()

    def shifted(self, offset_o: Tensor) -> "Product":
        """The same form with this offset added to the outputs."""
        return Product(self.up, self.down, offset_o)

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        shift = None if self.shift is None else self.shift.detach().to(dtype)
        return Product(self.up.unpacked(dtype), self.down.unpacked(dtype), shift)

    def describe(self) -> str:
        """Rank and storage of the factors; of a dictionary and its codes: `614 atoms, shared, 307 an output`."""
        if isinstance(self.down, Sparse):
            return _with_codes(self.up, self.down, "an input")
        if isinstance(self.up, Sparse):
            return _with_codes(self.down, self.up, "an output")
        return f"rank {self.rank} in {self.down.describe()}"

    def label(self) -> str:  # noqa: D102
        return ""


def _with_codes(dictionary: Form, codes: Sparse, each: str) -> str:
    shared = ", shared" if isinstance(dictionary, Common | Shared) else ""
    n_atoms = dictionary.shape[1] if each == "an input" else dictionary.shape[0]
    return f"{n_atoms} atoms{shared}, {codes.values.shape[1]} {each}"
