"""Which pictures an export has beside its card, and how the card shows them."""

from __future__ import annotations

from collections.abc import Iterator

from compress.report.experts import experts_of
from compress.report.report import Report

PICTURES = "pictures"
"""The folder they are in, beside the card."""


def picture_names(report: Report) -> dict[str, str]:
    """What each picture shows, by its file's name without an ending; only those that there are data for."""
    names = {"bytes": "Bytes of each part of the model, before and after"}
    if any(layer.relative_error is not None for layer in report.layers):
        names["errors"] = "Relative output error of each layer, by block and projection"
    experts = experts_of(report)
    if experts:
        names["expert-tokens"] = "Calibration tokens of each expert, by block"
    if any(one.error is not None for one in experts):
        names["expert-errors"] = "Relative output error of each expert, by block"
    if any(layer.spectrum is not None for layer in report.layers):
        names["spectra"] = "Singular values of what each low-rank part stands for, and the cut"
    return names


def pictures(report: Report) -> Iterator[str]:
    """The card's section."""
    yield "## In pictures"
    for name, shown in picture_names(report).items():
        yield f"![{shown}]({PICTURES}/{name}.png)"
    yield "`report.html` has these and more, to be opened in a browser."
