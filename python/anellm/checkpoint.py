"""Checkpoints: write one atomically, verify it, find the newest that is whole, load it, and prune the rest.

``step_00000100/`` is a Hugging Face directory (config.json, model.safetensors) with what training needs besides:
optimizer.safetensors (AdamW's moments as ``m.<tensor>`` and ``v.<tensor>``), state.json, the tokenizer's files
where it is known, ane.json where a Neural Engine computed (ane_run.py), and checkpoint.json, written last, with the
size and SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anellm import hf_layout, safeio, saferead
from anellm.errors import CheckpointError, DataError, NonFiniteError
from anellm.weights_hf import read_header, write_safetensors

if TYPE_CHECKING:
    from anellm.model import Model

FORMAT = 1
MANIFEST, STATE, BEST = "checkpoint.json", "state.json", "best.json"
MODEL, MODEL_CONFIG, OPTIMIZER = "model.safetensors", "config.json", "optimizer.safetensors"
_REQUIRED = {MODEL, MODEL_CONFIG, OPTIMIZER, STATE}
STEP_DIR = re.compile(r"step_([0-9]{8,15})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 4 << 20
_FINITE_CHUNK = 1 << 20
_SHOWN = 100  # characters of a value in a message


def step_dir(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step stands."""
    return run_dir / f"step_{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint directory, ascending; whether they are whole is verify()'s business."""
    if not run_dir.is_dir():
        return []
    found = (STEP_DIR.fullmatch(p.name) for p in run_dir.iterdir() if p.is_dir() and not p.is_symlink())
    steps = (int(m[1]) for m in found if m and m[0] == step_dir(run_dir, int(m[1])).name)
    return sorted(steps)


# ---- writing -----------------------------------------------------------------------------------------------------


def _check_finite(tensors: Mapping[str, np.ndarray[Any, Any]], what: str) -> None:
    for name, array in tensors.items():
        flat = array.reshape(-1)
        for start in range(0, flat.size, _FINITE_CHUNK):
            if not np.isfinite(flat[start : start + _FINITE_CHUNK]).all():
                raise NonFiniteError(f"{what} {name} holds inf or NaN: not saved")


def save(
    run_dir: Path, step: int, model: Model, state: Mapping[str, Any], more: Mapping[str, bytes] | None = None
) -> Path:
    """Write the checkpoint of a step: complete and synced under its name, or not there at all.

    Args:
        run_dir: the run directory.
        step: updates done.
        model: a model with training enabled.
        state: what state.json holds, JSON-serialisable.
        more: content of other files by name: see BaseTokenizer.files() and EngineRun.files().

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
            write_safetensors(file, hf_layout.stored(model.config, model.params))
        folder.write_bytes(MODEL_CONFIG, safeio.json_bytes(model.config.to_hf()))
        with folder.file(OPTIMIZER) as file:
            write_safetensors(file, moments)
        folder.write_bytes(STATE, safeio.json_bytes(state))
        for name, content in (more or {}).items():
            folder.write_bytes(name, content)
        folder.write_bytes(MANIFEST, safeio.json_bytes({"format": FORMAT, "step": step, "files": dict(folder.files)}))
    return target


def prune(
    run_dir: Path, keep_last: int, keep_every: int, best_step: int | None, newest: int | None = None
) -> list[int]:
    """Remove the checkpoints that the retention rule gives up, and return their steps.

    Kept are the newest ``keep_last``, every step that is a multiple of ``keep_every`` (0: none for that reason), and
    the best.

    Args:
        run_dir: the run directory.
        keep_last: at least 1.
        keep_every: steps; 0 keeps none for that reason.
        best_step: the step of the best, or None.
        newest: the newest that is known to be whole. Later ones are damaged: they neither count nor go. None counts
            all.
    """
    steps = [step for step in list_steps(run_dir) if newest is None or step <= newest]
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
        step = saferead.read_json(run_dir / BEST, CheckpointError).get("step")
    except CheckpointError:
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


# ---- verifying and finding ---------------------------------------------------------------------------------------


def _digest(path: Path, size: int) -> str:
    """Return a file's SHA-256 after checking its size."""
    with saferead.open_regular(path, CheckpointError) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise CheckpointError(f"{path}: size: expected {size} bytes by {MANIFEST}, found {found}")
        digest = hashlib.sha256()
        try:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _read_manifest(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the step and the files that a checkpoint.json names, checked."""
    manifest = saferead.read_json(path, CheckpointError)

    def bad(field: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{path}: {field}: expected {expected}, found {_shown(found)}")

    if not _is_count(manifest.get("format")) or manifest["format"] != FORMAT:
        raise bad("format", str(FORMAT), manifest.get("format"))
    if manifest.keys() != {"format", "step", "files"}:
        raise bad("content", "format, step and files", ", ".join(sorted(manifest)))
    step, files = manifest["step"], manifest["files"]
    if not _is_count(step):
        raise bad("step", "a number of at least 0", step)
    named = STEP_DIR.fullmatch(path.parent.name)
    if named and int(named[1]) != step:
        raise bad("step", f"{int(named[1])} by its folder's name", step)
    if not isinstance(files, dict) or not files.keys() >= _REQUIRED:
        raise bad("files", f"an object with {', '.join(sorted(_REQUIRED))}", files)
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise bad("files", "plain names", name)
        if not _is_entry(entry):
            raise bad(f"files: {name}", "a size in bytes and a sha256 of 64 digits", entry)
    return step, files


def _is_entry(entry: object) -> bool:
    """Return whether this is what the manifest says about one file."""
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        return False
    digest = entry["sha256"]
    return _is_count(entry["size"]) and isinstance(digest, str) and _SHA256.fullmatch(digest) is not None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def verify(path: Path) -> int:
    """Check that a checkpoint directory is whole, every byte of it, and return its step.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.
        OSError: when the system cannot read it now, e.g. for want of file descriptors.
    """
    step, files = _read_manifest(path / MANIFEST)
    for name, entry in files.items():
        found = _digest(path / name, entry["size"])
        if found != entry["sha256"]:
            raise CheckpointError(f"{path / name}: SHA-256: expected {entry['sha256']} by {MANIFEST}, found {found}")
    return step


def has_file(path: Path, name: str) -> bool:
    """Return whether a checkpoint's manifest names a file, so that verify() has checked it."""
    return name in _read_manifest(path / MANIFEST)[1]


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint directory verifies; see verify()."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def find_checkpoint(run_dir: Path, damaged: list[str] | None = None) -> Path | None:
    """Return the newest checkpoint of a run that verifies, or None when there is none.

    Args:
        run_dir: the run directory.
        damaged: takes the reason for each newer one that was passed over.

    Raises:
        OSError: when the system cannot read one now: it is not called damaged for that.
    """
    for step in reversed(list_steps(run_dir)):
        path = step_dir(run_dir, step)
        try:
            verify(path)
        except CheckpointError as error:
            if damaged is not None:
                damaged.append(str(error))
        else:
            return path
    return None


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
    return Checkpoint(path, step, saferead.read_json(path / STATE, CheckpointError))


def _load(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Read a safetensors file into arrays; it must hold these and no others, as finite fp32."""
    try:
        entries = read_header(path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if entries.keys() != arrays.keys():
        wrong = min(entries.keys() ^ arrays.keys())
        raise CheckpointError(f"{path}: tensors: expected the model's, found {_shown(wrong)} on one side only")
    for name, array in arrays.items():
        entry = entries[name]
        if entry.dtype != "F32" or entry.shape != array.shape:
            raise CheckpointError(
                f"{path}: {name}: expected F32 {array.shape}, found {entry.dtype} {_shown(entry.shape)}"
            )
    with saferead.open_regular(path, CheckpointError) as file:
        for name, array in arrays.items():
            file.seek(entries[name].begin)
            read = array if array.flags.c_contiguous else np.empty(array.shape, np.float32)
            _fill(file, read, f"{path}: {name}")
            if read is not array:
                array[...] = read
            low, what = (0.0, "at least 0") if name.startswith("v.") else (-np.inf, "finite")
            flat = array.reshape(-1)
            for start in range(0, flat.size, _FINITE_CHUNK):
                chunk = flat[start : start + _FINITE_CHUNK]
                wrong_ones = ~np.isfinite(chunk) | (chunk < low)
                if wrong_ones.any():
                    at = int(wrong_ones.argmax())
                    raise CheckpointError(f"{path}: {name}: expected {what}, found {chunk[at]} at index {start + at}")


def _fill(file: FileIO, array: np.ndarray[Any, Any], what: str) -> None:
    """Read an array's bytes from where a file stands."""
    view = memoryview(array).cast("B")  # type: ignore[arg-type]
    while view:
        try:
            n = file.readinto(view[:_CHUNK])
        except OSError as error:
            raise CheckpointError(f"{what}: {error.strerror or error}") from None
        if not n:
            raise CheckpointError(f"{what}: expected {len(view)} more bytes, found the file's end")
        view = view[n:]


def load_tensors(checkpoint: Checkpoint, model: Model) -> None:
    """Copy a checkpoint's weights and moments into a model of the same shape with training enabled.

    Raises:
        CheckpointError: when the checkpoint is of another shape or holds what no training gives (inf, NaN, a negative
            second moment); the model may then be partly overwritten.
    """
    moments = {f"m.{name}": array for name, array in model.moments_m.items()}
    moments |= {f"v.{name}": array for name, array in model.moments_v.items()}
    weights = hf_layout.stored(model.config, model.params)
    _load(checkpoint.path / MODEL, weights)
    hf_layout.check_zero_biases(model.config, weights, str(checkpoint.path / MODEL), CheckpointError)
    _load(checkpoint.path / OPTIMIZER, moments)
    model.weights_changed()
