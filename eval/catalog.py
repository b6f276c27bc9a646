"""Which evaluation tasks there are: the built-in ones, a folder of the user's, lm-eval's own.

lm-eval reads its 14,000 task files in about ten seconds, so it is asked only for a name that is
found nowhere else.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from eval.errors import EvalError

BUILTIN_FOLDER = Path(__file__).parent / "tasks"


def builtin_tasks() -> tuple[str, ...]:
    """Names of the tasks that need no hub; a task's file has its name."""
    return tuple(sorted(path.stem for path in BUILTIN_FOLDER.glob("*.yaml")))


def check_tasks(tasks: Sequence[str], include_path: Path | None = None) -> None:
    """Refuses names that no task, group, tag or YAML file has. Loads no data.

    Instant if all are built in.

    Raises:
        EvalError: names each unknown task with the nearest known ones, or `include_path` is no
            folder.
    """
    if include_path is None and set(tasks) <= set(builtin_tasks()):
        return
    task_manager(tasks, include_path)


def task_manager(tasks: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """A manager that knows all of `tasks`, and lm-eval's own only if one of them needs those.

    Raises:
        EvalError: as `check_tasks`.
    """
    if include_path is not None and not include_path.is_dir():
        raise EvalError(f"include_path: {include_path} is no folder; give one with task YAML files")
    folders = [BUILTIN_FOLDER, *([include_path] if include_path is not None else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not _unknown(tasks, manager.task_index):
        return manager
    everything = TaskManager(include_path=folders, include_defaults=True)
    missing = [name for name in tasks if not _is_known(name, everything.task_index)]
    if missing:
        raise EvalError(_no_such_task(missing, everything.all_tasks))
    return everything


def _is_known(name: str, index: Mapping[str, Any]) -> bool:
    return name in index or Path(name).is_file()


def _unknown(names: Iterable[str], index: Mapping[str, Any]) -> bool:
    """Whether a name, or a member of a group that is named, is not in `index`."""
    for name in names:
        if not _is_known(name, index):
            return True
        members = getattr(index.get(name), "cfg", None) or {}
        if isinstance(members.get("task"), list) and _unknown(_names(members["task"]), index):
            return True
    return False


def _names(members: Sequence[Any]) -> list[str]:
    """Names of a group's members; a member defined in place has none to look up."""
    named = [m["task"] if isinstance(m, dict) and "group" not in m else m for m in members]
    return [name for name in named if isinstance(name, str)]


def _no_such_task(missing: Sequence[str], known: Sequence[str]) -> str:
    lines = []
    for name in missing:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        lines.append(f"tasks: no such task, group, tag or YAML file: {name!r}{hint}")
    lines.append(f"Built in, without a hub: {', '.join(builtin_tasks())}")
    return "\n".join(lines)
