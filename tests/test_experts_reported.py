"""What reports tell of experts: tokens, errors and bytes of each, on the page, the card and at the end of a run."""

from dataclasses import replace

import pytest
from families import save_tiny
from reports import layer, make_report
from workspaces import recipe

from compress.cli.main import main
from compress.methods.rtn import RTN
from compress.models.kinds import Kind
from compress.report.card.card import model_card
from compress.report.card.pictures import picture_names
from compress.report.experts import bytes_by_kind, experts_line, experts_of, experts_text
from compress.report.pages import run_page, write_pictures
from compress.report.pages.experts import expert_errors_figure, kind_rows, tokens_figure
from compress.report.pages.layers import layer_rows
from compress.report.pages.theme import PAGE
from compress.report.report import KeptTensor, Report

TOKENS = ((500, 0, 20), (300, 200, 0))
"""Of three experts in each of two blocks."""
POOLED = {500: 0.0, 300: 0.0, 200: 0.25, 20: 0.75, 0: 1.0}


def name(block: int, expert: int, leaf: str) -> str:
    return f"model.layers.{block}.mlp.experts.{expert}.{leaf}"


@pytest.fixture
def report() -> Report:
    experts = [
        replace(
            layer(name(block, expert, leaf), error + 0.1 * expert, note),
            tokens=tokens,
            pooled=POOLED[tokens],
        )
        for block, counts in enumerate(TOKENS)
        for expert, tokens in enumerate(counts)
        for leaf, error, note in (("up_proj", 0.1, "dead"), ("down_proj", 0.3, ""))
    ]
    router = KeptTensor(name="model.layers.0.mlp.gate.weight", shape=(3, 9), reason="", n_bytes=27)
    kept = (router, KeptTensor(name="model.norm.weight", shape=(9,), reason="", n_bytes=9))
    attention = layer("model.layers.0.self_attn.q_proj", 0.05)
    return replace(make_report(), layers=(attention, *experts), kept=kept)


def with_routing(report: Report, routing: str) -> Report:
    return replace(report, recipe={**report.recipe, "moe": routing})


def test_an_expert_has_its_tokens_its_most_pooled_layer_and_the_mean_error_of_its_layers(report):
    first, cold = experts_of(report)[:2]
    assert (first.block, first.number, first.tokens, first.pooled) == (0, 0, 500, 0.0)
    assert first.error == pytest.approx(0.2)
    assert (cold.tokens, cold.pooled) == (0, 1.0)
    changed = [
        replace(it, pooled=0.5) if it.name == name(0, 0, "down_proj") else it
        for it in report.layers
    ]
    assert experts_of(replace(report, layers=tuple(changed)))[0].pooled == 0.5


def test_the_line_at_the_end_of_a_run_counts_experts_with_no_token_and_with_few(report):
    assert experts_line(report) == (
        "experts: 92 % of the compressed weights; 2 of 6 saw no calibration token, 2 fewer than needed "
        "(pooled statistics mixed in)"
    )
    seen = [
        replace(it, tokens=9, pooled=0.0) if it.tokens is not None else it for it in report.layers
    ]
    line = experts_line(replace(report, layers=tuple(seen)))
    assert line == "experts: 92 % of the compressed weights; none of 6 saw no calibration token"
    assert experts_line(make_report()) == ""


def test_sentences_name_the_experts_without_tokens_and_the_weight_of_the_others(report):
    text = experts_text(report)
    assert "6 experts in 2 layers." in text
    assert "2 of them saw no calibration token: 1 of block 0, 2 of block 1." in text
    assert (
        "(2 of block 0, 1 of block 1), by a weight of 0.75 at most, and of 0.50 in the mean" in text
    )
    assert "--moe" not in text


@pytest.mark.parametrize("routing", ["pooled", "all"])
def test_sentences_say_whose_statistics_were_asked_for(report, routing):
    assert f"(--moe {routing})" in experts_text(with_routing(report, routing))
    assert "statistics of the others alone" not in experts_text(with_routing(report, routing))


def test_bytes_by_kind_are_all_bytes(report):
    found = bytes_by_kind(report)
    assert found == {
        Kind.ATTENTION: (8192, 2000),
        Kind.EXPERTS: (12 * 8192, 12 * 2000),
        Kind.ROUTERS: (27, 27),
        Kind.OTHER: (9, 9),
    }
    assert kind_rows(report)[1] == ("experts", "98.3 kB", "24.0 kB", "92.2 %")


def test_the_map_has_a_cell_for_each_expert_and_the_strip_a_mark(report):
    cells = tokens_figure(report, PAGE).chart.to_dict()["data"]["values"]
    counts = {(it["block"], it["expert"]): it["tokens"] for it in cells}
    assert counts == {(str(b), e): n for b, row in enumerate(TOKENS) for e, n in enumerate(row)}
    marks = expert_errors_figure(report, PAGE).chart.to_dict()["data"]["values"]
    assert [it["error"] for it in marks] == pytest.approx([0.2, 0.3, 0.4] * 2)


@pytest.mark.parametrize(("most", "kind"), [(19, None), (21, "log")])
def test_counts_that_span_much_have_logarithmic_colours(report, most, kind):
    counts = {0: 1, 1: most, 2: 5}
    layers = [
        replace(it, tokens=counts[int(it.name.split(".")[5])]) if it.tokens is not None else it
        for it in report.layers
    ]
    chart = tokens_figure(replace(report, layers=tuple(layers)), PAGE).chart.to_dict()
    assert chart["layer"][0]["encoding"]["color"]["scale"].get("type") == kind


def test_a_report_without_experts_has_neither_pictures_nor_sections_of_them():
    plain = make_report()
    assert tokens_figure(plain, PAGE).chart is None
    assert expert_errors_figure(plain, PAGE).chart is None
    assert "## Experts" not in model_card(plain)
    assert "<h2>Experts</h2>" not in run_page(plain)
    assert not any(picture.startswith("expert") for picture in picture_names(plain))


def test_the_card_and_the_page_tell_of_experts_in_the_same_words(report, tmp_path):
    card, page = model_card(report), run_page(report)
    assert experts_text(report) in card
    assert experts_text(report) in page.replace("&#39;", "'")
    assert "| experts | 98.3 kB | 24.0 kB |" in card
    assert "Calibration tokens of each expert" in page
    written = {path.name for path in write_pictures(report, tmp_path)}
    assert {"expert-tokens.png", "expert-errors.svg"} <= written
    assert all(f"pictures/{n}.png" in card for n in ("expert-tokens", "expert-errors"))


def test_experts_of_a_layer_are_one_row_of_the_table_of_layers_and_one_remark(report):
    rows = {row.name: row for row in layer_rows(report)}
    assert list(rows) == [
        "model.layers.0.self_attn.q_proj",
        *(
            f"model.layers.{b}.mlp.experts.*.{leaf}"
            for b in (0, 1)
            for leaf in ("up_proj", "down_proj")
        ),
    ]
    row = rows["model.layers.0.mlp.experts.*.up_proj"]
    assert (row.shape, row.bits, row.size) == ("3 of 64 × 32", "7.80", "6.0 kB")
    assert (row.error, row.seconds) == ("0.1000 to 0.3000", "0.75")
    assert rows["model.layers.0.self_attn.q_proj"].error == "0.0500"
    card = model_card(report)
    assert "- `model.layers.0.mlp.experts.*.up_proj`, 3 experts: dead" in card
    assert "experts.1.up_proj`:" not in card


@pytest.mark.usefixtures("quick_verification")
def test_a_run_ends_with_a_line_on_experts(workspace, capsys):
    save_tiny(workspace / "moe", "qwen3_moe", moe_intermediate_size=32)
    job = recipe(workspace, model=str(workspace / "moe"), method=RTN(group_size=32))
    (workspace / "recipe.yaml").write_text(job.to_yaml(), encoding="utf-8")
    assert main(["run", str(workspace / "recipe.yaml")]) == 0
    report = Report.load(workspace / "out")
    assert experts_line(report)
    assert experts_line(report) in capsys.readouterr().out.splitlines()
    routed = [it.tokens for it in report.layers if it.name.endswith("up_proj")]
    n_tokens = 8 * 32
    assert sum(routed) == 3 * 2 * n_tokens
