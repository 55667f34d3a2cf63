"""Train a small Llama on the CPU with each tier of kernels, and once on ``ane-sim``; print losses and weights as JSON.

python steps.py TIER,...                      the anellm that Python finds
python steps.py TIER,... LIBMACHORUN WHEEL    the one of an unpacked macOS wheel
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path

if len(sys.argv) > 2:
    import loader

    loader.install(Path(sys.argv[2]), Path(sys.argv[3]))

import anellm._anellm
import numpy as np

from anellm._ffi import check, ffi, lib, text
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.optim import AdamW

STEPS, B, T, VOCAB = 8, 2, 24, 96


def config() -> ModelConfig:
    """Grouped queries, q/k-norm, a width that is no multiple of a vector: every kernel has a tail."""
    return ModelConfig(dim=40, hidden_dim=72, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, vocab_size=VOCAB,
                       max_seq_len=T, qk_norm=True)  # fmt: skip


def train(device: str, threads: int, steps: int) -> dict[str, object]:
    """Return the losses, the norm of the first gradient, and the weights as a hash and as the norm of each tensor."""
    check(lib.anellm_set_threads(threads))
    model = Model(config(), device, seed=11)
    model.enable_training()
    optimizer, losses, norm = AdamW(model, 1e-2), [], 0.0
    for step in range(steps):
        tokens = np.random.default_rng(step % 2).integers(0, VOCAB, (B, T + 1)).astype(np.int32)
        x, y = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        losses.append(float(model.forward(x, y, training=True)))
        model.backward()
        norm = norm or model.grad_norm().norm
        optimizer.step(1e-2)
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in model.params.values())
    norms = {name: float(np.linalg.norm(array.astype(np.float64))) for name, array in model.params.items()}
    return {"losses": losses, "grad_norm": norm, "norms": norms, "sha256": hashlib.sha256(content).hexdigest()}


def refusal() -> str:
    """What opening the Neural Engine says: C is asked, as Python looks at the system first."""
    device = ffi.new("anellm_ane **")
    status = lib.anellm_ane_open(device, b"ane", ffi.new("anellm_ane_profile *"), ffi.NULL)
    return text(lib.anellm_last_error()) if status == lib.ANELLM_UNAVAILABLE else f"status {status}"


def interface() -> dict[str, object]:
    """Every name that the module has: the value of a constant, the size and the alignment of a type."""
    names: dict[str, object] = {}
    for name in dir(lib):
        value = getattr(lib, name)
        names[name] = value if isinstance(value, int) else "function"
    for name in sorted(name for kind in ffi.list_types() for name in kind):
        try:
            names[name] = [ffi.sizeof(name), ffi.alignof(name)]
        except (ffi.error, ValueError):
            names[name] = "opaque"
    return names


tiers = sys.argv[1].split(",")
result: dict[str, object] = {
    "origin": anellm._anellm.__spec__.origin,
    "machine": platform.machine(),
    "version": text(lib.anellm_version()),
    "tiers": text(lib.anellm_cpu_variants()).split(","),
    "interface": interface(),
    "ane": refusal(),
}
for tier in tiers:
    check(lib.anellm_cpu_set_variant(tier.encode()))
    result[tier] = [train("cpu", threads, STEPS) for threads in (1, 2)]
result["ane-sim"] = train("ane-sim", 2, 2)
print(json.dumps(result))
