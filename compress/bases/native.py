"""The toolkit's own checkpoints, whose layers are forms already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress.bases.base import Base, Loading
from compress.bases.folder import CheckpointFolder
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.build import empty
from compress.forms.loading import FORMAT, READ_VERSIONS, owner_of
from compress.forms.tied import Tied


class NativeBase(Base, name="native"):
    """Layers by the table in config.json."""

    loads_itself = True
    loading = Loading(
        packages=("compress-llm",),
        imports=("import compress",),
        arguments={},
        peft=False,
        vllm=None,
    )

    @classmethod
    def recognises(cls, folder: CheckpointFolder) -> bool:
        """Whether the model type is the private one that only the toolkit loads."""
        return folder.config.get("model_type") == FORMAT

    def _model_config(self, folder: CheckpointFolder) -> Mapping[str, Any]:
        config = folder.config
        version = config.get("format_version")
        if version not in READ_VERSIONS:
            raise CheckpointError(
                f"{folder.path}: format_version {version!r} is not supported; supported: "
                f"{', '.join(map(str, READ_VERSIONS))}"
            )
        absent = [k for k in ("base_config", "base_model_type", "layers") if k not in config]
        if absent:
            raise CheckpointError(
                f"{folder.path}: config.json lacks {', '.join(absent)}; download the checkpoint again"
            )
        return {**config["base_config"], "model_type": config["base_model_type"]}

    def _settings(self, folder: CheckpointFolder) -> Mapping[str, Any]:
        return {"layers": folder.config["layers"]}

    def _find_layers(self) -> tuple[str, ...]:
        tied = self.tied_heads
        layers = [name for name in self.settings["layers"] if name not in tied]
        for name in layers:
            obstacle = self._empty(name).obstacle_to_correction()
            if obstacle:
                raise CheckpointError(
                    f"{self.folder}: {name} {obstacle}; compress the model anew with --method eora and this method as "
                    "its --base"
                )
        return tuple(layers)

    @property
    def tied_heads(self) -> Mapping[str, str]:
        """Those whose form is the embeddings' and nothing else; with a correction of its own, a head is a layer."""
        entries = self.settings["layers"].items()
        return {
            name: owner_of(entry["form"])
            for name, entry in entries
            if entry["form"]["form"] == Tied.kind
        }

    @property
    def grid(self) -> str:
        """The forms that the layers are stored in: "4-bit g64, low rank"."""
        labels = {part.label() for name in self.layers for part in self._empty(name).parts()}
        return ", ".join(sorted(labels - {""}))

    @property
    def producer(self) -> str | None:
        """The toolkit: nobody else writes this format."""
        return "compress-llm"

    def tensors_of(self, name: str) -> list[str]:
        """The tensors of the layer's form."""
        return [f"{name}.form.{key}" for key in self._empty(name).state_dict()]

    def shape(self, name: str) -> tuple[int, int]:
        """The shape in config.json's table of layers."""
        o, i = self.settings["layers"][name]["shape"]
        return int(o), int(i)

    def form(self, name: str) -> Form:
        """The form as it was written, its tensors read."""
        form = self._empty(name)
        state = {}
        for key, tensor in form.state_dict().items():
            stored = f"{name}.form.{key}"
            if stored not in self.reader or self.reader.shape(stored) != tuple(tensor.shape):
                found = self.reader.shape(stored) if stored in self.reader else "missing"
                raise CheckpointError(
                    f"{self.folder}: {stored} is {found}; config.json says {tuple(tensor.shape)}"
                )
            state[key] = self.reader[stored]
        form.load_state_dict(state, assign=True)
        for part in form.parts():
            part.link(self._holder)
        return form

    def _holder(self, name: str) -> nn.Module | None:
        """A module that has the form of a layer, as embeddings have; None for a name that is none's."""
        if name not in self.layers:
            return None
        holder = nn.Module()
        holder.add_module("form", self.form(name))
        return holder

    def _empty(self, name: str) -> Form:
        spec = self.settings["layers"][name]["form"]
        try:
            return empty(spec, self.shape(name), torch.float32, "meta")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder}: {name} has a form that cannot be read: {error}"
            ) from error
