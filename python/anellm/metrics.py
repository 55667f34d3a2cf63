"""metrics.jsonl: one JSON object a line, appended as training goes; docs/metrics.md describes each kind."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anellm import safeio

NAME = "metrics.jsonl"
_MIB = 1 << 20


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

    def close(self) -> None:
        """Sync and close the file; calling it again does nothing."""
        self._file.close()


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run; a line that a kill left unfinished is passed over."""
    try:
        file = (run_dir / NAME).open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def cut(run_dir: Path, last_step: int) -> int:
    """Drop every record after a step, and unfinished lines, so that no step appears twice after a resume.

    The file is replaced as a whole, and only when something changes.

    Args:
        run_dir: the run directory.
        last_step: the last step to keep; -1 drops everything.

    Returns:
        The number of lines dropped.
    """
    path = run_dir / NAME
    try:
        source = path.open("rb")
    except FileNotFoundError:
        return 0
    dropped = 0
    with source:
        for line in source:
            record = _parse(line)
            dropped += record is None or record["step"] > last_step
        if dropped:
            source.seek(0)
            with safeio.atomic_file(path) as target:
                for line in source:
                    record = _parse(line)
                    if record is not None and record["step"] <= last_step:
                        target.write(line)
    return dropped
