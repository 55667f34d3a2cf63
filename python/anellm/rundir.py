"""A run directory: who may write to it, what describes it, and where training goes on from.

config.toml (the resolved options), manifest.json (versions, machine, command, data), metrics.jsonl, best.json,
``step_XXXXXXXX/`` checkpoints, and run.lock, which one process holds at a time.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anellm import checkpoint, metrics, safeio, saferead
from anellm.checkpoint import Checkpoint
from anellm.config import TrainConfig
from anellm.errors import CheckpointError, ConfigError
from anellm.options import from_mapping, to_toml

CONFIG, MANIFEST, LOCK = "config.toml", "manifest.json", "run.lock"
AUTO = "auto"
RUNS = Path("runs")


class RunDirectory:
    """An open run directory: its lock is held until close().

    Attributes:
        path: the directory.
        resumed: the checkpoint that training goes on from, or None.
        last_saved: the step of the checkpoint that holds the present state, or None.
        damaged: why newer checkpoints than ``resumed`` were passed over.
    """

    def __init__(self, path: str | Path, resume: str | None = None, *, lock: int | None = None) -> None:
        """Open or make a run directory.

        Args:
            path: the directory.
            resume: None for a new run; "auto" to go on from the newest whole checkpoint of this directory, or start
                where there is none; or the path of a checkpoint or run to go on from.
            lock: what hand_over() gave, in a process that goes on with a run in the middle: nothing is looked for.

        Raises:
            ConfigError: when there is another run or other files in it and resume is None, or when it has newer
                checkpoints than the one to resume.
            InvalidError: when a link or special file stands where one of the run's files belongs.
            CheckpointError: when the checkpoint to resume is not whole.
            BusyError: when another process trains there.
        """
        self.path = Path(path)
        self.damaged: list[str] = []
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path}: expected a folder or nothing, found a file")
        self._manifest: dict[str, Any] = {}
        self._metrics: metrics.MetricsWriter | None = None
        self.last_saved: int | None = None
        self.resumed: Checkpoint | None = None
        if lock is not None:
            self._lock = safeio.Lock.adopt(self.path / LOCK, lock)
            return
        self._check_foreign()
        self._check_kinds()
        safeio.make_directory(self.path)
        self._lock = safeio.Lock(self.path / LOCK, f"run {self.path}")
        try:
            safeio.sweep(self.path)
            self.resumed = self._find(resume)
        except BaseException:
            self._lock.close()
            raise

    def _check_foreign(self) -> None:
        """Refuse a folder that holds something and is no run directory: nothing in it is touched.

        A run directory has checkpoints, or the lock (it is made first) with a config.toml that is ours or none yet.
        """
        if not self.path.is_dir():
            return
        read_config(self.path)
        if checkpoint.list_steps(self.path):
            return
        names = {p.name for p in self.path.iterdir() if not safeio.is_temporary(p.name)}
        if LOCK in names and CONFIG in names:
            return
        other = sorted(names - ({LOCK, MANIFEST, metrics.NAME} if LOCK in names else set()))
        if other:
            raise ConfigError(f"--out {self.path}: expected a new or empty folder or a run, found {other[0]!r} in it")

    def _check_kinds(self) -> None:
        """Refuse links and special files where the run's own files belong."""
        for name in (LOCK, CONFIG, MANIFEST, metrics.NAME, checkpoint.BEST):
            safeio.check_replaceable(self.path / name)
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if checkpoint.STEP_DIR.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                found = saferead.kind_of(path.lstat().st_mode)
                raise ConfigError(f"--out {self.path}: {path.name}: expected a folder, found a {found}")

    def _find(self, resume: str | None) -> Checkpoint | None:
        steps = checkpoint.list_steps(self.path)
        if resume is None:
            if steps or (self.path / CONFIG).is_file():
                raise ConfigError(
                    f"--out {self.path}: there is a run in it already; go on with --resume, or name another folder"
                )
            return None
        if resume == AUTO or (self.path.is_dir() and Path(resume).resolve() == self.path.resolve()):
            newest = checkpoint.find_checkpoint(self.path, self.damaged)
            if newest is None and steps:
                raise CheckpointError(
                    f"{self.path}: expected a whole checkpoint to resume, found {len(steps)} damaged: {self.damaged[0]}"
                )
            return None if newest is None else checkpoint.open_checkpoint(newest)
        source = resume_source(resume)
        if source is None:
            raise CheckpointError(f"--resume {resume}: expected a checkpoint or a run that has one, found none")
        found = checkpoint.open_checkpoint(source)
        own = found.path.resolve().parent == self.path.resolve()
        newer = [step for step in steps if step > found.step or (step == found.step and not own)]
        if newer:
            raise ConfigError(
                f"--resume {resume}: {self.path} has a checkpoint (step {newer[-1]}) that is not older than that one "
                f"(step {found.step}); give another --out to go on from there without losing it"
            )
        return found

    @contextlib.contextmanager
    def _writing(self, what: str, how: str = "written") -> Iterator[None]:
        """Turn the system's refusal into a line that says what is still there.

        Raises:
            CheckpointError: in place of an OSError.
        """
        try:
            yield
        except OSError as error:
            try:
                kept = checkpoint.find_checkpoint(self.path)
            except OSError:  # not even that works now
                kept = None if self.last_saved is None else checkpoint.step_dir(self.path, self.last_saved)
            raise CheckpointError(
                f"{self.path}: {what} could not be {how}: {error.strerror or error}; "
                + (f"the run keeps {kept.name}" if kept else "there is no older checkpoint")
            ) from error

    def begin(
        self,
        config: TrainConfig,
        manifest: Mapping[str, Any],
        tokenizer: Mapping[str, bytes] | None = None,
        *,
        step: int | None = None,
    ) -> None:
        """Write config.toml, manifest.json and the tokenizer, and cut metrics.jsonl back to where training goes on.

        Args:
            config: the resolved options.
            manifest: what describes this run besides; versions and the machine are added.
            tokenizer: content of the tokenizer's files by name, where it is known.
            step: where training goes on, when that is not the checkpoint that was found.

        Raises:
            CheckpointError: when the system refuses; says which checkpoint is still there.
        """
        if step is None:
            step = -1 if self.resumed is None else self.resumed.step
        text = f"# The options of this run; `anellm train --config {CONFIG} --out ANOTHER` repeats it.\n" + to_toml(
            config
        )
        with self._writing(CONFIG):
            safeio.write_bytes(self.path / CONFIG, text.encode())
        self._manifest = {**describe_machine(), **manifest}
        self.amend_manifest({})
        with self._writing("the tokenizer"):
            for name, content in (tokenizer or {}).items():
                safeio.write_bytes(self.path / name, content)
        with self._writing(metrics.NAME):
            metrics.cut(self.path, step)
            self._metrics = metrics.MetricsWriter(self.path)
        if self.resumed is not None and self.resumed.path == checkpoint.step_dir(self.path, self.resumed.step):
            self.last_saved = self.resumed.step

    def go_on(self, last_saved: int | None) -> None:
        """Take over from another process that has begun, or gone on with, this run.

        Args:
            last_saved: of that process's RunDirectory.

        Raises:
            CheckpointError: when the system refuses, or manifest.json is damaged.
        """
        self._manifest = saferead.read_json(self.path / MANIFEST, CheckpointError)
        with self._writing(metrics.NAME):
            self._metrics = metrics.MetricsWriter(self.path)
        self.last_saved = last_saved

    def hand_over(self) -> int:
        """Return the descriptor of the lock for the program that replaces this one by exec(); metrics are closed."""
        if self._metrics is not None:
            self._metrics.close()
        return self._lock.hand_over()

    def amend_manifest(self, values: Mapping[str, Any]) -> None:
        """Write manifest.json again, with more in it; after begin().

        Raises:
            CheckpointError: when the system refuses; says which checkpoint is still there.
        """
        self._manifest |= values
        with self._writing(MANIFEST):
            safeio.write_bytes(self.path / MANIFEST, safeio.json_bytes(self._manifest))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl.

        Raises:
            CheckpointError: when the system refuses; says which checkpoint is still there.
        """
        if self._metrics is not None:
            with self._writing(metrics.NAME):
                self._metrics.write(record)

    def save(self, step: int, model: Any, state: Mapping[str, Any], more: Mapping[str, bytes] | None) -> Path:
        """Write the checkpoint of a step; see checkpoint.save().

        Raises:
            CheckpointError: when the system refuses (a full disk, say); says which checkpoint is still there.
            NonFiniteError: when a weight or moment is inf or NaN.
        """
        with self._writing(f"the checkpoint of step {step}"):
            if self._metrics is not None:  # so that a checkpoint on the disk has its records there
                self._metrics.sync()
            path = checkpoint.save(self.path, step, model, state, more)
        self.last_saved = step
        return path

    def retain(self, config: TrainConfig, best_step: int | None, best_val_loss: float | None) -> None:
        """Note the best checkpoint and remove those that the retention rule gives up.

        Raises:
            CheckpointError: when the system refuses; says which checkpoint is still there.
        """
        if best_step is not None and best_val_loss is not None:
            with self._writing(checkpoint.BEST):
                there = (checkpoint.step_dir(self.path, best_step) / checkpoint.MANIFEST).is_file()
                if there and checkpoint.read_best(self.path) != best_step:
                    checkpoint.write_best(self.path, best_step, best_val_loss)
        with self._writing("an old checkpoint", "removed"):
            checkpoint.prune(self.path, config.keep_last, config.keep_every, best_step, self.last_saved)

    def close(self) -> None:
        """Close the metrics and free the lock; calling it again does nothing."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # what the checkpoints rest on was synced with them
                self._metrics.close()
        self._lock.close()


def resume_source(resume: str) -> Path | None:
    """Return the checkpoint directory that ``--resume PATH`` means, or None when there is none."""
    path = Path(resume)
    if (path / checkpoint.MANIFEST).is_file():
        return path
    return checkpoint.find_checkpoint(path)


def resume_path(resume: str, out: str | None) -> Path | None:
    """Return the checkpoint directory that training would go on from, or None; nothing is locked or written."""
    if resume != AUTO:
        return resume_source(resume)
    return None if out is None else checkpoint.find_checkpoint(Path(out))


def run_of(path: Path) -> Path:
    """Return the run directory that a checkpoint or run path belongs to."""
    path = path.resolve()
    return path.parent if (path / checkpoint.MANIFEST).is_file() and (path.parent / CONFIG).is_file() else path


def newest_run(root: Path = RUNS) -> Path | None:
    """Return the run below a folder that was begun or resumed last, or None."""
    if not root.is_dir():
        return None
    files = [p / CONFIG for p in root.iterdir() if (p / CONFIG).is_file()]
    return max(files, key=lambda file: file.stat().st_mtime_ns).parent if files else None


def new_run_path(name: str, root: Path = RUNS) -> Path:
    """Return a run directory's path that does not exist yet, from a name and the time."""
    base = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = root / base, 1
    while path.exists():
        number += 1
        path = root / f"{base}-{number}"
    return path


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the options that a run directory was made with, or nothing when it has none.

    Raises:
        ConfigError: when its config.toml is damaged.
    """
    path = run_dir / CONFIG
    if not os.path.lexists(path):
        return {}
    try:
        data = saferead.read_toml(path, ConfigError)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    return from_mapping(TrainConfig, data, str(path))


def describe_machine() -> dict[str, Any]:
    """Return what manifest.json says about versions and the machine."""
    import numpy as np

    import anellm
    from anellm._ffi import lib, text

    return {
        "anellm": anellm.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu_variant": text(lib.anellm_cpu_variant()),
        "threads": int(lib.anellm_get_threads()),
        "command": list(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
