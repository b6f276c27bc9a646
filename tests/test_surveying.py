"""Plans that look before they spend, through the whole pipeline on a tiny model."""

import copy
import itertools
import weakref

import pytest
import torch
import yaml
from safetensors.torch import load_file
from slowness import slow_if
from transformers import AutoModelForCausalLM
from workspaces import recipe

import compress
from calibration.statistics.gram import Gram
from compress.errors import RecipeError
from compress.exports.load import load_export
from compress.forms.low_rank import LowRank
from compress.methods.eora import EoRA
from compress.methods.fwsvd import FWSVD
from compress.methods.gptq import GPTQ
from compress.methods.lord import LoRD
from compress.methods.rtn import RTN
from compress.methods.svd import SVD
from compress.methods.svd_llm import SVDLLM
from compress.methods.welore import WeLore
from compress.pipeline.main import no_progress
from compress.prepare.prepare import prepare
from compress.solvers.rank_allocation import Allocation
from compress.survey import survey as surveying
from compress.survey.divergence import Divergences
from compress.survey.original_walk import plain_blocks
from compress.survey.survey import surveyed
from eval.footprint import tensor_bytes

pytestmark = pytest.mark.usefixtures("quick_verification")

SMALL = {"rank_multiple": 1, "keep": 0.7}


PLANNED = [
    SVD(**SMALL),
    SVDLLM(**SMALL),
    LoRD(**SMALL),
    WeLore(**SMALL),
    SVDLLM(**SMALL, allocation=Allocation.SPECTRUM),
    SVDLLM(**SMALL, allocation=Allocation.BY_TYPE),
    LoRD(**SMALL, allocation=Allocation.WELORE),
    FWSVD(**SMALL),
    FWSVD(**SMALL, metric="kronecker", allocation=Allocation.SPECTRUM, importance="none"),
    SVDLLM(**SMALL, allocation=Allocation.SPECTRUM, importance="fisher"),
    SVDLLM(**SMALL, allocation=Allocation.SPECTRUM, importance="kl"),
    SVDLLM(keep=0.5, rank_multiple=1, factor_quantizer=RTN(bits=8, group_size=32)),
    LoRD(
        keep=0.5, rank_multiple=1, factor_quantizer=GPTQ(bits=4, group_size=32), allocation="welore"
    ),
    EoRA(rank=2, base=FWSVD(**{**SMALL, "keep": 0.5})),
    EoRA(rank=2, base=SVDLLM(**{**SMALL, "keep": 0.5}, allocation=Allocation.SPECTRUM)),
]


# Either way the plan is the original's: methods take turns.
@pytest.mark.parametrize(
    ("method", "propagate"),
    slow_if(
        lambda method, _: method not in (PLANNED[1], PLANNED[4]),
        zip(PLANNED, itertools.cycle(["none", "block"]), strict=False),
    ),
    ids=lambda value: getattr(value, "name", value),
)
def test_a_run_writes_the_bytes_of_its_plan_within_the_budget(workspace, method, propagate):
    job = recipe(workspace, method=method, propagate=propagate)
    planned = compress.plan(job).plan
    report = compress.run(job)
    assert tensor_bytes(job.folder) == planned.bytes_after == report.exports[0].tensor_bytes
    chosen = sum(layer.bytes_before for layer in planned.layers)
    assert sum(layer.bytes_after for layer in planned.layers) <= chosen
    assert len(report.layers) == len(planned.layers)
    load_export(job.folder)


@pytest.mark.parametrize("allocation", [a for a in Allocation if a is not Allocation.UNIFORM])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_a_measured_plan_keeps_at_most_the_share_it_was_given(workspace, allocation, keep):
    method = SVDLLM(keep=keep, rank_multiple=1, allocation=allocation)
    job = prepare(recipe(workspace, method=method), no_progress)
    before = sum(layer.bytes_before for layer in job.plan.layers)
    settled = surveyed(job, no_progress).plan
    left = before - sum(layer.bytes_before for layer in settled.layers)
    assert left + sum(layer.bytes_after for layer in settled.layers) <= keep * before
    assert left + sum(layer.bytes_after for layer in settled.layers) > (keep - 0.1) * before


def test_a_budget_is_of_the_whole_checkpoint(workspace):
    before = prepare(recipe(workspace), no_progress).plan.bytes_before
    for share in (0.75, 0.9):
        method = SVDLLM(
            budget=str(int(share * before)), rank_multiple=1, allocation=Allocation.SPECTRUM
        )
        settled = surveyed(prepare(recipe(workspace, method=method), no_progress), no_progress)
        assert 0.95 * share * before < settled.plan.bytes_after <= share * before


def test_a_budget_that_the_rest_of_the_checkpoint_exceeds_is_refused(workspace):
    with pytest.raises(
        RecipeError, match=r"budget: 1000 bytes for the whole checkpoint, which takes"
    ):
        prepare(recipe(workspace, method=SVDLLM(budget="1000")), no_progress)


def test_a_survey_saves_statistics_that_the_run_without_propagation_finds(workspace):
    method = SVDLLM(**SMALL, allocation=Allocation.SPECTRUM)
    job = recipe(workspace, method=method, propagate="none")
    compress.plan(job)
    assert any("statistics" in note and "again" in note for note in compress.run(job).notes)


def test_what_a_plan_leaves_dense_is_listed_with_the_reason_and_unchanged(workspace):
    method = SVDLLM(keep=0.9, rank_multiple=1, allocation=Allocation.SPECTRUM)
    job = recipe(workspace, method=method)
    report = compress.run(job)
    left = [tensor.name for tensor in report.kept if tensor.reason == "left dense by the plan"]
    assert left
    assert not set(left) & {f"{layer.name}.weight" for layer in report.layers}


def test_welore_reads_no_text_for_its_plan(workspace, monkeypatch):
    job = prepare(recipe(workspace, method=WeLore(**SMALL)), no_progress)
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    assert surveyed(job, no_progress).plan.layers


def test_a_measured_plan_is_shown_with_ranks_errors_and_a_recipe_that_repeats_it(workspace):
    method = SVDLLM(**SMALL, allocation=Allocation.SPECTRUM)
    planned = compress.plan(recipe(workspace, method=method)).plan
    lines = planned.lines()
    assert "predicted" in lines[0] and "kept" in lines[0]
    start = lines.index("method:")
    given = yaml.safe_load("\n".join(lines[start : start + 2 + len(planned.selected)]))
    again = SVDLLM(**SMALL, ranks=tuple(given["method"]["ranks"]))
    repeated = compress.plan(recipe(workspace, method=again)).plan
    assert {e.name: e.rank for e in repeated.layers} == {e.name: e.rank for e in planned.layers}


@pytest.mark.parametrize("bos", ["never", "always"])
def test_the_measured_divergence_is_that_of_the_model_with_one_layer_compressed(workspace, bos):
    method = SVDLLM(**SMALL, allocation=Allocation.SPECTRUM, importance="kl")
    if bos == "always":
        lines = "".join(f'{{"text": "{"a quick fox " * n}"}}\n' for n in range(1, 20))
        (workspace / "text.jsonl").write_text(lines)
    text = (str(workspace / ("text.jsonl" if bos == "always" else "text.txt")),)
    wanted = recipe(workspace, method=method, calibration=text, bos=bos)
    prepared = prepare(wanted, no_progress)
    model = AutoModelForCausalLM.from_pretrained(workspace / "model").eval()
    measuring, forms = Divergences(prepared), {}
    for block in plain_blocks(prepared):
        new = {}
        for name, layer in block.layers.items():
            u, s, v = torch.linalg.svd(layer.weight.detach())
            new[name] = LowRank.from_factors(u[:, :3] * s[:3], v[:3].clone())
        measuring.through(block, new)
        forms |= new
    ids = prepared.tokens.input_ids
    for name, kl in measuring.measured(no_progress).items():
        changed = copy.deepcopy(model)
        changed.get_submodule(name).weight.data = forms[name].dense()
        with torch.no_grad():
            p, q = (torch.log_softmax(each(ids).logits, -1) for each in (model, changed))
        kl_nt = (p.exp() * (p - q)).sum(-1)
        if bos == "always":
            # What follows: end of text and <bos> count nowhere, the last position everywhere.
            own = torch.cat([ids[:, 1:] > 2, torch.ones(len(ids), 1).bool()], dim=1)
            assert not own.all()
            kl_nt = kl_nt[own]
        expected = kl_nt.mean()
        assert kl == pytest.approx(float(expected), rel=1e-3, abs=1e-7)


def test_a_measured_cost_times_the_lost_energy_is_the_divergence(workspace, monkeypatch):
    kls = {}

    class Known(Divergences):
        def measured(self, _):
            kls.update({name: 0.5 + k for k, name in enumerate(self._variants)})
            return kls

    monkeypatch.setattr(surveying, "Divergences", Known)
    method = SVDLLM(**SMALL, allocation=Allocation.SPECTRUM, importance="kl")
    found = {}
    monkeypatch.setattr(surveying, "replanned", lambda _, surveys: found.update(surveys))
    surveyed(prepare(recipe(workspace, method=method), no_progress), no_progress)
    for name, survey in found.items():
        o, i = (64, 32) if "up" in name or "gate" in name else (32, 64 if "down" in name else 32)
        rank = int(0.7 * o * i / (o + i))
        assert survey.cost * float(survey.spectrum[rank:].square().sum()) == pytest.approx(
            kls[name]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "kl"}, "importance: kl has no effect with --allocation uniform"),
        (
            {"importance": "fisher", "allocation": "welore"},
            "has no effect with --allocation welore",
        ),
        (
            {"floor": 0.2, "allocation": "by_type"},
            r"floor: 0\.2 .* it is for --allocation spectrum",
        ),
    ],
)
def test_an_option_that_a_plan_would_not_look_at_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        SVDLLM(**options)


@pytest.mark.slow
def test_the_plan_counts_all_statistics_that_a_run_writes(workspace, tmp_path):
    method = FWSVD(**SMALL, metric="kronecker", allocation=Allocation.SPECTRUM, importance="none")
    job = recipe(workspace, method=method)
    planned = compress.plan(job).plan
    compress.run(job)
    written = sum(
        tensor.nbytes
        for path in (tmp_path / "cache" / "statistics").glob("*/block-*")
        for tensor in load_file(path).values()
    )
    assert written <= planned.input_statistics_bytes + planned.gradient_statistics_bytes
    assert written > planned.gradient_statistics_bytes > 0


def test_a_survey_holds_the_statistics_of_one_block_at_a_time(workspace, monkeypatch):
    made, most = weakref.WeakSet(), []
    keep = Gram.__init__

    def counted(self, *args, **kwargs):
        keep(self, *args, **kwargs)
        made.add(self)
        most.append(len(made))

    monkeypatch.setattr(Gram, "__init__", counted)
    method = SVDLLM(**SMALL, allocation=Allocation.SPECTRUM)
    surveyed(prepare(recipe(workspace, method=method), no_progress), no_progress)
    assert max(most) <= 6  # four inputs of a block, and two that are being added up
