"""Bytes for all paths together: ranks where they buy most, and no correction where they buy nothing."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from slowness import slow_but
from test_on_base import DOWN, base, dense_base, logits, on_base
from workspaces import recipe

import compress
from compress.cli.main import main
from compress.errors import RecipeError
from compress.exports.load import load_export
from compress.exports.peft import read_adapter
from compress.families.base import LayerShape, Survey
from compress.families.correction_options import VLLM_RANKS
from compress.families.correction_planner import remaining
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.methods.svd_llm import SVDLLM

pytestmark = pytest.mark.usefixtures("quick_verification")
ROUGH = RTN(bits=3, group_size=32)
ROUNDING = ((8, 1e-4), (4, 0.02), (3, 0.07))


def surveyed(n_layers=5, rounding=()):
    """Layers whose residuals fall off at various speeds."""
    generator = torch.Generator().manual_seed(4)
    layers = {}
    for k in range(n_layers):
        shape = ((64, 128), (128, 64), (96, 96))[k % 3]
        noise = 1 + 0.1 * torch.rand(min(shape), generator=generator, dtype=torch.float64)
        steps = torch.arange(min(shape), dtype=torch.float64)
        spectrum = (torch.exp(-steps / (3 + 12 * k)) * noise).sort(descending=True).values
        survey = Survey(spectrum, cost=1 + k % 2, energy=100.0, rounding=rounding)
        layers[f"layer{k}"] = LayerShape(shape, shape[0] * shape[1] * 4, survey=survey)
    return layers


def planned(layers, budget, **options):
    return EoRA(base=ROUGH, adapter_budget=f"{budget}", **options).plan(layers)


def rank_and_bits(method):
    return (method.rank, int(method.adapter_bits)) if isinstance(method, EoRA) else (0, 16)


def correction_bytes(layers, plan):
    return sum(
        plan[name].planned_bytes(layer.shape) - ROUGH.planned_bytes(layer.shape)
        for name, layer in layers.items()
    )


def loss(layers, plan):
    """In the surveyed error."""
    return sum(
        layer.survey.cost * remaining(layer.survey, *rank_and_bits(plan[name]))
        for name, layer in layers.items()
    )


@pytest.mark.parametrize("bits", ["16", "8", "4", "auto"])
@pytest.mark.parametrize("budget", [7_000, 20_000, 45_000, 60_123])
def test_a_budget_is_kept_and_no_uniform_rank_loses_less(budget, bits):
    layers = surveyed(rounding=ROUNDING)
    budget = budget // 2 if bits == "4" else budget  # all there is in 4 bits takes 36 kB
    plan = planned(layers, budget, adapter_bits=bits)
    assert correction_bytes(layers, plan) <= budget
    for rank in range(1, 65):
        even = EoRA(base=ROUGH, rank=rank, adapter_bits="16" if bits == "auto" else bits).plan(
            layers
        )
        if rank % 8 == 0 and correction_bytes(layers, even) <= budget:
            assert loss(layers, plan) <= loss(layers, even) * (1 + 1e-12)


def test_a_plan_is_the_best_of_all_there_are():
    """Every choice tried, on few layers."""
    layers = surveyed(3)
    budget = 12_000
    best = min(
        sum(
            layer.survey.cost * remaining(layer.survey, rank, 16)
            for layer, rank in zip(layers.values(), ranks, strict=True)
        )
        for ranks in itertools.product(range(0, 65, 8), repeat=3)
        if sum(2 * r * sum(x.shape) for r, x in zip(ranks, layers.values(), strict=True)) <= budget
    )
    assert loss(layers, planned(layers, budget)) == pytest.approx(best)


def test_a_share_of_the_base_is_a_budget():
    layers = surveyed()
    base_bytes = sum(ROUGH.planned_bytes(layer.shape) for layer in layers.values())
    share = EoRA(base=ROUGH, adapter_budget="40%").plan(layers)
    assert share == planned(layers, int(0.4 * base_bytes))


def test_a_layer_without_error_gets_no_correction_and_the_base_alone():
    layers = surveyed()
    nothing = replace(layers["layer1"].survey, spectrum=torch.zeros(64, dtype=torch.float64))
    layers["layer1"] = replace(layers["layer1"], survey=nothing)
    plan = planned(layers, 10**5)
    assert plan["layer1"] == ROUGH
    assert all(isinstance(plan[name], EoRA) for name in layers if name != "layer1")


def test_auto_loses_no_more_than_any_one_width():
    layers = surveyed(rounding=ROUNDING)
    auto = planned(layers, 20_000, adapter_bits="auto")
    for bits in ("16", "8", "4", "3"):
        one = planned(layers, 20_000, adapter_bits=bits)
        assert loss(layers, auto) <= loss(layers, one) * (1 + 1e-12)
    assert min(rank_and_bits(method)[1] for method in auto.values()) < 16


def test_auto_keeps_16_bits_where_rounding_costs_much():
    layers = surveyed(rounding=((8, 0.9), (4, 0.9), (3, 0.9)))
    plan = planned(layers, 20_000, adapter_bits="auto")
    assert {rank_and_bits(method)[1] for method in plan.values()} == {16}


def test_auto_without_a_budget_takes_the_bytes_of_the_rank_in_16_bits():
    """Of each width the largest rank in these bytes, and of those the one that loses least."""
    layers = surveyed(rounding=ROUNDING)
    paid = correction_bytes(layers, EoRA(base=ROUGH, rank=17).plan(layers))
    auto = EoRA(base=ROUGH, rank=17, adapter_bits="auto").plan(layers)
    assert correction_bytes(layers, auto) <= paid
    assert len({rank_and_bits(method) for method in auto.values()}) == 1
    for bits, rank in itertools.product(("16", "8", "4", "3"), (8, 16, 32, 64)):
        other = EoRA(base=ROUGH, rank=rank, adapter_bits=bits).plan(layers)
        if correction_bytes(layers, other) <= paid:
            assert loss(layers, auto) <= loss(layers, other) * (1 + 1e-12)
    assert rank_and_bits(auto["layer0"])[1] < 16


def test_auto_keeps_a_rank_that_no_width_has_more_of():
    layers = surveyed(rounding=ROUNDING)
    plan = EoRA(base=ROUGH, rank=3, adapter_bits="auto").plan(layers)
    assert {rank_and_bits(method) for method in plan.values()} == {(3, 16)}


def test_ranks_for_vllm_are_those_that_it_serves():
    plan = planned(surveyed(), 30_000, ranks_for="vllm")
    assert {rank_and_bits(method)[0] for method in plan.values()} <= {0, *VLLM_RANKS}


@pytest.mark.parametrize("budget", slow_but([9_000, 30_000], kept=9_000))
def test_a_run_on_a_base_spends_its_budget_where_it_buys_most(workspace, budget):
    base(workspace)
    job = on_base(workspace, method=EoRA(adapter_budget=f"{budget}"), export=("adapter", "native"))
    plan = compress.plan(job).plan
    report = compress.run(job)
    assert 0.9 * budget < plan.written_bytes("adapter") <= budget
    for export in report.exports:
        assert export.tensor_bytes == plan.export_bytes(export.format)
        assert export.relative_difference < 1e-4
    out = workspace / "out"
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    paths = read_adapter(out / "adapter")
    assert bool(config["rank_pattern"]) == (budget == 30_000)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert {path.rank for path in paths.values()} == {config["r"], *config["rank_pattern"].values()}
    adapted = PeftModel.from_pretrained(dense_base(workspace), out / "adapter")
    expected = logits(load_export(out / "native"))
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-4)
    for layer in report.layers:
        if layer.name in paths:
            assert layer.relative_error < layer.base_error
            assert not layer.note
        else:
            assert layer.relative_error == layer.base_error
            assert layer.note == "no correction: its bytes remove more error in other layers"
    assert 0 < len(paths) <= len(report.layers) == 21
    assert (len(paths) == 21) == (budget == 30_000)


@pytest.mark.slow
def test_a_run_that_compresses_too_spends_a_budget_beside_a_gptq_checkpoint(workspace):
    method = EoRA(adapter_budget="9kB", base=GPTQ(bits=3, group_size=32))
    job = recipe(workspace, method=method, export=("gptq", "native"))
    plan = compress.plan(job).plan
    report = compress.run(job)
    for export in report.exports:
        assert export.tensor_bytes == plan.export_bytes(export.format)
        assert export.relative_difference < 1e-4
    bare = [layer for layer in report.layers if "rank" not in layer.form]
    assert bare
    assert {layer.method for layer in bare} == {"gptq"}
    assert sum(layer.correction_bytes for layer in plan.layers) <= 9_000
    assert "no correction" in (workspace / "out" / "native" / "README.md").read_text()


@pytest.mark.parametrize("importance", ["none", "fisher", "kl"])
def test_other_importances_make_plans_too(workspace, importance):
    base(workspace)
    method = EoRA(adapter_budget="9kB", adapter_importance=importance)
    plan = compress.plan(on_base(workspace, method=method)).plan
    assert 0 < plan.written_bytes("adapter") <= 9_000
    assert len(plan.layers) == 21


@pytest.mark.parametrize(
    "size", slow_but([{"rank": 4}, {"adapter_budget": "9kB"}], kept={"rank": 4})
)
def test_a_fisher_on_the_output_side_runs_on_a_base(workspace, size):
    base(workspace)
    job = on_base(workspace, method=EoRA(**size, output_side="fisher"))
    report = compress.run(job)
    plain = compress.run(replace(job, out=workspace / "plain", method=EoRA(rank=4)))
    assert len(report.layers) == 21
    assert report.layers[0].relative_error != plain.layers[0].relative_error
    assert all(export.relative_difference < 1e-4 for export in report.exports)


def test_a_rank_beside_a_budget_is_refused():
    with pytest.raises(RecipeError, match="rank: 8 has no effect beside --adapter-budget 9kB"):
        EoRA(rank=8, adapter_budget="9kB")


def test_a_predicted_error_is_the_one_reached_on_the_same_inputs(workspace):
    base(workspace)
    method = EoRA(adapter_budget="9kB", damping=1e-5, shrinkage=0)
    job = on_base(workspace, method=method, propagate="none", samples=16)
    predicted = {layer.name: layer.predicted_error for layer in compress.plan(job).plan.layers}
    report = compress.run(job)
    for layer in report.layers:
        if layer.note:
            continue
        assert layer.relative_error == pytest.approx(predicted[layer.name], rel=0.02)


def test_a_plan_shows_every_correction(workspace, capsys):
    base(workspace)
    given = ["--method", "eora", "--base-checkpoint", str(workspace / "base")]
    given += ["--adapter-budget", "9kB", "--model", str(workspace / "model"), "--samples", "8"]
    given += ["--calibration", str(workspace / "text.txt"), "--seq-len", "32"]
    assert main(["plan", *given, "--eval-windows", "0", "--tasks", "none"]) == 0
    out = capsys.readouterr().out
    assert "no correction" in out
    assert "--adapter-bits auto looks" not in out
    assert f"{DOWN} " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_budget": "much"}, r"adapter_budget: 'much' is not an amount.*or 5% of the base"),
        (
            {"adapter_budget": "200%"},
            r"adapter_budget: 200% is more than 100% of the base's bytes; give at most 100%",
        ),
        ({"adapter_budget": "1XB"}, r"'1XB' is not an amount.*units: B, kB, MB, GB, TB, KiB"),
        ({"allocation": "uniform"}, "allocation: uniform has no effect without --adapter-budget"),
        (
            {"adapter_importance": "kl"},
            "adapter_importance: kl has no effect where no plan compares layers",
        ),
        (
            {"adapter_budget": "1MB", "base": SVDLLM(allocation="spectrum")},
            "a survey of the error that svd_llm leaves, and svd_llm needs one",
        ),
        (
            {"adapter_budget": "1MB", "base": CoSpaDi(share="depth")},
            "a survey of one block at a time, and cospadi compresses layers of several blocks",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        EoRA(**options)


def test_a_budget_that_pays_for_no_correction_is_refused_before_work(workspace):
    base(workspace)
    with pytest.raises(RecipeError, match="adapter_budget: 100 bytes pay for no correction"):
        compress.plan(on_base(workspace, method=EoRA(adapter_budget="100")))


def largest(layers, bits=16):
    """Bytes of the largest path of each layer that leaves it smaller than it was, every rank tried."""
    total = 0
    for layer in layers.values():
        method = EoRA(base=ROUGH)
        room = layer.n_bytes - ROUGH.planned_bytes(layer.shape)
        ranks = range(8, min(layer.shape) + 1, 8)
        total += max(
            size for r in ranks if (size := method.correction_bytes(layer.shape, r, bits)) < room
        )
    return total


@pytest.mark.parametrize("found", [True, False])
def test_a_budget_above_the_largest_corrections_is_refused_with_the_largest_there_is(found):
    layers = surveyed()
    most = largest(layers)
    if not found:
        layers = {name: replace(layer, survey=None) for name, layer in layers.items()}
    planned(layers, most)
    with pytest.raises(
        RecipeError, match=rf"adapter_budget: 99GB \(99000000000 bytes\).*give {most} "
    ):
        planned(layers, "99GB")
    with pytest.raises(
        RecipeError, match=rf"adapter_budget: {most + 1} .*give {most} bytes or less"
    ):
        planned(layers, most + 1)


def test_a_uniform_budget_above_the_largest_rank_that_saves_bytes_is_refused_with_it():
    layers = surveyed()
    with pytest.raises(
        RecipeError, match=r"adapter_budget: 99GB .*pays for more than rank 64.*give \d+"
    ):
        planned(layers, "99GB", allocation="uniform")


def test_a_layer_without_room_for_a_correction_gets_none_before_a_survey_too():
    layers = surveyed()
    small = replace(layers["layer0"], n_bytes=ROUGH.planned_bytes(layers["layer0"].shape) + 8)
    layers["layer0"] = replace(small, survey=None)
    plan = planned(layers, 20_000)
    assert plan["layer0"] == ROUGH
    assert isinstance(plan["layer1"], EoRA)
