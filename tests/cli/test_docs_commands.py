"""The commands and flags that docs/coming-from.md and the README name are there."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest

from anellm.cli import VERBS, build_parser
from anellm.options import option_fields

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "docs/coming-from.md")
COMMANDS = [
    (file, verb, words)
    for file in FILES
    for verb, words in re.findall(
        r"^(?:\.venv/bin/)?anellm ([a-z]+)([^#\n]*)",
        (ROOT / file).read_text(encoding="utf-8").replace("`anellm ", "\nanellm ").replace("`", "\n"),
        re.MULTILINE,
    )
]


@functools.cache
def flags(verb: str) -> set[str]:
    """Return the flags of a verb."""
    config = importlib.import_module(VERBS[verb][0]).VERB.config
    return {text for action in build_parser(config, verb, "")._actions for text in action.option_strings}


@pytest.mark.parametrize("verb", VERBS)
def test_commands_have_the_flags_that_are_named(verb: str) -> None:
    known = flags(verb)
    for file, name, words in COMMANDS:
        if name == verb:
            unknown = set(re.findall(r"--[a-z0-9-]+", words)) - known
            assert not unknown, (file, words)


def test_all_commands_are_verbs() -> None:
    assert {name for _, name, _ in COMMANDS} <= set(VERBS)
    for file in FILES:
        assert sum(1 for where, _, _ in COMMANDS if where == file) > 12


def test_flags_in_our_columns_are_flags() -> None:
    known = set().union(*map(flags, VERBS))
    rows = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8").splitlines()
    ours = [row.split("|")[2] for row in rows if row.startswith("|")]
    named = {flag for cell in ours for flag in re.findall(r"`(--[a-z0-9-]+)", cell)}
    assert len(named) > 40
    assert named - known == set()


def test_values_of_choices_are_choices() -> None:
    text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in FILES)
    config = importlib.import_module("anellm.train").VERB.config
    for item in option_fields(config):
        if item.option.choices is not None and item.name in ("recipe", "preset", "ane_mode", "token_dtype"):
            found = set(re.findall(rf"{item.flag} ([a-z0-9][a-z0-9.-]*)", text))
            assert found
            assert found <= set(item.option.choices), item.flag
