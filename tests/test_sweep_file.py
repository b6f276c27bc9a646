"""What a sweep's file becomes: points, their recipes and their names."""

from pathlib import Path
from textwrap import dedent

import pytest

from compress.config.recipe import Recipe
from compress.config.yaml_file import read_yaml
from compress.errors import RecipeError
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.methods.sparsegpt import SparseGPT
from compress.methods.svd_llm import SVDLLM
from compress.solvers.masks import Pattern
from compress.sweep.file import points_of

OUT = Path("out")


@pytest.fixture
def points(tmp_path: Path):
    def read(text: str, **more: object):
        file = tmp_path / "sweep.yaml"
        file.write_text(dedent(text), encoding="utf-8")
        return points_of({**read_yaml(file), **more}, OUT)

    return read


def test_entries_are_partial_recipes_and_axes_are_multiplied_out(points) -> None:
    found = points(
        """
        recipe: {samples: 8, tasks: []}
        points:
          - method: {name: rtn, bits: 4}
          - method: {name: eora, base: {name: gptq, group_size: 32}}
            axes: {method.base.bits: [3, 4], rank: [8, 16]}
        """
    )
    methods = [point.recipe.method for point in found]
    assert methods == [
        RTN(bits=4),
        *(
            EoRA(rank=rank, base=GPTQ(bits=bits, group_size=32))
            for bits in (3, 4)
            for rank in (8, 16)
        ),
    ]
    assert all(point.recipe.samples == 8 and point.recipe.tasks == () for point in found)
    assert [point.name for point in found[:2]] == [
        "rtn-bits4",
        "eora-gptq-bits3-group_size32-rank8",
    ]
    assert all(point.recipe.out == OUT / point.name for point in found)


def test_an_entry_changes_the_base_method_or_replaces_it(points) -> None:
    found = points(
        """
        recipe: {method: {name: eora, rank: 8, base: {name: gptq, bits: 3}}}
        points:
          - {}
          - method: {rank: 16}
          - method: {base: {bits: 4}}
          - method: {base: rtn}
          - method: rtn
        """
    )
    assert [point.recipe.method for point in found] == [
        EoRA(rank=8, base=GPTQ(bits=3)),
        EoRA(rank=16, base=GPTQ(bits=3)),
        EoRA(rank=8, base=GPTQ(bits=4)),
        EoRA(rank=8, base=RTN()),
        RTN(),
    ]
    assert [point.name for point in found] == [
        "eora",
        "eora-rank16",
        "eora-bits4",
        "eora-rtn",
        "rtn",
    ]


def test_an_axis_of_methods_brings_their_options(points) -> None:
    found = points("axes: {bits: [2, 3], method: [rtn, {name: gptq, group_size: 64}]}")
    assert [point.recipe.method for point in found] == [
        RTN(bits=2),
        GPTQ(bits=2, group_size=64),
        RTN(bits=3),
        GPTQ(bits=3, group_size=64),
    ]


def test_axes_reach_every_option_of_a_recipe(points) -> None:
    found = points(
        """
        recipe: {method: rtn}
        axes: {propagate: [none, block], tasks: [[], [offline_piqa]]}
        """
    )
    assert [(p.recipe.propagate.value, p.recipe.tasks) for p in found] == [
        ("none", ()),
        ("none", ("offline_piqa",)),
        ("block", ()),
        ("block", ("offline_piqa",)),
    ]
    assert found[0].name == "rtn-propagatenone-tasksnone"


def test_a_pruned_base_is_corrected_at_several_ranks(points) -> None:
    found = points(
        """
        points:
          - method: {name: eora, base: {name: sparsegpt, pattern: "2:4"}}
            axes: {rank: [8]}
        """
    )
    assert found[0].recipe.method == EoRA(rank=8, base=SparseGPT(pattern=Pattern.TWO_OF_FOUR))


def test_names_depend_on_the_point_alone(points) -> None:
    few = points("points: [{method: rtn, axes: {bits: [3]}}]")
    more = points("points: [{method: gptq}, {method: rtn, axes: {bits: [4, 3]}}]")
    assert few[0].name in {point.name for point in more}


def test_an_entry_may_be_named_and_long_values_are_cut_with_a_digest(points) -> None:
    found = points(
        """
        points:
          - {name: ours, method: rtn, axes: {bits: [3]}}
          - {method: rtn, calibration: [some/where/text.txt, other.txt]}
        """
    )
    assert found[0].name == "ours-bits3"
    assert found[1].name.startswith("rtn-calibrationtext.txt+other.txt_")


def test_a_budget_makes_points_of_that_size_for_methods_that_have_one(points) -> None:
    found = points(
        """
        points:
          - method: svd_llm
          - method: {name: svd_llm, allocation: spectrum, keep: 0.5}
          - method: {name: eora, rank: 8}
        """,
        budgets=["120MB", "80MB"],
    )
    assert [point.recipe.method for point in found] == [
        SVDLLM(budget="120MB"),
        SVDLLM(budget="80MB"),
        SVDLLM(allocation="spectrum", keep=0.5),
        SVDLLM(allocation="spectrum", budget="120MB"),
        SVDLLM(allocation="spectrum", budget="80MB"),
        EoRA(rank=8),
    ]
    assert found[0].name == "svd_llm-budget120MB"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("point: []", "point: no such part of a sweep; there are recipe, points, axes, budgets"),
        ("points: rtn", "points: not a list"),
        ("points: [3]", "points[0]: 3 is neither a partial recipe nor a method's name"),
        (
            "points: [{method: {name: rtn, bit: 3}}]",
            "points[0]: recipe.method.bit: no such option; there are bits",
        ),
        (
            "points: [{method: rtn, axes: {bits: [3, 7]}}]",
            "points[0] with bits=7: recipe.method.bits: 7 is not supported",
        ),
        ("points: [{method: rtn, axes: {bits: 3}}]", "points[0].axes.bits: 3 is no list"),
        ("axes: {rnk: [3]}", "axes.rnk: no such option (did you mean rank?)"),
        (
            "axes: {method: [eora], factor_dtype: [float16], base: [svd]}",
            "axes.factor_dtype: could be method.base.factor_dtype or method.factor_dtype",
        ),
        ("points: [{out: x}]", "points[0].out: each point has a folder of its own"),
        (
            "{recipe: {out: x}, points: [{method: rtn}]}",
            "recipe.out: each point has a folder of its own",
        ),
        (
            "recipe: {publish_as: me/demo}\npoints: [{method: rtn}]",
            "recipe.publish_as: each point is another model",
        ),
        ("axes: {out: [x]}", "axes.out: each point has a folder of its own"),
        ("points: [rtn, rtn]", "points[1]: rtn is the same job as rtn of points[0]"),
        (
            "points: [{name: a, method: rtn}, {name: a, method: gptq}]",
            "points[1]: a is the name of another point of points[0]",
        ),
        ("points: [{name: ../x, method: rtn}]", "points[0].name: '../x' cannot be"),
        ("budgets: [many]", "budgets: 'many' is not an amount of bytes"),
        ("{points: [rtn], budgets: []}", "budgets: empty; give sizes"),
        ("budgets: [80MB, 0.08GB]", "budgets: 80MB and 0.08GB are one size"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(points, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        points(text)
    assert message in str(caught.value)


def test_a_point_equals_the_recipe_written_in_full(points) -> None:
    found = points("recipe: {seed: 3}\npoints: [{method: {name: gptq, bits: 3}}]")
    assert found[0].recipe == Recipe(method=GPTQ(bits=3), seed=3, out=OUT / "gptq-bits3")


@pytest.mark.parametrize("axes", ["{method.bits: [3, 4]}", "{eval_text: [text.txt, python-docs]}"])
def test_points_may_say_again_what_the_recipe_says(points, axes: str) -> None:
    text = (
        "recipe: {model: demo, method: rtn, eval_text: text.txt}\n"
        f"points: [{{model: demo, method: rtn, axes: {axes}}}]\n"
    )
    assert [point.recipe.model for point in points(text)] == ["demo", "demo"]


@pytest.mark.parametrize(
    "text", ["{}", "recipe: {model: demo}", "points: 3", "points: [{axes: {1: [2]}}]"]
)
def test_a_sweep_without_points_is_refused(points, text: str) -> None:
    with pytest.raises(RecipeError, match=r"points|axes"):
        points(text)
