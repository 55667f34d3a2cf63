"""A run directory: who may write to it, what describes it, and where training goes on from.

config.toml (the resolved options), manifest.json (versions, machine, command, data), metrics.jsonl, best.json,
``step_XXXXXXXX/`` checkpoints, and run.lock, which one process holds at a time.
"""

from __future__ import annotations

import platform
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anellm import checkpoint, metrics, safeio
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
    """

    def __init__(self, path: str | Path, resume: str | None = None) -> None:
        """Open or make a run directory.

        Args:
            path: the directory.
            resume: None for a new run; "auto" to go on from the newest whole checkpoint of this directory, or start
                where there is none; or the path of a checkpoint or run to go on from.

        Raises:
            ConfigError: when there is another run or other files in it and resume is None, or when it has newer
                checkpoints than the one to resume.
            CheckpointError: when the checkpoint to resume is not whole.
            BusyError: when another process trains there.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path}: expected a folder or nothing, found a file")
        self._check_foreign()
        safeio.make_directory(self.path)
        self._lock = safeio.Lock(self.path / LOCK, f"run {self.path}")
        self._metrics: metrics.MetricsWriter | None = None
        self.last_saved: int | None = None
        try:
            safeio.sweep(self.path)
            self.resumed = self._find(resume)
        except BaseException:
            self._lock.close()
            raise

    def _check_foreign(self) -> None:
        """Refuse a folder that holds something and is no run directory."""
        if not self.path.is_dir() or (self.path / CONFIG).is_file() or checkpoint.list_steps(self.path):
            return
        names = {p.name for p in self.path.iterdir() if not p.name.startswith((safeio.TMP, safeio.TRASH))}
        other = sorted(names - {LOCK, MANIFEST, metrics.NAME})
        if other:
            raise ConfigError(f"--out {self.path}: expected a new or empty folder or a run, found {other[0]} in it")

    def _find(self, resume: str | None) -> Checkpoint | None:
        steps = checkpoint.list_steps(self.path)
        if resume is None:
            if steps or (self.path / CONFIG).is_file():
                raise ConfigError(
                    f"--out {self.path}: there is a run in it already; go on with --resume, or name another folder"
                )
            return None
        if resume == AUTO:
            newest = checkpoint.find_checkpoint(self.path)
            if newest is None and steps:
                raise CheckpointError(f"{self.path}: expected a whole checkpoint to resume, found {len(steps)} damaged")
            return None if newest is None else checkpoint.open_checkpoint(newest)
        source = resume_source(resume)
        if source is None:
            raise CheckpointError(f"--resume {resume}: expected a checkpoint or a run that has one, found none")
        found = checkpoint.open_checkpoint(source)
        newer = [step for step in steps if step > found.step]
        if newer:
            raise ConfigError(
                f"--resume {resume}: {self.path} has a newer checkpoint (step {newer[-1]}) than step {found.step}; "
                f"give another --out to go on from there without losing it"
            )
        return found

    def begin(self, config: TrainConfig, manifest: Mapping[str, Any]) -> None:
        """Write config.toml and manifest.json, and cut metrics.jsonl back to where training goes on.

        Args:
            config: the resolved options.
            manifest: what describes this run besides; versions and the machine are added.
        """
        text = f"# The options of this run; `anellm train --config {CONFIG} --out ANOTHER` repeats it.\n" + to_toml(
            config
        )
        safeio.write_bytes(self.path / CONFIG, text.encode())
        safeio.write_bytes(self.path / MANIFEST, safeio.json_bytes({**describe_machine(), **manifest}))
        metrics.cut(self.path, -1 if self.resumed is None else self.resumed.step)
        self._metrics = metrics.MetricsWriter(self.path)
        if self.resumed is not None and self.resumed.path == checkpoint.step_dir(self.path, self.resumed.step):
            self.last_saved = self.resumed.step

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(record)

    def save(self, step: int, model: Any, state: Mapping[str, Any], tokenizer: bytes | None) -> Path:
        """Write the checkpoint of a step.

        Raises:
            CheckpointError: when the system refuses (a full disk, say); says which checkpoint is still there.
            NonFiniteError: when a weight or moment is inf or NaN.
        """
        try:
            path = checkpoint.save(self.path, step, model, state, tokenizer)
        except OSError as error:
            kept = checkpoint.find_checkpoint(self.path)
            raise CheckpointError(
                f"{self.path}: the checkpoint of step {step} could not be written: {error.strerror or error}; "
                + (f"the run keeps {kept.name}" if kept else "there is no older checkpoint")
            ) from error
        self.last_saved = step
        return path

    def retain(self, config: TrainConfig, best_step: int | None, best_val_loss: float | None) -> None:
        """Note the best checkpoint and remove those that the retention rule gives up."""
        if best_step is not None and best_val_loss is not None:
            there = (checkpoint.step_dir(self.path, best_step) / checkpoint.MANIFEST).is_file()
            if there and checkpoint.read_best(self.path) != best_step:
                checkpoint.write_best(self.path, best_step, best_val_loss)
        checkpoint.prune(self.path, config.keep_last, config.keep_every, best_step)

    def close(self) -> None:
        """Close the metrics and free the lock; calling it again does nothing."""
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()


def resume_source(resume: str) -> Path | None:
    """Return the checkpoint directory that ``--resume PATH`` means, or None when there is none."""
    path = Path(resume)
    if (path / checkpoint.MANIFEST).is_file():
        return path
    return checkpoint.find_checkpoint(path)


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
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
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
