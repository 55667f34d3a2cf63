"""Contenders of a benchmark, each in a child process, and the settings at which each is at its best."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from anellm.errors import AnellmError, ConfigError
from anellm.options import nearest

INSTALL = {
    "torch": "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu",
    "jax": "pip install jax",
    "numpy": "pip install numpy",
}
TUNED = "torch-tuned"

# glibc gives large blocks back to the system at each free() and takes them anew: PyTorch's temporaries then cost page
# faults in every step. With these it keeps them, in huge pages.
_KEEP_MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=68719476736"
# Set on some systems to a kernel for every CPU, which is slower than what OpenBLAS finds out by itself.
_DROPPED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "GLIBC_TUNABLES", "LD_PRELOAD")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ANELLM_THREADS")
# `-c` instead of a path: a path would put anellm's own modules before the standard library's.
_RUN = "import runpy, sys; sys.path[:] = [p for p in sys.path if p]; runpy.run_path(sys.argv[1], run_name='__main__')"


class MissingError(AnellmError, ImportError):
    """A contender's package cannot be imported by the Python that was to run it."""


class ChildError(AnellmError, RuntimeError):
    """A contender failed, or its process ended."""


def parse_compare(text: str) -> list[str]:
    """Return the peers of a ``--compare`` list, each once.

    Raises:
        ConfigError: on an unknown name, naming the nearest.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in INSTALL:
            raise ConfigError(f"--compare: unknown peer {name!r}{nearest(name, INSTALL)}")
    return names


@dataclass(frozen=True)
class Contender:
    """One way to run a benchmark's work.

    Attributes:
        name: what the tables call it.
        module: bench_MODULE.py does the work.
        python: the Python that runs it.
        environment: variables that it needs besides the common ones.
        options: entries of its job, e.g. whether to compile.
        notes: what is worth telling about its settings.
        checked_steps: how many of its first losses must be those of the others.
    """

    name: str
    module: str
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checked_steps: int = 3  # the later losses say that gradients and updates agree, too


class Runner(Protocol):
    """What takes turns."""

    contender: Contender

    def run(self, count: int, warmup: int = 0) -> dict[str, Any]:
        """Do the work: see Child.run."""
        ...

    def close(self) -> None:
        """End the process."""
        ...


def child_environment(threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a contender's process.

    Args:
        threads: how many threads its libraries may use.
        extra: variables that come before all others.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _DROPPED}
    return environment | dict.fromkeys(_THREADS, str(threads)) | dict(extra)


class Child:
    """A contender's process: start() once, then run() as often as wanted, then close()."""

    def __init__(self, contender: Contender, threads: int) -> None:
        """Start the process.

        Args:
            contender: who.
            threads: how many threads its libraries may use.
        """
        self.contender = contender
        here = Path(__file__).resolve().parent
        environment = child_environment(threads, contender.environment)
        if contender.python == sys.executable:  # another Python must not find this one's packages
            environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), *(p for p in sys.path if p)])
        else:
            environment.pop("PYTHONPATH", None)
        command = [contender.python, "-c", _RUN, str(here / "bench_child.py")]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in close(); a pipe nobody reads could fill up
        try:
            self._process = subprocess.Popen(  # noqa: S603  the command is the user's own Python
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
            )
        except OSError as error:
            self._log.close()
            raise ConfigError(f"{contender.name}: cannot run {contender.python}: {error.strerror}") from None

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ChildError(f"{self.contender.name}: its process ended: {self._last_words()}")
        answer = json.loads(line)
        if "missing" in answer:
            raise MissingError(str(answer["missing"]))
        if "error" in answer:
            raise ChildError(f"{self.contender.name}: {answer['error']}")
        return dict(answer)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else f"exit status {self._process.poll()}"

    def start(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare the work; return what there is to tell about it.

        Raises:
            MissingError: when the package cannot be imported.
            ChildError: when it failed.
        """
        return self._ask({"do": "start", "module": self.contender.module, **job, **self.contender.options})

    def run(self, count: int, warmup: int = 0) -> dict[str, Any]:
        """Do the work; return "ms" of each timed call, "values" of every call, and "rss_mib", the peak so far.

        Raises:
            ChildError: when it failed.
        """
        return self._ask({"do": "run", "count": count, "warmup": warmup})

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it may be gone already
                self._process.stdin.close()  # the child leaves its loop
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


@contextmanager
def children(contenders: Iterable[Contender], threads: int) -> Iterator[list[Child]]:
    """Give a process for each contender, and end them all at the end."""
    found: list[Child] = []
    try:
        for contender in contenders:
            found.append(Child(contender, threads))  # noqa: PERF401  those started must be closed when one fails
        yield found
    finally:
        for child in found:
            child.close()


def missing_line(name: str, reason: str, python: str) -> str:
    """Return the line that says why a peer does not take part and how to change that."""
    name = name.removesuffix("-tuned")
    where = f" by {python}" if python != sys.executable else ""
    flag = f", or name a Python that has it: --{name}-python PATH" if name != "numpy" else ""
    return f"{name}: cannot be imported{where} ({reason}); install it: {INSTALL[name]}{flag}"


def is_amd() -> bool:
    """Return whether the CPU is AMD's, where the system tells."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def mkl_override(folder: Path) -> Path | None:
    """Return a shared object that makes MKL take an AMD CPU for an Intel one; None where it is not needed or possible.

    MKL chooses its kernels by the vendor, and leaves AVX-512 out on AMD's CPUs. PyTorch's copy asks this function.

    Args:
        folder: where to put it.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not is_amd() or compiler is None:
        return None
    source, target = folder / "intel.c", folder / "intel.so"
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n", encoding="ascii")
    command = [compiler, "-shared", "-fPIC", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603  our own source
    return target if done.returncode == 0 else None


def tuned_torch(python: str, dtype: str, folder: Path, options: Mapping[str, Any]) -> Contender:
    """Return PyTorch with everything set for speed that can be set from outside.

    Args:
        python: a Python that has torch.
        dtype: "fp32" or "bf16"; MKL's vendor check only matters for fp32.
        folder: where files that it needs may be put, for as long as it runs.
        options: entries of its job.
    """
    environment, notes = {}, []
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        environment["GLIBC_TUNABLES"] = _KEEP_MEMORY
        notes.append("malloc keeps its memory, in huge pages")
    override = mkl_override(folder) if dtype == "fp32" else None
    if override is not None:
        environment["LD_PRELOAD"] = str(override)
        notes.append("MKL uses AVX-512 on this AMD CPU")
    return Contender(TUNED, "torch", python, environment, options, tuple(notes))


def matmul_contenders(peers: Sequence[str], pythons: Mapping[str, str], dtype: str, folder: Path) -> list[Contender]:
    """Return the peers that can do a matrix product, each in every way that it takes part.

    Args:
        peers: names from parse_compare().
        pythons: peer -> the Python that runs it.
        dtype: "fp32" or "bf16".
        folder: where files may be put, for as long as they run.
    """
    found = []
    for name in peers:
        found.append(Contender(name, name, pythons[name]))
        if name == "torch":
            found.append(tuned_torch(pythons[name], dtype, folder, {}))
    return found


def alternate(
    running: Sequence[Runner], rounds: int, count: int, warmup: int, between: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Let contenders work in turns: the first, the second, ..., the first again.

    Args:
        running: children that were started.
        rounds: turns of each.
        count: timed calls in a turn.
        warmup: calls before them that are not timed.
        between: called after each round.

    Returns:
        For each name "ms", all times, and "rss_mib".
    """
    found: dict[str, dict[str, Any]] = {child.contender.name: {"ms": []} for child in running}
    for _ in range(rounds):
        for child in running:
            answer = child.run(count, warmup)
            entry = found[child.contender.name]
            entry["ms"] += answer["ms"]
            entry["rss_mib"] = answer["rss_mib"]
        between()
    return found
