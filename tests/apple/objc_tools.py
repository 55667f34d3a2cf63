"""Build csrc/backend/ane/device_ane.m with GNUstep, and run Python with it as the device ``ane``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = "apt-get install clang libgnustep-base-dev libclang-rt-14-dev valgrind"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
VALGRIND = ["valgrind", "-q", "--leak-check=full", "--num-callers=40", "--show-leak-kinds=definite",
            "--errors-for-leak-kinds=definite", "--error-exitcode=9",
            f"--suppressions={HERE / 'valgrind.supp'}"]  # fmt: skip


def has_sanitizers() -> bool:
    """Return whether clang's run-time libraries of them are there."""
    command = ["clang", "-print-file-name=libclang_rt.asan-x86_64.a"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return Path(found.stdout.strip()).is_absolute()


def build(out: Path, *arguments: str, **environment: str) -> Path:
    """Run build.sh and return the folder."""
    command = ["bash", str(HERE / "build.sh"), str(out), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def environment(built: Path, tmp: Path, **more: str) -> dict[str, str]:
    """Return an environment in which the device ``ane`` is the Objective-C one."""
    tmp.mkdir(exist_ok=True)
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ANELLM_ANE", "ANELLM_DEV", "ANELLM_IO", "SHIM_"))
    }
    return own | {
        "ANELLM_ANE_DEVICE": str(built / "libane_device.so"),
        "ANELLM_ANE_FRAMEWORK": str(built / "libAppleNeuralEngine.so"),
        "ANELLM_ANE_BACKOFF": "0.05",
        "ANELLM_CACHE_DIR": f"{tmp}-cache",
        "ANELLM_ANE_QOS": "21",  # else it is measured, with programs that the tests do not count on
        "TMP": str(tmp),
    } | more  # fmt: skip


def left_in(tmp: Path) -> list[Path]:
    """Return what is in the folder of temporary files, but for the one that GNUstep makes in it."""
    return [path for top in tmp.iterdir() for path in (top.iterdir() if top.name.startswith("GNUstep") else [top])]


PRELUDE = """
import ctypes, gc, json, os, sys
import numpy as np
from anellm.config import ModelConfig
from anellm.device import AneOptions
from anellm.errors import *
from anellm.model import Model
from anellm.optim import AdamW

def a_model(device, **more):
    softmax, mode = more.pop("softmax", "ane"), more.pop("mode", "dynamic")
    options = AneOptions(softmax=softmax, mode=mode, fallback=more.pop("fallback", "error"))
    shape = dict(dim=32, hidden_dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, vocab_size=48, max_seq_len=40)
    return Model(ModelConfig(**(shape | more)), device, seed=3, ane=options)

def a_batch(step):
    tokens = np.random.default_rng(step).integers(0, 48, (2, 34)).astype(np.int32)
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

def train(model, steps=4):
    model.enable_training()
    optimizer, losses = AdamW(model, 1e-2), []
    for step in range(steps):
        losses.append(model.forward(*a_batch(step), training=True))
        model.backward()
        optimizer.step(1e-2)
    return losses

def fake():
    library = ctypes.CDLL(os.environ["ANELLM_ANE_FRAMEWORK"])
    library.fake_ane_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return library

def files():
    return [f for _, _, names in os.walk(os.environ["TMP"]) for f in names]
"""


def run_python(script: str, env: dict[str, str], *arguments: str) -> str:
    """Run Python in a process of its own; return what it prints."""
    command = [sys.executable, "-c", PRELUDE + script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without pool" not in done.stderr
    return done.stdout
