"""The generated parts of the documentation: Markdown made from the registries, the recipe and the import contract.

A page asks for one with a line `<!-- generated: NAME -->`; `GENERATED` has the names.
"""

from __future__ import annotations

import ast
import configparser
import dataclasses
import enum
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from calibration.statistics import load_statistics
from compress.bases.base import BASES
from compress.cli.command import Argument
from compress.cli.commands import COMMANDS
from compress.config.options import choices
from compress.config.recipe import Recipe
from compress.engines import ENGINES
from compress.exports.base import EXPORTS
from compress.families.base import METHODS, Compressor
from compress.families.option_types import choice_of, describe, is_leaf, option_hints, plain
from compress.families.options import resolves_to
from compress.forms.registered import FORMS
from compress.report.metrics import METRICS, Metric

ROOT = Path(__file__).resolve().parent.parent
HEAD = "| option | takes | default | meaning |\n| --- | --- | --- | --- |"


def recipe_options() -> str:
    """Every field of `Recipe`, a table for each group."""
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(Recipe):
        group = str(field.metadata.get("group", "general"))
        groups.setdefault(group, []).append(_row(Recipe, field))
    return "\n\n".join(
        "\n".join([f"### {group.capitalize()}", "", HEAD, *rows]) for group, rows in groups.items()
    )


def method_options() -> str:
    """What methods share, and then every method with its own options."""
    parts = [_family(kind) for kind in _families()]
    parts += [_method(name, METHODS[name]) for name in sorted(METHODS)]
    return "\n\n".join(parts)


def commands() -> str:
    """Every command with the arguments that are no option of a recipe."""
    parts = []
    for command in COMMANDS.values():
        lines = [f"### compress {command.name}", "", command.about, ""]
        lines.append(f"    compress {command.name} {command.usage}".rstrip())
        rows = [_argument(each) for each in command.arguments if each.name.startswith("-")]
        if rows:
            lines += ["", "| option | takes | meaning |", "| --- | --- | --- |", *rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _argument(argument: Argument) -> str:
    takes = ", ".join(f"`{it}`" for it in argument.choices()) or f"{argument.metavar or ''}"
    return f"| `{argument.name}` | {takes} | {_cell(argument.about)} |"


def packages() -> str:
    """The packages of `compress` from the top down, with their first line, by the import contract."""
    lines = ["| layer | package | what lives there |", "| ---: | --- | --- |"]
    for number, layer in enumerate(_layers(), 1):
        for part in layer.split("|"):
            name = part.strip()
            about = _first_line(ROOT / "compress" / name)
            lines.append(f"| {number} | `{name}` | {about} |")
    return "\n".join(lines)


def _layers() -> list[str]:
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter", encoding="utf-8")
    return contract["importlinter:contract:compress"]["layers"].strip().splitlines()


def _first_line(module: Path) -> str:
    path = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return _cell(docstring.partition("\n")[0])


def _families() -> list[type]:
    """The abstract classes whose options several methods have, in the order of the methods' names."""
    owners = [_owners(METHODS[name]) for name in sorted(METHODS)]
    shared = [owner for each in owners for owner in each.values() if inspect.isabstract(owner)]
    return list(dict.fromkeys(shared))


def _owners(kind: type) -> dict[str, type]:
    """The class that defines each option of a method."""
    return {
        field.name: next(base for base in kind.__mro__ if field.name in _annotations(base))
        for field in dataclasses.fields(kind)
        if field.init
    }


def _annotations(kind: type) -> Mapping[str, Any]:
    found: Mapping[str, Any] = vars(kind).get("__annotations__", {})
    return found


def _family(kind: type) -> str:
    rows = [_row(kind, field) for field in dataclasses.fields(kind) if _owns(kind, field.name)]
    return "\n".join([f"### {kind.__name__}", "", _summary(kind), "", HEAD, *rows])


def _owns(kind: type, name: str) -> bool:
    return name in _annotations(kind)


def _method(name: str, kind: Any) -> str:
    owners = _owners(kind)
    families = list(dict.fromkeys(it for it in owners.values() if inspect.isabstract(it)))
    own = [field for field in dataclasses.fields(kind) if owners.get(field.name) is kind]
    links = " and ".join(f"[{it.__name__}](#{it.__name__.lower()})" for it in families)
    lines = [f"### {name}", "", f"{_summary(kind)} Source: {kind.paper}."]
    if links:
        also = ", and its own:" if own else "."
        lines += ["", f"Options of {links}{also}"]
    if own:
        lines += ["", HEAD, *(_row(kind, field) for field in own)]
    return "\n".join(lines)


def _row(kind: type, field: dataclasses.Field[Any]) -> str:
    hint = option_hints(kind)[field.name]
    flag = "--" + field.name.replace("_", "-")
    text = _cell(str(field.metadata.get("help", "")))
    return f"| `{flag}` | {_takes(hint)} | {_default(field)} | {text}{_members(hint)} |"


def _takes(hint: Any) -> str:
    if is_leaf(hint):
        kinds = [each for each in (hint, *get_args(hint)) if _is_enum(each)]
        names = [f"`{member.value}`" for kind in kinds for member in kind]
        return ", ".join(names) or describe(hint)
    names = [f"[{name}](#{name})" for name in choices(hint, METHODS)]
    optional = ["`none`"] if type(None) in get_args(hint) else []
    return "a method" if choice_of(hint) is Compressor else ", ".join([*optional, *names])


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif value is None:
        value = resolves_to(field)
    if value is dataclasses.MISSING:
        return ""
    if value is None:
        return "`none`"
    value = getattr(value, "name", None) if isinstance(value, Compressor) else plain(value)
    shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{shown}`" if shown else "empty"


def _members(hint: Any) -> str:
    """What the values of an enum mean, where its members say so."""
    kinds = [kind for kind in (hint, *get_args(hint)) if _is_enum(kind)]
    texts = [
        f"<br>`{value}`: {_cell(text)}"
        for kind in kinds
        for value, text in member_docstrings(kind).items()
    ]
    return "".join(texts)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def member_docstrings(kind: type[enum.Enum]) -> Mapping[str, str]:
    """The text below each member of an enum, by the member's value."""
    texts = _texts_below(kind)
    return {str(it.value): texts[name] for name, it in kind.__members__.items() if name in texts}


@cache
def _texts_below(kind: type) -> Mapping[str, str]:
    """The first paragraph of the text below each name that a class defines."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant):
                    found[name] = str(text.value).strip().partition("\n\n")[0]
    return found


def _summary(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def exports() -> str:
    """Every export format with the facts that cards tell of it."""
    lines = [
        "| `--export` | what it holds | written by runs on | engines |",
        "| --- | --- | --- | --- |",
    ]
    for name, kind in EXPORTS.items():
        runs = ", ".join(sorted(str(use) for use in kind.traits.uses))
        served = ", ".join(kind.traits.engines) or "none"
        lines.append(f"| `{name}` | {_cell(_summary(kind))} | {runs} | {served} |")
    return "\n".join(lines)


def engines() -> str:
    """Every engine, what its environment is made of, and the formats that are for it."""
    lines = ["| engine | `pip install` | formats |", "| --- | --- | --- |"]
    for name, kind in ENGINES.items():
        formats = [it for it, export in EXPORTS.items() if name in export.traits.engines]
        wanted = ", ".join(f"`{it}`" for it in kind.requirements)
        lines.append(f"| `{name}` | {wanted} | {', '.join(formats)} |")
    return "\n".join(lines)


def bases() -> str:
    """Every base format, and who else loads it."""
    lines = ["| format | what it holds | transformers needs | PEFT | vLLM |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, kind in BASES.items():
        packages = ", ".join(kind.loading.packages)
        told = ("yes" if it else "no" for it in (kind.loading.peft, kind.loading.vllm is not None))
        cells = [f"`{name}`", _cell(_summary(kind)), packages, *told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def forms() -> str:
    """Every form."""
    return _named("form", FORMS)


def statistics() -> str:
    """Every statistic."""
    return _named("statistic", load_statistics())


def _named(head: str, registry: Mapping[str, type]) -> str:
    rows = [f"| `{name}` | {_cell(_summary(kind))} |" for name, kind in sorted(registry.items())]
    return "\n".join([f"| {head} | what it is |", "| --- | --- |", *rows])


def metric_fields() -> str:
    """The fields of a row of METRICS, with the text below each in the source."""
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    texts = _texts_below(Metric)
    for field in dataclasses.fields(Metric):
        lines.append(f"| `{field.name}` | {_default(field)} | {_cell(texts[field.name])} |")
    return "\n".join(lines)


def metrics() -> str:
    """Every metric."""
    lines = ["| metric | key | better | meaning |", "| --- | --- | --- | --- |"]
    for it in METRICS.values():
        lines.append(f"| {it.title} | `{it.key}` | {it.direction} | {_cell(it.help)} |")
    return "\n".join(lines)


GENERATED: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "recipe": recipe_options,
    "methods": method_options,
    "exports": exports,
    "engines": engines,
    "bases": bases,
    "forms": forms,
    "statistics": statistics,
    "metric_fields": metric_fields,
    "metrics": metrics,
    "packages": packages,
}


def filled(markdown: str) -> str:
    """A page's text with every generated part in its place. Raises KeyError for a part that does not exist."""
    return "\n".join(_lines(markdown))


def _lines(markdown: str) -> Iterator[str]:
    for line in markdown.splitlines():
        if line.startswith("<!-- generated: "):
            yield GENERATED[line.removeprefix("<!-- generated: ").removesuffix(" -->")]()
        else:
            yield line
