"""What config.json says and this machine, or the weights, say otherwise."""

import json

import pytest
import torch
from families import tiny_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, MptConfig
from workspaces import recipe

import compress
from calibration.heads import Head
from calibration.outputs import head_of
from compress.errors import CheckpointError
from compress.exports.load import load_export
from compress.inspection.checkpoint import inspect
from compress.methods.rtn import RTN
from compress.models.model_config import attention_wish, is_leftover, read_config
from compress.models.resolve import resolve_model

pytestmark = pytest.mark.usefixtures("quick_verification")
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FLASH = {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"}


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "wish", ["flash_attention_2", "flash_attention_3", "flex_attention", "owner/kernel"]
)
def test_an_attention_that_is_not_everywhere_is_left_to_transformers(workspace, wish):
    edit(workspace / "model", attn_implementation=wish)
    assert read_config(workspace / "model")._attn_implementation is None


@pytest.mark.parametrize("wish", ["eager", "sdpa"])
def test_an_attention_that_is_everywhere_stays(workspace, wish):
    edit(workspace / "model", attn_implementation=wish)
    assert read_config(workspace / "model")._attn_implementation == wish
    assert attention_wish({"attn_implementation": wish}) is None


def test_the_wish_of_a_tower_is_found_and_left_to_transformers(tmp_path):
    text = {"num_hidden_layers": 1, "hidden_size": 16, "_attn_implementation": "flash_attention_2"}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert attention_wish(config) == "flash_attention_2"
    found = read_config(tmp_path)
    assert {found._attn_implementation, found.text_config._attn_implementation} == {None}


def test_a_run_computes_without_flash_attention_and_keeps_the_wish(workspace):
    edit(workspace / "model", **FLASH)
    report = compress.run(
        recipe(
            workspace,
            export=("dense", "native", "gptq"),
            method=RTN(bits=8, group_size=32),
            eval_windows=2,
        )
    )
    assert all(export.relative_difference < 1e-5 for export in report.exports)
    assert any("asks for the attention 'flash_attention_2'" in note for note in report.notes)
    dense = json.loads((workspace / "out" / "dense" / "config.json").read_text())
    native = json.loads((workspace / "out" / "native" / "config.json").read_text())
    assert (
        dense["attn_implementation"]
        == native["base_config"]["attn_implementation"]
        == "flash_attention_2"
    )


@pytest.mark.slow
def test_a_quantisation_left_over_in_the_config_is_ignored_and_not_exported(workspace):
    edit(workspace / "model", quantization_config=BNB)
    report = compress.run(
        recipe(
            workspace, export=("dense", "native"), method=RTN(bits=8, group_size=32), eval_windows=2
        )
    )
    assert any(
        "names bitsandbytes, but every weight is stored in 16" in note for note in report.notes
    )
    for name in ("dense", "native"):
        config = json.loads((workspace / "out" / name / "config.json").read_text())
        assert "bitsandbytes" not in json.dumps(config)
    model = AutoModelForCausalLM.from_pretrained(workspace / "out" / "dense")
    other = load_export(workspace / "out" / "native")
    assert torch.allclose(model(tiny_ids()).logits, other(tiny_ids()).logits, atol=1e-4)


def test_inspection_calls_such_weights_ordinary(workspace):
    edit(workspace / "model", quantization_config=BNB)
    found = inspect(str(workspace / "model"), progress=lambda *_: None)
    assert found.format == "ordinary weights"


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_any_quantisation_that_would_show_is_seen_to_be_left_over(workspace, method):
    edit(workspace / "model", quantization_config={"quant_method": method, "bits": 4})
    assert not hasattr(read_config(workspace / "model"), "quantization_config")
    assert resolve_model(str(workspace / "model")).notes


def test_a_quantisation_that_happens_on_loading_is_refused_with_what_to_do(workspace):
    edit(workspace / "model", quantization_config={"quant_method": "bitnet"})
    with pytest.raises(CheckpointError, match=r"stored in 16 bits or more.*'bitnet'.*remove it"):
        resolve_model(str(workspace / "model"))


def test_a_quantisation_that_shows_is_refused_as_before(workspace):
    path = workspace / "model" / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(load_file(path) | {name: torch.zeros(1024, 1, dtype=torch.uint8)}, path)
    edit(workspace / "model", quantization_config=BNB)
    assert not is_leftover(workspace / "model", BNB)
    with pytest.raises(CheckpointError, match=r"already compressed \(bitsandbytes\)"):
        resolve_model(str(workspace / "model"))


def test_buffers_of_old_checkpoints_are_no_packed_weights(workspace):
    path = workspace / "model" / "model.safetensors"
    buffers = {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "embeddings.position_ids": torch.arange(4)[None],
    }
    save_file(load_file(path) | buffers, path)
    assert is_leftover(workspace / "model", BNB)


@pytest.mark.parametrize(
    ("config", "name", "head"),
    [
        (LlamaConfig, "LLaMAForCausalLM", Head.NEXT_TOKEN),
        (MptConfig, "MPTForCausalLM", Head.NEXT_TOKEN),
        (LlamaConfig, "LLaMALMHeadModel", Head.NEXT_TOKEN),
        (LlamaConfig, "LLaMAForSequenceClassification", Head.CLASSES),
        (BertConfig, "BERTModel", Head.FEATURES),
        (LlamaConfig, "LlamaForTokenClassification", None),
        (LlamaConfig, "LLaMAForVision", None),
    ],
)
def test_a_class_is_known_however_old_files_spell_it(config, name, head):
    assert head_of(config(architectures=[name])) is head
