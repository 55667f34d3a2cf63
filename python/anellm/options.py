"""One dataclass as defaults, flags, config file and documentation: the metadata its fields carry, and its checks."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from anellm.device import DEVICES, FALLBACK, MAX_THREADS, MODES, NUMERICS, QOS, SOFTMAX, AneOptions, named_device
from anellm.errors import ConfigError

C = TypeVar("C")

_KEY = "anellm"
_SHOWN_LIMIT = 2**20  # limits from here on only keep numbers sane: help leaves them out
MANY_CHOICES = 5  # more choices than this stand in the help text instead of the flag's placeholder


@dataclass(frozen=True)
class Option:
    """What one field of a config dataclass means, besides its name, type and default.

    Attributes:
        help: one line for ``--help`` and the documentation.
        low: least value allowed (inclusive); None for no limit.
        high: greatest value allowed (inclusive); None for no limit.
        above: the value must be greater than this; None for no limit.
        below: the value must be less than this; None for no limit.
        choices: the values allowed; None for any.
        unit: unit of the value, e.g. "tokens".
        bare: the value of the flag when it is given with no value; None when it needs one.
        group: the heading in ``--help``.
        flag_only: a flag that no config file carries (what a run shows, not what it is).
        positional: given as a word of its own, with no flag before it: ``anellm bench step``. A field of type
            ``tuple[str, ...]`` takes any number of words, and is always positional.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    unit: str = ""
    bare: str | None = None
    group: str = "options"
    flag_only: bool = False
    positional: bool = False


def option(default: Any, text: str, **details: Any) -> Any:
    """Return a dataclass field with its documentation and limits; ``details`` are the attributes of Option."""
    return dataclasses.field(default=default, metadata={_KEY: Option(text, **details)})


@dataclass(frozen=True)
class OptionField:
    """One field of a config dataclass, with its type taken apart."""

    name: str
    kind: type
    optional: bool
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """Return the flag, e.g. ``--batch-size``; for a positional option its name, e.g. ``WHAT``."""
        name = self.name.replace("_", "-")
        return name.upper() if self.option.positional or self.kind is tuple else "--" + name


_fields: dict[type, tuple[OptionField, ...]] = {}  # what option_fields() found


def option_fields(cls: type) -> tuple[OptionField, ...]:
    """Return the option fields of a config dataclass, in order."""
    if cls not in _fields:
        _fields[cls] = _option_fields(cls)
    return _fields[cls]


def _option_fields(cls: type) -> tuple[OptionField, ...]:
    hints = typing.get_type_hints(cls)
    found = []
    for item in dataclasses.fields(cls):
        if _KEY not in item.metadata:
            continue
        hint = hints[item.name]
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [tuple if p == tuple[str, ...] else p for p in parts if p is not type(None)]
        if len(kinds) != 1 or kinds[0] not in (bool, int, float, str, tuple):
            raise TypeError(
                f"{cls.__name__}.{item.name}: an option is a bool, int, float, str or tuple of str, or one or None"
            )
        found.append(OptionField(item.name, kinds[0], len(parts) > 1, item.default, item.metadata[_KEY]))
    return tuple(found)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"``, or the list of known names when none is near."""
    names = list(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]}?"
    return f"; known: {', '.join(names)}" if names else ""


def check_keys(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse a key that is not known, naming the nearest one.

    Raises:
        ConfigError: naming ``what`` (a file or section), the key, and the nearest known key.
    """
    names = list(known)
    for key in keys:
        if key not in names:
            raise ConfigError(f"{what}: unknown key {key!r}{nearest(key, names)}")


def _kind_name(item: OptionField) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}
    return names[item.kind]


def convert(item: OptionField, value: Any, where: str) -> Any:
    """Return a value from a config file as the field's type, within its limits.

    Raises:
        ConfigError: naming where it stands, what was expected and what was found.
    """
    if value is None and item.optional:
        return None
    kind = item.kind
    if kind is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
            raise ConfigError(f"{where}: expected {_kind_name(item)}, found {value!r}")
        for word in value:
            check_limits(item.option, word, where)
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {_kind_name(item)}, found {value!r}")
    check_limits(item.option, value, where)
    return value


def convert_text(item: OptionField, text: Any, where: str) -> Any:
    """Return the text (or words) of a flag or environment variable as the field's type, within its limits.

    Raises:
        ConfigError: naming where it stands, what was expected and what was found.
    """
    if item.kind is tuple:
        return convert(item, text, where)
    value: Any = text
    if item.kind is not str:
        try:
            value = item.kind(text) if item.kind is not bool else {"true": True, "false": False}[text.lower()]
        except (ValueError, KeyError):
            raise ConfigError(f"{where}: expected {_kind_name(item)}, found {text!r}") from None
    check_limits(item.option, value, where)
    return value


def check_limits(opt: Option, value: Any, where: str) -> None:
    """Refuse a value outside an option's limits.

    Raises:
        ConfigError: naming where it stands, the limit and the value.
    """
    if opt.choices is not None and value not in opt.choices:
        hint = nearest(value, opt.choices) if len(opt.choices) > MANY_CHOICES else ""
        raise ConfigError(f"{where}: expected one of {', '.join(opt.choices)}, found {value!r}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, found {value}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{where}: expected text without NUL characters")
        return
    if opt.above is not None and not value > opt.above:
        raise ConfigError(f"{where}: expected more than {opt.above:g}, found {value}")
    if opt.below is not None and not value < opt.below:
        raise ConfigError(f"{where}: expected less than {opt.below:g}, found {value}")
    if opt.low is not None and value < opt.low:
        raise ConfigError(f"{where}: expected at least {opt.low}, found {value}")
    if opt.high is not None and value > opt.high:
        raise ConfigError(f"{where}: expected at most {opt.high}, found {value}")


def check_config(config: Any) -> None:
    """Check every option of a config object made in Python as strictly as one read from a file.

    Raises:
        ConfigError: naming the field, what was expected and what was found.
    """
    for item in option_fields(type(config)):
        convert(item, getattr(config, item.name), item.name)


def from_mapping(cls: type[C], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the checked fields of a config file (a flat table) for a config dataclass.

    Raises:
        ConfigError: on an unknown key (naming the nearest), a wrong type, or a value outside its limits.
    """
    fields = {item.name: item for item in option_fields(cls) if not item.option.flag_only}
    check_keys(values, fields, source)
    return {key: convert(fields[key], value, f"{source}: {key}") for key, value in values.items()}


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        text = repr(value)
        return text if any(c in text for c in ".en") else text + ".0"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(_toml_char(c) for c in value) + '"'
    raise TypeError(f"cannot write {type(value).__name__} as TOML")


def _toml_char(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if ord(char) < 0x20 or ord(char) == 0x7F:
        return f"\\u{ord(char):04x}"
    return char


def dump_toml(values: Mapping[str, Any]) -> str:
    """Return a flat table as TOML: one ``key = value`` a line; a value of None leaves its key out.

    Keys must be bare TOML keys (letters, digits, ``_`` and ``-``).
    """
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items() if value is not None)


def to_toml(config: Any) -> str:
    """Return a config object as the TOML file that gives it back; options without a value stand in a comment."""
    items = [item for item in option_fields(type(config)) if not item.option.flag_only]
    lines = []
    for item in items:
        value = getattr(config, item.name)
        lines.append(f"# {item.name} is not set\n" if value is None else dump_toml({item.name: value}))
    return "".join(lines)


def markdown_table(cls: type) -> str:
    """Return the flags of a config dataclass as a Markdown table, for the documentation."""
    lines = ["| flag and config key | default | meaning |", "|---|---|---|"]
    for item in option_fields(cls):
        default = "" if item.default is None else f"`{_toml_value(item.default)}`"
        lines.append(f"| `{item.flag}` | {default} | {describe(item)} |")
    return "\n".join(lines) + "\n"


def describe(item: OptionField) -> str:
    """Return an option's help with its unit, choices and limits."""
    opt = item.option
    notes = []
    if opt.choices is not None:
        notes.append(", ".join(opt.choices))
    if opt.unit:
        notes.append(f"in {opt.unit}")
    limits = (("> ", opt.above), (">= ", opt.low), ("< ", opt.below), ("<= ", opt.high))
    bounds = [f"{sign}{limit}" for sign, limit in limits if limit is not None and limit < _SHOWN_LIMIT]
    if bounds:
        notes.append(" and ".join(bounds))
    return opt.help + (f" ({'; '.join(notes)})" if notes else "")


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options that every verb with a model has; a verb's config dataclass inherits them."""

    device: str = option(
        "auto",
        "what computes; auto: in train and evaluate the Neural Engine once its self-test has passed, else the CPU; "
        "environment: ANELLM_DEVICE",
        choices=DEVICES,
        group="machine",
    )
    threads: int = option(
        0,
        "CPU threads; 0: all this process may use; environment: ANELLM_THREADS, else OMP_NUM_THREADS",
        low=0,
        high=MAX_THREADS,
        group="machine",
    )
    json: str | None = option(None, "write the result to this file as JSON", group="output", flag_only=True)


# Option -> the devices it is for.
_DEVICE_OPTIONS = {
    "chip": ("ane-sim",),
    "numerics": ("ane-sim",),
    "ane_scaling": ("ane", "ane-sim"),
    "ane_softmax": ("ane", "ane-sim"),
    "ane_fallback": ("ane", "ane-sim"),
    "ane_mode": ("ane", "ane-sim"),
    "ane_qos": ("ane",),
}


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(CommonOptions):
    """What a verb that computes on any device takes besides; what it does not give has AneOptions' default.

    Raises:
        ConfigError: when an option is given that the device has no use for.
    """

    chip: str | None = option(
        None, "chip that ane-sim simulates: m1, m2, m3, m3ultra, m4, m5, m6, or a .json file [m4]", group="machine"
    )
    numerics: str | None = option(
        None,
        "arithmetic of ane-sim; fast takes fp32 where it provably makes no difference [fast]",
        choices=NUMERICS,
        group="machine",
    )
    ane_scaling: str | None = option(
        None,
        "scale gradients by powers of two on ANE devices; off shows why [on]",
        choices=("on", "off"),
        group="machine",
    )
    ane_softmax: str | None = option(
        None, "where ANE devices have attention's softmax computed [ane]", choices=SOFTMAX, group="machine"
    )
    ane_fallback: str | None = option(
        None,
        "when an ANE device refuses a program: the CPU computes its part of the blocks, or an error [cpu]",
        choices=FALLBACK,
        group="machine",
    )
    ane_mode: str | None = option(
        None,
        "ANE devices take weights as inputs, or compile them into programs of each layer [dynamic]",
        choices=MODES,
        group="machine",
    )
    ane_qos: str | None = option(
        None,
        "quality of service of a real engine's calls; auto measures which is fastest; environment: ANELLM_ANE_QOS "
        "[auto]",
        choices=QOS,
        group="machine",
    )

    def __post_init__(self) -> None:
        device = named_device(self.device)
        for name, devices in _DEVICE_OPTIONS.items():
            if getattr(self, name) is not None and device not in devices:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: only for --device {' or '.join(devices)}, found --device {device}"
                )
        if self.chip == "":
            raise ConfigError("--chip: expected a name or a path, found nothing")
        if self.ane_mode == "static" and self.ane_softmax == "cpu":
            raise ConfigError("--ane-softmax: expected ane with --ane-mode static, found cpu")

    def _given(self) -> dict[str, Any]:
        """Return the fields of AneOptions that are given."""
        scaling = None if self.ane_scaling is None else self.ane_scaling == "on"
        fields = {
            "chip": self.chip,
            "numerics": self.numerics,
            "scaling": scaling,
            "softmax": self.ane_softmax,
            "fallback": self.ane_fallback,
            "mode": self.ane_mode,
            "qos": self.ane_qos,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def ane_options(self) -> AneOptions | None:
        """Return the options as an ANE device takes them; None for other devices."""
        return None if named_device(self.device) == "cpu" else AneOptions(**self._given())

    def is_met_by(self, device: str, options: AneOptions | None) -> bool:
        """Return whether a model computes as is asked for here.

        Args:
            device: what it computes on.
            options: how, for ANE devices.
        """
        given = self._given()
        if self.device == "auto" and not given:
            return True
        return named_device(self.device) == device and all(getattr(options, k, None) == v for k, v in given.items())

    def on_device(self, device: str, options: AneOptions) -> Self:
        """Return a copy that says what an ANE device is and how it computes."""
        values: dict[str, Any] = {
            "chip": options.chip,
            "numerics": options.numerics,
            "ane_scaling": "on" if options.scaling else "off",
            "ane_softmax": options.softmax,
            "ane_fallback": options.fallback,
            "ane_mode": options.mode,
            "ane_qos": options.qos,
        }
        values |= dict.fromkeys(unused_device_options(device))
        return dataclasses.replace(self, device=device, **values)


def unused_device_options(device: str) -> set[str]:
    """Return the names of the options of DeviceOptions that a device has no use for."""
    return {name for name, devices in _DEVICE_OPTIONS.items() if named_device(device) not in devices}
