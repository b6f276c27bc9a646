"""Originals that exist in 8 or 4 bits alone: dequantised one tensor at a time, and ordinary ones from there on."""

import json
import shutil

import few_bits
import foreign
import pytest
import torch
from families import save_tiny, tiny_ids
from foreign import change, change_config, write
from safetensors.torch import load_file, save_file
from workspaces import recipe

import compress
from compress.bases import Dequantised, open_original
from compress.callbacks import no_progress
from compress.cli.main import main
from compress.errors import CheckpointError
from compress.evaluation.compare import n_parameters_of
from compress.exports.load import load_export, load_original
from compress.inspection.checkpoint import inspect
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.models.checkpoint import Reader
from compress.models.model_config import PUBLISHED, read_config

pytestmark = pytest.mark.usefixtures("quick_verification")
LAYER = "model.layers.1.mlp.down_proj"
LAYERS = {
    "fp8": (few_bits.FP8, few_bits.fp8_layer),
    "channel": (few_bits.FLOAT_CHANNEL, lambda w: few_bits.float_quantized_layer(w, "channel")),
    "nvfp4": (few_bits.NVFP4, lambda w: few_bits.nvfp4_layer(w, "compressed-tensors")),
    "modelopt": (few_bits.MODELOPT, lambda w: few_bits.nvfp4_layer(w, "modelopt")),
}


def in_few_bits(workspace, name="fp8"):
    """The workspace's model in a format, all else in bfloat16; and its twin of ordinary weights."""
    config, make = LAYERS[name]
    folder = write(workspace / "model", workspace / "few", config, lambda w: make(w).tensors)
    as_published(folder)
    return folder


def as_published(folder):
    """What is not in few bits in bfloat16."""

    def narrow(tensors):
        for key, tensor in tensors.items():
            if tensor.dtype == torch.float32 and "_scale" not in key:
                tensors[key] = tensor.bfloat16()

    change(folder, narrow)
    change_config(folder, dtype="bfloat16")


def twin(workspace, folder):
    """The ordinary checkpoint that one in few bits stands for."""
    found = workspace / "twin"
    shutil.copytree(folder, found)
    change_config(found, quantization_config=None)
    save_file(dict(open_original(folder)), found / "model.safetensors", {"format": "pt"})
    return found


def test_the_formats_that_originals_are_read_in_are_those_that_resolving_lets_through():
    assert {name for name, kind in compress.bases.BASES.items() if kind.published} == PUBLISHED


@pytest.mark.parametrize("name", LAYERS)
def test_an_original_has_the_names_and_numbers_of_an_ordinary_checkpoint(workspace, name):
    folder = in_few_bits(workspace, name)
    own = load_file(workspace / "model" / "model.safetensors")
    tensors = open_original(folder)
    assert set(tensors) == set(own)
    assert len(tensors) == len(own)
    for key in tensors:
        assert tensors.dtype(key) == tensors[key].dtype == torch.bfloat16
        assert tensors.shape(key) == tuple(tensors[key].shape) == tuple(own[key].shape)
        assert tensors.nbytes(key) == tensors[key].nbytes
    expected = LAYERS[name][1](own[f"{LAYER}.weight"].float()).dense
    assert torch.equal(tensors[f"{LAYER}.weight"], expected.bfloat16())


def test_a_run_on_fp8_is_the_run_on_the_ordinary_checkpoint_that_it_stands_for(workspace):
    folder = in_few_bits(workspace)
    reports = [
        compress.run(recipe(workspace, model=str(model), out=workspace / f"out-{model.name}"))
        for model in (folder, twin(workspace, folder))
    ]
    errors = [[layer.relative_error for layer in report.layers] for report in reports]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 21
    assert reports[0].totals == reports[1].totals
    models = [load_export(workspace / f"out-{name}") for name in ("few", "twin")]
    assert torch.equal(*(model(tiny_ids()).logits for model in models))


def test_fp8_runs_from_the_command_line_and_names_what_it_was_read_from(workspace, capsys):
    folder = in_few_bits(workspace)
    given = ["--method", "eora", "--bits", "4", "--rank", "2", "--model", str(folder)]
    given += ["--calibration", str(workspace / "text.txt"), "--samples", "8", "--seq-len", "32"]
    given += ["--eval-windows", "0", "--tasks", "none", "--export", "native", "gptq"]
    assert main(["plan", *given]) == 0
    told = r"the original is stored in few bits (fp8, blocks of 24 x 40)"
    assert told in " ".join(capsys.readouterr().out.split())
    assert main(["run", *given, "--out", str(workspace / "out")]) == 0
    report = json.loads((workspace / "out" / "report.json").read_text())
    stored = Reader(folder).total_bytes
    assert any(told in note and f"{stored:,}" in note for note in report["notes"])
    assert any("round activations" in note for note in report["notes"])
    for name in ("native", "gptq"):
        loaded = load_export(workspace / "out" / name)
        assert bool(torch.isfinite(loaded(tiny_ids()).logits).all())
    config = json.loads((workspace / "out" / "native" / "config.json").read_text())
    assert "fp8" not in json.dumps(config)


def test_a_dense_export_of_an_original_in_few_bits_is_an_ordinary_checkpoint(workspace):
    folder = in_few_bits(workspace)
    compress.run(recipe(workspace, model=str(folder), method=RTN(group_size=32), export=("dense",)))
    config = json.loads((workspace / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    reader = Reader(workspace / "out")
    assert {reader.dtype(name) for name in reader} == {torch.bfloat16}


def test_the_original_of_an_evaluation_is_the_dequantised_model(workspace):
    folder = in_few_bits(workspace, "nvfp4")
    found, expected = load_original(folder), load_original(twin(workspace, folder))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found(tiny_ids()).logits, expected(tiny_ids()).logits)
    assert n_parameters_of(folder) == sum(p.numel() for p in found.parameters())


def test_inspect_names_the_format_and_its_bytes(workspace):
    folder = in_few_bits(workspace)
    found = inspect(str(folder), progress=no_progress)
    assert found.format == "fp8, blocks of 24 x 40"
    assert found.n_bytes == Reader(folder).total_bytes
    assert {layer.stored for layer in found.layers} == {"fp8, blocks of 24 x 40"}


def test_scales_of_the_cache_are_no_tensors_of_the_original(workspace):
    folder = in_few_bits(workspace, "modelopt")
    key = "model.layers.0.self_attn.k_proj.k_scale"
    change(folder, lambda tensors: tensors.update({key: torch.ones(1)}))
    assert key not in open_original(folder)
    compress.plan(recipe(workspace, model=str(folder), method=RTN(group_size=32)))


def test_an_original_that_is_cut_short_is_refused_before_work(workspace):
    folder = in_few_bits(workspace)
    change(folder, lambda tensors: tensors.pop(f"{LAYER}.weight_scale_inv"))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is stored as float8.*missing"):
        compress.plan(recipe(workspace, model=str(folder)))
    change(folder, lambda tensors: tensors.update({f"{LAYER}.weight_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(CheckpointError, match=r"has the shape \(1, 1\); it must be \(2, 2\)"):
        compress.plan(recipe(workspace, model=str(folder)))


def test_an_original_that_overflows_its_own_dtype_is_refused(workspace):
    folder = in_few_bits(workspace)
    change_config(folder, dtype="float16")
    key = f"{LAYER}.weight_scale_inv"
    change(folder, lambda tensors: tensors.update({key: tensors[key] * 1e8}))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight reaches beyond float16"):
        open_original(folder)[f"{LAYER}.weight"]


def test_formats_in_which_no_model_is_published_are_refused_as_before(workspace):
    folder = write(
        workspace / "model",
        workspace / "few",
        foreign.GPTQ,
        lambda w: foreign.gptq_layer(foreign.grid(w)),
    )
    with pytest.raises(CheckpointError, match=r"already compressed \(gptq\)"):
        compress.plan(recipe(workspace, model=str(folder)))


def test_the_config_of_an_original_says_nothing_of_its_bits(workspace):
    assert not hasattr(read_config(in_few_bits(workspace)), "quantization_config")


def test_experts_in_fp8_are_read_under_their_own_names(workspace):
    shutil.rmtree(workspace / "model")
    save_tiny(workspace / "model", "qwen3_moe", num_key_value_heads=4)
    folder = in_few_bits(workspace)
    tensors = open_original(folder)
    assert isinstance(tensors, Dequantised)
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    own = load_file(workspace / "model" / "model.safetensors")[name]
    assert torch.equal(tensors[name], few_bits.fp8_layer(own.float()).dense.bfloat16())
    report = compress.run(recipe(workspace, model=str(folder), method=RTN(group_size=16)))
    assert any(".experts." in layer.name for layer in report.layers)
    assert bool(torch.isfinite(load_export(workspace / "out")(tiny_ids()).logits).all())


def test_stacked_experts_in_fp8_are_read_as_they_lie(workspace):
    folder, name = in_few_bits(workspace), "model.layers.0.mlp.experts.gate_up_proj"
    stack = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = zip(*(few_bits.fp8(each, (24, 40)) for each in stack), strict=True)
    added = {name: torch.stack(codes), f"{name}_scale_inv": torch.stack(scales)}
    change(folder, lambda tensors: tensors.update(added))
    meant = [few_bits.meant_by_fp8(*each, (24, 40)) for each in zip(codes, scales, strict=True)]
    tensors = open_original(folder)
    assert tensors.shape(name) == (3, 32, 64)
    assert torch.equal(tensors[name], torch.stack(meant).bfloat16())


def test_gpt_oss_runs_with_its_experts_as_ordinary_weights(workspace):
    shutil.rmtree(workspace / "model")
    few_bits.save_gpt_oss(workspace / "model")
    meant = few_bits.as_mxfp4(workspace / "model", workspace / "few")
    tensors = open_original(workspace / "few")
    assert set(tensors) == set(Reader(workspace / "model"))
    model, packed = load_original(workspace / "few"), load_export(workspace / "few")
    torch.testing.assert_close(packed(tiny_ids()).logits, model(tiny_ids()).logits)
    for name, expected in meant.items():
        assert torch.equal(tensors[name].float(), expected)
        assert torch.equal(model.get_parameter(name).float(), expected)
    report = compress.run(
        recipe(
            workspace,
            model=str(workspace / "few"),
            method=EoRA(rank=2, base=GPTQ(group_size=32)),
        )
    )
    assert any("mxfp4, experts in groups of 32" in note for note in report.notes)
    assert len(report.layers) == 8 + 2 * 4 * 3
    loaded = load_export(workspace / "out")
    assert bool(torch.isfinite(loaded(tiny_ids()).logits).all())


@pytest.mark.parametrize("name", ["channel", "nvfp4"])
def test_eora_on_a_base_of_compressed_tensors_lowers_every_layers_error(workspace, name):
    config, make = LAYERS[name]
    folder = write(workspace / "model", workspace / "base", config, lambda w: make(w).tensors)
    report = compress.run(recipe(workspace, base_checkpoint=str(folder), method=EoRA(rank=2)))
    assert len(report.layers) == 21
    assert all(layer.relative_error < layer.base_error for layer in report.layers)
    assert any("engines round activations" in note for note in report.notes)


def test_an_original_in_few_bits_may_be_its_own_ordinary_twins_base(workspace):
    """Of a model that is published in bfloat16 and in FP8, the one corrects the other."""
    folder = in_few_bits(workspace)
    config, make = LAYERS["nvfp4"]
    base = write(twin(workspace, folder), workspace / "base", config, lambda w: make(w).tensors)
    report = compress.run(
        recipe(workspace, model=str(folder), base_checkpoint=str(base), method=EoRA(rank=2))
    )
    assert all(layer.relative_error < layer.base_error for layer in report.layers)
