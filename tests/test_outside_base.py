"""A base format of another distribution: corrected, inspected, reported and told on the model card."""

import json

import pytest
from base_checkpoints import CHECKPOINTS
from documents import ROOT, text_of
from outside import announce
from workspaces import recipe

from compress.bases import BASES
from compress.cli.main import main
from compress.errors import CheckpointError
from compress.inspection.checkpoint import inspect
from compress.report.report import Report

pytestmark = pytest.mark.usefixtures("quick_verification")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution whose entry point names the format of the documentation."""
    place = tmp_path / "site"
    place.mkdir()
    example = text_of(ROOT / "docs" / "extend" / "int8_rows.py")
    (place / "their_int8.py").write_text(example, encoding="utf-8")
    announce(place, "their_formats", "compress.bases", {"int8-rows": "their_int8:Int8Rows"})
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    yield
    BASES.forget("int8-rows")


@pytest.mark.usefixtures("installed")
def test_a_run_on_a_checkpoint_of_another_distributions_format(workspace, capsys):
    folder = CHECKPOINTS["int8-rows"](workspace / "model", workspace / "base")
    job = recipe(workspace, samples=4)
    options = {"model": job.model, "samples": "4", "seq-len": "32", "eval-windows": "2"}
    options |= {"calibration": job.calibration[0], "eval-text": job.eval_text, "tasks": "none"}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    out = workspace / "out"
    base = ["--base-checkpoint", str(folder), "--method", "eora", "--rank", "2"]
    assert main(["run", *base, *given, "--out", str(out)]) == 0

    report = Report.load(out)
    assert (report.base.kind, report.base.format) == ("int8-rows", "int8-rows, 8 bits, whole rows")
    assert all(layer.relative_error < layer.base_error for layer in report.layers)

    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    assert "int8-rows, 8 bits, whole rows" in capsys.readouterr().out
    assert main(["inspect", str(out / "adapter")]) == 0
    assert "int8-rows, 8 bits, whole rows" in capsys.readouterr().out

    page = workspace / "page.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert "int8-rows, 8 bits, whole rows" in page.read_text()

    card = (out / "adapter" / "README.md").read_text()
    assert "which transformers loads with int8-rows installed" in card
    assert "import int8_rows\nfrom peft import PeftModel" in card
    assert "its base is in the int8-rows format, which vLLM does not read" in card
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2


def test_without_the_distribution_its_checkpoints_are_refused_by_name(workspace):
    folder = CHECKPOINTS["int8-rows"](workspace / "model", workspace / "base")
    with pytest.raises(
        CheckpointError, match=r"quant_method 'int8-rows' is not supported; there are"
    ):
        inspect(str(folder), progress=lambda *_: None)
