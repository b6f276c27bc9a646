"""lm-evaluation-harness's view of a ready model, without its noise."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from math import isnan
from typing import Any

import datasets
import lm_eval.api.task
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.contexts import items, log_likelihoods, shares_contexts
from eval.errors import EvalError

MAX_LENGTH = 2048
_END_OF_TEXT = "<|endoftext|>"


class ReadyModel(HFLM):  # type: ignore[misc]
    """A causal model in memory; shows no progress bars and refuses NaN.

    Windows are at most 2,048 tokens (or the model's own limit), so that rolling tasks cost the same
    memory everywhere and equal logs of others.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        """`batch_size`: requests in a forward; the harness sorts them by length."""
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        super().__init__(
            pretrained=model,
            # The harness sets a pad token on it; the caller's stays as it is.
            tokenizer=deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            max_length=min(MAX_LENGTH, limit or MAX_LENGTH),
            # In bfloat16, the harness's default for such a model, a log-probability has 3 digits.
            softmax_dtype=torch.float32,
            prefix_token_id=prefix_token_id(tokenizer),
        )
        self._shares = shares_contexts(model, len(tokenizer), self.max_length)

    def _loglikelihood_tokens(
        self, requests: Any, *_: object, override_bs: int | None = None, **__: object
    ) -> list[tuple[float, bool]]:
        """As upstream, but a context that several requests share is read once."""
        answers: dict[int, tuple[float, bool]] = {}
        if self._shares:
            pairs = [(context, continuation) for _, context, continuation in requests]
            shared = items(pairs, self.batch_size, self.max_length)
            answers = dict(log_likelihoods(self.model, shared, self.batch_size, self.max_length))
            for k, answer in answers.items():
                self.cache_hook.add_partial("loglikelihood", requests[k][0], answer)
        rest = [k for k in range(len(requests)) if k not in answers]
        found = super()._loglikelihood_tokens(
            [requests[k] for k in rest], disable_tqdm=True, override_bs=override_bs
        )
        answers |= zip(rest, found, strict=True)
        if any(isnan(log_likelihood) for log_likelihood, _ in answers.values()):
            raise EvalError("the model gives NaN log-likelihoods; try dtype float32")
        return [answers[k] for k in range(len(requests))]

    def loglikelihood(self, requests: Any, *_: object, **__: object) -> Any:
        """As upstream, without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, *_: object, **__: object) -> Any:
        """As upstream, without a progress bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, *_: object, **__: object) -> Any:
        """As upstream, without a progress bar."""
        return super().generate_until(requests, disable_tqdm=True)


def prefix_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that unprompted text should begin with, if it is not the harness's choice.

    The harness takes BOS, else EOS. Where that is the mark of a chat turn (SmolLM2-Instruct's BOS
    is <|im_start|>, Qwen's EOS <|im_end|>), text looks like a chat to the model: it cost SmolLM2 5
    points on BLiMP. So if the chat template spells that token out and the vocabulary has an
    <|endoftext|>, which separated documents in pretraining, that one is taken. None: no difference.
    """
    usual = tokenizer.bos_token or tokenizer.eos_token
    templates = tokenizer.chat_template
    spelled = str(templates if not isinstance(templates, dict) else list(templates.values()))
    if not usual or not templates or usual not in spelled or usual == _END_OF_TEXT:
        return None
    identity = tokenizer.get_vocab().get(_END_OF_TEXT)
    return None if identity is None else int(identity)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences logging and progress bars of lm-eval and datasets, and restores them."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars_were_on = datasets.are_progress_bars_disabled() is False
    bar: Callable[..., Any] = lm_eval.api.task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if bars_were_on:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
