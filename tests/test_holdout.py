"""Calibration sequences that are kept aside, and the paths that do not help on them."""

from dataclasses import replace

import pytest
import torch
from families import tiny_ids, tiny_model
from problems import inputs, weight
from slowness import slow_but
from test_on_base import DOWN, base, logits, on_base
from test_walk import CPU, walker
from workspaces import recipe

import compress
from calibration.propagation import Propagate
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.statistics.held_out import HeldOut, without_held_out
from calibration.store import Store
from calibration.walk import SharedInput, walk
from compress.errors import RecipeError
from compress.exports.load import load_export
from compress.exports.peft import read_adapter
from compress.exports.reading import load_bare
from compress.families.correction import Correction
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.lord import LoRD
from compress.methods.rtn import RTN
from compress.solvers.linalg import output_energy

pytestmark = pytest.mark.usefixtures("quick_verification")
ROUGH = RTN(bits=3, group_size=32)
NEEDS = frozenset({Gram, HeldOut})


def parted(x, aside):
    """Statistics of inputs and, among them, of those that are kept aside."""
    both = Gram.of(torch.cat([x, aside]), 8)
    return Statistics({Gram: both, HeldOut: HeldOut.of(aside, 1)})


def observed(ids, mask=None, batch=4):
    model = tiny_model("llama")
    loader, stream = walker(model, ids, mask, batch=batch)
    block = next(walk(stream, loader, propagate=Propagate.NONE, device=CPU))
    return block.observe(frozenset(block.layers), NEEDS)


@pytest.mark.parametrize("batch", [4, 5, 18])
@pytest.mark.parametrize("padded", ["whole", "padded"])
def test_what_is_kept_aside_is_every_eighth_sequence_whatever_the_batch(batch, padded):
    ids = tiny_ids(18)
    mask = torch.ones_like(ids)
    if padded == "padded":
        mask[7, 10:], mask[3, 12:] = 0, 0
    found = observed(ids, mask if padded == "padded" else None, batch)
    alone = observed(ids[[7, 15]], mask[[7, 15]] if padded == "padded" else None)
    for shared, own in zip(found, alone, strict=True):
        aside, expected = shared.stats[HeldOut], own.stats[Gram]
        assert (aside.n_tokens, aside.n_sequences) == (expected.n_tokens, 2)
        torch.testing.assert_close(aside.sum_ii, expected.sum_ii, rtol=1e-4, atol=1e-4)


def test_the_rest_is_what_is_left_of_the_sums():
    x, aside = inputs(24, 200), inputs(24, 50, seed=3)
    rest = without_held_out(parted(x, aside))[Gram]
    expected = Gram.of(x, 7)
    assert (rest.n_tokens, rest.n_sequences) == (200, 7)
    torch.testing.assert_close(rest.sum_ii, expected.sum_ii, rtol=1e-5, atol=1e-3)


def test_what_is_kept_aside_is_saved_with_the_rest(tmp_path):
    stats = parted(inputs(24, 200), inputs(24, 50, seed=3))
    store = Store(tmp_path, {"a": 1})
    store.save(0, [SharedInput(("layer",), stats)])
    store.finish()
    [found] = store.load(0, CPU)
    torch.testing.assert_close(found.stats[HeldOut].sum_ii, stats[HeldOut].sum_ii)


def test_a_correction_is_fitted_to_the_rest_alone():
    w, x, aside = weight(48, 64), inputs(64, 500), inputs(64, 100, seed=3)
    [checked] = EoRA(rank=4, base=ROUGH, holdout="1/8").corrections([w.double()], parted(x, aside))
    [plain] = EoRA(rank=4, base=ROUGH).corrections([w.double()], Statistics({Gram: Gram.of(x, 7)}))
    torch.testing.assert_close(checked.dense(), plain.dense(), rtol=1e-2, atol=1e-5)


def test_a_correction_that_raises_the_error_on_what_is_kept_aside_is_dropped():
    """Three tokens to round 16 rows for: their errors go where no token looked, and there the others are."""
    w, x = weight(48, 64), inputs(64, 3)
    unseen = torch.linalg.svd(x).Vh[3:]
    aside = torch.randn(400, 61, generator=torch.Generator().manual_seed(5)) @ unseen
    stats = parted(x, aside)
    method = EoRA(rank=16, base=ROUGH, holdout="1/8", adapter_bits="3", shrinkage=0)
    [bare] = ROUGH.compress([w], stats)
    residual, held = w.double() - bare.dense().double(), stats[HeldOut].mean_ii()
    [path] = replace(method, holdout="none").corrections([residual], without_held_out(stats))
    assert output_energy(residual - path.dense(), held) > output_energy(residual, held)
    [form] = method.compress([w], stats)
    assert form.spec() == bare.spec()
    assert torch.equal(form.dense(), bare.dense())


def test_a_correction_for_nothing_is_dropped():
    stats = parted(inputs(64, 100), inputs(64, 20, seed=3))
    method = EoRA(rank=4, base=ROUGH, holdout="1/8")
    assert method.corrections([torch.zeros(48, 64, dtype=torch.float64)], stats) == [None]


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_a_correction_of_16_bits_raises_the_error_on_no_input_whatever_it_was_fitted_to(shape):
    """It is a projection of the residual's outputs."""
    residual = weight(*shape).double()
    [path] = EoRA(rank=4, base=ROUGH).corrections(
        [residual], Statistics({Gram: Gram.of(inputs(shape[1], 5), 1)})
    )
    others = torch.randn(500, shape[1], dtype=torch.float64)
    before, after = ((others @ m.T).norm(dim=1) for m in (residual, residual - path.dense()))
    assert bool((after <= before * (1 + 1e-3)).all())


def only(monkeypatch, n_kept):
    """Drops the path of all layers but the first few."""
    paths, seen = Correction.corrections, []

    def some(self, residuals, stats):
        found = paths(self, residuals, stats)
        start = len(seen)
        seen.extend(found)
        return [path if start + k < n_kept else None for k, path in enumerate(found)]

    monkeypatch.setattr(Correction, "corrections", some)


def test_dropped_corrections_leave_the_bases_outputs_to_the_bit_and_are_listed(
    workspace, monkeypatch
):
    base(workspace)
    only(monkeypatch, 1)
    method = EoRA(rank=4, holdout="1/8")
    job = on_base(workspace, method=method, include=("down_proj",), export=("adapter", "native"))
    report = compress.run(job)
    kept, *dropped = report.layers
    assert not kept.note
    assert kept.relative_error < kept.base_error
    for layer in dropped:
        assert layer.note == "no correction: it did not lower the error on the sequences kept aside"
        assert layer.relative_error == layer.base_error
    assert set(read_adapter(workspace / "out" / "adapter")) == {kept.name}
    native = load_export(workspace / "out" / "native")
    bare = load_bare(workspace / "base")
    for layer in dropped:
        ours, theirs = (model.get_submodule(layer.name).form for model in (native, bare))
        assert torch.equal(ours.dense(), theirs.dense())
    assert DOWN in {layer.name for layer in dropped}
    native.get_submodule(kept.name).form = bare.get_submodule(kept.name).form
    assert torch.equal(logits(native), logits(bare))


def test_dropped_corrections_of_a_method_leave_its_forms(workspace, monkeypatch):
    only(monkeypatch, 3)
    method = EoRA(rank=4, holdout="1/8", base=GPTQ(bits=4, group_size=32))
    report = compress.run(recipe(workspace, method=method, export=("gptq", "native")))
    assert len([layer for layer in report.layers if "kept aside" in layer.note]) == 18
    assert len(read_adapter(workspace / "out" / "gptq" / "adapter")) == 3
    assert all(export.relative_difference < 1e-4 for export in report.exports)


@pytest.mark.parametrize("propagate", slow_but(["none", "block", "sublayer"], kept="block"))
def test_a_run_with_a_holdout_keeps_what_helps(workspace, propagate):
    base(workspace)
    method = EoRA(rank=4, holdout="1/8")
    job = on_base(workspace, method=method, propagate=propagate, samples=16)
    report = compress.run(job)
    again = compress.run(replace(job, out=workspace / "again"))
    assert again.layers[0].relative_error == report.layers[0].relative_error
    assert any("used again" in note for note in again.notes)
    assert all(layer.relative_error <= layer.base_error for layer in report.layers)


@pytest.mark.slow
def test_a_guard_goes_with_a_budget(workspace):
    base(workspace)
    method = EoRA(adapter_budget="20kB", holdout="1/8", adapter_bits="auto")
    report = compress.run(on_base(workspace, method=method, propagate="none"))
    assert all(export.relative_difference < 1e-3 for export in report.exports)


def test_fewer_than_eight_sequences_leave_nothing_aside(workspace):
    base(workspace)
    with pytest.raises(RecipeError, match="every 8th sequence is kept aside, and samples 7 are"):
        compress.plan(on_base(workspace, method=EoRA(holdout="1/8"), samples=7))


def test_a_base_that_puts_means_back_has_no_guard():
    with pytest.raises(RecipeError, match="holdout: lord corrects the mean of the outputs"):
        EoRA(holdout="1/8", base=LoRD())
