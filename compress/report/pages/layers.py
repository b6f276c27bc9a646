"""Rows of the table of layers: each layer, or one projection of all experts of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.models.kinds import expert_of
from compress.report.numbers import NOTHING, megabytes
from compress.report.report import LayerReport, Report


@dataclass(frozen=True)
class LayerRow:
    """Figures of a layer as text, or of several that are alike."""

    name: str
    shape: str
    form: str
    bits: str
    size: str
    error: str
    seconds: str


def layer_rows(report: Report) -> list[LayerRow]:
    """The rows, in the order of the layers; experts of a layer with the same form are one."""
    together: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.layers:
        expert = expert_of(layer.name)
        name = layer.name if expert is None else expert.pattern
        together.setdefault((name, _form(layer)), []).append(layer)
    return [_row(name, form, layers) for (name, form), layers in together.items()]


def _row(name: str, form: str, layers: Sequence[LayerReport]) -> LayerRow:
    o, i = layers[0].shape
    more = f"{len(layers)} of " if len(layers) > 1 else ""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in layers)
    return LayerRow(
        name=name,
        shape=f"{more}{o} × {i}",
        form=form,
        bits=f"{bits / weights:.2f}",
        size=megabytes(sum(layer.bytes_after for layer in layers)),
        error=_errors([it.relative_error for it in layers if it.relative_error is not None]),
        seconds=f"{sum(layer.seconds for layer in layers):.2f}",
    )


def _form(layer: LayerReport) -> str:
    return layer.form + (f", stored with {layer.stored_with}" if layer.stored_with else "")


def _errors(errors: Sequence[float]) -> str:
    """One error, or the least and the largest."""
    if not errors:
        return NOTHING
    low, high = f"{min(errors):.4f}", f"{max(errors):.4f}"
    return low if low == high else f"{low} to {high}"
