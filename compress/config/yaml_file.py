"""Recipes as YAML files, without the surprises of YAML 1.1."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from compress.errors import RecipeError


def read_yaml(path: Path) -> Mapping[str, object]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Booleans and fractions stay texts, to be read by the type of their option: to YAML 1.1 `off` is
    a boolean and 1e-2 a text. A key given twice is refused.

    Raises:
        RecipeError: no such file, not UTF-8 YAML, or not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{path}: holds {type(values).__name__}, not a mapping such as `model: demo`"
        )
    return values


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's surprises: `off` and 1e-2 stay texts."""

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,  # noqa: FBT001, FBT002 (yaml's signature)
    ) -> dict[Hashable, Any]:
        """A mapping whose keys differ; YAML would keep the last of two in silence."""
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"given more than once: {', '.join(twice)}", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, test) for tag, test in tests if not tag.endswith((":bool", ":float"))]
    for letter, tests in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
