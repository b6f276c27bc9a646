"""Static pictures for cards: SVG, and PNG for whoever shows no SVG; dark on white, readable on any ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from compress.pages.charts import bytes_figure, error_figure
from compress.pages.figures import Chart, Figure
from compress.pages.spectra import spectra_figures
from compress.pages.theme import PICTURE, config
from compress.report import Report

FOLDER = "pictures"
WIDTH = 640
_SMALL, _COLUMNS = 190, 3
_PNG_SCALE = 2


def write_pictures(report: Report, folder: Path) -> list[Path]:
    """The pictures of a run as `folder/pictures/NAME.svg` and `.png`; those without data are not drawn.

    Returns what was written, each SVG before its PNG. Raises OSError if it cannot be written.
    """
    return _write(_run_charts(report), folder / FOLDER)


def _run_charts(report: Report) -> dict[str, alt.TopLevelMixin]:
    figures = {"bytes": bytes_figure(report, PICTURE), "errors": error_figure(report, PICTURE)}
    charts: dict[str, alt.TopLevelMixin] = {
        name: _titled(figure.chart, figure.title)
        for name, figure in figures.items()
        if figure.chart is not None
    }
    _, spectra = spectra_figures(report, PICTURE)
    if spectra:
        charts["spectra"] = _grid(spectra).properties(
            title="Singular values of what each path repairs or replaces, and where it is cut"
        )
    return charts


def _titled(chart: Chart, title: str) -> Chart:
    return chart.properties(width=WIDTH, title=title)


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
        svg = vl_convert.vegalite_to_svg(spec)
        png = vl_convert.svg_to_png(svg, scale=_PNG_SCALE)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.svg", folder / f"{name}.png"]
        paths[0].write_text(svg, encoding="utf-8")
        paths[1].write_bytes(png)
        written.extend(paths)
    return written
