"""What families with experts have otherwise: other stacks, tables, draft heads, embeddings with a norm."""

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)
from workspaces import fill, recipe

import calibration.skeleton
import compress
from calibration.errors import InputError
from calibration.experts.module import DOWN, GATE, UP, Layout, layout_of, unstack
from calibration.experts.names import is_stacked, slices_of, stored_layout
from calibration.skeleton import PartLoader, build_skeleton, open_parts
from compress.bases import open_base
from compress.embeddings.plan import planned_tables
from compress.errors import CheckpointError
from compress.exports.storage import Storage
from compress.models.checkpoint import Reader
from compress.models.model_config import read_config, with_numbers

E_, H, M = 3, 8, 4
LAYOUT = Layout(E_, H, M, gated=True, biased=False, transposed=False, interleaved=False)


class Undeclared(nn.Module):
    """Experts of a class that does not say how it stacks, called with the router's choice."""

    def __init__(self):
        super().__init__()
        self.hidden_dim, self.intermediate_dim, self.act_fn = H, M, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.empty(E_, 2 * M, H, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(E_, H, M, device="meta"))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        found = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2)
                found[token] += weight * F.linear(self.act_fn(gate) * up, self.down_proj[expert])
        return found


def test_experts_that_do_not_say_how_they_stack_are_tried_with_a_routers_choice():
    assert layout_of(Undeclared()) == LAYOUT


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize(
    "operation", [Transpose(1, 2), Interleave(1), Transpose(1, 2, check_dims=True)]
)
def test_slices_of_a_checkpoints_stack_are_those_of_the_stack_that_transformers_makes(
    operation, leaf
):
    if isinstance(operation, Interleave) and leaf == DOWN:
        pytest.skip("nothing in it alternates")
    o, i = (2 * M, H) if leaf != DOWN else (H, M)
    stored = torch.randn((E_, i, o) if isinstance(operation, Transpose) else (E_, o, i))
    model = nn.Module()
    setattr(model, leaf, nn.Parameter(torch.empty(E_, o, i)))
    made = operation.convert({"a": stored}, ["a"], [leaf], model=model, full_layer_name=leaf)[leaf]
    layout = stored_layout(LAYOUT, [operation], lambda: tuple(stored.shape), leaf)
    slices = slices_of("experts", LAYOUT, "key", leaf, layout)
    assert len(slices) == (E_ if leaf == DOWN else 2 * E_)
    for one in slices.values():
        assert torch.equal(one.take(stored), LAYOUT.take(made, one.expert, one.projection))


def test_a_stack_that_is_as_the_models_own_is_not_turned_where_shapes_decide():
    same = (E_, 2 * M, H)
    assert (
        stored_layout(LAYOUT, [Transpose(1, 2, check_dims=True)], lambda: same, "gate_up_proj")
        == LAYOUT
    )


def test_gate_and_up_in_a_stack_each_are_told_apart_by_their_place():
    layout = stored_layout(LAYOUT, [Concatenate(1)], tuple, "gate_up_proj")
    gate, up = torch.randn(2, E_, M, H)
    made = torch.cat((gate, up), 1)
    for place, (projection, stored) in enumerate([(GATE, gate), (UP, up)]):
        slices = slices_of("experts", LAYOUT, "key", "gate_up_proj", layout, place)
        assert [one.projection for one in slices.values()] == [projection] * E_
        assert {one.share for one in slices.values()} == {E_}
        for one in slices.values():
            assert torch.equal(one.take(stored), LAYOUT.take(made, one.expert, projection))


def test_an_unknown_way_to_stack_is_refused_by_name():
    assert not is_stacked([MergeModulelist(0), Concatenate(1)])
    with pytest.raises(InputError, match="by dict, so its experts cannot be told apart"):
        stored_layout(LAYOUT, [{}], tuple, "gate_up_proj")


def test_a_tensor_that_loading_splits_keeps_its_name(monkeypatch):
    split = WeightConverter(
        "mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(0)]
    )
    monkeypatch.setattr(calibration.skeleton, "get_model_conversion_mapping", lambda _: [split])
    model = tiny_model("llama")
    tensors = dict(model.state_dict())
    tensors["model.layers.0.mlp.both.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    loader = PartLoader(build_skeleton(model.config, torch.float32), tensors)
    assert loader.converted == {"model.layers.0.mlp.both.weight"}


def test_weights_of_unstacked_experts_are_not_drawn_by_the_familys_code(monkeypatch):
    model = tiny_model("qwen3_moe")
    drawn = []

    def draw(module):
        drawn.append(module)
        if hasattr(module, "experts"):
            module.experts.gate_up_proj  # noqa: B018  (as Qwen3-Omni's does)

    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    assert unstack(model)
    monkeypatch.setattr(model, "_init_weights", draw)
    monkeypatch.setattr(model.model, "_init_weights", draw)
    model.initialize_weights()
    assert model.lm_head in drawn


@pytest.mark.parametrize(("dtype", "refused"), [(torch.int64, False), (torch.int32, True)])
def test_tables_of_indices_are_ordinary_and_narrower_integers_are_codes(tmp_path, dtype, refused):
    fill(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    table = {"model.layers.0.mlp.gate.tid2eid": torch.zeros(128, 2, dtype=dtype)}
    save_file(load_file(path) | table, path, metadata={"format": "pt"})
    if refused:
        with pytest.raises(CheckpointError, match="tid2eid are stored as int32"):
            open_base(tmp_path / "model")
    else:
        assert open_base(tmp_path / "model").description == "ordinary weights"


def test_infinities_of_a_configuration_are_numbers():
    read = with_numbers({"limit": [0.0, {"__float__": "Infinity"}], "inner": {"a": "b"}})
    assert read == {"limit": [0.0, float("inf")], "inner": {"a": "b"}}


@pytest.mark.usefixtures("quick_verification")
def test_a_draft_head_in_the_place_of_a_block_is_named_as_one(tmp_path, monkeypatch):
    fill(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    draft = {
        name.replace("layers.0.", "layers.9."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.0." in name
    }
    save_file(tensors | draft, path, metadata={"format": "pt"})
    ignored = [r"model\.layers\.9\..*"]
    kind = type(tiny_model("llama"))
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", ignored)
    report = compress.run(recipe(tmp_path))
    reasons = {kept.reason for kept in report.kept if kept.name in draft}
    assert reasons == {"no part of the model as transformers has it, such as a draft head"}


class Normed(nn.Embedding):
    """Embeddings that are normalised after the lookup."""

    def __init__(self, like):
        super().__init__(*like.weight.shape, device="meta")
        self.norm = nn.RMSNorm(like.embedding_dim, device="meta")


def _tables(loader, reader):
    asked = (Storage.BITS_8, Storage.AS_IS)
    return [table.name for table in planned_tables(loader, reader, asked, ("native",), None)]


def test_embeddings_with_weights_beside_their_rows_are_left(tmp_path):
    fill(tmp_path)
    reader = Reader(tmp_path / "model")
    loader = open_parts(read_config(tmp_path / "model"), torch.float32, reader)
    assert _tables(loader, reader) == ["model.embed_tokens"]
    loader.model.model.embed_tokens = Normed(loader.model.model.embed_tokens)
    assert _tables(loader, reader) == []
