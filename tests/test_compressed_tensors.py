"""compressed-tensors exports: the bytes that readers expect, by their own rules, and the settings that go with them."""

import json
from pathlib import Path

import pytest
import torch
from exported import compressed, corrected, export, logits, quantised
from families import save_tiny
from transformers import AutoConfig
from workspaces import TEXT, recipe

import compress
from compress.errors import CheckpointError, RecipeError
from compress.exports import EXPORTS, LayerExport
from compress.exports.compressed_tensors.schemes import Grid, Stored, quantisation, settled
from compress.exports.compressed_tensors.unread import (
    PLAIN,
    Told,
    fused_warnings,
    unread_by_transformers,
)
from compress.exports.load import load_export
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.magnitude import Magnitude
from compress.methods.rtn import RTN
from compress.models.checkpoint import Reader

NAME = "compressed-tensors"


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def grid(bits, group_size):
    return Grid(bits, symmetric=True, group_size=group_size)


def bits_of(words, bits, n):
    """Fields of a stream of bits across words, lowest first, by Python's whole numbers."""
    stream = sum((word & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(words))
    return [(stream >> (bits * k)) & ((1 << bits) - 1) for k in range(n)]


def plain_dequantise(tensors, name, bits):
    """(o, i), fp64, from the words alone: the signed integer less the signed zero point, times the scale."""
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].double()
    o, i = tensors[f"{name}.weight_shape"].tolist()
    assert packed.shape == (o, -(-i * bits // 32))
    size = i // scale.shape[1]
    zeros = torch.zeros(o, scale.shape[1], dtype=torch.float64)
    if f"{name}.weight_zero_point" in tensors:
        stored = tensors[f"{name}.weight_zero_point"]
        assert stored.shape == (-(-o * bits // 32), scale.shape[1])
        columns = [bits_of(column, bits, o) for column in stored.T.tolist()]
        zeros = torch.tensor(columns).T.double() - (1 << (bits - 1))
    codes = torch.tensor([bits_of(row, bits, i) for row in packed.tolist()]).double()
    steps = codes - (1 << (bits - 1)) - zeros.repeat_interleave(size, 1)
    return steps * scale.repeat_interleave(size, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("zeros", ["symmetric", "asymmetric"])
def test_tensors_mean_the_weight_to_an_independent_reader(tmp_path, bits, zeros):
    """Of 80 inputs in groups of 16, where codes of 3, 5 and 6 bits leave the last word half empty."""
    made = compressed(
        tmp_path / "source",
        make_form=lambda _, w: quantised(w, bits=bits, zeros=zeros, group_size=16),
        intermediate_size=80,
    )
    folder = export(made, tmp_path / "out", NAME)
    tensors, name = dict(Reader(folder).items()), "model.layers.0.mlp.down_proj"
    found = plain_dequantise(tensors, name, bits)
    assert torch.equal(found.float(), made.layers[name].form.dense())
    assert torch.equal(logits(load_export(folder)), made.logits())
    (group,) = settings(folder)["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    weights = {"num_bits": bits, "type": "int", "symmetric": zeros == "symmetric"}
    weights |= {"strategy": "group", "group_size": 16, "dynamic": False, "actorder": None}
    assert group["weights"].items() >= weights.items()
    assert settings(folder)["version"] == "0.18.0"


def test_scales_are_the_same_in_every_float_that_a_server_casts_them_to(tmp_path):
    made = compressed(tmp_path / "source")
    reader = Reader(export(made, tmp_path / "out", NAME))
    scales = [reader[name] for name in reader if name.endswith("weight_scale")]
    assert len(scales) == len(made.layers)
    assert any(bool((scale < 0).any()) for scale in scales)
    for scale in scales:
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(scale.to(dtype).double(), scale.double())


@pytest.mark.parametrize("name", [NAME, "gptq"])
def test_scales_that_a_server_would_change_are_refused(tmp_path, name):
    made = compressed(tmp_path / "source")
    (tmp_path / "out").mkdir()
    exporter, form = EXPORTS[name](tmp_path / "out", made.source), quantised(torch.randn(32, 64))
    form.scales[0, 0] = 1 + 2**-10
    with pytest.raises(CheckpointError, match=r"x: torch\.bfloat16 does not hold its scales"):
        exporter.add_layer(LayerExport("x", form, None, transposed=False))


def test_whole_rows_are_channels(tmp_path):
    made = compressed(
        tmp_path / "source", make_form=lambda _, w: quantised(w, group_size=w.shape[1])
    )
    folder = export(made, tmp_path / "out", NAME)
    (group,) = settings(folder)["config_groups"].values()
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)
    reader = Reader(folder)
    assert reader["model.layers.0.mlp.down_proj.weight_scale"].shape == (32, 1)
    assert torch.equal(logits(load_export(folder)), made.logits())


def test_everything_that_is_plain_is_ignored_by_name_a_tied_head_too(tmp_path):
    made = compressed(
        tmp_path / "source",
        keep=r"lm_head|layers\.1\.self_attn\.[qkv]_proj",
        tie_word_embeddings=True,
    )
    folder = export(made, tmp_path / "out", NAME)
    plain = [f"model.layers.1.self_attn.{kind}_proj" for kind in "kqv"]
    assert settings(folder)["ignore"] == ["lm_head", *plain]
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.k_proj" in adapter["target_modules"]
    assert torch.equal(logits(load_export(folder)), made.logits())


def test_layers_of_several_grids_are_groups_and_the_class_stands_for_the_commonest(tmp_path):
    def make_form(name, weight):
        bits = 8 if "down_proj" in name else 4
        return corrected(weight, bits=bits, zeros="asymmetric" if "o_proj" in name else "symmetric")

    made = compressed(tmp_path / "source", make_form=make_form)
    folder = export(made, tmp_path / "out", NAME)
    groups = list(settings(folder)["config_groups"].values())
    targets = [group["targets"] for group in groups]
    assert targets[0] == ["Linear"]
    assert sorted(targets[1:]) == [
        [f"model.layers.{n}.mlp.down_proj" for n in range(3)],
        [f"model.layers.{n}.self_attn.o_proj" for n in range(3)],
    ]
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}
    assert torch.equal(logits(load_export(folder)), made.logits())


def test_whole_rows_among_groups_of_their_length_are_groups():
    stored = {"a": Stored(grid(4, 64), 128), "b": Stored(grid(4, 64), 64)}
    assert set(settled(stored).values()) == {grid(4, 64)}
    stored["c"] = Stored(grid(4, 96), 96)
    assert settled(stored)["c"] == grid(4, None)
    rows = {name: Stored(grid(4, 128), 128) for name in "ab"}
    assert set(settled(rows).values()) == {grid(4, 128)}
    rows["c"] = Stored(grid(4, 256), 256)
    assert set(settled(rows).values()) == {grid(4, None)}


def test_experts_of_another_grid_are_one_expression_that_names_them():
    experts = [f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(2)]
    dense = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"]
    grids = dict.fromkeys(dense, grid(8, 32)) | dict.fromkeys(experts, grid(4, 32))
    config = quantisation(grids, (), ["model.layers.1.mlp.experts.0.up_proj"])
    (first, second) = config["config_groups"].values()
    assert first["targets"] == ["Linear"]
    assert second["targets"] == [r"re:.*model\.layers\.0\.mlp\.experts\.\d+\.up_proj$"]
    assert config["ignore"] == [r"re:.*model\.layers\.1\.mlp\.experts\.\d+\.up_proj$"]
    one = quantisation({experts[0]: grid(4, 32)}, (), [experts[1]])
    assert one["ignore"] == [experts[1]]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_verification")
def test_experts_are_packed_one_by_one_under_the_names_of_the_source(tmp_path):
    save_tiny(tmp_path / "model", "qwen3_moe")
    (tmp_path / "text.txt").write_text(TEXT)
    job = recipe(tmp_path, method=RTN(bits=3, group_size=16), export=(NAME,))
    plan = compress.plan(job).plan
    compress.run(job)
    reader = Reader(tmp_path / "out")
    names = {name.rpartition(".weight_packed")[0] for name in reader if "weight_packed" in name}
    assert "model.layers.0.mlp.experts.3.down_proj" in names
    assert len(names) == len(plan.layers) == 48
    assert plan.written_bytes(NAME) == sum(tensor.nbytes for _, tensor in reader.items())
    ignored = settings(tmp_path / "out")["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate"} <= set(ignored)
    assert plan.warnings == ()


def test_what_the_format_cannot_hold_is_refused_before_work():
    shapes = {"a": (32, 64)}
    for method, words in (
        (GPTQ(group_size=32, act_order="desc_act"), "activation order"),
        (EoRA(base=RTN(group_size=32, symmetry="affine")), "zero points are integers"),
        (Magnitude(), "does not quantise"),
        (GPTQ(group_size=48), "groups of 48 do not divide its 64 inputs"),
    ):
        with pytest.raises(RecipeError, match=f"{NAME} cannot hold a: .*{words}"):
            EXPORTS[NAME].check({"a": method}, shapes)


def test_models_whose_layers_transformers_does_not_take_for_linear_ones_are_warned_about():
    (text,) = EXPORTS[NAME].warnings_of_model(AutoConfig.for_model("gpt2"))
    assert "transformers loads no gpt2" in text
    assert EXPORTS[NAME].warnings_of_model(AutoConfig.for_model("llama")) == ()


def test_layers_that_vllm_makes_one_of_are_warned_about_where_they_differ():
    four, eight = Told(4, 32), Told(8, 32)
    alike = {f"a.{kind}_proj": four for kind in "qkv"} | {"b.gate_proj": PLAIN, "b.up_proj": PLAIN}
    assert not list(fused_warnings(alike))
    (text,) = fused_warnings(alike | {"a.k_proj": eight})
    assert "a (q_proj: 4 bits, groups of 32; k_proj: 8 bits, groups of 32), and reads all" in text
    (text,) = fused_warnings(alike | {"a.v_proj": PLAIN})
    assert "v_proj: not quantised), and refuses the checkpoint" in text
    experts = {f"m.experts.{n}.up_proj": Told(4 + n, -1) for n in range(2)}
    (text,) = fused_warnings(alike | experts)
    assert "m.experts (0.up_proj: 4 bits, whole rows; 1.up_proj: 5 bits, whole rows)" in text


def test_what_transformers_does_not_load_is_said():
    dense, experts = {"a.o_proj": Told(4, 32)}, {"m.experts.0.up_proj": Told(4, 32)}
    assert not list(unread_by_transformers(dense | experts))
    for stored, words in (
        ({"m.experts.0.up_proj": PLAIN}, "experts are not quantised"),
        ({"m.experts.0.up_proj": Told(4, 32, asymmetric=True), "a.o_proj": PLAIN}, "zero points"),
        ({"a.q_proj": Told(8, 32)}, "several grids only without"),
    ):
        (text,) = unread_by_transformers(dense | stored)
        assert words in text
