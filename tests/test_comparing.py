"""Runs beside each other: alike or refused, gaps where nothing was measured, files that stay whole."""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import make_report

from compress.cli.main import main
from compress.errors import CheckpointError, ComparisonError
from compress.report.comparison import Differences, Run, compare_runs, load_runs
from compress.report.formats import comparison_csv, comparison_markdown, headings
from compress.report.report import Report
from eval.scores import Scores


def write(folder: Path, report: Report) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    return folder


def with_recipe(report: Report, **changes: Any) -> Report:
    return replace(report, recipe=report.recipe | changes)


def with_tasks(report: Report, **changes: Any) -> Report:
    """The report with both models' task scores changed."""
    assert report.scores is not None
    both = [
        replace(each, tasks=tuple(replace(task, **changes) for task in each.tasks))
        for each in (report.scores.before, report.scores.after)
    ]
    return replace(report, scores=replace(report.scores, before=both[0], after=both[1]))


def with_tokens(report: Report) -> Report:
    assert report.scores is not None and report.scores.after.fidelity is not None
    after = replace(report.scores.after, fidelity=replace(report.scores.after.fidelity, n_tokens=7))
    return replace(report, scores=replace(report.scores, after=after))


def with_lm_eval(report: Report) -> Report:
    place = report.environment
    versions = place.versions | {"lm_eval": "0.3"}
    return replace(report, environment=replace(place, versions=versions))


def runs(**reports: Report) -> tuple[Run, ...]:
    return tuple(
        Run(label=label, folder=Path(label), report=each) for label, each in reports.items()
    )


OTHERS: list[tuple[Callable[[Report], Report], str]] = [
    (lambda it: replace(it, fingerprint="0" * 64), "reference model: org/tiny at 0123abc (fff"),
    (lambda it: with_recipe(it, eval_text="b.txt"), "eval_text: python-docs in a, b.txt in b"),
    (lambda it: with_recipe(it, eval_windows=4), "eval_windows: 16 in a, 4 in b"),
    (lambda it: with_recipe(it, seq_len=64), "in a, 64 in b"),
    (with_tokens, "tokens of eval_text: 8176 in a, 7 in b"),
    (with_lm_eval, "in a, 0.3 in b"),
    (lambda it: with_recipe(it, tasks=["offline_piqa"]), "tasks: offline_arc_easy, offline_hell"),
    (lambda it: with_recipe(it, limit=7), "limit: 40 in a, 7 in b"),
    (lambda it: with_recipe(it, seed=9), "seed: 3 in a, 9 in b"),
    (lambda it: with_tasks(it, version="2"), "version of offline_piqa: 1.0 in a, 2 in b"),
    (lambda it: with_tasks(it, n_shot=5), "few-shot examples of offline_piqa: 0 in a, 5 in b"),
    (lambda it: with_tasks(it, n_items=9), "items of offline_piqa: 40 in a, 9 in b"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS)
def test_runs_that_were_measured_differently_are_refused_with_the_field(
    change: Callable[[Report], Report], message: str
) -> None:
    there = runs(a=make_report(), b=change(make_report()))
    with pytest.raises(ComparisonError) as caught:
        compare_runs(there, Differences.REFUSE)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    told = compare_runs(there, Differences.TELL)
    assert [each.text for each in told.differences] == [str(caught.value).splitlines()[1].strip()]
    assert [each.label for each in told.originals] == ["original of a", "original of b"]


def test_a_text_that_was_known_by_what_it_says_may_lie_anywhere() -> None:
    def read(text: str, sha256: str | None) -> Report:
        there = with_recipe(make_report(), eval_text=text)
        assert there.scores is not None
        return replace(there, scores=replace(there.scores, text_sha256=sha256))

    same, other = "a" * 64, "b" * 64
    compare_runs(runs(a=read("x.txt", same), b=read("y.txt", same)), Differences.REFUSE)
    with pytest.raises(ComparisonError, match="eval_text: tokens of sha256 aaaaaaaaaaaa in a, "):
        compare_runs(runs(a=read("x.txt", same), b=read("x.txt", other)), Differences.REFUSE)
    with pytest.raises(ComparisonError, match=r"eval_text: x\.txt in a, y\.txt in b"):
        compare_runs(runs(a=read("x.txt", same), b=read("y.txt", None)), Differences.REFUSE)


def test_more_windows_of_a_text_are_no_other_text() -> None:
    def read(n_windows: int, sha256: str) -> Report:
        there = with_recipe(make_report(), eval_windows=n_windows)
        assert there.scores is not None
        return replace(there, scores=replace(there.scores, text_sha256=sha256))

    there = runs(a=read(16, "a" * 64), b=read(8, "b" * 64))
    fields = [each.field for each in compare_runs(there, Differences.TELL).differences]
    assert fields == ["eval_windows"]


def test_how_a_model_was_compressed_is_no_difference() -> None:
    other = with_recipe(make_report(), method={"name": "rtn"}, samples=3, calibration=["x"])
    found = compare_runs(runs(a=make_report(), b=other), Differences.REFUSE)
    assert [each.method for each in found.figures] == ["eora on gptq", "rtn"]
    assert not found.differences


def test_a_difference_shows_behind_a_run_without_evaluation() -> None:
    bare = replace(make_report(), scores=None)
    other = with_recipe(make_report(), limit=7)
    with pytest.raises(ComparisonError, match="limit: 40 in b, 7 in c"):
        compare_runs(runs(a=bare, b=make_report(), c=other), Differences.REFUSE)


def test_a_run_without_evaluation_has_gaps_and_not_zeros() -> None:
    bare = with_recipe(replace(make_report(), scores=None), limit=7, eval_windows=0)
    found = compare_runs(runs(a=bare, b=make_report()), Differences.REFUSE)
    lines = {line["label"]: line for line in csv.DictReader(io.StringIO(comparison_csv(found)))}
    measured = [
        name for name in lines["a"] if name.startswith(("perp", "kl", "top1", "acc", "dec", "bits"))
    ]
    assert {lines["a"][name] for name in measured} == {""}
    assert (lines["a"]["n_bytes"], lines["a"]["layer_bits_per_weight"]) == ("101300000", "7.8")
    full = lines["b"]
    assert (full["perplexity"], full["accuracy"]) == ("29.1", "0.65")
    assert float(full["accuracy_change"]) == pytest.approx(-0.05)
    assert float(full["accuracy_change_low"]) < -0.05 < 0 < float(full["accuracy_change_high"])
    assert lines["original"]["accuracy_change"] == ""
    assert lines["original"]["perplexity"] == "27.8"
    row = next(line for line in comparison_markdown(found).splitlines() if line.startswith("| a |"))
    assert row == "| a | eora on gptq | 101.3 MB | 7.80 |" + " - |" * (len(headings()) - 4)


def test_the_mean_accuracy_weighs_tasks_equally_and_leaves_out_what_is_none() -> None:
    report = make_report()
    assert report.scores is not None
    task = replace(report.scores.after.tasks[-1], per_item=())
    tasks = (
        task,
        replace(task, task="offline_arc_easy", value=0.35, stderr=0.03),
        replace(task, task="lambada", metric="perplexity", value=9.0),
        # A group's own member, which the recipe does not name.
        replace(task, task="member", value=0.0),
    )
    after = Scores(None, tasks, None)
    report = replace(report, scores=replace(report.scores, after=after))
    (found,) = compare_runs(runs(a=report), Differences.REFUSE).figures
    accuracy = found.values["accuracy"]
    assert accuracy.value == pytest.approx(0.5)
    assert accuracy.stderr == pytest.approx((0.05**2 + 0.03**2) ** 0.5 / 2)
    assert "accuracy" not in found.changes
    assert found.n_tasks == 2
    assert not {"perplexity", "decode_tokens_per_s"} & set(found.values)


def test_labels_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, make_report()) for name in ("x/run", "y/run", "z")]
    found = load_runs(folders)
    assert [run.label for run in found] == ["x/run", "y/run", "z"]
    assert [run.folder for run in found] == folders
    with pytest.raises(ComparisonError, match="named twice"):
        load_runs([folders[0], folders[0] / ".." / "run"])


def test_a_broken_report_is_refused_by_the_name_of_its_file(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, make_report()) for name in ("a", "b")]
    (folders[1] / "report.json").write_text('{"schema": 1, "layers": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"b/report\.json: report: not JSON"):
        load_runs(folders)


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_runs_own_report_is_replaced_by_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    a, b = (str(write(tmp_path / each, make_report())) for each in "ab")
    out = Path(a) / name
    assert main(["report", a, "--out", str(out)]) == 0
    before = out.read_text(encoding="utf-8")
    for others in ([a, b], [b]):
        assert main(["report", *others, "--out", str(out)]) == 2
        assert "is the report of the run in" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("text", ["[]", "3", "null", '"report"'])
def test_json_that_is_no_report_is_refused_by_the_name_of_its_file(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "a", make_report())
    (folder / "report.json").write_text(text, encoding="utf-8")
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("report.json") == 1
    assert f"a/report.json: report: {text} is no report that `run` wrote" in error


def test_a_report_may_be_named_by_its_file_and_another_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "a", make_report())
    assert main(["report", str(folder), "--format", "md"]) == 0
    shown = capsys.readouterr().out
    assert main(["report", str(folder / "report.json"), "--format", "md"]) == 0
    assert capsys.readouterr().out == shown
    (folder / "card.md").touch()
    assert main(["report", str(folder / "card.md")]) == 2
    assert "card.md: a file; name the folder that `run` wrote" in capsys.readouterr().err


def test_a_format_that_the_name_of_the_file_contradicts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write(tmp_path / "a", make_report()))
    out = tmp_path / "a.csv"
    assert main(["report", folder, "--out", str(out), "--format", "md"]) == 2
    assert f"--format: md, but --out {out} is to be csv" in capsys.readouterr().err
    assert not out.exists()
    assert main(["report", folder, "--out", str(tmp_path / "table"), "--format", "md"]) == 0


@pytest.mark.parametrize("ending", ["md", "json", "csv"])
def test_a_file_is_named_by_its_ending_and_replaced_only_if_it_is_ours(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(write(tmp_path / name, make_report())) for name in ("a", "b"))
    out = tmp_path / f"both.{ending}"
    for arguments in ([a, b], [a], [a, b]):
        assert main(["report", *arguments, "--out", str(out)]) == 0
        written = out.read_text(encoding="utf-8")
        assert main(["report", *arguments, "--format", ending]) == 0
        assert capsys.readouterr().out == written
    out.write_text("notes of mine", encoding="utf-8")
    assert main(["report", a, "--out", str(out)]) == 2
    assert f"{out} is there and is no {ending} file that" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "notes of mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", out.name]


def test_the_json_of_a_run_is_its_report_and_of_several_their_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write(tmp_path / name, make_report())) for name in ("a", "b")]
    assert main(["report", folders[0], "--format", "json"]) == 0
    assert Report.from_json(capsys.readouterr().out) == make_report()
    assert main(["report", *folders, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["label"] for each in found["figures"]] == ["a", "b"]
    assert found["figures"][0]["kl"] == {"value": 0.06, "stderr": 0.001}


def test_the_command_refuses_unlike_runs_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = str(write(tmp_path / "a", make_report()))
    b = str(write(tmp_path / "b", with_recipe(make_report(), limit=7)))
    assert main(["report", a, b]) == 2
    error = capsys.readouterr().err
    assert "limit: 40 in a, 7 in b" in error
    assert "--allow-mismatch" in error
    assert main(["report", a, b, "--allow-mismatch"]) == 0
    assert "measured differently: limit: 40 in a, 7 in b" in capsys.readouterr().out


def test_a_run_alone_shows_what_changed_and_what_both_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write(tmp_path / "a", make_report()))
    assert main(["report", folder]) == 0
    shown = capsys.readouterr().out
    assert "change: perplexity: ×1.047 (1.046 to 1.047), significantly worse" in shown
    change = r"offline_piqa, acc_norm: -0\.050 \(-0\.\d+ to \+0\.\d+\), no significant change \(p = 0\.500\)"
    assert re.search(change, shown)
    assert "  after:  'there\\nwas'" in shown
    assert main(["report", folder, "--format", "md"]) == 0
    assert "> **after:** there\n> was\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("table.txt", "the name does not tell the format; add --format (md, json, html, csv)"),
        ("nix/table.md", "nix is no folder; make it first"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write(tmp_path / "a", make_report()))
    assert main(["report", folder, "--out", str(tmp_path / out)]) == 2
    assert message in capsys.readouterr().err
