"""The spectrum that a low-rank part was cut out of: right in every shape, in the metric that errors are told in."""

import json
import os
from dataclasses import replace

import pytest
import torch
from exported import python
from problems import inputs, relative_output_error, statistics, weight
from reports import make_report

from calibration.statistics.gram import Gram
from compress.families.base import LayerShape
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.lord import LoRD
from compress.methods.rtn import RTN
from compress.methods.svd_llm import SVDLLM
from compress.pipeline.spectra import POINTS, cut_of, spectrum_of
from compress.report.report import Report, Spectrum
from compress.solvers.linalg import output_spectrum


@pytest.mark.parametrize("shape", [(24, 64), (64, 64), (96, 64)])
@pytest.mark.parametrize("n_tokens", [2048, 40])
def test_the_spectrum_is_that_of_the_outputs(shape: tuple[int, int], n_tokens: int) -> None:
    """Also where there are fewer tokens than inputs, and the Gram is singular."""
    x, w = inputs(shape[1], n_tokens), weight(*shape)
    gram = statistics(x)[Gram].mean_ii()
    outputs = torch.linalg.svdvals(w.double() @ x.double().T) / n_tokens**0.5
    found = output_spectrum(w, gram)
    assert found.shape == (min(shape),)
    # Eigenvalues know small ones to 1e-16 of the first, so their roots to 1e-8; products of fp32 set the rest.
    assert torch.allclose(found[: len(outputs)], outputs[: len(found)], atol=3e-4 * outputs[0])


@pytest.mark.parametrize("method", [SVDLLM, LoRD], ids=lambda it: it.name)
def test_what_lies_right_of_the_cut_is_the_error(method) -> None:
    """Of a path alone; one that puts the mean back is cut out of what varies."""
    x, w = inputs(48), weight(40, 48)
    stats = statistics(x)
    [form] = method(rank=12, damping=0.0, factor_dtype="float32").compress([w], stats)
    rank, spectrum = cut_of(form, w, stats)
    assert rank == 12 and spectrum is not None
    assert spectrum.ranks == tuple(range(1, 41))
    shares = torch.tensor(spectrum.shares).square()
    centre = x.mean(0) if method is LoRD else torch.zeros(48)
    centred = (x - centre).double()
    error = relative_output_error(w, form.dense(), centred.T @ centred)
    assert float((shares[12:].sum() / shares.sum()).sqrt()) == pytest.approx(error, rel=2e-3)


def test_of_a_correction_it_is_that_of_what_the_base_lost() -> None:
    x, w = inputs(64), weight(48, 64)
    stats = statistics(x)
    method = EoRA(rank=8, base=GPTQ(bits=3, group_size=32))
    [form] = method.compress([w], stats)
    rank, spectrum = cut_of(form, w, stats)
    lost = w.double() - form.terms[0].dense().double()
    assert rank == 8
    assert spectrum == spectrum_of(lost, stats[Gram].mean_ii())
    assert spectrum != spectrum_of(w, stats[Gram].mean_ii())


def test_forms_without_a_low_rank_part_have_no_rank() -> None:
    x, w = inputs(64), weight(48, 64)
    stats = statistics(x)
    [grid] = RTN(bits=4, group_size=32).compress([w], stats)
    planned = CoSpaDi(keep=0.7).plan({"layer": LayerShape((48, 64), 48 * 64 * 4)})["layer"]
    [dictionary] = planned.compress([w], stats)
    assert cut_of(grid, w, stats) == (None, None)
    assert cut_of(dictionary, w, stats) == (None, None)


def test_a_long_spectrum_is_thinned_out_with_both_ends() -> None:
    spectrum = spectrum_of(torch.diag(torch.linspace(1, 0.001, 600)), torch.eye(600))
    assert spectrum is not None
    assert len(spectrum.ranks) == len(spectrum.shares) <= POINTS
    assert (spectrum.ranks[0], spectrum.ranks[-1]) == (1, 600)
    assert list(spectrum.ranks) == sorted(set(spectrum.ranks))
    for rank, share in zip(spectrum.ranks, spectrum.shares, strict=True):
        assert share == pytest.approx(1 - (rank - 1) / 599 * 0.999, rel=1e-3)


def test_what_costs_nothing_has_no_spectrum() -> None:
    assert spectrum_of(torch.zeros(4, 6), torch.eye(6)) is None


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="marks only rise")
def test_a_stage_is_charged_with_what_was_held_in_it_or_in_stages_inside_it(tmp_path) -> None:
    # A process of its own: one that has held more before has room that it need not ask for.
    ran = python(STAGES, cwd=tmp_path)
    assert ran.code == 0, ran.err
    seconds, peaks = json.loads(ran.out)
    assert peaks.keys() == seconds.keys() == {"before", "inner", "outer", "after"}
    before, inner, outer, after = peaks.values()
    assert inner > 200_000_000 + before
    assert inner == pytest.approx(
        outer, abs=1_000_000
    )  # read one after the other, a page may come between
    assert 10_000_000 < after < outer - 200_000_000


STAGES = """
import json
import torch
from compress.pipeline.stopwatch import Stopwatch

watch = Stopwatch()
with watch("before"):
    pass
with watch("outer"), watch("inner"):
    held = torch.ones(300_000_000, dtype=torch.uint8)
assert held.numel() == 300_000_000
del held
with watch("after"):
    pass
with watch("outer"):
    pass
print(json.dumps([watch.seconds, watch.peak_bytes]))
"""


def test_a_report_of_an_earlier_version_has_no_spectra_and_no_memory() -> None:
    report = make_report()
    spectrum = Spectrum(ranks=(1, 8), shares=(1.0, 0.25))
    layers = (replace(report.layers[0], rank=3, spectrum=spectrum), *report.layers[1:])
    now = replace(report, layers=layers, peak_memory={"compress": 5})
    assert Report.from_json(now.to_json()) == now
    written = json.loads(now.to_json())
    del written["peak_memory"]
    for layer in written["layers"]:
        del layer["rank"], layer["spectrum"]
    assert Report.from_json(json.dumps(written)) == report
