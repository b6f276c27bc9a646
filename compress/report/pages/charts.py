"""The charts of one run."""

from __future__ import annotations

from collections.abc import Mapping

from compress.report.numbers import megabytes
from compress.report.pages.figures import Bar, Cell, Figure, bars, heat_map
from compress.report.pages.places import bytes_by_part, places_of
from compress.report.pages.theme import Palette
from compress.report.report import Report

_ALIKE = 0.02
_SHORT, _MINUTE = 0.1, 60


def error_figure(report: Report, palette: Palette) -> Figure:
    """The relative output error of every layer."""
    title = "Error of each layer"
    cells = cells_of({layer.name: layer.relative_error for layer in report.layers})
    if not cells:
        return Figure(title, None, "No layer's error was measured.")
    worst = max(cells, key=lambda cell: cell.value)
    told = (
        "‖(W − W′)X‖ over ‖WX‖ on the calibration tokens: how much of a layer's output compression changes. "
        f"The largest is {worst.value:.3f}, in {worst.layer}."
    )
    return Figure(title, heat_map(cells, "relative error", ".3f", palette), told)


def bits_figure(layers: Mapping[str, float], palette: Palette) -> Figure:
    """The bits per weight of every layer, where they are not all about the same."""
    title = "Bits per weight of each layer"
    values = {round(bits, 2) for bits in layers.values()}
    if len(values) <= 1:
        same = f"Every layer takes {values.pop():.2f} bits per weight." if values else "No layers."
        return Figure(title, None, same)
    span = f"{min(values):.2f} to {max(values):.2f}"
    if max(values) - min(values) < _ALIKE * max(values):
        return Figure(title, None, f"Every layer takes {span} bits per weight.")
    told = f"All that a layer stores, scales and factors included: {span} bits."
    return Figure(title, heat_map(cells_of(layers), "bits per weight", ".2f", palette), told)


def ranks_figure(report: Report, palette: Palette) -> Figure:
    """The rank of every low-rank part, where they are not all the same."""
    title = "Rank of each layer"
    ranks = {layer.rank for layer in report.layers if layer.rank is not None}
    if not ranks:
        return Figure(title, None, "No layer has a low-rank part.")
    if len(ranks) == 1:
        return Figure(title, None, f"Every low-rank part has rank {ranks.pop()}.")
    told = f"Ranks from {min(ranks)} to {max(ranks)}; layers without a low-rank part are left out."
    cells = cells_of({layer.name: layer.rank for layer in report.layers})
    return Figure(title, heat_map(cells, "rank", "d", palette), told)


def bytes_figure(report: Report, palette: Palette) -> Figure:
    """Bytes by part, after and before."""
    parts = bytes_by_part(report)
    rows = [
        Bar(part, _bytes_text(before, after), after / 1e6, before / 1e6)
        for part, before, after in parts
    ]
    told = (
        "The model's tensors by part: the pale bar is what a part took, the full bar what it takes."
    )
    return Figure("Where the bytes are", bars(rows, palette), told)


def time_figure(report: Report, palette: Palette) -> Figure:
    """Bars of the seconds that each stage took."""
    if not report.timings:
        return Figure("Time by stage", None, "No stage was timed.")
    rows = [Bar(stage, duration(took), took) for stage, took in report.timings.items()]
    told = f"{duration(sum(report.timings.values()))} together."
    return Figure("Time by stage", bars(rows, palette), told)


def memory_figure(report: Report, palette: Palette) -> Figure:
    """The high-water mark of memory in each stage."""
    title = "Memory by stage"
    if not report.peak_memory:
        return Figure(
            title, None, "The report has no memory figures: it was written by an earlier version."
        )
    rows = [Bar(stage, megabytes(held), held / 1e6) for stage, held in report.peak_memory.items()]
    told = "The most that the process held in each stage; on macOS in it or before."
    return Figure(title, bars(rows, palette), told)


def duration(seconds: float) -> str:
    """Seconds for people: "3.2 s", "4 min 10 s"."""
    if 0 < seconds < _SHORT:
        return f"under {_SHORT} s"
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def cells_of(values: Mapping[str, float | None]) -> list[Cell]:
    """Values of layers at their places; None leaves a gap."""
    places = places_of(list(values))
    return [
        Cell(name, places[name].block, places[name].projection, value)
        for name, value in values.items()
        if value is not None
    ]


def _bytes_text(before: int, after: int) -> str:
    if before == after:
        return f"{megabytes(after)}, as it was"
    return f"{megabytes(after)}, was {megabytes(before)}"
