"""Images: lives of a process between two exec(). A run that may compile only so much goes on in the next one.

From the command line a process replaces itself: replace_process(), and take_handover() in the new image. Elsewhere, in
scripts, notebooks and tests, a child process computes for it, and another one after that: ChildImage, and main() there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

import numpy as np

from anellm import errors, saferead
from anellm._ffi import check, lib
from anellm.ane import AneStats
from anellm.ane_device import Engine
from anellm.efficiency import Sums, read_sums
from anellm.pipeline_schedule import Action
from anellm.rundir import RunDirectory
from anellm.stages import Stages, share
from anellm.state_file import DATA_OFFSET, StateFile

if TYPE_CHECKING:
    from anellm.model import Model

VARIABLE: Final = "ANELLM_IMAGE"
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def new_nonce() -> str:
    """Return a name for an image that no other one has."""
    return secrets.token_hex(8)


# ---- exec ------------------------------------------------------------------------------------------------------------


class Restart(Exception):  # noqa: N818  it is no error
    """The state is on the disk, and the process is to be replaced to go on from there."""

    def __init__(self, nonce: str, signals: int) -> None:
        """Take the nonce of the image to come, which the state names, and a pipe with the signals from here on."""
        super().__init__("the process is to be replaced")
        self.nonce, self.signals = nonce, signals


@dataclasses.dataclass(frozen=True)
class Handover:
    """What an image tells the next one by an environment variable.

    Attributes:
        out: the run directory.
        nonce: of the next image.
        lock: the descriptor that holds the run's lock.
        signals: a pipe with the signals that came since the state was stored.
        began: time.monotonic() before exec().
    """

    out: str
    nonce: str
    lock: int
    signals: int
    began: float


def take_handover() -> Handover | None:
    """Return what the image before this one left, once; None in a process that was started.

    Raises:
        ConfigError: when the variable holds something else.
    """
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    what = f"environment variable {VARIABLE}"
    values = saferead.parse_json(text.encode(), what, errors.ConfigError)
    kinds = {"out": str, "nonce": str, "lock": int, "signals": int, "began": float}
    if values.keys() != kinds.keys():
        raise errors.ConfigError(f"{what}: expected the keys {', '.join(kinds)}, found {', '.join(values)}")
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise errors.ConfigError(f"{what}: {name}: expected a {kind.__name__}, found {values[name]!r:.80}")
    return Handover(**values)


def replace_process(run: RunDirectory, restart: Restart) -> NoReturn:
    """Replace this process by a new image of the same command line.

    Raises:
        InternalError: when the system refuses.
    """
    handover = Handover(str(run.path), restart.nonce, run.hand_over(), restart.signals, time.monotonic())
    os.set_inheritable(restart.signals, True)
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, VARIABLE: json.dumps(dataclasses.asdict(handover))}
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606  as it was started
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        raise errors.InternalError(f"{sys.executable}: cannot be started anew: {error.strerror or error}") from None


def hold_signals() -> int:
    """Keep SIGINT and SIGTERM for the next image, and return where it will find those that come nevertheless.

    They wait while this thread blocks them. Threads that others have started (NumPy's) do not block them, and what one
    of those takes would be gone with exec(); but Python's own handler, which stays, puts it into a pipe first.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read


def take_signals(handover: Handover) -> bool:
    """Let the signals through that hold_signals() has kept waiting, and return whether some came in between."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        came = os.read(handover.signals, 1)
        os.close(handover.signals)
    except OSError:  # none
        return False
    return bool(came)


# ---- what computes ---------------------------------------------------------------------------------------------------


class Image(Protocol):
    """What does the actions of a schedule that need programs."""

    def perform(self, action: Action, scale: float) -> None:
        """Compile a group's programs, or take a micro-batch through it; ``scale`` multiplies the loss."""

    def restart(self) -> None:
        """Begin a new image."""

    def close(self) -> None:
        """End it."""


class LocalImage:
    """This process."""

    def __init__(self, model: Model, stages: Stages) -> None:
        """Take what the actions need."""
        self._model, self._stages = model, stages

    def perform(self, action: Action, scale: float) -> None:
        """See Image.

        Raises:
            CompileError, UnsupportedError, EvalError, NonFiniteError: from the device.
        """
        if action.kind == "compile":
            if self._model.ane is not None:
                self._model.ane.hold(*self._stages.layers(action.group))
        elif action.kind == "forward":
            self._stages.forward(action.micro, action.group)
        else:
            self._stages.backward(action.micro, action.group, scale, accumulate=action.micro > 0)

    def restart(self) -> None:
        """Ask for exec().

        From here on SIGINT and SIGTERM wait for the new image, so that none is lost between the two.

        Raises:
            Restart: always.
        """
        raise Restart(new_nonce(), hold_signals())

    def close(self) -> None:
        """Do nothing: programs go with their model."""


class RemoteEngine:
    """The Neural Engine of a child process, as far as a run's reports ask for it: see anellm.ane.ModelEngine.

    Attributes:
        device: the device as this process knows it: name, options and chip; its counters are the child's.
        refusals: programs that were refused.
    """

    def __init__(self, local: Any) -> None:
        """Begin with the state of the engine of this process, which computes nothing."""
        self.device = _RemoteDevice(local.device)
        self.refusals: tuple[Any, ...] = ()
        self._local = local
        self._earlier: list[float] = [0] * len(AneStats._fields)
        self._values: list[float] = [0] * len(AneStats._fields)
        self._activations: list[float] = local.activations()
        self._sums: Sums = {}
        self._earlier_sums: Sums = {}

    def take(self, reply: Mapping[str, Any]) -> None:
        """Take over what a child said about its engine."""
        self._values = reply["stats"]
        found = zip(reply["activations"], self._activations, strict=True)
        self._activations = [now or before for now, before in found]  # 0: of no layer of this child's group
        self._sums = {(name, row): ns for name, row, ns in reply["sums"]}
        self.device.modelled_ms = self.device.earlier_ms + reply["modelled_ms"]
        self._local.set_exponents(reply["exponents"])

    def child_ends(self) -> None:
        """Count on from where a child was."""
        self._earlier = list(self.stats())
        self._earlier_sums, self._sums = _added(self._earlier_sums, self._sums), {}
        self._values = [0] * len(AneStats._fields)
        self.device.earlier_ms = self.device.modelled_ms

    def stats(self) -> AneStats:
        """Return the sums over all children; what is not a sum is the last one's."""
        sums = ("evaluations", "rescales", "retries", "total_ane_flops", "total_cpu_flops", "compile_ms", "compiles")
        pairs = zip(AneStats._fields, self._values, self._earlier, strict=True)
        found: list[Any] = [now + before if name in sums else now for name, now, before in pairs]
        return AneStats(*found)

    def read_sums(self) -> Sums:
        """Return the times of all children and of this process: see anellm.efficiency.read_sums()."""
        return _added(_added(self._earlier_sums, self._sums), read_sums())

    def activations(self) -> list[float]:
        """Return the largest magnitudes behind each layer, in its last forward."""
        return self._activations

    def exponents(self) -> list[int]:
        """Return the state of the gradients' powers of two."""
        return list(self._local.exponents())

    def set_exponents(self, values: Sequence[int]) -> None:
        """Take the state that exponents() gave."""
        self._local.set_exponents(values)


def _added(a: Sums, b: Sums) -> Sums:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {*a, *b}}


class _RemoteDevice:
    def __init__(self, local: Engine) -> None:
        self._local = local
        self.modelled_ms = self.earlier_ms = 0.0

    def counters(self) -> dict[str, float]:
        return {"modelled_ms": self.modelled_ms}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._local, name)


class ChildImage:
    """A process beside this one, over the same state file; a new one for each image.

    Attributes:
        engine: the child's engine; None where the CPU computes.
        file: the state file, which is the memory of the model; to be set before the first action.
        ids: what the classifier is reduced to; None: it is not.
    """

    def __init__(self, model: Model) -> None:
        """Take the model; the first action starts a child."""
        self._model = model
        self.file: StateFile | None = None
        self.ids: np.ndarray[Any, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.engine = None if model.ane is None else RemoteEngine(model.ane)

    def _start(self) -> None:
        model, file = self._model, self.file
        if file is None:
            raise errors.InternalError("no state file")
        key = file.key
        options = model.ane_options
        from anellm.device import cpu_variant

        hello = {
            "config": model.config.to_dict(),
            "device": model.device,
            "options": None if options is None else dataclasses.asdict(options),
            "dtype": model.dtype,
            "policy": model.activation_checkpoint,
            "shape": [key.batch_size, key.seq_len, key.n_micro],
            "starts": list(key.starts),
            "fd": file.fd,
            "ids": None if self.ids is None else self.ids.tolist(),
            "exponents": None if self.engine is None else self.engine.exponents(),
            "threads": int(lib.anellm_get_threads()),
        }
        path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "ANELLM_CPU": cpu_variant()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "anellm.image"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[file.fd],
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which ends the child
        )
        try:
            self._ask(hello)
        except BaseException:
            self.close()
            raise

    def _ask(self, request: Mapping[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise errors.InternalError("no child process")
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._process = None
            code = process.wait()
            raise errors.UnavailableError(f"the process that computes has ended by itself, with exit code {code}")
        reply = saferead.parse_json(line, "the process that computes", errors.InternalError)
        if "stats" in reply and self.engine is not None:
            self.engine.take(reply)
        if "error" in reply:
            found = getattr(errors, reply["error"], errors.InternalError)
            raise found(reply["message"])

    def perform(self, action: Action, scale: float) -> None:
        """See Image.

        Raises:
            CompileError, UnsupportedError, EvalError, NonFiniteError: from the device.
            UnavailableError: when the child has ended.
        """
        if self._process is None:
            self._start()
        self._ask({"action": list(action), "scale": scale})

    def restart(self) -> None:
        """See Image."""
        self.close()

    def close(self) -> None:
        """See Image."""
        process, self._process = self._process, None
        if process is None:
            return
        if self.engine is not None:
            self.engine.child_ends()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()


# ---- the child -------------------------------------------------------------------------------------------------------


def _report(model: Model) -> dict[str, Any]:
    engine = model.ane
    if engine is None:
        return {}
    return {
        "stats": list(engine.stats()),
        "activations": engine.activations(),
        "exponents": engine.exponents(),
        "sums": [[name, row, ns] for (name, row), ns in read_sums().items()],
        "modelled_ms": engine.device.counters()["modelled_ms"],
    }


def _set_up(hello: Mapping[str, Any]) -> tuple[Model, LocalImage]:
    from anellm.config import ModelConfig
    from anellm.device import AneOptions, set_threads
    from anellm.model import Model

    set_threads(hello["threads"])
    config = ModelConfig.from_dict(hello["config"])
    options = None if hello["options"] is None else AneOptions(**hello["options"])
    model = Model(config, hello["device"], seed=None, ane=options)
    model.set_dtype(hello["dtype"])
    model.set_activation_checkpoint(hello["policy"])
    share(model, hello["fd"], DATA_OFFSET, load=True)
    batch_size, seq_len, n_micro = hello["shape"]
    stages = Stages(model, batch_size, seq_len, n_micro, hello["starts"], hello["fd"], DATA_OFFSET)
    if hello["ids"] is not None:
        model.compact_vocabulary(np.array(hello["ids"], np.int32))
    check(lib.anellm_trace_count(1))
    if model.ane is not None:
        model.ane.set_exponents(hello["exponents"])
    return model, LocalImage(model, stages)


def main() -> int:
    """Do what the process that started this one asks for, line by line, until it closes the pipe."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed must not come between the replies
    warnings.simplefilter("ignore")  # the parent warns
    model: Model | None = None
    for line in sys.stdin.buffer:
        reply: dict[str, Any] = {}
        try:
            request = json.loads(line)
            if model is None:
                model, image = _set_up(request)
            else:
                action = Action(*request["action"])
                if action.kind == "compile":
                    model.weights_changed()  # by the parent
                image.perform(action, request["scale"])
        except errors.AnellmError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
        if model is not None:
            reply |= _report(model)
        out.write(json.dumps(reply).encode() + b"\n")
        out.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
