"""Experts of a mixture as layers: placed whatever the checkpoint looks like, with statistics of their own tokens."""

import pytest
import torch
from families import MIXTURES, tiny_ids, tiny_model
from safetensors.torch import load_file
from test_walk import CPU, walker
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from calibration.experts.module import Experts, Layout, layout_of, take_all_apart
from calibration.experts.pooling import Routed
from calibration.experts.routing import Routing
from calibration.propagation import Propagate
from calibration.skeleton import open_parts
from calibration.statistics.cross_gram import CrossGram
from calibration.statistics.gram import Gram
from calibration.statistics.held_out import HeldOut
from calibration.walk import walk

GRAM = frozenset({Gram})
EXPERT = "model.layers.0.mlp.experts.{}.{}"
READ, INSIDE = ("gate_proj", "up_proj"), ("down_proj",)


def opened(folder, family, dtype=torch.float32, **changes):
    """A model on disk as transformers loads it, and the loader of its parts."""
    tiny_model(family, **changes).to(dtype).save_pretrained(folder, max_shard_size="30KB")
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return own, open_parts(own.config, torch.float32, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_an_unstacked_model_predicts_what_transformers_does(family, dtype, tmp_path):
    own, loader = opened(tmp_path, family, dtype)
    assert loader.experts
    loader.load([""], CPU)
    with torch.no_grad():
        expected, found = own(tiny_ids()).logits, loader.model(tiny_ids()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", MIXTURES)
def test_every_weight_of_an_expert_is_a_layer_and_every_layer_is_filled_from_the_checkpoint(
    family, tmp_path
):
    own, loader = opened(tmp_path, family)
    inside = {
        f"{path}.{name}.weight"
        for path, module in loader.experts.items()
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    stacks = [name for name, p in own.named_parameters() if ".experts." in name and p.ndim == 3]
    assert len(stacks) == 2 * len(loader.experts)
    assert inside <= set(loader.memory_names.values())
    total = sum(own.get_parameter(name).numel() for name in stacks)
    assert total == sum(loader.model.get_parameter(name).numel() for name in inside)


@pytest.mark.parametrize("changes", [{"num_local_experts": 1, "num_experts_per_tok": 1},
                                     {"num_local_experts": 4, "num_experts_per_tok": 4}], ids=str)  # fmt: skip
def test_one_expert_alone_and_all_of_them_at_once_are_mixtures_too(changes, tmp_path):
    own, loader = opened(tmp_path, "mixtral", **changes)
    loader.load([""], CPU)
    with torch.no_grad():
        expected, found = own(tiny_ids()).logits, loader.model(tiny_ids()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_put_into_a_stack_is_what_is_taken_out_and_nothing_else_changes(
    transposed, interleaved, gated
):
    layout = Layout(
        3,
        6,
        4,
        gated=gated,
        biased=False,
        transposed=transposed,
        interleaved=interleaved and gated,
    )
    for projection in layout.projections:
        stack = torch.zeros(layout.stack_shape(projection))
        value = torch.randn(layout.shape(projection))
        layout.put(stack, 1, projection, value)
        assert torch.equal(layout.take(stack, 1, projection), value)
        assert int((stack != 0).sum()) == value.numel()


def test_interleaved_outputs_of_a_gate_are_the_even_ones():
    layout = Layout(1, 2, 3, gated=True, biased=False, transposed=False, interleaved=True)
    stack = torch.arange(12.0).reshape(1, 6, 2)
    assert layout.take(stack, 0, "gate_proj").tolist() == [[0, 1], [4, 5], [8, 9]]
    assert layout.take(stack, 0, "up_proj").tolist() == [[2, 3], [6, 7], [10, 11]]


def test_a_module_that_does_more_than_its_shapes_tell_is_left_alone():
    model = tiny_model("mixtral")
    stacked = model.model.layers[0].mlp.experts
    assert layout_of(stacked) is not None
    plain = stacked.forward.__func__.__wrapped__

    class Doubled(type(stacked)):
        def forward(self, *given):
            return 2 * plain(self, *given)

    stacked.__class__ = Doubled
    assert layout_of(stacked) is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_loaded_model_that_is_taken_apart_predicts_what_it_did(family):
    model = tiny_model(family)
    with torch.no_grad():
        before = model(tiny_ids()).logits
        take_all_apart(model)
        after = model(tiny_ids()).logits
    assert any(isinstance(module, Experts) for module in model.modules())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def routed(model, hidden):
    """By expert of Mixtral's first layer: which tokens (t,) its router sends there, what it reads and what down reads.

    From the weights, in the plainest code.
    """
    trunk = model.model
    block, turned = trunk.layers[0], trunk.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    seen, _ = block.self_attn(block.input_layernorm(hidden), turned, attention_mask=None)
    x_th = block.post_attention_layernorm(hidden + seen).reshape(-1, hidden.shape[-1])
    chosen = (x_th @ block.mlp.gate.weight.T).topk(2).indices
    stacks, found = block.mlp.experts, {}
    for number in range(len(stacks.down_proj)):
        tokens = (chosen == number).any(1)
        gate, up = stacks.gate_up_proj[number].chunk(2)
        inside = F.silu(x_th @ gate.T) * (x_th @ up.T)
        found[number] = tokens, x_th, inside
    return found


def observed(model, ids, mask=None, needs=GRAM, routing=Routing.ROUTED, batch=2):
    """What the first block's layers read, by the first name of each group."""
    loader, stream = walker(model, ids, mask, batch=batch)
    blocks = walk(stream, loader, propagate=Propagate.NONE, device=CPU, routing=routing)
    block = next(blocks)
    found = block.observe(frozenset(block.layers), needs)
    assert {name for shared in found for name in shared.names} == set(block.layers)
    return {name: shared for shared in found for name in shared.names}


def assert_gram(found, x_ti):
    x = x_ti.double()
    assert (found - x.T @ x).norm() < 1e-6 * x.norm() ** 2


def cold(n_experts=5):
    """A Mixtral whose last expert is nobody's: of two pairs of opposite scores two are above its 0."""
    model = tiny_model("mixtral", num_local_experts=n_experts)
    with torch.no_grad():
        for layer in model.model.layers:
            scores = layer.mlp.gate.weight
            scores[1], scores[3], scores[4] = -scores[0], -scores[2], 0
    return model


@pytest.mark.parametrize("padded", ["full", "padded"])
@torch.no_grad()
def test_statistics_of_an_expert_are_of_the_tokens_that_its_router_sends_there(padded):
    model, ids = tiny_model("mixtral"), tiny_ids(20)
    mask = torch.ones_like(ids)
    if padded == "padded":
        mask[1, 12:], mask[7, 9:] = 0, 0
    found = observed(model, ids, mask if padded == "padded" else None)
    for number, (tokens, x_th, inside) in routed(model, model.model.embed_tokens(ids)).items():
        tokens &= mask.flatten().bool()
        assert tokens.sum() >= 64  # so many that nothing is filled up
        for names, expected in ((READ, x_th), (INSIDE, inside)):
            for name in names:
                shared = found[EXPERT.format(number, name)]
                assert shared.routed == Routed(int(tokens.sum()), 0.0)
                assert shared.stats[Gram].n_tokens == tokens.sum()
                assert_gram(shared.stats[Gram].sum_ii, expected[tokens])


@pytest.mark.parametrize("padded", ["full", "padded"])
@torch.no_grad()
def test_sequences_that_are_held_out_are_told_apart_for_each_expert(padded):
    model, ids = tiny_model("mixtral"), tiny_ids(24)
    mask = torch.ones_like(ids)
    if padded == "padded":
        mask[7, 9:] = 0
    needs = frozenset({Gram, HeldOut})
    found = observed(model, ids, mask if padded == "padded" else None, needs, batch=5)
    aside = torch.zeros_like(mask).bool()
    aside[7::8] = True
    aside &= mask.bool()
    for number, (tokens, x_th, inside) in routed(model, model.model.embed_tokens(ids)).items():
        held_out = tokens & aside.flatten()
        assert held_out.any()
        for name, expected in (("up_proj", x_th), ("down_proj", inside)):
            kept = found[EXPERT.format(number, name)].stats[HeldOut]
            assert kept.n_tokens == held_out.sum()
            assert_gram(kept.sum_ii, expected[held_out])


@torch.no_grad()
def test_all_tokens_through_every_expert_are_what_all_experts_have_seen():
    model, ids = tiny_model("mixtral"), tiny_ids(4)
    found = observed(model, ids, routing=Routing.ALL)
    for number, (tokens, x_th, inside) in routed(model, model.model.embed_tokens(ids)).items():
        for name, expected in (("gate_proj", x_th), ("up_proj", x_th), ("down_proj", inside)):
            shared = found[EXPERT.format(number, name)]
            assert shared.routed == Routed(int(tokens.sum()), 0.0)
            assert shared.stats[Gram].n_tokens == len(x_th)
            assert_gram(shared.stats[Gram].sum_ii, expected)


def test_a_shared_expert_has_its_own_input_where_every_expert_reads_the_same_tensor():
    model = tiny_model("qwen2_moe")
    found = observed(model, tiny_ids(4), routing=Routing.ALL)
    shared = found["model.layers.0.mlp.shared_expert.up_proj"]
    assert shared.routed is None
    assert not any(".experts." in name for name in shared.names)
    assert found[EXPERT.format(3, "up_proj")].routed.pooled == 0


@torch.no_grad()
def test_pooled_statistics_are_the_sum_over_the_experts():
    model, ids = tiny_model("mixtral"), tiny_ids(4)
    found = observed(model, ids, routing=Routing.POOLED)
    every = routed(model, model.model.embed_tokens(ids))
    for role, which in (("up_proj", 1), ("down_proj", 2)):
        rows = torch.cat([parts[which][parts[0]] for parts in every.values()])
        for number, (tokens, *_) in every.items():
            shared = found[EXPERT.format(number, role)]
            assert shared.routed == Routed(int(tokens.sum()), 1.0)
            assert shared.stats[Gram].n_tokens == len(rows)
            assert_gram(shared.stats[Gram].sum_ii, rows)


@torch.no_grad()
def test_an_expert_that_saw_few_tokens_has_as_many_of_the_others_as_it_lacks():
    model, ids = tiny_model("mixtral"), tiny_ids(3)
    found = observed(model, ids)
    every = routed(model, model.model.embed_tokens(ids))
    n_filled = 0
    for role, which in (("up_proj", 1), ("down_proj", 2)):
        rows = torch.cat([parts[which][parts[0]] for parts in every.values()]).double()
        average = rows.T @ rows / len(rows)
        for number, (tokens, *inputs) in every.items():
            own, n = inputs[which - 1][tokens].double(), int(tokens.sum())
            fewest = own.shape[1]
            share = max(0.0, 1 - n / fewest)
            shared = found[EXPERT.format(number, role)]
            assert shared.routed == Routed(n, pytest.approx(share))
            mean = own.T @ own / n
            expected = mean if share == 0 else share * average + (1 - share) * mean
            torch.testing.assert_close(shared.stats[Gram].mean_ii(), expected, rtol=1e-5, atol=1e-6)
            n_filled += share > 0
    assert 0 < n_filled < 8


@torch.no_grad()
def test_an_expert_that_saw_no_token_has_the_average_of_the_others():
    model, ids = cold(), tiny_ids(6)
    found = observed(model, ids)
    every = routed(model, model.model.embed_tokens(ids))
    assert not every[4][0].any()
    for role, which in (("up_proj", 1), ("down_proj", 2)):
        rows = torch.cat([parts[which][parts[0]] for parts in every.values()]).double()
        shared = found[EXPERT.format(4, role)]
        assert shared.routed == Routed(0, 1.0)
        torch.testing.assert_close(
            shared.stats[Gram].mean_ii(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("routing", Routing)
def test_what_the_model_computes_does_not_depend_on_the_tokens_that_statistics_are_of(routing):
    model, ids = cold(), tiny_ids()
    loader, stream = walker(model, ids)
    for block in walk(stream, loader, propagate=Propagate.NONE, device=CPU, routing=routing):
        block.observe(frozenset(block.layers), GRAM)
    with torch.no_grad():
        torch.testing.assert_close(stream.predictions(0), model(ids).logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_pairs_of_inputs_are_of_the_tokens_that_both_models_send_to_an_expert():
    model, ids = tiny_model("mixtral"), tiny_ids(20)
    loader, stream = walker(model, ids, batch=20)
    stream.keep_original()
    original = stream.hidden[0]
    stream.hidden[0] = disturbed = original + 0.3 * torch.randn_like(original)
    block = next(walk(stream, loader, propagate=Propagate.BLOCK, device=CPU))
    needs = frozenset({Gram, CrossGram})
    found = {
        name: shared.stats
        for shared in block.observe(frozenset(block.layers), needs)
        for name in shared.names
    }
    before, after = routed(model, original), routed(model, disturbed)
    for number in range(4):
        both = after[number][0] & before[number][0]
        assert (after[number][0] & ~before[number][0]).any()
        assert both.sum() >= 64
        for name, which in (("up_proj", 1), ("down_proj", 2)):
            stats = found[EXPERT.format(number, name)]
            x, y = (side[number][which][both].double() for side in (before, after))
            assert stats[CrossGram].n_tokens == stats[Gram].n_tokens == both.sum()
            assert (stats[CrossGram].sum_ij - x.T @ y).norm() < 1e-6 * x.norm() * y.norm()
            assert_gram(stats[Gram].sum_ii, y)
