"""The card's front matter, read with the hub's own library; its figures are those of the report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from reports import make_report

from compress.report.card.card import model_card
from compress.report.formats import report_markdown
from compress.report.pages import run_page
from compress.report.report import Comparison, Report
from eval.paired import task_change
from eval.scores import primary


def loaded(report: Report, folder: Path, export: int | None = None) -> ModelCard:
    path = folder / "README.md"
    chosen = None if export is None else report.exports[export]
    path.write_text(model_card(report, chosen), encoding="utf-8")
    return ModelCard.load(path)


def matter(report: Report) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(model_card(report).split("---\n")[1])
    return found


def test_the_hubs_library_reads_the_results_and_writes_the_same(tmp_path: Path) -> None:
    card = loaded(make_report(), tmp_path)
    index = matter(make_report())["model-index"]
    name, results = model_index_to_eval_results(index)
    assert card.data.eval_results == results
    assert eval_results_to_model_index(name, results) == index
    assert name == "tiny, compressed with eora on gptq"
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == (
        "org/tiny",
        "quantized",
    )


def test_every_result_is_a_number_of_report_json(tmp_path: Path) -> None:
    scores = json.loads(make_report().to_json())["scores"]["after"]
    found = {each.metric_name: each for each in loaded(make_report(), tmp_path).data.eval_results}
    assert found["perplexity"].metric_value == scores["fidelity"]["perplexity"]
    for task in scores["tasks"]:
        result = found[f"{task['task']}, {task['metric']}"]
        assert result.metric_value == task["value"]
        assert (result.metric_type, result.dataset_type) == ("accuracy", "ybisk/piqa")
        assert result.dataset_args == {"items": task["n_items"], "num_few_shot": 0}
    assert len(found) == 1 + len(scores["tasks"])


def test_the_changes_in_the_card_are_those_of_the_report() -> None:
    report = make_report()
    assert report.scores is not None
    before, after = (
        primary(each.tasks)["offline_piqa"] for each in (report.scores.before, report.scores.after)
    )
    found = task_change(before, after)
    assert found.interval is not None
    low, high = found.interval.low, found.interval.high
    card = model_card(report)
    row = f"| offline_piqa, acc_norm | {found.change:+.3f} | {low:+.3f} to {high:+.3f} | no significant change (p = "
    assert row in card
    assert "| perplexity | ×1.047 |" in card


def test_verdicts_on_several_tasks_are_corrected_in_card_page_and_table() -> None:
    report = make_report()
    assert report.scores is not None
    said = "p-values are Holm-corrected over 2 tasks."
    assert said not in model_card(report) + run_page(report) + report_markdown(report, "x")
    before, after = (
        replace(each, tasks=(*each.tasks, replace(each.tasks[-1], task="offline_arc_easy")))
        for each in (report.scores.before, report.scores.after)
    )
    report = replace(report, scores=Comparison(before=before, after=after))
    for text in (model_card(report), report_markdown(report, "x")):
        assert said in text
        assert text.count("no significant change (p = 0.500, Holm-corrected = 1.000)") == 2
    page = run_page(report)
    assert said in page and page.count('data-of="p, Holm-corrected">1.000</td>') == 2


def test_a_card_of_a_report_without_parts_tells_no_change() -> None:
    report = make_report()
    assert report.scores is not None and report.scores.after.fidelity is not None
    bare = replace(
        report.scores.after,
        tasks=tuple(replace(task, per_item=()) for task in report.scores.after.tasks),
        fidelity=replace(report.scores.after.fidelity, windows=()),
    )
    card = model_card(replace(report, scores=replace(report.scores, after=bare)))
    assert "significant" not in card
    assert "What changed" not in card


def test_only_the_export_that_was_evaluated_has_results(tmp_path: Path) -> None:
    assert loaded(make_report(), tmp_path, 0).data.eval_results
    assert loaded(make_report(), tmp_path, 1).data.eval_results is None
    unscored = replace(make_report(), scores=None)
    assert "model-index" not in matter(unscored)


@pytest.mark.parametrize(
    ("licence", "link", "expected"),
    [
        ("apache-2.0", None, {"license": "apache-2.0"}),
        ("mit, bsd", None, {"license": ["mit", "bsd"]}),
        (None, None, {"license": "unknown"}),
        ("other", None, {"license": "other"}),
        (
            "house",
            "LICENSE.txt",
            {
                "license": "other",
                "license_name": "house",
                "license_link": "https://huggingface.co/org/tiny/blob/main/LICENSE.txt",
            },
        ),
        (
            "house",
            "https://example.org/l",
            {
                "license": "other",
                "license_name": "house",
                "license_link": "https://example.org/l",
            },
        ),
    ],
)
def test_the_licence_is_one_that_the_hub_knows_or_other_with_a_name(
    licence: str | None, link: str | None, expected: dict[str, Any]
) -> None:
    found = matter(replace(make_report(), licence=licence, licence_link=link))
    assert {name: value for name, value in found.items() if "license" in name} == expected


def test_a_text_of_this_machine_is_called_by_its_name_alone() -> None:
    recipe = make_report().recipe | {"eval_text": "/somewhere/private/text.txt"}
    (perplexity, *_) = matter(replace(make_report(), recipe=recipe))["model-index"][0]["results"]
    assert perplexity["dataset"]["name"] == "text.txt"


def test_a_metric_that_the_hub_has_no_name_for_is_in_the_text_alone() -> None:
    report = make_report()
    assert report.scores is not None
    odd = tuple(replace(task, metric="bits_per_byte") for task in report.scores.after.tasks)
    after = replace(report.scores.after, tasks=odd)
    found = matter(replace(report, scores=replace(report.scores, after=after)))
    assert len(found["model-index"][0]["results"]) == 1


def test_the_card_shows_what_both_wrote_without_a_folder_for_it() -> None:
    card = model_card(make_report())
    assert "Prompt (in the chat template): Once" in card
    assert "> **before:** upon a" in card
    assert "> **after:** there\n> was" in card


@pytest.mark.hub
def test_the_hub_accepts_the_card(tmp_path: Path) -> None:
    card = loaded(make_report(), tmp_path)
    try:
        card.validate()
    except OfflineModeIsEnabled as error:  # what the hub refuses is a ValueError
        pytest.skip(f"the hub cannot be asked: {error}")
