"""Gradients of experts against autograd on the model that stacks them."""

import pytest
import torch
from families import tiny_ids, tiny_model
from test_experts import cold
from test_walk import CPU, walker
from torch.nn import functional as F

from calibration.backward import Backward
from calibration.experts.module import Experts
from calibration.statistics.fisher import Fisher
from calibration.statistics.output_gradients import OutputGradients

KINDS = frozenset({Fisher, OutputGradients})


def block_by_block(model, ids, mask=None):
    loader, stream = walker(model, ids, mask, batch=1)
    names = frozenset(
        name.removesuffix(".weight") for name in loader.known if name.endswith("_proj.weight")
    )
    way, found = Backward(stream, loader, CPU), {}
    list(way.there())
    for _, block in way.back(names, KINDS):
        found |= block
    assert set(found) == names
    return found, loader.experts


def whole_model(model, ids, mask, path):
    """Of the stacked weights of one layer: the sum over samples of squared gradients (e, o, i)."""
    stacks = model.get_submodule(path)
    total = {"gate_up_proj": 0, "down_proj": 0}
    for k in range(len(ids)):
        seen = slice(None) if mask is None else mask[k].bool()
        one = None if mask is None else mask[k : k + 1]
        logits = model(ids[k : k + 1], attention_mask=one).logits[0][seen]
        model.zero_grad()
        F.cross_entropy(logits[:-1], ids[k][seen][1:], reduction="sum").backward()
        for name in total:
            total[name] += stacks.get_parameter(name).grad.double().square()
    gate, up = total["gate_up_proj"].chunk(2, dim=1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": total["down_proj"]}


@pytest.mark.parametrize("padded", ["full", "padded"])
def test_gradients_of_experts_equal_autograd_on_the_whole_model(padded):
    model, ids = tiny_model("mixtral"), tiny_ids(8, seq_len=40)
    mask = torch.ones_like(ids)
    mask[1, 32:] = 0
    mask = mask if padded == "padded" else None
    found, experts = block_by_block(model, ids, mask)
    n_whole = 0
    for path in experts:
        expected = whole_model(model, ids, mask, path)
        for name, squares in expected.items():
            for number, square_oi in enumerate(squares):
                fisher = found[f"{path}.{number}.{name}"][Fisher]
                if fisher.n_tokens > max(square_oi.shape):  # no other expert's are mixed in
                    n_whole += 1
                    theirs = square_oi.sum(0)
                    assert (fisher.sum_i - theirs).norm() < 1e-5 * theirs.norm(), name
    assert n_whole > 24


def test_an_expert_without_tokens_has_the_average_gradients_of_the_others():
    model = cold()
    found, experts = block_by_block(model, tiny_ids(4))
    path = next(path for path in experts if isinstance(experts[path], Experts))
    for name in ("gate_proj", "up_proj", "down_proj"):
        for kind, field in ((Fisher, "sum_i"), (OutputGradients, "sum_oo")):
            lone, *others = (found[f"{path}.{n}.{name}"][kind] for n in (4, 0, 1, 2, 3))
            mean = getattr(lone, field) / lone.n_tokens
            assert torch.isfinite(mean).all()
            assert mean.norm() > 0
            assert mean.norm() < sum(getattr(o, field).norm() / o.n_tokens for o in others)
