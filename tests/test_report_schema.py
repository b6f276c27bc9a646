"""The published JSON Schema: what the dataclasses make, and as strict as reading is."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from jsonschema import Draft202012Validator
from reports import make_report
from workspaces import recipe

from compress.errors import CheckpointError
from compress.pipeline.main import run
from compress.report.report import Report
from compress.report.schema import report_schema
from eval.samples import PROMPTS


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    text = (files("compress") / "report.schema.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_published_schema_is_that_of_the_dataclasses(validator: Draft202012Validator) -> None:
    assert validator.schema == report_schema(), "run scripts/report_schema"


def test_every_field_is_there_and_those_with_a_text_have_it(validator: Any) -> None:
    totals = validator.schema["$defs"]["Totals"]["properties"]
    assert list(totals) == [field for field in json.loads(make_report().to_json())["totals"]]
    assert totals["relative_error"]["description"].startswith("Root of the summed squared")


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it,
        lambda it: replace(it, scores=None),
        lambda it: replace(it, licence=None, exports=(), layers=(), notes=()),
        lambda it: replace(it, totals=replace(it.totals, relative_error=None)),
    ],
)
def test_what_a_run_writes_is_valid(
    change: Callable[[Report], Report], validator: Draft202012Validator
) -> None:
    validator.validate(json.loads(change(make_report()).to_json()))


@pytest.mark.usefixtures("quick_verification")
def test_what_a_run_really_writes_is_valid_and_becomes_a_card(
    workspace: Path, validator: Draft202012Validator
) -> None:
    done = run(recipe(workspace, eval_windows=3))
    text = (workspace / "out" / "report.json").read_text(encoding="utf-8")
    validator.validate(json.loads(text))
    assert Report.from_json(text) == done
    assert done.scores is not None and done.scores.after.fidelity is not None
    assert len(done.scores.after.fidelity.windows) == 3
    assert [sample.prompt for sample in done.scores.samples] == list(PROMPTS)
    (result,) = ModelCard.load(workspace / "out" / "README.md").data.eval_results
    assert result.metric_value == done.scores.after.fidelity.perplexity


@pytest.mark.parametrize(
    "keys",
    [("head",), ("base",), ("licence_link",), ("scores", "samples"), ("layers", 0, "base_error")],
)
def test_what_earlier_versions_did_not_write_may_be_missing(
    keys: tuple[Any, ...], validator: Draft202012Validator
) -> None:
    data = json.loads(make_report().to_json())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    validator.validate(data)
    Report.from_json(json.dumps(data))


BROKEN: list[tuple[str, Any]] = [
    ("schema", 2),
    ("schema", ...),
    ("totals.n_layers", ...),
    ("totals.extra", 1),
    ("layers.2.bytes_after", "many"),
    ("layers.2.shape", [1, 2, 3]),
    ("layers.2.shape", [1]),
    ("exports.0.adapter", ...),
    ("scores.after.fidelity.kl", None),
    ("scores.after.fidelity.windows.0.nll", "3"),
    ("scores.after.tasks.0.n_items", 1.5),
    ("scores.samples.0.before", None),
    ("environment", []),
    ("environment.versions.torch", 2),
    ("timings.calibrate", "long"),
    ("notes", "one"),
]


@pytest.mark.parametrize(("path", "value"), BROKEN)
def test_what_reading_refuses_is_invalid(
    path: str, value: Any, validator: Draft202012Validator
) -> None:
    data = copy.deepcopy(json.loads(make_report().to_json()))
    *parents, last = path.split(".")
    inner = data
    for part in parents:
        inner = inner[int(part) if part.isdigit() else part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    assert not validator.is_valid(data)
    with pytest.raises(CheckpointError):
        Report.from_json(json.dumps(data))
