"""Record the losses of PyTorch training nanoGPT's character model, for test_gpt2_curve.py.

Run with `python tests/golden/make_gpt2_curve.py` where PyTorch 2.13.0 (CPU) and anellm are installed: the weights
start as anellm draws them. The text is the one that comes with anellm, a token a character; windows are drawn here and
recorded. Model and optimizer are nanoGPT's recipe for a CPU (batch of 12, AdamW of learning rate 1e-3 down to 1e-4,
betas 0.9 and 0.99, decay 0.1 of what has two dimensions, clipped to 1), with fewer steps. All is computed in float64.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch_gpt2 import forward

from anellm.model import Model
from anellm.schedule import learning_rate

SEED, STEPS, BATCH, WARMUP = 1337, 40, 12, 4


def main() -> None:
    """Write gpt2_curve.json beside this file."""
    torch.set_num_threads(1)
    text = resources.files("anellm").joinpath("data/shakespeare.txt").read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = np.searchsorted(characters, list(text))
    model = Model.from_preset("gpt2-char", seed=SEED, vocab_size=len(characters))
    T = model.config.max_seq_len
    starts = np.random.default_rng(SEED).integers(0, len(ids) - T, (STEPS, BATCH))
    w = {name: torch.from_numpy(a.astype(np.float64)).requires_grad_() for name, a in model.params.items()}
    groups = [
        {"params": [v for v in w.values() if v.ndim == 2], "weight_decay": 0.1},
        {"params": [v for v in w.values() if v.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=STEPS, peak=1e-3, minimum=1e-4, warmup_steps=WARMUP)
        windows = torch.from_numpy(np.stack([ids[s : s + T + 1] for s in starts[step]]))
        optimizer.zero_grad()
        logits = forward(model.config.to_dict(), w, windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)
        optimizer.step()
        losses.append(loss.item())
        print(step, losses[-1])
    about = f"torch {torch.__version__}, float64, gpt2-char from seed {SEED}"
    recorded = {"about": about, "seed": SEED, "warmup_steps": WARMUP, "starts": starts.tolist(), "losses": losses}
    path = Path(__file__).with_name("gpt2_curve.json")
    path.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
