"""Pruned weights: facts that hold whatever the data."""

import itertools

import pytest
import torch
from problems import inputs, relative_output_error, statistics, weight
from slowness import slow_but
from workspaces import recipe

import compress
from calibration.statistics.gram import Gram
from compress.errors import RecipeError
from compress.exports.verification.verify import check
from compress.families.base import LayerShape
from compress.forms.sparse import Sparse
from compress.methods.admm import ADMM
from compress.methods.dsnot import DSnoT
from compress.methods.eora import EoRA
from compress.methods.sparsegpt import SparseGPT
from compress.methods.wanda import Wanda
from compress.solvers.masks import Pattern, largest


def planned(shape, **options):
    [method] = ADMM(**options).plan({"w": LayerShape(shape, shape[0] * shape[1] * 4)}).values()
    return method


def error_of(w, approximation, x):
    return relative_output_error(w, approximation, statistics(x)[Gram].mean_ii())


def best_on(mask_oi, w, gram):
    """The best weights where a mask has ones, row by row, by least squares."""
    found = torch.zeros_like(w, dtype=torch.float64)
    for row, keep in enumerate(mask_oi):
        part = gram[keep][:, keep]
        found[row, keep] = torch.linalg.solve(part, (gram @ w[row].double())[keep])
    return found


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.75}, {"pattern": "2:4"}, {"per_row": 9}])
def test_as_many_weights_stay_in_every_row_as_were_asked_for(options):
    [form] = planned((24, 48), **options).compress([weight(24, 48)], statistics(inputs(48)))
    assert isinstance(form, Sparse)
    expected = {"sparsity": 12, "per_row": 9}.get(next(iter(options), ""), 24)
    assert ((form.dense() != 0).sum(1) == expected).all()
    if "pattern" in options:
        assert ((form.dense() != 0).view(24, 12, 4).sum(2) == 2).all()


@pytest.mark.parametrize("pattern", Pattern)
def test_what_stays_is_the_best_there_is_for_the_mask(pattern):
    w, x = weight(24, 48), inputs(48)
    [form] = planned((24, 48), pattern=pattern, damping=1e-4).compress([w], statistics(x))
    gram = statistics(x)[Gram].mean_ii()
    best = best_on(form.dense() != 0, w, gram)
    assert error_of(w, form.dense(), x) < 1.02 * error_of(w, best, x)


def test_the_mask_beats_that_of_the_largest_weights_and_of_their_sizes_times_the_inputs():
    w, x = weight(48, 64), inputs(64)
    [form] = planned((48, 64)).compress([w], statistics(x))
    gram = statistics(x)[Gram].mean_ii()
    for score in (w, w * gram.diagonal().sqrt()):  # magnitude; Wanda
        mask = largest(score.float(), 32, Pattern.FREE)
        assert error_of(w, form.dense(), x) < error_of(w, best_on(mask, w, gram), x)


def test_a_small_row_is_pruned_nearly_as_well_as_by_trying_all_masks():
    w, x = weight(6, 8), inputs(8, n_tokens=256)
    [form] = planned((6, 8), sparsity=0.5, damping=1e-4).compress([w], statistics(x))
    gram = statistics(x)[Gram].mean_ii()
    masks = torch.zeros(70, 8, dtype=torch.bool)
    for number, kept in enumerate(itertools.combinations(range(8), 4)):
        masks[number, list(kept)] = True
    lost = 0.0
    for row in w:
        tries = [best_on(mask[None], row[None], gram) - row.double() for mask in masks]
        lost += min(float((each @ gram @ each.T).sum()) for each in tries)
    total = float(((w.double() @ gram) * w).sum())
    assert error_of(w, form.dense(), x) < 1.5 * (lost / total) ** 0.5 + 1e-3


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("bits", ["32", "16", "14", "8"])
def test_bytes_kept_are_bytes_on_disk(keep, bits):
    method = planned((24, 96), keep=keep, value_bits=bits)
    [form] = method.compress([weight(24, 96)], statistics(inputs(96)))
    assert form.n_bytes() == method.planned_bytes((24, 96)) <= keep * 24 * 96 * 4
    more = method.per_row + 1
    assert more > 96 or method._bytes_of((24, 96), more) > keep * 24 * 96 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: must be between 0 and 1 \(e\.g\. 0\.5\), got 1\.0"),
        ({"keep": 0.0}, r"keep: must be between 0 and 1 \(e\.g\. 0\.8\), got 0\.0"),
        ({"per_row": 0}, "per_row: must be 1 or more, got 0"),
        (
            {"pattern": "2:4", "sparsity": 0.6},
            r"sparsity: 0\.6 has no effect beside --pattern",
        ),
        ({"keep": 0.6, "sparsity": 0.6}, r"sparsity: 0\.6 has no effect beside --keep"),
        ({"per_row": 5, "keep": 0.6}, r"per_row: 5 has no effect beside --keep"),
        ({"pattern": "2:4", "keep": 0.6}, r"keep: 0\.6 has no effect beside --pattern"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        ADMM(**options)


def test_layers_that_a_pattern_or_a_budget_does_not_fit_are_named():
    with pytest.raises(RecipeError, match="2:4 needs inputs in multiples of 4, and w has 50"):
        planned((24, 50), pattern="2:4")
    with pytest.raises(RecipeError, match="--pattern 2:4 keeps 24 weights in a row of w, got 5"):
        planned((24, 48), pattern="2:4", per_row=5)
    with pytest.raises(RecipeError, match=r"of w \(24, 48\) does not pay for its mask"):
        planned((24, 48), keep=0.01)


CHECKPOINTS = {
    "13 of 32 in a row": ADMM(sparsity=0.6),
    "16 of 32 in a row, 13-bit floats": Wanda(pattern="2:4", value_bits="13"),
    "16 of 32 in a row, 4-bit g64": SparseGPT(pattern="2:4", value_bits="4"),
    "13 of 32 in a row + rank 4": EoRA(base=DSnoT(base=SparseGPT(sparsity=0.6)), rank=4),
}


@pytest.mark.parametrize("form", slow_but(CHECKPOINTS, kept="13 of 32 in a row"))
@pytest.mark.usefixtures("quick_verification")
def test_a_pruned_checkpoint_is_smaller_verified_and_as_planned(workspace, form):
    job = recipe(workspace, method=CHECKPOINTS[form])
    planned_bytes, report = compress.plan(job).plan.bytes_after, compress.run(job)
    assert planned_bytes == report.totals.tensor_bytes_after < report.totals.tensor_bytes_before
    assert check(job.folder, "cpu").passed
    assert {layer.form for layer in report.layers} >= {form}
