"""A distribution of somebody else's: the documentation's examples, built, installed, and used from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from base_checkpoints import CHECKPOINTS
from documents import ROOT
from exported import Ran
from workspaces import fill

EXAMPLES = ROOT / "docs" / "extend"
POINTS = {
    "methods": {"ria": "ria", "by_fourth_moment": "fourth_moment", "ternarise": "ternary_method"},
    "exports": {"half": "half_export"},
    "bases": {"int8-rows": "int8_rows"},
    "forms": {"ternary": "ternary_form"},
    "statistics": {"fourth_moment": "fourth_moment"},
}
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "outside-of-compress"
version = "1.0"

[tool.hatch.build.targets.wheel]
only-include = {files}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution installed in it, as pip does it."""
    project = tmp_path_factory.mktemp("project")
    modules = sorted({module for points in POINTS.values() for module in points.values()})
    for module in modules:
        (project / f"{module}.py").write_bytes((EXAMPLES / f"{module}.py").read_bytes())
    text = PROJECT.format(files=json.dumps([f"{module}.py" for module in modules]))
    for kind, points in POINTS.items():
        text += f'\n[project.entry-points."compress.{kind}"]\n'
        text += "".join(f'"{name}" = "{module}"\n' for name, module in points.items())
    (project / "pyproject.toml").write_text(text, encoding="utf-8")
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(project)], check=True
    )
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a text."""
    return fill(tmp_path_factory.mktemp("place"))


def compress(site: Path, place: Path, *arguments: str) -> str:
    """What the command prints in a process that finds the distribution. Fails with its errors."""
    ran = told(site, place, *arguments)
    assert ran.code == 0, ran.err
    return ran.out


def told(site: Path, place: Path, *arguments: str) -> Ran:
    ran = subprocess.run(
        [sys.executable, "-m", "compress", *arguments],
        cwd=place,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def quick(*arguments: str) -> tuple[str, ...]:
    """Options of a run on what `fill` left: few tokens, two windows, no task."""
    text = ("--calibration", "text.txt", "--eval-text", "text.txt")
    small = ("--samples", "8", "--seq-len", "32", "--eval-windows", "2", "--tasks", "none")
    return ("--model", "model", *text, *small, *arguments)


def test_methods_of_another_distribution_are_listed(site: Path, place: Path) -> None:
    listed = compress(site, place, "methods")
    assert all(name in listed for name in POINTS["methods"])


@pytest.mark.parametrize("method", POINTS["methods"])
def test_a_method_a_form_a_statistic_and_an_export_of_another_distribution_pass_a_run(
    site: Path, place: Path, method: str
) -> None:
    options = quick("--method", method, "--export", "native", "half", "--out", method)
    assert "whole checkpoint, half" in compress(site, place, "plan", *options)
    compress(site, place, "run", *options)
    out = place / method
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [export["format"] for export in report["exports"]] == ["native", "half"]
    assert {layer["method"] for layer in report["layers"]} == {method}
    card = (out / "half" / "README.md").read_text(encoding="utf-8")
    assert "ordinary weights in full precision" not in card
    assert "half" in card
    for folder in ("native", "half"):
        compress(site, place, "verify", f"{method}/{folder}")
        compress(site, place, "inspect", f"{method}/{folder}")
    assert "KL divergence" in compress(site, place, "report", method)


def test_a_base_of_another_distribution_gets_a_correction(site: Path, place: Path) -> None:
    CHECKPOINTS["int8-rows"](place / "model", place / "base")
    options = quick("--method", "eora", "--rank", "2", "--base-checkpoint", "base", "--out", "on")
    compress(site, place, "run", *options)
    report = json.loads((place / "on" / "report.json").read_text(encoding="utf-8"))
    assert report["base"]["kind"] == "int8-rows"
    assert "int8-rows" in compress(site, place, "inspect", "base")


def test_without_the_distribution_its_names_are_refused(
    tmp_path: Path, place: Path, site: Path
) -> None:
    ran = told(tmp_path, place, "plan", *quick("--method", "ria"))
    assert ran.code == 2
    assert "there is no 'ria'" in ran.err
    assert "ria" in compress(site, place, "methods")
