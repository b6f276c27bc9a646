"""Colours and type of pages and pictures.

Series colours are Okabe and Ito's (2008), which people with any colour vision tell apart; ramps are viridis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
RAMP: Final = "viridis"


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours and font of a chart."""

    background: str
    ink: str
    muted: str
    line: str
    before: str
    after: str
    accent: str
    paper: str
    """Around marks, so that those that touch stay apart."""
    series: tuple[str, ...]
    font: str


PAGE = Palette(
    background="transparent",
    ink="var(--ink)",
    muted="var(--muted)",
    line="var(--line)",
    before="var(--before)",
    after="var(--after)",
    accent="var(--accent)",
    paper="var(--paper)",
    series=tuple(f"var(--series-{n})" for n in range(1, 8)),
    font=FONT,
)
"""Palette of pages: the style sheet's variables, so that charts follow a dark scheme, and paper, without a redraw."""

PICTURE = Palette(
    background="#ffffff",
    ink="#1b1f24",
    muted="#57606a",
    line="#e3e7eb",
    before="#a8b0b9",
    after="#0072b2",
    accent="#d55e00",
    paper="#ffffff",
    series=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#6e6e6e"),
    font="sans-serif",
)
"""Palette of pictures: dark on white, readable on light and dark pages."""


def config(palette: Palette) -> dict[str, Any]:
    """Vega-Lite's configuration: quiet axes, no frames."""
    text = {"labelColor": palette.muted, "titleColor": palette.muted, "titleFontWeight": "normal"}
    sizes = {"labelFontSize": 11.5, "titleFontSize": 11.5}
    return {
        "font": palette.font,
        "background": palette.background,
        "padding": {"left": 0, "right": 1, "top": 3, "bottom": 5},
        "view": {"stroke": None},
        "axis": {
            **text,
            **sizes,
            "gridColor": palette.line,
            "domainColor": palette.line,
            "tickColor": palette.line,
            "tickSize": 4,
            "labelPadding": 5,
            "titlePadding": 9,
        },
        "legend": {**text, **sizes, "symbolType": "circle"},
        "title": {
            "color": palette.ink,
            "subtitleColor": palette.muted,
            "fontSize": 13,
            "offset": 12,
            "anchor": "start",
        },
        "text": {"color": palette.ink, "fontSize": 11.5},
        "rule": {"color": palette.muted},
    }
