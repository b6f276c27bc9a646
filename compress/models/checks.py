"""Pre-flight checks of the folder of a model, by its metadata; no weight is read."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers import __version__ as transformers_version

from calibration.outputs import head_of
from compress.errors import CheckpointError
from compress.models.checkpoint import Reader, some
from compress.models.companions import companions
from compress.models.demo import DEMO
from compress.models.gguf import is_gguf
from compress.models.links import inside
from compress.models.model_config import (
    PACKED_METHODS,
    holds_dense_weights,
    is_dense,
    is_published,
    method_of,
    narrow_tensors,
    read_config,
)

WHAT_MODELS_ARE = (
    "a model is a folder with config.json and safetensors, a .gguf file, an id of the Hugging Face"
    f" hub (owner/name, or owner/name@revision), or {DEMO!r}"
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def check_folder(spec: str, folder: Path) -> None:
    """Raise CheckpointError unless `folder` holds a model of a kind and an architecture that are known.

    Its weights are ordinary ones, or in few bits of a kind that originals are published in, which its format checks.

    Looks at file names, config.json and the headers of the weights.
    """
    config = _read_config(spec, folder)
    companions(folder)  # refuses links to other places before work
    in_few_bits = is_published(folder, config)
    if not in_few_bits:
        _refuse_compressed(spec, folder, config)
    _refuse_unknown_code(spec, config)
    _refuse_missing_files(spec, folder)
    parsed = read_config(folder, spec)
    _refuse_other_architectures(spec, parsed)
    _refuse_dtypes(spec, parsed)
    if not in_few_bits:
        _refuse_narrow(spec, folder)


def _read_config(spec: str, folder: Path) -> dict[str, Any]:
    path = inside(folder, "config.json")
    if not path.is_file():
        raise CheckpointError(_no_config(spec, folder))
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{spec}: {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{spec}: {path} holds a {type(config).__name__}, not an object")
    return config


def _no_config(spec: str, folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{spec}: this folder is a PEFT adapter, not a model; merge it into its base first"
    gguf_files = sorted(path.name for path in folder.iterdir() if is_gguf(path))
    if gguf_files:
        return f"{spec}: no config.json, but GGUF; name the file itself: {folder / gguf_files[0]}"
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
    return (
        f"{spec}: this folder is no model: looked for config.json and {' or '.join(_WEIGHTS)},"
        f" found {there}; {WHAT_MODELS_ARE}"
    )


def _refuse_compressed(spec: str, folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config") or config.get("compression_config")
    how = None
    if isinstance(quantization, dict):
        how = method_of(quantization)
    elif config.get("model_type") == "compress":
        how = "compress"
    elif (folder / "quantize_config.json").is_file():
        how = "gptq"
    if how is None:
        return
    dense = how != "compress" and holds_dense_weights(folder)
    if dense and how in PACKED_METHODS:
        return  # left over from a model that this one was made from
    if dense:
        raise CheckpointError(
            f"{spec}: every weight is stored in 16 bits or more, but quantization_config in its config.json names "
            f"{how!r}, which may still change them on loading; if it is left over from another model, remove it"
        )
    raise CheckpointError(
        f"{spec}: already compressed ({how}); only dense checkpoints are compressed for now, so"
        " name the model it was made from"
    )


def _refuse_unknown_code(spec: str, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise CheckpointError(
            f"{spec}: model_type {kind!r} exists only as Python code inside the checkpoint, and"
            " code of a checkpoint is never run; use a model whose architecture is part of"
            " transformers"
        )
    raise CheckpointError(
        f"{spec}: transformers {transformers_version} knows no model_type {kind!r}, which its"
        " config.json names"
    )


def _refuse_missing_files(spec: str, folder: Path) -> None:
    if not any((folder / name).is_file() for name in _WEIGHTS):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{spec}: its weights are pickles only ({pickles[0]}), which can run any code when"
                " read; convert them where you trust them:"
                " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise CheckpointError(f"{spec}: no weights: looked for {' or '.join(_WEIGHTS)} in {folder}")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{spec}: no tokenizer: looked for {', '.join(_TOKENIZER_FILES)} in {folder}"
        )


def _refuse_other_architectures(spec: str, config: Any) -> None:
    if not isinstance(config.architectures, list | None):
        raise CheckpointError(
            f"{spec}: architectures in its config.json is {config.architectures!r}; it is a list of names of classes"
        )
    name = ", ".join(config.architectures or []) or config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{spec}: {name} ({config.model_type}) is an encoder with a decoder, which is not compressed; "
            "only causal language models, sequence classifiers and encoders alone are"
        )
    if head_of(config) is None:
        raise CheckpointError(
            f"{spec}: {name} is neither a causal language model, with or without an image encoder, "
            "nor a sequence classifier, nor an encoder alone; only these are compressed"
        )


def _refuse_dtypes(spec: str, config: Any) -> None:
    """Numbers that no model computes in, as the dtype of config.json."""
    if isinstance(config.dtype, torch.dtype) and not is_dense(config.dtype):
        raise CheckpointError(
            f"{spec}: config.json has dtype {str(config.dtype).removeprefix('torch.')!r}, which no"
            " dense model computes in; float32, bfloat16 and float16 are right"
        )


def _refuse_narrow(spec: str, folder: Path) -> None:
    """Numbers that no model computes in, as the dtype of a matrix."""
    reader = Reader(folder)
    odd = [
        name
        for name in narrow_tensors(reader)
        if name.endswith(".weight") and len(reader.shape(name)) > 1
    ]
    if odd:
        dtype = str(reader.dtype(odd[0])).removeprefix("torch.")
        raise CheckpointError(
            f"{spec}: {some(odd)} are stored as {dtype}, so they are quantised already; only dense"
            " checkpoints are compressed for now, so name the model it was made from"
        )
