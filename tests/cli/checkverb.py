"""The verb ``check`` as its tests call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anellm import check


def run_check(*argv: Any, code: int = 0) -> dict[str, Any]:
    """Run it, expect its exit code, and return what --json wrote."""
    assert check.main([*map(str, argv), "--json", "o.json"]) == code
    values: dict[str, Any] = json.loads(Path("o.json").read_text())
    return values


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: Any) -> str:
    """Run it, expect an error of one line and nothing else, and return that."""
    assert check.main(list(map(str, argv))) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("anellm check: error: ")
    assert captured.err.count("\n") == 1
    return captured.err
