"""Low-rank factorisation: facts of the papers, and ranks that follow from bytes."""

from dataclasses import replace

import pytest
import torch
from problems import inputs, statistics, weight

from calibration.statistics.gram import Gram
from calibration.statistics.mean import Mean
from compress.errors import RecipeError
from compress.exports import EXPORTS
from compress.families.base import LayerShape, Survey
from compress.families.factorisation import Factorisation
from compress.families.low_rank import quantised_low_rank
from compress.methods.asvd import ASVD
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.lord import LoRD, covariance
from compress.methods.rtn import RTN
from compress.methods.svd import SVD
from compress.methods.svd_llm import SVDLLM
from compress.solvers.linalg import (
    add_ridge_,
    cholesky,
    output_energy,
    shifted_energy,
    whitened_svd,
)

METHODS = (SVD, ASVD, SVDLLM, LoRD)
SHAPES = [(48, 64), (64, 48), (64, 64), (8, 64)]


def planned(kind: type[Factorisation], shape: tuple[int, int], **options: object) -> Factorisation:
    layer = LayerShape(shape, shape[0] * shape[1] * 4)
    return kind(**options).plan({"layer": layer})["layer"]


def definite(n_inputs):
    """Inputs whose Gram in fp32 needs no ridge, whatever rounds it: some noise in every direction."""
    x = inputs(n_inputs)
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


def lost(w, form, stats):
    """The mean over tokens of the squared error of the outputs."""
    error, gram = w.double() - form.dense().double(), stats[Gram].mean_ii()
    if form.offset() is None:
        return output_energy(error, gram)
    return shifted_energy(error, form.offset(), gram, stats[Mean].mean_i())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", METHODS)
def test_full_rank_is_exact(kind, shape):
    w, stats = weight(*shape), statistics(inputs(shape[1]))
    [form] = planned(kind, shape, rank=min(shape)).compress([w], stats)
    assert lost(w, form, stats) < 1e-9 * output_energy(w, stats[Gram].mean_ii())
    torch.testing.assert_close(form.dense(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_loss_of_svd_llm_is_the_tail_of_the_whitened_spectrum(shape):
    w, stats = weight(*shape), statistics(definite(shape[1]))
    [form] = planned(SVDLLM, shape, rank=8, damping=0.0).compress([w], stats)
    gram = stats[Gram].mean_ii()
    tail = torch.linalg.svdvals(w.double() @ cholesky(gram))[8:].square().sum()
    assert output_energy(w.double() - form.dense().double(), gram) == pytest.approx(
        float(tail), rel=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_whitening_output_pca_and_drone_reach_the_same_weight(shape):
    w, x = weight(*shape).double(), inputs(shape[1]).double()
    chol = cholesky(x.T @ x)
    up, down, _ = whitened_svd(w, chol, 8)
    ours = up @ down
    vectors = torch.linalg.eigh(w @ (x.T @ x) @ w.T)[1][:, -8:]
    output_pca = vectors @ vectors.T @ w
    u, s, _ = torch.linalg.svd(w @ x.T, full_matrices=False)
    drone = (u[:, :8] * s[:8]) @ torch.linalg.lstsq(
        x, torch.linalg.svd(w @ x.T, full_matrices=False)[2][:8].T
    ).solution.T
    for other in (output_pca, drone):
        assert ((ours - other) @ chol).norm() < 1e-8 * (ours @ chol).norm()


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_centring_never_loses_more(shape):
    x = inputs(shape[1]) + 3 * torch.randn(shape[1], generator=torch.Generator().manual_seed(5))
    w, stats = weight(*shape), statistics(x)
    for rank in (1, 4, 16):
        centred, plain = (
            lost(w, planned(kind, shape, rank=rank, damping=1e-6).compress([w], stats)[0], stats)
            for kind in (LoRD, SVDLLM)
        )
        assert centred <= plain * (1 + 1e-6)


def test_the_loss_of_lord_is_the_tail_of_the_outputs_covariance_and_its_mean_is_exact():
    x = definite(64) + 2
    w, stats = weight(48, 64), statistics(x)
    [form] = planned(LoRD, (48, 64), rank=8, damping=0.0).compress([w], stats)
    y = x.double() @ w.double().T
    tail = torch.linalg.eigvalsh(torch.cov(y.T, correction=0)).flip(0)[8:].sum()
    assert lost(w, form, stats) == pytest.approx(float(tail), rel=1e-5)
    torch.testing.assert_close(form(x).double().mean(0), y.mean(0), rtol=1e-4, atol=1e-4)


def test_the_covariance_is_that_of_the_inputs():
    x = inputs(32) + 5
    torch.testing.assert_close(
        covariance(statistics(x)), torch.cov(x.double().T, correction=0), rtol=1e-4, atol=1e-3
    )


def test_asvd_with_power_zero_is_plain_svd():
    w, stats = weight(48, 64), statistics(inputs(64))
    [asvd] = planned(ASVD, (48, 64), rank=8, alpha=0.0).compress([w], stats)
    [svd] = planned(SVD, (48, 64), rank=8).compress([w], stats)
    torch.testing.assert_close(asvd.dense(), svd.dense(), rtol=1e-4, atol=1e-6)


def test_plain_svd_loses_the_tail_of_the_weights_spectrum():
    w = weight(48, 64)
    [form] = planned(SVD, (48, 64), rank=8).compress([w], statistics(inputs(64)))
    tail = torch.linalg.svdvals(w.double())[8:].square().sum()
    assert float((w.double() - form.dense().double()).square().sum()) == pytest.approx(
        float(tail), rel=1e-6
    )


def test_on_skewed_inputs_whitening_beats_scaling_beats_neither():
    w, stats = weight(96, 64), statistics(inputs(64))
    losses = [
        lost(w, planned(kind, (96, 64), rank=16).compress([w], stats)[0], stats)
        for kind in (SVDLLM, ASVD, SVD)
    ]
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * losses[2]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_the_factors_take_at_most_the_share_that_is_kept_and_one_step_more_would_not(kind, keep):
    shape = (576, 1536)
    n_bytes = shape[0] * shape[1] * 4
    method = planned(kind, shape, keep=keep)
    assert method.rank % 8 == 0
    factors = method.rank * sum(shape) * 4
    assert factors <= keep * n_bytes < factors + 8 * sum(shape) * 4


def test_factors_are_stored_in_the_weights_own_dtype_unless_another_is_asked_for():
    layer = LayerShape((64, 64), 64 * 64 * 2, torch.bfloat16)
    assert SVD(keep=0.5).plan({"layer": layer})["layer"].storage is torch.bfloat16
    assert SVD(factor_dtype="float16").plan({"layer": layer})["layer"].storage is torch.float16


def test_a_rank_above_the_shape_is_refused_with_the_layer():
    layers = {"thin": LayerShape((16, 128), 16 * 128 * 4)}
    with pytest.raises(RecipeError, match=r"rank: 17 .* thin \(16, 128\); give 16 or less"):
        SVD(rank=17).plan(layers)


def test_a_share_that_pays_for_no_rank_is_refused_with_the_layer():
    layers = {"thin": LayerShape((16, 128), 16 * 128 * 4)}
    with pytest.raises(
        RecipeError, match=r"keep: 0\.1 .* thin \(16, 128\) does not pay for rank 8"
    ):
        SVD(keep=0.1).plan(layers)


@pytest.mark.parametrize("keep", [0.0, 1.0, -1.0, 80.0])
def test_a_share_outside_zero_and_one_is_refused(keep):
    with pytest.raises(RecipeError, match=r"keep"):
        SVD(keep=keep)


def test_what_is_derived_of_statistics_is_made_once():
    stats, made = statistics(inputs(16)), []
    for _ in range(2):
        stats.once(("a", 1), lambda: made.append(1) or len(made))
    assert made == [1]
    gram = add_ridge_(stats[Gram].mean_ii(), 0.01)
    assert SVDLLM().measure([], stats) is SVDLLM().measure([], stats)
    torch.testing.assert_close(SVDLLM().measure([], stats).chol_ii, cholesky(gram))


LAYERS = {
    f"layers.{k}.{leaf}": LayerShape(shape, shape[0] * shape[1] * 4)
    for k in range(2)
    for leaf, shape in (("q_proj", (64, 64)), ("up_proj", (128, 64)))
}


def test_given_ranks_are_taken_and_the_rest_shares_what_they_leave():
    plan = SVD(keep=0.5, rank_multiple=1, ranks=("q_proj=10", "layers.1.q_proj=dense")).plan(LAYERS)
    assert plan["layers.0.q_proj"].rank == 10
    assert "layers.1.q_proj" not in plan
    spent = sum(m.planned_bytes(LAYERS[n].shape) for n, m in plan.items()) + 64 * 64 * 4
    budget = 0.5 * sum(layer.n_bytes for layer in LAYERS.values())
    assert budget - 2 * (128 + 64) * 4 < spent <= budget


def test_the_ranks_that_a_plan_shows_make_the_same_plan():
    plan = SVD(keep=0.6).plan(LAYERS)
    ranks = tuple(f"{name}={method.rank}" for name, method in plan.items())
    again = SVD(ranks=ranks).plan(LAYERS)
    assert {name: method.rank for name, method in again.items()} == {
        n: m.rank for n, m in plan.items()
    }


@pytest.mark.parametrize(
    "entry", ["q_proj", "q_proj=", "=8", "q_proj=0", "q_proj=-3", "q_proj=some"]
)
def test_what_is_no_rank_is_refused(entry):
    with pytest.raises(RecipeError, match=r"ranks: .* is not LAYERS=RANK"):
        SVD(ranks=(entry,))


def test_a_pattern_that_matches_no_layer_is_refused():
    with pytest.raises(RecipeError, match=r"ranks: 'gate' in 'gate=8' matches no layer"):
        SVD(ranks=("gate=8",)).plan(LAYERS)


def test_lord_around_no_mean_is_svd_llm():
    w, stats = weight(48, 64), statistics(inputs(64) + 1)
    [lord] = planned(LoRD, (48, 64), rank=8, centre="none").compress([w], stats)
    [whitened] = planned(SVDLLM, (48, 64), rank=8).compress([w], stats)
    assert lord.offset() is None
    torch.testing.assert_close(lord.dense(), whitened.dense())


def test_an_offset_that_ordinary_weights_cannot_hold_is_refused_at_once():
    method, shapes = planned(LoRD, (48, 64), rank=8), {"layer": (48, 64)}
    with pytest.raises(
        RecipeError, match=r"export: dense cannot hold layer: lord .* --centre none"
    ):
        EXPORTS["dense"].check({"layer": method}, shapes)
    EXPORTS["dense"].check({"layer": planned(LoRD, (48, 64), rank=8, centre="none")}, shapes)
    EXPORTS["native"].check({"layer": method}, shapes)


@pytest.mark.parametrize("quantizer", [None, RTN(bits=8, group_size=32)])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_correction_of_centred_factors_keeps_the_mean_output_and_corrects_the_rest(
    shape, quantizer
):
    w, x = weight(*shape), inputs(shape[1]) + 3
    stats = statistics(x)
    base = LoRD(rank=8, damping=1e-4, factor_quantizer=quantizer)
    layer = LayerShape(shape, w.numel() * 4)
    [bare] = base.plan({"layer": layer})["layer"].compress([w], stats)
    corrected = EoRA(base=base, rank=6, damping=1e-4, shrinkage=0).plan({"layer": layer})["layer"]
    [form] = corrected.compress([w], stats)
    assert form.n_bytes() == corrected.planned_bytes(shape)
    y = x.double() @ w.double().T
    torch.testing.assert_close(form(x).double().mean(0), y.mean(0), rtol=2e-3, atol=2e-3)
    assert lost(w, form, stats) < lost(w, bare, stats)
    left = y - y.mean(0) - (x - x.mean(0)).double() @ bare.dense().double().T
    tail = torch.linalg.svdvals(left)[6:].square().sum() / len(x)
    assert lost(w, form, stats) == pytest.approx(float(tail), rel=1e-2)


def test_centred_factors_in_few_bits_are_fitted_to_inputs_around_their_mean():
    w, x = weight(48, 64), inputs(64) + 30
    stats = statistics(x)
    [form] = planned(
        LoRD, (48, 64), rank=16, factor_quantizer=GPTQ(bits=4, group_size=32)
    ).compress([w], stats)
    uncentred = quantised_low_rank(
        w, LoRD().measure([w], stats), 16, GPTQ(bits=4, group_size=32), stats
    )
    missing = (w.double() - uncentred.dense()) @ stats[Mean].mean_i()
    assert lost(w, form, stats) < lost(w, uncentred.shifted(missing.float()), stats)


def test_a_correction_of_anchored_factors_is_refused():
    with pytest.raises(RecipeError, match=r"base\.target: .* leave method\.base\.target at layer"):
        EoRA(base=SVDLLM(target="original"))


MIXED = {
    "layers.0.q_proj": LayerShape(
        (64, 64), 64 * 64 * 4, survey=Survey(torch.linspace(1, 0.1, 64).double())
    ),
    "layers.1.q_proj": LayerShape(
        (64, 64), 64 * 64 * 2, torch.bfloat16, Survey(torch.linspace(1, 0.1, 64).double())
    ),
}


def test_layers_of_one_type_in_two_dtypes_are_planned_apart():
    plan = SVD(keep=0.6, allocation="by_type", factor_dtype="float16").plan(MIXED)
    assert set(plan) <= set(MIXED)


def test_a_floor_of_the_whole_uniform_rank_is_the_uniform_plan():
    layers = {name: replace(MIXED["layers.0.q_proj"]) for name in ("a.q_proj", "b.q_proj")}
    floored, even = (
        SVD(keep=0.6, allocation=allocation, **options).plan(layers)
        for allocation, options in (("spectrum", {"floor": 1.0}), ("uniform", {}))
    )
    assert {n: m.rank for n, m in floored.items()} == {n: m.rank for n, m in even.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 8, "budget": "90KB"},
            "budget: 90KB has no effect beside --rank 8",
        ),
        ({"rank": 8, "allocation": "by_type"}, "allocation: by_type has no effect beside --rank 8"),
    ],
)
def test_one_rank_beside_what_spreads_ranks_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        SVD(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keep": 0.4, "ranks": ("layers.0=60",)},
            r"ranks: .* take \d+ bytes, and --keep leaves",
        ),
        (
            {"budget": "20KB", "ranks": ("q_proj=40", "up_proj=40")},
            r"ranks: .* --budget leaves",
        ),
        ({"ranks": ("q_proj=65",)}, r"ranks: 'q_proj=65' is above min.*give 64 or less"),
        ({"budget": "2KB"}, r"budget: 0\.\d+ of the bytes of .* does not pay for rank 8"),
    ],
)
def test_ranks_and_budgets_that_do_not_go_together_are_refused_by_their_names(options, message):
    with pytest.raises(RecipeError, match=message):
        SVD(**options).plan(LAYERS)


@pytest.mark.parametrize("quantizer", [None, RTN()])
def test_a_layer_thinner_than_the_rank_multiple_is_refused_with_a_remedy(quantizer):
    layers = LAYERS | {"layers.0.gate": LayerShape((4, 64), 4 * 64 * 4)}
    with pytest.raises(
        RecipeError, match=r"gate \(4, 64\) does not pay for rank 8; .*--exclude it"
    ):
        SVD(factor_quantizer=quantizer).plan(layers)
