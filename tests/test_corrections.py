import pytest
import torch
from problems import gradients, inputs, statistics, weight

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.statistics.output_gradients import OutputGradients
from compress.errors import LayerError, RecipeError
from compress.families.base import LayerShape
from compress.forms.low_rank import LowRank
from compress.forms.sum import Sum
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.lqer import LQER, Scale
from compress.methods.rtn import RTN
from compress.methods.sparsegpt import SparseGPT
from compress.methods.svd_residual import SVDResidual
from compress.planning.layer import PlannedLayer
from compress.planning.make import refuse_no_gain
from compress.solvers.linalg import (
    add_ridge_,
    balanced,
    cholesky,
    output_energy,
    refit_up,
    shrink_,
    to_storage,
    whitened_svd,
)

SHAPES = [(48, 64), (64, 48), (64, 64), (8, 64)]


def problem(shape):
    """A residual (o, i) and a definite Gram, fp64."""
    gram = add_ridge_(statistics(inputs(shape[1]))[Gram].mean_ii(), 0.01)
    return weight(*shape).double(), gram


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_equals_the_tail_of_the_whitened_spectrum(shape, rank):
    matrix, gram = problem(shape)
    up, down, spectrum = whitened_svd(matrix, cholesky(gram), rank)
    plain = torch.linalg.svdvals(matrix @ cholesky(gram))
    torch.testing.assert_close(spectrum[:8], plain[:8], rtol=1e-7, atol=0)
    tail = float(plain[rank:].square().sum())
    assert output_energy(matrix - up @ down, gram) == pytest.approx(
        tail, rel=1e-6, abs=1e-12 * float(plain[0]) ** 2
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_any_factor_of_the_gram_gives_the_same_product(shape):
    matrix, gram = problem(shape)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors @ values.sqrt().diag() @ vectors.T
    products = []
    for factor in (cholesky(gram), root, vectors * values.sqrt()):
        u, s, vt = torch.linalg.svd(matrix @ factor, full_matrices=False)
        products.append(u[:, :4] * s[:4] @ torch.linalg.solve(factor.T, vt[:4].T).T)
    up, down, _ = whitened_svd(matrix, cholesky(gram), 4)
    for product in products:
        torch.testing.assert_close(up @ down, product, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_correction_is_exact(shape):
    matrix, gram = problem(shape)
    up, down, _ = whitened_svd(matrix, cholesky(gram), min(shape))
    torch.testing.assert_close(up @ down, matrix, rtol=1e-8, atol=1e-10)


def test_balancing_changes_the_factors_but_not_their_product():
    matrix, gram = problem((48, 64))
    up, down, _ = whitened_svd(matrix, cholesky(gram), 5)
    even_up, even_down = balanced(up * 1e9, down / 1e9)
    torch.testing.assert_close(even_up @ even_down, up @ down)
    torch.testing.assert_close(even_up.norm(dim=0), even_down.norm(dim=1))


def test_refitting_after_rounding_takes_back_error():
    matrix, gram = problem((48, 64))
    up, down, _ = whitened_svd(matrix, cholesky(gram), 5)
    up, down = balanced(up, down)
    coarse = down.to(torch.float8_e4m3fn).double()
    before = output_energy(matrix - up @ coarse, gram)
    after = output_energy(matrix - refit_up(matrix, coarse, cholesky(gram)) @ coarse, gram)
    best = output_energy(matrix - up @ down, gram)
    assert best < after < before


def test_refitting_an_unrounded_factor_changes_nothing():
    matrix, gram = problem((64, 48))
    up, down, _ = whitened_svd(matrix, cholesky(gram), 5)
    torch.testing.assert_close(
        refit_up(matrix, down, cholesky(gram)) @ down, up @ down, rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("base", [RTN(bits=3, group_size=32), GPTQ(bits=3, group_size=32)])
@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
def test_eora_beats_plain_svd_which_beats_no_correction(base, shape):
    w, stats = weight(*shape), statistics(inputs(shape[1]))
    gram = stats[Gram].mean_ii()
    bare = output_energy(w - base.compress([w], stats)[0].dense(), gram)
    plain = output_energy(w - SVDResidual(base=base, rank=8).compress([w], stats)[0].dense(), gram)
    eora = output_energy(w - EoRA(base=base, rank=8).compress([w], stats)[0].dense(), gram)
    assert eora < plain < bare


@pytest.mark.parametrize("base", [RTN(bits=3, group_size=32), GPTQ(bits=3, group_size=32)])
@pytest.mark.parametrize("scale", Scale)
def test_scaling_inputs_one_by_one_lies_between_ignoring_and_knowing_them(base, scale):
    x = inputs(128) * torch.logspace(-1, 1, 128)
    w, stats = weight(96, 128), statistics(x)
    gram = stats[Gram].mean_ii()
    plain, diagonal, eora = (
        output_energy(w - method.compress([w], stats)[0].dense(), gram)
        for method in (
            SVDResidual(base=base, rank=8),
            LQER(base=base, rank=8, scale=scale),
            EoRA(base=base, rank=8),
        )
    )
    assert eora < diagonal < plain


def test_where_inputs_are_uncorrelated_their_scales_are_all_there_is_to_know():
    x = torch.diag(torch.logspace(-1, 1, 64)).repeat(8, 1)  # one input at a time is active
    w, stats = weight(48, 64), statistics(x)
    base = RTN(bits=3, group_size=32)
    [scaled] = LQER(base=base, rank=4).compress([w], stats)
    [exact] = EoRA(base=base, rank=4, damping=1e-6).compress([w], stats)
    gram = stats[Gram].mean_ii()
    assert output_energy(w - scaled.dense(), gram) == pytest.approx(
        output_energy(w - exact.dense(), gram), rel=2e-3
    )


def test_stored_factors_reach_the_optimum_to_16_bit_accuracy():
    w, stats = weight(96, 128), statistics(inputs(128))
    gram = add_ridge_(shrink_(stats[Gram].mean_ii(), 0.1), 0.01)
    [form] = EoRA(base=RTN(bits=3, group_size=32), rank=8).compress([w], stats)
    base, path = form.terms
    tail = torch.linalg.svdvals((w.double() - base.dense()) @ cholesky(gram))[8:].square().sum()
    assert output_energy(w - form.dense(), gram) == pytest.approx(float(tail), rel=1e-4)
    assert isinstance(form, Sum)
    assert isinstance(path, LowRank)
    assert path.up.weight.dtype == path.down.weight.dtype == torch.float16


def test_shrinking_keeps_every_inputs_energy_and_a_share_of_what_they_have_in_common():
    gram = statistics(inputs(64))[Gram].mean_ii()
    expected = gram * 0.75
    expected.diagonal().copy_(gram.diagonal())
    torch.testing.assert_close(shrink_(gram.clone(), 0.25), expected, rtol=1e-12, atol=0)
    assert torch.equal(shrink_(gram.clone(), 0), gram)


def test_a_correction_of_a_gram_shrunk_to_its_diagonal_is_that_which_takes_inputs_one_by_one():
    w, stats = weight(48, 64), statistics(inputs(64))
    residual = w.double() - RTN(bits=3, group_size=32).compress([w], stats)[0].dense().double()
    whole, single = EoRA(rank=8, shrinkage=1, damping=1e-9), LQER(rank=8)
    paths = [method.corrections([residual], stats)[0].dense() for method in (whole, single)]
    torch.testing.assert_close(*paths, rtol=2e-2, atol=2e-3 * float(residual.abs().max()))


@pytest.mark.parametrize("method", [GPTQ, EoRA, SparseGPT])
@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_a_shrinkage_that_is_no_share_is_refused(method, shrinkage):
    with pytest.raises(RecipeError, match=r"shrinkage: must be between 0 and 1"):
        method(shrinkage=shrinkage)


def test_a_residual_of_low_rank_is_corrected_without_nan():
    gram = add_ridge_(statistics(inputs(64))[Gram].mean_ii(), 0.01)
    matrix = torch.outer(torch.randn(48), torch.randn(64)).double()
    up, down, _ = whitened_svd(matrix, cholesky(gram), 6)
    _, down = balanced(up, down)
    product = refit_up(matrix, down.half(), cholesky(gram)) @ down.half().double()
    torch.testing.assert_close(product, matrix, rtol=1e-2, atol=1e-2)
    zero = torch.zeros(48, 64, dtype=torch.float64)
    up, down, _ = whitened_svd(zero, cholesky(gram), 6)
    assert torch.equal(
        refit_up(zero, balanced(up, down)[1].half(), cholesky(gram)),
        torch.zeros(48, 6, dtype=torch.float64),
    )


def test_outlier_channels_do_not_drown_the_others_in_damping():
    x = inputs(64)
    x[:, :2] *= 1000
    gram = statistics(x)[Gram].mean_ii()
    ridge = (add_ridge_(gram.clone(), 0.01) - gram).diagonal()
    median = float(gram.diagonal().median())
    assert float(ridge[10]) == pytest.approx(0.01 * median, rel=0.1)
    assert float(ridge[0]) < 1.1e-5 * float(gram[0, 0])


@pytest.mark.parametrize("outlier", [1e3, 1e4])
def test_fewer_tokens_than_inputs_and_massive_outliers_stay_definite(outlier):
    x = inputs(256, n_tokens=64)
    x[:, :3] *= outlier
    gram = add_ridge_(statistics(x)[Gram].mean_ii(), 0.01)
    assert torch.linalg.eigvalsh(gram)[0] > 0
    cholesky(gram)


def test_a_factor_beyond_fp16_is_an_error_that_names_the_other_dtype():
    with pytest.raises(LayerError, match=r"beyond torch\.float16.*--factor-dtype bfloat16"):
        to_storage(torch.tensor([[1e6]]), torch.float16)


LAYERS = {"wide": LayerShape((64, 128), 64 * 128 * 4), "thin": LayerShape((16, 128), 16 * 128 * 4)}


def test_a_rank_above_the_smaller_side_is_refused_with_the_layer():
    with pytest.raises(
        RecipeError,
        match=r"rank: 32 is above min\(out, in\) of 1 layers, such as thin.*give 16 or less",
    ):
        EoRA(rank=32).plan(LAYERS)


def test_a_rank_that_saves_nothing_is_refused():
    layer = LayerShape((64, 64), 64 * 64 * 2)
    [method] = EoRA(rank=64, base=RTN(bits=8, group_size=64)).plan({"square": layer}).values()
    after = method.planned_bytes(layer.shape)
    planned = PlannedLayer("square", "square.weight", (64, 64), layer.n_bytes, after, method)
    with pytest.raises(
        RecipeError,
        match=r"would not get smaller, such as square \(8192 bytes before, \d+ after\); "
        r"lower the rank \(64\) or the bits \(8\), or --exclude",
    ):
        refuse_no_gain([planned])


def spread(budget, **options):
    return EoRA(adapter_budget=budget, allocation="uniform", **options)


def test_a_budget_buys_the_largest_rank_that_it_pays_for():
    a_rank = (64 + 128 + 16 + 128) * 2
    plan = spread(f"{a_rank * 13}").plan(LAYERS)
    assert {compressor.rank for compressor in plan.values()} == {8}
    with pytest.raises(RecipeError, match="do not pay for rank 8"):
        spread("1kB").plan(LAYERS)
    with pytest.raises(
        RecipeError, match=rf"more than rank 16, .*; give {16 * a_rank} bytes or less"
    ):
        spread("20MB").plan(LAYERS)
    full = spread(f"{16 * a_rank}").plan(LAYERS)
    assert {compressor.rank for compressor in full.values()} == {16}
    with pytest.raises(RecipeError, match="'much' is not an amount of bytes"):
        spread("much")


def test_a_fisher_on_the_output_side_is_the_optimum_of_both_sides():
    """By the plainest way: an SVD between symmetric roots."""
    w, stats = weight(48, 64), statistics(inputs(64))
    seen = OutputGradients.of(inputs(64), gradients(2048, 48))
    stats = stats.joined(Statistics({OutputGradients: seen}))
    method = EoRA(rank=6, base=RTN(bits=3, group_size=32), output_side="fisher")
    [bare] = method.base.compress([w], stats)
    residual = w.double() - bare.dense().double()
    [path] = method.corrections([residual], stats)
    gram = add_ridge_(shrink_(stats[Gram].mean_ii(), 0.1), 0.01)
    fisher = add_ridge_(seen.mean_oo(), 0.01)

    def lost(error):
        return float(torch.trace(fisher @ error @ gram @ error.T))

    left, right = (v @ e.sqrt().diag() @ v.T for e, v in map(torch.linalg.eigh, (fisher, gram)))
    tail = torch.linalg.svdvals(left @ residual @ right)[6:].square().sum()
    assert lost(residual - path.dense().double()) == pytest.approx(float(tail), rel=1e-3)
    [plain] = EoRA(rank=6, base=method.base).corrections([residual], stats)
    assert lost(residual - path.dense().double()) < lost(residual - plain.dense().double())


@pytest.mark.parametrize("damping", [-0.1, float("nan"), 1000.0])
def test_a_damping_that_is_no_share_is_refused(damping):
    with pytest.raises(RecipeError, match=r"damping: must be at least 0"):
        EoRA(damping=damping)


def test_a_correction_of_a_correction_is_refused():
    with pytest.raises(RecipeError, match="itself a correction"):
        EoRA(base=SVDResidual())
