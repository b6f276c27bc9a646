"""FP8 checkpoints of transformers' `fp8`: DeepSeek-V3, the FP8 models of Qwen3, MiniMax and Mistral.

Tensors of a layer: weight (o, i) E4M3; weight_scale_inv (ceil(o / r), ceil(i / c)), by which blocks of r x c numbers
are multiplied, despite its name; the last blocks may be partial. Without weight_block_size it is one number. Scales are
floats, or E8M0 bytes (`scale_fmt` "ue8m0", under which floats are powers of two, too). activation_scale is for engines
that round activations likewise. Stacked experts: NAME (E, o, i) with NAME_scale_inv.
Facts: transformers' `FineGrainedFP8Config` and `Fp8Dequantize`.
Shapes: o = out_features, i = in_features, E = number of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from compress.bases.base import Loading, fits, is_whole, names_in
from compress.bases.floats import Block, are_powers_of_two
from compress.bases.scaled import ScaledWeights
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.dense import Dense

SCALE = "_scale_inv"
BLOCK = (128, 128)
"""The size of a block where the config does not say it."""
FORMATS = ("float", "ue8m0")
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


class Fp8Base(ScaledWeights, name="fp8"):
    """Layers as numbers of 8 bits in floating point, and the scales of their blocks."""

    published = True
    parts = ("weight_scale_inv", "weight", "activation_scale")
    loading = Loading(packages=("accelerate",), imports=(), arguments={}, peft=True, vllm=())

    def _find_layers(self) -> tuple[str, ...]:
        self._refuse_settings()
        layers = super()._find_layers() if not self.stacks or self._has_layers() else ()
        taken = {part for name in layers for part in self.tensors_of(name)}
        self._refuse_bare(taken | {part for parts in self.stacks.values() for part in parts})
        plain = names_in(self.settings, "modules_to_not_convert") or names_in(
            self.settings, "ignored_layers"
        )
        for pattern in plain:
            odd = [name for name in layers if _is_excluded(pattern, name)]
            if odd:
                raise CheckpointError(
                    f"{self.folder}: {odd[0]} is stored in 8 bits, but modules_to_not_convert in its config has "
                    f"{pattern!r}, so that readers take it for ordinary weights; download the checkpoint again"
                )
        return layers

    def _has_layers(self) -> bool:
        return any(key.endswith(f".{self.parts[0]}") for key in self.reader)

    def _refuse_settings(self) -> None:
        wanted = {
            "fmt": (self.settings.get("fmt") or "e4m3", ("e4m3", "float8_e4m3fn")),
            "scale_fmt": (self.settings.get("scale_fmt") or "float", FORMATS),
            "expert_dtype": (self.settings.get("expert_dtype") or "fp8", ("fp8",)),
        }
        for key, (found, there) in wanted.items():
            if found not in there:
                raise CheckpointError(
                    f"{self.folder}: {key} {found!r} of fp8 is not supported; supported: {', '.join(there)}"
                )
        size = self.settings.get("weight_block_size", BLOCK)
        sizes = isinstance(size, list | tuple) and len(size) == 2
        if size is not None and not (sizes and all(is_whole(n, 1) for n in size)):
            raise CheckpointError(
                f"{self.folder}: weight_block_size is {size!r}; it is two whole numbers, or null for one scale a tensor"
            )

    @property
    def grid(self) -> str:
        """Blocks, and the kind of scales: "blocks of 128 x 128, scales in powers of two"."""
        size = self.settings.get("weight_block_size", BLOCK)
        blocks = "one scale a tensor" if size is None else f"blocks of {size[0]} x {size[1]}"
        powers = self.settings.get("scale_fmt") == "ue8m0"
        return f"{blocks}, scales in powers of two" if powers else blocks

    @property
    def remarks(self) -> tuple[str, ...]:
        """That engines round activations, too."""
        scheme = self.settings.get("activation_scheme") or "dynamic"
        return (f"engines that compute in FP8 round activations too ({scheme} scales)",)

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i) of the weight, with which the scales' shape must agree."""
        tensor = f"{name}.weight"
        found = self._float8_shape(tensor, f"{tensor}{SCALE}", self._block(tensor))
        if len(found) != 2:
            raise CheckpointError(
                f"{self.folder}: {tensor} has the shape {found}; it must be (outputs, inputs)"
            )
        return found[0], found[1]

    def form(self, name: str) -> Form:
        """The dense weight in fp32: no form of the toolkit has codes of floating point."""
        self.shape(name)
        return Dense(self._unscaled(f"{name}.weight"))

    @cached_property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Tensors of three dimensions with scales beside them."""
        stems = [key.removesuffix(SCALE) for key in self.reader if key.endswith(SCALE)]
        return {
            stem: (stem, f"{stem}{SCALE}")
            for stem in stems
            if stem in self.reader and len(self.reader.shape(stem)) == 3
        }

    def stack_shape(self, name: str) -> tuple[int, ...]:
        """(E, o, i), with which the scales' shape must agree."""
        return self._float8_shape(name, f"{name}{SCALE}", self._block(name))

    def stack(self, name: str) -> Tensor:
        """(E, o, i) in fp32."""
        return self._unscaled(name)

    def _block(self, tensor: str) -> Block:
        size = self.settings.get("weight_block_size", BLOCK)
        if size is not None:
            return int(size[0]), int(size[1])
        *_, o, i = (0, 0, *(self.reader.shape(tensor) if tensor in self.reader else (1, 1)))
        return o, i

    def _unscaled(self, tensor: str) -> Tensor:
        scales = f"{tensor}{SCALE}"
        if self.settings.get("scale_fmt") == "ue8m0" and not are_powers_of_two(
            self._scales(scales)
        ):
            raise CheckpointError(
                f"{self.folder}: {scales} is not in powers of two, but scale_fmt in its config is 'ue8m0'; the two do "
                "not belong together, download the checkpoint again"
            )
        return self._scaled(tensor, scales, self._block(tensor))


def _is_excluded(pattern: str, name: str) -> bool:
    """As transformers reads the list: from the start to a dot or the end, by name or regular expression, or the end."""
    return fits(f"(?:{pattern}){_BOUNDARY}", name) or name.endswith(pattern)
