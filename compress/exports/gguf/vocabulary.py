"""A tokenizer as keys of a file: its tokens and merges, and the name of the rule by which llama.cpp splits text.

llama.cpp runs no pre-tokenizer out of a file: it has the rules of known tokenizers in code, by name. So a tokenizer can
be written if its own rule, as the tokenizers library states it, is one of these; any other would split text otherwise
without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from compress.errors import CheckpointError
from compress.models.resolve import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_BYTES = "ByteLevel"
"""The rule of GPT-2, which the tokenizers library has in code."""
_DIGIT = "Digits"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER
_RULES: Mapping[tuple[str, ...], str] = {
    (_BYTES,): "gpt-2",
    (_DIGIT, _BYTES): "smollm",
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}|{_ENDS}",): "dbrx",
    (rf"{_WORDS}|\p{{N}}|{_OTHERS}|{_ENDS}",): "qwen2",
    (
        rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}",
    ): "tekken",
    (
        rf"{_CASED}*{_LOWER}+{_CONTRACTIONS}?|{_CASED}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|"
        rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}",
    ): "gpt-4o",
}
"""Rules that split text, one after the other, with llama.cpp's name for them."""
_WHOLE = {"dbrx": "llama-bpe", "tekken": "tekken"}
"""The names of rules together with looking a whole word up before its merges."""
_MERGED = frozenset(_RULES.values()) - {"tekken"}
"""The names of rules without."""
_SPACE = "▁"
_BARS = ("|", "\N{FULLWIDTH VERTICAL LINE}")
_NO_MERGE = "\x01 \x01"
"""A merge of characters that no text of bytes has, for llama.cpp demands one."""
_ADDED_SCORE = -1000.0


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of a tokenizer."""

    model: str
    """gpt2: merges of bytes; llama: merges of characters, by score."""
    rule: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float] | None
    """Of merges by score: higher ones come first."""
    adds: Mapping[str, bool]
    """Whether text begins with bos and ends with eos."""
    space_prefix: bool
    """Whether text begins with a space that it has not."""


def problem_of_tokenizer(folder: Path, n_rows: int) -> str:
    """Why llama.cpp would not split text as the tokenizer in a folder does; empty if it would."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        return f"its tokenizer, {type(tokenizer).__name__}, tells no rules by which it splits text"
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    if n_tokens > n_rows:
        return f"its tokenizer has {n_tokens} tokens, and its embeddings {n_rows} rows"
    definition = _definition(tokenizer)
    if _rule(definition):
        return ""
    return f"llama.cpp has no name for the rule by which its tokenizer splits text: {_told(definition)}"


def read_vocabulary(folder: Path, n_rows: int) -> Vocabulary:
    """The vocabulary of the tokenizer in a folder, filled up to the rows of the embeddings.

    Raises CheckpointError for a tokenizer that `problem_of_tokenizer` finds fault with.
    """
    tokenizer = load_tokenizer(folder)
    definition = _definition(tokenizer)
    rule = _rule(definition)
    if not rule:
        raise CheckpointError(f"gguf export: {problem_of_tokenizer(folder, n_rows)}")
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    kinds = _kinds(definition, by_id)
    tokens = [_token(by_id.get(row), kinds.get(row), row) for row in range(n_rows)]
    is_spm = rule == "default"
    return Vocabulary(
        model="llama" if is_spm else "gpt2",
        rule=rule,
        tokens=tokens,
        kinds=[int(kinds.get(row, _kind("UNUSED"))) for row in range(n_rows)],
        scores=_scores(definition, by_id, n_rows) if is_spm else None,
        adds=_additions(tokenizer),
        space_prefix=_has_space_prefix(definition),
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, folder: Path) -> None:
    """Add the keys of a tokenizer, its chat template included, which the folder holds."""
    from gguf import SpecialVocab

    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores is not None or vocabulary.space_prefix:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    special = SpecialVocab(
        folder, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens)
    )
    if special.load_merges and not special.merges:
        special.merges = [_NO_MERGE]
    special.add_special_token.update(vocabulary.adds)
    special.add_to_gguf(writer, quiet=True)


def _definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer, as it works."""
    backend: Any = tokenizer
    found: dict[str, Any] = json.loads(backend.backend_tokenizer.to_str())
    return found


def _rule(definition: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rule of a tokenizer; empty if it has none."""
    model = definition["model"]
    if model.get("type") != "BPE":
        return ""
    if model.get("byte_fallback"):
        return "default" if _normalises_spaces(definition) else ""
    normaliser = definition.get("normalizer") or {}
    if normaliser.get("type", "NFC") != "NFC":
        return ""
    name = _RULES.get(_splits(definition.get("pre_tokenizer") or {}), "")
    if model.get("ignore_merges"):
        return _WHOLE.get(name, "")
    return name if name in _MERGED else ""


def _splits(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """The rules by which a pre-tokenizer splits text, one after the other; ("?",) for one that is no such thing."""
    steps = [pre_tokenizer]
    if pre_tokenizer.get("type") == "Sequence":
        steps = list(pre_tokenizer["pretokenizers"])
    rules: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and "Regex" in step["pattern"] and _isolates(step):
            rules.append(str(step["pattern"]["Regex"]))
        elif kind == "Digits" and step.get("individual_digits"):
            rules.append(_DIGIT)
        elif kind == _BYTES:
            rules += [_BYTES] if step.get("use_regex", True) else []
        else:
            return ("?",)
    return tuple(rules)


def _isolates(step: Mapping[str, Any]) -> bool:
    """Whether each match of a pattern becomes a piece of its own."""
    behaviour = (step.get("behavior"), bool(step.get("invert")))
    return behaviour in (("Isolated", False), ("Removed", True))


def _normalises_spaces(definition: Mapping[str, Any]) -> bool:
    """Whether spaces become the sign that llama.cpp takes for them, and nothing else of the text changes."""
    steps = _steps(definition, "normalizer", "normalizers") + _steps(
        definition, "pre_tokenizer", "pretokenizers"
    )
    replaces = {"Replace", "Metaspace"} & {step["type"] for step in steps}
    known = {"Replace", "Prepend", "Metaspace", "Split"}
    return bool(replaces) and all(step["type"] in known for step in steps)


def _has_space_prefix(definition: Mapping[str, Any]) -> bool:
    for step in _steps(definition, "normalizer", "normalizers") + _steps(
        definition, "pre_tokenizer", "pretokenizers"
    ):
        if step["type"] == "Prepend" or step.get("add_prefix_space"):
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _steps(definition: Mapping[str, Any], name: str, several: str) -> list[Mapping[str, Any]]:
    found = definition.get(name)
    if not found:
        return []
    return list(found[several]) if found["type"] == "Sequence" else [found]


def _kind(name: str) -> int:
    from gguf import TokenType

    return int(TokenType[name])


def _kinds(definition: Mapping[str, Any], by_id: Mapping[int, str]) -> dict[int, int]:
    """The type of every token."""
    found = dict.fromkeys(by_id, _kind("NORMAL"))
    model = definition["model"]
    if model.get("byte_fallback"):
        for number, token in by_id.items():
            if len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):
                found[number] = _kind("BYTE")
    for added in definition["added_tokens"]:
        special = added["special"] or _looks_special(added["content"])
        found[int(added["id"])] = _kind("CONTROL" if special else "USER_DEFINED")
    unknown = model.get("unk_token")
    if model.get("byte_fallback") and unknown in model["vocab"]:
        found[model["vocab"][unknown]] = _kind("UNKNOWN")
    return found


def _looks_special(token: str) -> bool:
    """Whether a token is no text, though its tokenizer does not say so: Gemma's <unused0>, say."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    if token.startswith("<unused") and token.endswith(">"):
        return True
    return any(token.startswith(f"<{bar}") and token.endswith(f"{bar}>") for bar in _BARS)


def _token(token: str | None, kind: int | None, row: int) -> str:
    """A token as a file has it; rows of the embeddings that no token has get names."""
    if token is None:
        return f"[PAD{row}]"
    return token.replace(_SPACE, " ") if kind == _kind("USER_DEFINED") else token


def _scores(definition: Mapping[str, Any], by_id: Mapping[int, str], n_rows: int) -> list[float]:
    """Scores that make llama.cpp merge in the tokenizer's order: the earlier a merge, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(definition["model"]["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    added = {int(token["id"]) for token in definition["added_tokens"]}
    return [
        _ADDED_SCORE if row in added or row not in by_id else -float(ranks.get(by_id[row], 0))
        for row in range(n_rows)
    ]


def _additions(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether an ordinary text begins with bos and ends with eos."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    longer = len(whole) > len(bare)
    return {
        "bos": longer and whole[0] == tokenizer.bos_token_id,
        "eos": longer and whole[-1] == tokenizer.eos_token_id,
    }


def _told(definition: Mapping[str, Any]) -> str:
    """The rule of a tokenizer, for messages: its kind, and what splits the text."""
    splits = json.dumps(definition.get("pre_tokenizer"))
    return f"{definition['model'].get('type')} after {splits[:200]}"
