"""A training run by a plan: each process compiles one group's programs at a time, and the state outlives it.

docs/pipeline.md has the order of a step, what survives, and what happens after a kill.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from anellm import safeio
from anellm.errors import CheckpointError, DeviceError, InternalError, TornStateError
from anellm.image import ChildImage, Handover, Image, LocalImage, Restart, new_nonce
from anellm.pipeline import COMPILE_LIMIT, CompileBudget, plan
from anellm.pipeline_schedule import Schedule, ScheduleState, in_new_process
from anellm.stages import Stages, infer_on_cpu, share
from anellm.state_file import DATA_OFFSET, Commit, StateFile, StateKey

if TYPE_CHECKING:
    from anellm.ane import ModelEngine
    from anellm.config import TrainConfig
    from anellm.model import Model

STATE_FILE: Final = "state.arena"
MAX_IDLE: Final = 3  # images in a row that got nothing done: the next one is refused
_WITHOUT: Final = "without that file the run goes on from its last checkpoint"
_KEYS: Final = {"run", "pipeline"}
_OURS: Final[dict[str, type]] = {
    "in_step": bool,
    "nonce": str,
    "restarts": int,
    "restart_seconds": float,
    "compiles": int,
}

Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
Values = Callable[[], Mapping[str, Any]]


class PipelineRun:
    """Do a run's forward and backward by a plan, in as many processes as that takes.

    Attributes:
        plan: the groups, and what a process may compile.
        image: number of this image in the run, from 1.
        nonce: its name.
        restarts: images that ended for want of compilations, so far in the run.
        engine: the Neural Engine that trains, or what tells of that in a child process; None: the CPU trains.
        on_image_end: is called when an image is about to end for want of compilations.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        folder: Path | None,
        *,
        handover: Handover | None = None,
        replace: bool = False,
    ) -> None:
        """Prepare; load() or the first gradients() make the state file.

        Args:
            model: the model; from now on only training computes on its device.
            config: the resolved options.
            folder: where the state file stands; None: a temporary folder.
            handover: what the image before this one left.
            replace: a new image replaces this process, by raising Restart; else child processes compute.
        """
        limit = COMPILE_LIMIT if config.compile_budget is None else config.compile_budget
        budget = CompileBudget(limit, config.compile_headroom)
        self.plan = plan(model.config, budget)
        self._schedule = Schedule(self.plan, config.gradient_accumulation_steps)
        self._n_micro = config.gradient_accumulation_steps
        shape = config.batch_size, int(config.seq_len or 0), self._n_micro
        self._key = StateKey(model.config, *shape, self.plan.boundaries)
        self._model, self._handover = model, handover
        self._child = None if replace else ChildImage(model)
        self.engine: ModelEngine | None = model.ane if self._child is None else cast("ModelEngine", self._child.engine)
        self.on_image_end: Callable[[], None] = lambda: None
        self._temporary = None if folder is not None else tempfile.TemporaryDirectory(prefix="anellm-")
        self.path = (Path(self._temporary.name) if self._temporary is not None else Path(str(folder))) / STATE_FILE
        self._file: StateFile | None = None
        self._stages: Stages | None = None
        self._worker: Image | None = None
        self._state = ScheduleState()
        self._in_step = False
        self._idle = 1
        self._start = time.perf_counter()
        self._actions = 0
        self.image, self.nonce = 1, new_nonce() if handover is None else handover.nonce
        self.restarts, self._restart_seconds, self._compiles = 0, 0.0, 0
        self._startup = 0.0
        infer_on_cpu(model)

    # ---- the state file ---------------------------------------------------------------------------------------------

    def load(self, oldest: int) -> Mapping[str, Any] | None:
        """Open the state file, if there is one of the run; return what was stored with it, for accept() to go on with.

        Args:
            oldest: the step of the newest checkpoint: an older state is of no use.

        Raises:
            TornStateError: when its process was stopped while it changed the state.
            CheckpointError: when it is damaged, or not of this run.
            DeviceError: when too many images in a row got nothing done.
        """
        if not os.path.lexists(self.path):
            if self._handover is not None:
                raise CheckpointError(f"{self.path}: expected the state of image {self.nonce}, found nothing")
            return None
        try:
            file = StateFile.open(self.path, self._key)
        except TornStateError:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {_WITHOUT}") from None
        try:
            commit = file.commit
            if commit.words[0] < oldest:
                file.close()
                return None
            values = self._read(commit)
            self._check_idle(commit)
        except BaseException:
            file.close()
            raise
        self._file = file
        return values

    @property
    def step(self) -> int:
        """Return the steps that are done."""
        return self._state.step

    def accept(self) -> None:
        """Go on from what load() found: its file becomes the memory of the model."""
        if self._file is None:
            raise InternalError("no state was loaded")
        commit = self._file.commit
        self._attach(self._file, load=True)
        self.image, self._idle = commit.images + 1, commit.idle_images + 1
        if self._handover is not None:
            self._startup = time.monotonic() - self._handover.began
            self._restart_seconds += self._startup
        self._commit(self._state, commit.values["run"])

    def _check_idle(self, commit: Commit) -> None:
        if commit.idle_images >= MAX_IDLE:
            raise DeviceError(
                f"{self.path}: {commit.idle_images} processes in a row got nothing done in step "
                f"{self._state.step + 1}, phase {self._state.phase}: not tried again, since what is compiled in vain "
                f"can exhaust the system's compiler; {_WITHOUT}"
            )

    def _read(self, commit: Commit) -> Mapping[str, Any]:
        """Take over what a commit says about the plan; return what it says about the run."""
        where = f"{self.path}: values"
        if commit.values.keys() != _KEYS:
            raise CheckpointError(f"{where}: expected the keys {', '.join(sorted(_KEYS))}")
        ours, values = commit.values["pipeline"], commit.values["run"]
        if not isinstance(ours, dict) or ours.keys() != _OURS.keys() or not isinstance(values, dict):
            raise CheckpointError(f"{where}: pipeline: expected the keys {', '.join(_OURS)}")
        for name, kind in _OURS.items():
            found = ours[name]
            if type(found) is not kind or (isinstance(found, (int, float)) and not 0 <= found < 2**53):
                raise CheckpointError(f"{where}: {name}: expected a {kind.__name__} from 0, found {found!r:.80}")
        if self._handover is not None and ours["nonce"] != self._handover.nonce:
            raise CheckpointError(f"{where}: nonce: expected {self._handover.nonce}, found {ours['nonce']!r:.80}")
        try:
            self._state = in_new_process(self._schedule.read(commit.words))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        self._in_step = ours["in_step"]
        self.restarts, self._restart_seconds = ours["restarts"], ours["restart_seconds"]
        self._compiles = ours["compiles"]
        return values

    def _attach(self, file: StateFile, *, load: bool) -> None:
        """Let the file be the model's memory."""
        share(self._model, file.fd, DATA_OFFSET, load=load)
        key = self._key
        self._stages = Stages(self._model, key.batch_size, key.seq_len, key.n_micro, key.starts, file.fd, DATA_OFFSET)
        self._file = file
        if self._child is not None:
            self._child.file = file
        self._worker = self._child or LocalImage(self._model, self._stages)

    def reduce_classifier(self, ids: np.ndarray[Any, Any]) -> None:
        """Let what computes reduce its classifier as the model's is."""
        if self._child is not None:
            self._child.ids = ids

    def _values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        ours = {
            "in_step": self._in_step,
            "nonce": self.nonce,
            "restarts": self.restarts,
            "restart_seconds": self._restart_seconds,
            "compiles": self._compiles,
        }
        return {"run": dict(values), "pipeline": ours}

    def _commit(self, state: ScheduleState, values: Mapping[str, Any], *, synced: bool = False) -> None:
        if self._file is None:
            return
        self._state = state
        self._file.store(Commit(0, tuple(state), self.image, self._idle, self._values(values), synced))

    # ---- a step -----------------------------------------------------------------------------------------------------

    def gradients(self, step: int, batch: Callable[[int], Batch], scale: float, values: Values) -> list[float]:
        """Compute the gradients of a step, or what is left of it; return the loss of each micro-batch.

        Args:
            step: steps that are done.
            batch: returns a micro-batch's tokens and targets.
            scale: multiplies the mean of the losses.
            values: returns what the run needs to go on from here, JSON-serialisable.

        Raises:
            Restart: when this process is to be replaced; the state is on the disk.
            CompileError, UnsupportedError, EvalError, NonFiniteError: from the device.
            CheckpointError: when there is no room for the state.
        """
        if self._file is None:
            self._state = ScheduleState(step)
            made = self._create(values())
            made.begin_work()
            self._attach(made, load=False)
            self._commit(self._state, values())
        file, stages, worker = self._file, self._stages, self._worker
        if file is None or stages is None or worker is None:
            raise InternalError("a run by a plan without its state")
        if not self._in_step:
            for micro in range(self._n_micro):
                stages.batch(micro, *batch(micro))
            self._in_step = True
            self._commit(self._state, values())
        while (action := self._schedule.action(self._state)).kind != "update":
            after = self._schedule.after(self._state)
            if action.kind == "restart":
                self._restart(worker, after, values)
                continue
            if action.kind == "backward":  # all else can be done again
                file.begin_work()
            worker.perform(action, scale / self._n_micro)
            if action.kind == "compile":
                self._compiles += after.compiles - self._state.compiles
            else:
                self._idle = 0
            self._actions += 1
            self._commit(after, values())
        return [stages.loss(micro) for micro in range(self._n_micro)]

    def _create(self, values: Mapping[str, Any]) -> StateFile:
        try:
            return StateFile.create(self.path, self._key, self._state, self._values(values))
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {self._key.file_bytes} bytes for the state of the run could not be written: "
                f"{error.strerror or error}"
            ) from error

    def begin_update(self) -> None:
        """Say that weights and moments are about to be changed."""
        if self._file is not None:
            self._file.begin_work()

    def end_step(self, values: Mapping[str, Any]) -> None:
        """Say that a step is done, or was skipped, with all that comes behind it."""
        self._in_step = False
        self._commit(ScheduleState(self._state.step + 1, compiles=self._state.compiles), values)

    def _restart(self, worker: Image, after: ScheduleState, values: Values) -> None:
        """Go on in a new image."""
        self.restarts += 1
        try:
            worker.restart()
        except Restart as restart:
            self.on_image_end()
            self.nonce, ended = restart.nonce, self.nonce
            self._commit(after, values(), synced=True)
            self.nonce = ended
            raise
        self.on_image_end()
        self.image, self.nonce = self.image + 1, new_nonce()
        self._start, self._actions = time.perf_counter(), 0
        self._commit(after, values())

    # ---- reports ----------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Return what metrics.jsonl says about this image at its end."""
        return {
            "image": self.image,
            "nonce": self.nonce,
            "actions": self._actions,
            "compiles": self._state.compiles,
            "seconds": time.perf_counter() - self._start,
            "startup_seconds": self._startup,
        }

    def summary(self) -> dict[str, Any]:
        """Return what the run's summary says about its images."""
        return {
            "images": self.image,
            "restarts": self.restarts,
            "restart_seconds": self._restart_seconds,
            "compiles": self._compiles,
            "groups": len(self.plan.groups),
        }

    # ---- the end ----------------------------------------------------------------------------------------------------

    def close(self, *, done: bool = False) -> None:
        """Let go of the file and of what computes.

        Args:
            done: a checkpoint holds the state: the file is removed.
        """
        infer_on_cpu(self._model, on=False)
        if self._worker is not None:
            self._worker.close()
        if self._file is not None:
            self._file.close()
            self._file = None
        if done and os.path.lexists(self.path):
            self.path.unlink()
            safeio.fsync_dir(self.path.parent)
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.cleanup()
