"""The key of a picture: numbers, marks and names in columns, for a picture has no page around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt

from compress.report.pages.figures import Chart
from compress.report.pages.frames import Point
from compress.report.pages.labels import LINE
from compress.report.pages.marks import Mark
from compress.report.pages.theme import Palette

_LINE, _LETTER, _INDENT = LINE + 5, 5.6, 46


def run_key(
    runs: Sequence[Point], marks: Mapping[str, Mark], width: int, palette: Palette
) -> Chart:
    """Every run by its number, mark and name, in as many columns as the longest name leaves room for."""
    longest = _INDENT + _LETTER * max(len(it.label) for it in runs) + 12
    n_columns = max(1, min(len(runs), int(width // longest)))
    n_rows = -(-len(runs) // n_columns)
    rows = [
        vars(point) | {"column": index // n_rows * width / n_columns, "row": index % n_rows}
        for index, point in enumerate(runs)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("column:Q", axis=None, scale=alt.Scale(domain=[0, width], nice=False)),
        y=alt.Y("row:O", axis=None),
    )
    color, shape = (
        alt.Scale(domain=list(marks), range=[getattr(mark, of) for mark in marks.values()])
        for of in ("color", "shape")
    )
    drawn = [
        base.mark_text(align="right", dx=16, color=palette.muted).encode(text="number:N"),
        base.mark_point(size=90, filled=True, opacity=1, xOffset=30).encode(
            color=alt.Color("method:N", scale=color, legend=None),
            shape=alt.Shape("method:N", scale=shape, legend=None),
        ),
        base.mark_text(align="left", dx=_INDENT - 4, color=palette.ink).encode(text="label:N"),
    ]
    return alt.layer(*drawn).properties(width=width, height=_LINE * n_rows)
