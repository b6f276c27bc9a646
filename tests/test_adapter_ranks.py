"""One rank for all layers of an adapter, and what an adapter calls the checkpoint that it belongs to."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from test_on_base import base, dense_base, logits, on_base
from workspaces import recipe

import compress
from compress.errors import RecipeError
from compress.exports.gptq import GptqExporter
from compress.exports.load import load_export
from compress.exports.peft import read_adapter
from compress.families.correction_options import VLLM_RANKS, padded_rank
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.pipeline.repositories import references

pytestmark = pytest.mark.usefixtures("quick_verification")
SPREAD = EoRA(adapter_budget="9kB", base=GPTQ(bits=4, group_size=32))
"""Some layers get a correction, of several ranks, and some none."""


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_padded_ranks_are_those_that_vllm_takes_or_the_highest_above_them():
    assert [padded_rank(rank) for rank in (1, 8, 9, 300, 512, 600)] == [8, 8, 16, 320, 512, 600]


@pytest.mark.slow
def test_a_padded_adapter_has_one_rank_for_every_layer_and_the_same_function(workspace):
    job = recipe(
        workspace,
        method=SPREAD,
        export=("gptq", "native"),
        adapter_ranks="padded",
        publish_as="me/demo",
    )
    plan = compress.plan(job).plan
    report = compress.run(job)
    for export in report.exports:
        assert export.tensor_bytes == plan.export_bytes(export.format)
        assert export.relative_difference < 1e-4
    folder = workspace / "out" / "gptq" / "adapter"
    config, factors = config_in(folder), read_adapter(folder)
    assert config["r"] == config["lora_alpha"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert all("." not in target for target in config["target_modules"])
    assert set(factors) == {layer.name for layer in report.layers}
    assert {form.rank for form in factors.values()} == {8}
    bare = {layer.name for layer in report.layers if layer.rank is None}
    assert bare == {name for name, form in factors.items() if not bool(form.dense().any())}
    assert bare
    dense = GptqExporter.load(workspace / "out" / "gptq", torch.float32, torch.device("cpu"))
    torch.testing.assert_close(
        logits(dense), logits(load_export(workspace / "out" / "native")), rtol=0, atol=1e-4
    )
    assert config["base_model_name_or_path"] == "me/demo-GPTQ-Int4"


@pytest.mark.slow
def test_zeros_are_all_that_padding_adds_to_an_adapter_of_a_base(workspace, tmp_path):
    base(workspace)
    found = []
    for ranks in ("own", "padded"):
        method = EoRA(adapter_budget="9000")
        job = on_base(workspace, method=method, adapter_ranks=ranks, out=tmp_path / ranks)
        plan = compress.plan(job).plan
        (export,) = compress.run(job).exports
        assert export.tensor_bytes == plan.export_bytes("adapter")
        found.append(read_adapter(tmp_path / ranks / "adapter"))
    own, padded = found
    assert set(own) < set(padded)
    for name, form in padded.items():
        expected = own[name].dense() if name in own else torch.zeros(form.shape)
        assert torch.equal(form.dense(), expected)
        assert form.rank in VLLM_RANKS
    reference = load_export(tmp_path / "own" / "adapter")
    adapted = PeftModel.from_pretrained(dense_base(workspace), tmp_path / "padded" / "adapter")
    torch.testing.assert_close(logits(adapted), logits(reference), rtol=0, atol=1e-4)


def test_an_adapter_names_the_repository_that_was_given_or_a_path_that_is_no_id(workspace):
    both = recipe(workspace, export=("gptq", "native"))
    plan = compress.plan(both).plan
    assert references(both, plan) == {"gptq": "./out/gptq", "native": "./out/native"}
    published = {"gptq": "me/demo-GPTQ-Int4", "native": "me/demo-native-4bit"}
    assert references(replace(both, publish_as="me/demo"), plan) == published
    one = replace(both, export=("gptq",))
    assert references(one, plan) == {"gptq": "./out"}
    assert references(replace(one, publish_as="me/demo"), plan) == {"gptq": "me/demo"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"adapter_ranks": "padded", "export": ("native",)}, "adapter_ranks: padded, but native"),
        (
            {"adapter_ranks": "padded", "export": ("gptq",), "method": RTN(group_size=32)},
            "adapter_ranks: padded, but rtn makes no corrections",
        ),
        ({"publish_as": "demo"}, "publish_as: 'demo' is no id .*; write owner/name"),
        ({"publish_as": "me/a--b"}, "publish_as: 'me/a--b' is no id that the hub takes"),
        ({"base_model": "./model"}, "base_model: './model' is no id"),
        ({"license": "a: b"}, "license: 'a: b'; write the hub's id"),
    ],
)
def test_names_and_ranks_that_cannot_be_are_refused_before_work(workspace, changes, told):
    with pytest.raises(RecipeError, match=re.escape(told).replace(r"\.\*", ".*")):
        compress.plan(recipe(workspace, **changes))


def test_the_plan_says_in_one_line_what_cards_will_lack(workspace):
    def lacking(**changes):
        lines = compress.plan(recipe(workspace, export=("native",), **changes)).lines()
        return [line for line in lines if "for publishing" in line]

    (line,) = lacking()
    assert "--base-model" in line and "--license" in line
    (line,) = lacking(base_model="org/tiny")
    assert "--base-model" not in line and "--license" in line
    assert not lacking(base_model="org/tiny", license="apache-2.0")
