"""Dictionaries from recipe to checkpoint: shared ones too, in processes that know the toolkit and those that do not."""

import json

import pytest
import torch
from exported import python
from transformers import AutoModelForCausalLM
from workspaces import recipe

import compress
from compress.errors import CheckpointError, RecipeError
from compress.exports.load import load_export, unpack
from compress.exports.verification.probe import read_probe
from compress.exports.verification.verify import check
from compress.forms.shared import Common, Shared
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.eora import EoRA

QUICK = {"rounds": 2, "keep": 0.85}
METHODS = {
    "shared": CoSpaDi(**QUICK),
    "own": CoSpaDi(**QUICK, share="none"),
    "across depth": CoSpaDi(**QUICK, share="depth"),
    "across depth, corrected": EoRA(rank=2, base=CoSpaDi(**QUICK, share="depth")),
    "2:4 in 14 bits": CoSpaDi(**QUICK, pattern="2:4", code_bits="14"),
    "in 8 bits, corrected": EoRA(rank=2, base=CoSpaDi(**QUICK, code_bits="8")),
}


@pytest.fixture(params=METHODS, ids=METHODS.keys())
def done(request, workspace):
    """A job, its plan and its report."""
    job = recipe(workspace, method=METHODS[request.param], export=("native",))
    return job, compress.plan(job).plan, compress.run(job)


@pytest.mark.usefixtures("quick_verification")
def test_the_planned_bytes_are_on_disk_and_every_layer_got_what_it_was_planned(done):
    job, planned, report = done
    assert planned.bytes_after == report.totals.tensor_bytes_after
    expected = {layer.name: layer.bytes_after for layer in planned.layers}
    assert {layer.name: layer.bytes_after for layer in report.layers} == expected
    assert all(layer.relative_error < 1 for layer in report.layers)
    assert check(job.folder, "cpu").passed


@pytest.mark.usefixtures("quick_verification")
def test_expanding_the_codes_changes_no_output(done):
    job, _, _ = done
    packed, expanded = (load_export(job.folder, torch.float32) for _ in range(2))
    unpack(expanded)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(expanded(ids).logits, packed(ids).logits)
        torch.testing.assert_close(packed(ids).logits, packed(ids).logits)


@pytest.mark.slow
@pytest.mark.as_run
def test_a_checkpoint_loads_in_a_process_without_the_toolkit(workspace):
    job = recipe(workspace, method=METHODS["shared"])
    compress.run(job)
    probe, _ = read_probe(job.folder)
    torch.save((probe.input_ids, probe.positions), workspace / "probe.pt")
    ran = python(
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)\n"
        "ids, positions = torch.load(sys.argv[2])\n"
        "with torch.no_grad():\n    print(model(ids).logits[0][positions].flatten().tolist())\n",
        job.folder,
        workspace / "probe.pt",
        hide_toolkit=True,
        cwd=workspace,
    )
    assert ran.code == 0, ran.err
    found = torch.tensor(json.loads(ran.out)).view_as(probe.logits)
    torch.testing.assert_close(found, probe.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("quick_verification")
def test_layers_with_one_input_have_one_dictionary_in_memory_too(workspace):
    job = recipe(workspace, method=METHODS["shared"])
    compress.run(job)
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
    layer = model.model.layers[0]
    owner = layer.self_attn.q_proj.form.down
    assert isinstance(owner, Common)
    for reader in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        assert isinstance(reader.form.down, Shared)
        assert reader.form.down.form is owner
    assert layer.mlp.up_proj.form.down.form is layer.mlp.gate_proj.form.down
    names = [name for name, _ in model.named_parameters() if "k_proj.form.down" in name]
    assert not names


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize("propagate", ["none", "block"])
def test_across_depth_blocks_in_a_row_have_one_dictionary(workspace, propagate):
    job = recipe(workspace, method=METHODS["across depth"], propagate=propagate)
    compress.run(job)
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
    first, second, last = (layer.mlp for layer in model.model.layers)
    assert second.gate_proj.form.down.form is first.gate_proj.form.down
    assert second.up_proj.form.down.form is first.gate_proj.form.down
    assert isinstance(last.gate_proj.form.down, Common)  # the third of three blocks has no second
    assert last.up_proj.form.down.form is last.gate_proj.form.down


@pytest.mark.usefixtures("quick_verification")
def test_statistics_of_blocks_loaded_together_serve_those_loaded_alone(workspace):
    depth, inputs = (
        compress.run(
            recipe(
                workspace,
                method=CoSpaDi(**QUICK, share=share),
                propagate="none",
                statistics="reuse",
                out=workspace / share,
            )
        )
        for share in ("depth", "inputs")
    )
    assert not any("used again" in note for note in depth.notes)
    assert any("used again" in note for note in inputs.notes)
    other = workspace / "out of its own"
    alone = recipe(
        workspace, method=CoSpaDi(**QUICK), propagate="none", statistics="off", out=other
    )
    errors = [
        [layer.relative_error for layer in each.layers] for each in (inputs, compress.run(alone))
    ]
    assert errors[0] == errors[1]


def test_depth_is_refused_where_layers_must_wait_for_those_before_them(workspace):
    job = recipe(workspace, method=METHODS["across depth"], propagate="sublayer")
    with pytest.raises(RecipeError, match=r"method\.share: 2 blocks are compressed together"):
        compress.plan(job)


@pytest.mark.usefixtures("quick_verification")
def test_a_layer_that_reads_what_is_not_there_is_refused(workspace):
    job = recipe(workspace, method=METHODS["shared"])
    compress.run(job)
    path = job.folder / "config.json"
    path.write_text(path.read_text().replace("q_proj.form.down", "q_proj.form.up"))
    with pytest.raises(CheckpointError, match=r"lets a layer read .*q_proj\.form\.up"):
        load_export(job.folder)


@pytest.mark.usefixtures("quick_verification")
def test_layers_that_the_patterns_leave_out_share_nothing(workspace):
    job = recipe(workspace, method=METHODS["shared"], exclude=("q_proj", "gate_proj"))
    report = compress.run(job)
    described = {layer.name.rpartition(".")[2]: layer.form for layer in report.layers}
    assert "shared" in described["k_proj"]
    assert "shared" in described["v_proj"]
    assert "shared" not in described["up_proj"]


def test_the_gptq_layout_is_refused_for_dictionaries(workspace):
    with pytest.raises(RecipeError, match="gptq cannot hold"):
        compress.run(recipe(workspace, method=METHODS["own"], export=("gptq",)))
