"""The contender NumPy in a benchmark's child process: see bench_child. Its matrix product is its BLAS library's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def start(job: Mapping[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return the job's matrix product; the weight is another one each time, so that it comes from memory."""
    rng = np.random.default_rng(0)
    M, N, K = job["M"], job["N"], job["K"]

    def random(rows: int, columns: int) -> Any:
        return rng.standard_normal((rows, columns), np.float32)

    a = random(K, M) if job["trans_a"] else random(M, K)
    weights = [random(N, K) if job["trans_b"] else random(K, N) for _ in range(job["copies"])]
    left = a.T if job["trans_a"] else a
    rights = [w.T if job["trans_b"] else w for w in weights]
    out = [np.empty((M, N), np.float32) for _ in range(job["out_copies"])]
    turn = 0

    def product() -> float:
        nonlocal turn
        turn += 1
        np.matmul(left, rights[turn % len(rights)], out=out[turn % len(out)])
        return 0.0

    return product, {"version": np.__version__}
