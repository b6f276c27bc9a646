"""What a shell is offered, by the words before; and bash itself, with the script that it is given."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress.cli.completion import completions
from compress.cli.main import main
from compress.families.base import METHODS

ROOT = Path(__file__).resolve().parent.parent


def offered(*words: str) -> list[str]:
    """Values for the last word; a kind of path stands in brackets."""
    *before, incomplete = words
    found = completions(before, incomplete)
    return [it.value if it.type == "plain" else f"<{it.type}>" for it in found]


def test_commands_come_first_and_general_flags_only_when_begun() -> None:
    assert {"run", "plan", "report"} <= set(offered(""))
    assert offered("re") == ["report"]
    assert offered("--v") == ["--version"]


def test_flags_of_a_recipe_are_offered_for_the_commands_that_take_it() -> None:
    assert offered("run", "--se") == ["--seed", "--seq-len"]
    assert offered("eval", "--se") == ["--seed", "--seq-len"]
    assert offered("verify", "--se") == []
    assert offered("sweep", "--bu") == ["--budget"]


def test_methods_and_other_named_values_are_offered() -> None:
    assert offered("run", "--method", "") == list(METHODS)
    assert offered("run", "--method", "svd_") == ["svd_llm", "svd_residual"]
    assert offered("run", "--dtype", "b") == ["bfloat16"]
    assert offered("report", "--format", "") == ["md", "json", "html", "csv"]
    assert offered("--install-completion", "") == ["bash", "zsh", "fish"]


def test_a_method_brings_its_own_flags() -> None:
    assert offered("run", "--method", "gptq", "--bi") == ["--bits"]
    assert offered("run", "--bi") == []
    assert offered("run", "--method", "eora", "--base", "rtn", "--method.base.bi") == [
        "--method.base.bits"
    ]
    assert offered("run", "--act-order", "d") == ["desc_act"]  # of the default method's base


def test_the_method_of_a_recipe_counts_as_one_that_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: {name: sparsegpt}\n")
    assert offered("run", str(file), "--patt") == ["--pattern"]
    file.write_text("method: [")
    assert offered("run", str(file), "--see") == ["--seed"]


def test_both_sides_of_an_equals_sign_are_known() -> None:
    assert offered("run", "--dtype=b") == ["--dtype=bfloat16"]
    assert offered("run", "--dtype", "=", "b") == ["bfloat16"]  # bash splits there
    assert offered("run", "--dtype", "=") == ["auto", "float32", "bfloat16", "float16"]


def test_paths_are_left_to_the_shell() -> None:
    assert offered("run", "") == offered("run", "--model", "") == ["<file>"]
    assert offered("verify", "") == offered("run", "--out", "") == ["<dir>"]
    assert offered("report", "a", "b", "") == ["<dir>"]
    assert offered("run", "--calibration", "a.txt", "") == ["<file>"]
    assert offered("run", "--samples", "") == []


def test_a_flag_without_a_value_is_followed_by_what_comes_next() -> None:
    assert offered("inspect", "--layers", "") == ["<file>"]


def test_nonsense_is_answered_with_nothing() -> None:
    assert offered("rum", "--bits", "") == []
    assert offered("run", "--method", "nonsense", "--see") == ["--seed"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_shown(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show-completion", shell]) == 0
    assert f"_COMPRESS_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_an_unknown_shell_is_refused_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert main(["--install-completion"]) == 2
    assert "'tcsh'; name one of bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_installing_twice_is_installing_once(
    shell: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    start = tmp_path / f".{shell}rc"
    start.write_text("alias ll='ls -l'")  # without a last line end
    assert main(["--install-completion"]) == 0
    once = start.read_text()
    written = Path(capsys.readouterr().out.split()[1].strip(",;"))
    assert f"{shell}_complete" in written.read_text()
    assert main(["--install-completion", shell]) == 0
    assert start.read_text() == once
    if shell == "fish":
        assert written == tmp_path / ".config" / "fish" / "completions" / "compress.fish"
    else:
        first, line = once.splitlines()
        assert first == "alias ll='ls -l'"
        assert line.endswith(f'source "{written}"')


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("compress re", ["report"]),
        ("compress run --method svd_", ["svd_llm", "svd_residual"]),
        ("compress run --dtype=bf", ["bfloat16"]),
        ("compress run recipe.yaml --seq", ["--seq-len"]),
    ],
)
def test_bash_completes_with_the_installed_script(
    line: str, expected: list[str], tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "compress"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m compress "$@"\n')
    program.chmod(0o755)
    (tmp_path / "recipe.yaml").write_text("{}")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    # COMP_WORDS as readline splits the line, at COMP_WORDBREAKS
    words = line.replace("=", " = ").split()
    script = (
        "compress --install-completion bash >/dev/null\nsource ~/.bashrc\n"
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'\n"
        "compopt() { :; }\n"
        "eval \"$(complete -p compress | sed -E 's/.*-F ([^ ]+).*/\\1/') compress\"\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    ran = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == expected, ran.stderr
