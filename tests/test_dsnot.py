"""Dynamic Sparse No Training: never worse than its base, and what it swaps is what a plain loop swaps."""

import pytest
import torch
from problems import inputs, statistics, weight
from test_masks import PATTERNS, PRUNERS, error_of, planned, pruned, with_gram

from calibration.statistics.gram import Gram
from calibration.statistics.mean import Mean
from compress.errors import RecipeError
from compress.methods.dsnot import Criterion, DSnoT
from compress.methods.eora import EoRA
from compress.methods.magnitude import Magnitude
from compress.methods.sparsegpt import SparseGPT
from compress.methods.wanda import Wanda
from compress.solvers.masks import Pattern

CYCLES = 4


def shifted_inputs(n_inputs, seed=0):
    """Inputs with means other than zero, as activations have."""
    x = inputs(n_inputs, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return x + x.std(0) * torch.randn(n_inputs, generator=generator)


def row_errors(w, form, gram):
    """The squared error of each row."""
    error = w.double() - form.dense().double()
    return ((error @ gram) * error).sum(1)


@pytest.mark.parametrize("base", PRUNERS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("criterion", Criterion)
@pytest.mark.parametrize("bits", ["32", "13", "8"])
def test_no_row_ever_loses_more_than_with_the_base(base, pattern, criterion, bits):
    bits = "14" if (base, bits) == ("sparsegpt", "8") else bits
    method = PRUNERS[base](**pattern, value_bits=bits)
    for seed in range(2):
        w, stats = weight(24, 64, seed), statistics(shifted_inputs(64, seed))
        gram = stats[Gram].mean_ii()
        before = pruned(method, w, stats)
        after = pruned(DSnoT(base=method, criterion=criterion), w, stats)
        assert (row_errors(w, after, gram) <= row_errors(w, before, gram)).all()
        assert after.n_bytes() == before.n_bytes()
        mask = after.lines()
        assert (mask.sum(1) == before.lines().sum(1)).all()
        assert "pattern" not in pattern or (mask.view(24, 16, 4).sum(2) == 2).all()


@pytest.mark.parametrize(
    ("criterion", "base", "share"),
    [("error", Wanda, 0.75), ("error", SparseGPT, 0.97), ("mean", Wanda, 0.97)],
)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_it_lowers_the_error_of_masks_that_do_not_know_of_correlations(
    criterion, base, share, pattern, seed
):
    w, stats = weight(48, 128, seed), statistics(shifted_inputs(128, seed))
    method = base(**pattern)
    improved = pruned(DSnoT(base=method, criterion=criterion), w, stats)
    assert error_of(w, improved, stats) < share * error_of(w, pruned(method, w, stats), stats)


def test_weights_are_the_bases_or_those_that_the_model_had():
    w, stats = weight(24, 64), statistics(inputs(64))
    base, found = (
        pruned(kind, w, stats).dense() for kind in (SparseGPT(), DSnoT(base=SparseGPT()))
    )
    there = found != 0
    assert ((found == base) | (found == w))[there].all()
    assert (there & (base == 0)).any()  # some came back


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_that_is_the_best_there_is_stays(pattern):
    gram = torch.diag(torch.linspace(0.1, 3, 64))  # inputs that are not correlated: Wanda's is
    w, stats = weight(24, 64), with_gram(gram)
    base, found = (
        pruned(m, w, stats).dense() for m in (Wanda(**pattern), DSnoT(base=Wanda(**pattern)))
    )
    assert torch.equal(base, found)


def plain_pairs(row, kept, four):
    """Every weight that may come back, with every weight that may go for it."""
    for k in range(len(row)):
        for j in range(len(row)):
            if not kept[k] and kept[j] and (not four or k // 4 == j // 4):
                yield k, j


def plain_by_error(row, kept, gram, mean, four):  # noqa: ARG001  (as the other)
    """The swap with the least squared error after it, if it lowers it; weights that come back are chosen first."""

    def lost(mask):
        error = torch.where(mask, 0, row)
        return float(error @ gram @ error)

    def with_(mask, place, value):
        changed = mask.clone()
        changed[place] = value
        return changed

    pairs = list(plain_pairs(row, kept, four))
    if not four:
        first = min({k for k, _ in pairs}, key=lambda k: lost(with_(kept, k, value=True)))
        pairs = [pair for pair in pairs if pair[0] == first]
    best = min((with_(with_(kept, k, value=True), j, value=False) for k, j in pairs), key=lost)
    return best if lost(best) < lost(kept) else None


def plain_by_mean(row, kept, gram, mean, four):
    """The paper's swap: by mean over variance back, by |W| times the input's size away; None if there is none."""
    error = float((torch.where(kept, 0, row) * mean).sum())
    sign = 1 if error > 0 else -1
    variance = gram.diagonal() - mean**2
    pairs = [
        (k, j)
        for k, j in plain_pairs(row, kept, four)
        if sign * row[k] * mean[k] > 0 and sign * row[j] * mean[j] < 0
    ]
    if not pairs:
        return None
    k = max({k for k, _ in pairs}, key=lambda k: sign * row[k] * mean[k] / variance[k])
    j = min((j for k_, j in pairs if k_ == k), key=lambda j: row[j].abs() * gram[j, j].sqrt())
    swapped = kept.clone()
    swapped[k], swapped[j] = True, False
    return swapped


@pytest.mark.parametrize(
    ("criterion", "plain"), [("error", plain_by_error), ("mean", plain_by_mean)]
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_it_swaps_is_what_a_plain_loop_swaps(criterion, plain, pattern):
    w, stats = weight(8, 20), statistics(shifted_inputs(20))
    gram, mean = stats[Gram].mean_ii(), stats[Mean].mean_i()
    start = pruned(Magnitude(**pattern), w, stats).lines()
    found = pruned(DSnoT(base=Magnitude(**pattern), criterion=criterion, cycles=CYCLES), w, stats)
    n_moved = 0
    for row, first, ours in zip(w.double(), start, found.lines(), strict=True):
        tried = [first]
        while len(tried) <= CYCLES:
            following = plain(row, tried[-1], gram, mean, "pattern" in pattern)
            if following is None:
                break
            tried.append(following)
        lost = [float((e := torch.where(mask, 0, row)) @ gram @ e) for mask in tried]
        assert torch.equal(ours, tried[lost.index(min(lost))])
        n_moved += lost.index(min(lost)) > 0
    assert n_moved > 2


def test_only_the_papers_criterion_asks_for_means():
    assert Mean not in DSnoT().needs
    assert Mean in DSnoT(criterion="mean").needs


def test_it_plans_as_its_base_and_can_be_corrected():
    w, stats = weight(24, 64), statistics(inputs(64))
    base = DSnoT(base=Magnitude(pattern="2:4"))
    method = planned(EoRA(base=base, rank=4), (24, 64))
    assert method.base.base.per_row == 32
    assert method.base.base.pattern is Pattern.TWO_OF_FOUR
    [form] = method.compress([w], stats)
    assert form.n_bytes() == method.planned_bytes((24, 64))
    assert error_of(w, form, stats) < 0.9 * error_of(w, pruned(base, w, stats), stats)


def test_options_that_cannot_work_are_refused():
    with pytest.raises(RecipeError, match=r"cycles: must be 1 or more \(e\.g\. 50\), got 0"):
        DSnoT(cycles=0)
    with pytest.raises(RecipeError, match=r"base\.value_bits: 4 makes sparsegpt round"):
        DSnoT(base=SparseGPT(value_bits="4"))
