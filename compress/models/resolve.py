"""Resolving a model's name to an ordinary Hugging Face folder with dense safetensors weights.

A model is the word "demo", a folder, a GGUF file, or an id of the Hugging Face hub. Everything that
its metadata can tell against it is told here, before weights are read. No code of a model is run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calibration.store import file_sha256
from compress.callbacks import Progress, no_progress
from compress.errors import CheckpointError
from compress.models.checks import WHAT_MODELS_ARE, check_folder
from compress.models.companions import LICENCES, MODULE_FILES, READ, module_folders
from compress.models.demo import DEMO, demo_folder
from compress.models.gguf import (
    CONVERTER_VERSION,
    SOURCE_FILE,
    convert,
    refuse_bad_magic,
)
from compress.models.model_config import config_notes
from eval.wheels import cache_root

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "README.md", *READ, *LICENCES]
_HUB_IGNORED = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*.safetensors"]
"""Sub-folders hold other formats (onnx, original), but for additional_chat_templates: globs have no other way to spare
it. Consolidated files hold the same weights again."""


@dataclass(frozen=True)
class SourceModel:
    """A dense causal language model on this machine."""

    spec: str
    """The name that the user wrote."""
    folder: Path
    """An ordinary Hugging Face folder: config.json, tokenizer, safetensors."""
    revision: str | None
    """The commit, for a model of the hub."""
    notes: tuple[str, ...]
    """Remarks on the origin of the weights, for the report."""
    licence: str | None
    """The licence in the front matter of its README."""
    licence_link: str | None = None
    """The link there, for a licence that the hub has no name for."""
    has_own_head: bool = False
    """Whether its weights hold a head that is not the embeddings, though its config.json ties the two."""

    def with_own_head(self) -> SourceModel:
        """The model with what the weights have told."""
        note = (
            "config.json says that the head is the embeddings, but the weights hold a head that is not; that one was "
            "used, as transformers does, and exports say tie_word_embeddings false"
        )
        return replace(self, has_own_head=True, notes=(*self.notes, note))


def resolve_model(
    spec: str, cache: Path | None = None, *, progress: Progress = no_progress
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
        folder, revision = snapshot(spec)
    check_folder(spec, folder)
    notes = (*_notes(folder), *config_notes(folder))
    return SourceModel(spec, folder, revision, notes, *read_licence(folder))


def _converted(path: Path, cache: Path, progress: Progress) -> Path:
    refuse_bad_magic(path)
    folder = cache / "models" / f"{path.stem}-{file_sha256(path)[:16]}-v{CONVERTER_VERSION}"
    convert(path, folder, progress=progress)
    return folder


@dataclass(frozen=True)
class Wanted:
    """The purpose for which a snapshot of the hub is wanted, for messages."""

    option: str
    """The option that names it."""
    here: str
    """Advice that works without the hub."""
    right: str = WHAT_MODELS_ARE
    """Advice on what the option takes."""


_MODEL = Wanted("model", f"name a local folder or .gguf file, or {DEMO!r}")


def is_hub_id(spec: str) -> bool:
    """Whether it is written like one: owner/name, or owner/name@revision."""
    is_file = Path(spec).suffix.lower() in (".gguf", ".safetensors")
    return not is_file and _HUB_ID.fullmatch(spec) is not None


def snapshot(spec: str, wanted: Wanted = _MODEL) -> tuple[Path, str]:
    """A repository of the hub as its folder in the hub's own cache, fetched if it is not there; and its commit.

    Raises CheckpointError naming the option.
    """
    option, right = wanted.option, wanted.right
    if not is_hub_id(spec):
        raise CheckpointError(f"{option}: there is no file or folder {spec!r}; {right}")
    name, _, revision = spec.partition("@")
    try:
        folder = _download(name, revision or None)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{option}: {name} is gated; accept its terms on the hub, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{option}: {spec!r} is neither a file or folder here nor a model of the hub; {right}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{option}: {spec!r} is no file or folder here, and the Hugging Face hub cannot be asked for it "
            f"({_first_line(error)}); {wanted.here}"
        ) from error
    except ValueError as error:  # what the hub's client raises for a malformed name
        raise CheckpointError(f"{option}: {spec!r} is no model: {error}; {right}") from error
    return folder, folder.name


def _download(name: str, revision: str | None) -> Path:
    """The folder in the hub's cache; the folders of modules are fetched when modules.json has told their names."""
    folder = Path(
        snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
        )
    )
    wanted = [f"{module}/*{end}" for module in module_folders(folder) for end in MODULE_FILES]
    if wanted:
        snapshot_download(name, revision=revision, allow_patterns=wanted)
    return folder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; no code in the folder is run.

    Raises CheckpointError if there is none, or none that transformers can read.
    """
    problem = f"{folder}: its tokenizer files (tokenizer.json, tokenizer_config.json, ...)"
    try:
        found = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (
        *(ValueError, TypeError, LookupError, AttributeError, OSError, ImportError),
        RecursionError,
    ) as error:
        raise CheckpointError(f"{problem} cannot be used: {_first_line(error)}") from error
    except BaseException as error:
        # The tokenizers library raises Exception itself, which no narrower clause names.
        if type(error) is Exception:
            raise CheckpointError(f"{problem} cannot be used: {_first_line(error)}") from error
        raise
    if not isinstance(found, PreTrainedTokenizerBase):
        raise CheckpointError(f"{problem} make a {type(found).__name__}, which is no tokenizer")
    longest: object = found.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest > 0:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {longest!r}; a number of tokens above 0 is "
            "right"
        )
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _notes(folder: Path) -> tuple[str, ...]:
    path = folder / SOURCE_FILE
    if not path.is_file():
        return ()
    try:
        note = json.loads(path.read_bytes())["note"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); remove {folder}") from error
    return (str(note),)


def read_licence(folder: Path) -> tuple[str | None, str | None]:
    """The licence in the front matter of the folder's README.md and the link to it; None where it names none."""
    path = folder / "README.md"
    if not path.is_file():
        return None, None
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None, None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None, None
    if not isinstance(front, dict):
        return None, None
    licence, link = front.get("license"), front.get("license_link")
    if licence == "other":
        licence = front.get("license_name") or licence
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    return None if licence is None else str(licence), None if link is None else str(link)
