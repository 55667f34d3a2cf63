"""The command ``anellm`` and ``python -m anellm``: find the verb and run it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from anellm.cli import VERBS, guarded, set_whole_process
from anellm.errors import ConfigError
from anellm.options import nearest


def usage() -> str:
    """Return the list of verbs with one line each."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in VERBS.items()]
    return "\n".join(["usage: anellm VERB [options]", "", *lines, "", "anellm VERB --help lists a verb's options.", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code.

    Args:
        argv: the verb and its arguments; None takes them from the command line.
    """
    if argv is None:
        set_whole_process()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    return guarded("anellm", lambda: _dispatch(words[0], words[1:]))


def _dispatch(verb: str, rest: Sequence[str]) -> int:
    if verb in ("-V", "--version"):
        from anellm import __version__

        print(f"anellm {__version__}")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
    main_of_verb = importlib.import_module(VERBS[verb][0]).main
    return int(main_of_verb(rest))


if __name__ == "__main__":
    raise SystemExit(main())
