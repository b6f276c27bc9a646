"""The documentation as the tests read it: pages, blocks of code in them, links, and headings."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
ANCHOR = re.compile(r'<a id="([^"]+)">')


def pages() -> list[Path]:
    """Every page for people: those beside the README, and those in docs/."""
    found = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    assert len(found) > 4
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a page, with the files that they bring in."""
    found = [body for kind, body in FENCE.findall(text_of(page)) if kind == language]
    return [SNIPPET.sub(lambda it: text_of(ROOT / it[1]), body) for body in found]


def snippets(page: Path) -> list[str]:
    """The files that a page brings in."""
    return SNIPPET.findall(text_of(page))


def commands(page: Path) -> Iterator[str]:
    """Every `compress` command in the shell blocks of a page; those of an indented block, too."""
    indented = re.findall(r"^    (\w.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    lines = [line for body in blocks(page, "sh") for line in body.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(line for line in indented if " && " in line or "compress " in line)]:
        for part in line.split("&&"):
            if part.strip().startswith("compress "):
                yield part.strip()


def shown(name: str) -> ModuleType:
    """The module of this name that a page of docs/extend shows."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "extend" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings as GitHub and mkdocs write them, and marks."""
    text = FENCE.sub("", text_of(page))
    slugs = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(text)
    }
    return slugs | set(ANCHOR.findall(text))


def links(page: Path) -> list[str]:
    """Links of a page that lead to files."""
    text = FENCE.sub("", text_of(page))
    return [link for link in LINK.findall(text) if "://" not in link]
