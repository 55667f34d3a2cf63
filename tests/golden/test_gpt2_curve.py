"""Training gpt2-char for some steps against the losses that make_gpt2_curve.py recorded from PyTorch."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm.device import DTYPES
from anellm.model import Model
from anellm.optim import AdamW, clip_scale
from anellm.schedule import learning_rate

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("gpt2_curve.json").read_text(encoding="utf-8"))
# What 40 steps may add up to: fp32 rounds 2^16 times finer than bf16.
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_curve_is_pytorchs(dtype: Any) -> None:
    text = resources.files("anellm").joinpath("data/shakespeare.txt").read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = np.searchsorted(characters, list(text)).astype(np.int32)
    model = Model.from_preset("gpt2-char", seed=GOLDEN["seed"], vocab_size=len(characters))
    model.set_dtype(dtype)
    optimizer = AdamW(model, 1e-3, betas=(0.9, 0.99))
    steps, T, losses = len(GOLDEN["losses"]), model.config.max_seq_len, []
    for step, starts in enumerate(GOLDEN["starts"]):
        windows = np.stack([ids[s : s + T + 1] for s in starts])
        losses.append(model.forward(windows[:, :-1].copy(), windows[:, 1:].copy()))
        model.backward()
        rate = learning_rate(step, steps=steps, peak=1e-3, minimum=1e-4, warmup_steps=GOLDEN["warmup_steps"])
        optimizer.step(rate, grad_scale=clip_scale(model.grad_norm().norm, 1.0))
    assert steps == 40
    assert losses[0] == pytest.approx(np.log(len(characters)), abs=0.1)
    assert losses[-1] < 3.0
    np.testing.assert_allclose(losses, GOLDEN["losses"], rtol=BOUNDS[dtype])
