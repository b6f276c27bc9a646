"""A sweep on a tiny model: planned as a whole, done once, kept through failures."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
from workspaces import recipe

import compress
from compress.config.recipe import Recipe
from compress.errors import CheckpointError, LayerError, RecipeError
from compress.evaluation import original_scores
from compress.pipeline.main import no_progress
from compress.report.comparison import Figures
from compress.report.metrics import METRICS
from compress.report.numbers import Measured
from compress.report.report import Report
from compress.sweep import run as sweeping
from compress.sweep.file import points_of
from compress.sweep.results import best_at, best_lines, compare_points, refuse_unmeasured
from compress.sweep.run import State, plan_sweep, run_sweep

pytestmark = pytest.mark.usefixtures("quick_verification")


def base(workspace, **changes):
    """A tiny recipe without its method, as a sweep's file has it."""
    values = recipe(workspace, **changes).to_mapping()
    return {key: value for key, value in values.items() if key not in ("out", "method")}


def points(workspace, *methods, **changes):
    values = {"recipe": base(workspace, **changes), "points": [{"method": it} for it in methods]}
    return points_of(values, workspace / "sweep")


RTN = {"name": "rtn", "group_size": 32}
EORA = {"name": "eora", "rank": 4, "base": {"name": "gptq", "group_size": 32}}


def planned(workspace, found):
    return plan_sweep(found, workspace / "sweep", progress=no_progress)


def swept(plan):
    return list(run_sweep(plan, lambda _: nullcontext(no_progress)))


@pytest.fixture
def scored(monkeypatch):
    """How often an original is scored."""
    calls = []

    def counting(original, its_recipe, progress):
        calls.append(its_recipe)
        return score(original, its_recipe, progress)

    score = original_scores.score_original
    monkeypatch.setattr(original_scores, "score_original", counting)
    return calls


def test_the_original_is_scored_once_and_the_other_reports_say_where(workspace, scored):
    found = points(workspace, RTN, EORA, eval_windows=2)
    outcomes = swept(planned(workspace, found))
    assert [it.state for it in outcomes] == [State.DONE, State.DONE]
    assert len(scored) == 1
    first, second = (Report.load(point.recipe.folder) for point in found)
    assert first.scores.before == second.scores.before
    assert not any("not measured again" in note for note in first.notes)
    assert any(f"the run {found[0].name} measured" in note for note in second.notes)


def test_a_swept_point_is_the_run_of_its_recipe(workspace):
    [point] = points(workspace, EORA, eval_windows=2)
    swept(planned(workspace, [point]))
    alone = compress.run(replace(point.recipe, out=workspace / "alone"))
    inside = Report.load(point.recipe.folder)
    assert inside.scores.after.fidelity == alone.scores.after.fidelity
    assert inside.scores.before.fidelity == alone.scores.before.fidelity
    assert [layer.relative_error for layer in inside.layers] == [
        layer.relative_error for layer in alone.layers
    ]


@pytest.mark.slow
def test_points_evaluated_differently_each_have_an_original(workspace, scored):
    few, many = ({"method": RTN, "batch_size": size} for size in (2, 4))
    values = {"recipe": base(workspace, eval_windows=2), "points": [few, many]}
    swept(planned(workspace, points_of(values, workspace / "sweep")))
    assert len(scored) == 2


def test_what_is_done_is_not_done_again_and_a_sweep_may_grow(workspace):
    swept(planned(workspace, points(workspace, RTN)))
    again = planned(workspace, points(workspace, RTN, EORA))
    assert [it.done for it in again.points] == [True, False]
    assert [point.name for point in again.waiting] == ["eora-gptq-group_size32-rank4"]
    swept(again)
    assert swept(planned(workspace, points(workspace, RTN, EORA))) == []


@pytest.mark.slow
def test_planned_bytes_are_those_of_the_run(workspace):
    found = points(workspace, RTN, EORA)
    before = planned(workspace, found)
    swept(before)
    after = planned(workspace, found)
    assert [it.bytes_after for it in before.points] == [it.bytes_after for it in after.points]


def test_every_point_that_cannot_be_is_named_before_any_work(workspace):
    wide = {"name": "rtn", "group_size": 48}
    high = {"name": "eora", "rank": 500, "base": RTN}
    with pytest.raises(RecipeError) as caught:
        planned(workspace, points(workspace, RTN, wide, high))
    message = str(caught.value)
    assert message.startswith("2 points of 3 cannot be run, so none was:")
    assert "rtn-group_size48 (points[1]): method.group_size: 48 does not divide" in message
    assert "(points[2]): " in message
    assert not (workspace / "sweep").exists()


def test_a_folder_with_another_recipe_in_it_is_refused_and_stays(workspace):
    [point] = points(workspace, RTN)
    swept(planned(workspace, [point]))
    before = (point.recipe.folder / "report.json").read_bytes()
    with pytest.raises(RecipeError, match=r"holds the result of another recipe \(samples 8, now 4"):
        planned(workspace, points(workspace, RTN, samples=4))
    assert (point.recipe.folder / "report.json").read_bytes() == before


def test_a_folder_without_a_report_is_refused_and_stays(workspace):
    [point] = points(workspace, RTN)
    point.recipe.folder.mkdir(parents=True)
    (point.recipe.folder / "thesis.txt").touch()
    with pytest.raises(RecipeError, match=r"rtn-group_size32 is there and holds no report\.json"):
        planned(workspace, [point])
    assert (point.recipe.folder / "thesis.txt").exists()


def test_a_damaged_report_is_refused_by_name(workspace):
    [point] = points(workspace, RTN)
    swept(planned(workspace, [point]))
    (point.recipe.folder / "report.json").write_text("{")
    with pytest.raises(RecipeError, match=r"rtn-group_size32.report\.json: .*not JSON"):
        planned(workspace, [point])


def test_a_model_that_has_changed_since_is_refused(workspace):
    [point] = points(workspace, RTN)
    swept(planned(workspace, [point]))
    config = workspace / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(RecipeError, match="as it was before it changed"):
        planned(workspace, [point])


def test_damaged_scores_of_an_original_are_refused_before_work(workspace):
    (workspace / "sweep" / "originals").mkdir(parents=True)
    (workspace / "sweep" / "originals" / "x.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"x\.json: not the scores of an original"):
        planned(workspace, points(workspace, RTN))


def test_a_point_that_fails_is_written_down_and_the_others_go_on(workspace, monkeypatch):
    found = points(workspace, EORA, RTN)
    run = sweeping.pipeline.run

    def failing(its_recipe: Recipe, **options):
        if its_recipe.method_name == "eora":
            error = LayerError("its Gram is singular")
            error.add_note("while compressing model.layers.0")
            raise error
        return run(its_recipe, **options)

    monkeypatch.setattr(sweeping.pipeline, "run", failing)
    outcomes = swept(planned(workspace, found))
    assert [it.state for it in outcomes] == [State.FAILED, State.DONE]
    written = json.loads((workspace / "sweep" / "sweep.json").read_text())["points"]
    assert [it["state"] for it in written] == ["failed", "done"]
    assert written[0]["error"] == "its Gram is singular\nwhile compressing model.layers.0"
    monkeypatch.undo()
    assert [it.name for it in planned(workspace, found).waiting] == [found[0].name]


def test_ctrl_c_ends_a_sweep_and_leaves_what_is_done(workspace):
    found = points(workspace, RTN, EORA)

    def stop(point):
        def progress(stage, done, _total):
            if point is found[1] and stage == "compress" and done:
                raise KeyboardInterrupt

        return nullcontext(progress)

    with pytest.raises(KeyboardInterrupt):
        list(run_sweep(planned(workspace, found), stop))
    names = {path.name for path in (workspace / "sweep").iterdir()}
    assert names == {found[0].name, "sweep.json"}
    assert [it.done for it in planned(workspace, found).points] == [True, False]


def test_an_unfinished_checkpoint_is_named(workspace):
    [point] = points(workspace, RTN)
    left = workspace / "sweep" / f"{point.name}.unfinished-1"
    left.mkdir(parents=True)
    assert planned(workspace, [point]).unfinished == (left,)


def test_disks_are_asked_for_all_points_together(workspace, monkeypatch):
    found = points(workspace, RTN, EORA)
    sizes = [it.bytes_after for it in planned(workspace, found).points]
    asked = []
    monkeypatch.setattr(
        sweeping, "refuse_full_disk", lambda _, needed, what: asked.append((what, needed))
    )
    planned(workspace, found)
    assert asked[0] == ("out", sum(sizes) + max(sizes))


def test_the_runs_are_compared_in_their_order(workspace):
    found = points(workspace, EORA, RTN, eval_windows=2)
    swept(planned(workspace, found))
    comparison = compare_points(found, [point.recipe.folder for point in found])
    assert [it.label for it in comparison.figures] == [point.name for point in found]
    assert comparison.differences == ()


@pytest.mark.slow
def test_points_that_ask_for_different_evaluations_are_compared_and_told(workspace):
    entries = [{"method": RTN, "eval_windows": n} for n in (2, 3)]
    found = points_of({"recipe": base(workspace), "points": entries}, workspace / "sweep")
    swept(planned(workspace, found))
    comparison = compare_points(found, [point.recipe.folder for point in found])
    assert "eval_windows" in {it.field for it in comparison.differences}


# The best at each size. ----------------------------------------------------------------------


def figures(label, n_bytes, **measured):
    values = {name: Measured(value) for name, value in measured.items()}
    return Figures(label=label, method="rtn", values={"n_bytes": Measured(n_bytes), **values})


def test_the_best_at_a_size_is_the_best_that_is_not_larger() -> None:
    found = [
        figures("large", 120_000_000, kl=0.1, accuracy=0.4),
        figures("middle", 100_000_000, kl=0.2, accuracy=0.5),
        figures("bad", 90_000_000, kl=0.9, accuracy=0.1),
        figures("unmeasured", 80_000_000),
    ]
    budgets = ["120MB", "119MB", "100MB", "95MB", "85MB"]
    by_kl = [it.figures and it.figures.label for it in best_at(budgets, found, METRICS["kl"])]
    assert by_kl == ["large", "middle", "middle", "bad", None]
    by_accuracy = best_at(["120MB"], found, METRICS["accuracy"])
    assert by_accuracy[0].figures.label == "middle"
    lines = best_lines(best_at(["1MB", "120MB"], found, METRICS["kl"]), found, METRICS["kl"])
    assert lines == [
        "1MB: none that was evaluated fits; the smallest of all is unmeasured, 80.0 MB",
        "120MB: large, 120.0 MB, KL 0.1000 (best of 3 points)",
    ]


def test_the_best_by_what_no_point_measures_is_refused(workspace):
    found = points(workspace, RTN)
    with pytest.raises(RecipeError, match="rtn-group_size32 has eval_windows none"):
        refuse_unmeasured(found, METRICS["kl"])
    with pytest.raises(RecipeError, match="has tasks none"):
        refuse_unmeasured(found, METRICS["accuracy"])
