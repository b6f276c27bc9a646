"""The config.json of a model as it is used here: without what not every machine has, and what its weights disprove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from compress.errors import CheckpointError
from compress.models.checkpoint import Reader, read_json

PORTABLE = frozenset({None, "eager", "sdpa"})
"""Implementations of attention that every machine has. The others compute the same, on some machines, faster."""
QUANTISATION = ("quantization_config", "compression_config")
"""Entries of config.json that say how weights are packed."""
PACKED_METHODS = frozenset(
    (
        *("aqlm", "auto-round", "awq", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8"),
        *("fp8", "gptq", "hqq", "modelopt", "mxfp4", "quanto"),
    )
)
"""Quantisations that always show in the stored tensors; others (bitnet) may change 16-bit weights on loading."""
PUBLISHED = frozenset(("compressed-tensors", "fp8", "modelopt", "mxfp4"))
"""Those among them in which models exist that exist in nothing else; `bases.dequantised` reads them."""
MODELOPT_SETTINGS = "hf_quant_config.json"
"""The file beside config.json in which old checkpoints of ModelOpt say how their weights are packed."""
_TAG = "__float__"
_NARROWEST = 2
"""Bytes of a number; narrower ones are quantised."""
_BUFFERS = ("bias", "masked_bias", "position_ids", "token_type_ids")
"""Ends of the names of integer and boolean tensors that old checkpoints hold beside their weights."""


def read_config(folder: Path, named: str | None = None) -> PretrainedConfig:
    """The configuration of a checkpoint, to build its model with on any machine.

    `named`: what messages call it. Raises CheckpointError for a config.json that transformers cannot use.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (
        *(ValueError, KeyError, TypeError, AttributeError, OSError, ArithmeticError, ImportError),
        *(IndexError, RecursionError, StrictDataclassError),
    ) as error:
        raise CheckpointError(
            f"{named or folder}: transformers cannot use its config.json: {error}"
        ) from error
    make_portable(config)
    quantisation = getattr(config, "quantization_config", None)
    if isinstance(quantisation, Mapping) and (
        method_of(quantisation) in PUBLISHED or is_leftover(folder, quantisation)
    ):
        del config.quantization_config  # bases read the weights, and transformers none
    return config


def with_numbers(entry: Any) -> Any:
    """An entry of config.json with infinities and NaN as numbers, which transformers writes as `{"__float__": "..."}`.

    For configurations that are not made of a file by transformers, which reads them so itself.
    """
    if isinstance(entry, Mapping):
        if set(entry) == {_TAG}:
            return float(entry[_TAG])
        return {key: with_numbers(value) for key, value in entry.items()}
    return [with_numbers(value) for value in entry] if isinstance(entry, list) else entry


def make_portable(config: PretrainedConfig) -> None:
    """Leave the choice of attention to transformers, where the configuration wants one that not every machine has."""
    for part in _parts(config):
        if part._attn_implementation not in PORTABLE:
            part._attn_implementation_internal = None


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and those of its towers."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _parts(part)


def method_of(quantisation: Mapping[str, Any]) -> str:
    """The name of a quantisation by its settings; old ones of bitsandbytes do not say theirs."""
    named = quantisation.get("quant_method")
    if named:
        return str(named)
    old = any(str(key).startswith("load_in_") for key in quantisation)
    return "bitsandbytes" if old else "unknown method"


def is_published(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a config.json, or a file beside it, names a quantisation in which originals are read."""
    found = next((config[key] for key in QUANTISATION if config.get(key)), None)
    if isinstance(found, Mapping):
        return method_of(found) in PUBLISHED
    return found is None and (folder / MODELOPT_SETTINGS).is_file()


def is_leftover(folder: Path, quantisation: Mapping[str, Any]) -> bool:
    """Whether every weight is stored as an ordinary one, and the quantisation named would show in them.

    So it is after fine-tuning on a quantised model, when what was learned is merged and saved.
    """
    return method_of(quantisation) in PACKED_METHODS and holds_dense_weights(folder)


def holds_dense_weights(folder: Path) -> bool:
    """Whether all of a folder's checkpoint is floats of 16 bits or more, buffers apart; headers are read."""
    usual = ("model.safetensors", "model.safetensors.index.json")
    return any((folder / name).is_file() for name in usual) and not narrow_tensors(Reader(folder))


def narrow_tensors(reader: Reader) -> list[str]:
    """Names of the tensors that are integers, or floats of less than 16 bits: packed weights, or what unpacks them."""
    return [
        name
        for name in reader
        if len(reader.shape(name)) > 0
        and not name.endswith(_BUFFERS)
        and not is_dense(reader.dtype(name))
    ]


def is_dense(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are ordinary ones."""
    return dtype.is_floating_point and dtype.itemsize >= _NARROWEST


def attention_wish(config: Mapping[str, Any]) -> str | None:
    """The implementation of attention that a config.json wants, where not every machine has it."""
    for key in ("_attn_implementation", "attn_implementation"):
        wish = config.get(key)
        if isinstance(wish, str) and wish not in PORTABLE:
            return wish
    inner = [attention_wish(value) for value in config.values() if isinstance(value, Mapping)]
    return next((wish for wish in inner if wish), None)


def config_notes(folder: Path) -> Iterator[str]:
    """Remarks on what a run does otherwise than config.json says, for the report."""
    config = read_json(folder / "config.json")
    wish = attention_wish(config)
    if wish is not None:
        yield (
            f"config.json asks for the attention {wish!r}, which not every machine has; this run computed the same "
            "with the implementation that transformers chooses, and exports keep the entry"
        )
    for key in QUANTISATION:
        found = config.get(key)
        if isinstance(found, Mapping) and found and is_leftover(folder, found):
            yield (
                f"{key} in config.json names {method_of(found)}, but every weight is stored in 16 bits or more; it was "
                "taken as left over from another model, and exports do without it"
            )
