"""Exports: what is written is what was compressed, however it is loaded, or it does not load."""

import json
from pathlib import Path

import pytest
import torch
from exported import FORMATS, IDS, compressed, corrected, export, logits, python, quantised
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.bases import open_base
from compress.errors import CheckpointError, RecipeError
from compress.exports import EXPORTS, LayerExport
from compress.exports.gptq import zeros_less_one
from compress.exports.load import load_export, unpack
from compress.exports.peft import AdapterWriter, read_adapter
from compress.families.base import LayerShape
from compress.forms.dense import Dense
from compress.forms.linear import CompressedLinear
from compress.forms.loading import FORMAT_VERSION
from compress.forms.low_rank import LowRank
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.models.checkpoint import Reader

FOREIGN = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "foreign"
MODELS = {
    "llama, head untied, sharded": {"family": "llama", "tie_word_embeddings": False},
    "llama, head tied": {"family": "llama", "tie_word_embeddings": True},
    "qwen2, biases": {"family": "qwen2"},
    "gpt2, Conv1D": {"family": "gpt2"},
    "llama, bfloat16": {"family": "llama", "dtype": torch.bfloat16},
    "llama, float16": {"family": "llama", "dtype": torch.float16},
    "qwen3_moe, experts in pieces": {"family": "qwen3_moe"},
}
LOAD = """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, ids = sys.argv[1], sys.argv[2], [int(n) for n in sys.argv[3].split(",")]
trust = {"trust_remote_code": True} if sys.argv[4] == "trust" else {}
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
assert tokenizer.decode(tokenizer("def f").input_ids) == "def f"
with torch.inference_mode():
    save_file({"logits": model(input_ids=torch.tensor([ids])).logits[0].float()}, out)
"""


def load_in_fresh_process(folder, tmp_path, *, code=LOAD, trust="no", hide_toolkit=False):
    out = tmp_path / "logits.safetensors"
    ids = ",".join(map(str, IDS[0].tolist()))
    ran = python(code, folder, out, ids, trust, hide_toolkit=hide_toolkit, cwd=tmp_path)
    return ran, load_file(out)["logits"] if out.exists() else None


@pytest.fixture(params=MODELS, ids=str)
def made(request, tmp_path):
    return compressed(tmp_path / "source", **MODELS[request.param])


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_read_back_gives_the_logits_of_the_compressed_model(made, tmp_path, name):
    if problem := EXPORTS[name].problem_of_model(made.source, made.model.config, {}, {}):
        pytest.skip(f"the format refuses it: {problem}")
    model = load_export(export(made, tmp_path / name, name))
    assert model.dtype == made.model.dtype
    # Read back, experts are apart; products of their few tokens may round otherwise, with several threads.
    exact = name != "dense" and not hasattr(made.model.config, "num_experts")
    if exact:
        assert torch.equal(logits(model), made.logits())
    else:
        narrow = made.model.dtype != torch.float32
        torch.testing.assert_close(
            logits(model), made.logits(), rtol=0, atol=0.05 if narrow else 1e-5
        )


@pytest.mark.slow
def test_a_native_export_loads_after_the_import_in_a_fresh_process(made, tmp_path):
    folder = export(made, tmp_path / "native", "native")
    ran, found = load_in_fresh_process(folder, tmp_path, code="import compress\n" + LOAD)
    assert ran.code == 0, ran.err
    assert torch.equal(found, made.logits())


@pytest.mark.slow
@pytest.mark.parametrize("module", ["compress.forms.loading"])
def test_importing_the_loading_module_alone_is_enough(tmp_path, module):
    made = compressed(tmp_path / "source")
    folder = export(made, tmp_path / "native", "native")
    ran, found = load_in_fresh_process(folder, tmp_path, code=f"import {module}\n" + LOAD)
    assert ran.code == 0, ran.err
    assert torch.equal(found, made.logits())


@pytest.mark.slow
def test_a_native_export_loads_without_the_toolkit_by_the_code_shipped_with_it(made, tmp_path):
    folder = export(made, tmp_path / "native", "native")
    ran, found = load_in_fresh_process(folder, tmp_path, trust="trust", hide_toolkit=True)
    assert ran.code == 0, ran.err
    assert torch.equal(found, made.logits())


@pytest.mark.slow
def test_two_checkpoints_and_the_toolkit_share_a_process(tmp_path):
    made = compressed(tmp_path / "source")
    folder = export(made, tmp_path / "native", "native")
    code = (
        "from transformers import AutoModelForCausalLM as A\n"
        "A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "import compress.forms.loading\n"
        "A.from_pretrained(sys.argv[1])\n"
        "A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    ran, found = load_in_fresh_process(folder, tmp_path, code=code + LOAD)
    assert ran.code == 0, ran.err
    assert torch.equal(found, made.logits())


@pytest.mark.slow
@pytest.mark.parametrize("head", ["AutoModelForCausalLM", "LlamaForCausalLM", "LlamaModel"])
@pytest.mark.parametrize("toolkit", ["with", "without"])
def test_what_does_not_know_the_format_fails_loudly(tmp_path, head, toolkit):
    if (head, toolkit) == ("AutoModelForCausalLM", "with"):
        pytest.skip("this is how it is meant to be loaded")
    folder = export(compressed(tmp_path / "source"), tmp_path / "native", "native")
    code = "import compress\n" if toolkit == "with" else ""
    code += f"from transformers import {head}\nprint({head}.from_pretrained(sys.argv[1]))"
    ran, _ = load_in_fresh_process(folder, tmp_path, code=code, hide_toolkit=toolkit == "without")
    assert ran.code != 0
    assert "Error" in ran.err
    assert "trust_remote_code" in ran.err
    assert "(model)" not in ran.out
    assert "(layers)" not in ran.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_keep_their_dtype_whatever_is_asked_for(tmp_path, dtype):
    made = compressed(tmp_path / "source")
    model = load_export(export(made, tmp_path / "native", "native"), dtype)
    layer = model.get_submodule(next(iter(made.layers)))
    state = layer.form.state_dict()
    assert state["terms.0.qweight"].dtype == torch.int32
    assert state["terms.0.scales"].dtype == torch.float16
    assert state["terms.1.up.weight"].dtype == dtype
    assert model.dtype == dtype
    torch.testing.assert_close(logits(model), made.logits(), rtol=0, atol=0.1)


def rewrite(folder, change):
    """Change the tensors of an export, then take them for its only shard."""
    tensors = dict(Reader(folder).items())
    for path in folder.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "gguf"])
@pytest.mark.parametrize("part", ["norm", "k_proj"])
@pytest.mark.parametrize("change", ["missing", "renamed", "extra"])
def test_a_missing_renamed_or_extra_tensor_is_an_error(tmp_path, name, part, change):
    folder = export(compressed(tmp_path / "source"), tmp_path / name, name)

    def damage(tensors):
        key = next(key for key in sorted(tensors) if part in key and "g_idx" not in key)
        if change == "extra":
            tensors[f"{key}.more"] = tensors[key].clone()
            return
        tensor = tensors.pop(key)
        if change == "renamed":
            tensors[f"{key}.other"] = tensor

    rewrite(folder, damage)
    with pytest.raises(CheckpointError, match=f"{part}|{name}"):
        load_export(folder)


def test_stock_transformers_with_the_toolkit_also_refuses_a_missing_tensor(tmp_path):
    folder = export(compressed(tmp_path / "source"), tmp_path / "native", "native")
    rewrite(
        folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.form.terms.0.scales")
    )
    with pytest.raises(ValueError, match=r"q_proj\.form\.terms\.0\.scales"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_newer_format_version_is_refused(tmp_path):
    folder = export(compressed(tmp_path / "source"), tmp_path / "native", "native")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(CheckpointError, match="format_version"):
        load_export(folder)


def test_a_loaded_model_refuses_to_be_saved_in_a_form_that_would_not_load(tmp_path):
    folder = export(compressed(tmp_path / "source"), tmp_path / "native", "native")
    model = load_export(folder)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.glob("again/*"))
    model.config.save_pretrained(tmp_path / "config")
    for path in Reader(folder).shards:
        (tmp_path / "config" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "config")


def test_unpacking_changes_no_output(tmp_path):
    made = compressed(tmp_path / "source")
    model = load_export(export(made, tmp_path / "native", "native"))
    unpack(model)
    assert torch.equal(logits(model), made.logits())
    forms = [module.form for module in model.modules() if isinstance(module, CompressedLinear)]
    assert isinstance(forms[0].terms[0], Dense)


def test_a_loaded_model_generates(tmp_path):
    model = load_export(export(compressed(tmp_path / "source"), tmp_path / "native", "native"))
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, IDS.shape[1] + 3)


def test_tokenizer_and_generation_config_go_with_every_export_that_is_no_single_file(tmp_path):
    made = compressed(tmp_path / "source")
    for name in [name for name in FORMATS if name != "gguf"]:
        files = {path.name for path in export(made, tmp_path / name, name).iterdir()}
        assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files
        assert not {path for path in files if path.endswith((".part", ".scratch"))}


# What is refused


def test_a_tensor_of_the_source_that_is_not_in_the_output_is_an_error(tmp_path):
    made = compressed(tmp_path / "source")
    (tmp_path / "native").mkdir()
    exporter = EXPORTS["native"](tmp_path / "native", made.source)
    for layer in made.layers.values():
        exporter.add_layer(layer)
    reader = Reader(made.source.folder)
    for name in reader:
        if name.rpartition(".")[0] not in made.layers and name != "model.norm.weight":
            exporter.add_tensor(name, reader[name])
    with pytest.raises(CheckpointError, match=r"lost: model\.norm\.weight"):
        exporter.close()
    assert not list((tmp_path / "native").glob("*.safetensors"))


def test_a_quantised_source_is_refused(tmp_path):
    folder = export(compressed(tmp_path / "source"), tmp_path / "gptq", "gptq")
    made = compressed(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"already compressed \(gptq\); name the model"):
        EXPORTS["dense"](tmp_path, type(made.source)(str(folder), folder, None, (), None))


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        (GPTQ(bits=5, group_size=32), (64, 64), "5 bits"),
        (GPTQ(bits=4, group_size=32), (48, 64), "multiples of 32"),
        (GPTQ(bits=4, group_size=48), (64, 64), "48 do not divide"),
        (EoRA(base=GPTQ(bits=6, group_size=32)), (64, 64), "6 bits"),
    ],
)
def test_what_gptq_cannot_hold_is_refused_before_any_work(method, shape, message):
    with pytest.raises(RecipeError, match=message) as caught:
        EXPORTS["gptq"].check({"model.layers.0.q": method}, {"model.layers.0.q": shape})
    assert "model.layers.0.q" in str(caught.value)
    EXPORTS["native"].check({"model.layers.0.q": method}, {"model.layers.0.q": shape})


def test_planned_methods_pass_the_check():
    shapes = {"a": LayerShape((64, 128), 32768), "b": LayerShape((32, 64), 8192)}
    planned = EoRA(rank=8, base=GPTQ(bits=4)).plan(shapes)
    EXPORTS["gptq"].check(planned, {name: layer.shape for name, layer in shapes.items()})


def test_a_layer_that_gptq_cannot_hold_is_refused_when_it_comes(tmp_path):
    made = compressed(tmp_path / "source")
    (tmp_path / "gptq").mkdir()
    exporter = EXPORTS["gptq"](tmp_path / "gptq", made.source)
    with pytest.raises(CheckpointError, match="sum of Dense"):
        exporter.add_layer(LayerExport("x", Dense(torch.zeros(32, 32)), None, transposed=False))
    exporter.add_layer(LayerExport("x", quantised(torch.randn(32, 64)), None, transposed=False))
    with pytest.raises(CheckpointError, match="differs from"):
        exporter.add_layer(
            LayerExport("y", quantised(torch.randn(32, 64), bits=8), None, transposed=False)
        )


def test_a_dense_weight_that_overflows_the_sources_dtype_is_an_error(tmp_path):
    made = compressed(tmp_path / "source", dtype=torch.float16)
    (tmp_path / "dense").mkdir()
    exporter = EXPORTS["dense"](tmp_path / "dense", made.source)
    with pytest.raises(CheckpointError, match="float16"):
        exporter.add_layer(LayerExport("x", Dense(torch.full((2, 2), 1e6)), None, transposed=False))


# GPTQ


def plain_dequantise(tensors, name, bits, offset):
    """Bit by bit, from the words alone: (o, i)."""
    qweight, qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    scales, g_idx = tensors[f"{name}.scales"].double(), tensors[f"{name}.g_idx"].long()

    def bit(word, k):
        return (int(word) >> k) & 1

    def code(words, j):
        return sum(bit(words[(j * bits + b) // 32], (j * bits + b) % 32) << b for b in range(bits))

    o, i = qweight.shape[1], g_idx.shape[0]
    weight = torch.empty(o, i, dtype=torch.float64)
    for row in range(o):
        column = qweight[:, row].tolist()
        for k in range(i):
            stored = code(qzeros[g_idx[k]].tolist(), row)
            zero = (stored + offset) % (1 << bits)
            weight[row, k] = scales[g_idx[k], row] * (code(column, k) - zero)
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_gptq_tensors_mean_the_weight_to_an_independent_reader(tmp_path, bits, zeros, order):
    def make_form(_, weight):
        groups = torch.arange(weight.shape[1]) // 32
        if order == "shuffled":
            groups = groups[torch.randperm(weight.shape[1], generator=torch.manual_seed(1))]
        return quantised(weight, bits=bits, zeros=zeros, groups_i=groups)

    made = compressed(tmp_path / "source", make_form=make_form)
    folder = export(made, tmp_path / "gptq", "gptq")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text())
    assert config["sym"] == (zeros == "symmetric")
    assert config["desc_act"] == (order == "shuffled")
    assert config["checkpoint_format"] == ("gptq" if config["sym"] else "gptq_v2")
    tensors, name = dict(Reader(folder).items()), "model.layers.0.mlp.down_proj"
    found = plain_dequantise(tensors, name, bits, 1 if config["sym"] else 0)
    torch.testing.assert_close(found, made.layers[name].form.dense().double())
    assert torch.equal(open_base(folder).form(name).dense(), made.layers[name].form.dense())


def test_a_zero_of_nought_becomes_the_largest_code_and_back():
    zeros = torch.tensor([[0, 1, 8, 15]], dtype=torch.uint8)
    assert zeros_less_one(zeros, 4).tolist() == [[15, 0, 7, 14]]


def test_a_symmetric_checkpoint_stores_the_words_that_every_reader_knows(tmp_path):
    made = compressed(tmp_path / "source", make_form=lambda _, weight: quantised(weight))
    reader = Reader(export(made, tmp_path / "gptq", "gptq"))
    assert set(reader["model.layers.0.mlp.up_proj.qzeros"].flatten().tolist()) == {0x77777777}


def test_layers_that_stay_are_named_for_the_readers(tmp_path):
    made = compressed(
        tmp_path / "source", keep=r"lm_head|layers\.1\.self_attn\.k_proj", tie_word_embeddings=True
    )
    folder = export(made, tmp_path / "gptq", "gptq")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert list(config["dynamic"]) == [r"-:^model\.layers\.1\.self_attn\.k_proj$"]
    (targets,) = config["modules_in_block_to_quantize"]
    assert "model.layers.0.self_attn.k_proj" in targets
    assert "model.layers.1.self_attn.k_proj" not in targets
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.k_proj" in adapter["target_modules"]
    assert "q_proj" in adapter["target_modules"]
    assert torch.equal(logits(load_export(folder)), made.logits())


def test_whole_rows_of_different_lengths_are_groups_of_minus_one(tmp_path):
    made = compressed(
        tmp_path / "source",
        make_form=lambda _, weight: quantised(weight, group_size=weight.shape[1]),
    )
    folder = export(made, tmp_path / "gptq", "gptq")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == -1
    assert torch.equal(logits(load_export(folder)), made.logits())


@pytest.mark.parametrize("folder", ["gptqmodel_w4_g128_ragged", "autoround_w4_g64_negative_scales"])
def test_checkpoints_of_other_tools_are_read_as_their_authors_meant_them(folder):
    if not (FOREIGN / folder).is_dir():
        pytest.skip("shared/data/foreign is not here")
    expected = load_file(FOREIGN / folder / "expected_dequantised.safetensors")
    base = open_base(FOREIGN / folder)
    assert len(base.layers) == 7
    for key, weight in expected.items():
        torch.testing.assert_close(
            base.form(key.removesuffix(".weight")).dense(), weight, rtol=1e-6, atol=1e-8
        )
    model = load_export(FOREIGN / folder, torch.float32)
    original = load_export(FOREIGN / "original", torch.float32)
    a, b = logits(model), logits(original)
    assert (a - b).norm() / b.norm() < 0.3


# The adapter


def test_peft_applies_every_layer_of_the_adapter_with_scaling_one(tmp_path):
    """On the dense model without the corrections, whose merged weight is then W + BA."""
    ranks = {"q_proj": 2, "k_proj": 3, "v_proj": 8, "o_proj": 8, "down_proj": 5}

    def make_form(name, weight):
        return corrected(weight, rank=ranks.get(name.rpartition(".")[2], 4))

    made = compressed(tmp_path / "source", make_form=make_form)
    folder = export(made, tmp_path / "gptq", "gptq")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    for name, layer in made.layers.items():
        model.get_submodule(name).weight.data = layer.form.terms[0].dense()
    adapted = PeftModel.from_pretrained(model, folder / "adapter")
    adapted_layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    scalings = [scale for layer in adapted_layers for scale in layer.scaling.values()]
    assert scalings == [1.0] * len(made.layers)
    with torch.inference_mode():
        found = adapted(input_ids=IDS).logits[0]
    torch.testing.assert_close(found, made.logits(), rtol=0, atol=1e-5)
    merged = adapted.merge_and_unload()
    for name, layer in made.layers.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, layer.form.dense())


def test_peft_merges_the_adapter_into_conv1d(tmp_path):
    made = compressed(tmp_path / "source", family="gpt2")
    folder = export(made, tmp_path / "gptq", "gptq")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    for name, layer in made.layers.items():
        model.get_submodule(name).weight.data = layer.form.terms[0].dense().T.contiguous()
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    for name, layer in made.layers.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, layer.form.dense().T)


def test_the_readers_own_scaling_is_alpha_over_rank(tmp_path):
    writer = AdapterWriter(tmp_path / "adapter")
    factors = {
        "A.Q": (torch.randn(6, 2), torch.randn(2, 5)),
        "A.K": (torch.randn(6, 3), torch.randn(3, 5)),
    }
    for name, (up, down) in factors.items():
        form = LowRank.from_factors(up, down)
        writer.add(LayerExport(name, form, None, transposed=False), form)
    writer.close([], "base/model")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["base_model_name_or_path"] == "base/model"
    assert config["rank_pattern"] == config["alpha_pattern"] == {"A.Q": 2}
    assert config["target_modules"] == ["K", "Q"]
    for name, form in read_adapter(tmp_path / "adapter").items():
        assert torch.equal(form.dense(), factors[name][0] @ factors[name][1])
    path.write_text(json.dumps(config | {"alpha_pattern": {"Q": 4}}))
    doubled = read_adapter(tmp_path / "adapter")["A.Q"]
    torch.testing.assert_close(doubled.dense(), 2 * (factors["A.Q"][0] @ factors["A.Q"][1]))
    path.write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        read_adapter(tmp_path / "adapter")
    path.write_text(json.dumps(config | {"r": 7}))
    with pytest.raises(CheckpointError, match="rank 3"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["native", "dense"])
def test_an_export_of_nothing_is_refused_by_its_format(tmp_path, monkeypatch, name):
    made = compressed(tmp_path / "source")
    (tmp_path / ".out.partial").mkdir()
    exporter = EXPORTS[name](tmp_path / ".out.partial", made.source)
    monkeypatch.setattr(exporter, "reader", {})
    with pytest.raises(CheckpointError) as caught:
        exporter.close()
    assert str(caught.value) == f"{name} export: no tensor to write"
