"""Imports point one way: no circle of modules, and a contract that names every module."""

import configparser
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compress", "calibration", "eval")
CHECK = (
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
)


def every_import():
    """Who imports whom, also inside functions and for type checkers only."""
    return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)


def a_circle(graph):
    """Modules each of which imports the next, the last the first; none where imports have no circle."""
    imported = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle():
    assert a_circle(every_import()) == []


def test_a_circle_is_found():
    graph = every_import()
    graph.add_import(importer="compress.errors", imported="compress.cli.main")
    circle = a_circle(graph)
    assert circle[0] == circle[-1]
    assert {"compress.errors", "compress.cli.main"} <= set(circle)


def test_every_package_has_its_contract():
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter", encoding="utf-8")
    exhaustive = {
        name
        for section in contracts.values()
        if section.get("exhaustive") == "True"
        for name in section["containers"].split()
    }
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    assert exhaustive == {".".join(path.parent.relative_to(ROOT).parts) for path in files}


@pytest.fixture
def tree(tmp_path):
    """The packages and their contracts, to be changed."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


def broken(tree):
    """What the import contracts say of a tree: nothing where all are kept."""
    environment = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "300", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


def test_the_contracts_are_kept(tree):
    assert broken(tree) == ""


@pytest.mark.parametrize(
    "upward",
    [
        "import compress.cli.main\n",
        "def late():\n    from compress.cli import main\n    return main\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from compress.cli import main\n",
    ],
    ids=["at the top", "in a function", "for type checkers"],
)
def test_an_import_that_points_up_breaks_a_contract(tree, upward):
    with (tree / "compress/solvers/linalg.py").open("a", encoding="utf-8") as file:
        file.write(upward)
    assert "compress.solvers.linalg -> compress.cli.main" in broken(tree)


def test_an_import_that_points_up_inside_a_package_breaks_its_contract(tree):
    with (tree / "compress/families/budget.py").open("a", encoding="utf-8") as file:
        file.write("from compress.families import pruner\n")
    assert "compress.families.budget -> compress.families.pruner" in broken(tree)


def test_a_module_without_a_place_breaks_the_contract_of_its_package(tree):
    (tree / "compress/solvers/homeless.py").write_text('"""Not in any layer."""\n')
    found = broken(tree)
    assert "compress.solvers" in found
    assert "homeless" in found
