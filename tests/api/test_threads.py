"""The number of threads: setting, default, fork, and Python threads that call at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from anellm._ffi import check, lib, ptr
from anellm.errors import InvalidError


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = lib.anellm_get_threads()
    yield
    check(lib.anellm_set_threads(before))


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    m, k = a.shape
    n = b.shape[1]
    out = np.empty((m, n), np.float32)
    p = [ptr(x, np.float32) for x in (out, a, b)]
    check(lib.anellm_matmul(p[0], n, p[1], k, 0, p[2], n, 0, m, n, k, 0))
    return out


def whole_numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def run_python(code: str) -> str:
    """Return what a fresh interpreter prints, with ANELLM_THREADS unset."""
    environment = {k: v for k, v in os.environ.items() if k != "ANELLM_THREADS"}
    # Of use only under ThreadSanitizer, which by default ends the child of a threaded process that starts a thread.
    environment["TSAN_OPTIONS"] = environment.get("TSAN_OPTIONS", "") + " die_after_fork=0"
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_set_and_get() -> None:
    for n in (1, 2, 3, 256, 2):
        check(lib.anellm_set_threads(n))
        assert lib.anellm_get_threads() == n


@pytest.mark.parametrize("n", [0, -1, 257, 1 << 30])
def test_bad_numbers_are_refused_and_change_nothing(n: int) -> None:
    check(lib.anellm_set_threads(2))
    with pytest.raises(InvalidError, match=f"anellm_set_threads: n is {n}, expected 1..256"):
        check(lib.anellm_set_threads(n))
    assert lib.anellm_get_threads() == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
def test_default_is_the_affinity_mask() -> None:
    code = "import os; {}; from anellm._ffi import lib; print(lib.anellm_get_threads())"
    assert run_python(code.format("pass")) == str(min(len(os.sched_getaffinity(0)), 256))
    one = min(os.sched_getaffinity(0))
    assert run_python(code.format(f"os.sched_setaffinity(0, {{{one}}})")) == "1"


def test_results_do_not_depend_on_threads_set_meanwhile() -> None:
    a, b = whole_numbers(1, 150, 90), whole_numbers(2, 90, 170)
    expected = a.astype(np.int64) @ b.astype(np.int64)  # not by BLAS, whose own threads would confuse ThreadSanitizer
    wrong: list[int] = []
    stop = threading.Event()

    def resize() -> None:
        n = 0
        while not stop.is_set():
            n = n % 5 + 1
            check(lib.anellm_set_threads(n))

    def multiply() -> None:
        wrong.extend(i for i in range(60) if not np.array_equal(product(a, b), expected))

    resizer = threading.Thread(target=resize)
    workers = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in (resizer, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    resizer.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_works_in_a_forked_child() -> None:
    """A child has none of its parent's workers; a loop there must neither hang nor lose pieces."""
    code = """
import os, signal, warnings
import numpy as np
from anellm._ffi import check, lib, ptr
warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads
a = np.ones((200, 60), np.float32)
out = np.zeros((200, 200), np.float32)
p, q = ptr(a, np.float32), ptr(out, np.float32)
def product():
    check(lib.anellm_matmul(q, 200, p, 60, 0, p, 60, 1, 200, 200, 60, 0))
    return bool((out == 60).all())
check(lib.anellm_set_threads(3))
assert product()
child = os.fork()
if child == 0:
    signal.alarm(20)
    out[...] = 0
    os._exit(0 if product() and lib.anellm_get_threads() == 3 else 1)
print(os.waitpid(child, 0)[1], product())
"""
    assert run_python(code) == "0 True"
