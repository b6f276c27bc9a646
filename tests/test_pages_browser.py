"""Pages in a real browser: drawn whole, nothing fetched, no complaint; phone and desk, light and dark."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny
from reports import make_report
from test_pages import HOSTILE, PROJECTIONS, compared, many, with_spectrum

from compress.inspection.checkpoint import inspect
from compress.inspection.page import inspection_page
from compress.inspection.possibilities import possibilities
from compress.inspection.spectra import weight_spectra
from compress.pipeline.main import no_progress
from compress.report.comparison import Differences, compare_runs
from compress.report.pages import comparison_page, run_page
from compress.report.report import Report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]

# A window cannot be as narrow as a phone, a frame in it can.
FRAME = """<!doctype html><body><iframe src="page.html" style="width:WIDTHpx;height:900px;border:0"></iframe><script>
const look = () => {
  const page = document.querySelector("iframe").contentDocument, root = page?.documentElement;
  if (!root?.dataset.charts) return setTimeout(look, 50);
  const charts = [...page.querySelectorAll("[data-chart]")];
  document.body.dataset.found = JSON.stringify({
    state: root.dataset.charts,
    places: charts.length,
    drawn: charts.filter((one) => one.querySelector("svg")?.getBoundingClientRect().height > 40).length,
    marks: charts.map((one) => one.querySelectorAll("svg path, svg text").length),
    tooWide: root.scrollWidth - root.clientWidth,
    hidden: [...page.querySelectorAll(".wide:has(.runs)")].map((one) => one.scrollWidth - one.clientWidth),
    cut: charts.filter((one) => one.querySelector("svg").getBoundingClientRect().right > root.clientWidth + 1).length,
    fetched: page.defaultView.performance.getEntriesByType("resource").map((one) => one.name),
    paper: page.defaultView.getComputedStyle(page.body).backgroundColor,
    ink: page.defaultView.getComputedStyle(charts[0].querySelector("svg text")).fill,
  });
};
look();
</script>"""


def opened(folder: Path, page: str, width: int, scheme: str) -> tuple[dict[str, Any], list[str]]:
    """What is on a page, and what it said to the console."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width + 100},1000",
        "--enable-logging=stderr",
        "--virtual-time-budget=60000",
        "--dump-dom",
        *(["--force-dark-mode"] if scheme == "dark" else []),
        frame.as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'data-found="([^"]*)"', run.stdout)
    assert found is not None, run.stderr[-2000:]
    said = [line for line in run.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(found[1])), said


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    layers = [with_spectrum(block, name) for block in range(6) for name in (*PROJECTIONS, HOSTILE)]
    report: Report = replace(
        make_report(), layers=tuple(layers), notes=(HOSTILE,), peak_memory={"compress": 10**9}
    )
    few, some = (
        compare_runs(runs, Differences.REFUSE) for runs in (compared(report), many(report, 20))
    )
    folder = tmp_path_factory.mktemp("inspected")
    save_tiny(folder)
    found = inspect(str(folder), progress=no_progress)
    assert found.ordinary is not None
    spectra = dict(weight_spectra(found.ordinary, progress=no_progress))
    return {
        "run": run_page(report),
        "comparison": comparison_page(few),
        "comparison of many": comparison_page(some),
        "inspection": inspection_page("tiny", found, possibilities(found.ordinary), spectra),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    ("name", "n_charts"),
    [("run", 10), ("comparison", 3), ("comparison of many", 3), ("inspection", 3)],
)
def test_a_page_is_drawn_whole(
    pages: dict[str, str], tmp_path: Path, name: str, n_charts: int, width: int, scheme: str
) -> None:
    found, said = opened(tmp_path, pages[name], width, scheme)
    assert said == []
    assert found["fetched"] == []
    assert found["state"] == "drawn"
    assert found["drawn"] == found["places"] == n_charts
    assert min(found["marks"]) > 3
    assert found["tooWide"] <= 0 and found["cut"] == 0
    assert all(pixels <= 0 for pixels in found["hidden"])  # no column scrolls out of sight
    channels = [int(it) for it in re.findall(r"\d+", found["paper"])[:3]]
    ink = [int(it) for it in re.findall(r"\d+", found["ink"])[:3]]
    assert (max(channels) < 60 < min(ink)) if scheme == "dark" else (min(channels) > 200 > max(ink))
