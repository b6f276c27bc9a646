"""Runs with embeddings and heads that are cast, that fail, or that the source stores twice."""

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file
from test_embeddings import EMBEDDINGS, packed

import compress
from compress.errors import LayerError
from compress.exports.load import load_export
from compress.exports.storage import Storage
from compress.forms.int8 import Int8
from compress.forms.tied import Tied
from compress.models.checkpoint import Reader
from compress.pipeline import tables as pipeline_tables

HEAD = "lm_head.weight"


@pytest.mark.usefixtures("quick_verification")
def test_another_dtype_is_reported_as_a_cast(workspace):
    report = compress.run(packed(workspace, embeddings=Storage.BFLOAT16, head=Storage.FLOAT16))
    told = {entry.note: (entry.method, entry.form) for entry in report.embeddings}
    assert told == {"embeddings": ("cast", "bfloat16"), "head": ("cast", "float16")}


def changed(workspace, change):
    path = workspace / "model" / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(("tied", "name"), [(True, EMBEDDINGS), (False, "lm_head")])
def test_a_head_without_inputs_is_an_error_with_its_name(workspace, tied, name):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=tied)
    changed(workspace, lambda state: state[f"{EMBEDDINGS}.weight"].zero_())
    words = rf"^{name}: every input of lm_head is zero on .* or --head as-is"
    with pytest.raises(LayerError, match=words):
        compress.run(packed(workspace))


@pytest.mark.usefixtures("quick_verification")
def test_embeddings_that_fail_stay_in_that_format_if_failures_are_to_be_kept(workspace):
    changed(workspace, lambda state: state[f"{EMBEDDINGS}.weight"][3].fill_(1e6))
    asked = {"embeddings": Storage.FLOAT16, "export": ("native", "dense")}
    with pytest.raises(LayerError, match=r"model\.embed_tokens: its values do not fit float16"):
        compress.run(packed(workspace, **asked))
    report = compress.run(packed(workspace, **asked, on_failure="keep"))
    entry = next(each for each in report.embeddings if each.name == EMBEDDINGS)
    assert "its values do not fit float16" in entry.failure
    assert (entry.form, entry.bytes_after) == ("left as it was", entry.bytes_before)
    assert any(note.startswith("left as it was in native, dense") for note in report.notes)
    weight = load_file(workspace / "model" / "model.safetensors")[f"{EMBEDDINGS}.weight"]
    for name in ("native", "dense"):
        assert torch.equal(Reader(workspace / "out" / name)[f"{EMBEDDINGS}.weight"], weight)
    assert "left as it was" in (workspace / "out" / "native" / "README.md").read_text()


@pytest.mark.usefixtures("quick_verification")
def test_a_head_whose_inputs_fail_stays_if_failures_are_to_be_kept(workspace, monkeypatch):
    def fail(*_):
        raise LayerError("lm_head: its inputs hold NaN")

    monkeypatch.setattr(pipeline_tables, "head_gram", fail)
    report = compress.run(packed(workspace, on_failure="keep"))
    told = {entry.name: entry.failure for entry in report.embeddings}
    assert told == {EMBEDDINGS: None, "lm_head": "lm_head: its inputs hold NaN"}
    model = load_export(workspace / "out")
    assert isinstance(model.get_input_embeddings().form, Int8)
    weight = load_file(workspace / "model" / "model.safetensors")[HEAD]
    assert torch.equal(model.lm_head.weight, weight)


def tied_and_stored_twice(workspace):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=True)
    changed(workspace, lambda state: state.update({HEAD: state[f"{EMBEDDINGS}.weight"].clone()}))


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_tied_head_that_the_source_stores_too_is_stored_once(workspace, bits):
    tied_and_stored_twice(workspace)
    job = packed(workspace, embeddings=Storage(bits))
    planned = compress.plan(job).plan
    assert planned.bytes_before == Reader(workspace / "model").total_bytes
    report = compress.run(job)
    assert [entry.note for entry in report.embeddings] == [
        f"embeddings and head: {EMBEDDINGS} and lm_head"
    ]
    written = Reader(workspace / "out")
    assert written.total_bytes == planned.bytes_after
    assert not any(key.startswith("lm_head") for key in written)
    model = load_export(workspace / "out")
    assert isinstance(model.lm_head.form, Tied)
    assert model.lm_head.form.form.n_bytes() == report.embeddings[0].bytes_after


@pytest.mark.usefixtures("quick_verification")
def test_formats_store_such_a_head_once_if_they_cast_it_and_else_as_the_source_does(workspace):
    tied_and_stored_twice(workspace)
    names = ("native", "gptq", "dense")
    job = packed(workspace, export=names)
    planned = compress.plan(job).plan
    compress.run(job)
    for name in names:
        reader = Reader(workspace / "out" / name)
        assert reader.total_bytes == planned.export_bytes(name)
        assert (HEAD in reader) is (name == "dense")
    assert {kept.name for kept in planned.kept_in("dense")} >= {f"{EMBEDDINGS}.weight", HEAD}


@pytest.mark.usefixtures("quick_verification")
def test_such_a_head_that_fails_stays_as_the_source_stores_it(workspace):
    tied_and_stored_twice(workspace)
    for key in (f"{EMBEDDINGS}.weight", HEAD):
        changed(workspace, lambda state, key=key: state[key][3].fill_(1e6))
    compress.run(packed(workspace, embeddings=Storage.FLOAT16, on_failure="keep"))
    written = Reader(workspace / "out")
    assert torch.equal(written[HEAD], written[f"{EMBEDDINGS}.weight"])
