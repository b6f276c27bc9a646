"""Options <-> mappings, on small dataclasses, and the recipe that is made of them."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.config.choices import StatisticsMode
from compress.config.options import build, dump, parse_leaf, walk_options
from compress.config.recipe import Dtype, Propagate, Recipe, default_folder
from compress.errors import RecipeError
from compress.families.base import METHODS
from compress.families.correction import Correction
from compress.families.option_types import describe


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Shape:
    """What a field of another options class is declared as."""


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    """A square."""

    side: int = 1
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.side < 1:
            raise RecipeError(f"{self.side} is too small; it takes 1 or more", option="side")
        if self.side == 9999:
            raise ValueError(f"side: {self.side} is what a class without our errors refuses")


@dataclass(frozen=True, kw_only=True)
class Frame(Shape):
    """A frame round another shape."""

    width: int = 2
    base: Shape = field(default_factory=lambda: Square(side=7))
    inside: Square | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The root."""

    colour: Colour = Colour.RED
    names: tuple[str, ...] = ()
    out: Path | None = None
    n_items: int | None = None
    shape: Shape = field(default_factory=Frame)


SHAPES = {"square": Square, "frame": Frame}


def picture(values: object) -> Picture:
    return build(Picture, values, "picture", SHAPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 32.0}, "rank: 32.0 does not fit; it takes a whole number or none"),
        ({"rank": True}, "rank: True does not fit"),
        ({"damping": "0.1"}, "damping: '0.1' does not fit; it takes a number"),
        ({"adapter_budget": 5}, "adapter_budget: 5 does not fit; it takes text or none"),
        ({"base": "gptq"}, "base: 'gptq' is not a Compressor or none"),
    ],
)
def test_a_method_made_in_python_refuses_values_of_other_types(options, message):
    with pytest.raises(RecipeError) as caught:
        METHODS["eora"](**options)
    assert str(caught.value).startswith(message)


def test_an_empty_mapping_gives_the_defaults() -> None:
    assert picture({}) == Picture()


def test_a_choice_is_a_name_or_a_mapping() -> None:
    assert picture({"shape": "square"}).shape == Square()
    assert picture({"shape": {"name": "square", "side": 3}}).shape == Square(side=3)


def test_a_choice_without_a_name_changes_the_default_one() -> None:
    assert picture({"shape": {"base": {"share": 0.25}}}).shape == Frame(
        base=Square(side=7, share=0.25)
    )


def test_another_choice_starts_from_its_own_defaults() -> None:
    assert picture({"shape": {"base": {"name": "square"}}}).shape == Frame()
    assert picture({"shape": {"base": {"name": "frame"}}}).shape == Frame(base=Frame())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": {"base": {"sde": 3}}}, "picture.shape.base.sde: no such option; there are"),
        ({"shape": {"base": {"sde": 3}}}, "share, side (did you mean side?)"),
        ({"shape": {"base": {"side": "three"}}}, "'three' does not fit; it takes a whole number"),
        ({"shape": {"base": {"side": 0}}}, "picture.shape.base.side: 0 is too small"),
        ({"shape": {"base": {"side": 9999}}}, "picture.shape.base: side: 9999 is what a class"),
        ({"shape": "circle"}, "picture.shape: there is no 'circle'; there are frame, square"),
        ({"shape": 3}, "picture.shape: 3 is neither a name nor a mapping"),
        ({"colour": "rde"}, "picture.colour: 'rde' does not fit; it takes one of red, blue"),
        ({"names": 3}, "picture.names: 3 does not fit; it takes a list, each text"),
        ({"n_items": True}, "picture.n_items: True does not fit; it takes a whole number or none"),
        ({"n_items": 1.5}, "picture.n_items: 1.5 does not fit"),
        ([1], "picture: [1] is not a mapping"),
    ],
)
def test_what_cannot_be_is_refused_with_correction_value_and_remedy(
    values: object, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        picture(values)
    assert message in str(caught.value)


@pytest.mark.parametrize("nothing", ["none", None])
def test_a_choice_that_may_be_none_is_a_name_a_mapping_or_none(nothing: object) -> None:
    framed = picture({"shape": {"name": "frame", "inside": {"name": "square", "side": 4}}})
    assert framed.shape == Frame(inside=Square(side=4))
    assert picture({"shape": {"name": "frame", "inside": "square"}}).shape == Frame(inside=Square())
    empty = build(Picture, {"shape": {"inside": nothing}}, "picture", SHAPES, framed)
    assert empty.shape == Frame()
    assert dump(empty, SHAPES)["shape"]["inside"] is None
    assert picture(dump(framed, SHAPES)) == framed


def test_a_choice_that_may_be_none_is_walked_only_where_it_is_something() -> None:
    paths = {option.path for option in walk_options(Picture(), SHAPES)}
    assert ("shape", "inside") in paths
    assert ("shape", "inside", "side") not in paths
    framed = Picture(shape=Frame(inside=Square()))
    options = {option.path: option for option in walk_options(framed, SHAPES)}
    assert ("shape", "inside", "side") in options
    assert set(options["shape", "inside"].choices) == {"none", "square"}


def test_leaves_read_flags_and_yaml_alike() -> None:
    assert parse_leaf(int, "4", "p") == parse_leaf(int, 4, "p") == 4
    assert parse_leaf(float, "1e-2", "p") == parse_leaf(float, 0.01, "p")
    assert parse_leaf(tuple[str, ...], "a, b", "p") == parse_leaf(tuple[str, ...], ["a", "b"], "p")
    assert parse_leaf(Path | None, "none", "p") is None
    assert parse_leaf(Colour, "blue", "p") is Colour.BLUE


def test_a_choice_that_is_a_number_may_be_written_as_one() -> None:
    method = METHODS["sparsegpt"](value_bits=4)
    recipe = Recipe.from_mapping({"method": {"name": "sparsegpt", "value_bits": 4}})
    assert recipe.method == method
    assert method.value_bits == "4"
    with pytest.raises(RecipeError, match=r"value_bits: 5 does not fit; it takes one of auto, 32"):
        Recipe.from_mapping({"method": {"name": "sparsegpt", "value_bits": 5}})


@pytest.mark.parametrize("value", ["nan", "inf", float("nan")])
def test_numbers_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(RecipeError, match=r"p: .* does not fit"):
        parse_leaf(float, value, "p")


def test_types_are_described_in_words() -> None:
    assert describe(tuple[int, ...] | None) == "a list, each a whole number or none"


def test_walking_names_every_option_once_with_its_value() -> None:
    found = {".".join(option.path): option.value for option in walk_options(Picture(), SHAPES)}
    assert list(found) == [
        *("colour", "names", "out", "n_items", "shape", "shape.width"),
        *("shape.base", "shape.base.side", "shape.base.share", "shape.inside"),
    ]
    assert found["shape.base.side"] == 7


squares = st.builds(
    Square,
    side=st.integers(1, 10**6),
    share=st.floats(allow_nan=False, allow_infinity=False),
)
shapes = st.recursive(
    squares, lambda inner: st.builds(Frame, width=st.integers(), base=inner), max_leaves=3
)
pictures = st.builds(
    Picture,
    colour=st.sampled_from(Colour),
    names=st.lists(st.text()).map(tuple),
    n_items=st.none() | st.integers(),
    shape=shapes,
)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(pictures)
def test_building_undoes_dumping(made: Picture) -> None:
    assert picture(dump(made, SHAPES)) == made


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
    st.sampled_from(StatisticsMode),
    st.integers(0, 2**40),
)
def test_yaml_round_trips_whatever_is_in_it(
    tmp_path_factory: pytest.TempPathFactory, text: str, mode: StatisticsMode, seed: int
) -> None:
    file = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    recipe = Recipe(model=f"m{text}", statistics=mode, seed=seed, exclude=(text, "off", "1e-3"))
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(file).to_mapping() == recipe.to_mapping()


def test_the_default_recipe_is_eora_on_gptq() -> None:
    mapping = Recipe().to_mapping()
    assert mapping["method"]["name"] == "eora"
    assert mapping["method"]["base"]["name"] == "gptq"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_round_trips_through_a_mapping(name: str) -> None:
    recipe = Recipe(method=METHODS[name]())
    mapping = recipe.to_mapping()
    assert Recipe.from_mapping(mapping).to_mapping() == mapping
    assert Recipe.from_mapping(mapping).method == recipe.method.resolved()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_of_a_method_has_a_default_and_a_help_text(name: str) -> None:
    for option in walk_options(Recipe(method=METHODS[name]()), METHODS):
        assert option.field.metadata.get("help"), option.path


def test_words_that_yaml_takes_for_booleans_stay_words(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("statistics: off\npropagate: none\nmethod: {damping: 1e-2}\n")
    recipe = Recipe.from_yaml(file)
    assert recipe.statistics is StatisticsMode.OFF
    assert recipe.propagate is Propagate.NONE
    assert recipe.to_mapping()["method"]["damping"] == 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: {rnk: 3}", "recipe.method.rnk: no such option; there are adapter_bits,"),
        ("modle: x", "recipe.modle: no such option"),
        ("modle: x", "(did you mean model?)"),
        ("method: {base: {bits: four}}", "recipe.method.base.bits: 'four' does not fit"),
        ("method: {base: {bits: 7}}", "recipe.method.base.bits: 7 is not supported"),
        ("limit: 1.5", "recipe.limit: '1.5' does not fit; it takes a whole number"),
        ("samples: 0", "recipe.samples: 0 is too small; it takes 1 or more"),
        ("export: []", "recipe.export: empty; name at least one"),
        ("dtype: fp32", "recipe.dtype: 'fp32' does not fit; it takes one of auto, float32"),
        ("seed: 1\nseed: 2", "given more than once: seed"),
        ("- 1", "not a mapping such as `model: demo`"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_yaml_file_with_a_fault_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(file)
    assert message in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nix\.yaml: cannot be read as a recipe"):
        Recipe.from_yaml(tmp_path / "nix.yaml")


def test_python_gets_no_coercion() -> None:
    with pytest.raises(RecipeError, match=r"export: 'native' does not fit; it takes a list"):
        Recipe(export="native")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="dtype: 'float8' does not fit"):
        Recipe(dtype="float8")  # type: ignore[arg-type]


def test_an_enum_is_taken_by_its_value_too() -> None:
    assert Recipe(dtype="float32").dtype is Dtype.FLOAT32  # type: ignore[arg-type]


def test_the_folder_is_named_after_model_method_and_bits() -> None:
    assert Recipe().folder == Path("demo-eora-4bit")
    assert Recipe(model="org/Model-1B").folder == Path("Model-1B-eora-4bit")
    assert replace(Recipe(), out=Path("there")).folder == Path("there")
    assert default_folder("some/file.gguf", "svd", object()) == "file-svd"


def test_corrections_may_begin_with_the_users_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe.from_mapping({"out": "~/x", "include_path": "~/tasks"})
    assert (recipe.out, recipe.include_path) == (tmp_path / "x", tmp_path / "tasks")
    with pytest.raises(RecipeError, match=r"recipe\.out: '~nobody-of-that-name/x'"):
        Recipe.from_mapping({"out": "~nobody-of-that-name/x"})


def test_a_file_with_a_comma_in_its_name_is_one_text(tmp_path: Path) -> None:
    file = tmp_path / "a,b.txt"
    file.write_text("text")
    for text in (str(file), f"{file}:0.3"):
        assert Recipe.from_mapping({"calibration": text}).calibration == (text,)
    assert Recipe.from_mapping({"calibration": "a,b.txt"}).calibration == ("a", "b.txt")
    assert len(Recipe.from_mapping({"calibration": "x," * 3000 + "y"}).calibration) == 3001


@pytest.mark.parametrize("name", ["export", "tasks"])
def test_a_name_given_twice_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: native more than once"):
        Recipe.from_mapping({name: ["native", "dense", "native"]})


@pytest.mark.parametrize("device", ["nonsense", "meta", "mps", "cuda:", "cpu:0x"])
def test_a_device_of_no_known_kind_is_refused(device: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown device '{device}'; choose cpu"):
        Recipe(device=device)


def test_only_methods_that_are_no_corrections_are_offered_as_a_base() -> None:
    offered = {".".join(o.path): o.choices for o in walk_options(Recipe(), METHODS) if o.choices}
    assert set(offered["method"]) == set(METHODS)
    assert set(offered["method.base"]) == {
        name for name, kind in METHODS.items() if not issubclass(kind, Correction)
    }
    with pytest.raises(RecipeError, match="itself a correction"):
        Recipe.from_mapping({"method": {"name": "eora", "base": "eora"}})
