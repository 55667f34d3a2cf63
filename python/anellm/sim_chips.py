"""Chips that the simulator knows: JSON files of numbers, each with where it comes from (docs/simulator.md)."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from anellm._ffi import ffi
from anellm.errors import ConfigError, DataError
from anellm.options import nearest
from anellm.saferead import parse_json, read_regular

SCHEMA = 1
REPORT_KEY = "selftest"  # what anellm info --ane-selftest found; no part of the chip
_LIMIT_BYTES = 1 << 18
_NAME_BYTES = 15
_TEXT_KEYS = ("name", "architecture", "description")
_LARGEST = 2**62


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: what ``--chip`` calls it.
        architecture: the compiler's name of it, such as ``h16g``.
        description: which products it stands for.
        constants: field of ``anellm_ane_profile`` -> number.
        sources: field -> where the number comes from.
    """

    name: str
    architecture: str
    description: str
    constants: dict[str, float]
    sources: dict[str, str]

    def c_profile(self) -> Any:
        """Return the chip as a C struct."""
        profile = ffi.new("anellm_ane_profile *")
        profile.name = self.name.encode()
        profile.architecture = self.architecture.encode()
        for key, value in self.constants.items():
            setattr(profile, key, value)
        return profile


@functools.cache
def _fields() -> dict[str, bool]:
    """Return the number fields of a profile: name -> whether it is a whole number."""
    fields = ffi.typeof("anellm_ane_profile").fields
    return {name: field.type.cname == "int64_t" for name, field in fields if field.type.kind == "primitive"}


def chip_names() -> list[str]:
    """Return the names of the chips that come along."""
    folder = resources.files("anellm") / "data" / "chips"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json"))


def _number(key: str, entry: Any, source: str) -> tuple[float, str]:
    where = f"{source}: constants.{key}"
    if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
        raise DataError(f'{where}: expected {{"value": .., "source": ".."}}, found {entry!r:.80}')
    value, found = entry["value"], entry["source"]
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{where}.source: expected where the number comes from, found {found!r:.80}")
    whole = _fields()[key]
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or abs(value) > _LARGEST:
        kind = "a whole number" if whole else "a finite number"
        raise DataError(f"{where}.value: expected {kind}, found {value!r:.80}")
    return value, found


def chip_values(chip: Chip) -> dict[str, Any]:
    """Return what a chip's JSON file holds."""
    numbers = {key: {"value": value, "source": chip.sources[key]} for key, value in chip.constants.items()}
    texts = {key: getattr(chip, key) for key in _TEXT_KEYS}
    return {"schema": SCHEMA, **texts, "constants": numbers}


def nearest_chip(architecture: str, default: str) -> str:
    """Return the name of the chip that comes along whose compiler's name is the same, or the next generation's.

    Args:
        architecture: such as ``h16g``: the number is the generation, what follows a kind of product.
        default: what to return where it says no generation.
    """
    known = {name: load_chip(name).architecture for name in chip_names()}
    same = [name for name, its in known.items() if its == architecture]
    found = re.fullmatch(r"[hH]([0-9]{1,3})[a-z]*", architecture)
    if same or found is None:
        return same[0] if same else default
    generation = int(found[1])
    # Of two chips of a generation (m3, m3ultra) the first by name.
    return min(known, key=lambda name: (abs(int(known[name][1:3]) - generation), name))


def parse_chip(data: bytes, source: str) -> Chip:
    """Return the chip that a JSON file describes.

    Args:
        data: the content of the file.
        source: the name of the file, for messages.

    Raises:
        DataError: naming the file and the key: no JSON, another schema, a key missing, unknown or of a wrong type.
    """
    values = parse_json(data, source, DataError)
    known = {"schema", *_TEXT_KEYS, "constants", REPORT_KEY}
    for key in values:
        if key not in known:
            raise DataError(f"{source}: unknown key {key!r}{nearest(key, known)}")
    if values.get("schema") != SCHEMA:
        raise DataError(f"{source}: schema: expected {SCHEMA}, found {values.get('schema')!r}")
    texts = []
    for key in _TEXT_KEYS:
        text = values.get(key)
        if not isinstance(text, str) or not text or (key != "description" and len(text.encode()) > _NAME_BYTES):
            raise DataError(f"{source}: {key}: expected a text (name and architecture: up to {_NAME_BYTES} bytes)")
        texts.append(text)
    constants = values.get("constants")
    if not isinstance(constants, dict):
        raise DataError(f"{source}: constants: expected an object, found {type(constants).__name__}")
    for key in constants:
        if key not in _fields():
            raise DataError(f"{source}: constants: unknown key {key!r}{nearest(key, _fields())}")
    missing = [key for key in _fields() if key not in constants]
    if missing:
        raise DataError(f"{source}: constants: {', '.join(missing)} missing")
    numbers = {key: _number(key, entry, source) for key, entry in constants.items()}
    name, architecture, description = texts
    found = {key: number for key, (number, _) in numbers.items()}
    return Chip(name, architecture, description, found, {key: where for key, (_, where) in numbers.items()})


def load_chip(name: str) -> Chip:
    """Return a chip by name, or from a JSON file if the name ends in ``.json``.

    Raises:
        ConfigError: when there is no chip of that name; names the nearest.
        DataError: when the file does not describe one.
    """
    if name.endswith(".json"):
        return parse_chip(read_regular(Path(name), DataError, _LIMIT_BYTES, follow=True), name)
    if name not in chip_names():
        raise ConfigError(f"chip: unknown name {name!r}{nearest(name, chip_names())}")
    data = (resources.files("anellm") / "data" / "chips" / f"{name}.json").read_bytes()
    return parse_chip(data, f"{name}.json")
