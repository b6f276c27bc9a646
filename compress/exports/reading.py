"""Reads a checkpoint into a transformers model: ordinary and native ones, and packed ones whoever wrote them.

Packed formats are read without the libraries that wrote them: every layer becomes the form that its tensors describe.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from calibration.experts.module import take_apart
from calibration.heads import Head
from calibration.layers import is_linear
from calibration.outputs import AUTO_CLASSES, head_of
from calibration.skeleton import PartLoader, build_skeleton
from compress.bases import AsDense, Base, CheckpointFolder, kind_of, open_base
from compress.errors import CheckpointError
from compress.forms import loading
from compress.forms.base import Form
from compress.forms.dense import Dense
from compress.forms.linear import CompressedLinear
from compress.forms.low_rank import LowRank
from compress.forms.sum import Sum
from compress.forms.tied import Tied
from compress.models.checkpoint import Reader, some
from compress.models.layers import bias_of, weight_oi
from compress.models.model_config import make_portable, read_config, with_numbers

Device = torch.device | str


def load_bare(
    folder: Path, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> PreTrainedModel:
    """The model of a checkpoint in eval mode, without an adapter that lies beside it.

    Raises CheckpointError for a checkpoint that is incomplete or does not fit its config.
    """
    found = CheckpointFolder(folder)
    kind = kind_of(found)
    if kind.ordinary:
        kind(found)  # refuses tensors that are packed, without a word of it in the config
    load = _load_plain if kind.loads_itself else _load_packed
    try:
        model: Any = load(folder, dtype or "auto")
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder} does not load: {error}") from error
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _load_plain(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    Reader(folder)  # says which file is cut short
    config = read_config(folder)
    found: Any = AUTO_CLASSES[head_of(config) or Head.NEXT_TOKEN].from_pretrained(
        folder, config=config, output_loading_info=True, local_files_only=True, dtype=dtype
    )
    _refuse_differences(found[1])
    model: PreTrainedModel = found[0]
    return model


def _refuse_differences(info: Mapping[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = [str(key) for key in info.get(what, ())]
        if found:
            raise CheckpointError(f"{what.replace('_', ' ')}: {some(found)}")


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The architecture alone."""
    with torch.device("meta"):
        model: PreTrainedModel = AUTO_CLASSES[head_of(config) or Head.NEXT_TOKEN].from_config(
            config
        )
    return model


def _load_packed(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Turn the tensors into those of the native format, and load them as such."""
    base = open_base(folder)
    config = read_config(folder)
    state = {name: base.reader[name] for name in base.plain}
    shape = AutoConfig.for_model(**with_numbers(base.config))
    make_portable(shape)
    places = PartLoader(build_skeleton(shape, torch.float32), AsDense(base, _on_meta(shape)))
    opened = tuple(f"{path}." for path in places.experts)
    state |= {name: places.tensors[name] for name in places.slices if name.endswith(".bias")}
    for one in places.slices.values():
        state.pop(one.key, None)
    table = {}
    for key, weight in places.memory_names.items():
        name, stored = weight.removesuffix(".weight"), key.removesuffix(".weight")
        if stored in base.layers:
            form = base.form(stored)
        elif name.startswith(opened) and name != weight:
            # An expert in full precision: those of a layer are opened together.
            form = Dense(places.tensors[key])
            state.pop(key, None)
        else:
            continue
        table[name] = {"shape": form.shape, "bias": f"{stored}.bias" in state, "form": form.spec()}
        state |= {f"{name}.form.{part}": value for part, value in form.state_dict().items()}
    for head, owner in base.tied_heads.items():
        tied = Tied(base.shape(owner), owner)
        table[head] = {"shape": tied.shape, "bias": False, "form": tied.spec()}
    loading.register_quantizer()
    config.quantization_config = loading.CompressedQuantizationConfig(table)
    config.name_or_path = str(folder)
    _untie_packed_head(config, base)
    auto_class = AUTO_CLASSES[head_of(config) or Head.NEXT_TOKEN]
    model_class = auto_class._model_mapping[type(config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype
    )
    add_generation_config(model, folder)
    return model


def add_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give a model that was made of tensors the settings of its folder for writing, if there are any."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def _untie_packed_head(config: Any, base: Base) -> None:
    """A head with codes of its own shares nothing with the embeddings, whatever the config has kept saying."""
    if "lm_head" in base.layers:
        config.tie_word_embeddings = False


def add_corrections(
    model: PreTrainedModel, corrections: Mapping[str, LowRank], folder: Path
) -> None:
    """Add a low-rank correction to each of these layers, in the model's dtype and where the layer is.

    Raises CheckpointError for a layer that the model lacks or whose shape is another.
    """
    take_apart(model, corrections)
    modules = dict(model.named_modules())
    for name, correction in corrections.items():
        layer = modules.get(name)
        if layer is None or not (isinstance(layer, CompressedLinear) or is_linear(layer)):
            raise CheckpointError(
                f"{folder}: the adapter has factors for {name}, which is no linear layer of {type(model).__name__}"
            )
        form = layer.form if isinstance(layer, CompressedLinear) else Dense(weight_oi(layer))
        assert isinstance(form, Form)
        if correction.shape != form.shape:
            raise CheckpointError(
                f"{folder}: the adapter's factors for {name} make {correction.shape}; the layer is {form.shape}"
            )
        device = next(iter(form.state_dict().values())).device
        terms = [form, correction.unpacked(model.dtype).to(device)]
        parent, _, leaf = name.rpartition(".")
        corrected = CompressedLinear(Sum(terms), bias_of(layer), model.dtype)
        setattr(model.get_submodule(parent), leaf, corrected)
