"""Runs an engine's program in a process of its own: the interpreter that has the engine, a time limit, its answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from eval.wheels import cache_root

SECONDS = 600
SECONDS_A_GIGABYTE = 60
LAST_LINES = 8


def environment(engine: str) -> Path:
    """The virtual environment that an engine may have of its own: `engines/NAME` in the toolkit's cache."""
    return cache_root() / "engines" / engine


def interpreter(engine: str, modules: Sequence[str]) -> Path | None:
    """The interpreter that has all of these modules: the running one, or that of the engine's environment."""
    if not absent_here(modules):
        return Path(sys.executable)
    own = environment(engine)
    found = [own / "bin" / "python", own / "Scripts" / "python.exe"]
    python = next((path for path in found if path.exists()), None)
    if python is None or any(not _is_in(own, module) for module in modules):
        return None
    return python


def absent_here(modules: Sequence[str]) -> list[str]:
    """The modules that the running interpreter has not."""
    return [module for module in modules if find_spec(module) is None]


def _is_in(own: Path, module: str) -> bool:
    places = (*own.glob("lib*/python*/site-packages"), own / "Lib" / "site-packages")
    return any((place / module).is_dir() or any(place.glob(f"{module}.*")) for place in places)


def answer_of(python: Path, program: Path, request: Mapping[str, Any], seconds: float) -> Any:
    """What a program writes. Raises CheckpointError if it fails, dies or takes too long, with its last lines."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        log = Path(scratch) / "log"
        with log.open("wb") as sink:
            code = _run([str(python), str(program), str(asked), str(answer)], sink, seconds)
        if code is None:
            raise CheckpointError(f"no answer in {seconds:.0f} seconds:\n{_last_lines(log)}")
        if code != 0 or not answer.is_file():
            raise CheckpointError(f"it ended with {code}:\n{_last_lines(log)}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _run(command: Sequence[str], sink: Any, seconds: float) -> int | None:
    """The exit status; None if the time was up. Whatever it started ends with it."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT,
        env=_variables(command[0]),
        start_new_session=True,
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if os.name == "posix":
            _end_group(child.pid)
        child.kill()
        child.wait()


def _end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _variables(python: str) -> dict[str, str]:
    """Those of this process; another interpreter finds its own modules, this one those that the program finds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if python == sys.executable:
        kept["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    # A program must not find others of its folder when it imports the package of the same name.
    return kept | {"PYTHONSAFEPATH": "1"}


def _last_lines(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.strip().splitlines()[-LAST_LINES:])
