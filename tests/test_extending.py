"""Each "add a ..." page shows a file, and that file does what every one of its kind must."""

import re
import shlex

import pytest
import torch
from documents import ROOT, shown, snippets, text_of
from problems import inputs, statistics
from test_methods_contract import TestEveryMethod as MethodContract

from compress.cli.main import main
from compress.errors import RecipeError
from compress.families.base import METHODS

GUIDES = ROOT / "docs" / "extend"
CHECKS = [name for name in dir(MethodContract) if name.startswith("test")]


def test_every_guide_shows_a_file_that_is_there():
    for guide in GUIDES.glob("*.md"):
        assert snippets(guide)
        assert all((ROOT / name).is_file() for name in snippets(guide))


@pytest.fixture
def ria():
    """The example of a method, as a running program defines it; what it registers goes with the test."""
    yield shown("ria").RIA
    METHODS.forget("ria")


@pytest.mark.parametrize("check", CHECKS)
def test_the_example_of_a_method_does_what_every_method_must(check, ria):
    getattr(MethodContract(), check)(ria.name)


def test_the_example_of_a_method_prunes_by_shares_alone_at_power_0(ria):
    method = ria(power=0.0)
    kept = method.pruned(torch.tensor([[4.0, 3.0], [8.0, 90.0]]), 1, statistics(inputs(2)))
    assert torch.equal(kept, torch.tensor([[4.0, 0.0], [0.0, 90.0]]))
    with pytest.raises(RecipeError, match=r"power: -1\.0 is negative"):
        ria(power=-1.0)


def test_the_example_of_a_method_is_used_as_its_page_says(ria, workspace, capsys):
    [line] = re.findall(r"^    [$] compress (.*)$", text_of(GUIDES / "method.md"), re.MULTILINE)
    text = str(workspace / "text.txt")
    here = ["--model", str(workspace / "model"), "--calibration", text, "--eval-text", text]
    quick = [
        "--seq-len",
        "32",
        "--samples",
        "4",
        "--out",
        str(workspace / "out"),
        "--tasks",
        "none",
    ]
    assert f"--method {ria.name} " in line
    assert main([*shlex.split(line), *here, *quick]) == 0
    assert "ria" in capsys.readouterr().out
