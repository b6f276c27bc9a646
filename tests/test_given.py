"""Options that have an effect only beside certain others: given or not given, and what they resolve to."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import yaml

from compress.cli.main import main
from compress.config.options import walk_options
from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.families.base import METHODS, Compressor
from compress.methods.admm import ADMM
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.dsnot import DSnoT
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.lord import LoRD
from compress.methods.lqer import LQER
from compress.methods.rtn import RTN
from compress.methods.svd_llm import SVDLLM
from compress.methods.wanda import Wanda
from compress.methods.welore import WeLore
from compress.solvers.rank_allocation import Importance

WITHOUT_EFFECT: list[tuple[type[Any], dict[str, object], dict[str, object]]] = [
    (EoRA, {"adapter_budget": "5%"}, {"rank": 32}),
    (EoRA, {}, {"allocation": "spectrum", "adapter_importance": "relative"}),
    (EoRA, {"rank": 16}, {"allocation": "spectrum", "adapter_importance": "relative"}),
    (
        EoRA,
        {"adapter_budget": "5%", "allocation": "uniform"},
        {"rank": 32, "adapter_importance": "relative"},
    ),
    (EoRA, {"adapter_bits": "4"}, {"factor_dtype": "float16"}),
    (LQER, {"adapter_budget": "20MB"}, {"rank": 32}),
    (
        SVDLLM,
        {"rank": 8},
        {
            "keep": 0.8,
            "budget": "1MB",
            "allocation": "uniform",
            "importance": "relative",
            "floor": 0.5,
            "rank_multiple": 8,
        },
    ),
    (SVDLLM, {"budget": "1MB"}, {"keep": 0.8}),
    (SVDLLM, {}, {"importance": "relative", "floor": 0.5}),
    (SVDLLM, {"allocation": "by_type"}, {"floor": 0.5}),
    (WeLore, {}, {"importance": "relative", "floor": 0.5}),
    (WeLore, {"rank": 8}, {"allocation": "welore"}),
    (ADMM, {"pattern": "2:4"}, {"sparsity": 0.5, "keep": 0.8}),
    (ADMM, {"keep": 0.6}, {"sparsity": 0.5, "per_row": 8}),
    (ADMM, {"per_row": 8}, {"sparsity": 0.5}),
    (ADMM, {"value_bits": "8", "keep": 0.5}, {"value_dtype": "float16"}),
    (ADMM, {"value_bits": "13"}, {"value_dtype": "auto"}),
    (ADMM, {"value_bits": "32"}, {"value_dtype": "float32"}),
    (SVDLLM, {"factor_quantizer": RTN()}, {"factor_dtype": "float16"}),
    (SVDLLM, {"factor_quantizer": RTN(), "rank": 8}, {"factor_dtype": "auto", "keep": 0.8}),
    (
        CoSpaDi,
        {"atoms": 8},
        {"keep": 0.8, "budget": "1MB", "allocation": "uniform", "importance": "relative"},
    ),
    (CoSpaDi, {"budget": "1MB"}, {"keep": 0.8}),
    (CoSpaDi, {"pattern": "2:4"}, {"ratio": 2.5}),
    (CoSpaDi, {}, {"depth": 2, "importance": "relative"}),
    (CoSpaDi, {"solver": "oneshot"}, {"rounds": 12}),
]
"""Methods, options that are given, and options, mostly at their defaults, that have no effect beside them."""

RESOLVED: list[tuple[type[Any], dict[str, object], dict[str, object]]] = [
    (EoRA, {}, {"rank": 32, "allocation": None, "adapter_importance": None}),
    (EoRA, {}, {"factor_dtype": "float16", "base": GPTQ()}),
    (
        EoRA,
        {"adapter_budget": "5%"},
        {"rank": None, "allocation": "spectrum", "adapter_importance": "relative"},
    ),
    (EoRA, {"adapter_bits": "auto"}, {"factor_dtype": "float16"}),
    (EoRA, {"adapter_bits": "4"}, {"factor_dtype": None}),
    (SVDLLM, {}, {"keep": 0.8, "allocation": "uniform", "importance": None, "floor": None}),
    (SVDLLM, {}, {"rank_multiple": 8}),
    (SVDLLM, {"allocation": "by_type"}, {"importance": "relative", "floor": None}),
    (SVDLLM, {"allocation": "spectrum"}, {"importance": "relative", "floor": 0.5}),
    (SVDLLM, {"budget": "1MB"}, {"keep": None, "allocation": "uniform"}),
    (SVDLLM, {"rank": 8}, {"keep": None, "allocation": None, "rank_multiple": None}),
    (WeLore, {}, {"allocation": "welore"}),
    (ADMM, {}, {"sparsity": 0.5, "value_dtype": "auto"}),
    (ADMM, {"value_bits": "16"}, {"value_dtype": "auto"}),
    (ADMM, {"value_bits": "4"}, {"value_dtype": None}),
    (SVDLLM, {"factor_quantizer": RTN()}, {"factor_dtype": None}),
    (LoRD, {"factor_quantizer": RTN()}, {"factor_dtype": "auto"}),
    (ADMM, {"pattern": "2:4"}, {"sparsity": None}),
    (CoSpaDi, {}, {"keep": 0.8, "ratio": 2.5, "allocation": "uniform", "rounds": 12}),
    (CoSpaDi, {"solver": "ksvd"}, {"rounds": 60, "depth": None}),
    (CoSpaDi, {"solver": "oneshot"}, {"rounds": None}),
    (CoSpaDi, {"share": "depth"}, {"depth": 2}),
    (CoSpaDi, {"allocation": "errors"}, {"importance": "relative"}),
    (CoSpaDi, {"pattern": "2:4"}, {"ratio": None}),
]
"""Methods, options that are given, and what others resolve to; None: they have no effect."""


@pytest.mark.parametrize(
    ("kind", "given", "name", "value"),
    [
        (kind, given, name, value)
        for kind, given, idle in WITHOUT_EFFECT
        for name, value in idle.items()
    ],
)
def test_an_option_without_effect_is_refused_at_its_default_as_at_any_other_value(
    kind: type[Any], given: dict[str, object], name: str, value: object
) -> None:
    kind(**given)
    with pytest.raises(RecipeError, match=f"^{name}: {value} has no effect ") as refused:
        kind(**given, **{name: value})
    assert refused.value.option == name


@pytest.mark.parametrize(("kind", "given", "values"), RESOLVED)
def test_what_was_not_given_resolves_to_its_default_where_it_has_an_effect(
    kind: type[Any], given: dict[str, object], values: dict[str, object]
) -> None:
    method = kind(**given)
    assert {name: getattr(method, name) for name in values if name not in given} == dict.fromkeys(
        name for name in values if name not in given
    )
    resolved = method.resolved()
    assert {name: getattr(resolved, name) for name in values} == values
    assert resolved.resolved() == resolved
    explicit = {name: value for name, value in values.items() if value is not None}
    assert kind(**given, **explicit).resolved() == resolved


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_that_resolves_is_tested_on_a_method_of_its_family(name: str) -> None:
    method = METHODS[name]()
    resolving = {it.name for it in fields(method) if "resolves_to" in it.metadata}
    tested = {
        option
        for kind, _, values in RESOLVED
        if issubclass(kind, type(method).__mro__[1]) or issubclass(type(method), kind.__mro__[1])
        for option in values
    }
    assert resolving <= tested


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_recipe_and_the_options_tell_the_defaults_that_are_used(name: str) -> None:
    method = METHODS[name]()
    resolved = method.resolved()
    told = {option.path: option.value for option in walk_options(Recipe(method=method), METHODS)}
    mapping = Recipe(method=method).to_mapping()["method"]
    for entry in fields(method):
        default = method.default_of(entry.name)
        if default is None or isinstance(default, Compressor):
            continue
        assert told["method", entry.name] == default
        assert mapping[entry.name] == getattr(resolved, entry.name)


def test_a_recipe_written_out_is_read_again(tmp_path):
    plain, budget = Recipe(), Recipe(method=EoRA(adapter_budget="5%"))
    for recipe in (plain, budget, Recipe(method=CoSpaDi(solver="ksvd"))):
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        assert Recipe.from_yaml(file).to_yaml() == recipe.to_yaml()
    assert yaml.safe_load(plain.to_yaml())["method"]["rank"] == 32
    assert (
        yaml.safe_load(budget.to_yaml())["method"]
        | {
            "rank": None,
            "allocation": "spectrum",
            "adapter_importance": "relative",
        }
        == yaml.safe_load(budget.to_yaml())["method"]
    )


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("eora", {"--rank": "32", "--allocation": "spectrum"}),
        ("svd_llm", {"--keep": "0.8", "--floor": "0.5", "--rank-multiple": "8"}),
        ("wanda", {"--sparsity": "0.5"}),
        ("cospadi", {"--ratio": "2.5", "--depth": "2", "--rounds": "12"}),
        ("welore", {"--allocation": "welore"}),
    ],
)
def test_help_shows_the_defaults(method, defaults, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--method", method, "--help"])
    shown = re.split(r"\n  (?=--)", capsys.readouterr().out)
    for flag, value in defaults.items():
        [entry] = [each for each in shown if each.startswith(f"{flag} ")]
        assert f"(default: {value})" in " ".join(entry.split())


def test_the_word_none_is_an_importance_and_no_absence():
    values = {"name": "svd_llm", "allocation": "spectrum", "importance": "none"}
    recipe = Recipe.from_mapping({"method": values})
    assert recipe.method == SVDLLM(allocation="spectrum", importance="none")
    assert recipe.method.importance is Importance.NONE
    assert Recipe.from_mapping({"method": {**values, "importance": None}}).method == SVDLLM(
        allocation="spectrum"
    )


def test_replacing_one_option_gives_no_other():
    assert replace(EoRA(), adapter_budget="5%") == EoRA(adapter_budget="5%")
    assert replace(SVDLLM(), rank=8) == SVDLLM(rank=8)
    assert replace(Wanda(), keep=0.6) == Wanda(keep=0.6)
    recipe = Recipe.from_mapping({"method": {"name": "dsnot", "base": {"keep": 0.6}}})
    assert recipe.method == DSnoT(base=Wanda(keep=0.6))


def test_a_base_at_its_default_beside_a_base_checkpoint_is_refused():
    assert Recipe(method=EoRA(), base_checkpoint="somewhere").export == ("adapter",)
    assert Recipe(method=replace(EoRA(), rank=8), base_checkpoint="somewhere")
    with pytest.raises(RecipeError, match=r"method\.base is given too"):
        Recipe(method=EoRA(base=GPTQ()), base_checkpoint="somewhere")
    with pytest.raises(RecipeError, match=r"method\.base is given too"):
        Recipe.from_mapping(
            {"method": {"name": "eora", "base": "gptq"}, "base_checkpoint": "somewhere"}
        )


def test_a_base_given_by_a_flag_at_its_default_beside_a_base_checkpoint_is_refused(capsys):
    assert main(["plan", "--base-checkpoint", "somewhere", "--base", "gptq"]) == 2
    assert "method.base is given too" in capsys.readouterr().err


def test_a_rank_given_by_a_flag_at_its_default_beside_a_budget_is_refused(capsys):
    assert main(["plan", "--adapter-budget", "5%", "--rank", "32"]) == 2
    assert "rank: 32 has no effect beside --adapter-budget 5%" in capsys.readouterr().err


def test_bits_that_a_plan_chooses_leave_the_dtype_of_16_bits_aside():
    method = EoRA(adapter_bits="auto", factor_dtype="bfloat16", rank=8)
    assert method._with(GPTQ(), 8, 16).factor_dtype == "bfloat16"
    assert method._with(GPTQ(), 8, 4).factor_dtype is None
