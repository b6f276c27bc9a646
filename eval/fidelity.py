"""How far a model is from its original on a text: perplexity, KL divergence, top-1 agreement.

Both see the same windows. Each position but a window's last predicts the next token, and each next token counts unless
it is ignored: special tokens that are not the text's own are read, but not judged. Log-softmax in fp32, all sums in
float64. Standard errors are over windows: with window sums s and token counts m, sum(s)/sum(m) is a ratio estimate,
which for windows of equal length is the mean of the windows' means.

Shapes: b = windows in a batch, t = tokens in a window, n = positions in a piece, v = vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from eval.errors import EvalError
from eval.logits import LogitPieces, check_finite, vocabulary
from eval.scores import Fidelity, WindowSums, exp_of_nats, no_progress

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _WindowSums:
    """Sums over the predicted tokens of one window that count."""

    n_tokens: int
    reference_nll: float
    model_nll: float
    kl: float
    agreements: float


def compare(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    ignored: Iterable[Tensor] | None = None,
    progress: Progress = no_progress,
) -> tuple[Fidelity, Fidelity]:
    """(Fidelity of `reference` to itself, Fidelity of `model` to `reference`) on token ids (b, t).

    `ignored`: for each batch a bool tensor (b, t), True for tokens that are not counted where they are predicted;
    None: all are counted. KL is KL(reference || model), nats a token. Cost: one forward of each model. Memory: the
    hidden states of a batch and pieces of logits of bounded size, whatever the vocabulary.

    Raises:
        EvalError: no windows, windows of fewer than 2 tokens, no token that counts, ids or vocabularies that do not
            fit, NaN or infinite logits (the message names the model and the window), a perplexity beyond all numbers.
    """
    batches = list(batches)
    _check(batches, {"original": reference, "compressed model": model})
    counted = _counted(batches, ignored)
    windows: list[_WindowSums] = []
    total = sum(len(batch) for batch in batches)
    for batch, counts in zip(batches, counted, strict=True):
        windows += _compare_batch(reference, model, batch, counts, len(windows))
        progress("fidelity", len(windows), total)
    return _of_reference(windows), _of_model(windows)


@torch.inference_mode()
def _compare_batch(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    ids_bt: Tensor,
    counts_bt: Tensor,
    first_window: int,
) -> list[_WindowSums]:
    theirs = LogitPieces.of("original", reference, ids_bt)
    ours = LogitPieces.of("compressed model", model, ids_bt)
    return [
        _compare_window(theirs, ours, counts_bt, row, first_window + row)
        for row in range(len(ids_bt))
    ]


def _compare_window(
    theirs: LogitPieces, ours: LogitPieces, counts_bt: Tensor, row: int, window: int
) -> _WindowSums:
    next_ids = theirs.ids_bt[row, 1:]
    counts = counts_bt[row, 1:].to(next_ids.device)
    sums = torch.zeros(4, dtype=torch.float64)
    start = 0
    for p_nv, q_nv in zip(theirs.window(row), ours.window(row), strict=True):
        check_finite(p_nv, theirs.label, window)
        check_finite(q_nv, ours.label, window)
        # A window's last position predicts a token that is not there.
        targets, here = (each[start : start + len(p_nv)] for each in (next_ids, counts))
        start += len(p_nv)
        p_nv, q_nv = p_nv[: len(targets)], q_nv[: len(targets)].to(p_nv.device)
        if not bool(here.all()):
            p_nv, q_nv, targets = p_nv[here], q_nv[here], targets[here]
        sums += _piece_sums(p_nv, q_nv, targets)
    reference_nll, model_nll, kl, agreements = sums.tolist()
    return _WindowSums(int(counts.sum()), reference_nll, model_nll, kl, agreements)


def _piece_sums(p_nv: Tensor, q_nv: Tensor, targets_n: Tensor) -> Tensor:
    """Float64 sums over n: both negative log-likelihoods, KL(p || q), equal likeliest tokens."""
    log_p, log_q = F.log_softmax(p_nv, dim=-1), F.log_softmax(q_nv, dim=-1)
    at = targets_n.unsqueeze(-1)
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
    nlls = [-log.gather(-1, at).double() for log in (log_p, log_q)]
    return torch.stack([nlls[0].sum(), nlls[1].sum(), divergence.sum(), agree.sum()]).cpu()


def _ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) and its standard error over windows; None for a single window."""
    n = len(sums)
    total = sum(counts)
    ratio = math.fsum(sums) / total
    if n < 2:
        return ratio, None
    squares = math.fsum((s - ratio * m) ** 2 for s, m in zip(sums, counts, strict=True))
    return ratio, math.sqrt(squares * n / (n - 1)) / total


def _perplexity(nlls: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """exp of the mean negative log-likelihood; the error is carried through by its derivative."""
    mean, stderr = _ratio(nlls, counts)
    perplexity = exp_of_nats(mean)
    return perplexity, None if stderr is None else perplexity * stderr


def _of_model(windows: Sequence[_WindowSums]) -> Fidelity:
    parts = tuple(
        WindowSums(each.n_tokens, each.model_nll, each.kl, round(each.agreements))
        for each in windows
    )
    counts = [part.n_tokens for part in parts]
    perplexity, perplexity_stderr = _perplexity([part.nll for part in parts], counts)
    kl, kl_stderr = _ratio([part.kl for part in parts], counts)
    top1, top1_stderr = _ratio([part.n_agreements for part in parts], counts)
    return Fidelity(
        perplexity=perplexity,
        perplexity_stderr=perplexity_stderr,
        # Rounding can push the KL of equal models a hair below zero.
        kl=max(kl, 0.0),
        kl_stderr=kl_stderr,
        top1_agreement=top1,
        top1_stderr=top1_stderr,
        n_tokens=sum(counts),
        windows=parts,
    )


def _of_reference(windows: Sequence[_WindowSums]) -> Fidelity:
    parts = tuple(
        WindowSums(each.n_tokens, each.reference_nll, 0.0, each.n_tokens) for each in windows
    )
    counts = [part.n_tokens for part in parts]
    perplexity, stderr = _perplexity([part.nll for part in parts], counts)
    return Fidelity(perplexity, stderr, 0.0, 0.0, 1.0, 0.0, sum(counts), parts)


def _counted(batches: Sequence[Tensor], ignored: Iterable[Tensor] | None) -> list[Tensor]:
    """For each batch, whether a token counts where it is predicted: bool (b, t)."""
    if ignored is None:
        return [torch.ones_like(batch, dtype=torch.bool) for batch in batches]
    counted = [~batch for batch in ignored]
    if [each.shape for each in counted] != [batch.shape for batch in batches]:
        raise EvalError("ignored: not one bool for each token of each batch of windows")
    if not any(bool(each[:, 1:].any()) for each in counted):
        raise EvalError("eval_text: every token of the windows is a special one; use longer text")
    return counted


def _check(batches: Sequence[Tensor], models: dict[str, PreTrainedModel]) -> None:
    if not batches or not all(len(batch) for batch in batches):
        raise EvalError("eval_windows: there is no window of text to evaluate on; at least 1")
    for batch in batches:
        if batch.dim() != 2 or batch.shape[1] < 2:
            raise EvalError(
                f"windows of shape {tuple(batch.shape)}; expected (windows, tokens >= 2)"
            )
    sizes = {label: vocabulary(model) for label, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise EvalError(f"vocabularies differ, so logits cannot be compared: {sizes}")
    largest = max(int(batch.max()) for batch in batches)
    for label, size in sizes.items():
        if largest >= size:
            raise EvalError(f"{label}: token id {largest}, but its vocabulary has {size} entries")
