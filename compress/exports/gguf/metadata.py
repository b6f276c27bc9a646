"""The keys of a file: what the model is, and its sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from compress.exports.gguf.families import FAMILIES, context_of, size_of
from compress.exports.gguf.rope import rope_keys
from compress.models.gguf import converted_from
from compress.models.resolve import SourceModel, is_hub_id

if TYPE_CHECKING:
    from gguf import GGUFWriter, Metadata

_TYPE = re.compile(r"[.-](I?Q\d\w*|F16|F32|BF16|MXFP4)$", re.IGNORECASE)
HUB = "https://huggingface.co"
_OF_VALUES = "attention.value_length"


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, for the label of a model's size."""

    total: int
    of_experts: int
    n_experts: int


def describe_source(source: SourceModel, parameters: Parameters) -> Metadata:
    """What the model's card and name tell of it; it is the model that the file was made of."""
    from gguf import Metadata, size_label

    found = Metadata.load(model_path=source.folder, total_params=parameters.total)
    if name := converted_from(source.folder):
        # The folder is one of our cache, and its name is not the model's.
        stem = _TYPE.sub("", Path(name).stem)
        found.name = Metadata.id_to_title(stem)
        parts = Metadata.get_model_id_components(stem, parameters.total)
        found.basename, found.finetune, found.version, found.size_label = parts[2:]
    if found.size_label is None:
        shared = parameters.total - parameters.of_experts
        n = parameters.n_experts
        found.size_label = size_label(
            parameters.total, shared, parameters.of_experts // max(n, 1), n
        )
    spec = source.spec.partition("@")[0]
    if is_hub_id(source.spec) and "/" in spec:
        owner, name = spec.split("/")
        found.name = found.name or name
        found.base_models = [
            {"name": name, "organization": owner, "repo_url": f"{HUB}/{spec}"},
        ]
    if source.licence is not None:
        found.license = source.licence
    return found


def write_description(writer: GGUFWriter, metadata: Metadata, file_type: str) -> None:
    """Add the keys on the model as a whole; `file_type`: the type that most weights have."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    metadata.set_gguf_meta_model(writer)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    prefix = "ALL" if file_type == "F32" else "MOSTLY"
    writer.add_file_type(LlamaFileType[f"{prefix}_{file_type}"])


def write_sizes(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Add the keys of a model's sizes, as its architecture has them."""
    family = FAMILIES[config.model_type]
    values: dict[str, str | int | float] = {"context_length": context_of(config)}
    for name, key in family.sizes.items():
        value = size_of(config, name)
        if name not in family.optional or value != family.optional[name]:
            values[key] = value
            if name == "head_dim":
                values[_OF_VALUES] = value
    if family.architecture == "llama":
        values["vocab_size"] = config.vocab_size
    if family.architecture == "phi3":
        values["attention.sliding_window"] = getattr(config, "sliding_window", None) or 0
    values |= rope_keys(config)
    for key, value in values.items():
        full = f"{family.architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, int(value))


def file_name(metadata: Metadata, file_type: str, folder: Path) -> str:
    """The file's name: that of the model, and the type that most weights have."""
    from gguf import naming_convention

    base = naming_convention(
        metadata.name or folder.name,
        metadata.basename,
        metadata.finetune,
        metadata.version,
        metadata.size_label,
        file_type,
    )
    return f"{base}.gguf"
