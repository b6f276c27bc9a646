"""Progress: few lines without a terminal, bars on one, and an estimate of what is left."""

import io

import pytest
from rich.console import Console

from compress.cli.bars import Lines, duration, show_progress


def test_lines_are_few_and_estimate_what_is_left() -> None:
    written: list[str] = []
    now = iter([0.0, 4.0, 12.0, 13.0, 40.0, 41.0])
    progress = Lines(written.append, every=10.0, clock=lambda: next(now))
    for done in (0, 10, 30, 35, 100):
        progress("calibrate", done, 100)
    progress("export", 0, 0)
    assert written == [
        "calibrate: 0 % (0/100)",
        "calibrate: 30 % (30/100), about 28 s left",
        "calibrate: done in 40 s",
        "export: started",
    ]


def test_progress_is_lines_without_a_terminal_and_bars_on_one() -> None:
    plain, drawn = io.StringIO(), io.StringIO()
    for stream, is_terminal in ((plain, False), (drawn, True)):
        with show_progress(Console(file=stream, force_terminal=is_terminal)) as progress:
            progress("calibrate", 1, 2)
            progress("calibrate", 2, 2)
    assert "\x1b" not in plain.getvalue()
    assert "calibrate: 50 % (1/2)" in plain.getvalue()
    assert "\x1b" in drawn.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
