"""Renders text, tables and figures as one HTML file that fetches nothing: templates, styles, charts and their library.

Layer names, notes and file names may hold anything: Jinja escapes them all, and what a script element holds as data is
JSON without a `<`.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress.report.environment import toolkit_version
from compress.report.pages.figures import Figure
from compress.report.pages.theme import PAGE, config


def render(template: str, **values: Any) -> str:
    """A page from its template, in which `chart(figure)` draws a figure, or says why there is none."""
    environment = Environment(
        loader=PackageLoader("compress.report.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    specs: list[dict[str, Any]] = []

    def numbered(figure: Figure) -> int:
        """The place of a figure's chart among the page's."""
        specs.append(_spec(figure))
        return len(specs) - 1

    return environment.get_template(template).render(
        numbered=numbered,
        specs=specs,
        config=config(PAGE),
        library=_library(),
        toolkit=toolkit_version(),
        **values,
    )


def _spec(figure: Figure) -> dict[str, Any]:
    """Vega-Lite, as wide as its place; the page has one configuration for all."""
    if figure.chart is None:
        raise ValueError(f"{figure.title}: there is no chart to draw")
    sized = figure.chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x"))
    spec: dict[str, Any] = sized.to_dict()
    del spec["config"]
    return spec | {"description": f"{figure.title}. {figure.told}"}


def _library() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script, of the versions that vl-convert has.

    Whatever it holds must not end the script element that it stands in.
    """
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # the snippet has a default
    safe = bundle.replace("</script", r"<\/script").replace("<!--", r"<\!--")
    return Markup(safe)
