"""Hooks of mkdocs: fills generated parts, brings in what lies outside docs/, and refuses pages that ask other hosts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from reference_tables import ROOT, filled

OUTSIDE = {
    "results-in-full.md": "scripts/RESULTS.md",
    **{
        f"pictures/{path.name}": f"scripts/pictures/{path.name}"
        for path in sorted((ROOT / "scripts" / "pictures").glob("*.svg"))
    },
}
"""Pages and pictures of the site that are files elsewhere in the repository."""

FETCHES = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\s\">]+")


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/."""
    for uri, source in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Fill generated parts; let links to files outside docs/ lead to their places on the site."""
    for uri, source in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source})", f"]({uri})")
    return filled(markdown)


def on_post_build(config: Any) -> None:
    """Raise PluginError if a page would fetch something from another host."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        found = FETCHES.search(path.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{path} asks another host: {found.group()}")
