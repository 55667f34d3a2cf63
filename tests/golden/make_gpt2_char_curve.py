"""Train nanoGPT's character model by its whole recipe in PyTorch, from anellm's weights and on anellm's windows.

Run with `python tests/golden/make_gpt2_char_curve.py input.txt` where PyTorch 2.13.0 (CPU) and anellm are installed:
input.txt is tinyshakespeare. Writes docs/curves/gpt2-char-torch.json, which stands beside the curve of
`anellm train --recipe gpt2-char --data input.txt --seed N`: the validation loss of the whole held-out tenth, and as
nanoGPT estimates it, of 20 batches of 12 random windows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch_gpt2 import forward

from anellm.model import Model
from anellm.schedule import learning_rate
from anellm.windows import WindowSampler

SEEDS, STEPS, BATCH, WARMUP, EVERY = (1337, 1), 2000, 12, 100, 250
OUT = Path(__file__).parents[2] / "docs" / "curves" / "gpt2-char-torch.json"


def rows(ids: np.ndarray, starts: list[int], T: int) -> torch.Tensor:
    """Return windows of T + 1 ids."""
    return torch.from_numpy(np.stack([ids[s : s + T + 1] for s in starts]))


def run(ids: np.ndarray, vocab_size: int, seed: int) -> tuple[list[list[float]], list[float]]:
    """Return [step, validation loss] for every EVERY steps, and estimates of the last."""
    model = Model.from_preset("gpt2-char", seed=seed, vocab_size=vocab_size)
    T, config = model.config.max_seq_len, model.config.to_dict()
    train, held = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    w = {name: torch.from_numpy(np.array(a)).requires_grad_() for name, a in model.params.items()}
    groups = [
        {"params": [v for v in w.values() if v.ndim == 2], "weight_decay": 0.1},
        {"params": [v for v in w.values() if v.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    sampler = WindowSampler(len(train), T, seed)

    def loss_of(windows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(forward(config, w, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def measure() -> float:
        n = (len(held) - 1) // T
        parts = [[i * T for i in range(a, min(a + 128, n))] for a in range(0, n, 128)]
        with torch.no_grad():
            return sum(len(part) * loss_of(rows(held, part, T)).item() for part in parts) / n

    curve = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=STEPS, peak=1e-3, minimum=1e-4, warmup_steps=WARMUP)
        starts = [sampler.start(step * BATCH + i) for i in range(BATCH)]
        optimizer.zero_grad()
        loss_of(rows(train, starts, T)).backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            curve.append([step + 1, round(measure(), 4)])
            print(seed, *curve[-1], flush=True)
    random = np.random.default_rng(seed)
    with torch.no_grad():
        estimates = [
            np.mean([loss_of(rows(held, random.integers(0, len(held) - T, BATCH), T)).item() for _ in range(20)])
            for _ in range(10)
        ]
    return curve, sorted(round(float(e), 4) for e in estimates)


def main() -> None:
    """Write OUT."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = np.searchsorted(characters, list(text))
    found = {str(seed): run(ids, len(characters), seed) for seed in SEEDS}
    record = {
        "recipe": "gpt2-char",
        "about": f"torch {torch.__version__}, float32, from the weights and on the windows that anellm draws",
        "validation_loss": {seed: curve for seed, (curve, _) in found.items()},
        "ten_estimates_of_20_batches": {seed: estimates for seed, (_, estimates) in found.items()},
    }
    OUT.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
