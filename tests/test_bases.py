"""Compressed checkpoints of other tools: each format is read as its authors meant it, or refused by name."""

import json
import math
from pathlib import Path

import foreign
import pytest
import torch
from exported import compressed, export, quantised
from families import save_tiny
from foreign import change, change_config, gptq_layer, grid, packed_config, packed_layer, write
from safetensors.torch import load_file

from compress.bases import AsDense, open_base
from compress.errors import CheckpointError
from compress.exports.load import load_export
from compress.forms.dense import Dense
from compress.forms.quantised import Quantised

FOREIGN = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "foreign"
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    save_tiny(folder, num_key_value_heads=4)
    return folder


def weight(source, name=LAYER):
    return load_file(source / "model.safetensors")[f"{name}.weight"]


def equal_to_plain_code(folder, expected, name=LAYER):
    form = open_base(folder).form(name)
    torch.testing.assert_close(form.dense(), expected, rtol=1e-6, atol=1e-8)
    return form


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_of_every_width_and_version_means_what_plain_code_reads(
    source, tmp_path, bits, kind, version
):
    config = {**foreign.GPTQ, "bits": bits, "sym": kind == "symmetric"}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    made = grid(weight(source), bits, 16, kind)
    folder = write(
        source, tmp_path / "base", config, lambda w: gptq_layer(grid(w, bits, 16, kind), version)
    )
    form = equal_to_plain_code(folder, made.dense())
    assert isinstance(form, Quantised)
    assert form.symmetric == (kind == "symmetric")


@pytest.mark.parametrize(
    ("size", "order"), [(16, "mixed"), (24, "in order"), (24, "mixed"), (-1, "in order")]
)
def test_gptq_groups_may_be_mixed_ragged_or_whole_rows(source, tmp_path, size, order):
    config = {**foreign.GPTQ, "group_size": size, "desc_act": order == "mixed"}

    def made(w):
        return grid(w, 4, w.shape[1] if size == -1 else size, "asymmetric", order)

    folder = write(source, tmp_path / "base", config, lambda w: gptq_layer(made(w)))
    equal_to_plain_code(folder, made(weight(source)).dense())


def test_what_auto_gptq_writes_is_found_under_its_own_names(source, tmp_path):
    """0.7.1: gptq_model-4bit-128g.safetensors, quantize_config.json without a format, the tied head written twice."""
    stem = "gptq_model-4bit-16g"
    folder = write(source, tmp_path / "base", {}, lambda w: gptq_layer(grid(w)), stem=stem)
    change_config(folder, quantization_config=None)
    settings = {key: value for key, value in foreign.GPTQ.items() if key != "quant_method"}
    settings |= {"damp_percent": 0.01, "model_file_base_name": stem}
    (folder / "quantize_config.json").write_text(json.dumps(settings))

    def double(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for name in ("q_proj", "o_proj"):
            tensors[f"model.layers.0.self_attn.{name}.bias"] = torch.zeros(32)

    change(folder, double, stem)
    base = open_base(folder)
    assert base.format == "gptq"
    equal_to_plain_code(folder, grid(weight(source)).dense())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("size", "order"), [(16, "in order"), (16, "mixed"), (None, "in order"), (24, "in order")]
)
def test_pack_quantized_means_what_plain_code_reads(source, tmp_path, bits, kind, size, order):
    def made(w):
        return grid(w, bits, size or w.shape[1], kind, order)

    config = packed_config(bits, size, symmetric=kind == "symmetric")
    folder = write(source, tmp_path / "base", config, lambda w: packed_layer(made(w)))
    equal_to_plain_code(folder, made(weight(source)).dense())


def test_awq_means_what_plain_code_reads(source, tmp_path):
    def made(w):
        return grid(w, 4, 16, "asymmetric")

    folder = write(source, tmp_path / "base", foreign.AWQ, lambda w: foreign.awq_layer(made(w)))
    equal_to_plain_code(folder, made(weight(source)).dense())
    old = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    change_config(folder, quantization_config=None)
    (folder / "quant_config.json").write_text(json.dumps(old))
    equal_to_plain_code(folder, made(weight(source)).dense())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_nf4_means_what_plain_code_reads(source, tmp_path, storage):
    folder = write(
        *(source, tmp_path / "base", foreign.BITSANDBYTES),
        lambda w: foreign.bitsandbytes_layer(foreign.blocks(w), storage=storage),
    )
    equal_to_plain_code(folder, foreign.blocks(weight(source)).dense())
    assert open_base(folder).description == "bitsandbytes, nf4"


def test_sizes_of_blocks_may_be_codes_themselves(source, tmp_path):
    def made(w):
        one, *nested = foreign.twice(foreign.blocks(w))
        return foreign.bitsandbytes_layer(one, tuple(nested))

    config = {**foreign.BITSANDBYTES, "bnb_4bit_use_double_quant": True}
    folder = write(source, tmp_path / "base", config, made)
    equal_to_plain_code(folder, foreign.twice(foreign.blocks(weight(source)))[0].dense())
    assert open_base(folder).description == "bitsandbytes, nf4, double quantised"


def test_native_layers_are_the_forms_that_were_written(tmp_path):
    made = compressed(tmp_path / "source")
    base = open_base(export(made, tmp_path / "native", "native"))
    assert set(base.layers) == set(made.layers)
    for name, layer in made.layers.items():
        assert torch.equal(base.form(name).dense(), layer.form.dense())
        assert base.stored_bytes(name) == layer.form.n_bytes()
    assert base.config["model_type"] == "llama"
    assert base.description == "native, 4-bit g32, low rank"


def test_scales_beyond_fp16_make_a_dense_weight_as_the_format_computes_it(source, tmp_path):
    def made(w):
        one = grid(w)
        scales = (one.scales * 1e-7).bfloat16()
        return foreign.Grid(one.codes, scales.float(), one.zeros, one.groups, 4)

    folder = write(
        source, tmp_path / "base", packed_config(), lambda w: packed_layer(made(w), torch.bfloat16)
    )
    form = open_base(folder).form(LAYER)
    assert isinstance(form, Dense)
    assert torch.equal(form.weight, made(weight(source)).dense().bfloat16())


def test_layers_may_have_settings_of_their_own(source, tmp_path):
    def bits_of(w):
        return 8 if w.shape[1] == 64 else 4

    config = {**foreign.GPTQ, "dynamic": {r"+:.*\.down_proj": {"bits": 8}, r"-:.*head": {}}}
    folder = write(source, tmp_path / "gptq", config, lambda w: gptq_layer(grid(w, bits_of(w))))
    assert equal_to_plain_code(folder, grid(weight(source), 8).dense()).bits == 8
    config = packed_config()
    eight = packed_config(8)["config_groups"]["group_0"] | {"targets": [r"re:.*down_proj$"]}
    config["config_groups"] = {"a": eight, "b": config["config_groups"]["group_0"]}
    folder = write(source, tmp_path / "packed", config, lambda w: packed_layer(grid(w, bits_of(w))))
    assert equal_to_plain_code(folder, grid(weight(source), 8).dense()).bits == 8


def test_a_sparse_checkpoint_in_ordinary_tensors_is_ordinary(source, tmp_path):
    config = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"},
    }
    folder = write(source, tmp_path / "base", config, lambda w: {"weight": w})
    base = open_base(folder)
    assert base.layers == ()
    assert "sparse 2:4" in base.description
    load_export(folder)


@pytest.mark.parametrize("make", ["gptq", "awq", "packed", "bitsandbytes"])
def test_every_packed_format_loads_as_the_model_with_its_weights(source, tmp_path, make):
    config, layer, rounded = {
        "gptq": (foreign.GPTQ, gptq_layer, grid),
        "awq": (foreign.AWQ, foreign.awq_layer, grid),
        "packed": (packed_config(), packed_layer, grid),
        "bitsandbytes": (foreign.BITSANDBYTES, foreign.bitsandbytes_layer, foreign.blocks),
    }[make]
    folder = write(source, tmp_path / "base", config, lambda w: layer(rounded(w)))
    plain = write(source, tmp_path / "plain", {}, lambda w: {"weight": rounded(w).dense()})
    change_config(plain, quantization_config=None)
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        found, expected = (load_export(path)(input_ids=ids).logits for path in (folder, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_as_dense_has_the_names_of_an_ordinary_checkpoint(source, tmp_path):
    folder = write(source, tmp_path / "base", foreign.GPTQ, lambda w: gptq_layer(grid(w)))
    model = load_export(source)
    view = AsDense(open_base(folder), model)
    assert set(view) == set(load_file(source / "model.safetensors"))
    assert view.shape(f"{LAYER}.weight") == (32, 64)
    assert torch.equal(view[f"{LAYER}.weight"], view.base.form(LAYER).dense())
    parts = ("qweight", "qzeros", "scales", "g_idx")
    stored = sum(view.base.reader.nbytes(f"{LAYER}.{part}") for part in parts)
    assert view.nbytes(f"{LAYER}.weight") == stored


# What is refused


def gptq_base(source, tmp_path):
    return write(source, tmp_path / "base", foreign.GPTQ, lambda w: gptq_layer(grid(w)))


def packed_base(source, tmp_path):
    return write(source, tmp_path / "base", packed_config(), lambda w: packed_layer(grid(w)))


def awq_base(source, tmp_path):
    return write(source, tmp_path / "base", foreign.AWQ, lambda w: foreign.awq_layer(grid(w)))


def bitsandbytes_base(source, tmp_path):
    def made(w):
        one, *nested = foreign.twice(foreign.blocks(w))
        return foreign.bitsandbytes_layer(one, tuple(nested))

    return write(source, tmp_path / "base", foreign.BITSANDBYTES, made)


def in_words(**changes):
    """The JSON of the layer's quant_state with these entries; None takes one away."""

    def edit(tensors):
        key = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
        words = json.loads(bytes(tensors[key].tolist())) | changes
        words = {name: value for name, value in words.items() if value is not None}
        tensors[key] = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)

    return edit


def set_to(part, value):
    def edit(tensors):
        tensors[f"{LAYER}.{part}"] = value(tensors[f"{LAYER}.{part}"]).contiguous()

    return edit


def without(part):
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


@pytest.mark.parametrize(
    ("base", "edit", "message"),
    [
        (gptq_base, without("scales"), r"down_proj\.scales is missing"),
        (gptq_base, without("qweight"), r"down_proj\.g_idx.*without the qweight"),
        (
            gptq_base,
            set_to("scales", lambda t: t[:-1]),
            r"scales has the shape \(3, 32\); .* \(4, 32\)",
        ),
        (gptq_base, set_to("qzeros", lambda t: t[:, :-1]), r"qzeros has the shape \(4, 3\)"),
        (gptq_base, set_to("qweight", lambda t: t.float()), r"qweight is torch\.float32"),
        (gptq_base, set_to("g_idx", lambda t: t + 1), "g_idx names groups 1 to 4; .* 0 to 3"),
        (gptq_base, set_to("g_idx", lambda t: t - 1), "g_idx names groups -1 to 2"),
        (gptq_base, set_to("g_idx", lambda t: t[:-1]), r"g_idx has the shape \(63,\)"),
        (gptq_base, set_to("g_idx", lambda t: t.float()), r"g_idx is torch\.float32"),
        (gptq_base, set_to("qzeros", lambda t: t.float()), r"qzeros is stored as float32"),
        (gptq_base, set_to("qweight", lambda t: t[0, 0]), r"qweight is torch\.int32 \(\)"),
        (
            gptq_base,
            set_to("scales", lambda t: t.int()),
            "down_proj: its scales are stored as int32",
        ),
        (gptq_base, set_to("scales", lambda t: t * torch.inf), "down_proj: its scales .* finite"),
        (packed_base, without("weight_scale"), r"down_proj\.weight_.* without the weight_scale"),
        (packed_base, without("weight_shape"), r"down_proj\.weight_shape is missing"),
        (packed_base, set_to("weight_shape", lambda t: t * 0), r"weight_shape is \[0, 0\]"),
        (packed_base, set_to("weight_packed", lambda t: t[:, 1:]), r"weight_packed has the shape"),
        (packed_base, set_to("weight_packed", lambda t: t.long()), "stored as int64.*int32"),
        (packed_base, set_to("weight_scale", lambda t: t[:, 1:]), r"\(32, 3\);.* \(32, 4\)"),
        (awq_base, set_to("scales", lambda t: t[1:]), r"scales has the shape \(3, 32\)"),
        (awq_base, set_to("qzeros", lambda t: t[1:]), r"qzeros has the shape \(3, 4\)"),
        (awq_base, without("qzeros"), r"down_proj\.qzeros is missing"),
        (awq_base, set_to("qzeros", lambda t: t.float()), "qzeros is stored as float32"),
        (awq_base, set_to("qweight", lambda t: t[0]), r"qweight is torch\.int32 \(4,\)"),
        (bitsandbytes_base, without("weight"), r"down_proj\.weight is missing"),
        (bitsandbytes_base, set_to("weight", lambda t: t[1:]), r"weight has 1023 bytes"),
        (bitsandbytes_base, without("weight.absmax"), r"without the weight\.absmax"),
        (bitsandbytes_base, without("weight.quant_map"), r"quant_map is missing"),
        (bitsandbytes_base, set_to("weight.quant_map", lambda t: t[1:]), r"\(15,\);.* \(16,\)"),
        (bitsandbytes_base, set_to("weight.quant_map", lambda t: t / 0), r"quant_map.* finite"),
        (bitsandbytes_base, set_to("weight.quant_map", lambda t: t * 2), r"not the table of nf4"),
        (bitsandbytes_base, set_to("weight.absmax", lambda t: t[1:]), r"\(42,\);.* \(43,\)"),
        (
            bitsandbytes_base,
            set_to("weight.absmax", lambda t: t.float()),
            "float32; it must be uint8",
        ),
        (
            bitsandbytes_base,
            in_words(dtype="float16", nested_offset=1e6),
            "weight reaches beyond float16",
        ),
        (bitsandbytes_base, set_to("weight.nested_absmax", lambda t: t[1:]), r"\(2,\);.* \(3,\)"),
        (bitsandbytes_base, without("weight.nested_quant_map"), "nested_quant_map is missing"),
        (
            bitsandbytes_base,
            without("weight.quant_state.bitsandbytes__nf4"),
            r"down_proj has 0 of .*bitsandbytes__nf4",
        ),
        (
            bitsandbytes_base,
            set_to("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-1]),
            "is not valid JSON",
        ),
        (bitsandbytes_base, in_words(shape=[64, 64]), r"\(64, 64\) in 4 bits take 2048"),
        (bitsandbytes_base, in_words(shape=[-32, -64]), "shape is two sizes"),
        (bitsandbytes_base, in_words(shape=[32, 64, 1]), "shape is two sizes"),
        (bitsandbytes_base, in_words(blocksize=True), "blocksize is 1 or more"),
        (bitsandbytes_base, in_words(dtype=["float16"]), "dtype is one of float32, float16"),
        (bitsandbytes_base, in_words(quant_type="fp4"), "quant_type is 'nf4', as the tensor's"),
        (bitsandbytes_base, in_words(nested_offset=None), "nested_offset is a finite number"),
        (bitsandbytes_base, in_words(nested_offset=math.nan), "nested_offset is a finite number"),
        (bitsandbytes_base, in_words(nested_blocksize=0), "nested_blocksize is 1 or more"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(source, tmp_path, base, edit, message):
    folder = base(source, tmp_path)
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        open_base(folder).form(LAYER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq' is not supported; there are awq"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            r"load_in_8bit \(LLM\.int8\) quantises activations",
        ),
        ({**foreign.GPTQ, "bits": 5}, "5 bits are not supported; supported: 2, 3, 4, 8"),
        ({**foreign.GPTQ, "group_size": 0}, "must be -1, or 1 or more; got 0"),
        ({**foreign.GPTQ, "group_size": True}, "must be -1, or 1 or more; got True"),
        ({**foreign.GPTQ, "bits": 4.0}, "4.0 bits are not supported"),
        ({**foreign.GPTQ, "dynamic": "down"}, "dynamic in .* is 'down', which is not a mapping"),
        ({**foreign.GPTQ, "dynamic": {"+:(": {}}}, "'\\(' in .* is not a valid regular expression"),
        ({**foreign.GPTQ, "dynamic": {".*": [4]}}, r"\.\* in .* is \[4\], which is not a mapping"),
        ({**foreign.GPTQ, "checkpoint_format": ["gptq"]}, "checkpoint_format \"\\['gptq'\\]\""),
        ({**packed_config(), "config_groups": ["a"]}, r"config_groups .* is \['a'\], which is not"),
        (
            {**packed_config(), "config_groups": {"a": "b"}},
            "a in .* is 'b', which is not a mapping",
        ),
        (
            {**packed_config(), "sparsity_config": "2:4"},
            "sparsity_config .* is '2:4', which is not",
        ),
        ({**foreign.GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (
            {**foreign.AWQ, "version": "gemv"},
            "version 'gemv' of awq is not supported; supported: gemm",
        ),
        ({**foreign.AWQ, "bits": 8}, "8 bits of awq"),
        (
            {**packed_config(), "format": "int-quantized"},
            "format 'int-quantized' is not supported",
        ),
        (
            {**packed_config(), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        ({**packed_config(), "transform_config": {"u": 1}}, "transforms of the hidden states"),
        (packed_config(), "no tensor's name ends in .weight_scale"),
    ],
)
def test_what_is_not_read_is_refused_with_what_was_found(source, tmp_path, settings, message):
    folder = write(source, tmp_path / "base", settings, lambda w: gptq_layer(grid(w)))
    with pytest.raises(CheckpointError, match=message):
        open_base(folder).form(LAYER)


def test_quantised_activations_are_refused(source, tmp_path):
    config = packed_config()
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    folder = write(source, tmp_path / "base", config, lambda w: packed_layer(grid(w)))
    with pytest.raises(CheckpointError, match="input_activations are quantised too"):
        open_base(folder)


def test_packed_tensors_without_a_word_in_the_config_are_refused(source, tmp_path):
    folder = gptq_base(source, tmp_path)
    change_config(folder, quantization_config=None)
    with pytest.raises(
        CheckpointError, match=r"qweight.* are stored as int32.*no quantization_config"
    ):
        open_base(folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_base(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"there is no config\.json in it"):
        open_base(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_base(tmp_path)


@pytest.mark.parametrize("part", ["scales", "qweight"])
def test_a_native_tensor_of_another_shape_is_refused(tmp_path, part):
    made = compressed(tmp_path / "source", make_form=lambda _, w: quantised(w))
    folder = export(made, tmp_path / "native", "native")
    key = f"{LAYER}.form.{part}"
    change(folder, lambda tensors: tensors.update({key: tensors[key][1:]}))
    with pytest.raises(CheckpointError, match=rf"down_proj\.form\.{part} is \("):
        open_base(folder).form(LAYER)


def test_a_native_config_without_its_table_is_refused(tmp_path):
    made = compressed(tmp_path / "source", make_form=lambda _, w: quantised(w))
    folder = export(made, tmp_path / "native", "native")
    change_config(folder, layers=None)
    with pytest.raises(CheckpointError, match=r"config\.json lacks layers"):
        open_base(folder)


# Files of the tools themselves


@pytest.mark.parametrize(
    ("name", "n_packed"),
    [
        ("gptqmodel_w4_g128_ragged", 7),
        ("autoround_w4_g64_negative_scales", 7),
        ("compressed_tensors_w4_g64", 7),
        ("sparsegpt_2of4_dense", 0),
    ],
)
def test_checkpoints_of_other_tools_are_near_the_original(name, n_packed):
    if not (FOREIGN / name).is_dir():
        pytest.skip("shared/data/foreign is not here")
    base = open_base(FOREIGN / name)
    assert len(base.layers) == n_packed
    original = load_file(FOREIGN / "original" / "model.safetensors")
    for layer in base.layers:
        own = original[f"{layer}.weight"].float()
        assert float((base.form(layer).dense() - own).norm() / own.norm()) < 0.25
