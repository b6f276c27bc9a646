"""Embeddings and heads: in few bits, tied or not, and what formats without room for codes do."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file
from slowness import slow_but
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM
from workspaces import recipe

import compress
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.callbacks import no_progress
from compress.embeddings.plan import PlannedTable, Role
from compress.embeddings.quantise import relative_error, table_forms
from compress.errors import LayerError, RecipeError
from compress.exports.load import load_export
from compress.exports.storage import Outside, Storage
from compress.forms.embedding import CompressedEmbedding
from compress.forms.int8 import Int8
from compress.forms.quantised import Quantised
from compress.forms.tied import Tied
from compress.methods.eora import EoRA
from compress.methods.rtn import RTN
from compress.models.checkpoint import Reader
from compress.prepare.prepare import prepare
from compress.solvers.linalg import output_energy

EMBEDDINGS = "model.embed_tokens"


def table(shape, role, **changes):
    given = {"tensor": f"{EMBEDDINGS}.weight", "n_bytes": 4 * shape[0] * shape[1]}
    given |= {"dtype": torch.float32, "asked": Storage.AUTO}
    return PlannedTable(name=EMBEDDINGS, shape=shape, role=role, **{**given, **changes})


def matrix(v, d, seed=0):
    return torch.randn(v, d, generator=torch.Generator().manual_seed(seed))


def gram_of(d, seed=3):
    """Of inputs whose channels are of very different sizes and go together."""
    x = matrix(256, d, seed) * torch.logspace(-1, 1, d) + matrix(256, 1, seed + 1)
    return Gram.of(x, 1)


def packed(workspace, **changes):
    """A recipe whose embeddings and head are stored by default."""
    method = RTN(bits=4, group_size=32)
    auto = {"embeddings": Storage.AUTO, "head": Storage.AUTO}
    return recipe(workspace, **{"method": method, **auto, **changes})


def test_embeddings_in_8_bits_have_the_nearest_code_to_every_value():
    weight_vd = matrix(50, 24)
    found = table_forms(table((50, 24), Role.EMBEDDINGS), Storage.BITS_8, weight_vd, None).form
    assert isinstance(found, Int8)
    steps = weight_vd / found.scales.float()[:, None]
    assert torch.equal(found.codes.float(), steps.round().clamp(-128, 127))
    assert float((found.dense() - weight_vd).norm() / weight_vd.norm()) < 0.01


@pytest.mark.parametrize("bits", ["8", "4", "3"])
def test_a_head_loses_less_on_its_inputs_than_rounded_to_nearest(bits):
    weight_vd, gram = matrix(64, 32), gram_of(32)
    head = table((64, 32), Role.HEAD)
    quantiser = head.quantiser(int(bits))
    nearest = RTN(bits=int(bits), group_size=quantiser.group_size)
    plain = nearest.compress([weight_vd], Statistics({Gram: gram}))[0]
    found = table_forms(head, Storage(bits), weight_vd, gram).form
    lost = [
        output_energy(weight_vd.double() - form.dense(), gram.mean_ii()) for form in (found, plain)
    ]
    assert lost[0] < 0.92 * lost[1]


def test_the_error_of_a_head_is_that_of_its_outputs_and_that_of_embeddings_of_their_rows():
    weight_vd, gram, counts_v = matrix(40, 16), gram_of(16), torch.arange(40).double()
    form = table_forms(table((40, 16), Role.HEAD), Storage.BITS_4, weight_vd, gram).form
    error = (weight_vd - form.dense()).double()
    by_hand = output_energy(error, gram.mean_ii()) / output_energy(weight_vd, gram.mean_ii())
    assert relative_error(weight_vd, form, gram, None) == pytest.approx(by_hand**0.5)
    rows = (error.square().sum(1) @ counts_v) / (weight_vd.double().square().sum(1) @ counts_v)
    assert relative_error(weight_vd, form, None, counts_v) == pytest.approx(float(rows) ** 0.5)


def test_values_beyond_float16_are_refused():
    weight_vd = matrix(8, 4) * 1e6
    with pytest.raises(LayerError, match="do not fit float16; use bfloat16"):
        table_forms(table((8, 4), Role.HEAD), Storage.FLOAT16, weight_vd, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_by_name(value):
    weight_vd = matrix(8, 4).fill_(value)
    with pytest.raises(LayerError, match=r"model\.embed_tokens: it holds NaN or infinity"):
        table_forms(table((8, 4), Role.EMBEDDINGS), Storage.BITS_8, weight_vd, None)


def row_errors(form, weight_vd):
    return (form.dense() - weight_vd).norm(dim=1) / weight_vd.norm(dim=1)


@pytest.mark.parametrize("role", [Role.EMBEDDINGS, Role.TIED, Role.HEAD])
@pytest.mark.parametrize(("bits", "limit"), [("8", 0.012), ("4", 0.16)])
def test_rows_of_any_size_are_as_precise_as_the_bits_allow(bits, limit, role):
    sizes = [1.0, 1e-6, 1e-7, 1e-8, 1e-9, 1e-12, 1e9]
    weight_vd = matrix(48, 64) * torch.tensor(sizes + [1.0] * 41)[:, None]
    weight_vd[10] = 0
    gram = None if role is Role.EMBEDDINGS else Gram.of(matrix(256, 64, seed=3), 1)
    found = table_forms(table((48, 64), role), Storage(bits), weight_vd, gram).form
    errors = row_errors(found, weight_vd)
    assert not found.dense()[10].any()
    assert float(errors[errors.isfinite()].max()) < limit
    assert found.scales.dtype is torch.bfloat16


def test_scales_stay_fp16_where_it_reaches_every_row():
    weight_vd = matrix(48, 64) * torch.logspace(-2, 2, 48)[:, None]
    for bits in ("8", "4"):
        form = table_forms(table((48, 64), Role.EMBEDDINGS), Storage(bits), weight_vd, None).form
        assert form.scales.dtype is torch.float16
        assert "scales" not in form.spec()


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize("bits", ["8", "4"])
def test_an_export_with_rows_far_smaller_than_others_has_the_bytes_that_were_planned(
    workspace, bits
):
    path = workspace / "model" / "model.safetensors"
    state = load_file(path)
    weight_vd = state[f"{EMBEDDINGS}.weight"]
    weight_vd[5:9] *= torch.logspace(-6, -9, 4)[:, None]
    save_file(state, path, {"format": "pt"})
    job = packed(workspace, embeddings=Storage(bits))
    planned = compress.plan(job).plan
    compress.run(job)
    assert Reader(workspace / "out").total_bytes == planned.bytes_after
    form = load_export(workspace / "out").get_input_embeddings().form
    assert form.scales.dtype is torch.bfloat16
    errors = row_errors(form, weight_vd)
    assert float(errors[5:9].max()) < 1.5 * float(errors[9:].max())


class Scaled(nn.Embedding):
    """Embeddings whose module does more than look up."""

    def forward(self, input_ids):
        return super().forward(input_ids) * 3


def test_the_module_does_what_the_one_in_whose_place_it_is_does():
    old = Scaled(50, 24, padding_idx=0)
    form = table_forms(
        table((50, 24), Role.EMBEDDINGS), Storage.BITS_4, old.weight.detach(), None
    ).form
    new, ids = CompressedEmbedding(form, old), torch.tensor([[0, 7, 49], [7, 7, 3]])
    assert torch.equal(new(ids), 3 * F.embedding(ids, form.dense()))
    assert torch.equal(new.weight, form.dense())
    assert set(new.state_dict()) == {f"form.{name}" for name in form.state_dict()}
    assert old.padding_idx == 0
    assert old(ids).shape == (2, 3, 24)
    assert new.to(torch.bfloat16)(ids).dtype is torch.bfloat16


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize("tied", slow_but([True, False], kept=True))
@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_run_writes_what_it_planned_and_the_export_computes_with_the_codes(workspace, bits, tied):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=tied)
    job = packed(workspace, embeddings=Storage(bits), head=Storage(bits))
    planned = compress.plan(job).plan
    report = compress.run(job)
    assert Reader(workspace / "out").total_bytes == planned.bytes_after
    assert [entry.note.partition(":")[0] for entry in report.embeddings] == (
        ["embeddings and head"] if tied else ["embeddings", "head"]
    )
    model = load_export(workspace / "out")
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings.form, Int8 if bits == "8" else Quantised)
    assert isinstance(head.form, Tied) is tied
    before = AutoModelForCausalLM.from_pretrained(workspace / "model")
    for new, old in ((embeddings, before.get_input_embeddings()), (head, before.lm_head)):
        dense, weight = new.form.dense(), old.weight.detach()
        assert float((dense - weight).norm() / weight.norm()) < (0.01 if bits == "8" else 0.2)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = model(ids).logits
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(expected, F.linear(hidden, head.form.dense()))


@pytest.mark.usefixtures("quick_verification")
def test_a_tied_head_has_a_correction_that_the_embeddings_go_without(workspace):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=True)
    job = replace(recipe(workspace), embeddings=Storage.BITS_3, head=Storage.BITS_3)
    planned = compress.plan(job).plan
    report = compress.run(job)
    assert Reader(workspace / "out").total_bytes == planned.bytes_after
    assert report.embeddings[0].form.endswith("+ rank 4")
    model = load_export(workspace / "out")
    weight = AutoModelForCausalLM.from_pretrained(workspace / "model").lm_head.weight.detach()
    embeddings = model.get_input_embeddings().form.dense()
    read = prepare(job, no_progress).tokens.input_ids.flatten()
    rows = (embeddings[read] - weight[read]).norm() / weight[read].norm()
    assert report.embeddings[0].relative_error == pytest.approx(float(rows), rel=1e-5)
    head = model.get_output_embeddings().form.dense()
    assert torch.linalg.matrix_rank((head - embeddings).double(), rtol=1e-3) == 4
    assert (weight - head).norm() < (weight - embeddings).norm()


@pytest.mark.usefixtures("quick_verification")
def test_every_format_stores_them_as_it_can_and_reproduces_its_own_logits(workspace):
    report = compress.run(packed(workspace, export=("native", "gptq", "dense")))
    assert next(entry.form for entry in report.embeddings) == "8-bit rows"
    assert {
        each.format: each.relative_difference < 1e-4 for each in report.exports
    } == dict.fromkeys(("native", "gptq", "dense"), True)
    key = f"{EMBEDDINGS}.weight"
    found = {name: Reader(workspace / "out" / name) for name in ("native", "gptq", "dense")}
    assert key not in found["native"]
    assert found["gptq"].dtype(key) is torch.bfloat16
    assert found["dense"].dtype(key) is torch.float32
    planned = compress.plan(packed(workspace, export=("native", "gptq", "dense"), out=None)).plan
    for name, reader in found.items():
        assert reader.total_bytes == planned.export_bytes(name), name


@pytest.mark.usefixtures("quick_verification")
def test_tensors_whose_values_are_bf16_numbers_are_stored_so_and_others_are_not(workspace):
    path = workspace / "model" / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], 1.5)
    odd = "model.layers.0.input_layernorm.weight"
    state[odd] = torch.full_like(state[odd], 1.001)
    save_file(state, path, {"format": "pt"})
    plan = compress.plan(packed(workspace)).plan
    assert "model.norm.weight" in plan.outside.narrowed
    assert odd not in plan.outside.narrowed
    job = packed(workspace)
    compress.run(job)
    written = Reader(workspace / "out")
    assert written.dtype("model.norm.weight") is torch.bfloat16
    assert written.dtype(odd) is torch.float32
    assert written.total_bytes == plan.bytes_after


@pytest.mark.parametrize(
    ("changes", "option", "words"),
    [
        ({"export": ("gptq",), "embeddings": Storage.BITS_8}, "embeddings", "8, which the gptq"),
        ({"export": ("dense",), "head": Storage.BITS_4}, "head", "4, which the dense"),
        (
            {"embeddings": Storage.BITS_8, "head": Storage.BITS_4},
            "head",
            "4, but lm_head is tied to model.embed_tokens, which is asked for as 8",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_before_work(workspace, changes, option, words):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=True)
    with pytest.raises(RecipeError, match=words) as error:
        compress.plan(packed(workspace, **changes))
    assert error.value.option == option


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("lm_head", "'lm_head' matches lm_head, .*: --head says how it is stored"),
        ("*embed*", r"matches model\.embed_tokens, .*: --embeddings says how it is stored"),
    ],
)
def test_patterns_that_choose_them_are_refused_with_the_options_that_do(
    workspace, option, pattern, words
):
    with pytest.raises(RecipeError, match=words) as error:
        compress.plan(packed(workspace, **{option: (pattern,)}))
    assert error.value.option == option


def test_a_recipe_takes_bits_as_a_number_and_refuses_others_by_name():
    found = compress.Recipe.from_mapping({"embeddings": 4, "head": "as-is"})
    assert (found.embeddings, found.head) == (Storage.BITS_4, Storage.AS_IS)
    with pytest.raises(RecipeError, match=r"embeddings.*7"):
        compress.Recipe.from_mapping({"embeddings": 7})


def test_those_of_a_base_checkpoint_stay(workspace):
    with pytest.raises(RecipeError, match="those of a base checkpoint stay as they are"):
        recipe(workspace, base_checkpoint=str(workspace), embeddings=Storage.BITS_8)


@pytest.mark.usefixtures("quick_verification")
def test_a_native_export_with_packed_embeddings_can_be_corrected(workspace):
    compress.run(packed(workspace))
    on_top = recipe(
        workspace,
        out=workspace / "corrected",
        base_checkpoint=str(workspace / "out"),
        method=compress.METHODS["eora"](rank=2),
        export=("native", "adapter"),
    )
    compress.run(replace(on_top, embeddings=Storage.AUTO, head=Storage.AUTO))
    first, second = (
        load_export(folder) for folder in (workspace / "out", workspace / "corrected/native")
    )
    a, b = first.get_input_embeddings().form, second.get_input_embeddings().form
    assert torch.equal(a.codes, b.codes)
    config = json.loads((workspace / "corrected/native/config.json").read_text())
    assert EMBEDDINGS in config["layers"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_verification")
def test_a_tied_head_with_a_correction_stays_when_its_checkpoint_is_corrected_twice(workspace):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=True)
    job = replace(recipe(workspace), embeddings=Storage.BITS_4, head=Storage.BITS_4)
    compress.run(job)
    auto = {"embeddings": Storage.AUTO, "head": Storage.AUTO, "method": EoRA(rank=2)}
    folders = [workspace / name for name in ("out", "once", "twice")]
    for base, out in pairwise(folders):
        corrected = recipe(
            workspace, out=out, base_checkpoint=str(base), export=("native",), **auto
        )
        planned = compress.plan(corrected).plan
        compress.run(corrected)
        assert Reader(out).total_bytes == planned.bytes_after
    first, *others = [load_export(folder).get_output_embeddings().form for folder in folders]
    for form in others:
        assert isinstance(form.terms[0], Tied)
        assert torch.equal(form.dense(), first.dense())


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize("tied", slow_but([True, False], kept=True))
def test_the_base_model_loads_without_the_head_that_is_packed(workspace, tied):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=tied)
    job = replace(recipe(workspace), embeddings=Storage.BITS_4, head=Storage.BITS_4)
    compress.run(job)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    found = AutoModel.from_pretrained(workspace / "out")(ids).last_hidden_state
    assert torch.equal(found, load_export(workspace / "out").model(ids).last_hidden_state)


@pytest.mark.usefixtures("quick_verification")
def test_biases_of_compressed_layers_take_the_bytes_that_were_planned(workspace):
    save_tiny(workspace / "model", "qwen2", num_key_value_heads=4)
    path = workspace / "model" / "model.safetensors"
    state = load_file(path)
    zeros = {k: torch.zeros_like(v) for k, v in state.items() if k.endswith(".bias")}
    save_file({**state, **zeros}, path, {"format": "pt"})
    planned = compress.plan(packed(workspace)).plan
    compress.run(packed(workspace))
    assert len(zeros) == 9
    assert Reader(workspace / "out").total_bytes == planned.bytes_after


@pytest.mark.parametrize(
    ("outside", "source", "storage"),
    [
        (Outside.CODES, "bfloat16", Storage.BITS_8),
        (Outside.HALF, "float32", Storage.BFLOAT16),
        (Outside.HALF, "float16", Storage.AS_IS),
        (Outside.WHOLE, "float32", Storage.AS_IS),
        (Outside.ABSENT, "float32", Storage.AS_IS),
    ],
)
def test_the_default_is_what_the_format_has_room_for(outside, source, storage):
    assert outside.default(source) is storage
    assert outside.holds(storage)
