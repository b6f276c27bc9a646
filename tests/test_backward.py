"""Gradients block by block against autograd on the whole model."""

import pytest
import torch
from families import tiny_ids, tiny_model
from test_walk import CPU, walker
from torch.nn import functional as F

from calibration.backward import Backward
from calibration.errors import InputError
from calibration.layers import is_linear
from calibration.statistics.fisher import Fisher
from calibration.statistics.gradient_energy import GradientEnergy
from calibration.statistics.output_gradients import OutputGradients

KINDS = frozenset({Fisher, GradientEnergy, OutputGradients})


def keeper(written, name):
    def keep(_layer, _args, y):
        written[name] = y

    return keep


def whole_model(model, ids, mask):
    """By layer, from autograd on one sequence after the other: Fisher sums (i,) and gradients by outputs (t, o)."""
    layers = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
    fisher, by_outputs = {}, {}
    for k in range(len(ids)):
        written, hooks = {}, []
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(keeper(written, name)))
        seen = slice(None) if mask is None else mask[k].bool()
        one = None if mask is None else mask[k : k + 1]
        logits = model(ids[k : k + 1], attention_mask=one).logits[0][seen]
        for hook in hooks:
            hook.remove()
        for y in written.values():
            y.retain_grad()
        model.zero_grad()
        F.cross_entropy(logits[:-1], ids[k][seen][1:], reduction="sum").backward()
        for name, layer in layers.items():
            if layer.weight.grad is None or name not in written:
                continue
            gradient = layer.weight.grad.double()
            gradient = gradient if type(layer) is torch.nn.Linear else gradient.T
            fisher[name] = fisher.get(name, 0) + gradient.square().sum(0)
            flat = written[name].grad.double().reshape(-1, gradient.shape[0])
            by_outputs.setdefault(name, []).append(flat[seen])
    return fisher, {name: torch.cat(parts) for name, parts in by_outputs.items()}


def block_by_block(model, ids, mask=None, memory_bytes=1 << 30):
    loader, stream = walker(model, ids, mask, memory_bytes=memory_bytes, batch=1)
    names = frozenset(name for name, layer in model.named_modules() if is_linear(layer))
    found = {}
    way = Backward(stream, loader, CPU)
    assert list(way.there()) == list(range(len(stream.blocks)))
    for _, block in way.back(names, KINDS):
        found |= block
    return found


@pytest.mark.parametrize("padded", ["full", "padded"])
@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "opt", "gpt2", "bloom", "codegen", "phi3", "gpt_neox"]
)
def test_gradients_block_by_block_equal_autograd_on_the_whole_model(family, padded):
    model, ids = tiny_model(family), tiny_ids(3)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    mask = mask if padded == "padded" else None
    fisher, by_outputs = whole_model(model, ids, mask)
    found = block_by_block(model, ids, mask)
    assert set(found) == set(fisher) - {"lm_head", "embed_out"}
    for name, stats in found.items():
        g = by_outputs[name]
        assert stats[Fisher].n_sequences == 3
        for ours, theirs in (
            (stats[Fisher].sum_i, fisher[name]),
            (stats[OutputGradients].sum_oo, g.T @ g),
            (stats[GradientEnergy].sum_o, g.square().sum(0)),
        ):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name


def test_the_fisher_squares_sample_by_sample():
    model, ids = tiny_model("llama"), tiny_ids(2)
    together = block_by_block(model, ids)
    alone = [block_by_block(model, ids[k : k + 1]) for k in range(2)]
    for name, stats in together.items():
        expected = alone[0][name][Fisher] + alone[1][name][Fisher]
        torch.testing.assert_close(stats[Fisher].sum_i, expected.sum_i)


def test_hidden_states_in_files_change_nothing():
    model, ids = tiny_model("llama"), tiny_ids(3)
    held, spilled = block_by_block(model, ids), block_by_block(model, ids, memory_bytes=0)
    for name, stats in held.items():
        assert torch.equal(stats[Fisher].sum_i, spilled[name][Fisher].sum_i)


def test_only_one_sequence_at_a_time_is_taken():
    loader, stream = walker(tiny_model("llama"), tiny_ids(2), batch=2)
    with pytest.raises(ValueError, match="single sequences"):
        Backward(stream, loader, CPU)


def test_a_gradient_that_is_not_finite_is_refused_with_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(InputError, match=r"layer model\.layers\.2\..* gradient .* NaN or infinity"):
        block_by_block(model, tiny_ids(1))
