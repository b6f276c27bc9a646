"""Greedy continuations of a few fixed prompts by both models, side by side.

They show how a model sounds, which no score tells; they measure nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.footprint import context_length
from eval.scores import Sample, no_progress

Progress = Callable[[str, int, int], None]
PROMPTS = (
    "The three primary colours are",
    "Once upon a time, in a village by the sea, there lived",
    "To bake a loaf of bread, first",
)
NEW_TOKENS = 48
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a chat template, which is a program, can end with on a message that it does not expect."""


def sample(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    prefix: Sequence[int] = (),
    progress: Progress = no_progress,
) -> tuple[Sample, ...]:
    """Continuations of at most 48 tokens; none of a prompt that leaves the model no room, or of no token.

    Every prompt begins with the ids `prefix`, which are not put there twice where the chat template writes them.
    """
    longest = context_length(before.config)
    samples = []
    for done, prompt in enumerate(prompts):
        progress("samples", done, len(prompts))
        ids_1t, framing = _framed(tokenizer, list(prefix), prompt)
        room = NEW_TOKENS if longest is None else min(NEW_TOKENS, longest - ids_1t.shape[1])
        if ids_1t.shape[1] == 0 or room < 1:
            continue
        texts = [_continued(model, tokenizer, ids_1t, room) for model in (before, after)]
        samples.append(Sample(prompt=prompt, framing=framing, before=texts[0], after=texts[1]))
    progress("samples", len(prompts), len(prompts))
    return tuple(samples)


def _framed(
    tokenizer: PreTrainedTokenizerBase, prefix: list[int], prompt: str
) -> tuple[Tensor, str]:
    """Ids (1, t), prefix included, and the framing."""
    text, framing = _text(tokenizer, prompt)
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    begun = ids[: len(prefix)] == prefix
    return torch.tensor([ids if begun else prefix + ids], dtype=torch.long), framing


def _text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[str, str]:
    """What the model reads, and the framing."""
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        except _TEMPLATE_ERRORS:
            # Some templates want more than a message; the sample's framing tells that it went without.
            pass
        else:
            return str(text), "chat"
    return prompt, "text"


@torch.inference_mode()
def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_1t: Tensor, new_tokens: int
) -> str:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    padding = ends[0] if isinstance(ends, list) else ends
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        # A checkpoint's own generation settings would fill what is left out.
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=0 if padding is None else padding,
    )
    ids = ids_1t.to(model.device)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
