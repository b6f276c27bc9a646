import pytest
import torch
from problems import inputs, relative_output_error, statistics, weight

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.errors import LayerError, RecipeError
from compress.exports.gptq import gptq_tensors
from compress.families.base import LayerShape
from compress.methods.gptq import GPTQ, ActOrder, sweep
from compress.methods.rtn import RTN
from compress.solvers.grid import Grid, ScaleSearch, Symmetry
from compress.solvers.grid_refit import refit_scales
from compress.solvers.linalg import add_ridge_, inverse_factor

SYMMETRIES = list(Symmetry)


def error(method, w, stats):
    return relative_output_error(w, method.compress([w], stats)[0].dense(), stats[Gram].mean_ii())


def swept(w, gram, grid, size):
    """GPTQ's sweep of one weight in the metric of a Gram."""
    found = sweep(w[None], inverse_factor(gram)[None], gram.diagonal().float()[None], grid, size)
    return [each[0] for each in found]


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_with_the_identity_as_gram_equals_rtn(bits, symmetry):
    w = weight(24, 64)
    stats = Statistics(
        {Gram: Gram(n_tokens=1, n_sequences=1, sum_ii=torch.eye(64, dtype=torch.float64))}
    )
    grid = Grid(bits, symmetry, ScaleSearch.SEARCH)
    codes, scales, zeros = swept(w, stats[Gram].mean_ii(), grid, 32)
    [form] = RTN(bits=bits, symmetry=symmetry, group_size=32).compress([w], stats)
    values = (codes - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    torch.testing.assert_close(values, form.dense(), rtol=0, atol=1e-6)


def plain_gptq(w, gram, scale, middle, top):
    """Algorithm 1 of the paper without blocks: one column at a time, on given scales."""
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    rest, out = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    for j in range(w.shape[1]):
        code = (rest[:, j] / scale[:, j] + middle).round().clamp(0, top)
        out[:, j] = (code - middle) * scale[:, j]
        loss = (rest[:, j] - out[:, j]) / upper[j, j]
        rest[:, j:] -= torch.outer(loss, upper[j, j:])
    return out


def test_the_blocked_sweep_equals_the_plain_algorithm():
    w, stats = weight(16, 192), statistics(inputs(192))
    gram = add_ridge_(stats[Gram].mean_ii(), 0.01)
    codes, scales, zeros = swept(w, gram, Grid(4, Symmetry.SYMMETRIC, ScaleSearch.SEARCH), 64)
    scale = scales.repeat_interleave(64, 1)
    ours = (codes - zeros.repeat_interleave(64, 1)) * scale
    plain = plain_gptq(w, gram, scale.double(), 8, 15).float()
    assert ((ours - plain).abs() > 1e-6).float().mean() < 0.01  # fp32 against fp64 at a half
    assert (ours - plain).norm() / plain.norm() < 0.02


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rtn_and_searched_scales_beat_max_abs(bits, symmetry):
    w, stats = weight(96, 128), statistics(inputs(128))
    options = {"bits": bits, "symmetry": symmetry, "group_size": 64}
    errors = {
        (kind, search): error(kind(**options, scales=search), w, stats)
        for kind in (RTN, GPTQ)
        for search in ScaleSearch
    }
    for search in ScaleSearch:
        assert errors[GPTQ, search] < errors[RTN, search]
    for kind in (RTN, GPTQ):
        assert errors[kind, ScaleSearch.SEARCH] < errors[kind, ScaleSearch.MAX_ABS]


def test_activation_order_stores_each_columns_group_and_still_fits():
    w, stats = weight(96, 128), statistics(inputs(128))
    [form] = GPTQ(group_size=32, act_order="desc_act").compress([w], stats)
    assert form.g_idx is not None
    assert sorted(form.g_idx.tolist()) == sorted([k for k in range(4) for _ in range(32)])
    assert relative_output_error(w, form.dense(), stats[Gram].mean_ii()) < 0.1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_on_the_grid_is_kept_exactly(bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (8, 64), generator=generator)
    codes[:, 0] = 0  # the long side is used, so the widest scale is the true one
    w = 0.125 * (codes - (1 << (bits - 1)))
    for method in (RTN(bits=bits, group_size=64), GPTQ(bits=bits, group_size=64)):
        [form] = method.compress([w], statistics(inputs(64)))
        assert torch.equal(form.dense(), w)


def test_a_symmetric_grid_takes_a_negative_scale_where_the_long_side_is_positive():
    w = torch.tensor([[8.0, 1.0, -7.0, 3.0] * 8])
    [form] = RTN(bits=4, group_size=32).compress([w], statistics(inputs(32)))
    assert float(form.scales) < 0
    assert torch.equal(form.dense(), w)


def test_the_search_comes_within_a_tenth_of_the_best_of_a_thousand_scales():
    """The oracle tries a thousand scales of both signs for every group."""
    w, importance = weight(16, 32), inputs(32).square().mean(0)
    for bits in (2, 3, 4):
        grid = Grid(bits, Symmetry.SYMMETRIC, ScaleSearch.SEARCH)
        scale, zero = grid.scales(w, importance)

        def loss(s, grid=grid):
            steps = (w / s + grid.middle).round().clamp(0, grid.top) - grid.middle
            return ((steps * s - w).square() * importance).sum(1)

        widest = w.abs().amax(1) / max(grid.middle - 1, 1)
        tried = torch.stack([loss((widest * f)[:, None]) for f in torch.linspace(-1.2, 1.2, 1000)])
        assert (loss(scale[:, None]).sum() / tried.amin(0).sum()) < 1.1
        assert torch.equal(zero, torch.full_like(zero, grid.middle))


def test_refitted_scales_never_lose_more_and_reach_least_squares():
    w, stats = weight(12, 64), statistics(inputs(64))
    gram = add_ridge_(stats[Gram].mean_ii(), 0.01)
    codes, scales, zeros = swept(w, gram, Grid(3, Symmetry.SYMMETRIC, ScaleSearch.SEARCH), 32)
    steps = codes - zeros.repeat_interleave(32, 1)
    refitted = refit_scales(w, steps, scales, gram, [32, 32])

    def losses(s):
        difference = w.double() - s.double().repeat_interleave(32, 1) * steps.double()
        return ((difference @ gram) * difference).sum(1)

    assert (losses(refitted) <= losses(scales) * (1 + 1e-9)).all()
    root = torch.linalg.cholesky(gram)
    for row in range(12):
        design = torch.stack(
            [
                (steps[row, g * 32 : g * 32 + 32].double() @ root[g * 32 : g * 32 + 32])
                for g in (0, 1)
            ],
            1,
        )
        best = torch.linalg.lstsq(design, (w[row].double() @ root)[:, None]).solution.flatten()
        torch.testing.assert_close(refitted[row].double(), best, rtol=2**-8, atol=1e-5)  # 8 bits


def test_a_group_of_zeros_stays_zero():
    w = weight(8, 64)
    w[:, :32] = 0
    for method in (
        RTN(group_size=32),
        GPTQ(group_size=32),
        GPTQ(group_size=32, symmetry="asymmetric"),
        RTN(group_size=32, symmetry="affine"),
        GPTQ(group_size=32, symmetry="affine"),
    ):
        [form] = method.compress([w], statistics(inputs(64)))
        assert torch.isfinite(form.dense()).all()
        if isinstance(method, RTN):
            assert torch.equal(form.dense()[:, :32], torch.zeros(8, 32))


@pytest.mark.parametrize("shape", [(32, 64), (96, 64), (40, 96)])
@pytest.mark.parametrize("order", list(ActOrder))
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_every_combination_of_options_plans_the_bytes_that_it_stores(bits, symmetry, order, shape):
    method = GPTQ(bits=bits, symmetry=symmetry, act_order=order, group_size=32)
    [form] = method.compress([weight(*shape)], statistics(inputs(shape[1])))
    assert form.n_bytes() == method.planned_bytes(shape)
    if bits != 5 and shape[0] % 32 == 0 and symmetry is not Symmetry.AFFINE:
        stored = sum(tensor.nbytes for tensor in gptq_tensors(form).values())
        assert stored == method.planned_bytes(shape) + method.gptq_extra_bytes(shape)


def test_a_singular_gram_without_damping_is_an_error_that_says_what_would_help():
    x = inputs(64, n_tokens=20)
    with pytest.raises(LayerError, match=r"singular.*damping"):
        GPTQ(group_size=32, damping=0.0, shrinkage=0.0).compress([weight(8, 64)], statistics(x))


def test_an_all_dead_input_is_an_error():
    with pytest.raises(LayerError, match="every input channel is zero"):
        GPTQ(group_size=32).compress([weight(8, 64)], statistics(torch.zeros(10, 64)))


def test_a_weight_beyond_fp16_scales_is_an_error():
    with pytest.raises(LayerError, match="beyond 65280"):
        RTN(group_size=32).compress([weight(8, 32) * 1e9], statistics(inputs(32)))


def layers(*inputs_of):
    return {f"layer{k}": LayerShape((32, n), 32 * n * 4) for k, n in enumerate(inputs_of)}


@pytest.mark.parametrize(
    ("widths", "size"), [((256, 128), 128), ((576, 1536), 64), ((96, 160), 32)]
)
def test_the_default_group_is_the_largest_that_divides_every_layer(widths, size):
    plan = RTN().plan(layers(*widths))
    assert {compressor.group_size for compressor in plan.values()} == {size}


def test_a_group_that_does_not_divide_is_refused_with_layers_and_remedies():
    with pytest.raises(
        RecipeError, match=r"128 does not divide the inputs of layer0 \(576\); 64, 32, 16, 8 would"
    ):
        RTN(group_size=128).plan(layers(576, 1536))


def test_a_whole_row_can_be_one_group():
    [form] = RTN(group_size=-1).compress([weight(8, 70)], statistics(inputs(70)))
    assert form.scales.shape == (1, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits: 7 is not supported; choose 2, 3, 4, 5, 6, 8"),
        ({"group_size": 0}, "group_size: must be 1 or more, .* got 0"),
        (
            {"symmetry": "skewed"},
            "symmetry: unknown 'skewed'; choose symmetric, asymmetric, affine",
        ),
        ({"damping": -1.0}, "damping: must be at least 0 .* got -1.0"),
    ],
)
def test_options_that_can_not_work_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        GPTQ(**options)
