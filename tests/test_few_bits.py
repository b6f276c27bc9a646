"""Checkpoints in 8 and 4 bits of floating point are read to the bit, and refused by name where they are not whole."""

import few_bits
import pytest
import torch
from families import save_tiny
from foreign import change, change_config, grid, packed_config, packed_layer, write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from compress.bases import open_base
from compress.errors import CheckpointError

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    save_tiny(folder, num_key_value_heads=4)
    return folder


def weight(source):
    return load_file(source / "model.safetensors")[f"{LAYER}.weight"].float()


FORMATS = {
    "fp8": (few_bits.FP8, few_bits.fp8_layer),
    "fp8, one scale": (
        {**few_bits.FP8, "weight_block_size": None},
        lambda w: few_bits.fp8_layer(w, None),
    ),
    "fp8, powers of two": (
        {**few_bits.FP8, "scale_fmt": "ue8m0"},
        lambda w: few_bits.fp8_layer(w, scale="ue8m0"),
    ),
    "fp8, exponents": ({**few_bits.FP8, "scale_fmt": "ue8m0"}, few_bits.fp8_bytes_layer),
    "float-quantized, tensor": (
        few_bits.FLOAT_TENSOR,
        lambda w: few_bits.float_quantized_layer(w, "tensor"),
    ),
    "float-quantized, channel": (
        few_bits.FLOAT_CHANNEL,
        lambda w: few_bits.float_quantized_layer(w, "channel"),
    ),
    "float-quantized, block": (
        few_bits.FLOAT_BLOCK,
        lambda w: few_bits.float_quantized_layer(w, "block"),
    ),
    "nvfp4": (few_bits.NVFP4, lambda w: few_bits.nvfp4_layer(w, "compressed-tensors")),
    "mxfp4": (few_bits.MXFP4, few_bits.mxfp4_layer),
    "modelopt": (few_bits.MODELOPT, lambda w: few_bits.nvfp4_layer(w, "modelopt")),
}
"""By name: the settings, and what makes a layer of a weight."""


def written(source, tmp_path, name, **changes):
    config, make = FORMATS[name]
    settings = {**config, **changes}
    return write(source, tmp_path / "base", settings, lambda w: make(w).tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_means_what_plain_code_reads_to_the_bit(source, tmp_path, name):
    folder = written(source, tmp_path, name)
    base = open_base(folder)
    assert len(base.layers) == 21
    assert torch.equal(base.form(LAYER).dense(), FORMATS[name][1](weight(source)).dense)
    assert base.shape(LAYER) == tuple(weight(source).shape)


@pytest.mark.parametrize("block", [(32, 32), None])
def test_fp8_means_what_transformers_reads(source, tmp_path, block):
    settings = {**few_bits.FP8, "weight_block_size": block and list(block)}
    folder = write(
        source, tmp_path / "base", settings, lambda w: few_bits.fp8_layer(w, block).tensors
    )
    config = FineGrainedFP8Config(
        weight_block_size=block, modules_to_not_convert=["lm_head"], dequantize=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    base = open_base(folder)
    for layer in base.layers:
        assert torch.equal(model.get_submodule(layer).weight, base.form(layer).dense())


def test_the_global_scales_of_nvfp4_are_inverse_to_each_other(source):
    both = [few_bits.nvfp4_layer(weight(source), writer) for writer in ("compressed-tensors", "")]
    over, times = both[0].tensors["weight_global_scale"], both[1].tensors["weight_scale_2"]
    assert float(over * times) == pytest.approx(1)
    torch.testing.assert_close(both[0].dense, both[1].dense)


def test_modelopt_may_say_it_in_a_file_beside_config_json(source, tmp_path):
    folder = written(source, tmp_path, "modelopt")
    change_config(folder, quantization_config=None)
    (folder / "hf_quant_config.json").write_text(
        '{"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": {"quant_algo": "NVFP4", '
        '"kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head", "*router*"]}}'
    )
    base = open_base(folder)
    assert base.description == "modelopt, NVFP4, groups of 16"
    assert base.producer == "modelopt:0.29.0"
    assert any("keys and values" in remark for remark in base.remarks)


def test_fp8_of_modelopt_has_one_scale_for_a_layer(source, tmp_path):
    def layer(w):
        made = few_bits.fp8_layer(w, None)
        scale = made.tensors["weight_scale_inv"]
        return few_bits.Layer({"weight": made.tensors["weight"], "weight_scale": scale}, made.read)

    settings = {**few_bits.MODELOPT, "quant_algo": "FP8"}
    folder = write(source, tmp_path / "base", settings, lambda w: layer(w).tensors)
    assert torch.equal(open_base(folder).form(LAYER).dense(), layer(weight(source)).dense)


def test_scales_of_the_cache_stand_for_no_weight(source, tmp_path):
    folder = written(source, tmp_path, "modelopt")
    key = "model.layers.0.self_attn.k_proj.k_scale"
    change(folder, lambda tensors: tensors.update({key: torch.ones(1)}))
    base = open_base(folder)
    assert base.idle == [key]
    assert key not in base.plain


DESCRIBED = {
    "fp8": "fp8, blocks of 24 x 40",
    "fp8, exponents": "fp8, blocks of 24 x 40, scales in powers of two",
    "float-quantized, channel": "compressed-tensors, FP8, whole rows",
    "nvfp4": "compressed-tensors, NVFP4, groups of 16",
    "mxfp4": "compressed-tensors, MXFP4, groups of 32",
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_format_is_described_by_its_blocks(source, tmp_path, name):
    assert open_base(written(source, tmp_path, name)).description == DESCRIBED[name]


def set_to(part, value):
    def edit(tensors):
        tensors[f"{LAYER}.{part}"] = value(tensors[f"{LAYER}.{part}"]).contiguous()

    return edit


def without(part):
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def wider(t):
    return torch.cat([t, t], dim=1)


CUT = [
    ("fp8", without("weight_scale_inv"), r"down_proj\.weight is stored as float8.*are missing"),
    ("fp8", without("weight"), r"down_proj\.weight is missing"),
    ("fp8", set_to("weight_scale_inv", lambda t: t[:1]), r"\(1, 2\); it must be \(2, 2\)"),
    ("fp8", set_to("weight_scale_inv", lambda t: t * torch.nan), "scale_inv: its scales .* finite"),
    ("fp8", set_to("weight_scale_inv", lambda t: t.int()), "its scales are stored as int32"),
    ("fp8", set_to("weight", lambda t: t[:, :40]), r"\(2, 2\); it must be \(2, 1\)"),
    ("fp8", set_to("weight", lambda t: t.bfloat16()), r"weight is bfloat16.*float8_e4m3fn"),
    ("fp8, powers of two", set_to("weight_scale_inv", lambda t: t * 3), "not in powers of two"),
    (
        "fp8, exponents",
        set_to("weight_scale_inv", lambda t: torch.full(t.shape, 255, dtype=torch.uint8)),
        "scales of 255, which stands for no number",
    ),
    ("float-quantized, channel", without("weight_scale"), r"down_proj\.weight is stored as float8"),
    ("float-quantized, channel", set_to("weight_scale", lambda t: t[1:]), r"must be \(32, 1\)"),
    ("float-quantized, tensor", without("weight"), r"down_proj\.weight is missing"),
    ("nvfp4", without("weight_global_scale"), r"weight_global_scale is missing"),
    ("nvfp4", without("weight_scale"), r"down_proj\.weight_.* without the weight_scale"),
    ("nvfp4", set_to("weight_packed", wider), r"weight_scale has the shape \(32, 4\).*\(32, 8\)"),
    ("nvfp4", set_to("weight_packed", lambda t: t[:, 1:]), "inputs in groups of 16"),
    ("nvfp4", set_to("weight_packed", lambda t: t.int()), "is int32 .* packed in uint8"),
    ("nvfp4", set_to("weight_scale", lambda t: t.float()), "stored as float32; .*float8_e4m3fn"),
    ("nvfp4", set_to("weight_global_scale", lambda t: t * 0), "global_scale is 0.0; .* above 0"),
    ("nvfp4", set_to("weight_global_scale", lambda t: t.repeat(2)), r"\(2,\); it must be \(1,\)"),
    ("mxfp4", set_to("weight_scale", lambda t: t.float()), "stored as float32; it must be uint8"),
    ("modelopt", without("weight_scale_2"), r"weight_scale_2 is missing"),
    ("modelopt", without("weight"), r"down_proj\.weight is missing"),
    ("modelopt", set_to("weight_scale", lambda t: t[:, 1:]), r"\(32, 3\); it must be \(32, 4\)"),
]


@pytest.mark.parametrize(("name", "edit", "message"), CUT)
def test_a_checkpoint_that_is_cut_short_is_refused_by_name(source, tmp_path, name, edit, message):
    folder = written(source, tmp_path, name)
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        open_base(folder).form(LAYER)


CONTRADICTORY = [
    ("fp8", {"weight_block_size": [16, 16]}, r"\(2, 2\); it must be \(2, 4\)"),
    ("fp8", {"weight_block_size": [0, 16]}, r"weight_block_size is \[0, 16\]; .* two whole"),
    ("fp8", {"modules_to_not_convert": [r"model.layers.1"]}, "layers.1.* in 8 bits, but"),
    ("fp8", {"modules_to_not_convert": "lm_head"}, "'lm_head', which is not a list of names"),
    ("fp8", {"scale_fmt": "ue8m0"}, "is not in powers of two, but scale_fmt"),
    ("fp8", {"scale_fmt": "ue5m3"}, "scale_fmt 'ue5m3' of fp8 is not supported"),
    ("fp8", {"expert_dtype": "fp4"}, "expert_dtype 'fp4' of fp8 is not supported"),
    ("nvfp4", {"format": "pack-quantized"}, "in the format pack-quantized, supported: int"),
    (
        "nvfp4",
        {"format": "float-quantized"},
        "in the format float-quantized, supported: float of 8",
    ),
    ("nvfp4", {"ignore": ["re:.*down_proj"]}, "down_proj is quantised, but ignore"),
    ("nvfp4", {"config_groups": {}}, "no config_groups entry has"),
    ("modelopt", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' of modelopt is not supported"),
    ("modelopt", {"quant_algo": "FP8"}, "weight is uint8"),
    ("modelopt", {"group_size": 32}, "group_size is 32; NVFP4 has groups of 16"),
    ("modelopt", {"ignore": ["model.layers.1.*"]}, "is quantised, but its config excludes"),
]


@pytest.mark.parametrize(("name", "changes", "message"), CONTRADICTORY)
def test_a_config_that_says_other_than_the_tensors_is_refused(
    source, tmp_path, name, changes, message
):
    folder = written(source, tmp_path, name, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_base(folder).form(LAYER)


def test_weights_that_are_not_converted_are_taken_as_they_are(source, tmp_path):
    folder = written(source, tmp_path, "fp8")
    own = weight(source).bfloat16()

    def convert_back(tensors):
        del tensors[f"{LAYER}.weight_scale_inv"]
        tensors[f"{LAYER}.weight"] = own

    change(folder, convert_back)
    settings = {**few_bits.FP8, "modules_to_not_convert": ["lm_head", LAYER]}
    change_config(folder, quantization_config=settings)
    base = open_base(folder)
    assert LAYER not in base.layers
    assert f"{LAYER}.weight" in base.plain


# gpt-oss


@pytest.fixture
def gpt_oss(tmp_path):
    """Its folder, and its experts as plain code reads them."""
    few_bits.save_gpt_oss(tmp_path / "model")
    return tmp_path / "base", few_bits.as_mxfp4(tmp_path / "model", tmp_path / "base")


def test_mxfp4_means_what_plain_code_reads_to_the_bit(gpt_oss):
    folder, meant = gpt_oss
    base = open_base(folder)
    assert set(base.stacks) == set(meant)
    for name, expected in meant.items():
        found = base.stack(name)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), expected)
    assert base.stack_shape("model.layers.0.mlp.experts.gate_up_proj") == (4, 64, 64)
    assert base.stack_shape("model.layers.0.mlp.experts.down_proj") == (4, 32, 64)


def test_mxfp4_means_what_transformers_reads(gpt_oss):
    folder, _ = gpt_oss
    config = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    base = open_base(folder)
    for name in base.stacks:
        assert torch.equal(model.get_parameter(name), base.stack(name))


EXPERTS = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{EXPERTS}_scales"), r"lacks .*down_proj_scales"),
        (lambda t: t.pop(f"{EXPERTS}_blocks"), r"lacks .*down_proj_blocks"),
        (
            lambda t: t.update({f"{EXPERTS}_scales": t[f"{EXPERTS}_scales"][:, 1:].clone()}),
            r"down_proj_scales has the shape \(4, 63, 1\); it must be \(4, 64, 1\)",
        ),
        (
            lambda t: t.update({f"{EXPERTS}_blocks": t[f"{EXPERTS}_blocks"][..., 1:].clone()}),
            r"down_proj_blocks has the shape \(4, 64, 1, 15\); it must be \(experts, outputs",
        ),
        (
            lambda t: t.update({f"{EXPERTS}_scales": t[f"{EXPERTS}_scales"].float()}),
            "down_proj_scales is stored as float32; it must be uint8",
        ),
        (lambda t: t[f"{EXPERTS}_scales"].fill_(255), "scales of 255, which stands for no number"),
        (lambda t: t[f"{EXPERTS}_scales"].fill_(254), "down_proj overflows"),
    ],
)
def test_experts_that_are_cut_short_are_refused_by_name(gpt_oss, edit, message):
    folder, _ = gpt_oss
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        open_base(folder).stack(EXPERTS)


def test_experts_that_the_config_leaves_alone_and_are_packed_are_refused(gpt_oss):
    folder, _ = gpt_oss
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1"]}
    change_config(folder, quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"layers\.1\..* is stored in 4 bits, but"):
        open_base(folder)


# compressed-tensors' words of integers


def across(codes, bits):
    """Since 0.18: codes of a row one after the other, cut into words of 32."""
    number = sum(code << (bits * k) for k, code in enumerate(codes))
    words = [number >> (32 * k) & 0xFFFFFFFF for k in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def rows_across(matrix, bits):
    return torch.tensor([across(row, bits) for row in matrix.tolist()], dtype=torch.int32)


def dense_layer(one):
    tensors = packed_layer(one) | {"weight_packed": rows_across(one.codes, one.bits)}
    if "weight_zero_point" in tensors:
        tensors["weight_zero_point"] = rows_across(one.zeros.T, one.bits).T.contiguous()
    return tensors


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_codes_that_cross_words_mean_what_plain_code_reads(source, tmp_path, bits, kind):
    made = grid(weight(source), bits, 16, kind)
    config = packed_config(bits, 16, symmetric=kind == "symmetric")
    folder = write(
        source, tmp_path / "base", config, lambda w: dense_layer(grid(w, bits, 16, kind))
    )
    found = open_base(folder).form(LAYER).dense()
    torch.testing.assert_close(found, made.dense(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("version", "layer"), [("0.17.1", packed_layer), ("0.18.0", dense_layer), ("1.2", dense_layer)]
)
def test_as_many_words_either_way_are_told_apart_by_the_version(tmp_path, version, layer):
    sizes = {"hidden_size": 20, "intermediate_size": 20, "num_attention_heads": 2}
    save_tiny(tmp_path / "model", **sizes, num_key_value_heads=2)
    config = {**packed_config(3, 20), "version": version}
    folder = write(tmp_path / "model", tmp_path / "base", config, lambda w: layer(grid(w, 3, 20)))
    made = grid(load_file(tmp_path / "model" / "model.safetensors")[f"{LAYER}.weight"], 3, 20)
    found = open_base(folder).form(LAYER).dense()
    torch.testing.assert_close(found, made.dense(), rtol=1e-6, atol=1e-8)
    change_config(folder, quantization_config={**config, "version": None})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_packed .* whether codes cross"):
        open_base(folder).form(LAYER)
