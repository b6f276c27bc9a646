"""Families that are made otherwise: what is found in them, what is left, and why."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from families import HYBRIDS, byte_tokenizer, save_tiny, tiny_ids, tiny_model
from safetensors.torch import load_file, save_file
from test_walk import CPU, walker
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)
from transformers.integrations.bitnet import AutoBitLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import TEMPORAL_BLOCK_CLASSES
from workspaces import TEXT, recipe

import compress
from calibration.errors import InputError
from calibration.experts.module import experts_in
from calibration.layers import is_linear
from calibration.propagation import Propagate
from calibration.skeleton import PartLoader, build_skeleton, decoder_blocks, language_model
from calibration.uncalled import uncalled_layers
from calibration.walk import walk
from compress.errors import CheckpointError, RecipeError
from compress.exports.load import load_export
from compress.families.base import LayerShape
from compress.families.correction import Correction
from compress.forms.linear import CompressedLinear
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.methods.svd import SVD
from compress.methods.wanda import Wanda
from compress.planning.left import is_small
from eval.footprint import Timing, measure_speed

pytestmark = pytest.mark.usefixtures("quick_verification")


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_walk_through_a_hybrid_equals_the_plain_forward(family):
    model, ids = tiny_model(family), tiny_ids()
    loader, stream = walker(model, ids)
    for _ in walk(stream, loader, propagate=Propagate.BLOCK, device=CPU):
        pass
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    # Jamba has an expert here: see the walk's own test.
    bound = 1e-5 if dict(experts_in(loader.model)) else 0.0
    torch.testing.assert_close(stream.predictions(0), expected, rtol=0, atol=bound)


def _decodes(family):
    """RecurrentGemma's own decoding differs from its whole pass before transformers 5.23."""
    old = family == "recurrent_gemma" and "attention" in TEMPORAL_BLOCK_CLASSES
    return pytest.param(family, marks=[pytest.mark.skip("transformers decodes it wrongly")] * old)


@pytest.mark.parametrize("family", map(_decodes, HYBRIDS))
def test_decoding_is_timed_from_the_states_that_the_prompt_has_left(family):
    model, calls = tiny_model(family), []

    def keep(_, __, kwargs, output):
        calls.append((kwargs["input_ids"], output.logits[:, -1]))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    measure_speed(model, Timing(prompt_tokens=8, new_tokens=3, repeats=1))
    hook.remove()
    ids = torch.cat([ids for ids, _ in calls[-4:]], dim=1)
    assert ids.shape == (1, 11)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(calls[-1][1], expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("method", [EoRA(), Wanda()], ids=["eora", "wanda"])
@pytest.mark.parametrize("family", ["falcon", "jamba", "zamba"])
def test_every_byte_of_a_hybrid_is_compressed_or_has_a_reason(family, method, tmp_path):
    save_tiny(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(TEXT)
    report = compress.run(recipe(tmp_path, method=method))
    source = load_file(tmp_path / "model" / "model.safetensors")
    compressed = {layer.name: layer.bytes_before for layer in report.layers}
    kept = {tensor.name: tensor.n_bytes for tensor in report.kept}
    assert sum(compressed.values()) + sum(kept.values()) == sum(t.nbytes for t in source.values())
    assert all(layer.relative_error is not None for layer in report.layers)
    assert all(tensor.reason for tensor in report.kept)


class Product(nn.Module):
    """A linear layer of a class that nobody knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 4, device="meta"))

    def forward(self, x):
        return F.linear(x, self.weight)


class Scaled(Product):
    """A matrix that multiplies something else than the input."""

    def forward(self, x):
        return F.linear(2 * x, self.weight)


@pytest.mark.parametrize(
    ("layer", "linear"),
    [
        (nn.Linear(4, 6), True),
        (FalconLinear(4, 6), True),
        (FalconLinear(4, 6, bias=False), True),
        (Product(), True),
        (Scaled(), False),
        (AutoBitLinear(4, 6), False),
        (nn.Embedding(4, 6), False),
        (nn.LayerNorm(4), False),
        (Llama4Router(AutoConfig.for_model("llama4_text", hidden_size=4)), False),
    ],
    ids=lambda it: type(it).__name__ if isinstance(it, nn.Module) else str(it),
)
def test_a_layer_is_linear_by_what_it_computes(layer, linear):
    assert is_linear(layer) == linear


def test_layers_whose_weight_is_read_without_a_call_are_found(tmp_path):
    model = save_tiny(tmp_path, "mamba")
    skeleton = build_skeleton(model.config, torch.float32)
    loader = PartLoader(skeleton, load_file(tmp_path / "model.safetensors"))
    found = uncalled_layers(skeleton, loader, CPU)
    assert found == {f"backbone.layers.{k}.mixer.dt_proj" for k in range(2)}
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert type(skeleton.backbone.layers[0].mixer.dt_proj) is nn.Linear


def test_a_model_that_hands_more_than_hidden_states_on_is_refused():
    config = AutoConfig.for_model("rwkv", vocab_size=128, hidden_size=32, num_hidden_layers=2)
    model = build_skeleton(config, torch.float32)
    loaded = type(model)(config)
    with pytest.raises(InputError, match="hands more than hidden states from block to block"):
        walker(loaded, tiny_ids())


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((1, 2048), True),  # the gate of a shared expert
        ((64, 2048), True),  # in_proj_ba of Qwen3-Next-80B
        ((48, 5120), True),  # in_proj_a of Qwen3.5-27B
        ((16, 8192), True),  # a router
        ((192, 5120), False),  # x_proj of Mamba-2.8B
        ((256, 4096), False),  # k_proj of GLM-4-9B
        ((1024, 16384), False),  # k_proj of Llama-3.1-405B
    ],
)
def test_small_projections_are_left_and_those_of_attention_are_not(shape, small):
    assert is_small(shape) == small


def planned(method, *shapes):
    return method.plan({f"l{k}": LayerShape(s, 2 * s[0] * s[1]) for k, s in enumerate(shapes)})


def test_the_default_rank_is_lower_where_it_would_leave_a_layer_no_smaller():
    found = planned(EoRA(), (576, 576), (64, 64), (32, 32), (16, 32))
    # In 4 bits and groups of 32 a 64 x 64 weight of 8192 bytes has 2304; rank 16 takes 4096 more, and 24 takes 6144.
    ranks = [each.rank if isinstance(each, Correction) else 0 for each in found.values()]
    assert ranks == [32, 16, 8, 0]


def test_a_rank_that_was_given_is_every_layer_s_or_refused():
    with pytest.raises(RecipeError, match=r"32 is above min\(out, in\) of 1 layers, such as l1"):
        planned(EoRA(rank=32), (64, 64), (16, 64))


def test_layers_that_no_default_group_divides_are_left_and_a_given_group_is_refused():
    layers = {"a": LayerShape((64, 64), 8192), "b": LayerShape((64, 48), 6144)}
    assert dict(EoRA().leaves(layers)) == {
        "b": "its 48 inputs are no multiple of 32, the smallest default group"
    }
    assert not RTN().leaves({"b": layers["b"]})  # no layer would be left to compress: refused
    assert not GPTQ(group_size=32).leaves(layers)
    with pytest.raises(RecipeError, match="32 does not divide the inputs of b"):
        GPTQ(group_size=32).plan(layers)


def test_layers_that_the_default_share_pays_no_rank_for_are_left():
    layers = {"a": LayerShape((64, 64), 8192), "b": LayerShape((8, 64), 1024)}
    reason = "0.8 of its bytes, the default, does not pay for rank 8, the smallest"
    assert dict(SVD().leaves(layers)) == {"b": reason}
    assert not SVD(keep=0.8).leaves(layers)
    assert not SVD().leaves({"b": layers["b"]})


def test_a_compressed_layer_gives_its_weight_to_a_model_that_reads_it():
    weight = torch.randn(8, 32)
    [form] = planned(RTN(bits=4), (8, 32))["l0"].compress([weight], stats_of(torch.randn(64, 32)))
    layer = CompressedLinear(form, None, torch.bfloat16)
    assert layer.weight.dtype is torch.bfloat16
    torch.testing.assert_close(layer.weight, form.dense().bfloat16())
    assert layer.to(torch.float16).weight.dtype is torch.float16
    assert "weight" not in layer.state_dict()


def stats_of(x_ti):
    from calibration.statistics.collection import Statistics
    from calibration.statistics.gram import Gram

    return Statistics.of(x_ti, 1, frozenset({Gram}))


@pytest.fixture
def image_text(tmp_path):
    """A workspace with a model like Gemma 3, whose image encoder has more blocks than its language model."""
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "max_position_embeddings": 128,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_the_language_model_beside_images_is_compressed_and_the_image_encoder_is_not(image_text):
    report = compress.run(recipe(image_text, method=EoRA(base=GPTQ(group_size=32))))
    assert len(report.layers) == 2 * 7
    assert all(".language_model.layers." in layer.name for layer in report.layers)
    reasons = {t.reason for t in report.kept if "vision_tower" in t.name}
    assert reasons == {"outside the language model, in model.vision_tower"}
    model = AutoModelForImageTextToText.from_pretrained(image_text / "out")
    assert isinstance(model, Gemma3ForConditionalGeneration)
    original = AutoModelForImageTextToText.from_pretrained(image_text / "model")
    tower = original.model.vision_tower.state_dict()
    assert tower
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, tower[name]), name
    seen = torch.randn(1, 3, 28, 28)
    ids = torch.tensor([[5, 121, 120, 120, 120, 120, 122, 7, 9]])
    with torch.no_grad():
        found, expected = (
            each(input_ids=ids, pixel_values=seen).logits for each in (model, original)
        )
    assert (found - expected).norm() < 0.5 * expected.norm()


def test_an_image_encoder_that_is_asked_for_is_compressed_by_its_weights_alone(image_text):
    asked = ("vision_tower.encoder", "language_model.layers.*.mlp")
    report = compress.run(recipe(image_text, method=RTN(bits=8), include=asked))
    beside = [layer for layer in report.layers if "vision_tower" in layer.name]
    assert {layer.name.rpartition(".")[2] for layer in beside} == {
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1")
    }
    assert len(beside) == 5 * 5
    assert {layer.name.rpartition(".")[2] for layer in report.layers if layer not in beside} == {
        *("gate_proj", "up_proj", "down_proj")
    }
    left = [tensor for tensor in report.kept if tensor.name.endswith(".mlp.fc2.weight")]
    odd = "its 48 inputs are no multiple of 32, the smallest default group"
    assert [tensor.reason for tensor in left if "encoder" in tensor.name] == [odd] * 5
    model, original = (
        AutoModelForImageTextToText.from_pretrained(image_text / each) for each in ("out", "model")
    )
    layer = beside[0]
    found, expected = (each.get_submodule(layer.name).weight for each in (model, original))
    error = (found - expected).norm() / expected.norm()
    torch.testing.assert_close(float(error), layer.relative_error, rtol=1e-3, atol=0)
    assert "without inputs" in layer.note


def test_a_method_that_reads_inputs_is_refused_for_an_image_encoder(image_text):
    with pytest.raises(RecipeError, match=r"eora needs their inputs: .*\(magnitude, rtn, svd"):
        compress.plan(recipe(image_text, include=("vision_tower",)))


def test_blocks_are_those_of_the_language_model_whatever_stands_beside_it(image_text):
    model = AutoModelForImageTextToText.from_pretrained(image_text / "model")
    prefix, blocks = decoder_blocks(model)
    assert language_model(model) == "model.language_model"
    assert (prefix, len(blocks)) == ("model.language_model.layers", 2)


@pytest.fixture
def drafting(tmp_path):
    """A workspace with a model whose checkpoint has a draft head, which transformers does not build."""
    save_tiny(tmp_path / "model", "qwen3_next", head_dim=16)
    (tmp_path / "text.txt").write_text(TEXT)
    path = tmp_path / "model" / "model.safetensors"
    draft = {"mtp.layers.0.mlp.up_proj.weight": torch.randn(32, 32)}
    save_file({**load_file(path), **draft}, path, {"format": "pt"})
    return tmp_path


def test_draft_heads_are_kept_and_listed(drafting):
    report = compress.run(recipe(drafting, method=RTN(bits=8)))
    [kept] = [tensor for tensor in report.kept if tensor.name.startswith("mtp.")]
    assert kept.reason == "no part of the model as transformers has it, such as a draft head"
    before, after = (
        load_file(drafting / each / "model.safetensors")[kept.name] for each in ("model", "out")
    )
    assert torch.equal(after, before)
    load_export(drafting / "out")


def skipped(folder):
    """Whether a GPTQ checkpoint tells its readers to skip a module."""
    config = json.loads((folder / "config.json").read_text())
    rules = [rule.removeprefix("-:") for rule in config["quantization_config"]["dynamic"]]
    return lambda name: any(re.match(rule, name) for rule in rules)


def test_image_encoders_are_named_to_be_skipped_in_a_gptq_checkpoint(image_text):
    method, attention = GPTQ(group_size=32), ("k_proj", "v_proj")
    compress.run(recipe(image_text, method=method, exclude=attention, export=("gptq",)))
    skip = skipped(image_text / "out")
    assert skip("vision_tower.encoder.layers.0.self_attn.qkv_proj")
    assert skip("model.vision_tower.encoder.layers.0.mlp.fc1")
    assert not skip("model.language_model.layers.0.mlp.up_proj")
    load_export(image_text / "out")


def test_draft_heads_are_named_to_be_skipped_in_a_gptq_checkpoint(drafting):
    method = GPTQ(group_size=32)
    compress.run(recipe(drafting, method=method, export=("gptq",)))
    skip = skipped(drafting / "out")
    assert skip("mtp.layers.0.mlp.up_proj")
    assert not skip("model.layers.0.mlp.up_proj")
    assert not skip("lm_head")


def test_draft_heads_are_ignored_by_name_in_a_compressed_tensors_checkpoint(drafting):
    compress.run(recipe(drafting, method=RTN(group_size=32), export=("compressed-tensors",)))
    config = json.loads((drafting / "out" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert ignored[0] == "re:^mtp.*"
    assert {"lm_head", "mtp.layers.0.mlp.up_proj"} <= set(ignored)
    stored = load_file(drafting / "out" / "model.safetensors")
    draft = "mtp.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored[draft], load_file(drafting / "model" / "model.safetensors")[draft])
    load_export(drafting / "out")


def test_an_encoder_with_a_decoder_is_refused_by_name(tmp_path):
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "is_encoder_decoder": True})
    )
    save_file({"shared.weight": torch.zeros(2, 2)}, tmp_path / "model" / "model.safetensors")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"T5ForConditionalGeneration \(t5\) is an encoder"):
        compress.plan(recipe(tmp_path))


@pytest.mark.slow
@pytest.mark.as_run
def test_the_table_of_architectures_tells_of_every_family(monkeypatch, capsys):
    scripts = Path(__file__).parent.parent / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    families = ["falcon", "mamba", "zamba", "gemma3", "bart"]
    monkeypatch.setattr(sys, "argv", ["architectures", "--only", *families])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(scripts / "architectures"), run_name="__main__")
    assert ended.value.code == 0
    rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == families
    assert "is an encoder with a decoder" in rows[-1]
    assert all(row.endswith("| 0.0e+00 |") for row in rows[:-1])
