"""Write inputs (.npy) and weight files of the example programs: ``python docs/examples/make_inputs.py DIR``."""  # noqa: INP001

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np


def wave(shape: tuple[int, ...], step: float, size: float = 1.0) -> np.ndarray:
    """Return size * sin(step * k * k) for k = 1, 2, .. in the shape given, as fp16: looks random, and is not."""
    k = np.arange(1.0, np.prod(shape) + 1)
    return (size * np.sin(step * k * k)).reshape(shape).astype(np.float16)


def blob(array: np.ndarray) -> bytes:
    """Return a MILBlob v2 file with one fp16 array, whose metadata stand at byte 64."""
    data = array.astype("<f2").tobytes()
    return struct.pack("<II56x", 1, 2) + struct.pack("<IIQQQ32x", 0xDEADBEEF, 1, len(data), 128, 0) + data


def main(folder: Path) -> None:
    """Write everything."""
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    x = wave((1, 64, 1, 32), 0.7)
    np.save(folder / "x.npy", x)
    np.save(folder / "narrow.npy", wave((1, 1024, 1, 16), 0.7))
    np.save(folder / "packed.npy", np.concatenate([x, wave((1, 64, 1, 48), 1.3, 0.1)], axis=-1))
    for name, step in (("q", 0.31), ("k", 0.47), ("v", 0.59)):
        np.save(folder / f"{name}.npy", wave((1, 64, 1, 32), step))
    mask = np.where(np.tri(32) > 0, 0.0, -1e4).reshape(1, 1, 32, 32)
    files = {
        "gamma": 1 + wave((64,), 0.9, 0.1),
        "mask": mask,
        "gate": wave((128, 64), 0.83, 0.1),
        "up": wave((128, 64), 1.19, 0.1),
        "down": wave((64, 128), 1.61, 0.1),
    }
    for name, array in files.items():
        (weights / f"{name}.bin").write_bytes(blob(array))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
