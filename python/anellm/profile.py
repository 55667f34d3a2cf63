"""Where the time of a training run goes: spans in Chrome's trace format, for ui.perfetto.dev or chrome://tracing.

Source: "Trace Event Format", the JSON array format with complete events ("ph": "X"), times in microseconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self


class Tracer:
    """Write what happens in ``with tracer.span(name)`` blocks to a file, as it happens.

    Each span says besides its duration how much CPU time all threads of the process spent in it ("cpu_ms") and how
    many were busy on average ("busy_threads"). Without a path everything is let through and nothing is written.
    """

    def __init__(self, path: str | Path | None) -> None:
        """Prepare a trace; the file is made by ``with tracer``.

        Args:
            path: the file, overwritten; None traces nothing.
        """
        self._path = None if path is None else Path(path)
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()
        self._threads: set[int] = set()
        self._start = 0

    def __enter__(self) -> Self:
        """Open the file."""
        if self._path is not None:
            self._file = self._path.open("wb")
            self._start = time.perf_counter_ns()
            self._file.write(b"[" + self._metadata("process_name", "anellm", 0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file. After a kill it lacks the last bracket, which the viewers do not mind."""
        if self._file is not None:
            with self._file as file:
                file.write(b"\n]\n")
            self._file = None

    @contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """Record the block's duration under a name; ``args`` are shown with it."""
        if self._file is None:
            yield
            return
        start, cpu = time.perf_counter_ns(), time.process_time_ns()
        try:
            yield
        finally:
            self._write(name, start, time.perf_counter_ns(), time.process_time_ns() - cpu, args)

    def _write(self, name: str, start: int, end: int, cpu: int, args: dict[str, Any]) -> None:
        """Append one span; times in nanoseconds."""
        busy = {"cpu_ms": round(cpu / 1e6, 3), "busy_threads": round(cpu / max(1, end - start), 2)}
        thread = threading.get_native_id()
        event = {
            "name": name,
            "ph": "X",
            "ts": (start - self._start) / 1e3,
            "dur": (end - start) / 1e3,
            "pid": os.getpid(),
            "tid": thread,
            "args": {**args, **busy},
        }
        with self._lock:
            if self._file is None:
                return
            if thread not in self._threads:
                self._threads.add(thread)
                self._file.write(b"," + self._metadata("thread_name", threading.current_thread().name, thread))
            self._file.write(b",\n" + json.dumps(event).encode())

    @staticmethod
    def _metadata(kind: str, name: str, thread: int) -> bytes:
        """Return the event that names the process or a thread."""
        event = {"name": kind, "ph": "M", "pid": os.getpid(), "tid": thread, "args": {"name": name}}
        return b"\n" + json.dumps(event).encode()
