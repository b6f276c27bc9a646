"""Spectra with the cut: what each low-rank part kept, and what it left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from compress.report.pages.figures import Chart, Figure
from compress.report.pages.places import Place, places_of
from compress.report.pages.theme import RAMP, Palette
from compress.report.report import LayerReport, Report, Spectrum

MOST_LINES = 40
HEIGHT = 170
_LEAST = 1e-4
_NEARLY_ALL = 0.85
_NONE = "No spectra: no layer has a low-rank part, or the report was written by a version that recorded none."


def spectra_figures(report: Report, palette: Palette) -> tuple[str, list[Figure]]:
    """A chart for each projection with a line for each block; without any, the sentence that says why."""
    shown = [layer for layer in report.layers if layer.spectrum is not None]
    if not shown:
        return _NONE, []
    places = places_of([layer.name for layer in report.layers])
    projections: dict[str, list[LayerReport]] = {}
    for layer in shown:
        projections.setdefault(places[layer.name].projection, []).append(layer)
    least = _least([layer.spectrum for layer in shown if layer.spectrum is not None])
    told = (
        "Singular values, divided by the largest, of the matrix that the low-rank part approximates, weighted by the "
        "calibration inputs. Each line is a block, dark to light from the first to the last; the orange cut is the "
        "rank that is kept."
    )
    return told, [
        Figure(name, _chart(_thinned(layers), places, least, palette), _told(layers))
        for name, layers in projections.items()
    ]


def share_at(spectrum: Spectrum, rank: float) -> float:
    """The share that belongs to a rank, between two known ones on logarithmic scales."""
    points = list(zip(spectrum.ranks, spectrum.shares, strict=True))
    for (low, before), (high, after) in itertools.pairwise(points):
        if low <= rank <= high:
            if min(before, after) <= 0:
                return before if rank == low else after
            way = math.log(rank / low) / math.log(high / low)
            return float(before ** (1 - way) * after**way)
    return points[-1][1]


def _least(spectra: Sequence[Spectrum]) -> float:
    """A power of ten that nearly all of nearly every spectrum is above: the last values may be zero."""
    ends = [share_at(one, max(1.0, _NEARLY_ALL * one.ranks[-1])) for one in spectra]
    least: float = 10.0 ** math.floor(math.log10(max(_LEAST, min(ends))))
    return min(least, 0.1)


def _told(layers: Sequence[LayerReport]) -> str:
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    full = layers[0].spectrum.ranks[-1] if layers[0].spectrum is not None else 0
    if not ranks:
        return f"of {full}"
    cut = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{cut} of {full}"


def _thinned(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """At most `MOST_LINES`, evenly spaced."""
    n = min(MOST_LINES, len(layers))
    return [layers[round(k * (len(layers) - 1) / max(1, n - 1))] for k in range(n)]


def _chart(
    layers: Sequence[LayerReport], places: dict[str, Place], least: float, palette: Palette
) -> Chart:
    rows: list[dict[str, Any]] = []
    cuts: list[dict[str, Any]] = []
    for order, layer in enumerate(layers):
        if layer.spectrum is None:
            continue
        known = {"order": order, "block": places[layer.name].block, "layer": layer.name}
        shares = [max(share, least / 10) for share in layer.spectrum.shares]
        rows.append({**known, "rank": list(layer.spectrum.ranks), "share": shares})
        if layer.rank is not None:
            at = max(share_at(layer.spectrum, layer.rank), least)
            cuts.append({**known, "rank": layer.rank, "share": float(f"{at:.4g}")})
    full = max(row["rank"][-1] for row in rows)
    x = alt.X(
        "rank:Q",
        scale=alt.Scale(type="log", domain=[1, full], nice=False),
        axis=alt.Axis(values=_powers(full), format="d", grid=False, title="rank"),
    )
    y = alt.Y(
        "share:Q",
        scale=alt.Scale(type="log", domain=[least, 1], nice=False),
        axis=alt.Axis(
            values=[10.0**-k for k in range(9)], format="~g", title=None, labelFlush=False
        ),
    )
    tooltip: list[Any] = ["layer:N", "rank:Q", alt.Tooltip("share:Q", title="share of the first")]
    color = alt.Color("order:O", scale=alt.Scale(scheme=RAMP), legend=None)
    lines = (
        alt.Chart(alt.Data(values=rows))
        .transform_flatten(["rank", "share"])
        .mark_line(strokeWidth=1.1, opacity=0.75, clip=True)
        .encode(x=x, y=y, color=color, detail="layer:N", tooltip=tooltip)
    )
    return alt.layer(lines, *_cut(cuts, x, y, tooltip, palette)).properties(height=HEIGHT)


def _cut(
    cuts: Sequence[dict[str, Any]], x: alt.X, y: alt.Y, tooltip: list[Any], palette: Palette
) -> list[alt.Chart]:
    """A line where all layers are cut at one rank; else a point on each layer's own line."""
    if len({cut["rank"] for cut in cuts}) == 1:
        base = alt.Chart(alt.Data(values=[{"rank": cuts[0]["rank"]}]))
        return [base.mark_rule(strokeWidth=2, color=palette.accent).encode(x=x)]
    points = alt.Chart(alt.Data(values=list(cuts))).mark_point(
        filled=True, size=26, opacity=1, color=palette.accent
    )
    return [points.encode(x=x, y=y, tooltip=tooltip)]


def _powers(most: int) -> list[int]:
    return [4**k for k in range(12) if 4**k <= most]
