"""llm.c's program ``train_gpt2`` as a contender of ``bench step``, beside the others in turns.

The program (github.com/karpathy/llm.c, train_gpt2.c) takes no arguments: it trains on 4 sequences of 64 tokens, reads
``gpt2_124M.bin`` and token files from its working directory, and prints ``step 0: train loss 4.67 (took 3136.2 ms)``.
Here it starts from anellm's weights, and its token files repeat one batch, so that its losses can be compared.

Files are written where its first and its later versions look for them. The tokenizer, which only generated text needs,
is left out: the program says so and goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from anellm import weights_llmc
from anellm.bench_peers import Contender, child_environment
from anellm.errors import ConfigError, InvalidError
from anellm.model_config import ModelConfig
from anellm.tokens import llmc_header

BATCH_SIZE: Final = 4  # constants of the program
SEQ_LEN: Final = 64
STEPS: Final = 20  # before the next one the program generates text, for as long as many steps take

_STEP = re.compile(r"step (\d+): train loss (\S+) \(took (\d+(?:\.\d+)?) ms\)")
# Losses that must be anellm's: the first update of AdamW does not depend on beta2, the second does.
_CHECKED = 2
_BATCHES = 8  # in each token file; all are the same
_PATIENCE_S = 600.0  # the longest silence
_GRACE_S = 10.0  # for a program to end after its last line
_MOST_LINES = 10_000  # between two steps
_OLD_VERSION = "Bad version"  # what the program says of a model file for another of its own versions


def check_program(program: str) -> Path:
    """Return a program's path, absolute, as it will run in another directory.

    Raises:
        ConfigError: when there is none that can be run.
    """
    path = Path(program).absolute()
    if not path.exists():
        raise ConfigError(f"--llmc: {program}: no such file; expected llm.c's built program train_gpt2")
    if not path.is_file() or not os.access(path, os.X_OK):
        raise ConfigError(f"--llmc: {program}: expected a program that can be run, found a file that cannot")
    return path


def check_shape(shape: ModelConfig, batch_size: int, seq_len: int) -> None:
    """Refuse what the program does not train.

    Raises:
        ConfigError: naming what.
    """
    if (batch_size, seq_len) != (BATCH_SIZE, SEQ_LEN):
        raise ConfigError(
            f"--llmc: the program trains on {BATCH_SIZE} sequences of {SEQ_LEN} tokens: expected --batch-size "
            f"{BATCH_SIZE} --seq-len {SEQ_LEN}, found {batch_size} and {seq_len}"
        )
    try:
        weights_llmc.refuse_inexpressible(shape, "--llmc: llm.c")
    except InvalidError as error:
        raise ConfigError(str(error).split(". Save", maxsplit=1)[0]) from None
    if shape.vocab_size > 1 << 16:
        raise ConfigError(f"--llmc: its token files hold ids below {1 << 16}, found --vocab-size {shape.vocab_size}")


def write_tokens(folder: Path, tokens: np.ndarray[Any, Any]) -> None:
    """Write the token files that the program trains on and validates with.

    Args:
        folder: its working directory.
        tokens: ids (B * T,), the batch at every place.
    """
    ids = np.concatenate([np.tile(tokens, _BATCHES), tokens[:1]])
    short = ids.astype("<u2")
    shard, headerless = llmc_header(ids.size, short.dtype) + short.tobytes(), ids.astype("<i4").tobytes()
    for part in ("train", "val"):
        name = f"tiny_shakespeare_{part}.bin"
        for path, data in (
            (folder / "dev" / "data" / "tinyshakespeare" / name, shard),
            (folder / "data" / name, headerless),  # of its first versions
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def read_weights(job: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights in the job's file, mapped, by their Hugging Face names."""
    values = np.memmap(job["weights"], np.float32, "r")
    found, at = {}, 0
    for name, shape in job["tensors"]:
        size = math.prod(shape)
        found[name] = values[at : at + size].reshape(shape)
        at += size
    return found


class Llmc:
    """The program's process; between its turns it is stopped."""

    def __init__(self, program: str, shape: ModelConfig, job: Mapping[str, Any], folder: Path, rounds: int) -> None:
        """Write its files and start it.

        Args:
            program: its path.
            shape: the model's dimensions.
            job: what every contender is told.
            folder: where its working directory may be made.
            rounds: turns that it will have.

        Raises:
            ConfigError: when it cannot be run.
        """
        notes = (f"{program} in fp32", "AdamW with its own constants: beta2 0.999, no decay")
        self.contender = Contender("llm.c", "llmc", notes=notes, checked_steps=_CHECKED)
        self._program, self._path = program, check_program(program)
        self._shape, self._job = shape, job
        self._folder = folder / "llm.c"
        self._turn = max(2, (STEPS - _CHECKED) // rounds)  # steps, with the one in which it was stopped
        self._threads = int(job["threads"])
        self._n_steps = 0
        self._last = ""
        self._rss_mib: float | None = None
        self._stopped = False
        write_tokens(self._folder, np.asarray(job["tokens"]).reshape(-1))
        self._start(3)

    def _start(self, version: int) -> None:
        weights_llmc.write(self._folder / "gpt2_124M.bin", self._shape, read_weights(self._job), version)
        self._version = version
        self._lines = bytearray()
        # Into a pipe the program would write whole pages of lines; a terminal gets each at once.
        self._terminal, theirs = pty.openpty()
        try:
            self._process = subprocess.Popen(  # noqa: S603  the user named it
                [str(self._path)],
                cwd=self._folder,
                env=child_environment(self._threads, {}),
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                process_group=0,  # so that all its threads and children stop
            )
        except OSError as error:
            self._close_terminal()
            raise ConfigError(f"--llmc: cannot run {self._program}: {error.strerror}") from None
        finally:
            os.close(theirs)

    def _line(self) -> str | None:
        """Return the next line it prints; None after the last."""
        while b"\n" not in self._lines:
            ready, _, _ = select.select([self._terminal], [], [], _PATIENCE_S)
            if not ready:
                raise ConfigError(f"--llmc: {self._program}: nothing printed for {_PATIENCE_S:g} s{self._said()}")
            try:
                data = os.read(self._terminal, 1 << 16)
            except OSError:  # what a terminal reads as when its other end is closed
                data = b""
            if not data and not self._lines:
                return None
            self._lines += data or b"\n"
        line, _, rest = bytes(self._lines).partition(b"\n")
        self._lines = bytearray(rest)
        return line.decode("utf-8", "replace").strip()

    def _said(self) -> str:
        return f"; its last line: {self._last[:200]!r}" if self._last else "; it printed nothing"

    def _ended(self) -> ConfigError:
        try:
            status = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return ConfigError(f"--llmc: {self._program} closed its output after {self._n_steps} steps{self._said()}")
        how = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return ConfigError(
            f"--llmc: {self._program} {how} after {self._n_steps} steps; expected {STEPS} lines 'step N: train loss X "
            f"(took Y ms)'{self._said()}"
        )

    def _step(self) -> tuple[float, float]:
        """Return milliseconds and loss of the next step."""
        for _ in range(_MOST_LINES):
            line = self._line()
            if line is None:
                raise self._ended()
            self._last = line or self._last
            if _OLD_VERSION in line and self._version == 3 and self._n_steps == 0:
                self._end()
                self._start(1)
                continue
            if not line.startswith("step "):
                continue
            match = _STEP.fullmatch(line)
            loss = _number(match[2]) if match is not None else None
            if match is None or loss is None or int(match[1]) != self._n_steps or float(match[3]) <= 0:
                raise ConfigError(
                    f"--llmc: {self._program}: expected 'step {self._n_steps}: train loss X (took Y ms)', found "
                    f"{line[:200]!r}"
                )
            self._n_steps += 1
            return float(match[3]), loss
        raise ConfigError(
            f"--llmc: {self._program}: expected a line 'step {self._n_steps}: train loss X (took Y ms)', found "
            f"{_MOST_LINES} others{self._said()}"
        )

    def run(self, count: int, warmup: int = 0) -> dict[str, Any]:
        """Let it go on; see Child.run. At most as many steps as it has for a turn; later turns may have none."""
        if self._stopped:
            self._signal(signal.SIGCONT)
            self._stopped = False
        n = min(warmup + count, max(warmup, self._turn), STEPS - self._n_steps)
        found = [self._step() for _ in range(n)]
        self._rss_mib = self._peak_rss_mib() or self._rss_mib
        self._signal(signal.SIGSTOP)
        self._stopped = True
        return {"ms": [ms for ms, _ in found[warmup:]], "values": [x for _, x in found], "rss_mib": self._rss_mib}

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may be through
            os.killpg(self._process.pid, number)

    def _peak_rss_mib(self) -> float | None:
        """Return the most memory it ever held, where the system tells."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        return None

    def _end(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._close_terminal()

    def _close_terminal(self) -> None:
        if self._terminal >= 0:
            os.close(self._terminal)
        self._terminal = -1

    def close(self) -> None:
        """End it."""
        self._end()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
