"""Factors fitted to the original's outputs on the inputs that compressed layers give."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from families import tiny_ids, tiny_model
from problems import inputs, weight
from slowness import slow_if
from test_walk import CPU, walker
from workspaces import recipe

import compress
from calibration.propagation import Propagate
from calibration.statistics import always_collected
from calibration.statistics.base import InputStatistic
from calibration.statistics.collection import Statistics
from calibration.statistics.cross_gram import CrossGram
from calibration.statistics.gram import Gram
from calibration.store import Store
from calibration.walk import SharedInput, walk
from compress.errors import RecipeError
from compress.families.base import LayerShape
from compress.families.target import FitTarget
from compress.methods.eora import EoRA
from compress.methods.lord import LoRD
from compress.methods.lqer import LQER
from compress.methods.rtn import RTN
from compress.methods.svd_llm import SVDLLM
from compress.methods.svd_residual import SVDResidual
from compress.pipeline.main import no_progress
from compress.prepare.prepare import prepare
from compress.solvers.linalg import carried

RANK = 8
BASE = RTN(bits=3, group_size=32)


def two_inputs(n_inputs):
    """Inputs in the original and on the compressed path: bent, noisy, shifted."""
    x = inputs(n_inputs) + 1
    generator = torch.Generator().manual_seed(9)
    bend = torch.eye(n_inputs) + 0.1 * torch.randn(n_inputs, n_inputs, generator=generator)
    return x, x @ bend + 0.5 * torch.randn(x.shape, generator=generator) + 0.3


def statistics(x, x_hat):
    stats = Statistics.of(x_hat, 4, InputStatistic.among(always_collected()))
    return Statistics({**stats, CrossGram: CrossGram.between(x, x_hat, 4)})


def fitted(kind, w, stats, target="original"):
    layer = LayerShape(tuple(w.shape), w.numel() * 4)
    planned = kind(rank=RANK, target=target, damping=1e-6).plan({"layer": layer})["layer"]
    [form] = planned.compress([w], stats)
    return form


def missed(w, form, x, x_hat):
    """Mean squared distance from the original's outputs."""
    with torch.no_grad():
        return float((x.double() @ w.double().T - form(x_hat).double()).square().sum(1).mean())


@pytest.mark.parametrize("kind", [SVDLLM, LoRD])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_factors_fitted_to_the_original_come_nearer_to_the_originals_outputs(kind, shape):
    w, (x, x_hat) = weight(*shape), two_inputs(shape[1])
    stats = statistics(x, x_hat)
    original, plain = (fitted(kind, w, stats, target) for target in ("original", "layer"))
    assert missed(w, original, x, x_hat) < 0.9 * missed(w, plain, x, x_hat)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_svd_llm_fitted_to_the_original_is_reduced_rank_regression(shape, monkeypatch):
    monkeypatch.setattr("compress.families.target.TARGET_DAMPING", 1e-9)
    w, (x, x_hat) = weight(*shape), two_inputs(shape[1])
    y, z = x.double() @ w.double().T, x_hat.double()
    free = torch.linalg.lstsq(z, y).solution
    vectors = torch.linalg.svd(z @ free, full_matrices=False)[2][:RANK]
    best = (y - z @ free @ vectors.T @ vectors).square().sum(1).mean()
    found = missed(w, fitted(SVDLLM, w, statistics(x, x_hat)), x, x_hat)
    assert found == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("kind", [SVDLLM, LoRD])
def test_where_nothing_came_before_the_target_changes_nothing(kind):
    w, x = weight(48, 64), inputs(64)
    stats = statistics(x, x)
    original, plain = (fitted(kind, w, stats, target) for target in ("original", "layer"))
    torch.testing.assert_close(original.dense(), plain.dense(), rtol=1e-3, atol=1e-5)


def test_the_ridge_of_the_carried_map_draws_it_to_the_identity():
    x, x_hat = (each.double() for each in two_inputs(32))
    gram, cross = x_hat.T @ x_hat / len(x), x.T @ x_hat / len(x)
    exact = carried(gram.clone(), cross.clone(), 0.0)
    torch.testing.assert_close(exact, torch.linalg.lstsq(x_hat, x).solution.T)
    drawn = carried(gram.clone(), cross.clone(), 90.0)
    assert (drawn - torch.eye(32)).norm() < (exact - torch.eye(32)).norm()


def test_cross_grams_of_parts_add_up():
    x, x_hat = two_inputs(32)
    whole = CrossGram.between(x, x_hat, 4)
    parts = CrossGram.between(x[:700], x_hat[:700], 1) + CrossGram.between(x[700:], x_hat[700:], 3)
    torch.testing.assert_close(parts.sum_ij, whole.sum_ij, rtol=1e-5, atol=1e-2)
    assert (parts.n_tokens, parts.n_sequences) == (whole.n_tokens, whole.n_sequences)


def test_a_cross_gram_is_stored_as_it_is(tmp_path):
    stats = statistics(*two_inputs(16))
    store = Store(tmp_path, {"a": 1})
    store.save(0, [SharedInput(("q",), stats)])
    store.finish()
    [found] = store.load(0, CPU)
    assert torch.equal(found.stats[CrossGram].sum_ij, stats[CrossGram].sum_ij)
    assert torch.equal(found.stats[Gram].sum_ii, stats[Gram].sum_ii)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_walk_keeps_the_originals_correction_beside_the_compressed_one(family):
    model, ids = tiny_model(family), tiny_ids()
    loader, stream = walker(model, ids)
    stream.keep_original()
    reads = {}
    for name, layer in model.named_modules():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: reads.__setitem__(name, args[0]) if args else None
        )
    with torch.no_grad():
        model(ids)
    needs = frozenset({Gram, CrossGram})
    for block in walk(stream, loader, propagate=Propagate.BLOCK, device=CPU):
        for shared in block.observe(frozenset(block.layers), needs):
            x = reads[shared.names[0]].reshape(-1, shared.stats[Gram].sum_ii.shape[0])
            torch.testing.assert_close(shared.stats[CrossGram].sum_i, x.double().sum(0))
            if block.index == 0:
                torch.testing.assert_close(
                    shared.stats[CrossGram].sum_ij, shared.stats[Gram].sum_ii, rtol=1e-5, atol=1e-5
                )
        for layer in block.layers.values():
            with torch.no_grad():
                layer.weight.mul_(0.5)


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize(
    "kind",
    slow_if(
        lambda kind: kind.func is not EoRA,
        [
            partial(SVDLLM, keep=0.5, rank_multiple=1),
            partial(LoRD, keep=0.5, rank_multiple=1),
            partial(EoRA, base=BASE, rank=4),
        ],
    ),
)
def test_a_run_fitted_to_the_original_writes_another_model(workspace, kind):
    plain, original = (
        recipe(
            workspace,
            out=workspace / target,
            method=kind(target=target),
        )
        for target in ("layer", "original")
    )
    again = replace(original, out=workspace / "again")
    reports = [compress.run(job) for job in (plain, original, again)]
    assert reports[0].layers[-1].relative_error != reports[1].layers[-1].relative_error
    assert [e.relative_error for e in reports[1].layers] == [
        e.relative_error for e in reports[2].layers
    ]


def test_a_correction_of_full_rank_is_the_best_map_to_the_originals_outputs(monkeypatch):
    monkeypatch.setattr("compress.families.target.TARGET_DAMPING", 1e-9)
    w, (x, x_hat) = weight(48, 64), two_inputs(64)
    method = EoRA(base=BASE, rank=48, target="original", damping=1e-9)
    [form] = method.compress([w], statistics(x, x_hat))
    y, z = x.double() @ w.double().T, x_hat.double()
    best = (y - z @ torch.linalg.lstsq(z, y).solution).square().sum(1).mean()
    assert missed(w, form, x, x_hat) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("kind", [EoRA, LQER, SVDResidual])
def test_a_correction_fitted_to_the_original_comes_nearer_to_the_originals_outputs(kind):
    w, (x, x_hat) = weight(48, 64), two_inputs(64)
    stats = statistics(x, x_hat)
    [plain] = kind(base=BASE, rank=16).compress([w], stats)
    [original] = kind(base=BASE, rank=16, target="original").compress([w], stats)
    assert missed(w, original, x, x_hat) < missed(w, plain, x, x_hat)


def test_a_correction_reads_the_weight_where_nothing_came_before():
    w, x = weight(48, 64), inputs(64)
    stats = statistics(x, x)
    plain, original = (
        EoRA(base=BASE, rank=4, target=target).compress([w], stats)[0] for target in FitTarget
    )
    torch.testing.assert_close(original.dense(), plain.dense(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base": LoRD(keep=0.5)}, r"target: lord corrects the mean of the layer's own outputs"),
        ({"holdout": "1/8"}, r"holdout: .* --target layer"),
        (
            {"base": SVDLLM(keep=0.5, target="original")},
            r"base\.target: .* set method\.target: original",
        ),
    ],
)
def test_a_correction_is_refused_where_targets_would_contradict_each_other(options, said):
    with pytest.raises(RecipeError, match=said):
        EoRA(**{"target": "original"} | options)


@pytest.mark.parametrize("method", [SVDLLM(target="original"), EoRA(target="original")])
@pytest.mark.parametrize("propagate", ["none", "sublayer"])
def test_the_originals_outputs_are_no_target_where_inputs_are_the_originals(
    workspace, propagate, method
):
    job = recipe(workspace, method=method, propagate=propagate)
    with pytest.raises(RecipeError, match=r"target: .* use --propagate block"):
        prepare(job, no_progress)


def test_a_cross_gram_needs_the_originals_states():
    loader, stream = walker(tiny_model("llama"), tiny_ids())
    block = next(walk(stream, loader, propagate=Propagate.BLOCK, device=CPU))
    with pytest.raises(RuntimeError, match="keep them first"):
        block.observe(frozenset(block.layers), frozenset({CrossGram}))
