"""Bases that have moved scales between norms and layers, as AWQ does: corrected as if they had not."""

import json
import shutil

import foreign
import pytest
import torch
from families import save_tiny
from foreign import change, grid, write
from safetensors.torch import load_file, save_file
from workspaces import recipe

import compress
from compress.errors import CheckpointError, RecipeError
from compress.exports.load import load_export
from compress.methods.eora import EoRA

pytestmark = pytest.mark.usefixtures("quick_verification")
IDS = torch.arange(3, 67)[None]


def moved(folder, tensors, *, biases=False):
    """Scales from every norm to what reads it, from v to o, from up to down: the model computes the same."""
    generator = torch.Generator().manual_seed(5)

    def scales(n):
        return torch.exp(0.4 * torch.randn(n, generator=generator))

    for index in range(3):
        block = f"model.layers.{index}"

        def feed(norm, readers, block=block):
            s = scales(32)
            tensors[f"{block}.{norm}.weight"] /= s
            for name in readers:
                tensors[f"{block}.{name}.weight"] *= s

        def hand_on(writer, reader, block=block):
            s = scales(len(tensors[f"{block}.{writer}.weight"]))
            tensors[f"{block}.{writer}.weight"] /= s[:, None]
            tensors[f"{block}.{reader}.weight"] *= s
            if biases:
                tensors[f"{block}.{writer}.bias"] /= s

        feed("input_layernorm", [f"self_attn.{k}_proj" for k in "qkv"])
        feed("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"])
        hand_on("self_attn.v_proj", "self_attn.o_proj")
        if not biases:
            hand_on("mlp.up_proj", "mlp.down_proj")
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def awq_base(workspace, family="llama"):
    shutil.rmtree(workspace / "model")
    save_tiny(workspace / "model", family, num_key_value_heads=4)
    tensors = load_file(workspace / "model" / "model.safetensors")
    moved(workspace / "moved", tensors, biases=family == "qwen2")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(workspace / "model" / name, workspace / "moved")
    return write(
        workspace / "moved",
        workspace / "base",
        foreign.AWQ,
        lambda w: foreign.awq_layer(grid(w, kind="symmetric")),
    )


def on_base(workspace, **changes):
    options = {"base_checkpoint": str(workspace / "base"), "method": EoRA(rank=4)}
    return recipe(workspace, **{**options, **changes})


def logits(folder):
    with torch.inference_mode():
        return load_export(folder, torch.float32)(input_ids=IDS).logits[0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("propagate", ["none", "block"])
def test_errors_are_told_in_the_originals_scale_and_fall(workspace, family, propagate):
    awq_base(workspace, family)
    report = compress.run(on_base(workspace, propagate=propagate, export=("adapter", "native")))
    assert all(layer.relative_error < layer.base_error < 0.4 for layer in report.layers)
    assert all(export.relative_difference < 1e-4 for export in report.exports)
    assert any("moved scales" in note for note in report.notes)
    original = logits(workspace / "model")
    base, corrected = (logits(workspace / name) for name in ("base", "out/adapter"))
    assert (corrected - original).norm() < 0.8 * (base - original).norm()


def test_corrections_of_full_rank_give_the_original_back(workspace):
    awq_base(workspace)
    compress.run(on_base(workspace, method=EoRA(rank=32, damping=1e-6)))
    original, corrected = (logits(workspace / name) for name in ("model", "out/adapter"))
    assert (corrected - original).norm() < 5e-3 * original.norm()


def test_norms_that_only_changed_are_made_up_for_by_the_corrections(workspace):
    folder = awq_base(workspace)
    name = "model.layers.1.input_layernorm.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name] * 1.1}))
    compress.run(on_base(workspace, method=EoRA(rank=32, damping=1e-6)))
    original, corrected = (logits(workspace / name) for name in ("model", "out/adapter"))
    assert (corrected - original).norm() < 5e-3 * original.norm()


def test_changes_that_no_layer_makes_up_for_are_refused(workspace):
    shutil.rmtree(workspace / "model")
    save_tiny(workspace / "model", "qwen3", num_key_value_heads=4)
    folder = write(
        workspace / "model", workspace / "base", foreign.AWQ, lambda w: foreign.awq_layer(grid(w))
    )
    name = "model.layers.1.self_attn.q_norm.weight"
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(8, generator=generator).exp()
    change(folder, lambda tensors: tensors.update({name: tensors[name] * noise}))
    with pytest.raises(
        CheckpointError, match=r"base_checkpoint: .*layers\.1\.self_attn\.q_norm\.weight differ"
    ):
        compress.plan(on_base(workspace))


def test_moved_scales_and_propagation_within_a_block_exclude_each_other(workspace):
    awq_base(workspace)
    with pytest.raises(RecipeError, match=r"propagate: sublayer.* use --propagate block"):
        compress.plan(on_base(workspace, propagate="sublayer"))


def test_an_unmoved_base_has_no_factors(workspace):
    write(
        workspace / "model", workspace / "base", foreign.AWQ, lambda w: foreign.awq_layer(grid(w))
    )
    report = compress.run(on_base(workspace))
    assert not any("moved scales" in note for note in report.notes)
    assert json.loads((workspace / "out" / "report.json").read_text())["base"]["format"].startswith(
        "awq"
    )
