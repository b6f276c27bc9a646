"""Optional dependencies: what pyproject.toml states, what is refused without them, and the lowest versions promised."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import compress
from compress import extras
from compress.cli.commands import COMMANDS
from compress.cli.main import main
from compress.errors import MissingExtraError

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STATED = {
    "": PROJECT["dependencies"],
    **PROJECT["optional-dependencies"],
}


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that holds what pyproject.toml requires and nothing of its extras."""
    named = [
        f'{text}; extra == "{extra}"' if extra else text
        for extra in STATED
        for text in STATED[extra]
    ]
    there = {canonicalize_name(Requirement(text).name) for text in STATED[""]}

    def distribution(name: str) -> None:
        if canonicalize_name(name) not in there:
            raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", lambda _: named)
    monkeypatch.setattr(extras, "distribution", distribution)


@pytest.mark.usefixtures("without_extras")
@pytest.mark.parametrize("name", [name for name, it in COMMANDS.items() if it.extra])
def test_a_command_whose_extra_is_missing_is_refused_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needs = {
        "sweep": ["sweep.yaml"],
        "inspect": ["demo"],
        "eval": ["."],
        "report": ["."],
        "publish": ["."],
    }
    (tmp_path / "sweep.yaml").write_text("points: {}\n")
    assert main([name, *needs.get(name, [])]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: compress {name} needs accelerate, altair, datasets, ")
    assert line.endswith("which are not installed: pip install 'compress-llm[run]'")


@pytest.mark.usefixtures("without_extras")
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_needs_no_extra(name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0


@pytest.mark.usefixtures("without_extras")
@pytest.mark.parametrize("name", ["run", "plan", "calibrate", "evaluate"])
def test_the_same_from_python(name: str) -> None:
    with pytest.raises(
        MissingExtraError, match=rf"^compress\.{name} needs .*compress-llm\[run\]'$"
    ):
        getattr(compress, name)


@pytest.mark.usefixtures("without_extras")
def test_loading_and_methods_need_no_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(compress.load_export)
    assert main(["methods"]) == 0
    assert "eora" in capsys.readouterr().out


def test_one_missing_distribution_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "requires", lambda _: ["pip", 'no-such-thing>=1; extra == "run"'])
    with pytest.raises(MissingExtraError) as caught:
        extras.require("the thing")
    assert str(caught.value) == (
        "the thing needs no-such-thing, which is not installed: pip install 'compress-llm[run]'"
    )


def test_source_that_was_never_installed_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(_: str) -> list[str]:
        raise PackageNotFoundError

    monkeypatch.setattr(extras, "requires", requires)
    extras.require("the thing")


LOWEST = {
    canonicalize_name(line.partition("==")[0]): Version(line.partition("==")[2])
    for line in (ROOT / "constraints-lowest.txt").read_text().splitlines()
    if not line.startswith("#")
}


@pytest.mark.parametrize(
    "stated",
    [
        text
        for extra in ("", "run", "test", "docs")
        for text in STATED[extra]
        if Requirement(text).name
        not in ("compress-llm", "torch")  # older builds of torch bring gigabytes
    ],
)
def test_the_lowest_versions_tried_are_those_promised(stated: str) -> None:
    requirement = Requirement(stated)
    [lowest] = [it.version for it in requirement.specifier if it.operator == ">="]
    assert LOWEST[canonicalize_name(requirement.name)] == Version(lowest)


def test_the_versions_that_tests_ran_with_are_of_all_that_is_required() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pinned = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    required = {
        canonicalize_name(Requirement(it).name)
        for extra in ("", "run", "test", "docs")
        for it in STATED[extra]
    }
    assert required - {"compress-llm"} <= pinned
