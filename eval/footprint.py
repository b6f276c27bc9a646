"""Footprint of a checkpoint: bytes on disk, bits per weight, tokens per second, memory.

Speeds are for one sequence on an otherwise idle machine: the median of several repeats after a
warm-up. Memory is the high-water mark of a fresh process that loads the checkpoint and runs it.
"""

import inspect
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from eval.errors import EvalError
from eval.scores import Footprint, no_progress

Progress = Callable[[str, int, int], None]

_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors specification


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Settings of the measurement of speed."""

    prompt_tokens: int = 256
    """Length of the prompt, in tokens."""
    new_tokens: int = 32
    """Tokens decoded one by one after the prompt."""
    repeats: int = 3
    """Measurements, after one that does not count; their median is reported."""

    def __post_init__(self) -> None:
        """Refuses values below 1."""
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise EvalError(f"{name}: {getattr(self, name)}; expected at least 1")

    def fitting(self, model: PreTrainedModel) -> "Timing":
        """This timing, shortened to the model's context where it is longer.

        Raises:
            EvalError: a context of less than 2 tokens, one to read and one to write.
        """
        longest = context_length(model.config)
        if longest is None or self.prompt_tokens + self.new_tokens <= longest:
            return self
        if longest < 2:
            raise EvalError(f"the model takes at most {longest} tokens; its speed needs 2")
        new = min(self.new_tokens, max(1, longest // 4))
        return replace(self, prompt_tokens=min(self.prompt_tokens, longest - new), new_tokens=new)


def context_length(config: PretrainedConfig) -> int | None:
    """Most tokens of a sequence, as a model's configuration tells; None if it sets no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@dataclass(frozen=True)
class Speed:
    """Tokens a second: reading a prompt, and writing after it."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    """Tokens per second while writing; None for a model that writes nothing."""


@dataclass(frozen=True)
class PeakMemory:
    """High-water marks of a fresh process, in bytes.

    `baseline_bytes` is after its imports, before the model; `peak_bytes` after loading and running,
    weights read through a memory map included. `device_bytes`: torch's own peak on an accelerator.
    """

    baseline_bytes: int
    peak_bytes: int
    device_bytes: int | None


@dataclass(frozen=True)
class Stored:
    """What a checkpoint takes, for one that is more than its folder, or none."""

    bytes_on_disk: int
    tensor_bytes: int


def measure(
    folder: Path | Stored,
    model: PreTrainedModel,
    n_parameters_reference: int,
    *,
    peak_rss_bytes: int | None = None,
    timing: Timing = Timing(),
    progress: Progress = no_progress,
) -> Footprint:
    """Footprint of the checkpoint in `folder`; `model` is that checkpoint, loaded.

    A checkpoint whose files are elsewhere too is told as what it takes there and here.
    `n_parameters_reference`: parameters of the *original*, whatever the checkpoint stores; see
    `n_elements`. `peak_rss_bytes`: from `peak_memory`, if it was measured.

    Raises:
        EvalError: no safetensors in `folder`, or a model with a context of less than 2 tokens.
    """
    stored = folder
    if isinstance(stored, Path):
        stored = Stored(bytes_on_disk(stored), tensor_bytes(stored))
    speed = measure_speed(model, timing, progress=progress)
    return Footprint(
        bytes_on_disk=stored.bytes_on_disk,
        tensor_bytes=stored.tensor_bytes,
        n_parameters_reference=n_parameters_reference,
        bits_per_weight=8 * stored.tensor_bytes / n_parameters_reference,
        prefill_tokens_per_s=speed.prefill_tokens_per_s,
        decode_tokens_per_s=speed.decode_tokens_per_s,
        peak_rss_bytes=peak_rss_bytes,
        device=str(model.device),
    )


def bytes_on_disk(folder: Path) -> int:
    """Bytes of all files in a folder and below it; links count as what they lead to."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tensor_bytes(folder: Path) -> int:
    """Bytes of the model's tensors, from the headers alone; adapters in `adapter/` included."""
    return sum(
        end - begin
        for header in _headers(folder)
        for begin, end in (entry["data_offsets"] for entry in header.values())
    )


def n_elements(folder: Path) -> int:
    """Number of elements of the model's tensors: for an original, its number of parameters."""
    total = 0
    for header in _headers(folder):
        for entry in header.values():
            total += int(torch.Size(entry["shape"]).numel())
    return total


def measure_speed(
    model: PreTrainedModel,
    timing: Timing = Timing(),
    *,
    progress: Progress = no_progress,
) -> Speed:
    """Speed of one sequence with a KV cache; token ids are random, but always the same.

    Prompt and new tokens are shortened to what fits in the model's context.

    Raises:
        EvalError: a context of less than 2 tokens.
    """
    timing = timing.fitting(model)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, timing.prompt_tokens), generator=generator)
    seconds: list[tuple[float, float]] = []
    for repeat in range(timing.repeats + 1):
        seconds.append(_prefill_and_decode(model, ids.to(model.device), timing.new_tokens))
        progress("speed", repeat + 1, timing.repeats + 1)
    prefill, decode = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    decoded = timing.new_tokens / decode if model.can_generate() else None
    return Speed(timing.prompt_tokens / prefill, decoded)


def peak_memory(
    folder: Path,
    *,
    loader: str,
    dtype: str,
    device: str = "cpu",
    timing: Timing = Timing(),
    imports: Sequence[str] = (),
) -> PeakMemory:
    """Memory of a fresh process that loads `folder` and runs it.

    `loader` is "package.module:function"; it is called as function(folder, dtype, device) with a
    torch dtype. Python imports in the child whatever it can import here; `imports` are modules to
    import before, which define what the folder holds, say.

    Raises:
        EvalError: the child failed; its last lines are quoted.
    """
    request = {
        "folder": str(folder),
        "loader": loader,
        "dtype": dtype,
        "device": device,
        "timing": {"prompt_tokens": timing.prompt_tokens, "new_tokens": timing.new_tokens},
        "path": sys.path,
        "imports": list(imports),
    }
    child = [sys.executable, "-P", str(Path(__file__).with_name("peak_memory.py"))]
    finished = subprocess.run(
        child, input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        last_lines = "\n".join(finished.stderr.strip().splitlines()[-5:])
        raise EvalError(
            f"{folder}: could not be loaded in a fresh process with {loader} "
            f"(exit code {finished.returncode}):\n{last_lines}"
        )
    found = json.loads(finished.stdout.splitlines()[-1])
    return PeakMemory(found["baseline_bytes"], found["peak_bytes"], found["device_bytes"])


@torch.inference_mode()
def _prefill_and_decode(
    model: PreTrainedModel, ids: Tensor, new_tokens: int
) -> tuple[float, float]:
    """Seconds for the prompt, and seconds for `new_tokens` greedy steps after it, if the model writes."""
    # As generation does: only the last position's logits, where the architecture can.
    last = {"logits_to_keep": 1} if _takes_logits_to_keep(model) else {}
    start = _now(model)
    if not model.can_generate():
        model(input_ids=ids)
        return _now(model) - start, 0.0
    states = _states_of_our_own(model)
    output: Any = model(input_ids=ids, use_cache=True, **last, **states)
    token = output.logits[:, -1:].argmax(-1)
    prefilled = _now(model)
    for _ in range(new_tokens):
        states |= {name: output[name] for name in _STATES if output.get(name) is not None}
        output = model(input_ids=token, use_cache=True, **states)
        token = output.logits[:, -1:].argmax(-1)
    return prefilled - start, _now(model) - prefilled


_STATES = ("past_key_values", "cache_params", "state")
"""What models call the keys and values, or the recurrent states, that they go on from."""


def _states_of_our_own(model: PreTrainedModel) -> dict[str, Any]:
    """A cache for a model that fills one and does not return it (RecurrentGemma); others make one themselves."""
    returned = inspect.signature(model.forward).return_annotation
    named = {entry.name for entry in fields(returned)} if is_dataclass(returned) else set(_STATES)
    accepted = inspect.signature(model.forward).parameters
    if named.isdisjoint(_STATES) and "past_key_values" in accepted:
        return {"past_key_values": DynamicCache(config=model.config)}
    return {}


def _takes_logits_to_keep(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _now(model: PreTrainedModel) -> float:
    """Seconds, when all that was asked of the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _headers(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Safetensors headers of a checkpoint's own files: the indexed shards, or the one file.

    Others may lie beside them (a probe, a second copy in another layout) and are no part of it.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        raise EvalError(f"{folder}: no model.safetensors and no index of one; is it a checkpoint?")
    paths = [folder / name for name in names]
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return [_header(path) for path in [*paths, *([adapter] if adapter.is_file() else [])]]


def _header(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 2 <= size <= _HEADER_LIMIT:
            raise EvalError(f"{path}: no safetensors file (its header would have {size} bytes)")
        header: dict[str, dict[str, Any]] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header
