"""Pre-flight checks of a base checkpoint, before any work: every tensor of it is read once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from calibration.errors import InputError
from calibration.skeleton import PartLoader, decoder_blocks
from compress.bases import AsDense, Base, SlicedView, open_base
from compress.errors import CheckpointError
from compress.exports.peft import local_reference
from compress.families.given import Held
from compress.forms.dense import Dense
from compress.models.model_config import with_numbers
from compress.models.resolve import Wanted, is_hub_id, snapshot
from compress.planning.make import block_linears, other_shapes
from compress.subjects.corrected import CorrectedBase
from compress.subjects.subject import Original

HEAD = "lm_head.weight"
EQUAL = 1e-2
"""Relative L2 difference up to which tensors are the same but for the dtype that they are stored in."""
UNCHANGED = 3e-3
"""Relative L2 difference of a weight above which there is something to correct; rounding to bf16 makes 1.7e-3."""
PIECE = 1 << 24
"""Numbers that are compared at once: embeddings in fp32 take more than a model of few blocks."""
_FREE = frozenset(
    (
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
        *("quantization_config", "use_cache", "tie_word_embeddings", "model_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"),
        *("pretraining_tp", "_attn_implementation", "auto_map", "unk_token_id"),
    )
)
"""Entries of config.json in which two checkpoints of one model may differ."""


_WANTED = Wanted(
    "base_checkpoint",
    "name a folder with config.json and safetensors",
    "name a folder with config.json and safetensors, or an id of the hub (owner/name, or owner/name@revision)",
)


@dataclass(frozen=True)
class Named:
    """A checkpoint that the option names."""

    spec: str
    """The value of the option."""
    base: Base
    reference: str
    """The name by which an adapter will refer to it."""
    revision: str | None
    """The commit, for one of the hub."""


def open_named(spec: str) -> Named:
    """The checkpoint in a folder, or of the hub. Raises CheckpointError saying what was found."""
    folder, revision = Path(spec).expanduser(), None
    if folder.name in ("", ".."):  # which nobody else could follow
        folder = folder.resolve()
    reference = local_reference(str(folder))
    if not folder.exists() and is_hub_id(spec):
        folder, revision = snapshot(spec, _WANTED)
        reference = spec.partition("@")[0]
    try:
        return Named(spec, open_base(folder), reference, revision)
    except CheckpointError as error:
        raise CheckpointError(str(error), option="base_checkpoint") from error


def checked(named: Named, original: Original) -> CorrectedBase:
    """The base, ready to be built on.

    Raises CheckpointError naming the tensor or the entry of config.json that does not belong to the original.
    """
    base, model = named.base, original.loader.model
    try:
        parsed = _parsed(base, original.config)
        whole = AsDense(base, model)
        loader = _loader(whole, model)
        view = SlicedView(whole, loader) if loader.slices else whole
        _refuse_other_shapes(view, loader)
        pair = _Pair(view, loader, original.loader)
        packed, expanded = _forms_of(view)
        _refuse_headless(base, parsed, original.config, view)
        held = tuple(_held(pair, packed))
        changes = dict(_changes(pair))
    except CheckpointError as error:
        raise CheckpointError(str(error), option="base_checkpoint") from error
    prefix, blocks = decoder_blocks(model)
    biases = {f"{layer}.bias" for layer in block_linears(prefix, blocks)}
    read = tuple(n for n in changes if n.startswith(f"{prefix}.") and n not in biases)
    stay = {name: changes[name] for name in changes if name not in read}
    return CorrectedBase(
        original=original,
        notes=tuple(_notes(stay, expanded, view)),
        spec=named.spec,
        view=view,
        into=loader,
        held=held,
        packed_bytes=packed,
        changed=read,
        reference=named.reference,
        revision=named.revision,
    )


def _notes(stay: Mapping[str, float], expanded: Mapping[str, int], view: AsDense) -> Iterator[str]:
    """Remarks on the base for the report."""
    yield from (f"the base checkpoint: {remark}" for remark in view.base.remarks)
    for name, difference in stay.items():
        yield f"the base checkpoint's {name} differs from the original's by {difference:.1%}, and stays"
    if expanded:
        yield (
            f"no form of this toolkit holds the codes of {len(expanded)} layers ({view.base.description}): a native "
            f"export has them as ordinary weights, {sum(expanded.values()):,} bytes instead of "
            f"{sum(map(view.nbytes, expanded)):,}; the adapter leaves them as they are"
        )


@dataclass(frozen=True)
class _Pair:
    """The two checkpoints of one model."""

    view: AsDense
    loader: PartLoader
    original: PartLoader

    def tensors(self) -> Iterator[tuple[str, str, str]]:
        """Every parameter that both store as one tensor: its name in the model, in the base and in the original."""
        theirs, ours = self.loader.keys_of(), self.original.keys_of()
        for name, keys in theirs.items():
            if len(keys) == len(ours.get(name, [])) == 1:
                yield name, keys[0], ours[name][0]

    def difference(self, key: str, own: str) -> float:
        """The relative difference of two tensors. Raises CheckpointError for other shapes, NaN and infinity."""
        found, before = self.view[key], self.original.tensors[own]
        for whose, tensor in (
            (f"{self.view.base.folder}: {key}", found),
            (f"the original's {own}", before),
        ):
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{whose} holds NaN or infinity; download the checkpoint again"
                )
        # The headers have told this of all but tensors that loading merges.
        if found.shape != before.shape:
            raise CheckpointError(
                f"{self.view.base.folder}: {key} has the shape {tuple(found.shape)}, in the original it has "
                f"{tuple(before.shape)}; name the model that the checkpoint was made from"
            )
        return relative_difference(found, before)


def _parsed(base: Base, config: PretrainedConfig) -> PretrainedConfig:
    """The base's config. Raises CheckpointError for another architecture than the original's."""
    kind = base.config.get("model_type")
    if kind != config.model_type:
        raise CheckpointError(
            f"{base.folder}: its model_type is {kind!r}, the original's is {config.model_type!r}; name the model that "
            "the checkpoint was made from"
        )
    try:
        parsed: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(with_numbers(base.config))
    except (StrictDataclassError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{base.folder}: its config.json is not valid ({why})") from error
    ours, theirs = config.to_dict(), parsed.to_dict()
    for key in sorted((set(ours) | set(theirs)) - _FREE):
        if not _same(ours.get(key), theirs.get(key)):
            raise CheckpointError(
                f"{base.folder}: {key} in its config.json is {theirs.get(key)!r}, in the original's {ours.get(key)!r}; "
                "name the model that the checkpoint was made from"
            )
    return parsed


def _same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4)
    return a == b


def _forms_of(view: AsDense) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the form of every packed tensor, and of those whose codes no form holds. Raises CheckpointError."""
    packed, expanded = {}, {}
    for key in view:
        if view.is_packed(key):
            form = view.form(key)
            packed[key] = form.n_bytes()
            if isinstance(form, Dense):
                expanded[key] = form.n_bytes()
    return packed, expanded


def _loader(view: AsDense, model: PreTrainedModel) -> PartLoader:
    try:
        return PartLoader(model, view)
    except InputError as error:
        raise CheckpointError(f"{view.base.folder}: {error.reason}") from error


def _refuse_other_shapes(view: AsDense, loader: PartLoader) -> None:
    for key, found, shape in other_shapes(loader, view):
        raise CheckpointError(
            f"{view.base.folder}: {key} has the shape {found}, in the original it has {shape}; name the model "
            "that the checkpoint was made from"
        )


def _refuse_headless(
    base: Base, parsed: PretrainedConfig, config: PretrainedConfig, view: AsDense
) -> None:
    """Raises CheckpointError if the base says that it has a head of its own, and has none."""
    if config.tie_word_embeddings and not parsed.tie_word_embeddings and HEAD not in view:
        raise CheckpointError(
            f"{base.folder}: tie_word_embeddings in its config.json is false, in the original's true, and it has no "
            f"{HEAD}; correct its config.json, or download the checkpoint again"
        )


def _held(pair: _Pair, packed: Mapping[str, int]) -> Iterator[Held]:
    """The linear layers of the blocks whose weight is not the original's any more; `packed`: bytes of forms."""
    linears = block_linears(*decoder_blocks(pair.loader.model))
    for name, key, own in pair.tensors():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in linears:
            continue
        n_bytes = pair.view.nbytes(key)
        if pair.difference(key, own) > UNCHANGED or key in packed:
            yield Held(layer, n_bytes, packed.get(key, n_bytes))


def _changes(pair: _Pair) -> Iterator[tuple[str, float]]:
    """Tensors that get no correction and are not the original's: their names in the model, and by how much."""
    linears = block_linears(*decoder_blocks(pair.loader.model))
    for name, key, own in pair.tensors():
        if name.removesuffix(".weight") in linears or pair.view.is_packed(key):
            continue
        difference = pair.difference(key, own)
        if difference > EQUAL:
            yield name, difference


def relative_difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, Frobenius; 0 for two noughts."""
    lost = size = 0.0
    for part, own in zip(a.reshape(-1).split(PIECE), b.reshape(-1).split(PIECE), strict=True):
        lost += float((part.float() - own.float()).square().sum())
        size += float(own.float().square().sum())
    return math.sqrt(lost / size) if size > 0 else float(lost > 0)
