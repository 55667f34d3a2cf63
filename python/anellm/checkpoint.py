"""Checkpoints: write one atomically, verify it, find the newest that is whole, load it, and prune the rest.

``step_00000100/`` is a Hugging Face directory (config.json, model.safetensors) with what training needs besides:
optimizer.safetensors (AdamW's moments as ``m.<tensor>`` and ``v.<tensor>``), state.json, tokenizer.bin where it is
known, and checkpoint.json, written last, with the size and SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anellm import safeio
from anellm.errors import CheckpointError, NonFiniteError
from anellm.weights_hf import write_safetensors

if TYPE_CHECKING:
    from anellm.model import Model

FORMAT = 1
MANIFEST, STATE, BEST = "checkpoint.json", "state.json", "best.json"
MODEL, MODEL_CONFIG, OPTIMIZER, TOKENIZER = "model.safetensors", "config.json", "optimizer.safetensors", "tokenizer.bin"
_REQUIRED = {MODEL, MODEL_CONFIG, OPTIMIZER, STATE}
_STEP_DIR = re.compile(r"step_(\d{8,})")
_CHUNK = 4 << 20
_FINITE_CHUNK = 1 << 20


def step_dir(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step stands."""
    return run_dir / f"step_{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint directory, ascending; whether they are whole is verify()'s business."""
    if not run_dir.is_dir():
        return []
    found = (_STEP_DIR.fullmatch(p.name) for p in run_dir.iterdir() if p.is_dir() and not p.is_symlink())
    return sorted(int(m[1]) for m in found if m)


# ---- writing -----------------------------------------------------------------------------------------------------


def _check_finite(tensors: Mapping[str, np.ndarray[Any, Any]], what: str) -> None:
    for name, array in tensors.items():
        flat = array.reshape(-1)
        for start in range(0, flat.size, _FINITE_CHUNK):
            if not np.isfinite(flat[start : start + _FINITE_CHUNK]).all():
                raise NonFiniteError(f"{what} {name} holds inf or NaN: not saved")


def save(run_dir: Path, step: int, model: Model, state: Mapping[str, Any], tokenizer: bytes | None = None) -> Path:
    """Write the checkpoint of a step: complete and synced under its name, or not there at all.

    Args:
        run_dir: the run directory.
        step: updates done.
        model: a model with training enabled.
        state: what state.json holds, JSON-serialisable.
        tokenizer: content of tokenizer.bin, where it is known.

    Returns:
        The checkpoint's directory.

    Raises:
        NonFiniteError: when a weight or moment is inf or NaN; nothing is written.
        OSError: from the system, e.g. on a full disk; the older checkpoints are untouched.
    """
    moments = {f"m.{name}": array for name, array in model.moments_m.items()}
    moments |= {f"v.{name}": array for name, array in model.moments_v.items()}
    _check_finite(model.params, "weight")
    _check_finite(moments, "moment")
    target = step_dir(run_dir, step)
    with safeio.atomic_directory(target) as folder:
        with folder.file(MODEL) as file:
            write_safetensors(file, model.params)
        folder.write_bytes(MODEL_CONFIG, safeio.json_bytes(model.config.to_hf()))
        with folder.file(OPTIMIZER) as file:
            write_safetensors(file, moments)
        folder.write_bytes(STATE, safeio.json_bytes(state))
        if tokenizer is not None:
            folder.write_bytes(TOKENIZER, tokenizer)
        folder.write_bytes(MANIFEST, safeio.json_bytes({"format": FORMAT, "step": step, "files": dict(folder.files)}))
    return target


def prune(run_dir: Path, keep_last: int, keep_every: int, best_step: int | None) -> list[int]:
    """Remove the checkpoints that the retention rule gives up, and return their steps.

    Kept are the newest ``keep_last``, every step that is a multiple of ``keep_every`` (0: none for that reason), and
    the best.
    """
    steps = list_steps(run_dir)
    keep = set(steps[-keep_last:])
    if best_step is not None:
        keep.add(best_step)
    if keep_every:
        keep.update(step for step in steps if step % keep_every == 0)
    gone = [step for step in steps if step not in keep]
    for step in gone:
        safeio.remove(step_dir(run_dir, step))
    return gone


def write_best(run_dir: Path, step: int, val_loss: float) -> None:
    """Note which checkpoint is the best one."""
    safeio.write_bytes(run_dir / BEST, safeio.json_bytes({"step": step, "val_loss": val_loss}))


def read_best(run_dir: Path) -> int | None:
    """Return the step of the best checkpoint, or None when there is no usable note of it."""
    try:
        step = safeio.read_json(run_dir / BEST, CheckpointError).get("step")
    except CheckpointError:
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


# ---- verifying and finding ---------------------------------------------------------------------------------------


def _digest(path: Path, size: Any) -> str:
    """Return the SHA-256 of a regular file of a known size.

    Raises:
        CheckpointError: when it is missing, not a regular file, or of another size.
    """
    with safeio.open_regular(path, CheckpointError) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise CheckpointError(f"{path}: size: expected {size} bytes by {MANIFEST}, found {found}")
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path) -> int:
    """Check that a checkpoint directory is whole, every byte of it, and return its step.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.
    """
    manifest = safeio.read_json(path / MANIFEST, CheckpointError)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format: expected {FORMAT}, found {manifest.get('format')!r}")
    step, files = manifest.get("step"), manifest.get("files")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"{path / MANIFEST}: step: expected a number of at least 0, found {step!r}")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointError(f"{path / MANIFEST}: files: expected an object of objects")
    missing = sorted(_REQUIRED - files.keys())
    if missing:
        raise CheckpointError(f"{path / MANIFEST}: files: {missing[0]} is missing")
    for name, entry in files.items():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(f"{path / MANIFEST}: files: expected plain names, found {name!r}")
        found = _digest(path / name, entry.get("size"))
        if found != entry.get("sha256"):
            raise CheckpointError(
                f"{path / name}: SHA-256: expected {entry.get('sha256')} by {MANIFEST}, found {found}"
            )
    return step


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint directory verifies."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def find_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run that verifies, or None when there is none."""
    candidates = (step_dir(run_dir, step) for step in reversed(list_steps(run_dir)))
    return next((path for path in candidates if is_whole(path)), None)


def resolve_model_path(path: str | Path) -> Path:
    """Return the model that a path means: of a run directory its best checkpoint, else its newest; others as they are.

    Raises:
        CheckpointError: when a run directory has no whole checkpoint.
    """
    path = Path(path)
    if not path.is_dir() or (path / MODEL_CONFIG).is_file():
        return path
    steps = list_steps(path)
    if not steps and not (path / "config.toml").is_file():
        return path
    best = read_best(path)
    if best in steps and is_whole(step_dir(path, best)):
        return step_dir(path, best)
    newest = find_checkpoint(path)
    if newest is None:
        raise CheckpointError(f"{path}: expected a run with a whole checkpoint, found none")
    return newest


# ---- loading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified.

    Attributes:
        path: its directory.
        step: updates done.
        state: content of state.json.
    """

    path: Path
    step: int
    state: dict[str, Any]


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint and return it.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.
    """
    step = verify(path)
    return Checkpoint(path, step, safeio.read_json(path / STATE, CheckpointError))


def _tensors(path: Path, expected: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the tensors of a safetensors file, after checking that they are the expected ones."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if names != expected.keys():
                wrong = min(names ^ expected.keys())
                raise CheckpointError(f"{path}: tensors: expected the model's, found {wrong!r} on one side only")
            for name, array in expected.items():
                found = file.get_slice(name)
                if found.get_dtype() != "F32" or tuple(found.get_shape()) != array.shape:
                    raise CheckpointError(
                        f"{path}: {name}: expected F32 {array.shape}, "
                        f"found {found.get_dtype()} {tuple(found.get_shape())}"
                    )
            for name in expected:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_tensors(checkpoint: Checkpoint, model: Model) -> None:
    """Copy a checkpoint's weights and moments into a model of the same shape with training enabled.

    Raises:
        CheckpointError: when the checkpoint is of another shape; the model may then be partly overwritten.
    """
    moments = {f"m.{name}": array for name, array in model.moments_m.items()}
    moments |= {f"v.{name}": array for name, array in model.moments_v.items()}
    for name, array in _tensors(checkpoint.path / MODEL, model.params):
        model.params[name][...] = array
    for name, array in _tensors(checkpoint.path / OPTIMIZER, moments):
        moments[name][...] = array
    model.weights_changed()
