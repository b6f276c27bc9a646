"""The settings that must be equal for the scores of two runs to be comparable, and the differences in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from calibration.heads import Head
from compress.report.report import Report

_FINGERPRINT_DIGITS = 12

Field = Callable[[Report], str | None]
"""Reads a setting of a run as text; None where it does not count: a run that was not evaluated has no limit."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two runs that were measured differently."""

    field: str
    """Name of the setting: that of the option of the recipe, where there is one."""
    label: str
    value: str
    other_label: str
    other_value: str

    @property
    def text(self) -> str:
        """The difference in a line."""
        return (
            f"{self.field}: {self.value} in {self.label}, {self.other_value} in {self.other_label}"
        )


def differences_between(reports: Mapping[str, Report]) -> tuple[Difference, ...]:
    """The settings in which runs, by label, differ from the first run that has a value for them."""
    return tuple(
        difference
        for name, field in _fields(reports).items()
        for difference in _differences(name, _values(reports, field))
    )


def _values(reports: Mapping[str, Report], field: Field) -> dict[str, str | None]:
    return {label: field(report) for label, report in reports.items()}


def _differences(name: str, values: Mapping[str, str | None]) -> Iterator[Difference]:
    known = [(label, value) for label, value in values.items() if value is not None]
    for label, value in known[1:]:
        if value != known[0][1]:
            yield Difference(
                field=name,
                label=known[0][0],
                value=known[0][1],
                other_label=label,
                other_value=value,
            )


def _fields(reports: Mapping[str, Report]) -> dict[str, Field]:
    fields: dict[str, Field] = {
        "reference model": lambda it: f"{it.model} ({it.fingerprint[:_FINGERPRINT_DIGITS]})"
    }
    windows = {name: _if_read(_option(name)) for name in ("eval_windows", "seq_len")}
    # Of windows that are more or longer the hash is another one, whatever the text.
    alike = not any(list(_differences(name, _values(reports, it))) for name, it in windows.items())
    hashed = all(it.scores and it.scores.text_sha256 for it in reports.values() if _reads_text(it))
    alike = alike and not any(_differences("bos", _values(reports, _prefix)))
    fields["bos"] = _prefix
    fields["eval_text"] = _if_read(_text if alike and hashed else _option("eval_text"))
    fields |= windows
    fields["tokens of eval_text"] = _n_tokens
    fields["lm-eval"] = _if_asked(lambda it: it.environment.versions.get("lm_eval", "unknown"))
    fields["tasks"] = _if_asked(lambda it: ", ".join(sorted(it.recipe["tasks"])))
    for option in ("limit", "seed"):
        fields[option] = _if_asked(_option(option))
    tasks = dict.fromkeys(name for report in reports.values() for name in _tasks(report))
    for task in tasks:
        for attribute, words in _OF_A_TASK.items():
            fields[f"{words} of {task}"] = _of_task(task, attribute)
    return fields


_OF_A_TASK = {"version": "version", "n_shot": "few-shot examples", "n_items": "items"}


def _option(name: str) -> Field:
    return lambda report: str(report.recipe.get(name))


def _if_read(field: Field) -> Field:
    """The same field, None for runs that did not compare the models on a text."""
    return lambda report: field(report) if _reads_text(report) else None


def _if_asked(field: Field) -> Field:
    """The same field, None for runs that scored no lm-eval tasks."""
    return lambda report: field(report) if _has_tasks(report) else None


def _reads_text(report: Report) -> bool:
    if report.scores is None:
        return False
    # What reads a whole sequence is compared on the text too, and scored like a task.
    return report.scores.after.fidelity is not None or bool(
        not Head(report.head).writes_text and report.scores.after.tasks
    )


def _has_tasks(report: Report) -> bool:
    return Head(report.head).writes_text and bool(_tasks(report))


def _tasks(report: Report) -> tuple[str, ...]:
    if report.scores is None:
        return ()
    return tuple(dict.fromkeys(score.task for score in report.scores.after.tasks))


def _text(report: Report) -> str | None:
    """The held-out text by the hash of its tokens, so that its place does not matter."""
    text = None if report.scores is None else report.scores.text_sha256
    return None if text is None else f"tokens of sha256 {text[:_FINGERPRINT_DIGITS]}"


def _prefix(report: Report) -> str | None:
    prefix = None if report.scores is None else report.scores.prefix
    return None if prefix is None else f"windows begin with {prefix or 'no special token'}"


def _n_tokens(report: Report) -> str | None:
    if report.scores is None or report.scores.after.fidelity is None:
        return None
    return str(report.scores.after.fidelity.n_tokens)


def _of_task(task: str, attribute: str) -> Field:
    def field(report: Report) -> str | None:
        scores = report.scores.after.tasks if report.scores is not None else ()
        found = next((score for score in scores if score.task == task), None)
        value = None if found is None else getattr(found, attribute)
        return None if value is None else str(value)

    return field
