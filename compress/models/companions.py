"""The files beside the weights of a model that go with every export: all that programs which load or serve it read.

These are the files of tokenizers, processors and generation that transformers reads, those of licences, and, for a
model of sentence-transformers, those that its modules.json leads to. Weights of the model are never among them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from compress.models.links import inside

READ = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "chat_template*/*", "additional_chat_templates/*.jinja"),
    *("vocab*", "*_vocab.json", "merges.txt", "*.model", "*.tiktoken", "*.spm", "tekken.json"),
    *("*.tokenizer", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json"),
    *("word_shape.json", "word_pronunciation.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "audio_tokenizer_config.json",
    *("config_sentence_transformers.json", "sentence_*_config.json", "modules.json"),
)
"""Files that programs read, as globs below the folder of the model."""
LICENCES = ("LICENSE*", "LICENCE*", "License*", "COPYING*", "NOTICE*", "Notice*", "USE_POLICY*")
"""Files that people read, likewise."""
MODULES = "modules.json"
"""The list of a sentence-transformers model's modules, each with its folder: pooling, dense layers."""
MODULE_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Kinds of the files of such a module; a dense layer's weights are its own."""
LARGEST = 256 << 20
"""Bytes of the largest file that is taken for one of a tokenizer; known ones have up to 40 MB."""
_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def companions(folder: Path) -> dict[str, Path]:
    """The files by their names below the folder, as an export has them too.

    Raises CheckpointError for a link out of the folder, a file that is too large, and a module that is incomplete.
    """
    found = {
        path.relative_to(folder).as_posix()
        for pattern in (*READ, *LICENCES)
        for path in folder.glob(pattern)
        if not path.name.endswith((*_WEIGHTS, *_PICKLES))
    }
    found |= set(module_files(folder))
    files = {name: inside(folder, name) for name in sorted(found)}
    there = {name: path for name, path in files.items() if path.is_file()}
    for name, path in there.items():
        n_bytes = path.stat().st_size
        if n_bytes > LARGEST and not name.endswith(_WEIGHTS):
            raise CheckpointError(
                f"{path} would be copied into every export as a file of the tokenizer or the processor, and has "
                f"{n_bytes:,} bytes, more than any of these ({LARGEST:,}); move it elsewhere"
            )
    return there


def copy_companions(folder: Path, target: Path) -> None:
    """Copy the files of one folder into another; links become files. Raises CheckpointError as `companions`."""
    for name, path in companions(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def module_folders(folder: Path) -> list[str]:
    """The folders that a sentence-transformers model keeps modules in, below its own; none for any other model.

    Raises CheckpointError for a modules.json that is none, or that names a folder elsewhere.
    """
    path = inside(folder, MODULES)
    if not path.is_file():
        return []
    try:
        entries: Any = json.loads(path.read_bytes())
        names = [entry["path"] for entry in entries]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no list of modules, each with its path: {error}"
        ) from error
    for name in names:
        if not isinstance(name, str):
            raise CheckpointError(
                f"{path}: a module's path is {name!r}; expected the name of a folder"
            )
        inside(folder, name)
    return [name.strip("/") for name in names if name.strip("/.")]


def module_files(folder: Path) -> Iterator[str]:
    """Names, below the folder, of the files of a sentence-transformers model's modules.

    Raises CheckpointError for a module without files, and one whose weights are a pickle.
    """
    for module in module_folders(folder):
        files = [path for path in sorted((folder / module).rglob("*")) if path.is_file()]
        if not files:
            raise CheckpointError(
                f"{folder}: {MODULES} names the module {module}, and there are no files in it; download it again"
            )
        pickles = [path for path in files if path.name.endswith(_PICKLES)]
        if pickles and not any(path.suffix == ".safetensors" for path in files):
            raise CheckpointError(
                f"{pickles[0]} holds the weights of a module as a pickle, which can run code when loaded and is never "
                "copied; convert it where you trust it: SentenceTransformer(folder).save_pretrained(new_folder)"
            )
        yield from (
            path.relative_to(folder).as_posix() for path in files if path.suffix in MODULE_FILES
        )
