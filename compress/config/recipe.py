"""What a job is: one typed object that is the Python API, the YAML file and the command line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import yaml

from calibration.bos import Bos
from calibration.experts.routing import Routing
from calibration.propagation import Propagate
from compress.config.choices import OnFailure, StatisticsMode
from compress.config.options import build, dump, name_of
from compress.config.publishing import refuse_bad_id, refuse_bad_licence
from compress.config.yaml_file import read_yaml
from compress.engines.base import ENGINES
from compress.errors import RecipeError
from compress.exports.base import EXPORTS
from compress.exports.storage import AdapterRanks, Storage
from compress.families.base import METHODS, Compressor
from compress.families.option_types import check_types
from compress.models.dtype import Dtype

AUTO = "auto"
"""As the only export: native, or on a base checkpoint the adapter. As the only task: what the model's kind allows."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
"""Others lack what is needed: mps has no float64, meta no numbers."""

_ENUMS: Mapping[str, type[StrEnum]] = {
    "bos": Bos,
    "dtype": Dtype,
    "propagate": Propagate,
    "moe": Routing,
    "statistics": StatisticsMode,
    "on_failure": OnFailure,
    "adapter_ranks": AdapterRanks,
    "embeddings": Storage,
    "head": Storage,
}


def _about(group: str, text: str, metavar: str = "") -> dict[str, Any]:
    """`metavar`: what help calls the value, where the option's own name does not say it."""
    return {"group": group, "help": text, **({"metavar": metavar} if metavar else {})}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One compression job, complete: equal recipes on equal versions give equal checkpoints.

    Raises:
        RecipeError: from the constructor too, if a value cannot work whatever the model is.
    """

    model: str = field(
        default="demo",
        metadata=_about(
            "general",
            "what to compress: a Hugging Face folder, a hub id, a .gguf file, "
            "or demo (SmolLM2-135M-Instruct)",
        ),
    )
    out: Path | None = field(
        default=None,
        metadata=_about(
            "general",
            "folder to write, which must not exist; none: MODEL-METHOD-Nbit in the current folder",
            "DIR",
        ),
    )
    method: Compressor = field(
        default_factory=lambda: METHODS["eora"](),
        metadata=_about(
            "method", "how layers are compressed (default: eora; `compress methods` lists all)"
        ),
    )
    base_checkpoint: str | None = field(
        default=None,
        metadata=_about(
            "method",
            "a compressed checkpoint of the model, a folder or a hub id, whoever wrote it, that a correction (eora, "
            "lqer, svd_residual) is added to: gptq, awq, compressed-tensors, bitsandbytes, native, or changed weights",
            "CHECKPOINT",
        ),
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            "general", "patterns of layer names to compress; empty: all in the blocks", "LAYERS"
        ),
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata=_about("general", "patterns of layer names to leave as they are", "LAYERS"),
    )
    embeddings: Storage = field(
        default=Storage.AUTO,
        metadata=_about(
            "general",
            "bits (8, 6, 5, 4, 3, 2) or dtype of the token embeddings, or as-is; auto: 8 bits in native exports, "
            "16 in gptq, as they are in dense and on a base checkpoint",
        ),
    )
    head: Storage = field(
        default=Storage.AUTO,
        metadata=_about("general", "the same for the output head; auto: as the embeddings if tied"),
    )
    export: tuple[str, ...] = field(
        default=(AUTO,),
        metadata=_about("general", "formats to write", "FORMAT") | {"values": EXPORTS},
    )
    engines: tuple[str, ...] = field(
        default=(AUTO,),
        metadata=_about(
            "general",
            "programs that must load each export and reproduce its log-probabilities, of those that its format is for; "
            "auto: all that are installed; none",
            "ENGINE",
        )
        | {"values": ENGINES},
    )
    device: str = field(
        default="auto",
        metadata=_about("general", "cpu, cuda, cuda:1, ...; auto: an accelerator if there is one"),
    )
    dtype: Dtype = field(
        default=Dtype.AUTO,
        metadata=_about("general", "number format to compute in; auto: the checkpoint's own"),
    )
    seed: int = field(default=0, metadata=_about("general", "seed of everything random"))
    on_failure: OnFailure = field(
        default=OnFailure.RAISE,
        metadata=_about(
            "general",
            "a layer, embeddings or a head that fail: raise stops the run, keep leaves them and records it",
        ),
    )
    calibration: tuple[str, ...] = field(
        default=("python-docs",),
        metadata=_about(
            "calibration",
            "texts: python-docs (built in), .txt, .jsonl and .parquet paths, hub data sets; "
            "DATASET:0.3 gives one a weight",
            "DATASET",
        ),
    )
    samples: int = field(default=64, metadata=_about("calibration", "number of sequences", "N"))
    seq_len: int = field(
        default=512, metadata=_about("calibration", "tokens in a sequence", "TOKENS")
    )
    bos: Bos = field(
        default=Bos.AUTO,
        metadata=_about(
            "calibration",
            "what every window begins with, in evaluation too: what the tokenizer puts in front of a text (auto), its "
            "bos_token even if it does not put it there (always), nothing (never)",
        ),
    )
    batch_size: int = field(
        default=8,
        metadata=_about("calibration", "sequences that a model reads at once", "SEQUENCES"),
    )
    propagate: Propagate = field(
        default=Propagate.BLOCK,
        metadata=_about(
            "calibration",
            "calibrate on what the original model computes (none), or what the compressed blocks "
            "before (block), and layers before within the block (sublayer), compute",
            "SEQUENCES",
        ),
    )
    moe: Routing = field(
        default=Routing.ROUTED,
        metadata=_about(
            "calibration",
            "tokens from which statistics of each expert are collected: those that the router sends to it, filled up "
            "from the layer's others where they are few (routed), those that are sent to any expert of the layer "
            "(pooled), all tokens through every expert (all)",
        ),
    )
    statistics: StatisticsMode = field(
        default=StatisticsMode.REUSE,
        metadata=_about("calibration", "whether statistics saved by an equal run are used again"),
    )
    eval_text: str = field(
        default="python-docs",
        metadata=_about(
            "evaluation", "held-out text for perplexity, KL and top-1 agreement", "DATASET"
        ),
    )
    eval_windows: int = field(
        default=16,
        metadata=_about("evaluation", "windows of that text, seq-len tokens each; 0: none", "N"),
    )
    tasks: tuple[str, ...] = field(
        default=(AUTO,),
        metadata=_about(
            "evaluation",
            "lm-eval tasks for both models; none: no tasks; auto: three small ones for models that write text",
            "TASK",
        ),
    )
    limit: int = field(
        default=40,
        metadata=_about("evaluation", "items of each task, the same for both models", "ITEMS"),
    )
    include_path: Path | None = field(
        default=None, metadata=_about("evaluation", "a folder of further lm-eval tasks", "DIR")
    )

    publish_as: str | None = field(
        default=None,
        metadata=_about(
            "publishing",
            "the repository on the hub that the result will be, owner/name, for its card and its adapter; several "
            "formats are a repository each, whose names this one begins",
            "ID",
        ),
    )
    base_model: str | None = field(
        default=None,
        metadata=_about(
            "publishing",
            "the original's repository on the hub, owner/name, for the card; none: the model's own id, if it has one",
            "ID",
        ),
    )
    license: str | None = field(
        default=None,
        metadata=_about(
            "publishing",
            "the licence in the card, by the hub's id (apache-2.0); none: what the original's README says",
        ),
    )
    adapter_ranks: AdapterRanks = field(
        default=AdapterRanks.OWN,
        metadata=_about(
            "publishing",
            "ranks in a PEFT adapter: each layer's own, which vLLM and PEFT know, or one for all, padded with zeros to "
            "one that vLLM takes, for servers that ignore patterns (SGLang, TensorRT-LLM)",
        ),
    )

    def __post_init__(self) -> None:
        """Refuses what cannot work whatever the model is."""
        for name, kind in _ENUMS.items():
            value = getattr(self, name)
            if kind is Storage and isinstance(value, int):
                value = str(value)  # YAML has 8 for a number
            if isinstance(value, str) and value in {member.value for member in kind}:
                object.__setattr__(self, name, kind(value))  # an enum's value serves as well
        check_types(self)
        least = {
            "seed": 0,
            "samples": 1,
            "seq_len": 2,
            "batch_size": 1,
            "eval_windows": 0,
            "limit": 1,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise RecipeError(
                    f"{getattr(self, name)} is too small; it takes {minimum} or more", option=name
                )
        if self.export == (AUTO,):
            settled = ("native",) if self.base_checkpoint is None else ("adapter",)
            object.__setattr__(self, "export", settled)
        _refuse_texts(self)
        _refuse_bases(self)
        refuse_bad_id(self.publish_as, "publish_as")
        refuse_bad_id(self.base_model, "base_model")
        refuse_bad_licence(self.license)

    @classmethod
    def from_mapping(cls, values: object) -> Self:
        """A recipe from plain values as YAML has them; what is not given is the default.

        Raises:
            RecipeError: the path of the option (`recipe.method.rnk`), the bad value, what is right.
        """
        if isinstance(values, Mapping) and values.get("base_checkpoint") not in (None, "none"):
            method = values.get("method")
            if isinstance(method, Mapping) and "base" in method:
                raise RecipeError(_TWO_BASES, option="base_checkpoint")
        return build(cls, values, "recipe", METHODS)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """A recipe from a YAML file.

        Raises:
            RecipeError: as `from_mapping`, or the file is no YAML mapping.
        """
        return cls.from_mapping(read_yaml(path))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values (text, numbers, lists), defaults written out, from which `from_mapping` makes the same job."""
        values = dump(self, METHODS)
        if self.base_checkpoint is not None:
            del values["method"]["base"]  # not used
        return values

    def to_yaml(self) -> str:
        """The recipe as the text of a YAML file with every option in it."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True, width=100)

    @property
    def method_name(self) -> str:
        """The registered name of the method: "eora"."""
        return name_of(self.method, METHODS)

    @property
    def folder(self) -> Path:
        """Where the result goes: `out`, or "MODEL-METHOD-Nbit" in the current folder."""
        if self.out is not None:
            return self.out
        if self.base_checkpoint is not None:
            return Path(default_folder(self.base_checkpoint, self.method_name, None))
        return Path(default_folder(self.model, self.method_name, self.method.resolved()))


def _refuse_texts(recipe: Recipe) -> None:
    for name in ("calibration", "export"):
        if not getattr(recipe, name):
            raise RecipeError("empty; name at least one", option=name)
    for name in ("model", "device", "eval_text"):
        if not getattr(recipe, name).strip():
            raise RecipeError("empty; leave the option out for its default", option=name)
    for name in ("export", "tasks", "engines"):
        given = getattr(recipe, name)
        twice = sorted({part for part in given if given.count(part) > 1})
        if twice:
            raise RecipeError(f"{', '.join(twice)} more than once; name each once", option=name)
    if not _DEVICE.fullmatch(recipe.device):
        raise RecipeError(
            f"unknown device {recipe.device!r}; choose cpu, cuda, cuda:N or auto", option="device"
        )


_TWO_BASES = (
    "method.base is given too, and both say what is corrected; leave method.base and its options out to correct the "
    "checkpoint, or base_checkpoint to compress the model anew"
)


def _refuse_bases(recipe: Recipe) -> None:
    """What cannot be with a base checkpoint, whatever is in it; and what cannot be without one."""
    if recipe.base_checkpoint is None:
        return
    for option in ("embeddings", "head"):
        if getattr(recipe, option) not in (Storage.AUTO, Storage.AS_IS):
            raise RecipeError(
                f"{getattr(recipe, option)}, but those of a base checkpoint stay as they are; leave it out",
                option=option,
            )
    if not recipe.base_checkpoint.strip():
        raise RecipeError(
            "empty; name a folder or a hub id, or leave it out", option="base_checkpoint"
        )
    from compress.families.correction import (
        Correction,  # needs torch, which the recipe's own options do not
    )

    if not isinstance(recipe.method, Correction):
        corrections = ", ".join(
            name for name, kind in METHODS.items() if issubclass(kind, Correction)
        )
        raise RecipeError(
            f"{recipe.method.name} compresses the model itself and puts nothing on top of "
            f"{recipe.base_checkpoint}; methods that do are {corrections}",
            option="base_checkpoint",
        )
    if recipe.method.base_rounds:
        raise RecipeError(
            f"{recipe.method.base_rounds} would make the base again, and "
            f"{recipe.base_checkpoint} is never changed; use 0, or leave base_checkpoint out",
            option="method.base_rounds",
        )
    if recipe.method.base is not None:
        raise RecipeError(_TWO_BASES, option="base_checkpoint")


def default_folder(model: str, method_name: str, method: object) -> str:
    """Folder name from the last part of a model's path or id, the method and its bits, if any."""
    name = Path(model).name if Path(model).name not in ("", "..") else Path(model).resolve().name
    stem = name.removesuffix(".gguf") or "model"
    inner: object = method
    while inner is not None and not hasattr(inner, "bits"):
        inner = getattr(inner, "base", None)
    bits = f"-{inner.bits}bit" if inner is not None and hasattr(inner, "bits") else ""
    return f"{stem}-{method_name}{bits}"
