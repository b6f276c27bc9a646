"""A model without its weights, and the weights of one part of it at a time.

The skeleton has the architecture's own modules with parameters on `meta` and real buffers (rotary tables, masks), so
the model's own forward can run as soon as the parts it touches are loaded. transformers' own loader places the
tensors, so renamed keys and missing prefixes (GPT-2) need no code for a family. Experts are unstacked (see
`calibration.experts.module`), and placed here: each is a module of its own whatever the checkpoint and the model do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.loading_report import LoadStateDictInfo

from calibration.errors import InputError
from calibration.experts.module import experts_in, unstack
from calibration.experts.names import (
    Slice,
    Sliced,
    is_stacked,
    own_name,
    slices_of,
    stacked_names,
    stored_layout,
)
from calibration.heads import Head
from calibration.outputs import AUTO_CLASSES, head_of


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture of `config` with its head: parameters on meta, buffers real, in eval mode, experts unstacked.

    Raises InputError for a config of values that no such model has: a negative size, an activation of no name.
    """
    from accelerate import init_empty_weights  # not there where checkpoints are only loaded

    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AUTO_CLASSES[head_of(config) or Head.NEXT_TOKEN].from_config(
                config, dtype=dtype
            )
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(
            f"{config.name_or_path or 'the model'}: transformers makes no {config.model_type} of its config.json "
            f"({type(error).__name__}: {error}); correct it, or download it again"
        ) from error
    model.config.use_cache = (
        False  # a cache would be among what blocks are called with, and grow at every call
    )
    model.eval()
    unstack(model)
    return model


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks of the language model: a ModuleList of GradientCheckpointingLayer.

    Of several, the one of the configured length. A model without any has a list of that length (CTRL, GPT-1). Other
    towers of the model (images, sounds) have lists of their own. Raises InputError if there is none.
    """
    wanted = _configured_blocks(model)
    for tower in (language_model(model), ""):
        found = list(_lists_in(model, tower))
        checkpointing = [entry for entry in found if _is_checkpointing(entry[1])]
        sized = [entry for entry in found if len(entry[1]) == wanted]
        if checkpointing or sized:
            candidates = checkpointing or sized[:1]
            return max(candidates, key=lambda entry: (len(entry[1]) == wanted, len(entry[1])))
    raise InputError(
        f"{type(model).__name__} has no list of decoder blocks (a ModuleList of transformers' "
        f"GradientCheckpointingLayer, or one of {wanted}), so it can't be walked block by block",
        option="model",
    )


def _lists_in(model: nn.Module, tower: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in model.get_submodule(tower).named_modules(prefix=tower):
        if isinstance(module, nn.ModuleList) and len(module):
            yield name, module


def _is_checkpointing(entries: nn.ModuleList) -> bool:
    return all(isinstance(entry, GradientCheckpointingLayer) for entry in entries)


def language_model(model: nn.Module) -> str:
    """The name of the part that reads text; empty for a model that is nothing else."""
    tower = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    names = (name for name, module in model.named_modules() if module is tower)
    return next(names, "")


def _configured_blocks(model: nn.Module) -> int | None:
    """The number of blocks that the config of the language model gives."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    wanted: int | None = getattr(config, "num_hidden_layers", None)
    return wanted


def open_parts(
    config: PretrainedConfig, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> PartLoader:
    """The skeleton of a checkpoint's model with the loader of its tensors.

    A head that the checkpoint stores, and that is not its embeddings, is one of its own whatever `config` says of
    tying, as for transformers; `config` says so afterwards. Raises InputError as `PartLoader`.
    """
    loader = PartLoader(build_skeleton(config, dtype), tensors)
    if not loader.untied:
        return loader
    if any(name not in loader.keys_of() for name in loader.tied):
        raise InputError(
            f"config.json ties {_some(sorted(loader.tied))}, but the checkpoint stores {_some(sorted(loader.untied))} "
            "with values of its own, and not the others; set tie_word_embeddings to false and store all of them",
            option="model",
        )
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return PartLoader(build_skeleton(config, dtype), tensors)


class PartLoader:
    """Loads the weights below a prefix of a skeleton from a mapping of tensors, and frees them again."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` may be lazy; its keys are the checkpoint's own names.

        Raises InputError if a weight is missing, or if the model has no place for a tensor.
        """
        self.model, self.experts = model, dict(experts_in(model))
        self._mapping: list[Any] = list(get_model_conversion_mapping(model) or ())
        self.tied: Mapping[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        """Parameters that the configuration ties to others, with those: a head to embeddings, a block in two places."""
        self.known = frozenset(model.state_dict())
        """Names of the model's own tensors: a checkpoint may hold others, such as draft heads."""
        self.slices: dict[str, Slice] = {}
        """Of stacked experts in the checkpoint, by the names that their layers' tensors have in the model."""
        self.converted: set[str] = set()
        """Tensors of the checkpoint of which loading makes others: parts of one, or one of several."""
        self.memory_names = self._resolve_names(tensors)
        self.whole = tensors
        """The checkpoint's tensors as it stores them."""
        self.tensors = Sliced(tensors, self.slices) if self.slices else tensors
        """The checkpoint's tensors by its names for them; of stacked experts, the slices."""
        self._refuse_missing()
        self._refuse_unplaced()
        self._keys: dict[str, list[str]] = {}
        for key, name in self.memory_names.items():
            self._keys.setdefault(name, []).append(key)
        self.untied = frozenset(self._find_untied())
        """Parameters among these that the checkpoint stores with values of their own."""

    def _resolve_names(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """For each tensor of the checkpoint, the name of the (first) parameter it becomes part of."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        own, prefix = self.model.state_dict(), self.model.base_model_prefix
        stacks = stacked_names(self.experts)
        known: dict[str, Any] = own | dict.fromkeys(stacks, True)
        names: dict[str, str] = {}
        for key in tensors:
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name not in stacks:
                names[key] = name
                if pattern is not None:
                    self.converted.add(key)
                continue
            path, leaf = stacks[name]
            layout = self.experts[path].layout
            place, operations = _made_by(pattern, converters)
            if is_stacked(operations):
                shape = partial(_shape, tensors, key)
                stored = stored_layout(layout, operations, shape, leaf)
                slices = slices_of(path, layout, key, leaf, stored, place)
                self.slices |= slices
                names |= {unstacked: unstacked for unstacked in slices}
            else:
                names[key] = own_name(path, layout, key, place, leaf)
        # Some writers keep the head of two that are tied, and drop the embeddings: it is these, too.
        have = set(names.values())
        absent = {name: other for name, other in self.tied.items() if other not in have}
        self._renamed = {key: absent[name] for key, name in names.items() if name in absent}
        return names | self._renamed

    def _find_untied(self) -> Iterator[str]:
        keys = self.keys_of()
        for name, source in self.tied.items():
            own, other = keys.get(name, []), keys.get(source, [])
            if len(own) == len(other) == 1 and not _equal(
                self.tensors[own[0]], self.tensors[other[0]]
            ):
                yield name

    def is_converted(self, name: str) -> bool:
        """Whether a parameter is made from tensors of other shapes on loading (stacked experts)."""
        return any(
            target in name
            for entry in self._mapping
            if isinstance(entry, WeightConverter)
            for target in entry.target_patterns
        )

    def _refuse_missing(self) -> None:
        have = set(self.memory_names.values())
        missing = [
            name
            for name, _ in self.model.named_parameters(remove_duplicate=False)
            if name not in have and name not in self.tied and not self.is_converted(name)
        ]
        if missing:
            raise InputError(f"the checkpoint lacks the weights {_some(missing)}", option="model")

    def _refuse_unplaced(self) -> None:
        """Tensors that the model would not read; transformers' own exceptions (old buffers) may stay."""
        known = self.model.state_dict()
        extra = {key for key, name in self.memory_names.items() if name not in known}
        if not extra:
            return
        # A pattern may fit the checkpoint's name or the one after renaming.
        names = {name for key in extra for name in (key, self.memory_names[key])}
        info = LoadStateDictInfo(set(), names, set(), [], {}, set())
        self.model._adjust_missing_and_unexpected_keys(info)
        unplaced = sorted(
            key for key in extra if {key, self.memory_names[key]} <= info.unexpected_keys
        )
        if unplaced:
            raise InputError(
                f"{type(self.model).__name__} as config.json describes it has no place for the checkpoint's "
                f"{_some(unplaced)}; correct config.json (the number of layers, the architecture), "
                "or remove these tensors from the checkpoint",
                option="model",
            )

    def load(
        self, prefixes: Iterable[str], device: torch.device, *, without: Collection[str] = ()
    ) -> None:
        """Materialise every parameter whose name starts with one of the prefixes ("" is all).

        `without`: modules that something else has taken the place of.
        """
        starts, have = tuple(prefixes), set(self.memory_names.values())
        tied = {n: o for n, o in self.tied.items() if n.startswith(starts) and n not in have}
        owners = set(tied.values())
        wanted = {
            key: self.tensors[key]
            for key, name in self.memory_names.items()
            if (name.startswith(starts) and name.rpartition(".")[0] not in without)
            or name in owners
        }
        self._place(wanted, device)
        for name, owner in tied.items():
            self._set(name, self.model.get_parameter(owner))
        for owner in (owner for owner in owners if not owner.startswith(starts)):
            self._set(owner, _on_meta(self.model.get_parameter(owner)))

    def load_outside(self, prefix: str, device: torch.device) -> None:
        """Materialise everything that is not below the prefix: embeddings, final norm, head."""
        wanted = {
            k: self.tensors[k]
            for k, name in self.memory_names.items()
            if not name.startswith(prefix)
        }
        self._place(wanted, device)
        # The model may be another checkpoint's, which ties them.
        own = {name: self.model.get_parameter(name) for name in self.untied}
        self.model.tie_weights()
        for name, parameter in own.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, parameter)

    def _place(self, wanted: dict[str, Tensor], device: torch.device) -> None:
        wanted = self._place_experts(wanted, device)
        if isinstance(self.tensors, Sliced):
            self.tensors.forget()
        config = LoadStateDictConfig(
            dtype=self.model.dtype, device_map={"": str(device)}, weight_mapping=self._mapping
        )
        transformers_logging.disable_progress_bar()
        tensors = {self._renamed.get(key, key): tensor for key, tensor in wanted.items()}
        info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            detail = info.mismatched_keys or info.conversion_errors or info.error_msgs
            raise InputError(
                f"weights that do not fit the architecture of config.json: {detail}",
                option="model",
            )

    def _place_experts(self, wanted: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Place the tensors of unstacked experts, and return the others."""
        paths, others = tuple(f"{path}." for path in self.experts), {}
        for key, tensor in wanted.items():
            name = self.memory_names[key]
            if not name.startswith(paths):
                others[key] = tensor
                continue
            shape = tuple(self.model.get_parameter(name).shape)
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{key}: its shape in the checkpoint is {tuple(tensor.shape)}, but config.json makes it {shape}",
                    option="model",
                )
            placed = tensor.to(device, self.model.dtype)
            self._set(name, nn.Parameter(placed, requires_grad=False))
        return others

    def unload(self, module: nn.Module) -> None:
        """Put a module's parameters back on meta; its buffers stay (they are not in the checkpoint)."""
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, _on_meta(parameter))

    def unload_outside(self, prefix: str) -> None:
        """Put everything that is not below the prefix back on meta; `load_outside` brings it back."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(prefix):
                self._set(name, _on_meta(parameter))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, parameter)

    def keys_of(self) -> dict[str, list[str]]:
        """Checkpoint keys by the parameter they become."""
        return self._keys


def _made_by(
    pattern: str | None, converters: Sequence[WeightConverter]
) -> tuple[int, Sequence[object]]:
    """The place of a tensor among those that become one parameter, and the operations that make it of them."""
    for converter in converters:
        if pattern is not None and pattern in converter.source_patterns:
            return converter.source_patterns.index(pattern), converter.operations
    return 0, ()


@runtime_checkable
class _WithShapes(Protocol):
    """Tensors whose shapes are known before they are read."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""


def _shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    return tuple(tensors.shape(key) if isinstance(tensors, _WithShapes) else tensors[key].shape)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b if a.dtype == b.dtype else b.to(a.dtype))


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _some(names: Sequence[str]) -> str:
    """The first five names, and how many there are besides."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
