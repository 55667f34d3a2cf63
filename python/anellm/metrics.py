"""metrics.jsonl: one JSON object a line, appended as training goes; docs/metrics.md describes each kind."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anellm import safeio, saferead
from anellm.errors import DataError

NAME = "metrics.jsonl"
_MIB = 1 << 20
_MAX_LINE = 4 << 20  # a longer one is no record: what it takes to read a file does not grow with the file
_MAX_STEP = 2**53


def rss_mib() -> float:
    """Return the memory that this process holds now, in MiB (its peak where the system does not tell)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / _MIB if sys.platform == "darwin" else peak / 1024


class MetricsWriter:
    """Append records to a run's metrics.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        """Open the file for appending."""
        self._file = safeio.AppendFile(run_dir / NAME)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; inf and NaN become null."""
        self._file.write(safeio.json_bytes(record, indent=None))

    def sync(self) -> None:
        """Bring what was written to the disk."""
        self._file.sync()

    def close(self) -> None:
        """Sync and close the file; calling it again does nothing."""
        self._file.close()


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run; a line that a kill left unfinished is passed over.

    Raises:
        DataError: when metrics.jsonl is not a regular file.
    """
    for _, record in _lines(run_dir / NAME):
        if record is not None:
            yield record


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line with its record, None where it is none; nothing for a missing file."""
    if not os.path.lexists(path):
        return
    with io.BufferedReader(saferead.open_regular(path, DataError)) as file:
        while line := file.readline(_MAX_LINE):
            yield line, _parse(line)
            while not line.endswith(b"\n") and (line := file.readline(_MAX_LINE)):
                pass  # the rest of a line that is too long


def _refuse(text: str) -> None:
    raise ValueError(text)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=_refuse) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _MAX_STEP else None


def cut(run_dir: Path, last_step: int) -> int:
    """Drop every record after a step, and unfinished lines, so that no step appears twice after a resume.

    The file is replaced as a whole, and only when something changes.

    Args:
        run_dir: the run directory.
        last_step: the last step to keep; -1 drops everything.

    Returns:
        The number of lines dropped.

    Raises:
        DataError: when metrics.jsonl is not a regular file.
    """
    path = run_dir / NAME
    dropped = sum(1 for _, record in _lines(path) if record is None or record["step"] > last_step)
    if dropped:
        with safeio.atomic_file(path) as target:
            for line, record in _lines(path):
                if record is not None and record["step"] <= last_step:
                    target.write(line)
    return dropped
