"""The entry of the native format in transformers' table of configs, which reads a checkpoint when there is one.

Not shipped: a checkpoint's own copy of the forms serves that checkpoint and must not claim others.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig


class NativeConfig(PretrainedConfig):
    """Has the `model_type` of native checkpoints; reading one imports what loads it."""

    model_type = "compress"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The base model's config, as `CompressedConfig` reads it."""
        from compress.forms.loading import CompressedConfig

        return CompressedConfig.from_dict(config_dict, **kwargs)


def register() -> None:
    """Let AutoConfig, and all that asks it, know native checkpoints."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(NativeConfig.model_type, NativeConfig, exist_ok=True)
