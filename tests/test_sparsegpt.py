"""SparseGPT against a sweep that inverts the Gram of the remaining inputs anew for every column."""

import pytest
import torch
from problems import inputs, statistics, weight
from test_masks import PATTERNS, error_of, kept_by, planned, pruned

from calibration.statistics.gram import Gram
from compress.errors import LayerError, RecipeError
from compress.methods.magnitude import Magnitude
from compress.methods.sparsegpt import SparseGPT, scale_groups
from compress.methods.wanda import Wanda
from compress.solvers.grid import Grid, ScaleSearch, Symmetry
from compress.solvers.linalg import add_ridge_, shrink_
from compress.solvers.masks import Pattern

FOURS_OF_200 = [(start, start + 4, 2) for start in range(0, 200, 4)]
CASES = {
    "one run": (48, {"sparsity": 0.5}, [[(0, 48, 24)]]),
    "several runs": (
        300,
        {"per_row": 80},
        [[(0, 120, 32), (120, 240, 32)], [(240, 300, 16)]],
    ),
    "2:4": (200, {"pattern": "2:4"}, [FOURS_OF_200[:32], FOURS_OF_200[32:]]),
}
GRID = Grid(4, Symmetry.SYMMETRIC, ScaleSearch.SEARCH)


def metric(stats):
    return add_ridge_(shrink_(stats[Gram].mean_ii(), 0.1), 0.01)


def plain_mask(rest, gram, run):
    """Where weights stay of a run: those that cost most to prune, each with the columns after it to make up for it."""
    start, stop, n_kept = run
    costs = [float(torch.linalg.inv(gram[j:, j:])[0, 0]) for j in range(start, stop)]
    return kept_by(rest[:, start:stop].square() / torch.tensor(costs), n_kept)


def plain_sweep(w, gram, groups, grid=None):
    """The weight (o, i) that a sweep leaves, fp64, where its values stay, and what each was divided by to round it."""
    rest, mask = w.double().clone(), torch.zeros_like(w, dtype=torch.bool)
    scales = torch.ones_like(rest)
    for runs in groups:
        if grid is not None:
            members = slice(runs[0][0], runs[-1][1])
            first = torch.cat([plain_mask(rest, gram, run) for run in runs], 1)
            kept = rest[:, members].float()[first].view(len(w), -1)
            weights = gram.diagonal()[members].expand_as(first)[first].view_as(kept)
            scales[:, members] = grid.scales(kept, weights)[0].double()[:, None]
        for run in runs:
            mask[:, run[0] : run[1]] = plain_mask(rest, gram, run)
            for j in range(run[0], run[1]):
                inverse = torch.linalg.inv(gram[j:, j:])
                kept = rest[:, j].clone()
                if grid is not None:
                    kept = (kept / scales[:, j]).round().clamp(-8, 7) * scales[:, j]
                kept[~mask[:, j]] = 0
                rest[:, j:] -= torch.outer((rest[:, j] - kept) / inverse[0, 0], inverse[0])
                rest[:, j] = kept
    return rest, mask, scales


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_plain_sweep(case):
    i, options, groups = CASES[case]
    w, stats = weight(16, i), statistics(inputs(i))
    plain, mask, _ = plain_sweep(w, metric(stats), groups)
    found = pruned(SparseGPT(**options), w, stats).dense()
    assert (
        (found != 0) == mask
    ).float().mean() > 0.995  # fp32 against fp64 where two cost the same
    same = ((found != 0) == mask).all(1)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(found[same].double(), plain[same], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_codes_on_disk_are_those_of_the_plain_sweep(case):
    i, options, groups = CASES[case]
    w, stats = weight(16, i), statistics(inputs(i))
    plain, mask, scales = plain_sweep(w, metric(stats), groups, GRID)
    codes = (plain / scales).round() + 8
    form = pruned(SparseGPT(**options, value_bits="4"), w, stats)
    same = (form.lines() == mask).all(1)
    assert same.float().mean() > 0.8
    expected = codes[same][mask[same]].view(int(same.sum()), -1)
    assert (form.values.codes().T[same] == expected).float().mean() > 0.98
    assert form.values.group_size == 64


@pytest.mark.parametrize("i", [4, 60, 128, 1000])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("pattern", Pattern)
def test_runs_cover_all_columns_and_keep_as_many_as_asked_for(i, share, pattern):
    s = i // 2 if pattern is Pattern.TWO_OF_FOUR else max(1, int(share * i))
    groups = scale_groups(i, s, pattern)
    runs = [run for group in groups for run in group]
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == i
    assert all(0 <= run.kept <= run.stop - run.start <= 128 for run in runs)
    counts = [sum(run.kept for run in group) for group in groups]
    assert counts == [min(64, s - done) for done in range(0, s, 64)]
    if pattern is Pattern.TWO_OF_FOUR:
        assert {(run.stop - run.start, run.kept) for run in runs} == {(4, 2)}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_it_loses_less_than_masks_without_updates(pattern, seed):
    w, stats = weight(48, 128, seed), statistics(inputs(128, seed=seed))
    ours, *others = (
        error_of(w, pruned(kind(**pattern), w, stats), stats)
        for kind in (SparseGPT, Wanda, Magnitude)
    )
    assert ours < 0.95 * min(others)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bits", ["8", "4"])
def test_rounding_in_the_sweep_loses_less_than_rounding_what_it_left(pattern, bits):
    w, stats = weight(48, 256), statistics(inputs(256))
    method = planned(SparseGPT(**pattern, value_bits=bits), (48, 256))
    [ours] = method.compress([w], stats)
    s = method.per_row
    after = method.storage.codes(method.pruned(w, s, stats), s, method.pattern, ours.along)
    assert ours.n_bytes() == after.n_bytes()
    assert error_of(w, ours, stats) < error_of(w, after, stats)


def test_two_of_four_in_four_bits_take_two_and_seven_eighths_bits_a_weight():
    w = weight(64, 1024)
    form = pruned(SparseGPT(pattern="2:4", value_bits="4"), w, statistics(inputs(1024)))
    assert 8 * form.n_bytes() / w.numel() == 4 / 2 + 3 / 4 + 16 / 128


def test_a_weight_of_which_everything_stays_is_kept_exactly():
    w, stats = weight(24, 200), statistics(inputs(200))
    assert torch.equal(pruned(SparseGPT(per_row=200), w, stats).dense(), w)


def test_fewer_tokens_than_inputs_need_a_ridge():
    w, stats = weight(24, 64), statistics(inputs(64, n_tokens=20))
    assert error_of(w, pruned(SparseGPT(), w, stats), stats) < 0.3
    with pytest.raises(LayerError, match="is singular"):
        pruned(SparseGPT(damping=0.0, shrinkage=0.0), w, stats)


def test_inputs_that_are_always_zero_go_first_where_the_ridge_is_small():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::2] = 0
    w, stats = weight(24, 64), statistics(x)
    form = pruned(SparseGPT(damping=1e-9), w, stats)
    assert torch.equal(form.dense()[:, 1::2], w[:, 1::2])
    assert error_of(w, form, stats) < 1e-6


def test_a_ridge_that_is_no_share_is_refused():
    with pytest.raises(RecipeError, match=r"damping: must be at least 0 .* got -1"):
        SparseGPT(damping=-1)
