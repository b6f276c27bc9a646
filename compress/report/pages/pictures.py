"""Static pictures for cards: SVG, and PNG for whoever shows no SVG; dark on white, readable on any ground."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from compress.report.card.pictures import PICTURES, picture_names
from compress.report.comparison import RunComparison
from compress.report.pages.charts import bytes_figure, error_figure
from compress.report.pages.experts import expert_errors_figure, tokens_figure
from compress.report.pages.figures import Figure
from compress.report.pages.pareto import pareto_pictures
from compress.report.pages.spectra import spectra_figures
from compress.report.pages.theme import PICTURE, config
from compress.report.report import Report

WIDTH = 640
_TALL = 400
_SMALL, _COLUMNS = 150, 4
_PNG_SCALE = 2


def write_pictures(report: Report, folder: Path) -> list[Path]:
    """The pictures of a run as `folder/pictures/NAME.svg` and `.png`; those without data are not drawn.

    Returns what was written, each SVG before its PNG. Raises OSError if it cannot be written.
    """
    return _write(_run_charts(report), folder / PICTURES)


def write_comparison_pictures(comparison: RunComparison, folder: Path) -> list[Path]:
    """Size against each measure of quality that a run has, as `folder/pareto-NAME.svg` and `.png`.

    Returns what was written, each SVG before its PNG. Raises OSError if it cannot be written.
    """
    return _write(pareto_pictures(comparison, PICTURE, (WIDTH, _TALL)), folder)


def _run_charts(report: Report) -> dict[str, alt.TopLevelMixin]:
    drawn: dict[str, Callable[[Report], alt.TopLevelMixin]] = {
        "bytes": lambda it: _titled(bytes_figure(it, PICTURE)),
        "errors": lambda it: _titled(error_figure(it, PICTURE)),
        "expert-tokens": lambda it: _titled(tokens_figure(it, PICTURE)),
        "expert-errors": lambda it: _titled(expert_errors_figure(it, PICTURE)),
        "spectra": _spectra,
    }
    return {name: drawn[name](report) for name in picture_names(report)}


def _spectra(report: Report) -> alt.TopLevelMixin:
    _, figures = spectra_figures(report, PICTURE)
    return _grid(figures).properties(title="Spectra and their cut")


def _titled(figure: Figure) -> alt.TopLevelMixin:
    assert figure.chart is not None
    return figure.chart.properties(width=WIDTH, title=figure.title)


def _grid(figures: Sequence[Figure]) -> alt.ConcatChart:
    small = [
        figure.chart.properties(width=_SMALL, height=120, title=f"{figure.title}, {figure.told}")
        for figure in figures
        if figure.chart is not None
    ]
    return alt.concat(*small, columns=_COLUMNS)


def _write(charts: Mapping[str, alt.TopLevelMixin], folder: Path) -> list[Path]:
    written: list[Path] = []
    for name, chart in charts.items():
        spec: dict[str, Any] = chart.to_dict()
        spec |= {"config": config(PICTURE), "padding": 16}
        spec["config"]["aria"] = False  # it would describe every cell
        svg = vl_convert.vegalite_to_svg(spec)
        png = vl_convert.svg_to_png(svg, scale=_PNG_SCALE)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.svg", folder / f"{name}.png"]
        paths[0].write_text(svg, encoding="utf-8")
        paths[1].write_bytes(png)
        written.extend(paths)
    return written
