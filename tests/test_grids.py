"""Grids: what values scales and offsets may have, and how well the search for them does."""

import itertools

import pytest
import torch
from exported import compressed, export
from problems import inputs, relative_output_error, statistics, weight

from calibration.statistics.gram import Gram
from compress.errors import CheckpointError, LayerError
from compress.exports.base import EXPORTS
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.solvers.grid import Grid, ScaleSearch, Symmetry, stored_offsets, stored_scales
from compress.solvers.grid_refit import refit_affine

SEARCHED = [(bits, symmetry) for bits in (2, 3, 4, 5, 6, 8) for symmetry in Symmetry]
FLOATS = (torch.float16, torch.bfloat16)


def assert_held_by_every_float(values):
    for dtype in FLOATS:
        assert torch.equal(values.float().to(dtype).float(), values.float())
    sizes = values.float().abs()
    assert bool(((sizes == 0) | ((sizes >= 2.0**-14) & (sizes <= 65280))).all())


@pytest.mark.parametrize("method", [RTN, GPTQ])
@pytest.mark.parametrize("search", list(ScaleSearch))
@pytest.mark.parametrize(("bits", "symmetry"), SEARCHED)
def test_every_scale_and_offset_is_a_number_of_fp16_and_of_bf16(bits, symmetry, search, method):
    w = weight(24, 64) * torch.logspace(-4, 4, 24)[:, None]
    options = {"bits": bits, "symmetry": symmetry, "scales": search, "group_size": 32}
    [form] = method(**options).compress([w], statistics(inputs(64)))
    assert_held_by_every_float(form.scales)
    assert bool((form.scales != 0).all())
    if symmetry is Symmetry.AFFINE:
        assert_held_by_every_float(form.offsets)
    elif bits <= 5:  # formats with a float offset store the product
        product = form.scales.float() * form.zeros()
        assert torch.equal(product.half().float(), product)


def test_scales_are_rounded_to_the_nearest_of_so_many_significant_bits():
    """The oracle is the list of all such numbers."""
    values = torch.logspace(-4, 4, 4001)
    for digits in (6, 7, 8):
        mantissas = torch.arange(1 << (digits - 1), 1 << digits)
        all_of_them = torch.cat([mantissas * 2.0**e for e in range(-25, 16)])
        nearest = (all_of_them - values[:, None]).abs().amin(1)
        found = stored_scales(values, digits)
        torch.testing.assert_close((found - values).abs(), nearest, rtol=0, atol=0)
        assert torch.equal(stored_scales(-values, digits), -found)


def test_a_scale_below_the_least_becomes_the_least_with_its_sign_and_an_offset_that_or_nothing():
    small = torch.tensor([1e-9, -1e-9, 5e-5, -5e-5])
    least = 2.0**-14
    assert stored_scales(small, 8).tolist() == [least, -least, least, -least]
    assert stored_offsets(small).tolist() == [0, 0, least, -least]


@pytest.mark.parametrize("symmetry", list(Symmetry))
def test_a_scale_that_no_float_holds_is_refused(symmetry):
    w = torch.full((1, 32), -7e4 * 15)
    w[:, ::2] = 7e4 * 15
    with pytest.raises(LayerError, match=r"beyond 65280, the largest .*--exclude the layer"):
        RTN(group_size=32, symmetry=symmetry).compress([w], statistics(inputs(32)))


def test_an_affine_grid_keeps_weights_that_lie_on_one_without_zero():
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15
    w = 0.125 * codes - 0.8125  # zero is between the codes 6 and 7
    for method in (RTN, GPTQ):
        [form] = method(symmetry="affine", group_size=64).compress([w], statistics(inputs(64)))
        assert torch.equal(form.dense(), w)
        assert form.offsets.unique().tolist() == [-0.8125]


@pytest.mark.parametrize(("method", "bits"), list(itertools.product([RTN, GPTQ], [2, 3, 4])))
def test_an_affine_grid_loses_less_than_one_with_integer_zeros(method, bits):
    w, stats = weight(96, 128) + 0.02, statistics(inputs(128))
    errors = {}
    for symmetry in ("asymmetric", "affine"):
        options = {"bits": bits, "symmetry": symmetry, "group_size": 32}
        [form] = method(**options).compress([w], stats)
        errors[symmetry] = relative_output_error(w, form.dense(), stats[Gram].mean_ii())
    assert errors["affine"] < errors["asymmetric"]


def test_scales_and_offsets_refitted_together_reach_least_squares():
    """The oracle solves for both in fp64, each row by itself."""
    stats, size = statistics(inputs(72)), 24
    w, gram = weight(12, 72), stats[Gram].mean_ii() + 0.01 * torch.eye(72)
    grid = Grid(3, Symmetry.AFFINE, ScaleSearch.SEARCH)
    parts = [grid.scales(part, torch.ones(size)) for part in w.split(size, 1)]
    scales, zeros = (torch.stack(each, 1) for each in zip(*parts, strict=True))
    codes = grid.codes(w, scales.repeat_interleave(size, 1), zeros.repeat_interleave(size, 1))
    codes[:, :size][3] = 5  # one group of equal codes, which say nothing about its scale
    new_scales, new_zeros = refit_affine(w, codes, (scales, zeros), gram, [size] * 3)
    root = torch.linalg.cholesky(gram)

    def loss(row, values):
        return float(((w[row].double() - values.double()) @ root).square().sum())

    def dense(row, s, z):
        scale, zero = s[row].repeat_interleave(size), z[row].repeat_interleave(size)
        return scale * (codes[row] - zero)

    groups = torch.block_diag(*[torch.ones(size, 1, dtype=torch.float64)] * 3)
    for row in range(12):
        columns = torch.cat([groups * codes[row, :, None].double(), groups], 1)
        solution = torch.linalg.lstsq(
            root.T @ columns, root.T @ w[row].double()[:, None], driver="gelsd"
        )
        best = loss(row, (columns @ solution.solution).flatten())
        found = loss(row, dense(row, new_scales, new_zeros))
        assert found <= loss(row, dense(row, scales, zeros)) * (1 + 1e-9)
        assert found < best * 1.02
    assert_held_by_every_float(new_scales)
    assert_held_by_every_float(grid.offsets(new_scales, new_zeros))


def test_a_gptq_export_refuses_an_affine_grid_at_plan_and_when_it_is_written(tmp_path):
    method, shape = GPTQ(symmetry="affine", group_size=32), (32, 64)
    for compressor in (method, EoRA(base=method)):
        assert "--symmetry affine has none; choose native" in EXPORTS["gptq"].problem(
            compressor, shape
        )
    made = compressed(
        tmp_path / "source",
        make_form=lambda _, w: method.compress([w], statistics(inputs(w.shape[1])))[0],
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\..*: its grid is affine"):
        export(made, tmp_path / "gptq", "gptq")
