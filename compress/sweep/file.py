"""Sweeps as YAML files: a base recipe, entries that change it, and axes that are multiplied out.

    recipe: {model: demo, samples: 64, tasks: [offline_piqa], limit: 100}
    points:
      - method: {name: rtn, bits: 4}
      - method: {name: eora, base: gptq}
        axes: {method.base.bits: [3, 4], rank: [32, 64]}

An entry is a partial recipe: what it lacks is the base's; a method of another name takes none of the base's options.
An axis is named as a flag is, by the full path of its option or any unique suffix of it. Axes beside `points` hold for
every entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.config.flags import Flags, matching, with_value
from compress.config.options import closest
from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.families.base import METHODS
from compress.families.budget import parse_bytes
from compress.families.correction import Correction
from compress.families.renamed import option_now
from compress.sweep.names import check_name, point_name

KEYS = ("recipe", "points", "axes", "budgets")
_OWN = ("name", "axes")
"""What an entry holds besides options."""
_SIZES = ("keep", "budget", "rank", "atoms")
"""Options that say how large the result of a method with a budget is."""

Place = tuple[str, ...]
Settings = dict[Place, object]
"""What tells a point from the base recipe, by path."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    name: str
    """Of its folder, too."""
    where: str
    """Its place in the file: `points[2]`."""
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A point before it has a folder."""

    where: str
    prefix: str | None
    """A name that the entry gives."""
    settings: Settings
    values: Mapping[str, Any]
    recipe: Recipe


def points_of(values: Mapping[str, Any], out: Path) -> tuple[Point, ...]:
    """The points of a sweep, in the order of the file; each recipe's `out` is a folder in `out`.

    `values` is the file's mapping; flags are in its `recipe` already.

    Raises:
        RecipeError: an unknown key, a recipe that cannot be (naming the entry), two points that are the same job, two
            with one name, or an amount of bytes that is none.
    """
    _refuse_unknown(values)
    if not {"points", "axes", "budgets"} & set(values):
        raise RecipeError("points: there are none; give some, such as `- method: rtn`, or axes")
    entries = values.get("points", [{}])
    if not isinstance(entries, list) or not entries:
        raise RecipeError("points: not a list of partial recipes, such as `- method: rtn`")
    everywhere = _axes(values.get("axes", {}), "axes")
    budgets = budgets_of(values)
    drafts = [
        draft
        for k, entry in enumerate(entries)
        for draft in _drafts(values.get("recipe", {}), entry, everywhere, f"points[{k}]")
    ]
    return _named(_with_budgets(drafts, budgets), out)


def budgets_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The sizes that a sweep is to be judged at: `budgets: [120MB, 80MB]`. Raises RecipeError."""
    given = values.get("budgets", [])
    texts = given.split(",") if isinstance(given, str) else given
    if not isinstance(texts, list):
        raise RecipeError(f"budgets: {given!r} is no list of sizes such as [120MB, 80MB]")
    if "budgets" in values and not texts:
        raise RecipeError("budgets: empty; give sizes such as [120MB, 80MB], or leave it out")
    return sizes_of(texts, "budgets")


def sizes_of(texts: Sequence[object], option: str) -> tuple[str, ...]:
    """Amounts of bytes as written. Raises RecipeError naming the option for one that is none, or there twice."""
    sizes = tuple(str(text).strip() for text in texts)
    found: dict[int, str] = {}
    for size in sizes:
        n_bytes = parse_bytes(size, option)
        if n_bytes in found:
            raise RecipeError(
                f"{option}: {found[n_bytes]} and {size} are one size; name each size once"
            )
        found[n_bytes] = size
    return sizes


def set_by_points(values: Mapping[str, Any]) -> dict[str, str]:
    """Top-level options that entries and axes set, each with where it does."""
    places = [("", values.get("axes", {}))]
    entries = values.get("points")
    for k, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, Mapping):
            options = {key: 0 for key in entry if key not in _OWN}
            places += [(f"points[{k}].", options), (f"points[{k}].", entry.get("axes", {}))]
    return {
        str(key).partition(".")[0]: f"{where}{key}"
        for where, found in places
        if isinstance(found, Mapping)
        for key in found
    }


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in KEYS:
            hint = closest(str(key), KEYS)
            raise RecipeError(
                f"{key}: no such part of a sweep; there are {', '.join(KEYS)}{hint}; "
                "options that all points have go under recipe"
            )


def _axes(found: object, where: str) -> Mapping[str, list[object]]:
    if not isinstance(found, Mapping):
        raise RecipeError(
            f"{where}: {found!r} is no mapping of options to lists, such as bits: [3, 4]"
        )
    for key, values in found.items():
        if not isinstance(key, str):
            raise RecipeError(f"{where}.{key}: {key!r} is no option's name")
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{where}.{key}: {values!r} is no list of values, such as [3, 4]")
    return found


def _drafts(
    base: object, entry: object, everywhere: Mapping[str, list[object]], where: str
) -> Iterator[_Draft]:
    """The points of one entry: every combination of its axes."""
    if not isinstance(base, Mapping):
        raise RecipeError(f"recipe: {base!r} is not a mapping of options such as `model: demo`")
    entry = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where}: {entry!r} is neither a partial recipe nor a method's name")
    prefix = entry.get("name")
    if prefix is not None:
        check_name(str(prefix), f"{where}.name")
    axes = {**everywhere, **_axes(entry.get("axes", {}), f"{where}.axes")}
    partial = {key: value for key, value in entry.items() if key not in _OWN}
    if "out" in base or "out" in partial:
        place = "recipe" if "out" in base else where
        raise RecipeError(f"{place}.out: each point has a folder of its own; give --out instead")
    if base.get("publish_as") not in (None, "none"):
        raise RecipeError(
            "recipe.publish_as: each point is another model; give a point its own, or name the repository to compress "
            "publish"
        )
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        try:
            mapping, settings = _with_axes(merged(base, partial), chosen)
            recipe = Recipe.from_mapping(mapping)
        except RecipeError as error:
            at = ", ".join(f"{key}={value}" for key, value in chosen.items())
            raise RecipeError(f"{where}{f' with {at}' if at else ''}: {error}") from error
        own = {} if prefix is not None else dict(_leaves(partial))
        yield _Draft(
            where=where,
            prefix=None if prefix is None else str(prefix),
            settings={**own, **settings},
            values=mapping,
            recipe=recipe,
        )


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says; a method of another name takes none of the options of the one before."""
    result = dict(base)
    for key, value in over.items():
        before, after = result.get(key), value
        if isinstance(before, Mapping) or isinstance(after, Mapping):
            before, after = _spelled(before), _spelled(after)
        result[key] = value
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            same = "name" not in after or after["name"] == before.get("name")
            result[key] = merged(before, after) if same else value
    return result


def _spelled(value: Any) -> Any:
    """A method that is given by its name alone, as a mapping."""
    return {"name": value} if isinstance(value, str) else value


def _with_axes(
    mapping: Mapping[str, Any], chosen: Mapping[str, object]
) -> tuple[dict[str, Any], Settings]:
    """The mapping with one value of every axis, and these by path. Choices go first: they bring options."""
    values, waiting = dict(mapping), dict(chosen)
    settings: Settings = {}
    flags = Flags(Recipe, METHODS)
    while waiting:
        options = flags.options(values)
        found = {key: matching(f"--{key}", options) for key in waiting}
        choice = next((key for key, at in found.items() if len(at) == 1 and at[0].choices), None)
        key = next(iter(waiting)) if choice is None else choice
        at = found[key]
        if not at:
            if now := option_now(key):
                raise RecipeError(f"axes.{key}: the option is {now} now")
            known = sorted({option.path[-1] for option in options})
            raise RecipeError(f"axes.{key}: no such option{closest(key, known)}")
        if len(at) > 1:
            paths = " or ".join(".".join(option.path) for option in at)
            raise RecipeError(f"axes.{key}: could be {paths}; write one of these")
        path, value = at[0].path, waiting.pop(key)
        if path[0] == "out":
            raise RecipeError("axes.out: each point has a folder of its own; give --out instead")
        values = merged(values, with_value({}, path, value))
        settings |= dict(_leaves(with_value({}, path, value)))
    return values, settings


def _leaves(values: Mapping[str, Any], path: Place = ()) -> Iterator[tuple[Place, object]]:
    """What a partial recipe sets, by path; the name of a choice stands at the choice's own path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            if "name" in value:
                yield (*path, key), value["name"]
            inner = {k: v for k, v in value.items() if k != "name"}
            yield from _leaves(inner, (*path, key))
        else:
            yield (*path, key), value


def _with_budgets(drafts: Sequence[_Draft], budgets: Sequence[str]) -> list[_Draft]:
    """The points, and for methods that can be asked for a checkpoint's size one at each of these sizes.

    A point that says nothing of its size is only there at these sizes. A correction's budget is its own.
    """
    found: list[_Draft] = []
    for draft in drafts:
        method = draft.recipe.method
        can = hasattr(method, "budget") and not isinstance(method, Correction)
        given = _spelled(draft.values.get("method", {}))
        if not (can and budgets) or any(name in given for name in _SIZES):
            found.append(draft)
        if can:
            made = [_at_budget(draft, budget) for budget in budgets]
            found += [one for one in made if one.recipe not in [it.recipe for it in found]]
    return found


def _at_budget(draft: _Draft, budget: str) -> _Draft:
    """The same for a size of the whole checkpoint."""
    given = _spelled(draft.values["method"])
    method = {key: value for key, value in given.items() if key not in _SIZES}
    values = {**draft.values, "method": {**method, "budget": budget}}
    sizes = {("method", name) for name in _SIZES}
    settings = {path: value for path, value in draft.settings.items() if path not in sizes}
    try:
        recipe = Recipe.from_mapping(values)
    except RecipeError as error:
        raise RecipeError(f"{draft.where} with budget={budget}: {error}") from error
    budgeted = {**settings, ("method", "budget"): budget}
    return replace(draft, settings=budgeted, values=values, recipe=recipe)


def _named(drafts: Sequence[_Draft], out: Path) -> tuple[Point, ...]:
    points: list[Point] = []
    for draft in drafts:
        name = point_name(draft.recipe, draft.settings, draft.prefix)
        point = Point(name=name, where=draft.where, recipe=replace(draft.recipe, out=out / name))
        for other in points:
            if replace(other.recipe, out=None) == draft.recipe:
                raise RecipeError(
                    f"{point.where}: {name} is the same job as {other.name} of {other.where}; take one away"
                )
            if other.name.lower() == name.lower():
                raise RecipeError(
                    f"{point.where}: {name} is the name of another point of {other.where}; give the entry a name"
                )
        points.append(point)
    return tuple(points)
