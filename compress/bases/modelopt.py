"""Checkpoints of NVIDIA's ModelOpt: NVFP4 and FP8.

Tensors of a layer in NVFP4: weight (o, i / 2) uint8, times weight_scale (o, i / 16) E4M3, times weight_scale_2, one
fp32 number: the inverse of compressed-tensors' global scale. In FP8: weight (o, i) E4M3 times weight_scale, one number.
input_scale, and scales of the cache of keys and values, are for engines. Settings are in config.json, or, of old, in
hf_quant_config.json beside it.
Facts: ModelOpt's unified export of Hugging Face checkpoints.
Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from compress.bases.base import Loading, names_in
from compress.bases.pairs import NVFP4_GROUP, Fp4Pairs
from compress.bases.scaled import ScaledWeights
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.dense import Dense

ALGORITHMS = ("NVFP4", "FP8")
OF_LAYER = "weight_scale_2"


class ModeloptBase(ScaledWeights, Fp4Pairs, name="modelopt"):
    """Layers as codes of floating point in 4 or 8 bits, with scales beside them."""

    published = True
    parts = ("weight_scale", "weight", OF_LAYER, "input_scale")
    idle_parts = ("k_scale", "v_scale", "q_scale", "output_scale")
    loading = Loading(packages=("vllm",), imports=(), arguments={}, peft=False, vllm=())

    def _find_layers(self) -> tuple[str, ...]:
        if self._algorithm not in ALGORITHMS:
            raise CheckpointError(
                f"{self.folder}: quant_algo {self._algorithm!r} of modelopt is not supported; supported: "
                f"{', '.join(ALGORITHMS)}"
            )
        size = self.settings.get("group_size")
        if self._algorithm == "NVFP4" and size not in (None, NVFP4_GROUP):
            raise CheckpointError(
                f"{self.folder}: group_size is {size!r}; NVFP4 has groups of {NVFP4_GROUP}"
            )
        rotated = [key for key in self.reader if key.endswith(".pre_quant_scale")]
        if rotated:
            raise CheckpointError(
                f"{self.folder}: {rotated[0]} multiplies inputs before a layer, which is not supported; a checkpoint "
                "of NVFP4 or FP8 without it (AWQ, SmoothQuant) is read"
            )
        layers = super()._find_layers()
        self._refuse_bare({part for name in layers for part in self.tensors_of(name)})
        excluded = names_in(self.settings, "exclude_modules") or names_in(self.settings, "ignore")
        for pattern in excluded:
            odd = [name for name in layers if fnmatchcase(name, pattern)]
            if odd:
                raise CheckpointError(
                    f"{self.folder}: {odd[0]} is quantised, but its config excludes {pattern!r}, so that readers take "
                    "it for ordinary weights; download the checkpoint again"
                )
        return layers

    @property
    def _algorithm(self) -> str:
        return str(self.settings.get("quant_algo") or "")

    @property
    def grid(self) -> str:
        """The algorithm, and what shares a scale: "NVFP4, groups of 16"."""
        blocks = {"NVFP4": f"groups of {NVFP4_GROUP}", "FP8": "one scale a tensor"}
        return f"{self._algorithm}, {blocks.get(self._algorithm, '')}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """That engines round activations, or the cache of keys and values."""
        found = [f"engines that compute in {self._algorithm} round activations too"]
        if self.settings.get("kv_cache_quant_algo") or self.settings.get("kv_cache_scheme"):
            found.append("engines round the cache of keys and values too")
        return tuple(found)

    @property
    def producer(self) -> str | None:
        """ModelOpt, and its version if it is said."""
        told = self.settings.get("producer")
        version = told.get("version") if isinstance(told, dict) else None
        return f"modelopt:{version}" if version else "modelopt"

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i), with which all of the layer's tensors must agree."""
        if self._algorithm == "NVFP4":
            return self._nvfp4_shape(name, "weight", OF_LAYER)
        found = self._shape_of(name, "weight")
        o, i = self._float8_shape(f"{name}.weight", f"{name}.weight_scale", (found[0], found[-1]))
        return o, i

    def form(self, name: str) -> Form:
        """The dense weight in fp32."""
        shape = self.shape(name)
        if self._algorithm == "NVFP4":
            scales = self._nvfp4_scales(name) * self._global_scale(name, OF_LAYER)
            return Dense(self._unpaired(name, "weight", scales))
        return Dense(self._scaled(f"{name}.weight", f"{name}.weight_scale", shape))
