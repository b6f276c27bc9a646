"""Footprint: bytes from headers, speed of the real forward, memory of a fresh process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eval.errors import EvalError
from eval.footprint import (
    Timing,
    bytes_on_disk,
    measure,
    measure_speed,
    n_elements,
    peak_memory,
    tensor_bytes,
)

QUICK = Timing(prompt_tokens=8, new_tokens=3, repeats=2)
LOADER = """
from transformers import LlamaForCausalLM

def load(folder, dtype, device):
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
"""


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def parameters() -> int:
    return sum(parameter.numel() for parameter in tiny().parameters())


def test_bytes_are_those_of_the_tensors_and_of_the_files(checkpoint: Path) -> None:
    assert n_elements(checkpoint) == parameters()
    assert tensor_bytes(checkpoint) == 4 * parameters()
    (checkpoint / "sub").mkdir()
    (checkpoint / "sub" / "notes.txt").write_text("12345")
    by_hand = sum((checkpoint / name).stat().st_size for name in ("config.json", "sub/notes.txt"))
    by_hand += (checkpoint / "generation_config.json").stat().st_size
    by_hand += (checkpoint / "model.safetensors").stat().st_size
    assert bytes_on_disk(checkpoint) == by_hand


def test_shards_and_adapters_count_and_bystanders_do_not(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    save_file({"a": torch.zeros(3, dtype=torch.int32)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(5, dtype=torch.float16)}, tmp_path / "model-2.safetensors")
    save_file({"c": torch.zeros(7)}, tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({"logits": torch.zeros(1000)}, tmp_path / "probe.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tensor_bytes(tmp_path) == 3 * 4 + 5 * 2 + 7 * 4
    assert n_elements(tmp_path) == 3 + 5 + 7


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no model\.safetensors"):
        tensor_bytes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not one at all")
    with pytest.raises(EvalError, match="no safetensors file"):
        tensor_bytes(tmp_path)


def test_bits_a_weight_are_paid_by_the_originals_parameters(checkpoint: Path) -> None:
    found = measure(checkpoint, tiny(), 2 * parameters(), timing=QUICK)
    assert found.bits_per_weight == 16
    assert found.device == "cpu"
    assert found.peak_rss_bytes is None
    assert min(found.prefill_tokens_per_s, found.decode_tokens_per_s) > 0


def test_decoding_uses_the_cache_and_every_repeat_is_run() -> None:
    model = tiny()
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    seen: list[tuple[str, int, int]] = []
    measure_speed(model, QUICK, progress=lambda *step: seen.append(step))
    assert lengths == 3 * [8, 1, 1, 1]
    assert seen == [("speed", 1, 3), ("speed", 2, 3), ("speed", 3, 3)]


def test_a_prompt_is_shortened_to_what_the_model_takes() -> None:
    fitting = Timing(prompt_tokens=30, new_tokens=3).fitting(tiny())
    assert 1 <= fitting.prompt_tokens <= 32 - fitting.new_tokens
    measure_speed(tiny(), Timing(prompt_tokens=30, new_tokens=3, repeats=1))


def test_timings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(EvalError, match="repeats: 0"):
        Timing(repeats=0)


@pytest.mark.slow
def test_memory_is_the_childs_own_and_not_its_parents(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_loader.py").write_text(LOADER)
    monkeypatch.syspath_prepend(tmp_path)
    ballast = torch.ones(2 << 28)  # 2 GiB in this process
    found = peak_memory(checkpoint, loader="own_loader:load", dtype="float32", timing=QUICK)
    assert 0 < found.baseline_bytes <= found.peak_bytes < ballast.nbytes
    assert found.device_bytes is None


@pytest.mark.slow
def test_a_loader_that_fails_is_quoted(checkpoint: Path) -> None:
    with pytest.raises(EvalError, match="No module named 'nowhere_at_all'"):
        peak_memory(checkpoint, loader="nowhere_at_all:load", dtype="float32", timing=QUICK)
