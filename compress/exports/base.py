"""The contract of an export format: all that planning, writing, verifying, inspecting and the model card ask of it.

A format is one file in this folder, or in another distribution: a subclass of `Exporter`, mostly of
`checkpoint.CheckpointExporter`, with `name=`. Nothing else has to know its name. The names are options of a run, so
this module imports no torch.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from calibration.heads import Head
from compress.errors import PluginError, RecipeError
from compress.exports.planned import MadeOf as MadeOf  # both are part of the contract
from compress.exports.planned import Planned as Planned
from compress.exports.storage import Outside
from compress.registry import Registry, unwritten

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from calibration.experts.names import Slice
    from compress.bases import AsDense
    from compress.callbacks import Progress
    from compress.exports.card import CardFacts
    from compress.exports.contents import Contents
    from compress.exports.planned import VocabularyMatrix
    from compress.families.base import Compressor
    from compress.families.low_rank import Factors
    from compress.forms.base import Form
    from compress.models.resolve import SourceModel
    from eval.footprint import Stored


class Use(enum.StrEnum):
    """Runs that can write a format."""

    MODEL = "without a base checkpoint"
    """Those that compress a model."""
    ON_BASE = "on a base checkpoint"
    """Those that add corrections to a compressed checkpoint."""


class CorrectionStorage(enum.StrEnum):
    """How a format stores the factors of a low-rank correction that were rounded to few bits."""

    CODES = "codes"
    """As codes, in these few bits."""
    HALF = "16 bits"
    """By their values, in 16 bits."""
    MERGED = "merged"
    """Not at all: the correction is added to the weight."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Constant facts of a format; none has a default, so that none can be forgotten."""

    uses: frozenset[Use]
    heads: frozenset[Head]
    """Kinds of models that its readers load."""
    corrections: CorrectionStorage
    needs_base: bool
    """Whether it is of use only together with the base checkpoint that it was made for, which it does not hold."""
    own_folder: bool
    """Whether it goes into a folder of its own even where it is the only export of a run."""
    adapter: str | None
    """Where, in its folder, a PEFT adapter lies if a run writes one: "adapter", or "." for the folder itself."""
    ordinary: bool
    """Whether it is an ordinary checkpoint, which any folder is that no other format recognises."""
    loading_reads: tuple[str, ...]
    """Glob patterns of the files that loading reads, weights apart: their digests are part of the verification."""
    library: str
    """The model card's `library_name`."""
    relation: str
    """The model card's `base_model_relation`: quantized, adapter, finetune or merge."""
    weights: str
    """Its contents in a few words, for a table of several formats: "packed"."""
    engines: tuple[str, ...]
    """Names of the engines that it is for, best first: "vllm", "openvino", "transformers"."""
    outside: Outside
    """How it stores embeddings, heads and whatever else no method compresses."""


@dataclass(frozen=True)
class LayerExport:
    """A finished layer: its name in the model, what stands for its weight (o, i), its bias (o,)."""

    name: str
    form: Form
    bias: Tensor | None
    transposed: bool
    """Whether the source stores the weight as (i, o): GPT-2's Conv1D."""
    in_source: bool = True
    """Whether the source stores a weight for it; a tied head's is that of the embeddings."""
    correction: Factors | None = None
    """The part of the form that a base checkpoint has not, in a run on top of one; None for its own layers."""
    source_name: str = ""
    """Its name in the source, where that calls an expert otherwise than the model; empty where both are one."""
    slices: tuple[Slice, ...] = ()
    """Where the source stacks experts, the parts of its tensors that are this one's weight, and its bias if any."""
    padded_rank: int | None = None
    """The rank that zeros fill its correction up to in a PEFT adapter; None: its own."""

    @property
    def stored_name(self) -> str:
        """Its name in the source."""
        return self.source_name or self.name


class Exporter(ABC):
    """Writes one export: add every layer and every other tensor, then close.

    Names of layers and tensors are those that the model in memory gives them.
    """

    name: ClassVar[str]
    traits: ClassVar[Traits]

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        """Register a format. Raises PluginError for one that leaves out what nothing can take the place of."""
        super().__init_subclass__(**kwargs)
        if not name:
            return
        absent = unwritten(cls, _ABSTRACT)
        absent += [] if isinstance(getattr(cls, "traits", None), Traits) else ["traits"]
        if absent:
            raise PluginError(
                f"export format {name!r} ({cls.__module__}.{cls.__qualname__}) lacks {', '.join(absent)}"
            )
        cls.name = name
        EXPORTS.register(name, cls)

    @abstractmethod
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
        self.folder = Path(folder)

    # Before a run

    @classmethod
    def check(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> None:
        """Refuse what the format cannot hold, and a plan of which it would hold nothing in codes.

        Raises RecipeError naming the layer.
        """
        for name, compressor in compressors.items():
            if problem := cls.problem(compressor, shapes[name]):
                raise RecipeError(f"export: {cls.name} cannot hold {name}: {problem}")
        reasons = {name: cls.stores_dense(it, shapes[name]) for name, it in compressors.items()}
        if reasons and all(reasons.values()):
            name, reason = next(iter(reasons.items()))
            advice = "so it is for all chosen layers; choose native or dense"
            raise RecipeError(f"export: {cls.name} cannot hold {name}: {reason}; {advice}")

    @classmethod
    @abstractmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """Why the format cannot hold what a compressor makes of a weight (o, i); empty if it can."""

    @classmethod
    def stores_dense(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """Why it stores a weight (o, i) dense, correction included, in the source's dtype; empty if in codes.

        A layer that no format of a run stores in codes is not compressed, for that would save nothing.
        """
        del compressor, shape
        return ""

    @classmethod
    def warnings(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[str, ...]:
        """Sentences on what no server of the format reads of a plan, which names the export that they do read.

        `shapes` has those of matrices that stay as they are too, which have no compressor.
        """
        del compressors, shapes
        return ()

    @classmethod
    def refusals(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[str, ...]:
        """The warnings of checkpoints that servers refuse or misread: for these the card gives no command."""
        del compressors, shapes
        return ()

    @classmethod
    @abstractmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Bytes of tensor data that an export of a plan will write, to the byte."""

    @classmethod
    def warnings_of_model(cls, config: PretrainedConfig) -> tuple[str, ...]:
        """Sentences on what the format's readers compute otherwise than the model does."""
        del config
        return ()

    @classmethod
    def problem_of_table(cls, table: VocabularyMatrix, bits: int) -> str:
        """Why the format cannot hold embeddings or a head in codes of so many bits; empty if it can."""
        del table, bits
        return ""

    @classmethod
    def table_bytes(cls, table: VocabularyMatrix, bits: int) -> int:
        """Bytes of the codes and scales of embeddings or a head, without a correction."""
        v, d = table.shape  # in 8 bits a scale of 16 bits a row
        return v * (d + 2) if bits == 8 else table.quantiser(bits).planned_bytes(table.shape)

    @classmethod
    def problem_of_expert(cls, compressor: Compressor) -> str:
        """Why the format's readers do not take what a compressor makes of an expert's weight; empty if they do."""
        del compressor
        return ""

    @classmethod
    def problem_of_stacks(cls) -> str:
        """Why the format cannot hold experts that the source stacks in one tensor; empty if it can."""
        return ""

    @classmethod
    def problem_of_model(
        cls,
        source: SourceModel,
        config: PretrainedConfig,
        compressors: Mapping[str, Compressor],
        shapes: Mapping[str, tuple[int, int]],
    ) -> str:
        """Why the format's readers do not take a model, or a part of it compressed so; empty if they do."""
        del source, config, compressors, shapes
        return ""

    @classmethod
    def experts_text(cls) -> str:
        """How it stores the experts of a mixture and what can't load them, for a plan; empty: as any other layer."""
        return ""

    # In a run

    @abstractmethod
    def add_layer(self, layer: LayerExport) -> None:
        """Write a finished layer. Raises CheckpointError for what the format cannot hold."""

    @abstractmethod
    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the source that no layer replaces."""

    def leave_out(self, name: str) -> None:  # noqa: B027  (a format that copies nothing has nothing to note)
        """Note a tensor of the source that is not written, for it is equal to another that the model ties it to."""

    @abstractmethod
    def close(self) -> None:
        """Write what goes with the weights, and give everything its final name.

        Raises CheckpointError if a tensor of the source is neither copied nor replaced, or if there is none.
        """

    @property
    def rounded(self) -> torch.dtype | None:
        """The dtype that the format has rounded values to which the forms hold exactly; None if it rounded nothing."""
        return None

    # On disk

    @classmethod  # noqa: B027  (most formats promise nothing)
    def verify_alone(cls, folder: Path) -> None:
        """Prove that an export that this program wrote is read without the toolkit, if the format promises that.

        It may run code that lies in the folder. Raises CheckpointError.
        """

    @classmethod
    @abstractmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether a folder holds this format, by its own configuration."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """The model of an export, corrections included, in eval mode; `dtype` None is what its configuration names.

        Raises CheckpointError for an export that is incomplete or does not fit its configuration.
        """

    @classmethod
    @abstractmethod
    def base_of(cls, folder: Path) -> Path | None:
        """The checkpoint that an export belongs to and does not hold; None for one that is whole."""

    @classmethod
    @abstractmethod
    def tensors(cls, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor by name, those of an adapter beside it included."""

    @classmethod
    @abstractmethod
    def stored(cls, folder: Path) -> Stored:
        """Bytes that an export takes, without a base that it does not hold."""

    @classmethod
    def config_in(cls, folder: Path) -> Mapping[str, Any]:
        """The configuration of the model in a folder, with its quantisation; empty where there is none."""
        from compress.models.checkpoint import read_json  # imports torch

        path = folder / "config.json"
        return read_json(path) if path.is_file() else {}

    @classmethod
    def file_in(cls, folder: Path) -> str | None:
        """The name of the file in an export that a user gives to programs; None where they take the folder."""
        del folder
        return None

    @classmethod
    def weights_dtype(cls, folder: Path) -> torch.dtype | None:  # noqa: ARG003  (for formats that round)
        """The dtype that whole weights were rounded to; None where forms are stored as they are."""
        return None

    @classmethod
    @abstractmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """Layers and tensors for `inspect`; None for ordinary weights, which it shows as any model's."""

    # Where it is published

    @classmethod
    def repository_suffix(cls, made: MadeOf) -> str:
        """The end of the name of a repository that holds it: "-GPTQ-Int4"."""
        return f"-{cls.name}" if made.bits is None else f"-{cls.name}-{made.bits}bit"

    # On the model card, as Markdown

    @classmethod
    @abstractmethod
    def introduction(cls, card: CardFacts) -> str:
        """The card's first paragraphs below the title: what the export holds and how large it is."""

    @classmethod
    @abstractmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """How it is loaded, with the code; begins with a line that names the format."""

    @classmethod
    @abstractmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """How it is served, with the command, or by what it is not served."""


_ABSTRACT = frozenset(Exporter.__abstractmethods__)
EXPORTS: Registry[Exporter] = Registry("compress.exports", "export format")
"""Every export format by name."""


def formats_for(use: Use) -> list[str]:
    """The names of the formats that a kind of run can write."""
    return [name for name, kind in EXPORTS.items() if use in kind.traits.uses]


def needs_base(exports: Sequence[str]) -> bool:
    """Whether one of these formats does not hold the base checkpoint that it was made for."""
    return any(EXPORTS[name].traits.needs_base for name in exports)


def stores_codes(exports: Sequence[str]) -> bool:
    """Whether one of these formats stores corrections of few bits as codes."""
    return any(EXPORTS[name].traits.corrections is CorrectionStorage.CODES for name in exports)


def widens(exports: Sequence[str]) -> bool:
    """Whether corrections of few bits are written in 16 bits alone, for none of these formats stores their codes."""
    halves = (EXPORTS[name].traits.corrections is CorrectionStorage.HALF for name in exports)
    return any(halves) and not stores_codes(exports)
