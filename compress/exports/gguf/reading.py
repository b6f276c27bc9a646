"""Reads a GGUF export back into a transformers model: sizes out of its keys, weights dequantised, corrections added.

Nothing beside the files is needed, so what is verified is what llama.cpp gets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from compress.errors import CheckpointError
from compress.exports.contents import Contents, StoredTensor
from compress.exports.gguf.adapter import FILE as ADAPTER_FILE
from compress.exports.gguf.adapter import corrections_in, floats_of, read_factors
from compress.exports.gguf.families import Family, family_in
from compress.exports.gguf.file import FLOATS
from compress.exports.gguf.names import Names
from compress.exports.reading import add_corrections
from compress.forms.low_rank import LowRank
from compress.models.checkpoint import some
from compress.models.gguf import is_gguf
from compress.models.gguf_rope import apply_rope, read_rope
from eval.footprint import Stored, bytes_on_disk

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def model_files(folder: Path) -> list[Path]:
    """The GGUF files in a folder, an adapter apart."""
    found = sorted(path for path in folder.glob("*.gguf") if path.name != ADAPTER_FILE)
    return [path for path in found if is_gguf(path)]


def is_in(folder: Path) -> bool:
    """Whether there is a GGUF file of a model, and no configuration of another checkpoint."""
    return not (folder / "config.json").exists() and bool(model_files(folder))


def load(folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The model in eval mode; `dtype` None is that of the matrices that are no codes, or fp32.

    Raises CheckpointError for a file of another architecture, and for one whose tensors do not fit its keys.
    """
    model = _Model(_only(folder))
    kind: Any = AutoModelForCausalLM._model_mapping[type(model.config)]
    loaded = kind.from_pretrained(
        None, config=model.config, state_dict=model.state(), dtype=dtype or model.dtype
    )
    found: PreTrainedModel = loaded.to(device).eval()
    add_corrections(found, model.corrections(folder), folder)
    return found


def config_of(folder: Path) -> PretrainedConfig:
    """The configuration that the keys of the file make. Raises CheckpointError as `load`."""
    return _Model(_only(folder)).config


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as it is stored, blocks as bytes; those of an adapter by their file's name."""
    for prefix, path in _files(folder):
        for tensor in _reader(path).tensors:
            yield f"{prefix}{tensor.name}", torch.from_numpy(np.array(tensor.data))


def stored(folder: Path) -> Stored:
    """Bytes of the folder, and of the tensors."""
    sizes = (int(tensor.n_bytes) for _, path in _files(folder) for tensor in _reader(path).tensors)
    return Stored(bytes_on_disk(folder), sum(sizes))


def contents(folder: Path) -> Contents:
    """The type of every tensor, experts of a stack one by one."""
    layers: list[StoredTensor] = []
    others: list[StoredTensor] = []
    reader = _reader(_only(folder))
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))
        if kind in FLOATS.values():
            others.append(
                StoredTensor(
                    name=tensor.name, shape=shape, stored=kind, n_bytes=int(tensor.n_bytes)
                )
            )
            continue
        name, n = tensor.name.removesuffix(".weight"), shape[0] if len(shape) == 3 else 1
        names = [name] if len(shape) == 2 else [f"{name}.{number}" for number in range(n)]
        layers += [
            StoredTensor(name=each, shape=shape[-2:], stored=kind, n_bytes=int(tensor.n_bytes) // n)
            for each in names
        ]
    kinds = dict.fromkeys(layer.stored for layer in layers)
    return Contents(
        format=", ".join(["gguf", *kinds]),
        producer=None,
        layers=tuple(layers),
        others=tuple(others),
        corrections=corrections_in(folder),
    )


def _only(folder: Path) -> Path:
    found = model_files(folder)
    if len(found) != 1:
        names = some([path.name for path in found]) if found else "none"
        raise CheckpointError(f"{folder}: expected one GGUF file of a model, found {names}")
    return found[0]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of an export with what their tensors' names begin with."""
    yield "", _only(folder)
    if (folder / ADAPTER_FILE).is_file():
        yield f"{Path(ADAPTER_FILE).stem}/", folder / ADAPTER_FILE


def _reader(path: Path) -> GGUFReader:
    """Raises CheckpointError for a file that is cut short."""
    from gguf import GGUFReader

    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); get the export again") from error


@dataclass(frozen=True)
class _Model:
    """A file as a model of transformers."""

    path: Path

    @cached_property
    def reader(self) -> GGUFReader:
        return _reader(self.path)

    @cached_property
    def keys(self) -> Mapping[str, Any]:
        return {name: field.contents() for name, field in self.reader.fields.items()}

    @cached_property
    def tensors(self) -> Mapping[str, ReaderTensor]:
        return {tensor.name: tensor for tensor in self.reader.tensors}

    @cached_property
    def family(self) -> Family:
        architecture = str(self.keys.get("general.architecture"))
        found = family_in(architecture, self.keys)
        if found is None:
            raise CheckpointError(
                f"{self.path}: its architecture is {architecture!r}, and exports have others; compress takes the file "
                "itself as a model"
            )
        return found

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration that the keys and the family make."""
        family = self.family
        values: dict[str, Any] = dict(family.implied)
        values |= {
            name: self._key(key, family.optional.get(name))
            for name, key in family.sizes.items()
            if name not in family.optional or self._has(key)
        }
        values |= {name: value for name, value in family.optional.items() if name not in values}
        if "hidden_activation" in values:
            values["query_pre_attn_scalar"] = self._attention_scalar(values)
        if family.model_type == "llama":
            values["attention_bias"] = "blk.0.attn_q.bias" in self.tensors
        if self._has("rope.scaling.original_context_length"):
            values["original_max_position_embeddings"] = self._key(
                "rope.scaling.original_context_length"
            )
        values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        found: PretrainedConfig = AutoConfig.for_model(
            family.model_type,
            **values,
            max_position_embeddings=self._key("context_length"),
            vocab_size=int(self.tensors["token_embd.weight"].shape[1]),
            tie_word_embeddings="output.weight" not in self.tensors,
            rope_parameters=self._rope(values),
        )
        apply_rope(found, read_rope(self.reader, family.architecture), self.path)
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of most matrices that are stored in floats; fp32 where there are none."""
        kinds = Counter(
            tensor.tensor_type.name for tensor in self.tensors.values() if len(tensor.shape) > 1
        )
        found = {dtype: kinds[kind] for dtype, kind in FLOATS.items() if kinds[kind]}
        return max(found, key=lambda dtype: found[dtype], default=torch.float32)

    def _has(self, key: str) -> bool:
        return f"{self.family.architecture}.{key}" in self.keys

    def _key(self, key: str, default: object = None) -> Any:
        full = f"{self.family.architecture}.{key}"
        if full not in self.keys and default is None:
            raise CheckpointError(f"{self.path}: {full} is absent; get the export again")
        return self.keys.get(full, default)

    def _attention_scalar(self, values: Mapping[str, Any]) -> int:
        if values["num_hidden_layers"] in (46, 62):
            return int(values["hidden_size"] // values["num_attention_heads"])
        return int(values["head_dim"])

    def _rope(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Frequencies without their scaling."""
        whole: dict[str, Any] = {"rope_type": "default", "rope_theta": self._key("rope.freq_base")}
        if self._has("rope.dimension_count"):
            size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
            share = self._key("rope.dimension_count") / size
            whole |= {} if share == 1 else {"partial_rotary_factor": share}
        if not self._has("rope.freq_base_swa"):
            return whole
        window = {"rope_type": "default", "rope_theta": self._key("rope.freq_base_swa")}
        return {"full_attention": whole, "sliding_attention": window}

    @cached_property
    def names(self) -> Names:
        return Names(self.config)

    @cached_property
    def parameters(self) -> list[str]:
        """Names in memory of everything that a file holds."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        return [name for name in model.state_dict() if name not in tied]

    def state(self) -> dict[str, Tensor]:
        """The weights by their names in memory. Raises CheckpointError for those that are absent, or unknown."""
        state, used = {}, {*_ROPE_TENSORS}
        for name in self.parameters:
            places = [place.name for place, _ in self.names.tensor(name)]
            used.update(places)
            absent = [place for place in places if place not in self.tensors]
            if absent:
                raise CheckpointError(f"{self.path}: no tensor {absent[0]}; get the export again")
            parts = [self._values(place) for place in places]
            state[name] = self._restored(name, parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        strange = sorted(set(self.tensors) - used)
        if strange:
            raise CheckpointError(
                f"{self.path}: {some(strange)} belong to no layer of {type(self.config).__name__}"
            )
        return state

    def _values(self, name: str) -> Tensor:
        """A tensor's numbers, dequantised, in the dtype of their type or fp32."""
        from gguf import dequantize

        tensor = self.tensors[name]
        if tensor.tensor_type.name in FLOATS.values():
            return floats_of(tensor)
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))

    def _restored(self, name: str, values: Tensor) -> Tensor:
        """Rows in the source's order, norms without the 1."""
        if self.family.shifted_norms and name.endswith("norm.weight"):
            values = values - 1
        return self._in_order(name, values)

    def _in_order(self, name: str, values: Tensor) -> Tensor:
        order = self.names.rows(name)
        return values if order is None else values[order.argsort()]

    def corrections(self, folder: Path) -> dict[str, LowRank]:
        """The factors of an adapter by the layers that they correct, in memory."""
        layers = {
            self.names.weight(name.removesuffix(".weight")).name: name.removesuffix(".weight")
            for name in self.parameters
            if name.endswith(".weight")
        }
        found = {}
        for place, factors in read_factors(folder).items():
            if place not in layers:
                raise CheckpointError(
                    f"{folder}: the adapter has factors for {place}, which the model has not"
                )
            name = layers[place]
            up = self._in_order(f"{name}.weight", factors.up.weight.detach())
            found[name] = LowRank.from_factors(up, factors.down.weight.detach())
        return found
