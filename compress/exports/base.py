"""What every export shares: the rest of the source model, and the proof that nothing was lost."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from compress.bases import AsDense
from compress.errors import CheckpointError, RecipeError
from compress.families.base import Compressor
from compress.families.low_rank import Factors
from compress.forms.base import Form
from compress.models.checkpoint import Reader, Writer, read_json, some

if TYPE_CHECKING:
    from compress.models.resolve import SourceModel

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
)
"""Files of the source that go with every export: tokenizer, generation settings, licence."""


@dataclass(frozen=True)
class LayerExport:
    """A finished layer: its name in the model, what stands for its weight (o, i), its bias (o,)."""

    name: str
    form: Form
    bias: Tensor | None
    transposed: bool
    """Whether the source stores the weight as (i, o): GPT-2's Conv1D."""
    path: Factors | None = None
    """The part of the form that a base checkpoint has not, in a run on top of one; None for its own layers."""


class Exporter(ABC):
    """Writes one checkpoint: add every layer and every other tensor, then close.

    Names are those that the model in memory gives its tensors.
    """

    name: ClassVar[str]

    def __init__(
        self,
        folder: Path,
        source: SourceModel,
        base_reference: str | None = None,
        base: AsDense | None = None,
        base_revision: str | None = None,
    ) -> None:
        """`folder` exists and is empty; `base_reference` is where what an adapter belongs to will be found.

        `base_revision`: its commit, if that is an id of the hub.

        `base`: the compressed checkpoint that the layers are built on; what no layer replaces is its, not the source's.
        Raises CheckpointError if the source is already quantised.
        """
        self.folder, self.source, self.base_reference = Path(folder), source, base_reference
        self.base_revision = base_revision
        self.config = read_json(source.folder / "config.json") if base is None else base.base.config
        if self.config.get("quantization_config"):
            raise CheckpointError(
                f"{source.folder} is already quantised; compress the model that it was made from"
            )
        self.reader = Reader(source.folder) if base is None else base
        self.dtype = main_dtype(self.reader)
        self.writer = Writer(self.folder)
        self._replaced: set[str] = set()
        self._copied: dict[str, tuple[int, ...]] = {}
        self._begin()

    def _begin(self) -> None:  # noqa: B027  (most have something to note, not all)
        """Make room for what a format notes of its layers."""

    @classmethod
    def check(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> None:
        """Refuse what the format cannot hold. Raises RecipeError naming the layer."""
        for name, compressor in compressors.items():
            problem = cls._problem(compressor, shapes[name])
            if problem:
                raise RecipeError(f"export: {cls.name} cannot hold {name}: {problem}")

    @classmethod
    def _problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """Why the format cannot hold what a compressor makes of a weight (o, i); empty if it can."""
        del compressor, shape
        return ""

    @property
    def rounded(self) -> torch.dtype | None:
        """What the format has rounded values to that the forms hold exactly; None if nothing."""
        return None

    def add_layer(self, layer: LayerExport) -> None:
        """Write a finished layer. Raises CheckpointError for what the format cannot hold."""
        self._replaced.add(f"{layer.name}.weight")
        if layer.bias is not None:
            self._replaced.add(f"{layer.name}.bias")
        self._write_layer(layer)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the source that no layer replaces, as it is."""
        self._copied[name] = tuple(tensor.shape)
        self.writer.add(name, tensor)

    def close(self) -> None:
        """Write what goes with the weights, and give everything its final name.

        Raises CheckpointError if a tensor of the source is neither copied nor replaced, or if there
        is none.
        """
        self._refuse_lost()
        if not self.writer.names:
            raise CheckpointError(f"{self.name} export: no tensor to write")
        for path in companions(self.source.folder):
            copy(path, self.folder / path.name)
        self._write_config()
        self.writer.close()

    @abstractmethod
    def _write_layer(self, layer: LayerExport) -> None: ...

    @abstractmethod
    def _write_config(self) -> None: ...

    @classmethod  # noqa: B027  (most formats promise nothing)
    def verify_alone(cls, folder: Path) -> None:
        """Prove that an export that this program wrote is read without the toolkit, if the format promises that.

        It may run code that lies in the folder. Raises CheckpointError.
        """

    def base_config(self) -> dict[str, Any]:
        """The source's config.json, with the dtype that it may leave to the weights."""
        config = {key: value for key, value in self.config.items() if key != "torch_dtype"}
        dtype = config.get("dtype") or self.config.get("torch_dtype")
        return config | {"dtype": dtype or str(self.dtype).removeprefix("torch.")}

    def _refuse_lost(self) -> None:
        """Compare numbers, because a source may name its tensors otherwise than the model."""
        written = self._replaced | set(self._copied)
        if len(written) == len(self.reader):
            return
        lost = [name for name in self.reader if not _known(name, written)]
        odd = [name for name in written if not _known(name, set(self.reader))]
        raise CheckpointError(
            f"{self.name} export: {len(self.reader)} tensors in {self.source.folder}, and "
            f"{len(written)} copied or replaced"
            + (f"; lost: {some(lost)}" if lost else "")
            + (f"; not from there: {some(odd)}" if odd else "")
        )


def _known(name: str, names: set[str]) -> bool:
    """Whether the name is among others, up to a prefix such as GPT-2's `transformer.`."""
    return name in names or any(
        other.endswith(f".{name}") or name.endswith(f".{other}") for other in names
    )


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that go with every export of it."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() or path.name.startswith("chat_template"))


def copy(source: Path, target: Path) -> None:
    """Copy a file, or a folder of files, following links."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def main_dtype(reader: Reader | AsDense) -> torch.dtype:
    """The floating dtype that holds most of a checkpoint's bytes; float32 if none does."""
    sizes: Counter[torch.dtype] = Counter()
    for name in reader:
        if reader.dtype(name).is_floating_point:
            sizes[reader.dtype(name)] += reader.nbytes(name)
    return sizes.most_common(1)[0][0] if sizes else torch.float32
