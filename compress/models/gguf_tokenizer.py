"""The tokenizer of a GGUF file as ordinary tokenizer files, with what transformers gets wrong mended.

Two faults of the reader in transformers 5.23, both silent: it splits text before digits by the wrong
rule for some vocabularies, and it appends an "<|endoftext|>" of its own, with an id for which the
model has no embedding, to every byte-level vocabulary that lacks one (Llama 3).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from compress.errors import CheckpointError

_DIGITS_THEN_GPT2 = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
"""Values of `tokenizer.ggml.pre` whose vocabularies were learned with every digit alone
(llama.cpp, `llama_vocab`: "\\p{N}" before the GPT-2 pattern). transformers 5.23 keeps only the GPT-2
pattern for them, which splits white space before a digit differently."""


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts of a GGUF file's tokenizer that transformers does not read."""

    pre_tokenizer: str | None
    """The name of the pre-tokenizer: `tokenizer.ggml.pre`."""
    n_tokens: int
    max_length: int
    """Longest input of the model; 0 if unknown."""


def write_tokenizer(path: Path, folder: Path, facts: TokenizerFacts) -> None:
    """Write the tokenizer of the GGUF file `path`, chat template included, into `folder`.

    Raises CheckpointError if transformers cannot read it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be read: {error}") from error
    except BaseException as error:
        # The tokenizers library raises Exception itself, which no narrower clause names.
        if type(error) is Exception:
            raise CheckpointError(f"{path}: its tokenizer cannot be read: {error}") from error
        raise
    if facts.max_length > 0:
        tokenizer.model_max_length = facts.max_length
    for leftover in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(leftover, None)
    tokenizer.save_pretrained(folder)
    target = folder / "tokenizer.json"
    definition = json.loads(target.read_bytes())
    _mend(definition, facts)
    target.write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")


def _mend(definition: dict[str, Any], facts: TokenizerFacts) -> None:
    """Correct the content of a tokenizer.json in place."""
    added = definition["added_tokens"]
    definition["added_tokens"] = [token for token in added if token["id"] < facts.n_tokens]
    if facts.pre_tokenizer in _DIGITS_THEN_GPT2:
        digits = {"type": "Digits", "individual_digits": True}
        words = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, words]}
