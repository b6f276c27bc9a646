"""Scores of lm-evaluation-harness tasks for a model that is already in memory.

Every task sees the same items for every model: the first `limit` in the task's order, prompts and
few-shot examples chosen by `seed`. Standard errors are those of a mean over items, computed here
from the items, so that no bootstrap runs; a metric that is no such mean has none.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.catalog import builtin_tasks, check_tasks, task_manager
from eval.errors import EvalError
from eval.lm import ReadyModel, quiet
from eval.scores import TaskScore, mean_and_stderr, no_progress, paired_difference, primary

__all__ = [
    "Settings",
    "builtin_tasks",
    "check_tasks",
    "paired_difference",
    "primary",
    "run_tasks",
]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tasks are run; equal settings give equal items."""

    limit: int | None = None
    """Items of each task; None for all."""
    batch_size: int = 8
    """Requests in a forward; the harness sorts them by length."""
    include_path: Path | None = None
    """A folder with task YAML files of the user's own."""
    seed: int = 0
    """Chooses few-shot examples, and drives generation that samples."""

    def __post_init__(self) -> None:
        """Refuses values below 1."""
        if self.limit is not None and self.limit < 1:
            raise EvalError(f"limit: {self.limit}; expected at least 1 item, or none for all")
        if self.batch_size < 1:
            raise EvalError(f"batch_size: {self.batch_size}; expected at least 1")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    settings: Settings = Settings(),
    *,
    progress: Progress = no_progress,
) -> list[TaskScore]:
    """Every metric of every task, in the order asked for; a group's own rows follow its tasks'.

    Names may be built-in tasks, tasks, groups and tags of `include_path` or of lm-eval, or paths of
    YAML files. Progress counts the names in `tasks`.

    Raises:
        EvalError: an unknown name, data that cannot be loaded, a task that would run generated
            code, or a model that gives NaN.
    """
    manager = task_manager(tasks, settings.include_path)
    scores: dict[tuple[str, str], TaskScore] = {}
    was_training = model.training
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        lm = ReadyModel(model, tokenizer, settings.batch_size)
        for done, name in enumerate(tasks):
            progress("tasks", done, len(tasks))
            loaded = _load(manager, name, settings.seed)
            results = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
            for score in _scores(results):
                scores.setdefault((score.task, score.metric), score)
    model.train(was_training)
    progress("tasks", len(tasks), len(tasks))
    return list(scores.values())


def _load(manager: Any, name: str, seed: int) -> Any:
    """The task objects of one name, with their data, set up as lm-eval's command does."""
    try:
        loaded = manager.load([name])
    except EvalError as error:
        error.add_note(f"while loading task {name}")
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise EvalError(
            f"tasks: {name} could not be loaded ({type(error).__name__}: "
            f"{reason[0] if reason else 'no message'}); without a hub there are "
            f"{', '.join(builtin_tasks())}"
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise EvalError(
                f"tasks: {task.task_name} runs code that the model wrote; not done here"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The rows of lm-eval's result, tasks before the groups they belong to."""
    groups = results.get("groups", {})
    names = [name for name in results["results"] if name not in groups]
    for name in [*names, *groups]:
        row = results["results"][name]
        for key, value in row.items():
            metric, comma, chosen_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            items = _items(results, name, metric, chosen_filter)
            per_item = items if _is_mean(items, value) else ()
            yield TaskScore(
                task=name,
                metric=metric if chosen_filter == "none" else f"{metric},{chosen_filter}",
                value=float(value),
                stderr=mean_and_stderr(per_item)[1] if per_item else None,
                n_items=int(row.get("sample_len", len(items))),
                version=str(results["versions"].get(name)),
                higher_is_better=_higher_is_better(results, name, metric),
                per_item=per_item,
                n_shot=_n_shot(results, name),
            )


def _items(
    results: Mapping[str, Any], name: str, metric: str, chosen_filter: str
) -> tuple[float, ...]:
    """The metric of each item of a task, or of all tasks of a group; empty if not plain numbers."""
    values = [
        sample.get(metric)
        for task in _leaves(results, name)
        for sample in results["samples"][task]
        if sample["filter"] == chosen_filter
    ]
    if not all(isinstance(value, int | float) for value in values):
        return ()
    return tuple(float(value) for value in values)


def _leaves(results: Mapping[str, Any], name: str) -> list[str]:
    if name in results["samples"]:
        return [name]
    members = results["group_subtasks"].get(name, [])
    return [leaf for member in members for leaf in _leaves(results, member)]


def _n_shot(results: Mapping[str, Any], name: str) -> int | None:
    found = results.get("n-shot", {}).get(name)
    return int(found) if isinstance(found, int) else None


def _is_mean(items: Sequence[float], value: float) -> bool:
    return bool(items) and math.isclose(
        math.fsum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12
    )


def _higher_is_better(results: Mapping[str, Any], name: str, metric: str) -> bool:
    known = results["higher_is_better"].get(name, {}).get(metric)
    # lm-eval's own default for a metric that does not say.
    return True if known is None else bool(known)
