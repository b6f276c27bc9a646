"""From what a user calls a model to an ordinary Hugging Face folder with dense safetensors weights.

A model is the word "demo", a folder, a GGUF file, or an id of the Hugging Face hub. Everything that
its metadata can tell against it is told here, before weights are read. No code of a model is run.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from transformers import CONFIG_MAPPING, AutoConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from compress.demo import DEMO, demo_folder
from compress.errors import CheckpointError
from compress.gguf import (
    CONVERTER_VERSION,
    SOURCE_FILE,
    Progress,
    convert,
    file_sha256,
    is_gguf,
    refuse_bad_magic,
)
from eval.wheels import cache_root

_WHAT_MODELS_ARE = (
    "a model is a folder with config.json and safetensors, a .gguf file, an id of the Hugging Face"
    f" hub (owner/name, or owner/name@revision), or {DEMO!r}"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*"]
_HUB_IGNORED = ["*/*", "consolidated*.safetensors"]
"""Sub-folders hold other formats (onnx, original); consolidated files, the same weights again."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class SourceModel:
    """A dense causal language model on this machine."""

    spec: str
    """What the user wrote."""
    folder: Path
    """An ordinary Hugging Face folder: config.json, tokenizer, safetensors."""
    revision: str | None
    """The commit, for a model of the hub."""
    notes: tuple[str, ...]
    """What a reader of the report should know about where the weights come from."""
    licence: str | None
    """As its README's front matter has it."""


def _no_progress(stage: str, done: int, total: int) -> None:
    """Used where nobody watches."""


def resolve_model(
    spec: str, cache: Path | None = None, *, progress: Progress = _no_progress
) -> SourceModel:
    """Find, fetch or convert the model `spec`, and check that it is one this toolkit compresses.

    `cache` holds what is converted (None: the user's cache folder). A folder called "demo" is
    written "./demo". Raises CheckpointError, naming the model and what would be right, and
    EvalError if the demo model cannot be fetched.
    """
    path = Path(spec).expanduser()
    revision = None
    if spec == DEMO:
        folder = demo_folder(cache or cache_root(), progress=progress)
    elif path.is_dir():
        folder = path
    elif path.is_file():
        folder = _converted(path, cache or cache_root(), progress)
    else:
        folder, revision = _download(spec)
    check_folder(spec, folder)
    return SourceModel(spec, folder, revision, _notes(folder), read_licence(folder))


def _converted(path: Path, cache: Path, progress: Progress) -> Path:
    refuse_bad_magic(path)
    folder = cache / "models" / f"{path.stem}-{file_sha256(path)[:16]}-v{CONVERTER_VERSION}"
    convert(path, folder, progress=progress)
    return folder


def _download(spec: str) -> tuple[Path, str | None]:
    """The model of the hub as its folder in the hub's own cache, and its commit."""
    if Path(spec).suffix.lower() in (".gguf", ".safetensors") or not _HUB_ID.fullmatch(spec):
        raise CheckpointError(f"model: there is no file or folder {spec!r}; {_WHAT_MODELS_ARE}")
    name, _, revision = spec.partition("@")
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_IGNORED,
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"model: {name} is gated; accept its terms on the hub, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"model: {spec!r} is neither a file or folder here nor a model of the hub;"
            f" {_WHAT_MODELS_ARE}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise _out_of_reach(spec, error) from error
    except ValueError as error:  # what the hub's client raises for a malformed name
        raise CheckpointError(
            f"model: {spec!r} is no model: {error}; {_WHAT_MODELS_ARE}"
        ) from error
    return Path(folder), Path(folder).name


def _out_of_reach(spec: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"model: {spec!r} is no file or folder here, and the Hugging Face hub cannot be asked"
        f" for it ({reason}); name a local folder or .gguf file, or {DEMO!r}"
    )


def check_folder(spec: str, folder: Path) -> None:
    """Raise CheckpointError unless `folder` holds a dense causal language model transformers knows.

    Looks at file names and config.json; the weights are the Reader's to check.
    """
    config = _read_config(spec, folder)
    _refuse_compressed(spec, folder, config)
    _refuse_unknown_code(spec, config)
    _refuse_missing_files(spec, folder)
    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        StrictDataclassError,
    ) as error:
        raise CheckpointError(
            f"{spec}: transformers cannot use its config.json: {error}"
        ) from error
    _refuse_other_architectures(spec, parsed)


def _read_config(spec: str, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(_no_config(spec, folder))
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{spec}: {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{spec}: {path} holds a {type(config).__name__}, not an object")
    return config


def _no_config(spec: str, folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{spec}: this folder is a PEFT adapter, not a model; merge it into its base first"
    gguf_files = sorted(path.name for path in folder.iterdir() if is_gguf(path))
    if gguf_files:
        return f"{spec}: no config.json, but GGUF; name the file itself: {folder / gguf_files[0]}"
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
    return (
        f"{spec}: this folder is no model: looked for config.json and {' or '.join(_WEIGHTS)},"
        f" found {there}; {_WHAT_MODELS_ARE}"
    )


def _refuse_compressed(spec: str, folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config") or config.get("compression_config")
    how = None
    if isinstance(quantization, dict):
        how = str(quantization.get("quant_method", "unknown method"))
    elif config.get("model_type") == "compress":
        how = "compress"
    elif (folder / "quantize_config.json").is_file():
        how = "gptq"
    if how is not None:
        raise CheckpointError(
            f"{spec}: already compressed ({how}); only dense checkpoints are compressed for now, so"
            " name the model it was made from"
        )


def _refuse_unknown_code(spec: str, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise CheckpointError(
            f"{spec}: model_type {kind!r} exists only as Python code inside the checkpoint, and"
            " code of a checkpoint is never run; use a model whose architecture is part of"
            " transformers"
        )
    raise CheckpointError(
        f"{spec}: transformers {transformers_version} knows no model_type {kind!r}, which its"
        " config.json names"
    )


def _refuse_missing_files(spec: str, folder: Path) -> None:
    if not any((folder / name).is_file() for name in _WEIGHTS):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{spec}: its weights are pickles only ({pickles[0]}), which can run any code when"
                " read; convert them where you trust them:"
                " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise CheckpointError(f"{spec}: no weights: looked for {' or '.join(_WEIGHTS)} in {folder}")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{spec}: no tokenizer: looked for {', '.join(_TOKENIZER_FILES)} in {folder}"
        )


def _refuse_other_architectures(spec: str, config: Any) -> None:
    names = list(config.architectures or [])
    known = set()
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([entry] if isinstance(entry, str) else entry)
    if names:
        is_causal = any(name in known for name in names)
    else:
        is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder
    if not is_causal or is_encoder:
        raise CheckpointError(
            f"{spec}: {', '.join(names) or config.model_type} is not a causal language model; only"
            " decoders that predict the next token are compressed"
        )


def _notes(folder: Path) -> tuple[str, ...]:
    path = folder / SOURCE_FILE
    if not path.is_file():
        return ()
    try:
        note = json.loads(path.read_bytes())["note"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); remove {folder}") from error
    return (str(note),)


def read_licence(folder: Path) -> str | None:
    """The licence in the front matter of the folder's README.md, or None if it names none."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    if licence == "other":
        licence = front.get("license_name") or licence
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    return None if licence is None else str(licence)
