"""The command line answers at once: what it does not need, it does not import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

TELL = """
import atexit, sys
atexit.register(lambda: print("imported:", *{name.partition(".")[0] for name in sys.modules}))
sys.path.insert(0, sys.argv.pop(1))
from compress.cli.main import main
sys.exit(main())
"""


def imported(*arguments: str, code: int = 0, **environment: str) -> set[str]:
    """Top packages that a command line has imported when it ends."""
    ran = subprocess.run(
        [sys.executable, "-P", "-c", TELL, str(ROOT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == code, ran.stderr
    return set(ran.stdout.rpartition("imported:")[2].split())


HEAVY = {"torch", "transformers", "numpy", "scipy", "datasets", "lm_eval", "altair"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in COMMANDS),
        ["run", "--samples", "4", "--help"],
        ["rum"],
        ["--show-completion", "bash"],
    ],
    ids=" ".join,
)
def test_help_and_the_version_import_no_library_that_computes(arguments: list[str]) -> None:
    assert not HEAVY & imported(*arguments, code=2 if arguments == ["rum"] else 0)


@pytest.mark.parametrize(
    "arguments", [["run", "--method", "eora", "--help"], ["run", "--rnk", "3"]]
)
def test_the_options_of_a_method_import_torch_and_not_transformers(arguments: list[str]) -> None:
    found = imported(*arguments, code=2 if "--rnk" in arguments else 0)
    assert "torch" in found
    assert "transformers" not in found


@pytest.mark.parametrize(
    "line",
    ["compress ru", "compress run --see", "compress run --method e", "compress run --model "],
)
def test_completion_imports_no_library_that_computes(line: str) -> None:
    words = line.split(" ")
    found = imported(
        COMP_WORDS=line, COMP_CWORD=str(len(words) - 1), _COMPRESS_COMPLETE="bash_complete"
    )
    assert not HEAVY & found
