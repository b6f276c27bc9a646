"""The documentation says what is true: its commands parse, its options exist, its links lead somewhere."""

import ast
import contextlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from documents import ROOT, anchors, blocks, commands, links, name_of, pages, text_of

import compress
from compress.cli.commands import COMMANDS
from compress.cli.main import main
from compress.config.recipe import METHODS, Recipe
from compress.sweep.file import points_of

sys.path.insert(0, str(ROOT / "docs"))
import reference_tables

EVERY_COMMAND = [(name_of(page), line) for page in pages() for line in commands(page)]
FOLDERS = re.compile(r"\b(?:demo-[\w-]+|runs/\w+)\b")
FOREIGN = re.compile(
    r"`(?:vllm|pip|llama-\w+|scripts/\w+)\b[^`]*`|^ *(?:[$] .*|(?:pip|python|vllm|llama-\w+|scripts/\w+) .*)$",
    re.MULTILINE,
)
"""Commands of other programs, whose options are theirs, and of examples that are tried apart."""
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]")

STARTS = (
    *(("compress.pipeline.main", name) for name in ("run", "plan", "calibrate", "evaluate")),
    ("compress.sweep.run", "plan_sweep"),
    ("compress.inspection.checkpoint", "inspect"),
    ("compress.cli.reporting", "load_runs"),
    ("compress.cli.publishing", "exports"),
    ("compress.exports.verification.verify", "verify"),
)
"""Where each command starts to work: all its options are read by then."""

REPLACED = r"""
--then\b
--guard\b
--anchor\b
--spread\b
--adapter-allocation\b
--order\b
--despite-differences\b
--tasks alone
^ *-.* (?:TEXT|X)(?: |$)
tenth less alike
expanded for every product
refuses? what `run` would
any unique ending
weight for weight
\bthe floor\b
which a bias puts back
\btakes? turns\b
\bin turns\b
is a gap\b
corrected for their number
is none; it
\bis no share\b
is nothing that
[Ww]hat speaks against
takes no files from you
\brank <
\bof now\b
\bas by default\b
\b[Nn]ot looked at\b
\banchor(?:ed|ing)\b
\b[Rr]epair(?:s|ed|ing)?\b
low-rank paths?\b
\bpaths? of rank\b
\bbase and paths?\b
""".strip().splitlines()
"""Words and phrases for which the field has better ones, and options by their old names."""


class Started(Exception):
    """A command has read all its options and would work now."""


def stop(*_: object, **__: object) -> None:
    raise Started


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the commands of the documentation name; no command gets to work."""
    monkeypatch.chdir(tmp_path)
    for module, name in STARTS:
        monkeypatch.setattr(f"{module}.{name}", stop)
    (tmp_path / "recipe.yaml").write_text("model: demo\n", encoding="utf-8")
    [sweep] = [body for body in blocks(ROOT / "docs/tasks/sweeps.md", "yaml") if "points:" in body]
    (tmp_path / "sweep.yaml").write_text(sweep, encoding="utf-8")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "demo_sweep.yaml", tmp_path / "scripts")
    return tmp_path


@pytest.mark.parametrize(("page", "line"), EVERY_COMMAND, ids=lambda part: part)
def test_a_command_in_the_documentation_parses(page, line, workplace, capsys):
    for folder in FOLDERS.findall(line.partition("--out")[0]):
        (workplace / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(workplace / "recipe.yaml", workplace / folder)
    words = shlex.split(line)[1:]
    words = [{"DIR": "demo-x", "MODEL": "demo"}.get(word, word) for word in words]
    if words[0] == "methods":
        assert main(words) == 0
        return
    try:
        status = main(words)
    except Started:
        return
    pytest.fail(f"{page}: {line}: {status} {capsys.readouterr().err}")


@cache
def helps() -> str:
    """The help of every command, for every method and every base."""
    bases = [name for name, kind in METHODS.items() if not hasattr(kind, "adapter_bits")]
    given = [[name, "--help"] for name in COMMANDS]
    given += [["run", "--method", name, "--help"] for name in METHODS]
    given += [["run", "--method", "eora", "--base", name, "--help"] for name in bases]
    given += [["run", "--method", "svd_llm", "--factor-quantizer", "rtn", "--help"], ["--help"]]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        for words in given:
            with contextlib.suppress(SystemExit):
                main(words)
    return text.getvalue()


def suffixes(flag: str) -> list[str]:
    """A flag and its shorter spellings: --method.base.bits, --base.bits, --bits."""
    parts = flag.removeprefix("--").split(".")
    return ["--" + ".".join(parts[start:]) for start in range(len(parts))]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_an_option_in_the_documentation_exists(page):
    if page.name == "CHANGELOG.md":
        return  # it names the old ones, too
    known = {suffixes(flag)[-1] for flag in FLAG.findall(helps())}
    named = FLAG.findall(FOREIGN.sub("", text_of(page)))
    assert not [flag for flag in named if suffixes(flag)[-1] not in known]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_link_leads_to_a_file_and_a_heading_in_it(page):
    broken = []
    for link in links(page):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_python_in_the_documentation_parses_and_imports_what_exists(page):
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module == "compress":
                assert {alias.name for alias in node.names} <= set(compress.__all__)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "compress":
                assert node.attr in compress.__all__


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_yaml_in_the_documentation_is_a_recipe_or_a_sweep(page):
    for body in blocks(page, "yaml"):
        values = yaml.safe_load(body)
        assert (
            points_of(values, Path("runs")) if "points" in values else Recipe.from_mapping(values)
        )


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_documentation_has_none_of_the_replaced_words(page):
    if page.name != "CHANGELOG.md":
        assert not [word for word in REPLACED if re.search(word, text_of(page), re.MULTILINE)]


def test_the_results_in_full_have_none_of_the_replaced_words():
    text = text_of(ROOT / "scripts" / "RESULTS.md")
    assert not [word for word in REPLACED if re.search(word, text, re.MULTILINE)]


def test_help_has_none_of_the_replaced_words():
    assert not [word for word in REPLACED if re.search(word, helps(), re.MULTILINE)]


def texts_in(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a module, docstrings and the parts of formatted ones included, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_no_text_in_the_code_has_one_of_the_replaced_words():
    code = [
        path for name in ("compress", "calibration", "eval") for path in (ROOT / name).rglob("*.py")
    ]
    assert len(code) > 100
    assert not [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in code
        if path.name != "renamed.py"  # which has the old names, to tell the new ones
        for line, text in texts_in(path)
        for word in REPLACED
        if re.search(word, text, re.MULTILINE)
    ]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/-]+\.md", text))
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert there == listed - {"results-in-full.md"}


def test_every_generated_part_is_on_a_page_and_made_of_the_registries():
    text = "\n".join(map(text_of, (ROOT / "docs").rglob("*.md")))
    filled = reference_tables.filled(text)
    assert "<!-- generated: " not in filled
    assert set(re.findall(r"<!-- generated: (\w+) -->", text)) == set(reference_tables.GENERATED)
    for name in METHODS:
        assert f"### {name}\n" in filled
    general = {"--help", "--version", "--traceback", "--install-completion", "--show-completion"}
    options = {suffixes(flag)[-1] for flag in FLAG.findall(helps())} - general
    assert not [option for option in options if f"| `{option}` |" not in filled]


def test_the_readme_is_short_and_starts_with_two_commands():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 150
    first, second = [line.strip() for line in lines if line.startswith("    pip install")]
    assert (
        first == "pip install -c constraints.txt -e '.[run]' && compress run --method eora --bits 4"
    )
    assert second == "pip install -c constraints.txt -e '.[test]' && scripts/test"


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_names_every_method(name):
    assert f"| `{name}` |" in text_of(ROOT / "README.md")


def test_the_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{citation["version"]}"\n' in project
