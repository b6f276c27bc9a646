"""The whole pipeline on a tiny random model, and every way it must refuse or fail cleanly."""

import json
import shutil

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file
from slowness import slow_but
from workspaces import recipe

import compress
from calibration.errors import InputError
from compress.config.recipe import Recipe
from compress.errors import CheckpointError, LayerError, RecipeError
from compress.exports import EXPORTS
from compress.exports.load import load_export
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.report.report import Report
from eval.errors import EvalError

pytestmark = pytest.mark.usefixtures("quick_verification")


def left_behind(workspace):
    """What a failed run left beside the inputs."""
    names = {path.name for path in workspace.iterdir()}
    return names - {"model", "text.txt", "cache"}


def test_a_run_writes_a_checkpoint_that_loads_and_a_report_that_says_what_was_done(workspace):
    report = compress.run(recipe(workspace, eval_windows=2))
    assert Report.load(workspace / "out") == report
    assert len(report.layers) == 21
    assert all(0 < layer.relative_error < 0.2 for layer in report.layers)
    assert report.exports[0].relative_difference < 1e-5
    assert report.scores.after.fidelity.kl > 0
    assert report.totals.layer_bytes_after == sum(layer.bytes_after for layer in report.layers)
    assert report.totals.tensor_bytes_after == report.exports[0].tensor_bytes
    assert {tensor.reason for tensor in report.kept} == {
        "outside the decoder blocks",
        "not a linear layer",
    }
    names = {path.name for path in (workspace / "out").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "report.json", "recipe.yaml"} <= names
    assert {"report.html", "pictures"} <= names
    assert all(layer.rank == 4 and layer.spectrum.ranks[0] == 1 for layer in report.layers)
    assert list(report.peak_memory) == list(report.timings)
    assert min(report.peak_memory.values()) > 10_000_000
    assert left_behind(workspace) == {"out"}


def test_the_planned_bytes_equal_the_bytes_on_disk(workspace):
    planned = compress.plan(recipe(workspace)).plan
    report = compress.run(recipe(workspace))
    assert planned.bytes_after == report.totals.tensor_bytes_after
    assert planned.bytes_before == report.totals.tensor_bytes_before


def test_the_recipe_in_the_output_does_the_same_job_again(workspace):
    compress.run(recipe(workspace))
    again = Recipe.from_yaml(workspace / "out" / "recipe.yaml")
    compress.run(Recipe.from_mapping({**again.to_mapping(), "out": str(workspace / "again")}))
    a, b = (load_file(workspace / name / "model.safetensors") for name in ("out", "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("propagate", slow_but(["none", "block", "sublayer"], kept="block"))
def test_saved_statistics_are_used_again_and_give_the_same_checkpoint(workspace, propagate):
    first = compress.run(recipe(workspace, propagate=propagate))
    second = compress.run(recipe(workspace, propagate=propagate, out=workspace / "second"))
    assert not any("used again" in note for note in first.notes)
    assert any("used again" in note for note in second.notes)
    a, b = (load_file(workspace / name / "model.safetensors") for name in ("out", "second"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_statistics_of_the_original_serve_another_method(workspace):
    folder = compress.calibrate(recipe(workspace, propagate="none"))
    assert (folder / "manifest.json").is_file()
    report = compress.run(recipe(workspace, propagate="none", method=RTN(bits=3, group_size=32)))
    assert any("used again" in note for note in report.notes)


@pytest.mark.slow
def test_what_calibrate_saves_never_reaches_a_run_through_compressed_blocks(workspace):
    compress.calibrate(recipe(workspace))
    compress.run(recipe(workspace))
    compress.run(recipe(workspace, statistics="off", out=workspace / "fresh"))
    a, b = (load_file(workspace / name / "model.safetensors") for name in ("out", "fresh"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_each_option_of_propagation_gives_another_checkpoint(workspace):
    weights = []
    for propagate in ("none", "block", "sublayer"):
        out = workspace / propagate
        compress.run(
            recipe(workspace, propagate=propagate, out=out, method=GPTQ(bits=2, group_size=32))
        )
        weights.append(load_file(out / "model.safetensors"))
    last = "model.layers.2.mlp.down_proj.form.qweight"
    assert not torch.equal(weights[0][last], weights[1][last])
    assert not torch.equal(weights[1][last], weights[2][last])


@pytest.mark.parametrize(
    "family", slow_but(["gpt2", "qwen2", "gemma3_text", "qwen3_moe", "opt"], kept="gpt2")
)
def test_other_architectures_go_through(family, workspace):
    shutil.rmtree(workspace / "model")
    save_tiny(workspace / "model", family)
    report = compress.run(recipe(workspace, method=EoRA(rank=2, base=RTN(group_size=16, bits=4))))
    assert report.layers
    assert report.exports[0].relative_difference < 1e-5


def test_a_sharded_bf16_model_with_an_untied_head_goes_through(workspace):
    shutil.rmtree(workspace / "model")
    model = save_tiny(workspace / "model", tie_word_embeddings=False)
    model.to(torch.bfloat16).save_pretrained(workspace / "model", max_shard_size="20kB")
    (workspace / "model" / "model.safetensors").unlink()
    report = compress.run(recipe(workspace))
    assert report.exports[0].relative_difference < 2e-2
    assert (
        load_export(workspace / "out", torch.bfloat16, torch.device("cpu")).dtype == torch.bfloat16
    )


@pytest.mark.slow
@pytest.mark.as_run
@pytest.mark.parametrize("formats", [("gptq",), ("dense",), ("native", "gptq", "dense")])
def test_every_export_is_verified_in_a_fresh_process_and_by_the_engines_there_are(
    workspace, formats
):
    method = EoRA(rank=4, base=GPTQ(group_size=32))
    report = compress.run(recipe(workspace, export=formats, engines=("auto",), method=method))
    assert [export.format for export in report.exports] == list(formats)
    assert all(export.relative_difference <= export.tolerance for export in report.exports)
    for export in report.exports:
        assert [it.engine for it in export.engines] == list(EXPORTS[export.format].traits.engines)
        assert all(it.reason or it.largest_difference <= it.bound for it in export.engines)
    if len(formats) > 1:
        assert all((workspace / "out" / name / "config.json").is_file() for name in formats)


def test_patterns_choose_the_layers(workspace):
    report = compress.run(recipe(workspace, include=("self_attn",), exclude=("layers.0", "k_proj")))
    names = {layer.name for layer in report.layers}
    assert len(names) == 6
    assert all("self_attn" in n and "layers.0" not in n and "k_proj" not in n for n in names)
    assert "excluded by 'k_proj'" in {tensor.reason for tensor in report.kept}


# Bad input, refused before work. -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"include": ("nothing*",)}, r"include: 'nothing\*' matches no linear layer.*q_proj"),
        (
            {"exclude": ("lm_head",)},
            "exclude: 'lm_head' matches lm_head, which is not chosen by name",
        ),
        ({"exclude": ("layers",)}, "leaves no layer to compress"),
        (
            {"export": ("onnx",)},
            "export: 'onnx' is no format; there are adapter, compressed-tensors, dense, gguf, gptq, mlx, native",
        ),
        (
            {"export": ("adapter",)},
            "export: adapter is written by runs on a base checkpoint, not without",
        ),
        ({"tasks": ("offline_hellaswga",)}, "offline_hellaswag"),
        ({"model": "no/such/folder/here"}, "no/such/folder/here"),
        ({"calibration": ("missing.txt",)}, r"missing\.txt"),
        ({"samples": 10_000}, "10,?000"),
        ({"device": "cuda:99"}, "device: 'cuda:99' can't be used here"),
        ({"method": GPTQ(group_size=48)}, "group_size: 48 does not divide"),
        ({"method": EoRA(rank=64, base=GPTQ(group_size=32))}, "rank: 64 is above min"),
        ({"export": ("gptq",), "method": RTN(bits=5, group_size=32)}, "5"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(workspace, changes, message):
    with pytest.raises((RecipeError, CheckpointError, InputError, EvalError), match=message):
        compress.run(recipe(workspace, **changes))
    assert left_behind(workspace) == set()


def test_eval_text_that_is_missing_is_refused_before_work(workspace):
    with pytest.raises(RecipeError, match=r"eval_text: .*missing\.txt"):
        compress.run(
            recipe(workspace, eval_windows=2, eval_text="missing.txt"),
            progress=Interrupt("compress", AssertionError("work began")),
        )
    assert left_behind(workspace) == set()


def test_an_evaluation_of_nothing_is_refused(workspace):
    with pytest.raises(RecipeError, match="eval_windows, tasks: 0 windows and no task"):
        compress.evaluate(workspace / "out", recipe(workspace))


def test_an_existing_output_folder_is_refused_and_untouched(workspace):
    (workspace / "out").mkdir()
    (workspace / "out" / "precious").touch()
    with pytest.raises(RecipeError, match=r"out: .* exists"):
        compress.run(recipe(workspace))
    assert [path.name for path in (workspace / "out").iterdir()] == ["precious"]


def test_empty_text_is_refused(workspace):
    (workspace / "text.txt").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"text\.txt"):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


def test_text_shorter_than_one_sequence_is_refused(workspace):
    (workspace / "text.txt").write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match="32"):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


def test_a_truncated_shard_is_refused_by_name(workspace):
    shard = workspace / "model" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


def test_a_corrupt_header_is_refused_by_name(workspace):
    shard = workspace / "model" / "model.safetensors"
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


def sharded(workspace):
    """Turn the model into shards; returns the index."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    (workspace / "model" / "model.safetensors").unlink()
    model.save_pretrained(workspace / "model", max_shard_size="20kB")
    path = workspace / "model" / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_a_shard_missing_from_the_folder_is_refused_by_name(workspace):
    _, index = sharded(workspace)
    gone = sorted(set(index["weight_map"].values()))[1]
    (workspace / "model" / gone).unlink()
    with pytest.raises(CheckpointError, match=gone):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


@pytest.mark.parametrize("path", ["../outside.safetensors", "/etc/outside.safetensors"])
def test_an_index_that_points_outside_the_folder_is_refused(workspace, path):
    file, index = sharded(workspace)
    index["weight_map"]["model.norm.weight"] = path
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


def test_too_little_disk_is_refused(workspace, monkeypatch):
    usage = shutil.disk_usage(workspace)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RecipeError, match="MB are free"):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


# Failures during work. -----------------------------------------------------------------------


def damage(workspace, change):
    """Change the tensors of the model on disk."""
    path = workspace / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_or_infinite_weights_are_an_error_with_their_name(workspace, bad, name):
    def change(tensors):
        tensors[name].view(-1)[3] = bad

    damage(workspace, change)
    with pytest.raises(LayerError, match=name.replace(".", r"\.")):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


def dead(tensors):
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()


def test_a_layer_whose_inputs_are_all_zero_is_an_error_with_its_name(workspace):
    damage(workspace, dead)
    with pytest.raises(LayerError, match=r"layers\.1\.mlp\.gate_proj.*every input channel is zero"):
        compress.run(recipe(workspace))
    assert left_behind(workspace) == set()


def test_a_failing_layer_can_be_left_as_it_was_and_is_then_in_the_report(workspace):
    damage(workspace, dead)
    report = compress.run(recipe(workspace, on_failure="keep"))
    left = {layer.name: layer.note for layer in report.layers if layer.form == "left as it was"}
    assert set(left) == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert all("every input channel is zero" in note for note in left.values())
    assert any("3 layers were left as they were" in note for note in report.notes)


def test_a_run_that_could_compress_nothing_is_an_error(workspace):
    damage(workspace, lambda tensors: tensors["model.embed_tokens.weight"].zero_())
    with pytest.raises(
        LayerError, match=r"no layer could be compressed.*every input channel is zero"
    ):
        compress.run(recipe(workspace, on_failure="keep"))
    assert left_behind(workspace) == set()


def test_a_dead_channel_is_noted(workspace):
    def change(tensors):
        tensors["model.layers.0.input_layernorm.weight"][7] = 0

    damage(workspace, change)
    report = compress.run(recipe(workspace))
    assert "1 of 32 input channels are zero" in report.layers[0].note


def test_a_singular_gram_without_damping_is_an_error_with_the_layers_name(workspace):
    bare = GPTQ(group_size=32, damping=0.0, shrinkage=0.0)
    few = recipe(workspace, samples=1, seq_len=16, method=bare)
    with pytest.raises(LayerError, match=r"layers\.0\.self_attn\.q_proj.*singular.*damping"):
        compress.run(few)
    assert left_behind(workspace) == set()


class Interrupt:
    """Raises in the progress callback when a stage is reached."""

    def __init__(self, stage, error):
        self.stage, self.error = stage, error

    def __call__(self, stage, done, _total):
        if stage.startswith(self.stage) and done:
            raise self.error


@pytest.mark.parametrize("stage", ["compress", "copy", "verify"])
def test_an_interrupt_leaves_nothing(workspace, stage):
    with pytest.raises(KeyboardInterrupt):
        compress.run(recipe(workspace), progress=Interrupt(stage, KeyboardInterrupt()))
    assert left_behind(workspace) == set()


def test_a_full_disk_during_work_leaves_nothing(workspace):
    with pytest.raises(OSError, match="No space left"):
        compress.run(
            recipe(workspace), progress=Interrupt("copy", OSError(28, "No space left on device"))
        )
    assert left_behind(workspace) == set()


def test_a_failure_after_verification_keeps_the_checkpoint_under_an_unfinished_name(workspace):
    with pytest.raises(EvalError) as caught:
        compress.run(
            recipe(workspace, eval_windows=2), progress=Interrupt("fidelity", EvalError("no"))
        )
    assert left_behind(workspace) == {"out.unfinished"}
    assert any("out.unfinished" in note for note in caught.value.__notes__)
    load_export(workspace / "out.unfinished", torch.float32, torch.device("cpu"))
    again = recipe(workspace, eval_windows=2)
    assert compress.evaluate(workspace / "out.unfinished", again).after.fidelity.kl > 0


def test_an_output_folder_that_appears_meanwhile_is_untouched_and_the_result_kept(workspace):
    def appear(stage, _done, _total):
        if stage == "compress":
            (workspace / "out").mkdir(exist_ok=True)

    with pytest.raises(RecipeError, match=r"out: .* appeared while"):
        compress.run(recipe(workspace, eval_windows=0), progress=appear)
    assert list((workspace / "out").iterdir()) == []
    assert left_behind(workspace) == {"out", "out.unfinished"}


def test_what_a_killed_run_left_is_cleared_away_but_verified_work_is_kept(workspace):
    dead = 2**22 + 1  # above the largest process id of Linux
    half, verified = (workspace / f".out.{dead + k}.partial" for k in (0, 1))
    for folder in (half, verified):
        folder.mkdir()
    (verified / ".verified").touch()
    compress.run(recipe(workspace))
    assert left_behind(workspace) == {"out", "out.unfinished"}
