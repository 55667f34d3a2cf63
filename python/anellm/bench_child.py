"""What a benchmark's child process runs: it reads requests as lines of JSON and answers each with one.

Standard library only, and it does not import anellm: the Python that runs it may have no more than the peer. The work
itself is in the module beside this file that the first request names; its ``start(job)`` gives a function to time and
what there is to tell about it. A process of its own keeps one contender's memory, threads and settings from another's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def peak_rss_mib() -> float:
    """Return the most memory that this process ever held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


class Child:
    """One contender: the function to time, once a request has named it."""

    def __init__(self) -> None:
        """Wait for the first request."""
        self._task: Callable[[], float] | None = None

    def start(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Load the contender's module and prepare what is timed."""
        path = Path(__file__).with_name(f"bench_{job['module']}.py")
        spec = importlib.util.spec_from_file_location(f"anellm_bench_{job['module']}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        self._task, about = module.start(job)
        return dict(about)

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Call the function ``warmup`` times untimed and ``count`` times timed; return milliseconds and results."""
        if self._task is None:
            raise RuntimeError("nothing was started")
        values, times = [], []
        for i in range(job["warmup"] + job["count"]):
            start = time.perf_counter()
            values.append(self._task())
            if i >= job["warmup"]:
                times.append(1e3 * (time.perf_counter() - start))
        return {"ms": times, "values": values}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request; what goes wrong is part of it."""
        try:
            found = self.start(request) if request["do"] == "start" else self.run(request)
        except ImportError as error:
            return {"missing": str(error)}
        except Exception as error:  # noqa: BLE001  the parent decides what it means
            return {"error": f"{type(error).__name__}: {error}"}
        return {**found, "rss_mib": peak_rss_mib()}


def main() -> None:
    """Answer requests until there are no more."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what libraries print goes to stderr, not between the answers
        child = Child()
        for line in sys.stdin:
            answers.write(json.dumps(child.answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
