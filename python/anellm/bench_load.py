"""``bench load``: how long a model takes from a file to the first use, in each format that can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from anellm.bench_timing import BenchJob, measure, table
from anellm.model import Model

FORMATS: dict[str, Callable[[Model, Path], None]] = {
    "hf float32": lambda model, path: model.save_pretrained(path),
    "hf float16": lambda model, path: model.save_pretrained(path, dtype="float16"),
    "hf bfloat16": lambda model, path: model.save_pretrained(path, dtype="bfloat16"),
    "llama2c": lambda model, path: model.save_pretrained(path, "llama2c"),
    "llama2c-v1": lambda model, path: model.save_pretrained(path, "llama2c-v1"),
}


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.iterdir() if p.is_file())


def run(job: BenchJob) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    found, rows = {}, []
    with tempfile.TemporaryDirectory(prefix="anellm-bench-") as name:
        model = Model(job.shape, seed=1)
        for format_name, save in FORMATS.items():
            path = Path(name) / format_name.replace(" ", "-")
            save(model, path)
            times = measure(partial(Model.from_pretrained, path), 0.0, job.rounds)
            n_bytes = size(path)
            gbs = n_bytes / times.least / 1e6
            found[format_name] = {"ms": times.median, "min_ms": times.least, "bytes": n_bytes, "gbs": gbs}
            rows.append(
                [format_name, f"{n_bytes / 1e6:.1f}", f"{times.median:.1f}", f"{times.least:.1f}", f"{gbs:.2f}"]
            )
    print(table(["format", "MB", "ms", "least", "GB/s"], rows))
    missing = {peer: f"{peer}: loading is not compared" for peer in job.compare}
    for line in missing.values():
        print(line)
    return {
        **job.describe(),
        "formats": found,
        "missing": missing,
        "method": "Model.from_pretrained, checks included, of a file just written, so in the system's cache; "
        f"ms is the median of {job.rounds} loads after one that does not count",
    }
