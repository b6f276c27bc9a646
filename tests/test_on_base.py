"""EoRA on top of compressed checkpoints: what comes out, and what is refused before any work."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import foreign
import pytest
import torch
from families import save_tiny
from foreign import change, change_config, gptq_layer, grid, packed_config, packed_layer, write
from peft import PeftModel
from safetensors.torch import load_file
from slowness import slow_but, slow_if
from transformers import AutoModelForCausalLM
from workspaces import recipe

import compress
from calibration.statistics.gram import Gram
from compress.bases import open_base
from compress.cli.main import main
from compress.config.recipe import Recipe
from compress.errors import CheckpointError, LayerError, RecipeError
from compress.exports.load import load_export
from compress.exports.peft import read_adapter
from compress.exports.verification.verify import verify
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.methods.svd_residual import SVDResidual
from compress.pipeline.main import no_progress
from compress.prepare.prepare import prepare
from compress.report.report import Report
from compress.solvers.linalg import output_energy
from compress.survey.original_walk import original_blocks

pytestmark = pytest.mark.usefixtures("quick_verification")
FOREIGN = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "foreign"
IDS = torch.arange(3, 35)[None]
DOWN = "model.layers.1.mlp.down_proj"


def pruned(weight):
    """Half of the weights, 2:4."""
    return {
        "weight": weight
        * (weight.abs().reshape(-1, 4).argsort(1).argsort(1) > 1).reshape(weight.shape)
    }


MAKERS = {
    "gptq": (foreign.GPTQ, lambda w: gptq_layer(grid(w, kind="asymmetric"))),
    "ragged": ({**foreign.GPTQ, "group_size": 24}, lambda w: gptq_layer(grid(w, group_size=24))),
    "awq": (foreign.AWQ, lambda w: foreign.awq_layer(grid(w, kind="asymmetric"))),
    "packed": (packed_config(), lambda w: packed_layer(grid(w))),
    "nf4": (foreign.BITSANDBYTES, lambda w: foreign.bitsandbytes_layer(foreign.blocks(w))),
    "pruned": (None, pruned),
}


def base(workspace, kind="gptq"):
    config, layer = MAKERS[kind]
    folder = write(workspace / "model", workspace / "base", config or {}, layer)
    if config is None:
        change_config(folder, quantization_config=None)
    return folder


def new_model(workspace, family, **changes):
    shutil.rmtree(workspace / "model")
    save_tiny(workspace / "model", family, **changes)


def on_base(workspace, **changes):
    options = {"base_checkpoint": str(workspace / "base"), "method": EoRA(rank=4)}
    return recipe(workspace, **{**options, **changes})


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits[0].float()


def dense_base(workspace):
    """The base with ordinary weights, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    read = open_base(workspace / "base")
    for name in read.layers:
        model.get_submodule(name).weight.data = read.form(name).dense()
    if not read.layers:
        model = AutoModelForCausalLM.from_pretrained(workspace / "base")
    return model


@pytest.mark.parametrize("kind", slow_but(MAKERS, kept="gptq"))
def test_a_correction_on_every_layer_lowers_its_error_and_loads_in_peft(workspace, kind):
    before = {path: path.read_bytes() for path in base(workspace, kind).iterdir()}
    report = compress.run(on_base(workspace, export=("adapter", "native")))
    assert len(report.layers) == 21
    assert all(0 < layer.relative_error < layer.base_error for layer in report.layers)
    assert [export.format for export in report.exports] == ["adapter", "native"]
    assert {path: path.read_bytes() for path in (workspace / "base").iterdir()} == before
    out = workspace / "out"
    adapted = PeftModel.from_pretrained(dense_base(workspace), out / "adapter")
    expected = logits(load_export(out / "native"))
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(load_export(out / "adapter")), expected, rtol=0, atol=1e-5)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(workspace / "base")
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert not list(out.glob("adapter/model*"))


@pytest.mark.slow
def test_texts_of_their_own_make_adapters_of_their_own_on_one_base(workspace):
    """Each is the better one on the text that it was made from, in as many bytes."""
    folder = base(workspace)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    texts = {
        "prose": "a quick brown fox jumps over it. ",
        "sums": "1+2=3; 40+2=42; 7*6=42; 9-8=1. ",
    }
    paths = {}
    for name, text in texts.items():
        (workspace / f"{name}.txt").write_text(text * 60, encoding="utf-8")
        calibration = (str(workspace / f"{name}.txt"),)
        job = on_base(workspace, calibration=calibration, out=workspace / name, propagate="none")
        compress.run(job)
        paths[name] = read_adapter(job.folder / "adapter")[DOWN].dense()
    sizes = {(workspace / n / "adapter/adapter_model.safetensors").stat().st_size for n in texts}
    assert len(sizes) == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for name in texts:
        job = on_base(
            workspace,
            calibration=(str(workspace / f"{name}.txt"),),
            propagate="none",
            include=(DOWN,),
        )
        prepared = prepare(job, no_progress)
        gram = next(
            group.stats[Gram].mean_ii()
            for _, groups in original_blocks(prepared, prepared.store())
            for group in groups
            if DOWN in group.names
        )
        weight = load_file(workspace / "model" / "model.safetensors")[f"{DOWN}.weight"]
        residual = weight.double() - open_base(folder).form(DOWN).dense().double()
        errors = {k: output_energy(residual - path, gram) for k, path in paths.items()}
        assert min(errors, key=lambda k: errors[k]) == name


@pytest.mark.slow
def test_the_adapter_alone_is_the_default_and_a_fresh_process_reproduces_it(workspace):
    base(workspace)
    report = compress.run(on_base(workspace))
    assert [(export.format, export.folder) for export in report.exports] == [("adapter", "adapter")]
    found = verify(workspace / "out" / "adapter")
    assert found.loader == "adapter"
    assert found.relative_difference < 1e-5
    assert Report.load(workspace / "out") == report


def test_every_correction_is_the_best_one_for_its_layer(workspace):
    """The whole residual at full rank, so that base and path make the original's weight."""
    base(workspace)
    compress.run(on_base(workspace, method=EoRA(rank=32, damping=1e-6), include=(DOWN,)))
    [(name, path)] = read_adapter(workspace / "out" / "adapter").items()
    own = load_file(workspace / "model" / "model.safetensors")[f"{DOWN}.weight"]
    made = open_base(workspace / "base").form(DOWN).dense() + path.dense()
    assert name == DOWN
    torch.testing.assert_close(made, own, rtol=0, atol=2e-3 * float(own.abs().max()))


@pytest.mark.parametrize("propagate", slow_but(["none", "block", "sublayer"], kept="block"))
def test_layers_without_a_correction_stay_as_the_base_has_them(workspace, propagate):
    base(workspace)
    changes = {"include": ("k_proj",), "propagate": propagate, "export": ("adapter", "native")}
    report = compress.run(on_base(workspace, **changes))
    assert len(report.layers) == 3
    native = load_export(workspace / "out" / "native")
    layer = native.get_submodule(DOWN)
    expected = open_base(workspace / "base").form(DOWN)
    assert torch.equal(layer.form.dense(), expected.dense())
    reasons = {tensor.reason for tensor in report.kept}
    assert "packed in the base checkpoint, without a correction" in reasons
    config = json.loads((workspace / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj"]


@pytest.mark.slow
def test_each_option_of_propagation_gives_another_adapter(workspace):
    base(workspace)
    found = []
    for propagate in ("none", "block", "sublayer"):
        compress.run(on_base(workspace, propagate=propagate, out=workspace / propagate))
        paths = read_adapter(workspace / propagate / "adapter")
        found.append(paths["model.layers.2.mlp.down_proj"].dense())
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.slow
def test_anchored_corrections_differ_where_blocks_before_have_changed_the_inputs(workspace):
    base(workspace, "pruned")
    plain, anchored = {}, {}
    for target, corrections in (("layer", plain), ("original", anchored)):
        method = EoRA(rank=4, target=target)
        compress.run(on_base(workspace, method=method, out=workspace / target))
        read = read_adapter(workspace / target / "adapter")
        corrections |= {name: correction.dense() for name, correction in read.items()}
    apart = {
        name: float((anchored[name] - plain[name]).norm() / plain[name].norm()) for name in plain
    }
    first = [apart[name] for name in apart if "layers.0.self_attn.q" in name]
    assert max(first) < 0.02
    assert all(apart[name] > 0.1 for name in apart if "layers.0." not in name)


def test_saved_statistics_serve_the_same_base_and_no_other(workspace):
    folder = base(workspace)
    compress.run(on_base(workspace))
    again = compress.run(on_base(workspace, out=workspace / "again"))
    assert any("used again" in note for note in again.notes)
    key = f"{DOWN}.scales"
    change(folder, lambda tensors: tensors.update({key: tensors[key] * 1.001}))
    other = compress.run(on_base(workspace, out=workspace / "other"))
    assert not any("used again" in note for note in other.notes)


@pytest.mark.parametrize("kind", slow_but(["gptq", "awq", "packed", "pruned"], kept="gptq"))
def test_planned_bytes_are_those_on_disk_and_the_base_is_counted(workspace, kind):
    base(workspace, kind)
    job = on_base(workspace, export=("adapter", "native"), include=("mlp", "q_proj"))
    plan = compress.plan(job).plan
    report = compress.run(job)
    for export in report.exports:
        assert export.tensor_bytes == plan.export_bytes(export.format)
    stored = open_base(workspace / "base").reader.total_bytes
    written = load_file(workspace / "out" / "adapter" / "adapter_model.safetensors")
    paths = sum(tensor.nbytes for tensor in written.values())
    assert plan.export_bytes("adapter") == stored + paths
    assert plan.written_bytes("adapter") == paths
    assert report.totals.tensor_bytes_before == plan.bytes_before
    assert report.totals.layer_bytes_after == sum(layer.bytes_after for layer in plan.layers)


def test_report_and_card_say_what_the_base_is(workspace):
    folder = base(workspace)
    settings = {**foreign.GPTQ, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    change_config(folder, quantization_config=settings)
    report = compress.run(on_base(workspace, eval_windows=2))
    assert report.base.format == "gptq, 4 bits, groups of 16"
    assert report.base.producer == "gptqmodel:7.7.0"
    assert report.base.n_packed == 21
    assert report.base.fingerprint == open_base(folder).reader.fingerprint
    footprint = report.scores.after.footprint
    assert footprint.tensor_bytes == report.exports[0].tensor_bytes
    for card in (workspace / "out" / "README.md", workspace / "out" / "adapter" / "README.md"):
        text = card.read_text()
        assert "gptq, 4 bits, groups of 16" in text
        assert "gptqmodel:7.7.0" in text
        assert report.base.fingerprint in text
        assert "PeftModel.from_pretrained" in text
        assert 'AutoModelForCausalLM.from_pretrained("base")' in text
    assert '(model, "THIS_FOLDER/adapter")' in (workspace / "out" / "README.md").read_text()
    assert '(model, "THIS_FOLDER")' in (workspace / "out" / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_the_recipe_in_the_output_does_the_same_job_again(workspace):
    base(workspace)
    compress.run(on_base(workspace))
    again = Recipe.from_yaml(workspace / "out" / "recipe.yaml")
    assert again.base_checkpoint == str(workspace / "base")
    compress.run(replace(again, out=workspace / "again"))
    a, b = (
        load_file(workspace / name / "adapter" / "adapter_model.safetensors")
        for name in ("out", "again")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_our_own_checkpoints_are_bases_and_a_correction_of_one_can_be_corrected(workspace):
    method = EoRA(rank=2, base=RTN(bits=2, group_size=32))
    compress.run(recipe(workspace, method=method, out=workspace / "base"))
    report = compress.run(on_base(workspace, export=("adapter", "native")))
    assert all(layer.relative_error < layer.base_error for layer in report.layers)
    assert report.layers[0].form == "2-bit g32 + rank 2 + rank 4"
    a, b = (logits(load_export(workspace / "out" / name)) for name in ("adapter", "native"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_gptq_export_is_a_base_without_the_adapter_beside_it(workspace):
    method = EoRA(rank=2, base=GPTQ(bits=3, group_size=32))
    compress.run(recipe(workspace, method=method, export=("gptq",), out=workspace / "base"))
    report = compress.run(on_base(workspace))
    assert all(layer.form == "3-bit g32 + rank 4" for layer in report.layers)


@pytest.mark.parametrize("tied", slow_but([True, False], kept=True))
def test_a_packed_head_is_the_bases_own(workspace, tied):
    new_model(workspace, "llama", num_key_value_heads=4, tie_word_embeddings=tied)
    source = workspace / "model"
    folder = write(
        source, workspace / "base", {**foreign.GPTQ, "lm_head": True}, lambda w: gptq_layer(grid(w))
    )
    weights = load_file(source / "model.safetensors")
    own = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def pack_head(tensors):
        tensors.pop("lm_head.weight", None)
        tensors |= {f"lm_head.{part}": value for part, value in gptq_layer(grid(own)).items()}

    change(folder, pack_head)
    change_config(folder, tie_word_embeddings=False)
    report = compress.run(on_base(workspace, export=("adapter", "native"), eval_windows=1))
    assert all(export.relative_difference < 1e-5 for export in report.exports)
    native = load_export(workspace / "out" / "native")
    torch.testing.assert_close(native.lm_head.form.dense(), grid(own).dense())
    assert torch.equal(native.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("said", slow_but([True, False], kept=False))
def test_a_head_that_the_base_has_untied_is_its_own(workspace, said):
    new_model(workspace, "llama", num_key_value_heads=4, tie_word_embeddings=True)
    folder = base(workspace)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lambda tensors: tensors.update({"lm_head.weight": embeddings * 1.5}))
    change_config(folder, tie_word_embeddings=said)
    report = compress.run(on_base(workspace, export=("adapter", "native")))
    assert all(export.relative_difference < 1e-5 for export in report.exports)
    native = load_export(workspace / "out" / "native")
    assert torch.equal(native.lm_head.weight, embeddings * 1.5)


def test_a_base_named_from_the_current_folder_is_found_from_there(workspace, monkeypatch):
    base(workspace)
    monkeypatch.chdir(workspace)
    compress.run(on_base(workspace, base_checkpoint="base"))
    load_export(workspace / "out" / "adapter")
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"base_model_name_or_path, '\./base', is no folder here"
    ):
        load_export(workspace / "out" / "adapter")


def test_an_adapter_of_other_layers_does_not_load(workspace):
    base(workspace)
    compress.run(on_base(workspace))
    adapter = workspace / "out" / "adapter"

    def rename(tensors):
        for part in ("lora_A", "lora_B"):
            key = f"base_model.model.{DOWN}.{part}.weight"
            tensors[key.replace("down_proj", "side_proj")] = tensors.pop(key)

    change(adapter, rename, "adapter_model")
    with pytest.raises(CheckpointError, match=r"factors for .*side_proj, which is no linear layer"):
        load_export(adapter)


def test_the_command_line_takes_a_base_and_refuses_two(workspace, capsys):
    base(workspace)
    text = str(workspace / "text.txt")
    given = ["--method", "eora", "--base-checkpoint", str(workspace / "base"), "--rank", "4"]
    given += ["--model", str(workspace / "model"), "--calibration", text, "--samples", "8"]
    given += ["--seq-len", "32", "--eval-windows", "0", "--tasks", "none"]
    assert main(["plan", *given]) == 0
    assert "whole checkpoint, adapter:" in capsys.readouterr().out
    assert main(["plan", *given, "--bits", "3"]) == 2
    assert "base_checkpoint: method.base is given too, and both say" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "family"),
    slow_if(
        lambda *given: given not in {("native", "qwen3_moe"), ("pruned", "gpt2")},
        itertools.product(
            ["native", "pruned"], ["gpt2", "qwen2", "gemma3_text", "opt", "qwen3_moe"]
        ),
    ),
)
def test_other_architectures_have_bases_too(workspace, family, kind):
    new_model(workspace, family)
    if kind == "native":
        method = RTN(bits=3, group_size=16)
        compress.run(recipe(workspace, method=method, out=workspace / "base"))
    else:
        pattern = re.compile(r".*layers.*(proj|fc\d|fc_in|fc_out)\.weight|.*h\.\d+.*c_\w+\.weight")
        folder = write(workspace / "model", workspace / "base", {}, pruned, layers=pattern)
        change_config(folder, quantization_config=None)
    report = compress.run(on_base(workspace, method=EoRA(rank=2), export=("adapter", "native")))
    assert all(layer.relative_error < layer.base_error for layer in report.layers)
    assert all(export.relative_difference < 1e-4 for export in report.exports)


@pytest.mark.slow
def test_packed_experts_are_the_bases_own(workspace):
    new_model(workspace, "qwen3_moe", num_key_value_heads=4)
    config, layer = MAKERS["gptq"]
    write(workspace / "model", workspace / "base", config, layer)
    job = on_base(workspace, method=EoRA(rank=2), export=("adapter", "native"))
    plan = compress.plan(job).plan
    report = compress.run(job)
    assert all(layer.relative_error < layer.base_error for layer in report.layers)
    assert all(export.relative_difference < 1e-4 for export in report.exports)
    assert all(export.tensor_bytes == plan.export_bytes(export.format) for export in report.exports)


def test_what_auto_gptq_writes_is_a_base(workspace):
    """0.7.1: a file name of its own, settings beside config.json, no format, the tied head written twice."""
    new_model(workspace, "llama", num_key_value_heads=4, tie_word_embeddings=True)
    stem = "gptq_model-4bit-16g"
    folder = write(
        workspace / "model", workspace / "base", {}, lambda w: gptq_layer(grid(w)), stem=stem
    )
    change_config(folder, quantization_config=None)
    settings = {key: value for key, value in foreign.GPTQ.items() if key != "quant_method"}
    (folder / "quantize_config.json").write_text(json.dumps(settings))

    def double(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for name in ("q_proj", "o_proj"):
            tensors[f"model.layers.0.self_attn.{name}.bias"] = torch.zeros(32)

    change(folder, double, stem)
    report = compress.run(on_base(workspace, export=("adapter", "native")))
    assert all(layer.relative_error < layer.base_error for layer in report.layers)
    assert all(export.relative_difference < 1e-5 for export in report.exports)


@pytest.mark.slow
def test_a_gptq_checkpoint_of_gpt2_is_a_base(workspace):
    new_model(workspace, "gpt2")
    method = RTN(bits=4, group_size=32)
    compress.run(recipe(workspace, method=method, export=("gptq",), out=workspace / "base"))
    report = compress.run(on_base(workspace, method=EoRA(rank=2), export=("adapter", "native")))
    assert all(layer.relative_error < layer.base_error for layer in report.layers)


def test_ranks_for_vllm_are_rounded_up(workspace):
    base(workspace)
    compress.run(on_base(workspace, method=EoRA(rank=9, ranks_for="vllm")))
    config = json.loads((workspace / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (16, {})


def test_a_layer_that_fails_stays_as_the_base_has_it(workspace, monkeypatch):
    base(workspace)
    paths = EoRA.corrections

    def fail(self, residuals, stats):
        if residuals[0].shape == (32, 64):
            raise LayerError("no")
        return paths(self, residuals, stats)

    monkeypatch.setattr(EoRA, "corrections", fail)
    report = compress.run(on_base(workspace, on_failure="keep", export=("adapter", "native")))
    left = [layer for layer in report.layers if layer.form == "left as the base has it"]
    assert {layer.name.rpartition(".")[2] for layer in left} == {"down_proj"}
    native = load_export(workspace / "out" / "native")
    expected = open_base(workspace / "base").form(DOWN)
    assert torch.equal(native.get_submodule(DOWN).form.dense(), expected.dense())


def test_layers_that_the_base_left_alone_get_no_correction(workspace):
    config, layer = MAKERS["gptq"]
    only = re.compile(r".*\.(gate|up|down)_proj\.weight")
    write(workspace / "model", workspace / "base", config, layer, layers=only)
    report = compress.run(on_base(workspace))
    assert {name.name.rpartition(".")[2] for name in report.layers} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_svd_residual_corrects_a_checkpoint_too(workspace):
    base(workspace)
    report = compress.run(on_base(workspace, method=SVDResidual(rank=8)))
    assert all(layer.method == "svd_residual" for layer in report.layers)


# Refused before work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"export": ("gptq",)},
            "export: gptq is written by runs without a base checkpoint, not on .*: adapter, native",
        ),
        ({"base_checkpoint": "no/such/folder"}, "base_checkpoint: no/such/folder: no such folder"),
        ({"method": EoRA(rank=64)}, "rank: 64 is above"),
        (
            {"method": EoRA(rank=600, ranks_for="vllm")},
            "600 is above 512, the largest that vLLM serves",
        ),
    ],
)
def test_bad_options_are_refused_before_work(workspace, changes, message):
    base(workspace)
    with pytest.raises((RecipeError, CheckpointError), match=message):
        compress.plan(on_base(workspace, **changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": {"name": "eora", "base": "rtn"}},
            r"base_checkpoint: method\.base is given too, and both say",
        ),
        (
            {"method": {"name": "eora", "base": {"bits": 3}}},
            r"base_checkpoint: method\.base is given too, and both say",
        ),
        (
            {"method": "rtn"},
            "base_checkpoint: rtn compresses the model itself.*eora, lqer, svd_residual",
        ),
        ({"method": "eora", "base_checkpoint": " "}, "base_checkpoint: empty"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_mapping({"base_checkpoint": "somewhere", **values})


def test_a_base_given_in_python_and_a_checkpoint_exclude_each_other():
    with pytest.raises(
        RecipeError, match=r"base_checkpoint: method\.base is given too, and both say"
    ):
        Recipe(base_checkpoint="somewhere", method=EoRA(base=GPTQ(bits=3)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "hidden_size in its config.json is 64, in the original's 32"),
        ({"num_hidden_layers": 4}, "num_hidden_layers in its config.json is 4"),
        ({"model_type": "qwen2"}, "its model_type is 'qwen2', the original's is 'llama'"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps"),
    ],
)
def test_another_architecture_is_refused_by_the_entry_that_differs(workspace, config, message):
    change_config(base(workspace), **config)
    with pytest.raises(CheckpointError, match=f"base_checkpoint: .*{message}"):
        compress.plan(on_base(workspace))


def removed(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (removed("model.norm.weight"), r"lacks the weights model\.norm\.weight"),
        (removed(f"{DOWN}.qzeros"), r"down_proj\.qzeros is missing"),
        (
            replaced("model.norm.weight", lambda t: t[1:]),
            r"model\.norm\.weight has the shape \(31,\)",
        ),
        (
            replaced(f"{DOWN}.qweight", lambda t: t[:, :16]),
            r"down_proj\.weight has the shape \(16, 64\)",
        ),
        (replaced(f"{DOWN}.scales", lambda t: t[1:]), r"down_proj\.scales has the shape \(3, 32\)"),
        (replaced("model.norm.weight", lambda t: t * torch.nan), r"model\.norm\.weight holds NaN"),
        (
            lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}),
            r"no place .*model\.extra",
        ),
    ],
)
def test_tensors_that_do_not_belong_are_refused_by_name(workspace, edit, message):
    change(base(workspace), edit)
    with pytest.raises(CheckpointError, match=f"base_checkpoint: .*{message}"):
        compress.plan(on_base(workspace))


def test_the_original_itself_is_no_base(workspace):
    with pytest.raises(RecipeError, match="holds the original's own weights"):
        compress.plan(on_base(workspace, base_checkpoint=str(workspace / "model")))


def test_embeddings_that_the_base_has_changed_stay_and_are_told(workspace):
    folder = base(workspace)
    name = "model.embed_tokens.weight"
    change(folder, replaced(name, lambda t: t + 0.05 * t.roll(1, 0)))
    report = compress.run(on_base(workspace, export=("native",)))
    assert any(name in note and "stays" in note for note in report.notes)
    written = load_file(workspace / "out" / "model.safetensors")
    assert torch.equal(written[name], load_file(folder / "model.safetensors")[name])


def test_biases_that_the_base_has_changed_stay_and_are_told(workspace):
    new_model(workspace, "qwen2", num_key_value_heads=4)
    folder = base(workspace)
    name = "model.layers.1.self_attn.q_proj.bias"
    change(folder, replaced(name, lambda t: t * 2))
    report = compress.run(on_base(workspace, export=("native",)))
    assert any(name in note and "stays" in note for note in report.notes)
    written = load_file(workspace / "out" / "model.safetensors")
    assert torch.equal(written[name], load_file(folder / "model.safetensors")[name])


@pytest.mark.slow
@pytest.mark.as_run
def test_an_adapter_does_not_verify_on_another_base(workspace):
    folder = base(workspace)
    compress.run(on_base(workspace))
    change(folder, replaced(f"{DOWN}.scales", lambda t: t * 1.5))
    with pytest.raises(CheckpointError, match="its base sha256 have changed"):
        verify(workspace / "out" / "adapter")


# Files of the tools themselves


@pytest.mark.slow
@pytest.mark.as_run
@pytest.mark.parametrize(
    "name",
    [
        "gptqmodel_w4_g128_ragged",
        "autoround_w4_g64_negative_scales",
        "compressed_tensors_w4_g64",
        "sparsegpt_2of4_dense",
    ],
)
def test_checkpoints_of_other_tools_are_corrected(workspace, name):
    if not (FOREIGN / name).is_dir():
        pytest.skip("shared/data/foreign is not here")
    changes = {"model": str(FOREIGN / "original"), "dtype": "float32", "method": EoRA(rank=32)}
    report = compress.run(on_base(workspace, base_checkpoint=str(FOREIGN / name), **changes))
    assert len(report.layers) == 7
    assert all(layer.relative_error < layer.base_error for layer in report.layers)
    assert report.exports[0].relative_difference < 1e-4
