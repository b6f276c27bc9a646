"""What every method must do, whatever it computes. A new method is covered when its file exists."""

import dataclasses

import pytest
import torch
from problems import inputs, relative_output_error, statistics, weight

from calibration.statistics.gram import Gram
from compress.families.base import METHODS, LayerShape
from compress.forms.base import Form

SHAPES = {"q": (96, 64), "k": (32, 64)}
LAYERS = {name: LayerShape(shape, shape[0] * shape[1] * 4) for name, shape in SHAPES.items()}


def planned(name):
    """The method with its defaults, except that its rank fits these small layers."""
    known = {f.name for f in dataclasses.fields(METHODS[name])}
    small = {"keep": 0.5, "rank_multiple": 1} if "keep" in known else {"rank": 4}
    options = {option: value for option, value in small.items() if option in known}
    return METHODS[name](**options).plan(LAYERS)["q"]


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_is_a_frozen_dataclass_whose_options_have_defaults_and_help(self, name):
        kind = METHODS[name]
        assert kind.__dataclass_params__.frozen
        assert kind.paper
        assert kind.__doc__
        for field in dataclasses.fields(kind):
            assert field.kw_only
            assert field.metadata.get("help"), f"{name}.{field.name} has no help"
            assert (
                field.default is not dataclasses.MISSING
                or field.default_factory is not dataclasses.MISSING
            )

    def test_returns_a_form_of_each_weights_shape_in_order(self, name):
        weights = [weight(*shape) for shape in SHAPES.values()]
        forms = planned(name).compress(weights, statistics(inputs(64)))
        assert [form.shape for form in forms] == list(SHAPES.values())
        assert all(isinstance(form, Form) for form in forms)
        for form, w in zip(forms, weights, strict=True):
            gram = statistics(inputs(64))[Gram].mean_ii()
            assert relative_output_error(w, form.dense(), gram) < 1.0  # 1: nothing is left of it

    def test_leaves_its_inputs_unchanged(self, name):
        weights, stats = [weight(*shape) for shape in SHAPES.values()], statistics(inputs(64))
        before = [w.clone() for w in weights], stats[Gram].sum_ii.clone()
        planned(name).compress(weights, stats)
        assert all(torch.equal(a, b) for a, b in zip(weights, before[0], strict=True))
        assert torch.equal(stats[Gram].sum_ii, before[1])

    def test_gives_equal_results_for_equal_inputs(self, name):
        weights, stats = [weight(*shape) for shape in SHAPES.values()], statistics(inputs(64))
        first, second = (planned(name).compress(weights, stats) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.dense(), b.dense())

    def test_a_weight_alone_equals_the_weight_in_a_stack(self, name):
        weights, stats = [weight(*shape) for shape in SHAPES.values()], statistics(inputs(64))
        together = planned(name).compress(weights, stats)
        for w, form in zip(weights, together, strict=True):
            [alone] = planned(name).compress([w], stats)
            error = (alone.dense() - form.dense()).norm() / w.norm()
            assert error < 1e-3  # a code may flip where a rounding error meets a half

    def test_weights_solved_beside_others_of_their_shapes_equal_those_alone(self, name):
        problems = [
            ([weight(*shape, seed) for shape in SHAPES.values()], statistics(inputs(64, seed=seed)))
            for seed in range(3)
        ]
        beside = planned(name).compress_alike(problems)
        for (weights, stats), forms in zip(problems, beside, strict=True):
            alone = planned(name).compress(weights, stats)
            for w, a, b in zip(weights, alone, forms, strict=True):
                assert (
                    a.dense() - b.dense()
                ).norm() / w.norm() < 1e-3  # a code may flip, see above

    def test_plans_the_bytes_that_it_then_stores(self, name):
        weights = [weight(*shape) for shape in SHAPES.values()]
        for form in planned(name).compress(weights, statistics(inputs(64))):
            assert form.n_bytes() == planned(name).planned_bytes(form.shape)

    def test_needs_the_gram_so_that_its_error_can_be_measured(self, name):
        assert Gram in planned(name).needs

    def test_a_dead_channel_does_no_harm(self, name):
        x = inputs(64)
        x[:, 5] = 0
        w = weight(96, 64)
        [form] = planned(name).compress([w], statistics(x))
        assert torch.isfinite(form.dense()).all()

    def test_a_scale_of_the_inputs_changes_nothing(self, name):
        w = weight(96, 64)
        [a] = planned(name).compress([w], statistics(inputs(64)))
        [b] = planned(name).compress([w], statistics(inputs(64) * 8))
        error = (a.dense() - b.dense()).norm() / w.norm()
        assert error < 1e-3
