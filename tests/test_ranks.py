"""Plans against brute force, and what every plan must keep to."""

import itertools
from dataclasses import replace

import pytest
import torch

from compress.solvers import rank_allocation as ranks
from compress.solvers.knapsack import BudgetError, Choice, knapsack
from compress.solvers.rank_allocation import (
    PLANS,
    Allocation,
    Curve,
    by_spectrum,
    by_type,
    total_bytes,
    uniform,
)


def curve(shape, spectrum, importance=1.0, overhead=0):
    o, i = shape
    return Curve(shape, 4 * o * i, lambda rank: 4 * rank * (o + i) + overhead, spectrum, importance)


def curves(seed=0, shapes=((24, 16), (8, 16), (16, 40), (24, 16))):
    generator = torch.Generator().manual_seed(seed)
    names = ("0.q_proj", "0.v_proj", "0.down_proj", "1.q_proj")
    found = {}
    for k, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        decay = torch.logspace(0, -1 - k % 2, min(shape), dtype=torch.float64)
        spectrum = (
            (decay * (1 + k) * torch.rand(min(shape), generator=generator).double())
            .sort(descending=True)
            .values
        )
        found[name] = curve(shape, spectrum)
    return found


def loss(found, plan):
    return sum(
        curve.importance * float(curve.spectrum[plan[name] :].square().sum())
        if plan[name] is not None
        else 0.0
        for name, curve in found.items()
    )


def dense_bytes(found):
    return sum(curve.dense_bytes for curve in found.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.8, 0.95])
def test_the_spectrum_plan_equals_brute_force(seed, keep):
    found = curves(seed)
    budget = int(keep * dense_bytes(found))
    options = [[(p.n_bytes, p.loss, p.rank) for p in curve.options(2)] for curve in found.values()]
    fitting = [c for c in itertools.product(*options) if sum(p[0] for p in c) <= budget]
    best = min(sum(p[1] for p in c) for c in fitting)
    plan = by_spectrum(found, budget, 2)
    assert total_bytes(found, plan) <= budget
    assert loss(found, plan) == pytest.approx(best, rel=1e-9)


def test_a_knapsack_in_coarse_units_still_fits_and_loses_little(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    choices = [
        [
            Choice(
                1000 + 997 * k + int(torch.randint(0, 50, (1,), generator=generator)), 1 / (k + 1)
            )
            for k in range(9)
        ]
        for _ in range(6)
    ]
    budget = 30_000
    exact = knapsack(choices, budget)
    monkeypatch.setattr("compress.solvers.knapsack.MAX_UNITS", 500)
    coarse = knapsack(choices, budget)
    taken, losses = (
        [
            sum(getattr(options[k], name) for options, k in zip(choices, plan, strict=True))
            for plan in (exact, coarse)
        ]
        for name in ("n_bytes", "loss")
    )
    assert max(taken) <= budget
    assert losses[0] <= losses[1] <= 1.05 * losses[0]


@pytest.mark.parametrize("allocation", Allocation)
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_no_plan_spends_more_than_the_budget_or_makes_a_layer_larger(allocation, keep):
    found = curves()
    budget = int(keep * dense_bytes(found))
    plan = PLANS[allocation](found, budget, 2)
    assert set(plan) == set(found)
    assert total_bytes(found, plan) <= budget
    for name, rank in plan.items():
        assert rank is None or (
            rank % 2 == 0 and found[name].bytes_at(rank) < found[name].dense_bytes
        )


def test_the_spectrum_plan_never_loses_more_than_the_others():
    found = curves()
    budget = int(0.6 * dense_bytes(found))
    best = loss(found, by_spectrum(found, budget, 2))
    for allocation in Allocation:
        assert best <= loss(found, PLANS[allocation](found, budget, 2)) + 1e-12


def test_layers_of_a_type_get_one_rank():
    found = curves()
    plan = by_type(found, int(0.6 * dense_bytes(found)), 2)
    assert plan["0.q_proj"] == plan["1.q_proj"]


def test_importance_moves_ranks_to_the_layer_that_matters():
    found = curves()
    budget = int(0.6 * dense_bytes(found))
    before = by_spectrum(found, budget, 2)["1.q_proj"]
    found["1.q_proj"] = replace(found["1.q_proj"], importance=1e6)
    after = by_spectrum(found, budget, 2)["1.q_proj"]
    assert after is None or after > before


def test_a_floor_keeps_every_layer_above_its_share_of_the_uniform_rank():
    found = curves()
    found["0.v_proj"] = replace(found["0.v_proj"], importance=1e-9)
    budget = int(0.6 * dense_bytes(found))
    even = uniform(found, budget, 1)
    assert by_spectrum(found, budget, 1)["0.v_proj"] < 0.5 * even["0.v_proj"]
    floored = by_spectrum(found, budget, 1, floor=0.5)["0.v_proj"]
    assert floored is None or floored >= 0.5 * even["0.v_proj"]


def test_one_threshold_keeps_more_of_a_flat_spectrum_than_of_a_steep_one():
    shape = (64, 64)
    flat, steep = torch.linspace(1, 0.4, 64).double(), torch.logspace(0, -3, 64).double()
    found = {name: curve(shape, s) for name, s in (("flat", flat), ("steep", steep))}
    plan = ranks.by_threshold(found, int(0.6 * dense_bytes(found)), 1)
    assert plan["flat"] is None or plan["flat"] > plan["steep"]


def test_a_budget_below_the_least_ranks_is_refused():
    found = curves()
    for allocation in (Allocation.SPECTRUM, Allocation.BY_TYPE, Allocation.WELORE):
        with pytest.raises(BudgetError, match="the budget is 100"):
            PLANS[allocation](found, 100, 2)
