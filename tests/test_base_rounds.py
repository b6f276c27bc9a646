"""Base and correction in turns."""

import pytest
import torch
from problems import inputs, statistics, weight

from calibration.statistics.gram import Gram
from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.families.base import LayerShape, Survey
from compress.methods.admm import ADMM
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.lord import LoRD
from compress.methods.rtn import RTN
from compress.solvers.linalg import output_energy

BASES = [
    RTN(bits=3, group_size=32),
    GPTQ(bits=3, group_size=32),
    ADMM(pattern="2:4", value_dtype="bfloat16"),
]


def lost(form, w, stats):
    return output_energy(w - form.dense(), stats[Gram].mean_ii())


def pair(base, w, stats, rounds=0, rank=16):
    [form] = EoRA(base=base, rank=rank, base_rounds=rounds).compress([w], stats)
    return form


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
def test_more_rounds_never_raise_the_error(base, shape):
    w, stats = weight(*shape), statistics(inputs(shape[1]))
    errors = [lost(pair(base, w, stats, rounds), w, stats) for rounds in range(4)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rank", [8, 32])
def test_rounds_take_much_back_where_the_base_is_pruned(rank):
    w, stats = weight(96, 128), statistics(inputs(128))
    none, three = (lost(pair(BASES[2], w, stats, rounds, rank), w, stats) for rounds in (0, 3))
    assert three < 0.9 * none


def test_the_second_round_goes_as_far_ahead_as_the_correction_moved():
    w, stats = weight(96, 128), statistics(inputs(128))
    base = BASES[2]
    method = EoRA(base=base, rank=16)
    rest, paths, errors = w, [torch.zeros_like(w)], []
    for steps_ahead in (0, 1, 1):
        [made] = base.compress([rest], stats)
        [path] = method.corrections([w.double() - made.dense().double()], stats)
        errors.append(output_energy(w - made.dense() - path.dense(), stats[Gram].mean_ii()))
        paths.append(path.dense())
        ahead = paths[-1] - paths[-2] if len(paths) > 2 else 0
        rest = w - paths[-1] - steps_ahead * ahead
    assert lost(pair(base, w, stats, 2), w, stats) == pytest.approx(
        min(errors),
        rel=2e-3,  # how many threads add them up moves places of the mask
    )


def test_each_of_the_layers_with_one_input_keeps_its_own_best_pair():
    stats = statistics(inputs(64))
    weights = [weight(48, 64, seed) for seed in range(4)]
    together = EoRA(base=BASES[1], rank=8, base_rounds=2).compress(weights, stats)
    for w, form in zip(weights, together, strict=True):
        alone = lost(pair(BASES[1], w, stats, 2, rank=8), w, stats)
        assert lost(form, w, stats) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(("keep", "rank", "noise"), [(0.2, 8, 1.0), (0.25, 4, 0.05)])
def test_layers_that_share_a_dictionary_are_all_of_one_round(keep, rank, noise):
    """The last of them, where there is less noise, is nearly what a path can hold."""
    shapes, stats = {"q": (64, 48), "k": (16, 48), "v": (16, 48)}, statistics(inputs(48))
    layers = {
        name: LayerShape(shape, shape[0] * shape[1] * 4, survey=Survey(reads="q"))
        for name, shape in shapes.items()
    }
    generator = torch.Generator().manual_seed(5)
    weights = [weight(*shape, seed=50 + n) for n, shape in enumerate(shapes.values())]
    low = torch.randn(16, 3, generator=generator) @ torch.randn(3, 48, generator=generator)
    weights[-1] = noise * weights[-1] + (1 - noise) * 0.05 * low
    sums = []
    for rounds in (0, 1, 2, 3, 4):
        base = CoSpaDi(keep=keep)
        plan = EoRA(base=base, rank=rank, base_rounds=rounds).plan(layers)
        forms = plan["q"].compress(weights, stats)
        stored, *read = [form.terms[0].down for form in forms]
        assert all(each.form is stored for each in read)
        parts = zip(forms, weights, strict=True)
        gram = stats[Gram].mean_ii()
        sums.append(sum(lost(form, w, stats) / output_energy(w, gram) for form, w in parts))
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < sums[0]


def test_means_that_a_base_puts_back_are_those_of_base_and_correction_together():
    x = inputs(64) + 1
    w, stats = weight(48, 64), statistics(x)
    form = pair(LoRD(rank=8, factor_dtype="float32"), w, stats, rounds=2, rank=8)
    means = [(x @ w.T).double().mean(0), form(x).double().mean(0)]
    assert (means[0] - means[1]).norm() < 1e-3 * means[0].norm()


def test_a_checkpoint_is_never_made_again():
    with pytest.raises(RecipeError, match=r"base_rounds: 2 would make the base again"):
        Recipe(method=EoRA(base_rounds=2), base_checkpoint="here", model="there")


def test_a_negative_number_of_rounds_is_refused():
    with pytest.raises(RecipeError, match="base_rounds: must be 0 or more, got -1"):
        EoRA(base_rounds=-1)
