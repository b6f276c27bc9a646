"""Plans that spread atoms by what they are worth."""

import itertools

import pytest
import torch
from problems import inputs, relative_output_error, statistics, weight
from slowness import slow_but
from workspaces import recipe

import compress
from calibration.statistics.collection import Statistics
from calibration.statistics.gradient_energy import GradientEnergy
from calibration.statistics.gram import Gram
from compress.errors import LayerError, RecipeError
from compress.families.base import LayerShape, Survey
from compress.methods.cospadi.curves import curves, lost_at, trials
from compress.methods.cospadi.method import CoSpaDi
from compress.solvers.linalg import output_energy
from compress.solvers.sparse_coding import Coded

BY_ERRORS = CoSpaDi(allocation="errors")


def survey(*points, energy=100.0, cost=1.0, reads=""):
    return Survey(points=points, energy=energy, cost=cost, reads=reads)


def test_curves_meet_their_points_fall_between_them_and_start_at_the_whole_weight():
    curve = survey((8, 10.0), (16, 1.0))
    assert lost_at(curve, 0) == pytest.approx(100)
    assert lost_at(curve, 8) == pytest.approx(10)
    assert lost_at(curve, 12) == pytest.approx(10**0.5)
    assert lost_at(curve, 16) == lost_at(curve, 400) == pytest.approx(1)
    falling = [lost_at(curve, k) for k in range(17)]
    assert falling == sorted(falling, reverse=True)
    assert lost_at(survey((4, 0.0), energy=0.0), 2) == 0


@pytest.mark.parametrize("coded", [Coded.OUTPUTS, Coded.INPUTS])
@pytest.mark.parametrize("solver", [{"solver": "oneshot"}, {"solver": "admm", "rounds": 3}])
def test_points_are_the_output_errors_of_dictionaries_after_the_first_rounds(coded, solver):
    w, stats = weight(96, 64), statistics(inputs(64))
    options = {"coded": coded, "share": "none", "damping": 1e-6, "solver": solver["solver"]}
    method = CoSpaDi(allocation="errors", **options)
    [found] = curves(method, [w], [stats])
    gram = stats[Gram].mean_ii()
    assert found.energy == pytest.approx(output_energy(w, gram), rel=1e-2)
    k, lost = found.points[2]
    [once] = (
        CoSpaDi(atoms=k, **options | solver).plan({"w": LayerShape((96, 64), 96 * 64 * 4)}).values()
    )
    [form] = once.compress([w], stats)
    assert lost == pytest.approx(output_energy(w - form.dense(), gram), rel=2e-2)


def test_more_atoms_are_never_said_to_lose_more():
    """Without rounds those beyond an atom's entries do lose more."""
    w, stats = weight(256, 32), statistics(inputs(32))
    [found] = curves(CoSpaDi(allocation="errors", solver="oneshot"), [w], [stats])
    lost = [each for _, each in found.points]
    assert lost == sorted(lost, reverse=True)


def test_layers_that_share_a_dictionary_have_their_own_parts_of_its_error():
    weights, stats = [weight(64, 48), weight(16, 48, seed=1)], statistics(inputs(48))
    energies = [output_energy(w, stats[Gram].mean_ii()) for w in weights]
    parts = curves(BY_ERRORS, weights, [stats, stats])
    scaled = [w * energy**-0.5 for w, energy in zip(weights, energies, strict=True)]
    [whole] = curves(BY_ERRORS, [torch.cat(scaled)], [stats])
    assert [k for k, _ in parts[0].points] == [k for k, _ in whole.points]
    for one, other, both in zip(parts[0].points, parts[1].points, whole.points, strict=True):
        assert one[1] / energies[0] + other[1] / energies[1] == pytest.approx(both[1], rel=1e-3)
    assert [part.energy for part in parts] == pytest.approx(energies, rel=0.05)  # the ridge besides


@pytest.mark.parametrize("shape", [(96, 48), (48, 96)])
def test_a_trial_loses_what_it_says(shape):
    w, stats = weight(*shape), statistics(inputs(shape[1]))
    found = curves(BY_ERRORS, [w], [stats])
    [trial] = trials(BY_ERRORS, [w], found, [stats])
    lost = output_energy(w - trial.form.dense(), stats[Gram].mean_ii())
    assert trial.lost == pytest.approx(lost, rel=0.3)  # its curve is measured at few points


def test_a_layer_without_weight_or_without_gradients_is_refused_where_its_cost_is_asked():
    zero, stats = torch.zeros(96, 48), statistics(inputs(48))
    with pytest.raises(LayerError, match="its weight is zero"):
        trials(BY_ERRORS, [zero], curves(BY_ERRORS, [zero], [stats]), [stats])
    method = CoSpaDi(allocation="errors", importance="fisher")
    assert GradientEnergy in method.surveys
    with pytest.raises(LayerError, match="it has no Fisher"):
        curves(method, [weight(96, 48)], [Statistics({Gram: stats[Gram]})])


LAYERS = {
    "a": survey((8, 30.0), (16, 10.0), (24, 8.0)),
    "b": survey((8, 90.0), (16, 80.0), (24, 1.0)),
    "c": survey((8, 3.0), (16, 2.0), (24, 1.0)),
}


def layers(**changes):
    return {
        name: LayerShape((48, 32), 48 * 32 * 4, survey=found)
        for name, found in (LAYERS | changes).items()
    }


@pytest.mark.parametrize("keep", [0.6, 0.7, 0.8, 0.95])
def test_the_plan_loses_least_of_all_that_fit_the_bytes(keep):
    method = CoSpaDi(allocation="errors", importance="none", keep=keep, share="none")
    known = layers()
    plan = method.plan(known)
    even = CoSpaDi(keep=keep, share="none").plan(known)["a"]
    budget = int(keep * 3 * 48 * 32 * 4)

    def cost(sizes):
        n_bytes = sum(48 * 32 * 4 if k is None else even.bytes_of([(48, 32)], k) for k in sizes)
        lost = sum(
            0 if k is None else lost_at(layer.survey, k)
            for k, layer in zip(sizes, known.values(), strict=True)
        )
        return n_bytes, lost

    choices = [
        None,
        *(
            k
            for k in range(4, 64, 4)
            if k >= even.atoms / 2 and even.bytes_of([(48, 32)], k) < 48 * 32 * 4
        ),
    ]
    best = min(
        lost
        for sizes in itertools.product(choices, repeat=3)
        for n_bytes, lost in [cost(sizes)]
        if n_bytes <= budget
    )
    n_bytes, lost = cost([plan[name].atoms if name in plan else None for name in known])
    assert n_bytes <= budget
    assert lost == pytest.approx(best)


def test_what_an_error_costs_moves_atoms():
    def atoms_of_c(cost):
        method = CoSpaDi(allocation="errors", importance="kl", keep=0.7, share="none")
        changed = layers(c=survey((8, 3.0), (16, 2.0), (24, 1.0), cost=cost))
        plan = method.plan(changed)
        return plan["c"].atoms if "c" in plan else 1000

    assert atoms_of_c(100.0) > atoms_of_c(0.01)


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize("importance", slow_but(["none", "relative", "fisher", "kl"], kept="kl"))
def test_a_run_with_a_plan_by_errors_spends_its_bytes_and_predicts_an_upper_bound(
    workspace, importance
):
    method = CoSpaDi(allocation="errors", importance=importance, keep=0.8)
    job = recipe(workspace, method=method)
    planned, report = compress.plan(job).plan, compress.run(job)
    assert planned.bytes_after == report.totals.tensor_bytes_after
    before = sum(layer.bytes_before for layer in planned.layers)
    assert before > 0
    for layer, found in zip(planned.layers, report.layers, strict=True):
        assert found.relative_error < 1.25 * layer.predicted_error + 0.02


def test_a_budget_that_the_floor_does_not_allow_is_refused():
    with pytest.raises(RecipeError, match=r"does not pay for 4 atoms|keep more"):
        CoSpaDi(allocation="errors", keep=0.02, share="none").plan(layers())


def test_the_same_input_gives_the_same_dictionary_error_whoever_measures():
    w, x = weight(96, 48), inputs(48)
    [found] = curves(BY_ERRORS, [w], [statistics(x)])
    k = found.points[3][0]
    [method] = (
        CoSpaDi(atoms=k, share="none").plan({"w": LayerShape((96, 48), 96 * 48 * 4)}).values()
    )
    error = relative_output_error(
        w, method.compress([w], statistics(x))[0].dense(), statistics(x)[Gram].mean_ii()
    )
    assert error <= (found.points[3][1] / found.energy) ** 0.5 * 1.02
