"""The module that takes the place of compressed embeddings."""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .base import Form


class CompressedEmbedding(nn.Module):
    """Looks up rows of a form: they are dequantised after the lookup, so the matrix is never expanded.

    `like` is the module that it takes the place of. That module's own forward sees the looked-up rows as its weight,
    so whatever a family does beside the lookup (Gemma's scaling) is done by its own code.
    """

    def __init__(self, form: Form, like: nn.Embedding) -> None:
        super().__init__()
        self.form = form
        self.num_embeddings, self.embedding_dim = form.shape
        self.padding_idx = None
        # Its place tells the dtype and the device; no checkpoint stores it.
        place = torch.empty(0, dtype=like.weight.dtype, device=like.weight.device)
        self.like = _twin(like)
        del self.like.weight
        self.like.register_buffer("weight", place, persistent=False)
        vars(self.like)["padding_idx"] = None

    def forward(self, input_ids: Tensor) -> Tensor:  # noqa: D102
        rows = self.form.rows(input_ids.flatten()).to(self._place.dtype)
        index = torch.arange(len(rows), device=rows.device).view_as(input_ids)
        found: Tensor = functional_call(self.like, {"weight": rows}, (index,))
        return found

    @property
    def weight(self) -> Tensor:
        """The whole matrix, dequantised (v, d): for programs that ask for it; looking up rows does not."""
        return self.form.dense().to(self._place.dtype)

    @property
    def _place(self) -> Tensor:
        place: Any = self.like.weight
        found: Tensor = place
        return found


def _twin(module: nn.Embedding) -> nn.Module:
    """A module of the same class with the same tensors, in which one can be taken out without the other noticing."""
    twin = copy(module)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        vars(twin)[name] = copy(vars(module)[name])
    return twin
