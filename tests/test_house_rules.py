"""Rules of the house that no linter checks: sizes, broad excepts, pickles, machine paths."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import compress

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compress", "calibration", "eval")
MOST_FILE_LINES = 400
MOST_MODULES = 20
MOST_MODULES_AT_THE_TOP = 8
MOST_FUNCTION_LINES = 40

# Written apart, so that this file does not name them either.
MACHINE_PATHS = re.compile("|".join(("/" + top + "/") for top in ("root", "home", "work", "Users")))


def sources() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) > len(PACKAGES)
    return found


def text_files() -> Iterator[Path]:
    """Every file of ours: what git would add, or without git the folders that we know."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        paths = [ROOT / name for name in names.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        folders = (*PACKAGES, "tests", "scripts")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in paths:
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ""}:
            yield path


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(), ids=named)
def test_a_file_is_small(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= MOST_FILE_LINES, f"{named(path)} has {n_lines} lines; split it by idea"


@pytest.mark.parametrize("folder", sorted({path.parent for path in sources()}), ids=named)
def test_a_folder_has_few_modules(folder: Path) -> None:
    most = MOST_MODULES_AT_THE_TOP if named(folder) == "compress" else MOST_MODULES
    assert len(list(folder.glob("*.py"))) <= most, (
        f"{named(folder)}; make a package of what belongs together"
    )


@pytest.mark.parametrize("path", sources(), ids=named)
def test_a_function_is_small(path: Path) -> None:
    long = [
        f"{function.name} ({n_lines} lines)"
        for function in functions(path)
        if (n_lines := body_lines(function)) > MOST_FUNCTION_LINES
    ]
    assert not long, f"{named(path)}: {', '.join(long)}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: explaining is free."""
    body = function.body
    has_docstring = ast.get_docstring(function) is not None
    docstring = (body[0].end_lineno or 0) - body[0].lineno + 1 if has_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", sources(), ids=named)
def test_no_error_is_caught_without_being_named(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            ends = node.body[-1]
            passes_on = isinstance(ends, ast.Raise) and ends.exc is None
            broad = caught in {"everything", "Exception", "BaseException"}
            assert not broad or passes_on, f"{named(path)}:{node.lineno} catches {caught}"


@pytest.mark.parametrize("path", sources(), ids=named)
def test_nothing_is_unpickled(path: Path) -> None:
    """torch.load and the pickle family execute what they read."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b", text, re.M)
    assert not re.search(r"\btorch\.load\(|\byaml\.(unsafe_load|full_load)\(", text)


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = [
        f"{named(path)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert not found


def test_there_is_no_module_for_odds_and_ends() -> None:
    assert not [
        named(path) for path in sources() if path.stem in {"utils", "helpers", "common", "misc"}
    ]


def programs() -> list[Path]:
    """Python programs whose names have no suffix, which tools do not find by themselves."""
    found = [
        path
        for path in sorted((ROOT / "scripts").iterdir())
        if path.is_file() and not path.suffix and "python" in path.read_text().partition("\n")[0]
    ]
    assert found
    return found


def test_every_program_is_linted() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "scripts"]
    seen = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {str(path) for path in programs()} <= set(seen.splitlines())


def test_every_program_is_type_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {named(path) for path in programs()} <= set(project["tool"]["mypy"]["files"])


def test_every_package_is_typed() -> None:
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_every_public_name_is_there() -> None:
    assert all(getattr(compress, name) is not None for name in compress.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nix'"):
        _ = compress.nix
