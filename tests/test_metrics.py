"""METRICS: one more row is a figure in every place, and nothing else has to know of it."""

import csv
import io
import json
from pathlib import Path

import pytest
from documents import shown
from reports import make_report

from compress.cli.main import main
from compress.report.card.card import model_card
from compress.report.comparison import Differences, compare_runs, load_runs
from compress.report.metrics import METRICS, Direction, Metric
from compress.report.numbers import Decimals, Measured
from compress.report.pages import write_comparison_pictures
from compress.report.schema import report_schema
from compress.report.sides import Side
from compress.sweep.results import best_at, best_lines

WORST_WINDOW = shown("worst_window")
ROW: Metric = WORST_WINDOW.WORST_WINDOW


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Metric:
    monkeypatch.setitem(METRICS, ROW.key, ROW)
    return ROW


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        text = make_report().to_json()
        (tmp_path / name / "report.json").write_text(text, encoding="utf-8")
    return [str(tmp_path / name) for name in ("a", "b")]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["report", *arguments]) == 0
    return capsys.readouterr().out


def values() -> tuple[str, str]:
    scores = make_report().scores
    assert scores is not None
    before, after = (
        WORST_WINDOW.worst_window(Side(scores=it, tensor_bytes=None))
        for it in (scores.before, scores.after)
    )
    assert before is not None and after is not None
    return f"{before.value:.5f}", f"{after.value:.5f}"


@pytest.mark.usefixtures("row")
def test_another_row_is_in_the_summary_and_among_the_changes(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = values()
    out = printed(capsys, folders[0])
    (line,) = [it for it in out.splitlines() if it.startswith("worst window, nats/token ")]
    assert line.split()[-6:] == [before, "±", "0.00100", after, "±", "0.00100"]
    assert "change: worst window: x 1.0" in out
    text = printed(capsys, folders[0], "--format", "md")
    assert f"| worst window, nats/token | {before} ± 0.00100 | {after} ± 0.00100 |" in text


@pytest.mark.usefixtures("row")
def test_another_row_is_on_the_page_and_on_the_card(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, after = values()
    page = printed(capsys, folders[0], "--format", "html")
    assert f'<p class="label">Worst window</p>\n<p class="value">{after}' in page
    card = model_card(make_report())
    assert "| worst window, nats/token | " in card
    assert "type: nll" in card and "name: worst window" in card


def test_another_row_is_in_every_form_of_a_comparison(
    row: Metric, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, after = values()
    head, _, *lines = printed(capsys, *folders).splitlines()
    column = head.split("\t").index("worst window, nats/token")
    assert head.split("\t")[column + 1] == "worst window, change"
    assert lines[-1].split("\t")[column] == f"{after} ± 0.00100"
    (_, first, _) = csv.DictReader(io.StringIO(printed(capsys, *folders, "--format", "csv")))
    assert f"{float(first['worst_window']):.5f}" == after
    assert first["worst_window_stderr"] == "0.001"
    assert float(first["worst_window_change"]) > 1
    found = json.loads(printed(capsys, *folders, "--format", "json"))["figures"][0]
    assert found["worst_window"]["stderr"] == 0.001
    page = printed(capsys, *folders, "--format", "html")
    assert f'title="{row.help}">worst window<br><small>nats/token</small></th>' in page
    assert "Size against worst window, nats/token" in page


def test_another_row_is_a_choice_of_the_best_and_has_a_picture(
    row: Metric, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare_runs(load_runs([Path(it) for it in folders]), Differences.REFUSE)
    found = best_lines(best_at(["1GB"], comparison.figures, row), comparison.figures, row)
    assert found == [f"1GB: a, 101.3 MB, worst window {values()[1]} (best of 2 points)"]
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "worst_window" in capsys.readouterr().out
    names = {it.stem for it in write_comparison_pictures(comparison, tmp_path)}
    assert "pareto-worst_window" in names


def test_another_row_is_in_the_schema(row: Metric) -> None:
    told = report_schema()["x-metrics"][row.key]
    assert told == {
        "label": "worst window",
        "unit": "nats/token",
        "better": "lower",
        "description": row.help,
    }


def test_a_row_that_reads_nothing_is_nowhere_but_in_the_tables(
    monkeypatch: pytest.MonkeyPatch, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Metric(
        key="nothing",
        label="nothing at all",
        direction=Direction.HIGHER,
        format=Decimals(0),
        help="what no report has",
        read=lambda _: None,
    )
    monkeypatch.setitem(METRICS, nothing.key, nothing)
    assert "nothing at all" not in printed(capsys, folders[0])
    assert "nothing at all" not in printed(capsys, folders[0], "--format", "html").lower()
    assert printed(capsys, *folders).splitlines()[1].endswith("\t-")


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda it: it.key)
def test_every_row_tells_what_it_is(metric: Metric) -> None:
    assert METRICS[metric.key] is metric
    assert metric.label and metric.help and not metric.help.endswith(".")
    assert metric.shown
    text = str(metric.format(Measured(0.5, None if metric.is_exact else 0.25)))
    assert ("±" in text) is not metric.is_exact
