"""METRICS: one more row is a figure in every place, and nothing else has to know of it."""

import csv
import io
import json
import math
import statistics
from pathlib import Path

import pytest
from documents import shown
from reports import make_report, windows

from compress.cli.main import main
from compress.report.card.card import model_card
from compress.report.comparison import Differences, compare_runs, load_runs
from compress.report.metrics import METRICS, Direction, Metric
from compress.report.numbers import Decimals, Measured
from compress.report.pages import write_comparison_pictures
from compress.report.schema import report_schema
from compress.sweep.results import best_at, best_lines

WINDOW_NLL = shown("window_nll")
ROW: Metric = WINDOW_NLL.WINDOW_NLL


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


def stderr(perplexity: float) -> float:
    """Over the sixteen windows of the made-up report."""
    return statistics.stdev(it.nll / it.n_tokens for it in windows(perplexity)) / 4


BEFORE, AFTER = math.log(27.8), math.log(29.1)
"""The windows of the made-up report are equally long, so that the mean is the logarithm of the perplexity."""
BEFORE_TEXT = f"{BEFORE:.5f} ± {stderr(27.8):.5f}"
AFTER_TEXT = f"{AFTER:.5f} ± {stderr(29.1):.5f}"
NAME, SHORT = "negative log-likelihood of a window", "window NLL"


@pytest.mark.usefixtures("row")
def test_another_row_is_in_the_summary_and_among_the_changes(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(capsys, folders[0])
    (line,) = [it for it in out.splitlines() if it.startswith(NAME)]
    assert line.split("  ")[-2:] == [BEFORE_TEXT, AFTER_TEXT]
    assert f"change: {NAME}: {AFTER - BEFORE:+.3f} (" in out
    text = printed(capsys, folders[0], "--format", "md")
    assert f"| {NAME}, nats/token | {BEFORE_TEXT} | {AFTER_TEXT} |" in text


@pytest.mark.usefixtures("row")
def test_another_row_is_on_the_page_and_on_the_card(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    page = printed(capsys, folders[0], "--format", "html")
    label = NAME.replace("n", "N", 1)
    assert f'<p class="label">{label}</p>\n<p class="value">{AFTER:.5f} <' in page
    card = model_card(make_report())
    assert f"| {NAME}, nats/token | {BEFORE_TEXT} |" in card
    assert "type: nll" in card and f"name: {NAME}" in card


def test_another_row_is_in_every_form_of_a_comparison(
    row: Metric, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    head, _, *lines = printed(capsys, *folders).splitlines()
    column = head.split("\t").index(f"{SHORT}, nats/token")
    assert head.split("\t")[column + 1] == f"{SHORT}, change"
    assert lines[-1].split("\t")[column] == AFTER_TEXT
    (_, first, _) = csv.DictReader(io.StringIO(printed(capsys, *folders, "--format", "csv")))
    assert float(first["window_nll"]) == pytest.approx(AFTER)
    assert float(first["window_nll_stderr"]) == pytest.approx(stderr(29.1))
    low, change, high = (float(first[f"window_nll_change{end}"]) for end in ("_low", "", "_high"))
    assert low < change < high and change == pytest.approx(AFTER - BEFORE)
    found = json.loads(printed(capsys, *folders, "--format", "json"))["figures"][0]
    assert found["window_nll"]["stderr"] == pytest.approx(stderr(29.1))
    page = printed(capsys, *folders, "--format", "html")
    assert f'title="{row.help}">{SHORT}<br><small>nats/token</small></th>' in page
    assert f"Size against {NAME}, nats/token" in page


def test_another_row_is_a_choice_of_the_best_and_has_a_picture(
    row: Metric, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare_runs(load_runs([Path(it) for it in folders]), Differences.REFUSE)
    found = best_lines(best_at(["1GB"], comparison.figures, row), comparison.figures, row)
    assert found == [f"1GB: a, 101.3 MB, {SHORT} {AFTER:.5f} (best of 2 points)"]
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "window_nll" in capsys.readouterr().out
    names = {it.stem for it in write_comparison_pictures(comparison, tmp_path)}
    assert "pareto-window_nll" in names


def test_another_row_is_in_the_schema(row: Metric) -> None:
    told = report_schema()["x-metrics"][row.key]
    assert told == {
        "label": NAME,
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
