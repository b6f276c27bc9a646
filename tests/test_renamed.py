"""Options that have another name now: what an earlier version wrote is refused, with the new word."""

import json
from pathlib import Path

import pytest
import yaml
from reports import make_report

from compress.cli.main import main
from compress.config.recipe import Recipe
from compress.errors import CheckpointError, RecipeError
from compress.families.base import METHODS
from compress.families.option_types import option_hints
from compress.families.renamed import FLAGS, RENAMED
from compress.report.report import Report
from compress.sweep.file import points_of

OLD = Path(__file__).parent / "written_by_3bfa062" / "checkpoints" / "native-complete"
NOW = {
    "base.order: natural": "act_order: none",
    "adapter_allocation: spectrum": "allocation: spectrum",
    "guard: off": "holdout: none",
    "anchor: none": "target: layer",
}
"""What an earlier version wrote into the recipe of these two files, and what it is now."""


def test_an_old_recipe_is_refused_with_the_new_words() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(OLD / "recipe.yaml")
    assert str(caught.value) == "recipe.method: " + ", ".join(
        f"`{old}` is `{new}` now" for old, new in NOW.items() if not old.startswith("base.")
    )


def test_an_old_report_is_refused_with_the_new_words_and_the_name_of_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(CheckpointError) as caught:
        Report.load(OLD)
    message = str(caught.value)
    assert message.startswith(f"{OLD / 'report.json'}: report.recipe.method: `base.order")
    assert all(f"`{old}` is `{new}` now" in message for old, new in NOW.items())
    assert main(["report", str(OLD)]) == 2
    assert "`guard: off` is `holdout: none` now" in capsys.readouterr().err


def test_an_old_report_with_its_words_changed_is_read(tmp_path: Path) -> None:
    data = json.loads((OLD / "report.json").read_text(encoding="utf-8"))
    for old, new in NOW.items():
        *path, key = old.partition(":")[0].split(".")
        method = data["recipe"]["method"][path[0]] if path else data["recipe"]["method"]
        del method[key]
        method |= yaml.safe_load(new)
    (tmp_path / "report.json").write_text(json.dumps(data), encoding="utf-8")
    report = Report.load(tmp_path)
    assert report.recipe["method"]["holdout"] == "none"
    assert len(report.layers) == len(data["layers"])


def test_an_option_of_another_method_may_have_an_old_name() -> None:
    text = json.loads(make_report().to_json())
    text["recipe"]["method"] = {"name": "somebodys", "guard": "dog"}
    assert Report.from_json(json.dumps(text)).recipe["method"]["guard"] == "dog"
    text["recipe"]["method"] = {"name": "svd", "then": {"name": "gptq", "order": "activation"}}
    with pytest.raises(CheckpointError, match=r"`then` is .*`then\.order: activation` is `act_"):
        Report.from_json(json.dumps(text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--guard", "eighth"], "--guard: this flag is called --holdout now"),
        (["run", "--method.base.order=natural"], "order: this flag is called --act-order now"),
        (["plan", "--method", "svd", "--then", "rtn"], "--then: this flag is called --factor-qu"),
        (["report", "x", "--despite-differences"], "this flag is called --allow-mismatch now"),
    ],
)
def test_an_old_flag_is_refused_with_the_new_one(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_sweep_in_old_words_is_refused_with_the_new_ones(tmp_path: Path) -> None:
    values = {"points": [{"method": {"name": "eora", "guard": "eighth"}}]}
    with pytest.raises(RecipeError, match=r"points\[0\]: .*`guard: eighth` is `holdout: 1/8` now"):
        points_of(values, tmp_path)
    axes = {"points": [{"method": "svd"}], "axes": {"anchor": ["none", "dense"]}}
    with pytest.raises(RecipeError, match=r"axes\.anchor: the option is target now"):
        points_of(axes, tmp_path)


@pytest.mark.parametrize("name", RENAMED)
def test_a_method_made_in_python_by_an_old_name_is_refused_with_the_new_one(name: str) -> None:
    found = RENAMED[name]
    for method in found.methods:
        with pytest.raises(RecipeError, match=f"`{name}: x` is `{found.new}: x` now"):
            METHODS[method](**{name: "x"})


def test_an_option_that_a_method_never_had_is_no_renamed_one() -> None:
    with pytest.raises(RecipeError, match=r"recipe\.method\.order: no such option; there are bits"):
        Recipe.from_mapping({"method": {"name": "rtn", "order": "natural"}})


@pytest.mark.parametrize("name", RENAMED)
def test_a_new_name_is_an_option_and_the_old_one_is_not(name: str) -> None:
    found = RENAMED[name]
    for method in found.methods:
        options = option_hints(METHODS[method])
        assert name not in options and found.new in options
        for value in found.values.values():
            Recipe.from_mapping({"method": {"name": method, found.new: value}})


def test_a_new_flag_is_one_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    help_text = capsys.readouterr().out
    assert all(new in help_text and old not in help_text for old, new in FLAGS.items())
