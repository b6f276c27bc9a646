"""Forms of embeddings and heads in a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from compress.embeddings.plan import PlannedTable, Role
from compress.embeddings.quantise import TableForms
from compress.forms.base import Form
from compress.forms.embedding import CompressedEmbedding
from compress.forms.linear import CompressedLinear
from compress.models.layers import bias_of


@contextmanager
def placed(model: PreTrainedModel, forms: Mapping[PlannedTable, TableForms]) -> Iterator[None]:
    """The model with these forms of its embeddings and heads, as long as the context lasts; all else must be loaded."""
    names = [name for table in forms for name in (table.name, table.head) if name]
    before = {name: model.get_submodule(name) for name in names}
    try:
        for table, found in forms.items():
            _place(model, table, found)
        yield
    finally:
        for name, module in before.items():
            _set(model, name, module)


def _place(model: PreTrainedModel, table: PlannedTable, forms: TableForms) -> None:
    old = model.get_submodule(table.name)
    if table.role is Role.HEAD:
        _set(model, table.name, _linear(forms.form, old))
        return
    assert isinstance(old, nn.Embedding)  # as planned
    embedding = CompressedEmbedding(forms.form.to(old.weight.device), old)
    _set(model, table.name, embedding)
    if table.head:
        head = _linear(forms.head(table.name), model.get_submodule(table.head))
        for part in head.form.parts():
            part.link(lambda _: embedding)
        _set(model, table.head, head)


def _linear(form: Form, old: nn.Module) -> CompressedLinear:
    weight = old.get_parameter("weight")
    return CompressedLinear(form.to(weight.device), bias_of(old), weight.dtype)


def _set(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
