"""Recipes: published training runs by name, as defaults for the options of ``train``.

A recipe is a file of ``data/recipes``: ``about``, a line that says what it is; ``without_model`` and ``without_data``,
lines that a run prints when it starts with no --model or no --data; and a table ``options`` with keys of TrainConfig.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from anellm.errors import ConfigError

# Of each pair, what is given puts away what the recipe has for the other.
_PUTS_AWAY = {"epochs": ("steps",), "model": ("preset", "compact_vocab")}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, as its file has it.

    Attributes:
        name: its name, for --recipe.
        about: what it is.
        options: values by name of TrainConfig's options.
        without_model: what a run says that starts from random weights; "" says nothing.
        without_data: what a run says that trains on the text that comes along; "" says nothing.
    """

    name: str
    about: str
    options: Mapping[str, Any]
    without_model: str = ""
    without_data: str = ""


@functools.cache
def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes, sorted."""
    folder = resources.files("anellm").joinpath("data/recipes")
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


@functools.cache
def load_recipe(name: str) -> Recipe:
    """Return a recipe.

    Raises:
        ConfigError: when there is none of this name; lists those that there are.
    """
    if name not in recipe_names():
        raise ConfigError(f"--recipe: expected one of {', '.join(recipe_names())}, found {name!r}")
    text = resources.files("anellm").joinpath(f"data/recipes/{name}.toml").read_text(encoding="utf-8")
    return Recipe(name=name, **tomllib.loads(text))


def options_of_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a recipe gives where ``given`` names one as ``recipe``: all that are not given.

    Args:
        given: options by name.

    Raises:
        ConfigError: when there is no such recipe.
    """
    name = given.get("recipe")
    if name is None:
        return {}
    drop = {other for key, others in _PUTS_AWAY.items() if given.get(key) is not None for other in others}
    return {key: value for key, value in load_recipe(name).options.items() if key not in given and key not in drop}


def notes(name: str, model: str | None, data: str | None) -> list[str]:
    """Return what a run by a recipe says at its start.

    Args:
        name: of the recipe.
        model: --model of the run.
        data: --data of the run.
    """
    recipe = load_recipe(name)
    missing = [recipe.without_model if model is None else "", recipe.without_data if data is None else ""]
    return [recipe.about, *filter(None, missing)]
