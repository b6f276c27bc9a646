"""What speaks against a base checkpoint or its place is found before any work, and named."""

import foreign
import pytest
import torch
from families import save_tiny
from foreign import change, change_config, gptq_layer, grid, write
from workspaces import recipe

import compress
from compress.cli.main import main
from compress.errors import CheckpointError, RecipeError
from compress.methods.eora import EoRA
from compress.methods.svd_residual import SVDResidual

pytestmark = pytest.mark.usefixtures("quick_verification")
DOWN = "model.layers.1.mlp.down_proj"
EXPERT = "model.layers.2.mlp.experts.1.down_proj.weight"


def base(workspace, config=foreign.GPTQ, layer=lambda w: gptq_layer(grid(w))):
    return write(workspace / "model", workspace / "base", config, layer)


def nf4_base(workspace):
    layer = lambda w: foreign.bitsandbytes_layer(foreign.blocks(w))  # noqa: E731
    return base(workspace, foreign.BITSANDBYTES, layer)


def moe_base(workspace):
    """Plain weights, those of attention changed; experts as they were."""
    for path in (workspace / "model").iterdir():
        path.unlink()
    (workspace / "model").rmdir()
    save_tiny(workspace / "model", "qwen3_moe", num_key_value_heads=4)
    folder = write(workspace / "model", workspace / "base", {}, lambda w: {"weight": w})
    change_config(folder, quantization_config=None)

    def scale(tensors):
        tensors |= {k: t * 1.1 for k, t in tensors.items() if "self_attn" in k and "proj" in k}

    change(folder, scale)
    return folder


def on_base(workspace, **changes):
    options = {"base_checkpoint": str(workspace / "base"), "method": EoRA(rank=4)}
    return recipe(workspace, **{**options, **changes})


def set_to(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_to(EXPERT, lambda t: t * torch.nan), f"{EXPERT} holds NaN"),
        (set_to(EXPERT, lambda t: t[1:]), f"{EXPERT} has the shape .*, in the original it has"),
        (lambda tensors: tensors.pop(EXPERT), f"the checkpoint lacks the weights {EXPERT}"),
    ],
)
def test_experts_that_are_not_the_originals_are_refused_by_name(workspace, edit, message):
    change(moe_base(workspace), edit)
    with pytest.raises(CheckpointError, match=f"base_checkpoint: .*{message}"):
        compress.plan(on_base(workspace))


def test_experts_that_the_base_has_changed_get_a_correction(workspace):
    change(moe_base(workspace), set_to(EXPERT, lambda t: t * 1.1))
    report = compress.run(on_base(workspace, method=EoRA(rank=2)))
    (expert,) = (layer for layer in report.layers if ".experts." in layer.name)
    assert f"{expert.name}.weight" == EXPERT
    assert expert.relative_error < expert.base_error


@pytest.mark.parametrize("name", [f"{DOWN}.weight", "model.norm.weight"])
def test_an_original_with_nan_is_refused_before_work(workspace, name):
    base(workspace)
    change(workspace / "model", set_to(name, lambda t: t * torch.nan))
    with pytest.raises(CheckpointError, match=f"the original's {name} holds NaN"):
        compress.plan(on_base(workspace))


def test_a_base_that_says_it_has_a_head_and_has_none_is_refused(workspace):
    for path in (workspace / "model").iterdir():
        path.unlink()
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=True)
    change_config(base(workspace), tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings .* it has no lm_head\.weight"):
        compress.plan(on_base(workspace))


def test_a_config_that_makes_no_model_is_refused(workspace):
    change_config(base(workspace), hidden_size=33)
    with pytest.raises(CheckpointError, match=r"base_checkpoint: .*config\.json is not valid"):
        compress.plan(on_base(workspace))


def test_nothing_is_written_into_the_base(workspace, monkeypatch):
    folder = base(workspace)
    with pytest.raises(RecipeError, match="the base checkpoint, which is never written to"):
        compress.plan(on_base(workspace, out=folder / "corrected"))
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError, match=r"out: base-eora lies in"):
        compress.run(on_base(workspace, out=None, base_checkpoint="."))


def test_a_base_named_by_a_dot_has_its_own_name_in_adapter_and_card(workspace, monkeypatch):
    folder = base(workspace)
    monkeypatch.chdir(folder)
    report = compress.run(on_base(workspace, base_checkpoint="."))
    assert report.base.checkpoint == str(folder)
    assert 'from_pretrained("base")' in (workspace / "out" / "README.md").read_text()


def test_a_link_to_nowhere_is_in_the_way_of_the_output(workspace):
    base(workspace)
    (workspace / "link").symlink_to(workspace / "nowhere")
    with pytest.raises(RecipeError, match="link exists"):
        compress.plan(on_base(workspace, out=workspace / "link"))


def test_a_dtype_of_factors_that_have_few_bits_is_refused():
    with pytest.raises(RecipeError, match=r"factor_dtype: bfloat16 .* --adapter-bits 8"):
        SVDResidual(adapter_bits="8", factor_dtype="bfloat16")


def test_options_of_the_base_do_not_stand_in_the_way_of_the_corrections(workspace, capsys):
    base(workspace)
    given = ["--method", "eora", "--base-checkpoint", str(workspace / "base"), "--rank", "4"]
    given += ["--model", str(workspace / "model"), "--calibration", str(workspace / "text.txt")]
    given += ["--samples", "8", "--seq-len", "32", "--eval-windows", "0", "--tasks", "none"]
    assert main(["plan", *given, "--shrinkage", "0"]) == 0
    assert main(["plan", *given[2:], "--shrinkage", "2"]) == 2
    assert "method.shrinkage" in capsys.readouterr().err


def test_codes_that_no_form_holds_are_told_and_counted_as_they_are_written(workspace):
    nf4_base(workspace)
    adapter = compress.run(on_base(workspace, method=EoRA(rank=2)))
    native = compress.run(
        on_base(workspace, method=EoRA(rank=2), export=("native",), out=workspace / "native")
    )
    assert {layer.form for layer in adapter.layers} == {"bitsandbytes, nf4 + rank 2"}
    assert {layer.form for layer in native.layers} == {"32-bit dense + rank 2"}
    kept = sum(tensor.n_bytes for tensor in native.kept)
    assert kept + native.totals.layer_bytes_after == native.exports[0].tensor_bytes
    assert any("a native export has them as ordinary weights" in note for note in native.notes)
