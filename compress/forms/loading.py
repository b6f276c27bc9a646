"""How transformers loads a native checkpoint: stock model class, layers swapped before the weights.

config.json has the private `model_type: compress`, so that whoever does not know it fails instead
of filling the model with random weights. `CompressedConfig` reads it and returns the base model's
own config, which carries the layers' forms as its `quantization_config`.

A native checkpoint brings this file along, with those that it imports and those of the forms that it holds:
`trust_remote_code=True` loads it where the toolkit is absent.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from calibration.experts.module import shaped, unstack_one

from .base import Form
from .build import empty
from .embedding import CompressedEmbedding
from .linear import CompressedLinear

FORMAT = "compress"
FORMAT_VERSION = 6
READ_VERSIONS = (1, 2, 3, 4, 5, 6)
"""1 had no products of forms, and no offsets; 2 nothing sparse, and nothing shared; 3 no embeddings; 4 no experts;
5 no affine grids."""

logger = logging.get_logger(__name__)


class CompressedConfig(PretrainedConfig):
    """Stands in config.json for the config of the base model, which reading it returns."""

    model_type = FORMAT

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The base model's config (with unused arguments, if `return_unused_kwargs`).

        Raises ValueError for a format version that this code does not read.
        """
        version = config_dict.get("format_version")
        if version not in READ_VERSIONS:
            raise ValueError(
                f"format_version of config.json is {version!r}, and this code reads "
                f"{', '.join(map(str, READ_VERSIONS))}; install the release of the toolkit that wrote "
                "the checkpoint, "
                "or use the code shipped with it (trust_remote_code=True)"
            )
        register_quantizer()
        base = dict(config_dict["base_config"])
        base["quantization_config"] = CompressedQuantizationConfig(config_dict["layers"])
        config_class = type(AutoConfig.for_model(config_dict["base_model_type"]))
        return config_class.from_dict(base, **kwargs)


class CompressedQuantizationConfig(QuantizationConfigMixin):
    """The forms of the layers: `layers[name] = {"shape": [o, i], "bias": bool, "form": spec}`."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        """Take the table of layers from config.json."""
        self.quant_method = FORMAT  # type: ignore[assignment]
        self.layers = dict(layers)

    def get(self, key: str, default: Any = None) -> Any:
        """The attribute: transformers asks a config that it takes for the dictionary of one."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that does not load.

        A config written by the base model's config class has its public `model_type`; with a
        quant_method that transformers does not know it would load as random weights, without one
        it does not load.
        """
        return {
            "error": "this config.json was not written by the toolkit and does not describe a "
            "checkpoint; use the folder that the model was loaded from"
        }


class CompressedQuantizer(HfQuantizer):
    """Puts a CompressedLinear in the place of every compressed layer before weights are loaded."""

    requires_calibration = True
    quantization_config: CompressedQuantizationConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        given = self.quantization_config.layers
        _unstack(model, given)
        beyond = _beyond(model, given)
        layers = {name: layer for name, layer in given.items() if name not in beyond}
        self._swapped = [_swap(model, name, layer) for name, layer in layers.items()]
        _link(model)
        _untie(model, [name for name, layer in layers.items() if owner_of(layer["form"])])
        self._dtypes = {name: tensor.dtype for name, tensor in _stored(model).items()}
        self._watch = _Watch(model, given)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self._watch.finish()
        for name, parameter in model.named_parameters():
            if ".form." in name:  # the loading made new ones
                parameter.requires_grad = False
        self._model = model
        for module in self._swapped:
            vars(module).pop("weight", None)
        for name, tensor in model.state_dict(keep_vars=True).items():
            wanted = self._dtypes.get(name, tensor.dtype)
            if tensor.is_meta or tensor.is_floating_point() != wanted.is_floating_point:
                raise RuntimeError(f"{name} was loaded as {tensor.dtype} on {tensor.device}")
            # transformers 5.20 leaves what it renames, a base model's without the head, in the file's dtype.
            tensor.data = tensor.data.to(wanted)

    def is_serializable(self) -> bool:
        """Whether save_pretrained may write the model: only as a state to resume training from.

        Its config.json does not load: see CompressedQuantizationConfig.to_dict.
        """
        if any(p.requires_grad for name, p in self._model.named_parameters() if ".form." in name):
            logger.warning(
                "save_pretrained writes a state to resume training from, which does not load as a "
                "model; compress.save_trained writes one that does"
            )
            return True
        logger.warning(
            "save_pretrained cannot write a model in compressed form; copy the folder that it was "
            "loaded from"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained on top."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether a Trainer may train the model as it is: the factors of low-rank layers can be."""
        return True


class _Watch:
    """Makes incomplete or foreign weights an error: transformers only reports them."""

    def __init__(self, model: PreTrainedModel, layers: Collection[str]) -> None:
        self._model, self._layers, self._seen = model, layers, False
        self._adjust = model._adjust_missing_and_unexpected_keys
        vars(model)["_adjust_missing_and_unexpected_keys"] = self._check

    def _check(self, info: Any) -> None:
        self._adjust(info)
        self._seen = True
        info.unexpected_keys -= _beyond(self._model, self._layers, info.unexpected_keys)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors"):
            found = getattr(info, what)
            if found:
                raise ValueError(
                    f"the checkpoint does not fit its config.json, {len(found)} {what}: "
                    f"{', '.join(sorted(map(str, found))[:5])}; download it again"
                )

    def finish(self) -> None:
        del vars(self._model)["_adjust_missing_and_unexpected_keys"]
        if not self._seen:
            raise RuntimeError(
                "this version of transformers loads weights in a way that cannot be checked; "
                "known to work: 5.20 to 5.23"
            )


def owner_of(spec: Mapping[str, Any]) -> str:
    """The module of the embeddings whose form a head's form, or a term of it, reads; empty if it reads none."""
    if spec["form"] == "tied":
        return str(spec["owner"])
    return next(filter(None, map(owner_of, spec.get("terms", ()))), "")


def _unstack(model: PreTrainedModel, layers: Collection[str]) -> None:
    """Give experts modules of their own wherever layers inside of one are compressed: then all of them are."""
    prefix = f"{model.base_model_prefix}."
    names = {name for layer in layers for name in (layer, layer.removeprefix(prefix))}
    for path, module in list(model.named_modules()):
        layout = shaped(module)
        if layout is not None and any(name.startswith(f"{path}.") for name in names):
            unstack_one(model, path, layout)


def _swap(model: PreTrainedModel, name: str, layer: Mapping[str, Any]) -> nn.Module:
    """Put an empty module with the layer's form in its place, on its device and in its dtype."""
    name = _path_in(model, name)
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"config.json compresses {name}, which {type(model).__name__} lacks"
        ) from None
    parent, _, leaf = name.rpartition(".")
    like: dict[str, Any] = {"dtype": old.weight.dtype, "device": old.weight.device}
    o, i = layer["shape"]
    form = empty(layer["form"], (o, i), **like)
    if isinstance(old, nn.Embedding):
        embedding = CompressedEmbedding(form, old)
        setattr(model.get_submodule(parent), leaf, embedding)
        return embedding
    bias = torch.empty(o, **like) if layer["bias"] else None
    new = CompressedLinear(form, bias, like["dtype"])
    # GPT-2 and others initialise the weight of a child by its name; let there be one to pass over.
    placeholder: Any = torch.empty(0)
    placeholder._is_hf_initialized = True
    vars(new)["weight"] = placeholder
    setattr(model.get_submodule(parent), leaf, new)
    return new


def _stored(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The tensors of all forms by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".form." in name}


def _path_in(model: PreTrainedModel, name: str) -> str:
    """A base model without its head has the same layers without the prefix."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return name.removeprefix(f"{model.base_model_prefix}.")
    return name


def _beyond(
    model: PreTrainedModel, layers: Collection[str], names: Collection[str] | None = None
) -> set[str]:
    """Those of the names, all layers by default, that belong to a head, where the model is the base without it."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is not model or not any(name.startswith(prefix) for name in layers):
        return set()
    return {name for name in (layers if names is None else names) if not name.startswith(prefix)}


def _link(model: PreTrainedModel) -> None:
    """Let forms that read others' read them. Raises ValueError for one that is not there."""
    modules = dict(model.named_modules())
    for module in modules.values():
        if isinstance(module, Form):
            module.link(lambda path: modules.get(_path_in(model, path)))


def _untie(model: PreTrainedModel, heads: Collection[str]) -> None:
    """Let transformers tie no parameter of these heads, which have none: their forms read the embeddings'."""
    weights = {f"{_path_in(model, name)}.weight" for name in heads}
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        tied = dict(getattr(model, attribute, None) or {})
        setattr(model, attribute, {k: v for k, v in tied.items() if k not in weights})


def register_quantizer() -> None:
    """Let this module serve the checkpoints whose config it reads.

    Several copies can live in one process: the installed one and one from each checkpoint. The
    one that read a config last is the one that loads the weights that follow.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[FORMAT] = CompressedQuantizationConfig
    AUTO_QUANTIZER_MAPPING[FORMAT] = CompressedQuantizer
