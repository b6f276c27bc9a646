"""Engines: each program loads an export as its users do, and its log-probabilities are those of the probe."""

import json
import sys
from pathlib import Path

import pytest
import torch
from exported import IDS, compressed, export, quantised

from compress.engines import ENGINES
from compress.engines.base import Arithmetic
from compress.engines.bounds import bound_of
from compress.engines.running import answer_of
from compress.engines.trying import engines_of, try_engines
from compress.errors import CheckpointError
from compress.exports import EXPORTS
from compress.exports.verification.places import PROBE
from compress.exports.verification.probe import make_probe, read_probe, write_probe


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
    assert "from compress" not in engine.program.read_text()


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
    assert "8 bits" in bounds[-1].text
    assert "4 blocks" in bounds[-1].text
    assert json.dumps([bound.value for bound in bounds])
