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

from anellm._ffi import check, ffi, lib, text

_EVENTS = 1 << 18  # of the C core, kept between two spans
_TAKEN = 1024  # moved out at a time
_ROWS = {lib.ANELLM_TRACE_DEVICE: "Neural Engine", lib.ANELLM_TRACE_JOBS: "weight gradients"}


class Tracer:
    """Write what happens in ``with tracer.span(name)`` blocks to a file, as it happens.

    Each span says besides its duration how much CPU time all threads of the process spent in it ("cpu_ms") and how
    many were busy on average ("busy_threads"). Without a path everything is let through and nothing is written.
    """

    def __init__(self, path: str | Path | None, *, inside: bool = False) -> None:
        """Prepare a trace; the file is made by ``with tracer``.

        Args:
            path: the file, overwritten; None traces nothing.
            inside: show also what the C core does within the spans: on the calling thread, the Neural Engine, and the
                thread of weight gradients, each in a row.
        """
        self._path = None if path is None else Path(path)
        self._inside = inside and path is not None
        self._offset = 0  # of the C core's clock
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
            if self._inside:
                self._begin_inside()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file. After a kill it lacks the last bracket, which the viewers do not mind."""
        if self._file is not None:
            if self._inside:
                with self._lock:
                    self._take_inside(threading.get_native_id())
                check(lib.anellm_trace_enable(0))
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
            if self._inside:
                self._take_inside(thread)

    def _begin_inside(self) -> None:
        """Let the C core keep its events, and name the rows that are no Python thread."""
        check(lib.anellm_trace_enable(_EVENTS))
        self._offset = lib.anellm_trace_now() - time.perf_counter_ns()
        for row, name in _ROWS.items():
            self._put(self._metadata("thread_name", name, row).strip())

    def _take_inside(self, thread: int) -> None:
        """Append what the C core kept; ``thread`` is the one that called it."""
        events, n, lost = ffi.new(f"anellm_trace_event[{_TAKEN}]"), ffi.new("int64_t *"), ffi.new("int64_t *")
        while True:
            check(lib.anellm_trace_take(events, _TAKEN, n, lost))
            for event in events[0 : n[0]]:
                start = (event.start_ns - self._offset - self._start) / 1e3
                shown = {
                    "name": text(event.name),
                    "ph": "X",
                    "ts": max(0.0, start),
                    "dur": (event.end_ns - event.start_ns) / 1e3,
                    "pid": os.getpid(),
                    "tid": event.row if event.row in _ROWS else thread,
                    "args": {} if event.layer < 0 else {"layer": event.layer},
                }
                self._put(json.dumps(shown).encode())
            if lost[0]:
                note = {
                    "name": f"{lost[0]} events lost",
                    "ph": "i",
                    "s": "g",
                    "ts": 0,
                    "pid": os.getpid(),
                    "tid": thread,
                }
                self._put(json.dumps(note | {"args": {}}).encode())
            if n[0] < _TAKEN:
                return

    def _put(self, event: bytes) -> None:
        if self._file is not None:
            self._file.write(b",\n" + event)

    @staticmethod
    def _metadata(kind: str, name: str, thread: int) -> bytes:
        """Return the event that names the process or a thread."""
        event = {"name": kind, "ph": "M", "pid": os.getpid(), "tid": thread, "args": {"name": name}}
        return b"\n" + json.dumps(event).encode()
