"""The JSON Schema of report.json, made from the dataclasses that it is written from.

It is published as compress/report.schema.json; a test keeps the two equal, and
`scripts/report_schema` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from compress.report.metrics import METRICS
from compress.report.report import Report

FILE = Path(__file__).parent.parent / "report.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def report_schema() -> dict[str, Any]:
    """A schema that takes what `Report.from_json` takes, and the table of metrics as `x-metrics`."""
    schema = TypeAdapter(Report).json_schema(schema_generator=_Untitled)
    # Its number is read before anything else, so it must be there.
    schema["required"] = ["schema", *schema["required"]]
    return {"$schema": DIALECT, **schema, "title": "report.json", "x-metrics": _metrics()}


class _Untitled(GenerateJsonSchema):
    """Generates a schema without titles of fields, which would repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 (pydantic's signature)
        """No field gets a title."""
        return False


def _metrics() -> dict[str, dict[str, str]]:
    """The metrics of summaries and comparisons, for programs that read these."""
    return {
        key: {
            "label": metric.label,
            "unit": metric.unit,
            "better": metric.direction.value,
            "description": metric.help,
        }
        for key, metric in METRICS.items()
    }
