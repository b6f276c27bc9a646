"""GGUF exports: blocks as the gguf package reads them, keys, names and rows as llama.cpp has them, refusals at plan."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import IDS, compressed, corrected, export, logits, quantised
from families import FAMILIES as TINY
from families import save_tiny, tiny_model
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from workspaces import TEXT, recipe

import compress
from calibration.statistics.gram import Gram
from compress.engines.base import Export, Origin
from compress.engines.llama_cpp import LlamaCpp
from compress.errors import CheckpointError, RecipeError
from compress.exports.gguf.adapter import FILE, read_factors
from compress.exports.gguf.blocks import (
    Q8_0,
    TYPES,
    offset_type,
    quantised_blocks,
    row_blocks,
    symmetric_type,
    type_of,
)
from compress.exports.gguf.exporter import GgufExporter
from compress.exports.gguf.families import FAMILIES, context_of, problem_of_config
from compress.exports.gguf.imatrix import Text, write_imatrix
from compress.exports.gguf.names import Names
from compress.exports.gguf.reading import config_of, model_files
from compress.exports.gguf.rope import problem_of_rope, rope_tensors
from compress.exports.gguf.vocabulary import problem_of_tokenizer, read_vocabulary
from compress.exports.load import load_export
from compress.forms.int8 import Int8
from compress.forms.quantised import Quantised
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.methods.svd import SVD
from compress.models.resolve import SourceModel

GEMMA2 = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "query_pre_attn_scalar": 8},
    **{"sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def read_back(data: np.ndarray, name: str) -> torch.Tensor:
    """Blocks as the gguf package dequantises them."""
    from gguf import GGMLQuantizationType

    return torch.from_numpy(dequantize(data, GGMLQuantizationType[name]))


# Blocks


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_codes_of_a_symmetric_grid_are_the_same_numbers_in_blocks(
    bits: int, group_size: int
) -> None:
    form = quantised(torch.randn(5, 96), bits=bits, group_size=group_size)
    kind = symmetric_type(bits)
    data = quantised_blocks(form, kind)
    assert data.shape == (5, 3 * kind.n_bytes)
    assert torch.equal(read_back(data, kind.name), form.dense())


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_zero_points_become_offsets_without_a_change(bits: int) -> None:
    form = quantised(torch.randn(6, 64), bits=bits, zeros="asymmetric")
    kind = offset_type(bits)
    assert kind is not None
    assert torch.equal(read_back(quantised_blocks(form, kind), kind.name), form.dense())


def test_offsets_of_an_affine_grid_are_stored_as_they_are() -> None:
    form = quantised(torch.randn(4, 64)).with_offsets(torch.randn(4, 2).bfloat16().float())
    kind = type_of(form)
    assert kind is not None
    assert kind.name == "Q4_1"
    assert torch.equal(read_back(quantised_blocks(form, kind), "Q4_1"), form.dense())


def test_rows_of_bytes_have_the_scale_of_their_row_in_every_block() -> None:
    codes = torch.randint(-128, 128, (7, 64), dtype=torch.int8)
    form = Int8(codes, (torch.rand(7) + 0.1).half())
    assert torch.equal(read_back(row_blocks(form), Q8_0.name), form.dense())


def test_a_number_that_fp16_does_not_hold_is_refused() -> None:
    form = quantised(torch.randn(2, 32))
    wide = Quantised(form.shape, 4, 32, {"qweight": form.qweight, "scales": form.scales.bfloat16()})
    wide.scales[0, 1] = 2.0**-30 * 1.5
    with pytest.raises(ValueError, match="is no fp16 number"):
        quantised_blocks(wide, symmetric_type(4))


def test_a_block_takes_the_bytes_that_the_gguf_package_says() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for kind in TYPES:
        assert GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]] == (32, kind.n_bytes)


def test_grids_that_no_type_has_are_refused() -> None:
    wide = RTN(bits=8, group_size=32, symmetry="asymmetric")
    assert "blocks with an offset hold 4 bits or 5" in GgufExporter.problem(wide, (64, 64))
    unordered = GPTQ(group_size=32, act_order="desc_act")
    assert "out of order" in GgufExporter.problem(unordered, (64, 64))
    assert "does not quantise" in GgufExporter.problem(SVD(), (64, 64))
    assert GgufExporter.problem(RTN(bits=5, symmetry="affine"), (64, 64)) == ""


def test_inputs_that_are_no_whole_blocks_are_stored_in_floats() -> None:
    assert "no multiple of 32" in GgufExporter.stores_dense(RTN(group_size=8), (64, 48))
    assert "whole blocks" in GgufExporter.stores_dense(RTN(group_size=16), (64, 64))
    assert GgufExporter.stores_dense(EoRA(rank=2, base=RTN(group_size=-1)), (64, 64)) == ""


# Names, rows and keys


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gemma2"])
def test_every_parameter_has_one_name_in_a_file(family: str) -> None:
    options = GEMMA2 if family == "gemma2" else TINY[family]
    config = AutoConfig.for_model(family, vocab_size=128, **options)
    names = Names(config)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = [
        place.name
        for name in model.state_dict()
        if name not in tied
        for place, _ in names.tensor(name)
    ]
    assert len(set(found)) == len(found)
    assert all(len(name.encode()) < 64 for name in found)


def test_queries_and_keys_of_llama_lie_as_llama_cpp_rotates_them(tmp_path: Path) -> None:
    """Frequency k turns rows 2k and 2k + 1 of a head there, and rows k and k + half of it here."""
    made = compressed(tmp_path / "source", num_key_value_heads=2)
    folder = export(made, tmp_path / "gguf", "gguf")
    tensors = {t.name: t for t in GGUFReader(str(model_files(folder)[0])).tensors}
    for layer, n_heads in (("q_proj", 4), ("k_proj", 2)):
        form = made.layers[f"model.layers.0.self_attn.{layer}"].form
        heads = form.terms[0].dense().reshape(n_heads, 2, 4, 32)
        stored = tensors[f"blk.0.attn_{layer[0]}.weight"]
        found = read_back(np.array(stored.data), "Q4_0").reshape(n_heads, 4, 2, 32)
        assert torch.equal(found.transpose(1, 2), heads)
        up = read_factors(folder)[stored.name].up.weight.reshape(n_heads, 4, 2, -1)
        assert torch.equal(
            up.transpose(1, 2).reshape(n_heads * 8, -1), form.terms[1].up.weight.detach()
        )


def test_norms_of_gemma_hold_the_one_that_the_model_adds(tmp_path: Path) -> None:
    made = compressed(tmp_path / "source", "gemma3_text", query_pre_attn_scalar=8)
    folder = export(made, tmp_path / "gguf", "gguf")
    tensors = {t.name: t for t in GGUFReader(str(model_files(folder)[0])).tensors}
    norm = made.model.get_submodule("model.layers.1.pre_feedforward_layernorm").weight
    assert torch.equal(torch.from_numpy(np.array(tensors["blk.1.ffn_norm.weight"].data)), norm + 1)
    assert "output.weight" not in tensors


def test_an_adapter_scales_every_layer_by_one(tmp_path: Path) -> None:
    made = compressed(
        tmp_path / "source",
        make_form=lambda name, weight: corrected(weight, rank=2 if "down" in name else 4),
    )
    reader = GGUFReader(str(export(made, tmp_path / "gguf", "gguf") / FILE))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["adapter.lora.alpha"] == 0.0
    assert (keys["general.type"], keys["adapter.type"]) == ("adapter", "lora")
    assert len(reader.tensors) == 2 * len(made.layers)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 256}),
        pytest.param("gemma3_text", {"query_pre_attn_scalar": 8}, marks=pytest.mark.slow),
        ("phi3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
    ids=["llama, tied, biases", "llama 3", "gemma3", "phi3", "qwen3, tied"],
)
def test_a_model_is_made_of_the_keys_and_tensors_alone(
    tmp_path: Path, family: str, changes: dict[str, object]
) -> None:
    made = compressed(tmp_path / "source", family, **changes)  # type: ignore[arg-type]
    folder = export(made, tmp_path / "gguf", "gguf")
    torch.testing.assert_close(logits(load_export(folder)), made.logits(), rtol=0, atol=2e-5)


def test_the_keys_are_those_of_the_configuration(tmp_path: Path) -> None:
    made = compressed(tmp_path / "source", "qwen3")
    reader = GGUFReader(str(model_files(export(made, tmp_path / "gguf", "gguf"))[0]))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    config = made.model.config
    assert keys["general.architecture"] == "qwen3"
    assert keys["general.file_type"] == 2  # MOSTLY_Q4_0
    assert keys["general.quantization_version"] == 2
    assert keys["qwen3.block_count"] == config.num_hidden_layers
    assert keys["qwen3.attention.key_length"] == keys["qwen3.attention.value_length"] == 8
    assert keys["qwen3.rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert len(keys["tokenizer.ggml.tokens"]) == config.vocab_size
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.ggml.add_bos_token"] is False


def test_a_tensor_that_is_absent_or_unknown_is_an_error(tmp_path: Path) -> None:
    made = compressed(tmp_path / "source")
    path = model_files(export(made, tmp_path / "gguf", "gguf"))[0]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_norm.weight", b"blk.1.attn_more.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor blk\.1\.attn_norm\.weight"):
        load_export(path.parent)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_export(path.parent)


# Experts


@pytest.mark.slow
@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("qwen2_moe", {"moe_intermediate_size": 32}),
        ("qwen3_moe", {"moe_intermediate_size": 32, "norm_topk_prob": True}),
    ],
)
def test_experts_of_a_layer_are_stacked_and_read_back(
    tmp_path: Path, family: str, changes: dict[str, object]
) -> None:
    save_tiny(tmp_path / "model", family, **changes)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    job = recipe(tmp_path, export=("gguf",), method=RTN(group_size=32))
    plan, report = compress.plan(job).plan, compress.run(job)
    assert report.exports[0].relative_difference < 1e-5
    assert report.exports[0].tensor_bytes == plan.written_bytes("gguf")
    reader = GGUFReader(str(model_files(tmp_path / "out")[0]))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors["blk.0.ffn_gate_exps.weight"].shape)[2] == 4
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


def test_experts_of_two_types_are_refused_at_plan() -> None:
    config = tiny_model("qwen3_moe", moe_intermediate_size=32).config
    names = [f"model.layers.0.mlp.experts.{k}.gate_proj" for k in range(4)]
    shapes = dict.fromkeys(names, (32, 32))
    from compress.exports.gguf.planned import problem_of_stacks

    even = dict.fromkeys(names, RTN(group_size=32))
    assert problem_of_stacks(even, shapes, config) == ""
    assert "Q4_0 and Q8_0" in problem_of_stacks(even | {names[1]: RTN(bits=8)}, shapes, config)
    assert "3 of the 4" in problem_of_stacks(
        {name: even[name] for name in names[:3]}, {name: (32, 32) for name in names[:3]}, config
    )


# Embeddings


@pytest.mark.slow
@pytest.mark.usefixtures("quick_verification")
def test_embeddings_and_heads_are_in_as_many_bits_as_asked_for(workspace: Path) -> None:
    job = recipe(workspace, export=("gguf",), method=RTN(group_size=32), embeddings="5", head="4")
    plan, report = compress.plan(job).plan, compress.run(job)
    assert report.exports[0].tensor_bytes == plan.written_bytes("gguf")
    tensors = {t.name: t for t in GGUFReader(str(model_files(workspace / "out")[0])).tensors}
    assert tensors["token_embd.weight"].tensor_type.name == "Q5_0"
    assert tensors["output.weight"].tensor_type.name == "Q4_0"


# Refusals


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "gpt2 is none of the families"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gemma3_text", {"query_pre_attn_scalar": 32}, "llama.cpp takes 8"),
        (
            "gemma3_text",
            {"query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 6},
            "layer_types",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, changes: dict[str, object], reason: str
) -> None:
    assert reason in problem_of_config(tiny_model(family, **changes).config, "lm_head")


def test_scalings_without_a_key_are_refused() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic" in problem_of_rope(tiny_model("llama", rope_parameters=dynamic).config)
    llama3 = tiny_model("qwen3", rope_parameters=LLAMA3).config
    assert "no factors of frequencies" in problem_of_rope(llama3)
    assert problem_of_rope(tiny_model("llama").config) == ""


def test_factors_of_llama_3_divide_what_transformers_divides() -> None:
    config = tiny_model("llama", rope_parameters=LLAMA3, max_position_embeddings=256).config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(4) / 4)
    found = plain / rope_tensors(config)["rope_freqs.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_window_that_llama_cpp_does_not_know_limits_the_context() -> None:
    narrow = tiny_model("mistral", sliding_window=8).config
    assert context_of(narrow) == 8
    assert "8 tokens and not" in GgufExporter.warnings_of_model(narrow)[0]
    assert GgufExporter.warnings_of_model(tiny_model("llama").config) == ()
    assert (
        context_of(tiny_model("mistral", sliding_window=None, max_position_embeddings=99).config)
        == 99
    )


def test_a_plan_names_the_model_that_it_refuses(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    source = SourceModel(str(tmp_path), tmp_path, None, (), None)
    config = tiny_model("llama").config
    assert GgufExporter.problem_of_model(source, config, {}, {}) == ""
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_bytes())
    definition["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(definition), encoding="utf-8")
    assert "no name for the rule" in GgufExporter.problem_of_model(source, config, {}, {})


# Vocabularies


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **special: str) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.mark.parametrize(
    ("steps", "ignores_merges", "rule"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], 0, "gpt-2"),
        (
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ],
            0,
            "smollm",
        ),
        ("gpt4", 0, "dbrx"),
        ("gpt4", 1, "llama-bpe"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], 1, ""),
    ],
)
def test_the_rule_that_splits_text_has_llama_cpps_name(
    tmp_path: Path, steps: object, ignores_merges: int, rule: str
) -> None:
    from tokenizers import Regex

    if steps == "gpt4":
        split = pre_tokenizers.Split(Regex(GPT4), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], ignore_merges=bool(ignores_merges)
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    save_tokenizer(tmp_path, tokenizer)
    if rule:
        assert problem_of_tokenizer(tmp_path, 3) == ""
        assert read_vocabulary(tmp_path, 3).rule == rule
    else:
        assert "no name for the rule" in problem_of_tokenizer(tmp_path, 3)
    assert "3 tokens, and its embeddings 2 rows" in problem_of_tokenizer(tmp_path, 2)


def test_merges_of_characters_become_scores_in_their_order(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6}
    merges = [("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_tokens([AddedToken("a▁tag", special=False)])
    save_tokenizer(tmp_path, tokenizer)
    found = read_vocabulary(tmp_path, 10)
    assert (found.model, found.rule, found.space_prefix) == ("llama", "default", True)
    assert found.scores is not None
    assert found.scores[5] > found.scores[6]
    # Types: unknown 2, byte 6, user-defined 4, unused 5.
    assert [found.kinds[k] for k in (0, 1, 7, 9)] == [2, 6, 4, 5]
    assert [found.tokens[k] for k in (7, 9)] == ["a tag", "[PAD9]"]


def test_every_family_has_a_name_that_the_gguf_package_knows() -> None:
    from gguf import MODEL_ARCH_NAMES

    assert {family.architecture for family in FAMILIES.values()} <= set(MODEL_ARCH_NAMES.values())


def test_a_configuration_is_read_from_the_keys(tmp_path: Path) -> None:
    made = compressed(tmp_path / "source", "gemma3_text", query_pre_attn_scalar=8)
    found = config_of(export(made, tmp_path / "gguf", "gguf"))
    for name in ("hidden_size", "head_dim", "sliding_window", "layer_types", "rope_parameters"):
        assert getattr(found, name) == getattr(made.model.config, name)
    assert IDS.max() < found.vocab_size


# The engine


def test_llama_cpp_is_given_the_file_and_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compressed(tmp_path / "source", make_form=lambda _, weight: corrected(weight, rank=4))
    folder = export(made, tmp_path / "gguf", "gguf")
    given = Export(
        format="gguf",
        folder=folder,
        traits=GgufExporter.traits,
        model=folder,
        adapter=None,
        config=GgufExporter.config_in(folder),
        origin=Origin.ANYBODY,
        dtype="float32",
    )
    fork = {"ik_llama_cpp"}

    def interpreter(_: str, modules: tuple[str, ...]) -> Path | None:
        return Path("python") if set(modules) <= fork else None

    monkeypatch.setattr("compress.engines.llama_cpp.interpreter", interpreter)
    assert LlamaCpp.request(given) == {
        "bindings": "ik_llama_cpp",
        "model": str(model_files(folder)[0]),
        "adapter": str(folder / FILE),
    }
    assert "rank 4" in LlamaCpp.problem(given)
    assert LlamaCpp.arithmetic(given, {}).activation_bits == 8
    fork.add("llama_cpp")
    assert LlamaCpp.modules(given) == ("llama_cpp",)
    assert LlamaCpp.problem(given) == ""


# imatrix.gguf


def test_an_imatrix_holds_the_squares_of_every_layers_inputs(tmp_path: Path) -> None:
    config = tiny_model("qwen3_moe").config
    x, y = torch.randn(7, 32), torch.randn(3, 32)
    inputs = [
        ("model.layers.0.self_attn.q_proj", Gram.of(x, 1)),
        ("model.layers.0.mlp.experts.2.gate_proj", Gram.of(y, 1)),
    ]
    text = Text(sources=["a.txt"], n_sequences=1, seq_len=7)
    assert write_imatrix(tmp_path / "imatrix.gguf", config, inputs, text) == 2
    reader = GGUFReader(str(tmp_path / "imatrix.gguf"))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["a.txt"]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (1, 7)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    torch.testing.assert_close(found["blk.0.attn_q.weight.in_sum2"][0], (x**2).sum(0))
    assert found["blk.0.attn_q.weight.counts"].tolist() == [[7.0]]
    torch.testing.assert_close(found["blk.0.ffn_gate_exps.weight.in_sum2"][2], (y**2).sum(0))
    assert found["blk.0.ffn_gate_exps.weight.counts"].flatten().tolist() == [0.0, 0.0, 3.0, 0.0]


def test_calibrating_writes_an_imatrix_of_all_layers(workspace: Path) -> None:
    path = workspace / "imatrix.gguf"
    job = recipe(workspace, method=GPTQ(group_size=32), statistics="reuse")
    compress.calibrate(job, imatrix=path)
    sums = [t for t in GGUFReader(str(path)).tensors if t.name.endswith(".in_sum2")]
    assert len(sums) == 3 * 7
    assert all((np.array(tensor.data) > 0).all() for tensor in sums)


def test_an_imatrix_of_layers_without_names_is_refused(workspace: Path) -> None:
    save_tiny(workspace / "model", "gpt2")
    with pytest.raises(RecipeError, match="imatrix: gpt2 is none of the families"):
        compress.calibrate(recipe(workspace), imatrix=workspace / "imatrix.gguf")
