"""The sweep as a command: what it prints, how it ends, and that a kill costs one point."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from workspaces import recipe

from compress.cli.main import main
from compress.errors import LayerError
from compress.report.comparison import Differences, compare_runs, load_runs
from compress.report.report import Report
from compress.sweep import run as sweeping

NAMES = ["rtn-bits4", "eora-gptq-bits3-rank4", "svd_llm-keep0.8"]
PER_RUN = {"out", "seconds", "timings", "footprint", "peak_memory"}
PER_RUN |= {"prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes"}
"""Keys of a report that no two runs share: its folder, times, speed and memory."""


@pytest.fixture
def sweep(workspace: Path) -> Path:
    """A sweep's file with three points on the tiny model."""
    base = recipe(workspace, eval_windows=2).to_mapping()
    base = {key: value for key, value in base.items() if key not in ("out", "method")}
    eora = {"name": "eora", "rank": 4, "base": {"name": "gptq", "group_size": 32}}
    values = {
        "recipe": base,
        "points": [
            {"name": "rtn", "method": {"name": "rtn", "group_size": 32}, "axes": {"bits": [4]}},
            {"name": "eora-gptq", "method": eora, "axes": {"bits": [3], "rank": [4]}},
            {"method": {"name": "svd_llm"}, "axes": {"keep": [0.8]}},
        ],
    }
    file = workspace / "sweep.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.slow
@pytest.mark.as_run
def test_a_sweep_ends_in_a_table_and_a_page(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all"
    arguments = ["sweep", str(sweep), "--out", str(out), "--budget", "1GB,1kB", "--by", "kl"]
    # The tiny model is far below a gigabyte, so that no method can be asked for it.
    assert main(arguments) == 2
    assert "svd_llm-budget1GB (points[2]): method.budget" in capsys.readouterr().err
    assert not out.exists()
    assert main(["sweep", str(sweep), "--out", str(out), "--plan"]) == 0
    assert "rtn-bits4" in capsys.readouterr().out
    assert not out.exists()
    assert main(["sweep", str(sweep), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ["original", *NAMES])
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    written = json.loads((out / "sweep.json").read_text())
    assert [it["name"] for it in written["points"]] == NAMES
    assert main(["sweep", str(out / "sweep.yaml"), "--out", str(out)]) == 0
    assert "3 points in" in (again := capsys.readouterr().out) and "3 done" in again


@pytest.mark.usefixtures("quick_verification")
def test_a_sweep_with_a_failure_compares_the_others_and_says_so(
    sweep: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = sweeping.pipeline.run

    def failing(its_recipe, **options):
        if its_recipe.method_name == "eora":
            raise LayerError("no good")
        return run(its_recipe, **options)

    monkeypatch.setattr(sweeping.pipeline, "run", failing)
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "all")]) == 2
    printed = capsys.readouterr()
    assert "error: 1 point of 3 failed:\n  eora-gptq-bits3-rank4: no good" in printed.err
    assert "\nsvd_llm-keep0.8 " in printed.out
    assert "\neora-gptq-bits3-rank4 " in printed.out.partition("original")[0]  # planned only
    assert "eora" not in printed.out.partition("original")[2]
    assert (tmp_path / "all" / "report.html").is_file()


def test_a_flag_holds_for_all_points_and_is_refused_where_one_sets_it_too(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(sweep.read_text())
    values["axes"] = {"samples": [4, 8]}
    sweep.write_text(yaml.safe_dump(values))
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "all"), "--samples", "6"]) == 2
    assert "--samples: samples in" in capsys.readouterr().err
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "all"), "--bits", "6"]) == 2
    assert "--bits: no such option" in capsys.readouterr().err


def comparable(value):
    """A report without what no two runs share; that statistics were found again is such a thing too."""
    if isinstance(value, dict):
        return {key: comparable(part) for key, part in value.items() if key not in PER_RUN}
    if isinstance(value, list | tuple):
        return [comparable(p) for p in value if not (isinstance(p, str) and "used again" in p)]
    return value


def started(sweep: Path, out: Path, cache: Path) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    root = str(Path(__file__).resolve().parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); from compress.cli.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, "sweep", str(sweep), "--out", str(out)],
        env={**os.environ, "COMPRESS_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.as_run
@pytest.mark.timeout(3000)  # three sweeps, with a fresh process for everything
def test_a_sweep_that_is_killed_in_a_point_goes_on_and_ends_in_the_same_report(
    sweep: Path, tmp_path: Path
) -> None:
    values, names = yaml.safe_load(sweep.read_text()), NAMES[:2]
    sweep.write_text(yaml.safe_dump({**values, "points": values["points"][:2]}))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = started(sweep, killed, tmp_path / "cache-killed")
    while not list(killed.glob(f".{names[1]}.*.partial")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = {path.name for path in killed.iterdir()}
    assert names[0] in left and not left & {names[1], "report.html"}
    for out, cache in ((killed, "cache-killed"), (whole, "cache-whole")):
        process = started(sweep, out, tmp_path / cache)
        printed, _ = process.communicate(timeout=1500)
        assert process.returncode == 0, printed
    found = []
    for out in (killed, whole):
        there = {path.name for path in out.iterdir()}
        assert there == {*names, "originals", "report.html", "sweep.json", "sweep.yaml"}
        found.append([comparable(asdict(Report.load(out / name))) for name in names])
    assert found[0] == found[1]
    figures = [
        [
            {key: value for key, value in one.values.items() if key not in PER_RUN}
            for one in compare_runs(
                load_runs([out / name for name in names]), Differences.REFUSE
            ).figures
        ]
        for out in (killed, whole)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "--budget: '' leaves out a size; write 120MB or 120MB,80MB"),
        (",", "--budget: ',' leaves out a size"),
        ("80MB,80MB", "--budget: 80MB and 80MB are one size; name each size once"),
        (
            "80XB",
            "--budget: '80XB' is not an amount of bytes; write 120MB, 1.5GiB or 4096 (units: B, kB,",
        ),
    ],
)
def test_sizes_that_are_none_are_blamed_on_their_option(
    given: str, message: str, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", str(sweep), "--out", str(tmp_path / "all"), f"--budget={given}"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_point_is_named_once(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "all" / NAMES[0]
    folder.mkdir(parents=True)
    (folder / "report.json").write_text("[]", encoding="utf-8")
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "all"), "--plan"]) == 2
    error = capsys.readouterr().err
    assert error.count(str(folder / "report.json")) == 1


def test_a_sweep_that_cannot_be_written_is_refused_before_work(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(sweep), "--out", str(sweep / "all")]) == 2
    assert f"out: {sweep / 'all'} cannot be created" in capsys.readouterr().err
