"""Any GGUF file of a causal language model, turned once into an ordinary Hugging Face folder.

transformers reads GGUF but refuses to save what it read, so the weights are moved (not copied) into
a fresh model built on the meta device from the same configuration, and that one is saved. Peak
memory is one set of unpacked weights.
File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from calibration.store import file_sha256
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.models.gguf_checks import TOKENS, field_of, refuse_other_kinds
from compress.models.gguf_rope import RopeScaling, apply_rope, read_rope
from compress.models.gguf_tokenizer import TokenizerFacts, write_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

MAGIC = b"GGUF"
CONVERTER_VERSION = 2
"""Part of the cache key: raise it when converted folders would come out differently."""

SOURCE_FILE = "compress_source.json"
"""Written last into a converted folder; says what it was made from."""

_STAGE = "converting GGUF"
_N_STEPS = 4


@dataclass(frozen=True)
class GGUFHeader:
    """The metadata of a GGUF file; no tensor data."""

    path: Path
    architecture: str
    name: str | None
    licence: str | None
    pre_tokenizer: str | None
    n_tokens: int
    """Size of the tokenizer's vocabulary."""
    tensor_types: dict[str, int]
    """Number of tensors of each storage type, e.g. {"Q4_1": 210, "F32": 61}."""
    n_parameters: int
    matrix_types: frozenset[str]
    """Storage types of the tensors with two or more dimensions."""
    rope: RopeScaling

    def dtype(self) -> torch.dtype:
        """float32, unless all matrices are 16-bit floats of one kind; those stay as they are."""
        exact = {frozenset({"F16"}): torch.float16, frozenset({"BF16"}): torch.bfloat16}
        return exact.get(self.matrix_types, torch.float32)


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def is_converted(folder: Path) -> bool:
    """Whether `folder` was finished by `convert`."""
    return (folder / SOURCE_FILE).is_file()


def converted_from(folder: Path) -> str | None:
    """The name of the GGUF file that a folder was made from; None for one that `convert` did not make."""
    if not is_converted(folder):
        return None
    return str(json.loads((folder / SOURCE_FILE).read_bytes())["file"])


def refuse_bad_magic(path: Path) -> None:
    """Raise CheckpointError unless the file begins as GGUF files do."""
    if not is_gguf(path):
        raise CheckpointError(
            f"{path}: not a GGUF file (it does not begin with {MAGIC.decode()!r}); a model is a"
            " folder with config.json and safetensors, or a .gguf file"
        )


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file: whole, one file, and of a model with a tokenizer.

    Raises CheckpointError, naming the file and what is wrong with it.
    """
    from gguf import GGUFReader  # not there where checkpoints are only loaded

    refuse_bad_magic(path)
    try:
        return _header(path, GGUFReader(str(path)))
    except CheckpointError:
        raise
    except (
        *(ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError, struct.error),
        AttributeError,
    ) as error:
        raise CheckpointError(
            f"{path}: truncated or corrupt GGUF file of {path.stat().st_size:,} bytes ({error});"
            " download it again"
        ) from error


def _header(path: Path, reader: GGUFReader) -> GGUFHeader:
    refuse_other_kinds(path, reader)
    types = [_type_of(tensor) for tensor in reader.tensors]
    architecture = str(field_of(reader, "general.architecture"))
    return GGUFHeader(
        path=path,
        architecture=architecture,
        name=_text(field_of(reader, "general.name")),
        licence=_text(field_of(reader, "general.license")),
        pre_tokenizer=_text(field_of(reader, "tokenizer.ggml.pre")),
        n_tokens=len(reader.fields[TOKENS].data),
        tensor_types=dict(Counter(types)),
        n_parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        matrix_types=frozenset(
            kind
            for kind, tensor in zip(types, reader.tensors, strict=True)
            if len(tensor.shape) > 1
        ),
        rope=read_rope(reader, architecture),
    )


def _type_of(tensor: ReaderTensor) -> str:
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(tensor.tensor_type).name)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def convert(path: Path, folder: Path, *, progress: Progress) -> None:
    """Write the GGUF file `path` as an ordinary Hugging Face folder.

    `folder` appears whole or not at all; one that is there already is left as it is. Weights are
    unpacked exactly (see GGUFHeader.dtype). Raises CheckpointError for a file that is no model
    transformers can read, or when the disk is too small.
    """
    if is_converted(folder):
        return
    header = read_header(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = header.n_parameters * header.dtype().itemsize
    free = shutil.disk_usage(folder.parent).free
    if free < 1.05 * needed:
        raise CheckpointError(
            f"{folder.parent}: unpacking {path.name} needs {needed:,} bytes, {free:,} are free; set"
            " COMPRESS_CACHE to a larger disk"
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(header, partial, progress)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)  # mkdtemp makes it private
    try:
        partial.rename(folder)
    except OSError:
        # Another process may have finished the same conversion; any other reason is an error.
        if not is_converted(folder):
            raise


def _write(header: GGUFHeader, folder: Path, progress: Progress) -> None:
    progress(_STAGE, 0, _N_STEPS)
    with _without_progress_bars():
        model = _load(header)
        progress(_STAGE, 1, _N_STEPS)
        model.save_pretrained(folder, max_shard_size="2GB")
        max_length = int(getattr(model.config, "max_position_embeddings", 0))
        n_embeddings = int(model.get_input_embeddings().weight.shape[0])
        del model
    progress(_STAGE, 2, _N_STEPS)
    if header.n_tokens > n_embeddings:
        raise CheckpointError(
            f"{header.path}: the tokenizer has {header.n_tokens} tokens, the model embeddings for"
            f" {n_embeddings}"
        )
    write_tokenizer(
        header.path, folder, TokenizerFacts(header.pre_tokenizer, header.n_tokens, max_length)
    )
    progress(_STAGE, 3, _N_STEPS)
    _write_source(header, folder)
    progress(_STAGE, _N_STEPS, _N_STEPS)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """The loader draws bars of its own on stderr; ours are the ones a user should see."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _load(header: GGUFHeader) -> Any:
    """The unpacked model as one that can be saved: same weights, no quantisation config."""
    where: dict[str, Any] = {"gguf_file": header.path.name, "local_files_only": True}
    model_class: Any = AutoModelForCausalLM  # its stubs do not know output_loading_info
    try:
        config = AutoConfig.from_pretrained(header.path.parent, **where)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(
                f"{header.path}: {header.architecture!r} is not a causal language model"
            )
        loaded, info = model_class.from_pretrained(
            header.path.parent,
            dtype=header.dtype(),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **where,
        )
    except CheckpointError:
        raise
    except (
        *(ValueError, LookupError, RuntimeError, ArithmeticError, TypeError, AttributeError),
        StrictDataclassError,
    ) as error:
        raise CheckpointError(
            f"{header.path}: transformers cannot read this GGUF file (architecture"
            f" {header.architecture!r}): {error}"
        ) from error
    absent = sorted(set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]})
    if absent:
        raise CheckpointError(f"{header.path}: no weights in the file for {', '.join(absent[:5])}")
    apply_rope(loaded.config, header.rope, header.path)
    return _saveable(loaded)


def _saveable(loaded: Any) -> Any:
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _write_source(header: GGUFHeader, folder: Path) -> None:
    types = ", ".join(f"{count} {name}" for name, count in sorted(header.tensor_types.items()))
    note = f"weights unpacked from the GGUF file {header.path.name} ({types}) to {header.dtype()}"
    source = {
        "format_version": 1,
        "converter_version": CONVERTER_VERSION,
        "file": header.path.name,
        "name": header.name,
        "licence": header.licence,
        "note": note,
        "sha256": file_sha256(header.path),
    }
    front = f"---\nlicense: {header.licence}\n---\n\n" if header.licence else ""
    title = header.name or header.path.stem
    (folder / "README.md").write_text(
        f"{front}# {title}\n\n{note[0].upper()}{note[1:]}.\n", encoding="utf-8"
    )
    (folder / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
