"""The published solver: facts, and scikit-learn as its oracle."""

import pytest
import torch
from problems import inputs, relative_output_error, statistics, weight
from sklearn.linear_model import orthogonal_mp

from calibration.statistics.gram import Gram
from compress.families.base import LayerShape
from compress.methods.cospadi.method import CoSpaDi
from compress.solvers.dictionary_learning import unit
from compress.solvers.ksvd import ksvd, matching_pursuit, sweep
from compress.solvers.sparse_coding import Coded, FreeLines


def atoms_of_length_one(k, d):
    return unit(weight(k, d, seed=7))


@pytest.mark.parametrize("s", [1, 4, 10])
@pytest.mark.parametrize(("k", "d"), [(24, 16), (12, 16)])
def test_matching_pursuit_is_that_of_scikit_learn(s, k, d):
    target, atoms = weight(30, d).double(), atoms_of_length_one(k, d).double()
    expected = torch.from_numpy(
        orthogonal_mp(atoms.T.numpy(), target.T.numpy(), n_nonzero_coefs=s)
    ).T
    torch.testing.assert_close(matching_pursuit(target, atoms, s), expected, atol=1e-9, rtol=1e-7)


def test_matching_pursuit_in_blocks_changes_nothing(monkeypatch):
    target, atoms = weight(30, 16).double(), atoms_of_length_one(24, 16).double()
    whole = matching_pursuit(target, atoms, 6)
    monkeypatch.setattr("compress.solvers.ksvd.BLOCK_ENTRIES", 7 * 6 * 24)
    torch.testing.assert_close(matching_pursuit(target, atoms, 6), whole)


def test_a_line_of_two_atoms_is_found_exactly_and_equal_atoms_do_no_harm():
    atoms = torch.eye(16).double()
    atoms[5] = atoms[4]
    target = (3 * atoms[2] - 2 * atoms[9])[None]
    codes = matching_pursuit(target, atoms, 6)
    torch.testing.assert_close(codes @ atoms, target)
    assert torch.isfinite(codes).all()


def test_a_sweep_never_loses_and_solves_each_atom_s_rank_one_problem():
    lines, atoms = FreeLines(weight(40, 16)), atoms_of_length_one(12, 16)
    codes = matching_pursuit(lines.target, atoms, 4)
    codes[:, 3] = 0
    before = lines.error(codes, atoms)
    new_codes, new_atoms = sweep(lines.target, codes, atoms)
    assert lines.error(new_codes, new_atoms) < before
    assert ((new_codes != 0) <= (codes != 0)).all()
    torch.testing.assert_close(new_atoms.norm(dim=1), torch.ones(12))
    last = 11
    users = codes[:, last] != 0
    others = new_codes.clone()
    others[:, last] = 0
    part = (lines.target - others @ new_atoms)[users].double()
    left = part - torch.outer(new_codes[users, last], new_atoms[last]).double()
    best = part.square().sum() - torch.linalg.matrix_norm(part, 2) ** 2
    assert float(left.square().sum()) < 1.02 * float(best)


def test_rounds_lower_the_error():
    errors = []
    ksvd(FreeLines(weight(60, 16)), 20, 5, 8, watch=lambda _, error: errors.append(error))
    assert errors[-1] < 0.95 * errors[0]


def test_the_method_s_default_solver_ends_below_the_published_one():
    shape, x = (96, 48), inputs(48)
    w, gram = weight(*shape), statistics(x)[Gram].mean_ii()

    def error(solver, **options):
        layer = LayerShape(shape, 96 * 48 * 4)
        [method] = CoSpaDi(solver=solver, **options).plan({"w": layer}).values()
        assert method.coded is Coded.OUTPUTS
        return relative_output_error(w, method.compress([w], statistics(x))[0].dense(), gram)

    assert error("admm", coded="outputs", share="none") < error("ksvd", rounds=20)


def test_tall_inputs_are_coded_by_outputs_too_where_the_solver_is_the_published_one():
    [method] = CoSpaDi(solver="ksvd").plan({"w": LayerShape((48, 96), 48 * 96 * 4)}).values()
    assert method.coded is Coded.OUTPUTS
