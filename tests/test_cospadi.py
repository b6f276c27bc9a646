"""Dictionaries and sparse codes: facts that hold whatever the data."""

import pytest
import torch
from problems import inputs, relative_output_error, statistics, weight

from calibration.statistics.collection import Pooled
from calibration.statistics.gram import Gram
from compress.errors import LayerError, RecipeError
from compress.families.base import LayerShape, Survey
from compress.families.sparse_storage import CodeBits
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.cospadi.options import Solver
from compress.methods.cospadi.stacking import OfOutputs, recoded, stacked, under_all, whitening
from compress.solvers.dictionary_learning import alternating, oneshot, revived
from compress.solvers.linalg import output_energy
from compress.solvers.masks import Pattern, largest
from compress.solvers.sparse_coding import SMALL, Coded, CoupledLines, FreeLines, Lines, solved

SHAPES = {"wide": (48, 96), "tall": (96, 48)}


def layer(shape, dtype=torch.float32):
    return LayerShape(shape, shape[0] * shape[1] * dtype.itemsize, dtype)


def planned(shape, **options):
    [method] = CoSpaDi(**{"share": "none", **options}).plan({"w": layer(shape)}).values()
    return method


def error_of(method, w, x):
    [form] = method.compress([w], statistics(x))
    return relative_output_error(w, form.dense(), statistics(x)[Gram].mean_ii())


def problem(coded, shape=(96, 48)):
    """Lines as the method makes them."""
    lines = stacked([weight(*shape)], statistics(inputs(shape[1])), coded, 0.01).lines()
    return lines


def plain_error(lines: Lines, codes, atoms):
    """||R (M - Z A)||_F / ||R M||_F with R written out."""
    gram = lines.weighted(torch.eye(len(lines.target))).double()
    root = torch.linalg.cholesky(gram + 1e-12 * torch.eye(len(gram)))
    left = lines.target.double() - codes.double() @ atoms.double()
    return float((root.T @ left).norm() / (root.T @ lines.target.double()).norm())


SIDES = [Coded.OUTPUTS, Coded.INPUTS]


@pytest.mark.parametrize("coded", SIDES)
def test_as_many_atoms_as_an_atom_has_entries_all_of_them_used_is_exact(coded):
    o, i = (96, 48) if coded is Coded.OUTPUTS else (48, 96)
    method = planned((o, i), coded=coded, atoms=48, ratio=1)
    assert error_of(method, weight(o, i), inputs(i)) < 1e-4


@pytest.mark.parametrize("coded", SIDES)
@pytest.mark.parametrize("k", [8, 24])
def test_codes_without_zeros_reach_the_optimum_of_the_whitened_svd(coded, k):
    w, x = weight(96, 48), inputs(48)
    method = planned((96, 48), coded=coded, atoms=k, ratio=1, damping=1e-6)
    gram = statistics(x)[Gram].mean_ii()
    spectrum = torch.linalg.svdvals(w.double() @ torch.linalg.cholesky(gram))
    best = float((spectrum[k:].square().sum() / spectrum.square().sum()).sqrt())
    assert error_of(method, w, x) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("coded", SIDES)
@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("k", [24, 64])  # fewer than an atom's entries, and more
def test_rounds_never_end_above_one_shot(coded, pattern, k):
    lines = problem(coded)
    first = lines.error(*oneshot(lines, k, k // 2, pattern))
    reached = [
        lines.error(*alternating(lines, k, k // 2, pattern, n_rounds)) for n_rounds in (1, 4, 12)
    ]
    assert max(reached) <= first
    assert reached[-1] < 0.99 * first or first < 1e-4  # all of it, but for rounding


@pytest.mark.parametrize("coded", SIDES)
def test_the_error_that_a_solver_reports_is_that_of_the_outputs(coded):
    lines = problem(coded)
    codes, atoms = alternating(lines, 24, 12, Pattern.FREE, 3)
    assert lines.error(codes, atoms) == pytest.approx(plain_error(lines, codes, atoms), rel=1e-3)


@pytest.mark.parametrize("coded", SIDES)
def test_the_atoms_of_given_codes_cannot_be_improved(coded):
    lines = problem(coded)
    codes, _ = oneshot(lines, 24, 12, Pattern.FREE)
    atoms, error = lines.fit(codes)
    assert error == pytest.approx(lines.error(codes, atoms), rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = atoms + 1e-2 * torch.randn(atoms.shape, generator=generator) * atoms.std()
        assert lines.error(codes, atoms) <= lines.error(codes, other)


@pytest.mark.parametrize("coded", SIDES)
def test_a_polish_solves_for_the_nonzeros_exactly_and_keeps_their_places(coded):
    lines = problem(coded, (20, 14))
    codes, atoms = oneshot(lines, 8, 4, Pattern.FREE)
    polished = lines.polished(atoms, codes, 200)
    assert torch.equal(polished != 0, codes != 0)
    gradient = lines.weighted(lines.target - polished @ atoms) @ atoms.T
    scale = (lines.weighted(lines.target) @ atoms.T).abs().max()
    assert float((gradient * (codes != 0)).abs().max() / scale) < 1e-4


@pytest.mark.parametrize("n_lines", [1, 7, 96])
def test_coding_and_polishing_in_blocks_of_lines_change_nothing(n_lines):
    whole = problem(Coded.OUTPUTS)
    parts = FreeLines(whole.target, block_entries=24 * n_lines)
    codes, atoms = oneshot(whole, 24, 12, Pattern.FREE)
    torch.testing.assert_close(
        parts.code(atoms, codes, 12, Pattern.FREE), whole.code(atoms, codes, 12, Pattern.FREE)
    )
    torch.testing.assert_close(parts.polished(atoms, codes, 5), whole.polished(atoms, codes, 5))


def test_coupled_lines_under_a_gram_of_ones_on_the_diagonal_are_free():
    target = weight(40, 24)
    free, coupled = FreeLines(target), CoupledLines(target, [torch.eye(40)])
    codes, atoms = oneshot(free, 16, 8, Pattern.FREE)
    torch.testing.assert_close(
        free.code(atoms, codes, 8, Pattern.FREE),
        coupled.code(atoms, codes, 8, Pattern.FREE),
        atol=1e-5,
        rtol=1e-4,
    )
    torch.testing.assert_close(free.fit(codes)[0], coupled.fit(codes)[0])


def test_the_largest_of_a_line_are_exactly_as_many_even_among_equals():
    assert torch.equal(
        largest(torch.tensor([[1.0, -3, 2, 0]]), 2, Pattern.FREE),
        torch.tensor([[False, True, True, False]]),
    )
    assert largest(torch.zeros(3, 8), 5, Pattern.FREE).sum(1).tolist() == [5, 5, 5]
    chosen = largest(torch.randn(6, 16), 8, Pattern.TWO_OF_FOUR)
    assert (chosen.view(6, 4, 4).sum(2) == 2).all()


def test_a_dead_atom_becomes_the_line_that_is_worst_off():
    lines = FreeLines(weight(30, 10))
    codes, atoms = oneshot(lines, 6, 3, Pattern.FREE)
    codes[:, 2] = 0
    kept = codes.clone()
    new_codes, new_atoms = revived(lines, codes, atoms)
    left = lines.target - kept @ atoms
    worst = left[left.square().sum(1).argmax()]
    torch.testing.assert_close(new_atoms[2], worst)
    assert torch.equal(new_codes, kept)
    assert torch.equal(new_atoms[3], atoms[3])


def test_a_weight_of_one_direction_has_no_use_for_most_atoms_and_is_still_finite():
    w = torch.outer(weight(64, 1)[:, 0], weight(1, 32)[0])
    assert error_of(planned((64, 32), atoms=16), w, inputs(32)) < 1e-3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_zeros_stay_zeros(shape):
    w = weight(*shape)
    w[3] = 0
    w[:, 5] = 0
    [form] = planned(shape, keep=0.7).compress([w], statistics(inputs(shape[1])))
    line, column = form.dense()[3], form.dense()[:, 5]
    assert float(line.abs().max()) < 0.05 * float(form.dense().abs().max())
    assert torch.isfinite(column).all()
    [nothing] = planned(shape).compress([torch.zeros(shape)], statistics(inputs(shape[1])))
    assert float(nothing.dense().abs().max()) == 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_dictionary_of_8_bits_takes_the_planned_bytes_and_costs_little(shape):
    w, x = weight(*shape), inputs(shape[1])
    rounded = planned(shape, atoms=32, dictionary_dtype="int8")
    full = planned(shape, atoms=32, code_bits=rounded.code_bits)
    [form] = rounded.compress([w], statistics(x))
    assert form.n_bytes() == rounded.planned_bytes(shape) < full.planned_bytes(shape)
    assert error_of(rounded, w, x) < error_of(full, w, x) + 0.01


BITS = [CodeBits.FULL, CodeBits.HALF, CodeBits.SHORT_14, CodeBits.SHORT_13, CodeBits.INT_8]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [*BITS, CodeBits.INT_4])
@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("keep", [0.6, 0.83])
def test_the_bytes_on_disk_are_the_planned_ones_and_use_up_the_share(shape, bits, pattern, keep):
    method = planned(
        shape, keep=keep, code_bits=bits, pattern=pattern, dictionary_dtype="float16", rounds=1
    )
    [form] = method.compress([weight(*shape)], statistics(inputs(shape[1])))
    share = keep * shape[0] * shape[1] * 4
    assert form.n_bytes() == method.planned_bytes(shape) <= share
    assert method.bytes_of([shape], method.atoms + 4) > share or method.atoms == max(shape)


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_8_bits_or_more_cost_little(bits):
    shape = (96, 48)
    w, x = weight(*shape), inputs(48)
    full = error_of(planned(shape, atoms=32), w, x)
    assert error_of(planned(shape, atoms=32, code_bits=bits), w, x) < full + 0.01


def test_more_bytes_lose_less_and_the_default_solver_beats_one_shot_by_half():
    shape = (192, 64)
    w, x = weight(*shape), inputs(64)
    errors = [error_of(planned(shape, keep=keep), w, x) for keep in (0.4, 0.6, 0.8)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.75 * error_of(planned(shape, solver=Solver.ONESHOT), w, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.2}, r"keep: must be between 0 and 1 \(e\.g\. 0\.8\), got 1\.2"),
        ({"ratio": 0.5}, r"ratio: must be at least 1 and below 1000 .* got 0\.5"),
        ({"atoms": 0}, "atoms: must be 1 or more, got 0"),
        ({"rounds": 0}, "rounds: must be 1 or more, got 0"),
        ({"depth": 3}, "depth: 3 has no effect with --share inputs; it is for --share depth"),
        ({"share": "depth", "depth": 1}, "depth: must be 2 or more, got 1"),
        ({"share": "depth", "allocation": "errors"}, r"allocation: errors are measured"),
        (
            {"solver": "ksvd", "pattern": "2:4"},
            "pattern: --solver ksvd does not support pattern 2:4; use --solver admm",
        ),
        (
            {"solver": "ksvd", "coded": "inputs", "share": "none"},
            "ksvd does not support a code for each input",
        ),
        ({"ratio": 3.0, "pattern": "2:4"}, r"ratio: 3\.0 has no effect with --pattern 2:4"),
        ({"solver": "oneshot", "rounds": 5}, "rounds: 5 has no effect with --solver oneshot"),
        ({"importance": "kl"}, "importance: kl has no effect with --allocation uniform"),
        ({"allocation": "errors", "atoms": 8}, "allocation: errors has no effect beside --atoms 8"),
        ({"budget": "1MB", "atoms": 8}, "budget: 1MB has no effect beside --atoms 8"),
        ({"coded": "inputs"}, "use --share none"),
        ({"code_bits": "7"}, "code_bits: unknown '7'; choose auto, 32, 16"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        CoSpaDi(**options)


def test_a_budget_that_pays_for_no_atom_is_refused_with_the_layers_name():
    with pytest.raises(
        RecipeError, match=r"0\.0099\d of the bytes of mlp\.up \(96, 48\) does not pay"
    ):
        CoSpaDi(keep=0.01).plan({"mlp.up": layer((96, 48))})


def test_a_layer_of_fewer_lines_than_the_smallest_dictionary_has_atoms_is_refused():
    with pytest.raises(RecipeError, match=r"coded: the 3 outputs of x are fewer than the 4 atoms"):
        CoSpaDi(coded="outputs", share="none").plan({"x": layer((3, 48))})


def test_a_budget_for_the_checkpoint_is_shared_out_by_bytes():
    layers = {"a": layer((96, 48)), "b": layer((48, 192))}
    total = sum(each.n_bytes for each in layers.values())
    plan = CoSpaDi(budget=str(int(0.7 * total) + 1000)).plan(layers, rest_bytes=1000)
    for name, each in layers.items():
        assert 0.65 < plan[name].planned_bytes(each.shape) / each.n_bytes <= 0.7


def test_inputs_that_say_nothing_are_refused():
    with pytest.raises(LayerError, match="every input channel is zero"):
        planned((96, 48)).compress([weight(96, 48)], statistics(torch.zeros(64, 48)))


TOGETHER = {"q": (64, 48), "k": (16, 48), "v": (16, 48)}


def together(**options):
    """Plans of layers that read one tensor."""
    layers = {
        name: LayerShape(shape, shape[0] * shape[1] * 4, survey=Survey(reads="q"))
        for name, shape in TOGETHER.items()
    }
    return CoSpaDi(**options).plan(layers)


@pytest.mark.parametrize("bits", ["32", "14", "8"])
def test_layers_with_one_input_share_a_dictionary_in_the_bytes_that_were_planned(bits):
    plan, x = together(code_bits=bits), inputs(48)
    weights = [weight(*shape, seed=n) for n, shape in enumerate(TOGETHER.values())]
    assert len({method.together for method in plan.values()}) == 1
    forms = plan["q"].compress(weights, statistics(x))
    for form, method, shape in zip(forms, plan.values(), TOGETHER.values(), strict=True):
        assert form.n_bytes() == method.planned_bytes(shape)
    dictionaries = [form.down.dense() for form in forms]
    assert all(torch.equal(each, dictionaries[0]) for each in dictionaries)
    total = sum(o * i * 4 for o, i in TOGETHER.values())
    assert 0.7 * total < sum(form.n_bytes() for form in forms) <= 0.8 * total


def alike(weights, stats):
    """Each with outputs of energy 1."""
    gram = stats[Gram].mean_ii()
    return [w * output_energy(w, gram) ** -0.5 for w in weights]


def test_a_shared_dictionary_is_that_of_the_stacked_weight():
    plan, stats = together(), statistics(inputs(48))
    weights = [weight(*shape, seed=n) for n, shape in enumerate(TOGETHER.values())]
    weights = alike(weights, stats)
    forms = plan["q"].compress(weights, stats)
    alone = planned((96, 48), atoms=plan["q"].atoms)
    [whole] = alone.compress([torch.cat(weights)], stats)
    found = torch.cat([form.dense() for form in forms])
    torch.testing.assert_close(found, whole.dense(), rtol=1e-4, atol=1e-5)


def across_depth(shape, n_blocks=3, **options):
    """Weights of so many blocks in a row, each with its own inputs; their pooled statistics, and their plan."""
    names = [f"model.layers.{number}.up_proj" for number in range(n_blocks)]
    layers = {
        name: LayerShape(shape, shape[0] * shape[1] * 4, survey=Survey(reads=name))
        for name in names
    }
    plan = CoSpaDi(share="depth", depth=n_blocks, **options).plan(layers)
    weights = [weight(*shape, seed=number) for number in range(n_blocks)]
    own = [statistics((number + 1) * inputs(shape[1], seed=number)) for number in range(n_blocks)]
    return weights, own, Pooled([(1, each) for each in own]), plan[names[0]]


@pytest.mark.parametrize("shape", [(48, 48), (48, 96)], ids=["square", "wide"])
def test_across_depth_one_dictionary_loses_less_than_one_each_in_the_same_bytes(shape):
    weights, own, pooled, method = across_depth(shape)
    forms = method.compress(weights, pooled)
    alone = planned(shape)
    lost = [[], []]
    for w, stats, form in zip(weights, own, forms, strict=True):
        gram = stats[Gram].mean_ii()
        [single] = alone.compress([w], stats)
        for found, one in zip(lost, (form, single), strict=True):
            found.append(relative_output_error(w, one.dense(), gram))
    assert sum(form.n_bytes() for form in forms) <= 0.8 * sum(4 * w.numel() for w in weights)
    assert sum(lost[0]) < 0.95 * sum(lost[1])
    dictionaries = [form.down if shape[0] >= shape[1] else form.up for form in forms]
    assert all(torch.equal(each.dense(), dictionaries[0].dense()) for each in dictionaries)


def test_atoms_under_several_metrics_solve_their_normal_equations():
    halves = [torch.randn(3, 9, n, dtype=torch.float64) for n in (6, 5)]
    normals, metrics = ([one @ one.T for one in each.transpose(1, 2)] for each in halves)
    right = torch.randn(6, 5, dtype=torch.float64)
    found = under_all(torch.zeros_like(right), normals, metrics, right)
    system = sum(torch.kron(h, g) for h, g in zip(normals, metrics, strict=True))
    expected = torch.linalg.solve(system, right.flatten()).view(6, 5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_blocks_with_equal_inputs_have_the_dictionary_of_one_input():
    [w, *_], own, _, method = across_depth((96, 48))
    weights, pooled = [w] * 3, Pooled([(1, own[0])] * 3)
    codes = [torch.randn(96, 20) for _ in weights]
    several = stacked(weights, pooled, method.coded, 0.01).dictionary(codes)
    one = stacked(weights, own[0], method.coded, 0.01).dictionary(codes)
    torch.testing.assert_close(several, one, rtol=1e-6, atol=1e-8)


def test_the_inputs_of_weights_of_zeros_count_as_those_of_a_mean_direction():
    weights, own, pooled, method = across_depth((96, 48))
    stack = stacked([weights[0] * 0, *weights[1:]], pooled, method.coded, 0.01)
    assert stack.shares[0] * float(own[0][Gram].mean_ii().diagonal().mean()) == pytest.approx(1)
    traces = [float(each.trace()) for each in stack.metrics()]
    assert max(traces) < 1.5 * min(traces)


def test_a_weight_of_zeros_takes_nothing_from_the_count_of_others_with_its_inputs():
    w, stats = weight(96, 48), statistics(inputs(48))
    gram, rest = stats[Gram].mean_ii(), statistics(inputs(48, seed=1))
    pooled = Pooled([(2, stats), (1, rest)])
    stack = stacked([w, w * 0, w], pooled, Coded.OUTPUTS, 0.01)
    assert stack.shares[0] == pytest.approx(float(w.square().sum()) / output_energy(w, gram))


def test_codes_found_again_in_their_own_metric_are_never_worse():
    weights, own, pooled, method = across_depth((96, 48))
    stack = stacked(weights, pooled, method.coded, 0.01)
    assert isinstance(stack, OfOutputs)
    first, atoms = oneshot(stack.lines(), 24, 10, Pattern.FREE)
    back = torch.linalg.lstsq(first, torch.cat(weights)).solution
    for w, stats, part in zip(weights, own, first.split(96), strict=True):
        lines = FreeLines(w @ whitening(stats, 0.01))
        seen = back @ whitening(stats, 0.01)
        again = recoded(lines, seen, part, (10, Pattern.FREE))
        assert lines.error(again, seen) < lines.error(part, seen)
    assert atoms.shape == (24, 48)


def test_lines_of_several_inputs_are_coded_as_those_of_each_alone():
    shape = SHAPES["wide"]
    weights, own, pooled, method = across_depth(shape)
    assert method.coded is Coded.INPUTS
    atoms = torch.nn.functional.normalize(torch.randn(24, 48), dim=1)
    together = stacked(weights, pooled, method.coded, 0.01)
    start = torch.zeros(3 * 96, 24)
    found = together.lines().code(atoms, start, 10, Pattern.FREE).split(96)
    for w, stats, codes in zip(weights, own, found, strict=True):
        alone = stacked([w], stats, method.coded, 0.01).lines()
        expected = alone.code(atoms, torch.zeros(96, 24), 10, Pattern.FREE)
        # Every block counts by its relative error: all codes of it are a multiple of what they were.
        energy = output_energy(w, stats[Gram].mean_ii())
        torch.testing.assert_close(codes, energy**-0.5 * expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", [(96, 48), (48, 96)], ids=["outputs", "inputs"])
def test_how_large_a_weight_is_does_not_change_what_the_others_share(side):
    weights, _, pooled, method = across_depth(side)
    before = [form.dense() for form in method.compress(weights, pooled)]
    after = [form.dense() for form in method.compress([16 * weights[0], *weights[1:]], pooled)]
    assert torch.equal(after[0], 16 * before[0])
    assert all(map(torch.equal, after[1:], before[1:]))


def test_across_depth_only_like_layers_of_blocks_in_a_row_share():
    def known(name, shape):
        return LayerShape(shape, shape[0] * shape[1] * 4, survey=Survey(reads=name))

    names = [f"model.layers.{n}.{leaf}" for n in range(5) for leaf in ("q_proj", "up_proj")]
    plan = CoSpaDi(share="depth", depth=3).plan({name: known(name, (48, 48)) for name in names})
    together = {}
    for name, method in plan.items():
        reads = method.together is not method
        together.setdefault(name.rpartition(".")[2], []).append(reads)
    assert together == {leaf: [False, True, True, False, True] for leaf in ("q_proj", "up_proj")}


def test_a_shared_dictionary_loses_less_than_one_each_in_the_same_bytes():
    x = inputs(48)
    weights = [weight(*shape, seed=n) for n, shape in enumerate(TOGETHER.values())]
    gram = statistics(x)[Gram].mean_ii()

    def lost(forms):
        return sum(
            output_energy(w - form.dense(), gram) for w, form in zip(weights, forms, strict=True)
        )

    shared = together()["q"].compress(weights, statistics(x))
    apart = together(share="none")
    own = [
        apart[name].compress([w], statistics(x))[0]
        for name, w in zip(TOGETHER, weights, strict=True)
    ]
    assert lost(shared) < 0.8 * lost(own)


@pytest.mark.parametrize("share", ["none", "inputs"])
def test_more_atoms_than_what_has_codes_are_refused(share):
    with pytest.raises(RecipeError, match=r"atoms: 400 are more than the (64|96) outputs of q"):
        together(share=share, atoms=400)


def test_a_reader_without_the_layer_that_stores_its_dictionary_is_refused():
    with pytest.raises(LayerError, match="store its dictionary could not be compressed"):
        together()["k"].compress([weight(16, 48)], statistics(inputs(48)))


def test_where_inputs_are_the_more_numerous_each_layer_has_its_own_dictionary():
    shape = (16, 96)
    layers = {name: LayerShape(shape, 16 * 96 * 4, survey=Survey(reads="a")) for name in ("a", "b")}
    plan = CoSpaDi().plan(layers)
    assert {method.coded for method in plan.values()} == {Coded.INPUTS}
    assert plan["a"] == plan["b"]
    forms = plan["a"].compress([weight(*shape), weight(*shape, seed=1)], statistics(inputs(96)))
    assert [form.n_bytes() for form in forms] == [plan["a"].planned_bytes(shape)] * 2


def test_codes_of_which_the_inputs_show_next_to_nothing_still_have_the_best_atoms():
    n, k, shown = 400, 390, 1e-4
    gram = (1 - shown) * torch.ones(n, n) + shown * torch.eye(n)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(n, k, generator=generator)
    codes -= codes.mean(
        0
    )  # G is nearly the mean's alone: fp32 makes these weights less than nothing
    normal = codes.T @ gram @ codes
    with pytest.raises(LayerError, match="singular"):
        solved(normal, normal, SMALL)
    lines = CoupledLines(codes @ torch.randn(k, 40, generator=generator), [gram])
    atoms, _ = lines.fit(codes)
    assert atoms.dtype == torch.float32
    assert lines.error(codes, atoms) < 0.01
