"""Errors as data: which option is meant and why, the text made from the two."""

import pickle

import pytest

from compress.config.recipe import METHODS, Recipe
from compress.errors import RecipeError, inside
from compress.families.base import LayerShape


def test_the_text_is_the_option_and_the_reason() -> None:
    error = RecipeError("7 is not supported", option="bits")
    assert (error.option, error.reason, str(error)) == (
        "bits",
        "7 is not supported",
        "bits: 7 is not supported",
    )
    assert str(RecipeError("nothing to do")) == "nothing to do"


def test_every_place_around_an_option_puts_its_path_before() -> None:
    with pytest.raises(RecipeError) as caught, inside("method"), inside("base"):
        raise RecipeError("7 is not supported", option="bits")
    assert caught.value.option == "method.base.bits"
    assert str(caught.value) == "method.base.bits: 7 is not supported"


def test_an_error_survives_another_process() -> None:
    again = pickle.loads(pickle.dumps(RecipeError("7 is not supported", option="bits")))  # noqa: S301
    assert (again.option, str(again)) == ("bits", "bits: 7 is not supported")


def test_a_methods_own_refusal_is_told_with_the_place_of_the_method() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_mapping({"method": {"name": "eora", "base": {"name": "gptq", "bits": 7}}})
    assert caught.value.option == "recipe.method.base.bits"


def test_an_option_of_the_base_is_told_as_the_bases() -> None:
    """`target` is an option of both; that of the base is meant."""
    with pytest.raises(RecipeError) as caught:
        Recipe.from_mapping(
            {"method": {"name": "eora", "base": {"name": "svd_llm", "target": "original"}}}
        )
    assert caught.value.option == "recipe.method.base.target"


def test_what_a_plan_refuses_of_the_base_is_told_as_the_bases() -> None:
    method = METHODS["eora"](base=METHODS["gptq"](group_size=48))  # type: ignore[call-arg]
    with pytest.raises(RecipeError) as caught:
        method.plan({"q": LayerShape((64, 64), 64 * 64 * 2)})
    assert caught.value.option == "base.group_size"
