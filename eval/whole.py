"""How far a model that reads a whole sequence is from its original: an encoder, or a classifier of sequences.

Both see the same sequences, one at a time, so that padding plays no part. Standard errors are over sequences.
Shapes: t = tokens, d = features, c = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from eval.errors import EvalError
from eval.scores import ACCURACY, TaskScore, mean_and_stderr, no_progress

Progress = Callable[[str, int, int], None]
VERSION = "1"
NAMES = {
    "cosine": "cosine with the original",
    "kl": "KL divergence of the classes, nats",
    "agreement": "the original's class",
    "accuracy": ACCURACY,
}


@dataclass(frozen=True)
class Example:
    """One sequence: ids (1, t) int64, and its class if it is known."""

    ids: Tensor
    label: int | None = None


def compare_whole(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    progress: Progress = no_progress,
) -> tuple[tuple[TaskScore, ...], tuple[TaskScore, ...]]:
    """Scores of both against `reference`: of features their cosine; of classes KL, agreement and accuracy.

    Features are the mean over tokens of the last hidden states, as sentence embeddings mostly are. Accuracy is there
    if every sequence has its class.

    Raises:
        EvalError: no sequences, or outputs that hold NaN or infinity (naming the model and the sequence).
    """
    if not examples:
        raise EvalError("held-out text: there is no sequence")
    columns: tuple[_Columns, _Columns] = ({}, {})
    for index, example in enumerate(examples):
        outputs = [
            _output(label, each, example.ids, index)
            for label, each in (("original", reference), ("compressed model", model))
        ]
        for column, output in zip(columns, outputs, strict=True):
            for metric, value in _scores(outputs[0], output, example.label).items():
                column.setdefault(metric, []).append(value)
        progress("fidelity", index + 1, len(examples))
    before, after = (
        tuple(
            _task_score(metric, values)
            for metric, values in column.items()
            if len(values) == len(examples)
        )
        for column in columns
    )
    return before, after


@dataclass(frozen=True)
class _Output:
    """Log-probabilities of the classes (c,), or mean features (d,); fp64."""

    values: Tensor
    is_features: bool


_Columns = dict[str, list[float]]


@torch.inference_mode()
def _output(label: str, model: PreTrainedModel, ids: Tensor, index: int) -> _Output:
    output: Any = model(input_ids=ids.to(model.device))
    logits: Tensor | None = getattr(output, "logits", None)
    found = output.last_hidden_state[0].mean(0) if logits is None else logits[0]
    if not bool(torch.isfinite(found).all()):
        raise EvalError(f"{label}: its output for sequence {index} holds NaN or infinity")
    values = found.double().cpu()
    return (
        _Output(values, is_features=True)
        if logits is None
        else _Output(F.log_softmax(values, dim=-1), is_features=False)
    )


def _scores(original: _Output, output: _Output, label: int | None) -> dict[str, float]:
    if output.is_features:
        return {"cosine": float(F.cosine_similarity(original.values, output.values, dim=0))}
    found = {
        "kl": float(F.kl_div(output.values, original.values, reduction="sum", log_target=True)),
        "agreement": float(output.values.argmax() == original.values.argmax()),
    }
    if label is not None:
        found["accuracy"] = float(int(output.values.argmax()) == label)
    return found


def _task_score(metric: str, values: list[float]) -> TaskScore:
    value, stderr = mean_and_stderr(values)
    return TaskScore(
        task=NAMES[metric],
        metric="mean",
        value=value,
        stderr=stderr,
        n_items=len(values),
        version=VERSION,
        higher_is_better=metric != "kl",
        per_item=tuple(values),
    )
