"""The report: strict to read, complete to write; the summary and the card that are made of it."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import RECIPE, layer, make_report

from compress.config.recipe import Recipe
from compress.errors import CheckpointError
from compress.report.card.beside import adapter_card
from compress.report.card.card import model_card
from compress.report.card.names import base_model
from compress.report.numbers import counted, megabytes, with_error
from compress.report.recorded_recipe import method_text
from compress.report.report import BaseReport, Comparison, Report
from compress.report.summary import comparison_rows, lines, rows, table
from eval.scores import Scores


@pytest.fixture
def report() -> Report:
    return make_report()


def changed(report: Report, path: str, value: object) -> str:
    """The report's JSON with `value` at a dotted path; ... removes the key."""
    data: dict[str, Any] = json.loads(report.to_json())
    *parents, last = path.split(".")
    inner: Any = data
    for part in parents:
        inner = inner[int(part) if part.isdigit() else part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(data)


def test_reading_undoes_writing(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report
    unscored = replace(report, scores=None)
    assert Report.from_json(unscored.to_json()) == unscored


def test_a_report_of_an_earlier_version_is_of_a_language_model(report: Report) -> None:
    written = json.loads(report.to_json())
    del written["head"]
    assert Report.from_json(json.dumps(written)) == report


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "report.schema: 2; this version reads 1"),
        ("schema", ..., "report.schema: None; this version reads 1"),
        ("totals.n_layers", ..., "report.totals: missing n_layers"),
        ("totals.extra", 1, "report.totals: unknown extra"),
        ("layers.2.bytes_after", "many", "report.layers[2].bytes_after: 'many' does not fit"),
        ("layers.2.shape", [1, 2, 3], "report.layers[2].shape: [1, 2, 3] does not fit"),
        ("layers.2.shape", [1], "report.layers[2].shape: [1] has too few values"),
        ("exports.0.adapter", ..., "report.exports[0]: missing adapter"),
        ("scores.after.fidelity.kl", None, "report.scores.after.fidelity.kl: None does not fit"),
        ("scores.after.tasks.0.n_items", 1.5, "report.scores.after.tasks[0].n_items: 1.5"),
        ("environment", [], "report.environment: [] does not fit: Input should be an object"),
        ("notes", "one", "report.notes: 'one' does not fit"),
        ("recipe.tasks", ..., "report.recipe: missing tasks"),
        ("recipe.tasks", [1], "report.recipe.tasks: 1 is no name of a task"),
        ("recipe.eval_windows", "all", "report.recipe.eval_windows: 'all' is not a number"),
        ("recipe.method.name", ..., "report.recipe.method: missing name"),
        (
            "recipe.method.base",
            "gptq",
            "report.recipe.method.base: 'gptq' is no method with a name",
        ),
    ],
)
def test_another_schema_is_refused_with_the_correction(
    report: Report, path: str, value: object, message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        Report.from_json(changed(report, path, value))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "NaN"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^report"):
        Report.from_json(text)


def test_numbers_that_json_does_not_know_are_in_no_report(report: Report) -> None:
    with pytest.raises(ValueError, match="finite number"):
        replace(report, timings={"calibrate": float("nan")})
    text = report.to_json().replace('"calibrate": 1.5', '"calibrate": NaN')
    with pytest.raises(CheckpointError, match=r"^report\.timings\.calibrate: nan does not fit"):
        Report.from_json(text)


def test_the_recipe_in_a_report_makes_the_same_job(report: Report) -> None:
    read = Report.from_json(report.to_json())
    same = RECIPE.to_mapping()
    assert Recipe.from_mapping(read.recipe).to_mapping() == same


def test_the_summary_puts_every_score_beside_the_original(report: Report) -> None:
    found = {row.label: (row.before, row.after) for row in rows(report)}
    assert found == {
        "whole checkpoint": ("538.0 MB", "101.3 MB"),
        "bits per weight, whole checkpoint": ("4.25", "4.25"),
        "perplexity": ("27.80 ± 0.50", "29.10 ± 0.50"),
        "KL divergence, nats/token": ("-", "0.0600 ± 0.0010"),
        "top-1 agreement": ("-", "94.0 %"),
        "offline_piqa, acc_norm (40 items)": ("0.700 ± 0.050", "0.650 ± 0.050"),
        "prefill, tokens/s": ("512", "512"),
        "decode, tokens/s": ("31.3", "31.3"),
    }


def test_a_summary_without_an_evaluation_is_its_size(report: Report) -> None:
    assert [row.label for row in rows(replace(report, scores=None))] == ["whole checkpoint"]


def test_what_was_not_measured_has_no_row_and_what_one_model_lacks_is_a_dash() -> None:
    empty = Scores(fidelity=None, tasks=(), footprint=None)
    assert comparison_rows(Comparison(before=empty, after=empty)) == []
    scored = make_report().scores
    assert scored is not None
    found = comparison_rows(replace(scored, after=empty))
    assert ("perplexity", "27.80 ± 0.50", "-") in {(it.label, it.before, it.after) for it in found}


def test_lines_are_aligned_and_the_table_has_every_row(report: Report) -> None:
    text = lines(rows(report))
    assert len({len(line) for line in text}) == 1
    assert table(rows(report), "title").row_count == len(rows(report)) == len(text) - 1


def test_figures_are_written_for_people() -> None:
    assert megabytes(2_500_000_000) == "2.50 GB"
    assert megabytes(1_000_000) == "1.0 MB"
    assert megabytes(45_600) == "45.6 kB"
    assert (counted(1, "layer"), counted(2, "layer")) == ("1 layer", "2 layers")
    assert with_error(1.0, None, 2) == "1.00"
    assert with_error(None, None, 2) == "-"
    assert with_error(2.5e8, 1.25e3, 2) == "2.50e+08 ± 1250.00"


def test_the_card_has_front_matter_that_the_hub_reads(report: Report) -> None:
    matter = yaml.safe_load(model_card(report).split("---")[1])
    assert matter["base_model"] == "org/tiny"
    assert matter["license"] == "apache-2.0"
    assert matter["library_name"] == "transformers"
    assert {"eora", "gptq"} <= set(matter["tags"])


def test_the_code_in_the_card_is_python_and_names_every_export(report: Report) -> None:
    blocks = re.findall(r"```python\n(.*?)```", model_card(report), flags=re.DOTALL)
    for block in blocks:
        ast.parse(block)
    named = set(re.findall(r'"THIS_FOLDER/([\w/]+)"', "".join(blocks)))
    assert named == {"native", "gptq", "dense"}
    assert '(model, "THIS_FOLDER/gptq", subfolder="adapter")' in "".join(blocks)


def test_the_card_says_how_vllm_serves_what_it_can(report: Report) -> None:
    first, *others = report.layers
    report = replace(report, layers=(replace(first, rank=48), *others))
    served = re.findall(r"`vllm serve ([^`]+)`", model_card(report))
    assert served == [
        "THIS_FOLDER/gptq --enable-lora --max-lora-rank 64 --lora-modules corrected=THIS_FOLDER/gptq/adapter",
        "THIS_FOLDER/dense",
    ]
    report = replace(report, layers=(replace(first, rank=600), *others))
    assert "vLLM serves no adapter of rank 600: the highest rank it takes is 512." in model_card(
        report
    )


def test_the_card_gives_no_command_for_a_server_that_refuses_the_grid(report: Report) -> None:
    native, gptq, _ = report.exports
    ranked = replace(report, layers=tuple(replace(it, rank=8) for it in report.layers))
    refused = replace(gptq, refusals=("no server reads GPTQ of 3 bits",))
    tensors = replace(refused, format="compressed-tensors")
    for export in (refused, replace(gptq, refusals=None), tensors):
        for card in (model_card(ranked, export), adapter_card(ranked, export)):
            assert "vllm serve" not in card
            assert ("no server reads GPTQ of 3 bits" in card) == bool(export.refusals)
    assert "vllm serve" in model_card(ranked, gptq)
    assert "vllm serve" not in model_card(ranked, native)


def test_a_card_of_a_repository_names_it_where_the_hub_is_asked_and_its_files_elsewhere(
    report: Report,
) -> None:
    published = replace(report.exports[1], repository="me/tiny-GPTQ-Int4")
    ranked = replace(report, layers=tuple(replace(it, rank=8) for it in report.layers))
    card = model_card(ranked, published)
    assert "THIS_FOLDER" not in card
    assert 'AutoTokenizer.from_pretrained("me/tiny-GPTQ-Int4")' in card
    assert 'PeftModel.from_pretrained(model, "me/tiny-GPTQ-Int4", subfolder="adapter")' in card
    assert "`hf download me/tiny-GPTQ-Int4 --local-dir tiny-GPTQ-Int4`" in card
    assert "--lora-modules corrected=tiny-GPTQ-Int4/adapter`" in card
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["quantized_by"] == "me"
    assert {"gptq", "4-bit"} <= set(matter["tags"])


def test_an_adapter_beside_its_checkpoint_has_a_card_that_names_it_as_its_base(
    report: Report,
) -> None:
    published = replace(report.exports[1], repository="me/tiny-GPTQ-Int4")
    card = adapter_card(report, published)
    matter = yaml.safe_load(card.split("---")[1])
    assert (matter["base_model"], matter["base_model_relation"]) == ("me/tiny-GPTQ-Int4", "adapter")
    assert matter["library_name"] == "peft"
    assert '"me/tiny-GPTQ-Int4", subfolder="adapter")' in card
    local = adapter_card(report, report.exports[1])
    assert "base_model" not in yaml.safe_load(local.split("---")[1])
    assert '"CHECKPOINT_FOLDER", subfolder="adapter")' in local


@pytest.mark.parametrize(
    ("changes", "differ"),
    [({}, False), ({"rank": 16}, True), ({"rank": None}, True)],
)
def test_an_adapter_of_several_ranks_is_promised_to_no_server_that_ignores_patterns(
    report: Report, changes: dict[str, int | None], *, differ: bool
) -> None:
    base = BaseReport(
        checkpoint="o/n", revision="abc", format="gptq, 4 bits", kind="gptq", producer=None,
        fingerprint="f" * 64, tensor_bytes=1, n_packed=1,
    )  # fmt: skip
    export = replace(report.exports[0], format="adapter", folder="adapter", adapter="adapter")
    first, *others = (replace(it, rank=8) for it in report.layers)
    made = replace(
        report, base=base, exports=(export,), layers=(replace(first, **changes), *others)
    )
    assert ("`--adapter-ranks padded`" in model_card(made)) == differ
    padded = replace(made, recipe=made.recipe | {"adapter_ranks": "padded"})
    assert "compute the same" in model_card(padded)
    refused = replace(made, base=replace(base, unserved=("vLLM takes no GPTQ with 3 bits",)))
    assert "vllm serve" not in model_card(refused)
    assert "- vLLM takes no GPTQ with 3 bits" in model_card(refused)


@pytest.mark.parametrize(
    ("base", "served"),
    [
        ({"format": "gptq, 4 bits, groups of 128", "kind": "gptq"}, ["'my base' "]),
        (
            {"format": "gptq, 4 bits", "kind": "gptq", "checkpoint": "o/n@v1", "revision": "abc"},
            ["o/n --revision abc "],
        ),
        ({"format": "native, 4-bit g64", "kind": "native"}, []),
    ],
)
def test_an_adapter_is_served_on_the_base_that_it_was_made_for(
    report: Report, base: dict[str, str], served: list[str]
) -> None:
    known = {"checkpoint": "/a/my base", "producer": None, "fingerprint": "f" * 64}
    stands_on = BaseReport(**known | {"tensor_bytes": 100, "n_packed": 1} | base)  # type: ignore[arg-type]
    export = replace(report.exports[0], format="adapter", folder="adapter", adapter="adapter")
    corrected = replace(report, base=stands_on, exports=(export,))
    ranked = replace(corrected, layers=tuple(replace(it, rank=8) for it in report.layers))
    lora = "--enable-lora --max-lora-rank 8 --lora-modules corrected=THIS_FOLDER/adapter"
    found = re.findall(r"`vllm serve ([^`]+)`", model_card(ranked))
    assert found == [f"{name}{lora}" for name in served]
    unknown = replace(corrected, layers=tuple(replace(it, rank=None) for it in report.layers))
    assert "vllm serve" not in model_card(unknown)


def test_the_card_of_an_export_is_about_that_export_alone(report: Report) -> None:
    sizes = enumerate(report.exports, 2)
    sized = replace(report, exports=tuple(replace(e, tensor_bytes=n * 10**6) for n, e in sizes))
    for export in sized.exports:
        card = model_card(sized, export)
        named = set(re.findall(r"THIS_FOLDER[\w/]*", card))
        assert named == {"THIS_FOLDER"}
        assert ('(model, "THIS_FOLDER", subfolder="adapter")' in card) == (export.format == "gptq")
        size = megabytes(export.tensor_bytes)
        assert f"The whole checkpoint takes {size}; the original takes 538.0 MB." in card
        assert f"| whole checkpoint | 538.0 MB | {size} |" in card
        assert ("| prefill, tokens/s |" in card) == (export.format == "native")
    root = model_card(sized)
    assert all(
        f"| {e.format} | `{e.format}` | {megabytes(e.tensor_bytes)} |" in root
        for e in sized.exports
    )


def test_the_only_export_is_described_in_the_output_folder(report: Report) -> None:
    only = replace(report.exports[1], folder=".", adapter="adapter")
    single = replace(report, exports=(only,))
    assert model_card(single) == model_card(single, only)
    assert '(model, "THIS_FOLDER", subfolder="adapter")' in model_card(single)


def test_the_card_of_a_dense_export_does_not_call_it_packed(report: Report) -> None:
    native, _, dense = report.exports
    assert "stored as 4-bit g32 + rank 8 (10 layers), which takes 7.80" in model_card(
        report, native
    )
    card = model_card(report, dense)
    assert "dequantised to full precision" in card
    assert "stored as" not in card
    one = replace(report, layers=report.layers[:1], totals=replace(report.totals, n_layers=1))
    assert "1 linear layer of `org/tiny` is stored as 4-bit g32 + rank 8 (1 layer)" in model_card(
        one
    )


def test_a_report_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match=r"report\.json: not UTF-8"):
        Report.load(tmp_path)


def test_the_card_shows_the_five_worst_layers_and_what_was_left(report: Report) -> None:
    card = model_card(report)
    assert re.findall(r"^\| (blocks\.\d) ", card, flags=re.MULTILINE) == [
        f"blocks.{n}" for n in (8, 7, 6, 5, 4)
    ]
    assert "| outside | 2 | 4.0 MB |" in card
    assert "- `odd`: kept" in card
    assert "- statistics of an equal run were used again" in card


def test_the_recipe_in_the_card_makes_the_same_model(report: Report) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", model_card(report), flags=re.DOTALL)
    found = Recipe.from_mapping(yaml.safe_load(blocks[-1]))
    assert found.to_mapping() == RECIPE.to_mapping()


def test_a_card_without_scores_or_errors_says_so(report: Report) -> None:
    bare = replace(report, scores=None, layers=(layer("odd", None),), kept=(), notes=())
    card = model_card(bare)
    assert "was not evaluated" in card
    assert "No layer's error was measured." in card


def test_only_what_others_can_follow_is_a_base_model(report: Report) -> None:
    def base(spec: str, revision: str | None) -> str | None:
        return base_model(replace(report, recipe={"model": spec}, revision=revision))

    assert base("demo", None) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base("org/model-1.5B", "0123") == "org/model-1.5B"
    for local in ("./here", "models/tiny", "/there/model", "model.gguf", "a/b/c"):
        assert base(local, None) is None


def test_a_method_is_written_with_its_base() -> None:
    assert method_text({"name": "eora", "base": {"name": "rtn", "bits": 4}}) == "eora on rtn"
    assert method_text({"name": "rtn"}) == "rtn"
