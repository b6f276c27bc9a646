"""How a model of each kind of output is loaded, recognised by its config, and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from calibration.heads import Head

AUTO_CLASSES: Mapping[Head, Any] = {
    Head.NEXT_TOKEN: AutoModelForCausalLM,
    Head.CLASSES: AutoModelForSequenceClassification,
    Head.FEATURES: AutoModel,
    Head.IMAGE_TEXT: AutoModelForImageTextToText,
}


def head_of(config: PretrainedConfig) -> Head | None:
    """The head of the class that config.json names; of a language model if it names none. None: of no kind here.

    A class that transformers has not, as first converters and authors spelt it, is judged by the end of its name.
    """
    if getattr(config, "is_encoder_decoder", False):
        return None
    kind = config.model_type
    bidirectional = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    names = _known(kind, list(getattr(config, "architectures", None) or []))
    if not names:
        return (
            Head.NEXT_TOKEN
            if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not bidirectional
            else None
        )
    if getattr(config, "vision_config", None) is not None:
        sees = _classes(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
        if any(name in sees for name in names):
            return Head.IMAGE_TEXT
    if any(name in _classes(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) for name in names):
        return None if bidirectional else Head.NEXT_TOKEN
    if any(name in _classes(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) for name in names):
        return Head.CLASSES
    return Head.FEATURES if any(name in _classes(MODEL_MAPPING_NAMES) for name in names) else None


def predictions(output: Any) -> Tensor:
    """What counts of what a model returned: logits, or hidden states, (b, t, v); of classes (b, 1, v)."""
    found: Tensor | None = getattr(output, "logits", None)
    if found is None:
        hidden: Tensor = output.last_hidden_state
        return hidden
    return found[:, None] if found.ndim == 2 else found


def _classes(mapping: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for entry in mapping.values():
        found.update([entry] if isinstance(entry, str) else entry)
    return found


def _known(kind: str, names: Sequence[str]) -> list[str]:
    """The classes of transformers that are meant; empty if none is, as where config.json names none.

    transformers goes by model_type, so it loads what other spellings name: LLaMAForCausalLM, MPTForCausalLM.
    """
    if not names or any(hasattr(transformers, str(name)) for name in names):
        return list(names)
    tables: Mapping[tuple[str, ...], Mapping[str, Any]] = {
        ("ForCausalLM", "LMHeadModel"): MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        ("ForSequenceClassification",): MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ("Model",): MODEL_MAPPING_NAMES,
    }
    for ends, table in tables.items():
        if kind in table and any(str(name).endswith(ends) for name in names):
            return list(_classes({kind: table[kind]}))
    return list(names)
