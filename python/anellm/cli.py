"""What every verb shares: flags and config file from one dataclass, one-line errors, exit codes, ``--json``.

A verb is a module with::

    @dataclass(frozen=True, kw_only=True)
    class EvaluateConfig(CommonOptions):              # anellm.options: adds --device, --threads, --json
        model: str = option("", "model to evaluate")  # every field with option() is a flag and a config key

    def run(config: EvaluateConfig) -> Result:        # raise an AnellmError: its exit_code becomes the exit code
        threads = set_threads(config.threads)
        return Result({"loss": 1.3})                  # what --json writes

    VERB = Verb("evaluate", "measure a model's loss on text", EvaluateConfig, run)
    main = VERB.main                                  # main(argv=None) -> exit code

    if __name__ == "__main__":
        raise SystemExit(main())

and a line in ``VERBS`` below. Values come from, strongest first: flags, ``--config FILE.toml``, environment, defaults.
Exit codes: 0 done, 1 a bug or another failure, 2 usage, 3 diverged, 4 bad data or model file, 5 device or memory,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from anellm.device import environment_threads
from anellm.errors import AnellmError, ConfigError, FallbackWarning
from anellm.options import MANY_CHOICES, OptionField, convert_text, describe, from_mapping, nearest, option_fields
from anellm.saferead import read_toml

C = TypeVar("C")
Base = Callable[[Mapping[str, Any]], Mapping[str, Any]]

EXIT_INTERRUPTED = 130
_EXIT_FILE = 4
_whole_process = False
_EXIT_MEMORY = 5
_EXIT_BROKEN_PIPE = 141
_LONGEST_MESSAGE = 2000  # characters: what a file holds may be longer

# Verb -> (module, one line). `anellm VERB` imports the module and calls its main().
VERBS: dict[str, tuple[str, str]] = {
    "train": ("anellm.train", "train a model on text; with no arguments, a small one on the text that comes along"),
    "sweep": ("anellm.sweep", "train with several learning rates, one after another, and draw their validation losses"),
    "evaluate": ("anellm.evaluate", "measure a model's loss and perplexity on text"),
    "generate": ("anellm.generate", "write text with a model"),
    "convert": ("anellm.convert", "write a model in another format, read it back and compare"),
    "check": ("anellm.check", "compare a GPT-2 with llm.c's debug state, or each layer of a device with another's"),
    "bench": ("anellm.bench", "measure speed and memory, and compare with what else is installed"),
    "prepare": ("anellm.prepare", "turn text into shards of tokens, with any tokenizer or one that is learnt"),
    "sim": ("anellm.sim", "run and check programs for the Neural Engine on a simulated one"),
    "mil": ("anellm.mil", "write the programs that a model runs on a Neural Engine"),
    "plan": ("anellm.plan", "forecast training with weights in the programs: groups, restarts, memory, time"),
    "info": ("anellm.info", "show the device, the CPU variant and the versions in use"),
}


def is_whole_process() -> bool:
    """Return whether this process is there for one verb, whose words are its command line: exec() can repeat it."""
    return _whole_process


def set_whole_process(*, whole: bool = True) -> None:
    """Say whether it is."""
    global _whole_process  # noqa: PLW0603  a process has one command line
    _whole_process = whole


@dataclass(frozen=True)
class Result:
    """What a verb gives back: the values that ``--json`` writes, and the exit code."""

    values: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser(cls: type, name: str, summary: str) -> argparse.ArgumentParser:
    """Return the argument parser of a config dataclass; values stay text until convert_text() checks them."""
    parser = _Parser(prog=f"anellm {name}", description=summary, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in option_fields(cls):
        opt = item.option
        group = groups.get(opt.group) or groups.setdefault(opt.group, parser.add_argument_group(opt.group))
        text = describe(item).replace("%", "%%")
        if item.kind is bool:
            group.add_argument(item.flag, dest=item.name, action=argparse.BooleanOptionalAction, help=text)
            continue
        if item.default is not None and item.default not in ("", ()):
            text += f" [{item.default}]"
        if item.kind is tuple:
            group.add_argument(item.name, nargs="*", metavar=item.flag, help=text)
            continue
        metavar = {int: "N", float: "X", str: "TEXT"}[item.kind]
        if opt.choices is not None and len(opt.choices) <= MANY_CHOICES:
            metavar = "|".join(opt.choices)
        if opt.positional:
            group.add_argument(item.name, nargs="?", metavar=item.flag, help=text)
        elif opt.bare is not None:
            group.add_argument(item.flag, dest=item.name, nargs="?", const=opt.bare, metavar=metavar, help=text)
        else:
            group.add_argument(item.flag, dest=item.name, metavar=metavar, help=text)
    parser.add_argument("--config", metavar="FILE.toml", help="read options from this file; flags override it")
    return parser


def _from_environment(item: OptionField) -> Any:
    """Return an option's value from the environment, or None."""
    if item.name == "threads":
        return environment_threads()
    text = os.environ.get("ANELLM_DEVICE", "").strip() if item.name == "device" else ""
    return convert_text(item, text, "environment variable ANELLM_DEVICE") if text else None


def read_config_file(cls: type, path: str) -> dict[str, Any]:
    """Return the checked values of a TOML config file.

    Raises:
        ConfigError: naming the file and the key, on unreadable TOML, an unknown key or an impossible value.
    """
    try:
        data = read_toml(Path(path), ConfigError, follow=True)
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from None
    return from_mapping(cls, data, path)


def parse(cls: type[C], argv: Sequence[str], name: str = "", summary: str = "", base: Base | None = None) -> C:
    """Return a config object from flags, config file, environment and defaults.

    Args:
        cls: the config dataclass.
        argv: the arguments after the verb.
        name: the verb, for messages.
        summary: one line about the verb, for ``--help``.
        base: given the values of flags and config file, returns weaker ones that still beat the environment.

    Raises:
        ConfigError: on an unknown flag or key (naming the nearest) or an impossible value.
        SystemExit: after printing ``--help``.
    """
    parser = build_parser(cls, name, summary)
    # "Intermixed" takes words before, between and after flags; a list of none is as good as not given.
    spaces, extra = parser.parse_known_intermixed_args(list(argv))
    flags = {key: value for key, value in vars(spaces).items() if value != []}
    if extra:
        _refuse_extra(parser, extra[0])
    fields = {item.name: item for item in option_fields(cls)}
    config_path = flags.pop("config", None)
    given = {} if config_path is None else read_config_file(cls, config_path)
    for key, value in flags.items():
        item = fields[key]
        given[key] = value if isinstance(value, bool) else convert_text(item, value, item.flag)
    weaker = {name: value for name, item in fields.items() if (value := _from_environment(item)) is not None}
    if base is not None:
        weaker.update(base(given))
    return cls(**{**weaker, **given})


def _refuse_extra(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    flag = word.split("=", maxsplit=1)[0]
    if not flag.startswith("-"):
        raise ConfigError(f"unexpected argument {word!r}")
    known = [text for action in parser._actions for text in action.option_strings if text.startswith("--")]
    raise ConfigError(f"unknown flag {flag}{nearest(flag.replace('_', '-'), known)}")


@dataclass(frozen=True)
class Verb(Generic[C]):
    """One verb: its name, its line of help, its config dataclass, and the function that does it."""

    name: str
    summary: str
    config: type[C]
    run: Callable[[C], Result]
    base: Base | None = None

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the verb and return its exit code; errors become one line on stderr (ANELLM_DEBUG=1: a traceback).

        Args:
            argv: the arguments after the verb; None takes them from the command line.
        """
        if argv is None:
            set_whole_process()
        return guarded(f"anellm {self.name}", lambda: self._main(sys.argv[1:] if argv is None else argv))

    def _main(self, argv: Sequence[str]) -> int:
        config = parse(self.config, argv, self.name, self.summary, self.base)
        result = self.run(config)
        path = getattr(config, "json", None)
        if path:
            write_json(path, result.values)
        return result.exit_code


def flag_tables() -> str:
    """Return the options of every verb as Markdown, for the documentation."""
    import importlib

    from anellm.options import markdown_table

    parts = []
    for name, (module, summary) in VERBS.items():
        verb = importlib.import_module(module).VERB
        parts.append(f"## anellm {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n{markdown_table(verb.config)}")
    return "\n".join(parts)


def write_json(path: str, values: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, atomically; inf and NaN become null."""
    from anellm import safeio

    safeio.write_bytes(Path(path), safeio.json_bytes(values))


@contextlib.contextmanager
def _plain_warnings(prog: str) -> Iterator[None]:
    """Let a fallback be one line on stderr that every user can read; other warnings stay as they are."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, FallbackWarning):
                print(f"{prog}: warning: {message}", file=sys.stderr, flush=True)
            else:
                before(message, category, *where, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", FallbackWarning)
        yield


def guarded(prog: str, body: Callable[[], int]) -> int:
    """Call ``body`` and return its exit code, or turn what it raises into one line on stderr and an exit code."""
    with _plain_warnings(prog):
        return _guarded(prog, body)


def _guarded(prog: str, body: Callable[[], int]) -> int:
    try:
        code = body()
        sys.stdout.flush()
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, "interrupted"
    except BrokenPipeError:
        # The reader went away (`| head`): leave quietly, and keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except Exception as error:
        if os.environ.get("ANELLM_DEBUG") == "1":
            raise
        code, message = _describe_error(error)
        message = message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "..."
    else:
        return code
    print(f"{prog}: error: {message}" if code != EXIT_INTERRUPTED else f"{prog}: {message}", file=sys.stderr)
    return code


def _describe_error(error: Exception) -> tuple[int, str]:
    """Return the exit code and the line for an exception."""
    if isinstance(error, AnellmError):
        return error.exit_code, " ".join(str(error).split())
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _EXIT_FILE, f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return _EXIT_MEMORY, "out of memory"
    line = " ".join(str(error).split())
    return 1, f"unexpected {type(error).__name__}: {line} (ANELLM_DEBUG=1 shows where; please report it)"
