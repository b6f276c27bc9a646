"""Subjects of a run: only the opening knows which of the two a recipe names."""

import ast
from pathlib import Path

import pytest

from compress.config.recipe import Recipe
from compress.methods.eora import EoRA
from compress.subjects.opening import opening

PACKAGE = Path(__file__).resolve().parent.parent / "compress"
ALLOWED = ("config", "subjects/opening.py")
"""The recipe checks its own options, and the opening chooses."""
CLASSES = {"OrdinaryModel", "CorrectedBase"}


def asks(tree: ast.AST) -> bool:
    """Whether code compares `base_checkpoint`, or tests for a class of subjects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            names = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            if "base_checkpoint" in names:
                return True
        is_test = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        if is_test and CLASSES & {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}:
            return True
    return False


@pytest.mark.parametrize("source", ["job.base_checkpoint is None", "isinstance(x, CorrectedBase)"])
def test_a_question_is_found(source: str) -> None:
    assert asks(ast.parse(source))


def test_no_stage_asks_which_subject_it_has() -> None:
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    others = [path for path in files if not path.as_posix().startswith(ALLOWED)]
    asking = [path for path in others if asks(ast.parse((PACKAGE / path).read_text()))]
    assert len(others) > 100
    assert not asking


def test_the_recipe_alone_chooses_the_subject(tmp_path: Path) -> None:
    model = opening(Recipe(model="demo"))
    base = opening(Recipe(model="demo", base_checkpoint=str(tmp_path), method=EoRA()))
    assert type(model) is not type(base)
    assert model.use is not base.use
    assert model.never_written is None
    assert base.never_written == tmp_path.resolve()
