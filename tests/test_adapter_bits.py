"""Low-rank paths whose factors are on grids."""

import json

import pytest
import torch
from peft import PeftModel
from problems import inputs, statistics, weight
from slowness import slow_but
from test_on_base import base, dense_base, logits, on_base
from test_rescaling import awq_base
from workspaces import recipe

import compress
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.errors import RecipeError
from compress.exports.load import load_export
from compress.exports.peft import read_adapter
from compress.families.base import LayerShape
from compress.families.low_rank import Metric, as_low_rank, quantised_low_rank
from compress.forms.product import Product
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.methods.svd_residual import SVDResidual
from compress.solvers.linalg import add_ridge_, output_energy, refit_up

pytestmark = pytest.mark.usefixtures("quick_verification")
BITS = ("16", "8", "4", "3")
ROUGH = RTN(bits=3, group_size=32)


def corrected(w, stats, **options):
    """The form, planned as a run would plan it."""
    options = {"rank": 16, "base": ROUGH, **options}
    layer = LayerShape(tuple(w.shape), w.numel() * 4)
    [method] = EoRA(**options).plan({"layer": layer}).values()
    [form] = method.compress([w], stats)
    return method, form


def left(w, form, stats):
    return output_energy(w - form.dense(), stats[Gram].mean_ii())


def test_a_16_bit_correction_of_full_rank_corrections_exactly():
    w, stats = weight(48, 64), statistics(inputs(64))
    _, form = corrected(w, stats, rank=48)
    torch.testing.assert_close(form.dense(), w, rtol=0, atol=1e-3 * float(w.abs().max()))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (33, 70)])
def test_a_correction_takes_the_bytes_that_its_plan_says(bits, shape):
    w, stats = weight(*shape), statistics(inputs(shape[1]))
    base = RTN(bits=3, group_size=-1)
    method, form = corrected(w, stats, adapter_bits=bits, base=base)
    assert method.planned_bytes(shape) == form.n_bytes()
    path = form.terms[-1]
    stored = sum(tensor.nbytes for tensor in path.state_dict().values())
    assert stored == method.planned_bytes(shape) - method.base.planned_bytes(shape)


def test_eight_bits_lose_next_to_nothing_and_fewer_bits_more():
    w, stats = weight(96, 128), statistics(inputs(128))
    lost = [left(w, corrected(w, stats, adapter_bits=bits)[1], stats) for bits in BITS]
    bare = left(w, ROUGH.compress([w], stats)[0], stats)
    assert lost[1] < 1.002 * lost[0]
    assert lost[0] < lost[1] < lost[2] < lost[3] < bare


def test_four_bits_with_four_times_the_rank_beat_16_bits_where_the_spectrum_is_flat():
    w, stats = weight(256, 256), statistics(inputs(256, n_tokens=4096))
    narrow, wide = (
        corrected(w, stats, rank=rank, adapter_bits=bits) for rank, bits in ((17, "16"), (64, "4"))
    )
    assert narrow[0].planned_bytes((256, 256)) == wide[0].planned_bytes((256, 256))
    assert left(w, wide[1], stats) < 0.9 * left(w, narrow[1], stats)


def test_the_second_factor_is_fitted_to_the_first_as_it_is_stored():
    """The plainest way, both factors rounded as they come, loses more."""
    w, stats = weight(96, 128).double(), statistics(inputs(128))
    metric = Metric.of(add_ridge_(stats[Gram].mean_ii(), 0.01))
    quantiser = GPTQ(bits=3).for_factors()
    path = quantised_low_rank(w, metric, 16, quantiser, stats)
    up, down = metric.truncated(w, 16)
    [rough_down] = quantiser.compress([(down * up.norm(dim=0)[:, None]).float()], stats)
    alike = Statistics({Gram: Gram(1, 1, torch.eye(16, dtype=torch.float64))})
    [rough_up] = quantiser.compress([(up / up.norm(dim=0)).float()], alike)
    plain = metric.energy(w - rough_up.dense().double() @ rough_down.dense().double())
    assert metric.energy(w - path.dense().double()) < 0.9 * plain


def test_the_first_factor_is_fitted_again_to_the_second_where_that_helps():
    w, stats = weight(96, 128).double(), statistics(inputs(128))
    metric = Metric.of(add_ridge_(stats[Gram].mean_ii(), 0.01))
    quantiser = GPTQ(bits=3).for_factors()
    path = quantised_low_rank(w, metric, 16, quantiser, stats)
    up, down = metric.truncated(w, 16)
    down = down * up.norm(dim=0)[:, None]
    [first] = quantiser.compress([(down / down.norm(dim=1).mean().sqrt()).float()], stats)
    inner = first.dense().double()
    own = Statistics({Gram: Gram(1, 1, inner @ stats[Gram].mean_ii() @ inner.T)})
    [second] = quantiser.compress([refit_up(w, inner, metric.chol_ii).float()], own)
    once = metric.energy(w - second.dense().double() @ inner)
    assert metric.energy(w - path.dense().double()) <= once * (1 + 1e-6)


def test_a_correction_in_floats_holds_the_values_of_its_codes():
    w, stats = weight(48, 64), statistics(inputs(64))
    path = corrected(w, stats, adapter_bits="4")[1].terms[-1]
    assert isinstance(path, Product)
    floats = as_low_rank(path)
    assert floats.down.weight.dtype == torch.float16
    torch.testing.assert_close(floats.dense(), path.dense(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("bits", slow_but(["8", "4", "3"], kept="4"))
def test_adapters_of_few_bits_on_a_checkpoint_load_in_peft_and_weigh_what_was_planned(
    workspace, bits
):
    base(workspace)
    job = on_base(workspace, method=EoRA(rank=8, adapter_bits=bits), export=("adapter", "native"))
    plan = compress.plan(job).plan
    report = compress.run(job)
    for export in report.exports:
        assert export.tensor_bytes == plan.export_bytes(export.format)
    assert report.exports[0].relative_difference < 1e-3 < report.exports[0].tolerance
    assert report.exports[1].relative_difference < 1e-4
    assert all(0 < layer.relative_error < layer.base_error for layer in report.layers)
    adapter, native = (workspace / "out" / name for name in ("adapter", "native"))
    expected = logits(load_export(native))
    adapted = PeftModel.from_pretrained(dense_base(workspace), adapter)
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=2e-3)
    assert {path.rank for path in read_adapter(adapter).values()} == {8}
    assert f"{bits}-bit" in json.dumps([layer.form for layer in report.layers])
    assert "the adapter stores their values in 16 bits" in (adapter / "README.md").read_text()
    assert any("which has no format for few bits" in line for line in plan.lines())
    assert any("--adapter-bits auto looks" in line for line in plan.lines())


def test_a_gptq_export_holds_the_same_correction_in_16_bits(workspace):
    method = EoRA(rank=8, adapter_bits="4", base=GPTQ(bits=4, group_size=32))
    job = recipe(workspace, method=method, export=("native", "gptq"))
    plan = compress.plan(job).plan
    report = compress.run(job)
    for export in report.exports:
        assert export.tensor_bytes == plan.export_bytes(export.format)
        assert export.relative_difference < 1e-3
    assert plan.export_bytes("native") < plan.export_bytes("gptq")


def test_svd_residual_has_corrections_of_few_bits_too():
    w, stats = weight(48, 64), statistics(inputs(64))
    method = SVDResidual(rank=16, adapter_bits="4", base=ROUGH)
    [form] = method.compress([w], stats)
    [bare] = ROUGH.compress([w], stats)
    assert float((w - form.dense()).norm()) < float((w - bare.dense()).norm())


def test_bits_that_there_are_not_are_refused():
    with pytest.raises(RecipeError, match="adapter_bits: unknown 5; choose 16, 8, 4, 3, auto"):
        EoRA(adapter_bits=5)
    assert EoRA(adapter_bits=4) == EoRA(adapter_bits="4")


def test_a_correction_on_rescaled_layers_stays_in_floats(workspace):
    awq_base(workspace)
    with pytest.raises(RecipeError, match=r"adapter_bits: .* has moved scales"):
        compress.plan(on_base(workspace, method=EoRA(rank=4, adapter_bits="4")))
