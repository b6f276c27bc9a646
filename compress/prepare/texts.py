"""Texts of a recipe for its model: sequences to calibrate on, windows to evaluate on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from calibration.bos import Bos
from calibration.errors import InputError
from calibration.heads import Head
from calibration.outputs import head_of
from calibration.text.data import Framing, Split, Tokens, load_tokens, load_windows, parse_source
from calibration.text.special import SpecialTokens
from compress.config.recipe import AUTO, Recipe
from compress.errors import RecipeError
from compress.exports import EXPORTS, Use, formats_for
from compress.subjects.opening import opening
from eval.footprint import context_length

DEFAULT_TASKS = ("offline_hellaswag", "offline_piqa", "offline_arc_easy")
"""Tasks of a language model whose recipe names none; their items come with the toolkit."""

SHOWN = 6
"""Tokens of a window that a plan shows."""
FEW = 32
"""Tokens that tell what a block does with any."""


def refuse_long_sequences(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raises RecipeError if the model does not take sequences of so many tokens."""
    most = context_length(config)
    if most is not None and recipe.seq_len > most:
        raise RecipeError(
            f"{recipe.seq_len} tokens; the model takes at most {most}", option="seq_len"
        )


def refuse_unknown_tokens(
    text: Tokens, tokenizer: Any, config: PretrainedConfig, option: str
) -> None:
    """Raises RecipeError for token ids that the model has no embedding for, or classes; `option` gave the text."""
    _refuse_unknown_labels(text, config, option)
    size, largest = config.get_text_config().vocab_size, int(text.input_ids.max())
    if largest >= size or int(text.input_ids.min()) < 0:
        raise RecipeError(
            f"it has token ids up to {largest}, but the model has {size} embeddings (vocab_size) and its "
            f"tokenizer {len(tokenizer)} tokens; use the tokenizer that the model was trained with",
            option=option,
        )


def framing_for(config: PretrainedConfig) -> Framing:
    """How a model of this configuration reads text."""
    head = head_of(config)
    return Framing.PACKED if head is not None and head.writes_text else Framing.EXAMPLES


def settled_for(recipe: Recipe, config: PretrainedConfig) -> Recipe:
    """The recipe with its tasks settled for a model of this configuration: only language models have any.

    Raises RecipeError if a recipe asks for what the model cannot do.
    """
    head = head_of(config)
    if head is not None and head.writes_text:
        return replace(recipe, tasks=DEFAULT_TASKS) if recipe.tasks == (AUTO,) else recipe
    if head is Head.FEATURES and recipe.method.weighs_by_divergence:
        raise RecipeError(
            "kl compares predictions, and an encoder alone makes none; use fisher",
            option="method.importance",
        )
    if head is Head.CLASSES and _n_classes(config) < 2:
        raise RecipeError(
            f"its head has num_labels {config.num_labels} and problem_type {config.problem_type}; only "
            "classifiers of one class among two or more are compressed",
            option="model",
        )
    opening(recipe).refuse_wordless()
    if recipe.bos is not Bos.AUTO:
        raise RecipeError(
            f"{recipe.bos} is for models that write text; this one reads texts whole, with the special tokens that its "
            "tokenizer puts around them; use auto",
            option="bos",
        )
    unfit = next((name for name in recipe.export if head not in EXPORTS[name].traits.heads), None)
    if unfit is not None:
        fit = [name for name in formats_for(Use.MODEL) if head in EXPORTS[name].traits.heads]
        raise RecipeError(
            f"{unfit} is for models that write text; choose {' or '.join(fit)}", option="export"
        )
    if recipe.tasks not in ((), (AUTO,)):
        raise RecipeError(
            f"{', '.join(recipe.tasks)} are for models that write text; this one is compared with its original "
            "on --eval-text, so give --tasks none",
            option="tasks",
        )
    return replace(recipe, tasks=())


def _n_classes(config: PretrainedConfig) -> int:
    """The number of classes, of which a sequence has exactly one; 0 for a head of another kind."""
    single = config.problem_type in (None, "single_label_classification")
    return int(config.num_labels or 0) if single else 0


def _refuse_unknown_labels(text: Tokens, config: PretrainedConfig, option: str) -> None:
    if text.labels is None or head_of(config) is not Head.CLASSES:
        return
    n_classes = _n_classes(config)
    least, most = int(text.labels.min()), int(text.labels.max())
    if least < 0 or most >= n_classes:
        wrong = least if least < 0 else most
        raise RecipeError(
            f"it has the label {wrong}, and the model's classes are 0 to {n_classes - 1}",
            option=option,
        )


def prefix_of(recipe: Recipe, tokenizer: Any, framing: Framing) -> tuple[int, ...]:
    """Ids that every window and every prompt begins with; none for a model that reads whole texts.

    Raises RecipeError if the tokenizer has no such token as the recipe wants, or puts in front what it likes.
    """
    if framing is Framing.EXAMPLES:
        return ()
    try:
        return SpecialTokens.of(tokenizer, recipe.bos).prefix
    except InputError as error:
        raise RecipeError(str(error), option="bos") from error


def prefix_in(text: Tokens) -> str | None:
    """The special tokens that windows begin with, as they are written; None for text that is not packed."""
    (source,) = text.provenance["sources"]
    return source["prefix"] or "" if "prefix" in source else None


def text_notes(text: Tokens) -> tuple[str, ...]:
    """A remark on ready rows of token ids that do not begin as the tokenizer begins a text."""
    return tuple(
        f"{source['rows_without_prefix']} of {source['sequences']} rows of token ids from {source['source']} do not "
        "begin with the special tokens that the tokenizer puts in front of a text; they are used as they are"
        for source in text.provenance["sources"]
        if source.get("rows_without_prefix")
    )


def text_lines(tokens: Tokens, windows: Tokens | None, tokenizer: Any) -> tuple[str, ...]:
    """Lines of a plan on each text: its windows, the first tokens of one, and remarks."""
    lines = []
    for name, text in (("calibration", tokens), ("evaluation", windows)):
        if text is not None:
            n, t = text.input_ids.shape
            first = _first_tokens(text, tokenizer)
            lines.append(f"{name} text: {n} x {t} tokens; the first window begins {first}")
            lines += [f"note: {note}" for note in text_notes(text)]
    return tuple(lines)


def _first_tokens(text: Tokens, tokenizer: Any) -> str:
    """The first tokens of the first window, special ones as they are written."""
    ids = text.input_ids[0]
    if text.attention_mask is not None:
        ids = ids[text.attention_mask[0].bool()]
    return " ".join(repr(tokenizer.decode([k])) for k in ids[:SHOWN].tolist())


def calibration_text(recipe: Recipe, tokenizer: Any, framing: Framing) -> Tokens:
    """The sequences that statistics are collected on. Raises InputError naming the source."""
    return load_tokens(
        [parse_source(text) for text in recipe.calibration],
        tokenizer,
        framing=framing,
        n_sequences=recipe.samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        split=Split.CALIBRATION,
        bos=recipe.bos,
    )


def held_out_windows(recipe: Recipe, tokenizer: Any, framing: Framing) -> Tokens | None:
    """Windows of the evaluation's text, none of them padded where text is packed; None if the recipe wants none.

    Raises RecipeError naming the option if the text is too short.
    """
    if not recipe.eval_windows:
        return None
    try:
        windows = load_windows(
            parse_source(recipe.eval_text),
            tokenizer,
            n_sequences=recipe.eval_windows,
            seq_len=recipe.seq_len,
            framing=framing,
            bos=recipe.bos,
        )
    except InputError as error:
        # Its remedies name the calibration's options; whose text it is must be said.
        raise RecipeError(
            f"{error} (here --eval-windows stands for samples; 0 skips this evaluation)",
            option="eval_text",
        ) from error
    if windows.attention_mask is not None and framing is Framing.PACKED:
        raise RecipeError(
            f"{recipe.eval_text} has rows shorter than {recipe.seq_len} tokens (seq_len); "
            "use longer text, or a smaller seq_len",
            option="eval_text",
        )
    return windows


def few_tokens(tokens: Tokens) -> Tokens:
    """The first of the first sequence, none of them padding."""
    ids = tokens.input_ids[:1]
    if tokens.attention_mask is not None:
        ids = ids[:, tokens.attention_mask[0].bool()]
    return Tokens(input_ids=ids[:, :FEW], attention_mask=None, provenance={})
