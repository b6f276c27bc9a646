"""Runs on mixtures: every format holds what was compressed and, to the bit, what was not."""

import shutil

import pytest
import torch
from families import save_tiny
from safetensors import safe_open
from test_experts import cold
from transformers import AutoModelForCausalLM
from workspaces import recipe

import compress
from calibration.experts.module import take_all_apart
from compress.errors import RecipeError
from compress.exports import EXPORTS
from compress.exports.load import load_export
from compress.exports.verification.verify import verify
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.models.checkpoint import Reader
from compress.pipeline.main import no_progress
from compress.prepare.prepare import prepare

pytestmark = pytest.mark.usefixtures("quick_verification")
METHOD = RTN(group_size=16)
SLOW = pytest.mark.slow


def mixture(workspace, family, dtype=torch.float32, **changes):
    shutil.rmtree(workspace / "model")
    options = {} if family == "nemotron_h" else {"num_key_value_heads": 4}
    model = save_tiny(workspace / "model", family, **options, **changes)
    (workspace / "model" / "model.safetensors").unlink()
    model.to(dtype).save_pretrained(workspace / "model", max_shard_size="40KB")
    return workspace


def headers(folder):
    """Dtype and shape of every tensor on disk."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                one = file.get_slice(name)
                found[name] = one.get_dtype(), tuple(one.get_shape())
    return found


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SLOW)], ids=str
)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", pytest.param("granitemoe", marks=SLOW)])
def test_a_dense_export_has_the_sources_names_shapes_and_dtypes(workspace, family, dtype):
    mixture(workspace, family, dtype)
    compress.run(recipe(workspace, method=METHOD, export=("dense",)))
    assert headers(workspace / "out") == headers(workspace / "model")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
@pytest.mark.parametrize("exclude", ["*experts.2.up_proj", "*layers.1.*experts*", "*experts*"])
def test_formats_hold_the_planned_bytes_whichever_experts_stay(workspace, family, exclude):
    mixture(workspace, family)
    job = recipe(workspace, method=METHOD, export=("native", "dense"), exclude=(exclude,))
    planned = compress.plan(job).plan
    written = {one.format: one.tensor_bytes for one in compress.run(job).exports}
    assert written == {name: EXPORTS[name].planned_bytes(planned) for name in ("native", "dense")}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_expert_that_is_excluded_stays_to_the_bit_in_every_format(workspace, family):
    mixture(workspace, family)
    kept = "model.layers.1.mlp.experts.2.up_proj"
    job = recipe(
        workspace, method=METHOD, export=("native", "dense"), exclude=("*experts.2.up_proj",)
    )
    report = compress.run(job)
    assert kept not in {layer.name for layer in report.layers}
    source = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    take_all_apart(source)
    native = load_export(workspace / "out" / "native")
    dense = AutoModelForCausalLM.from_pretrained(workspace / "out" / "dense")
    take_all_apart(dense)
    own = source.get_submodule(kept)
    for found in (native.get_submodule(kept).form.dense(), dense.get_submodule(kept).weight):
        assert torch.equal(found, own.weight)
    other = kept.replace("up_proj", "gate_proj")
    assert not torch.equal(dense.get_submodule(other).weight, source.get_submodule(other).weight)
    if own.bias is not None:
        assert torch.equal(native.get_submodule(kept).bias, own.bias)
        assert torch.equal(dense.get_submodule(kept).bias, own.bias)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_a_layer_that_are_all_excluded_stay_as_the_source_stores_them(workspace, family):
    mixture(workspace, family)
    compress.run(recipe(workspace, method=METHOD, exclude=("*layers.1.*experts*",)))
    source, written = Reader(workspace / "model"), Reader(workspace / "out")
    kept = [name for name in source if "layers.1." in name and ".experts." in name]
    assert kept
    assert all(torch.equal(written[name], source[name]) for name in kept)


def test_a_mixture_in_16_bit_whose_experts_stay_is_verified(workspace):
    mixture(workspace, "gpt_oss", torch.bfloat16)
    report = compress.run(recipe(workspace, method=METHOD, exclude=("*experts*",)))
    assert report.exports[0].relative_difference == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_fresh_process_gives_the_logits_of_the_compressed_mixture(workspace, family):
    mixture(workspace, family)
    compress.run(recipe(workspace, method=METHOD))
    assert verify(workspace / "out").relative_difference < 1e-6


def test_an_expert_without_tokens_is_listed_and_finite(workspace):
    shutil.rmtree(workspace / "model")
    save_tiny(workspace / "model", "mixtral", num_local_experts=5)
    cold().save_pretrained(workspace / "model")
    report = compress.run(recipe(workspace, method=GPTQ(group_size=16)))
    lone = [layer for layer in report.layers if ".experts.4." in layer.name]
    assert len(lone) == 9
    assert all((layer.tokens, layer.pooled) == (0, 1.0) for layer in lone)
    assert all(0 < layer.relative_error < 1 for layer in lone)
    assert all(layer.tokens for layer in report.layers if ".experts.0." in layer.name)


def test_statistics_of_another_way_to_collect_them_are_not_used_again(workspace):
    mixture(workspace, "mixtral")

    def key(moe):
        return prepare(recipe(workspace, method=METHOD, moe=moe), no_progress).store().key

    assert len({key("routed"), key("pooled"), key("all")}) == 3


def test_how_experts_were_calibrated_is_in_the_report_of_a_run_on_saved_statistics(workspace):
    mixture(workspace, "mixtral")
    told = []
    for name in ("first", "second"):
        report = compress.run(
            recipe(workspace, method=METHOD, out=workspace / name, propagate="none")
        )
        told.append([(layer.name, layer.tokens, layer.pooled) for layer in report.layers])
    assert told[0] == told[1]
    assert any(tokens for _, tokens, _ in told[0])


def test_all_tokens_are_refused_where_experts_read_what_the_router_multiplies_by_zero(workspace):
    mixture(workspace, "llama4_text")
    with pytest.raises(RecipeError, match=r"moe: all: .*experts reads tokens multiplied"):
        compress.plan(recipe(workspace, method=METHOD, moe="all"))


def test_corrections_on_a_gptq_base_lower_the_error_of_every_expert(workspace):
    mixture(workspace, "mixtral")
    rough = GPTQ(bits=3, group_size=32)
    compress.run(recipe(workspace, method=rough, export=("native",), out=workspace / "base"))
    job = recipe(
        workspace,
        method=EoRA(rank=4),
        base_checkpoint=str(workspace / "base"),
        out=workspace / "adapter",
        export=("adapter",),
    )
    report = compress.run(job)
    assert report.exports[0].relative_difference < 1e-6
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 36
    assert all(layer.relative_error < layer.base_error for layer in experts)
