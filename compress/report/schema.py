"""The JSON Schema of report.json, made from the dataclasses that it is written from.

It is published as compress/report.schema.json; a test keeps the two equal, and
`scripts/report_schema` writes it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from compress.report.metrics import METRICS
from compress.report.report import SCHEMA, Report

FILE = Path(__file__).parent.parent / "report.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def report_schema() -> dict[str, Any]:
    """A schema that takes what `Report.from_json` takes."""
    definitions: dict[str, Any] = {}
    _schema(Report, definitions)
    report = definitions.pop("Report")
    report["properties"]["schema"]["const"] = SCHEMA
    # Its number is read before anything else, so it must be there.
    report["required"] = ["schema", *(name for name in report["required"] if name != "schema")]
    return {
        "$schema": DIALECT,
        "title": "report.json",
        **report,
        "$defs": definitions,
        "x-metrics": _metrics(),
    }


def _metrics() -> dict[str, dict[str, str]]:
    """What comparisons and summaries tell of a report, for those who read the figures by a program."""
    return {
        key: {
            "label": metric.label,
            "unit": metric.unit,
            "better": metric.direction.value,
            "description": metric.help,
        }
        for key, metric in METRICS.items()
    }


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type, as `compress.report.report.decode` reads it; classes go to `definitions`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin in (Union, UnionType) and NoneType in arguments:
        inner = [_schema(kind, definitions) for kind in arguments if kind is not NoneType]
        return {"anyOf": [*inner, {"type": "null"}]}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is tuple:
        parts = [_schema(kind, definitions) for kind in arguments]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    return TypeAdapter(hint).json_schema()


def _object(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, about = get_type_hints(kind), _about(kind)
    properties = {}
    for field in fields(kind):
        properties[field.name] = _schema(hints[field.name], definitions)
        if field.name in about:
            properties[field.name]["description"] = about[field.name]
    return {
        "description": inspect.getdoc(kind),
        "type": "object",
        "properties": properties,
        "required": [field.name for field in fields(kind) if "later" not in field.metadata],
        "additionalProperties": False,
    }


def _about(kind: type) -> dict[str, str]:
    """The text under each field of a class, which Python itself forgets."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(words))):
                    found[field.target.id] = inspect.cleandoc(words)
    return found
