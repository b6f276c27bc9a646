"""The toolkit's own checkpoint: forms as they are, and the code that reads them.

Loads with `AutoModelForCausalLM.from_pretrained` after `import compress`, or without the toolkit
with `trust_remote_code=True`; otherwise it fails. Two entries of config.json see to that where a
reader ignores `model_type`: a vocabulary size that no config accepts, and a quantisation without a
method, which transformers refuses for every model class.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress.errors import CheckpointError
from compress.exports import alone
from compress.exports.base import Exporter, LayerExport
from compress.exports.shipping import shipped
from compress.forms.base import Form
from compress.forms.loading import FORMAT, FORMAT_VERSION
from compress.models.checkpoint import write_json

REFUSAL = (
    "this is a compressed checkpoint: load it with AutoModelForCausalLM.from_pretrained after "
    "`import compress`, or with trust_remote_code=True"
)


class NativeExporter(Exporter):
    """Holds every form there is, in as many bytes as it says."""

    name = "native"

    @classmethod
    def verify_alone(cls, folder: Path) -> None:
        """Run the shipped code in a fresh process that cannot import the toolkit: it must build every form.

        Raises CheckpointError with that process's error, which names a file that is missing.
        """
        with TemporaryDirectory() as scratch:
            child = subprocess.run(
                [sys.executable, "-P", alone.__file__, str(folder.resolve())],
                # A cache of its own: copies of the code of unfinished folders are of use to nobody.
                env=os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"},
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        if child.returncode != 0:
            last = "\n".join(child.stderr.strip().splitlines()[-3:])
            raise CheckpointError(
                f"{folder}: without the toolkit its code does not build its forms:\n{last}"
            )

    def _begin(self) -> None:
        self._layers: dict[str, dict[str, Any]] = {}
        self._kinds: set[type[Form]] = set()

    def _write_layer(self, layer: LayerExport) -> None:
        kinds = {type(part) for part in layer.form.parts()} - self._kinds
        if kinds:
            shipped(kinds)  # refused at its first layer, not after the last
            self._kinds |= kinds
        self._layers[layer.name] = {
            "shape": list(layer.form.shape),
            "bias": layer.bias is not None,
            "form": layer.form.spec(),
        }
        for key, tensor in layer.form.state_dict().items():
            self.writer.add(f"{layer.name}.form.{key}", tensor)
        if layer.bias is not None:
            self.writer.add(f"{layer.name}.bias", layer.bias)

    def _write_config(self) -> None:
        base = self.base_config()
        base.pop("auto_map", None)
        if "lm_head" in self._layers:
            base["tie_word_embeddings"] = False  # it has a form of its own
        files = shipped(self._kinds)
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        config = {
            "model_type": FORMAT,
            "format_version": FORMAT_VERSION,
            "auto_map": {"AutoConfig": "loading.CompressedConfig"},
            "vocab_size": REFUSAL,
            "quantization_config": {"error": REFUSAL},
            # Not within base_config: a config class looks for its model_type in nested objects too.
            "base_model_type": base.pop("model_type"),
            "base_config": base,
            "code": sorted(files),
            "layers": self._layers,
        }
        write_json(self.folder / "config.json", config)
