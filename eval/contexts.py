"""Log-likelihoods of continuations, each shared context read once.

The choices of a multiple-choice item share their context: four endings of HellaSwag make the plain way read it four
times, and compute logits for every position of it. Here a context is read once, its keys and values are handed to its
continuations, and logits exist for continuations only: about half of the work on HellaSwag, PIQA and ARC.

Shapes: c = contexts in a batch, r = their continuations, p = tokens of the longest prefix, s = of the longest
continuation, v = vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

Answer = tuple[float, bool]
"""The log-likelihood of a continuation, and whether greedy decoding would write it."""


@dataclass(frozen=True)
class Item:
    """A context and some of the continuations asked for; `positions` says which requests these are."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the context and its longest continuation."""
        return len(self.context) + max(map(len, self.continuations))


def shares_contexts(model: PreTrainedModel, vocabulary: int, longest: int) -> bool:
    """Whether continuations that start from cached contexts get the log-likelihoods they should.

    Sliding windows and recurrent states depend on where a sequence is cut. Of the rest, some models count positions by
    the cache and not by the mask (BART's family), or from 2 (RoBERTa's), or have no cache at all: so a few tokens are
    tried, contexts of unequal length in one batch beside a forward for each request.
    """
    if model.get_decoder() is model or longest < _LONG + 4:
        return False
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return False
    ids = [k % vocabulary for k in range(7, 7 + 11 * (_LONG + 6), 11)]
    trial = [Item(tuple(ids[:_LONG]), ((ids[-1], ids[-2]), (ids[-3],)), (0, 1))]
    trial.append(Item(tuple(ids[4:7]), ((ids[-4],), (ids[-5], ids[-6], ids[-1])), (2, 3)))
    try:
        found = dict(_answers(model, trial))
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError):
        return False
    pairs = [(item.context, one) for item in trial for one in item.continuations]
    share = _SAME_FP32 if model.dtype is torch.float32 else _SAME_16_BITS
    return all(
        abs(found[k][0] - expected) <= share * abs(expected)
        for k, expected in enumerate(_plainly(model, *pair) for pair in pairs)
    )


_LONG = 24
_SAME_FP32, _SAME_16_BITS = 1e-4, 2e-2
"""Rounding alone: 3e-6 and 1e-3 of a log-likelihood; wrong positions: 3e-4 and more, in real models much more."""


@torch.inference_mode()
def _plainly(model: PreTrainedModel, context: Sequence[int], continuation: Sequence[int]) -> float:
    ids = torch.tensor([[*context, *continuation[:-1]]], device=model.device)
    return _answer(model(input_ids=ids).logits[0, len(context) - 1 :], continuation)[0]


def items(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], most: int, longest: int
) -> list[Item]:
    """Contexts of at least 2 tokens that several requests share, in pieces of at most `most` requests.

    Left out are contexts with a continuation too long for `longest` tokens in all, which must be cut, each its own way;
    and those whose continuations differ in their last token only, which the harness itself reads once.
    """
    positions: dict[tuple[int, ...], list[int]] = {}
    for position, (context, _) in enumerate(requests):
        positions.setdefault(tuple(context), []).append(position)
    found = []
    for context, all_of_it in positions.items():
        room = longest + 1 - len(context)
        if len(context) < 2 or any(len(requests[k][1]) > room for k in all_of_it):
            continue
        if len({tuple(requests[k][1][:-1]) for k in all_of_it}) == 1:
            continue
        for start in range(0, len(all_of_it), most):
            part = tuple(all_of_it[start : start + most])
            if len(part) > 1:
                found.append(Item(context, tuple(tuple(requests[k][1]) for k in part), part))
    return found


def log_likelihoods(
    model: PreTrainedModel, shared: Sequence[Item], most: int, longest: int
) -> Iterator[tuple[int, Answer]]:
    """The position and the answer of every request in these items.

    A forward has at most `most` continuations, and `longest` columns, padding included. Long items come first, so that
    what does not fit memory fails at once.
    """
    batch: list[Item] = []
    for item in sorted(shared, key=lambda entry: (-entry.length, entry.context)):
        if batch and not _fits([*batch, item], most, longest):
            yield from _answers(model, batch)
            batch = []
        batch.append(item)
    if batch:
        yield from _answers(model, batch)


def _fits(batch: Sequence[Item], most: int, longest: int) -> bool:
    prefix = max(len(item.context) - 1 for item in batch)
    rest = max(len(one) for item in batch for one in item.continuations)
    return sum(len(item.positions) for item in batch) <= most and prefix + rest <= longest


@torch.inference_mode()
def _answers(model: PreTrainedModel, batch: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
    # The last token of a context predicts the first of its continuations: it is read with them.
    prefixes = [item.context[:-1] for item in batch]
    rows = [(item.context[-1], *one[:-1]) for item in batch for one in item.continuations]
    prefix_cp, seen_cp = _padded(prefixes, "left", model.device)
    inputs_rs, given_rs = _padded(rows, "right", model.device)
    cache = DynamicCache(config=model.config)
    model.get_decoder()(
        input_ids=prefix_cp,
        attention_mask=seen_cp,
        past_key_values=cache,
        use_cache=True,
        **_positions(model.get_decoder(), seen_cp, 0),
    )
    owners = torch.tensor([k for k, item in enumerate(batch) for _ in item.positions])
    owners = owners.to(model.device)
    cache.batch_select_indices(owners)
    mask = torch.cat([seen_cp[owners], given_rs], dim=1)
    logits_rsv = model(
        input_ids=inputs_rs,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **_positions(model, mask, prefix_cp.shape[1]),
    ).logits
    asked = [one for item in batch for one in item.continuations]
    for position, continuation, logits_sv in zip(
        [k for item in batch for k in item.positions], asked, logits_rsv, strict=True
    ):
        yield position, _answer(logits_sv[: len(continuation)], continuation)


def _answer(logits_sv: Tensor, continuation: Sequence[int]) -> Answer:
    target = torch.tensor(continuation, device=logits_sv.device)
    log_p = F.log_softmax(logits_sv, dim=-1, dtype=torch.float32)
    chosen = log_p.gather(-1, target[:, None])
    return float(chosen.sum()), bool((log_p.argmax(-1) == target).all())


def _padded(
    rows: Sequence[Sequence[int]], side: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both (rows, longest row); padding is token 0, which the mask hides."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        here = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        ids[k, here] = torch.tensor(row)
        mask[k, here] = 1
    return ids.to(device), mask.to(device)


def _positions(module: torch.nn.Module, mask: Tensor, start: int) -> dict[str, Tensor]:
    """Positions of the columns from `start` on, padding not counted; nothing for a model that counts by itself."""
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, start:]}
