"""The contender anellm in a benchmark's child process: see bench_child."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anellm._ffi import lib, text
from anellm.config import ModelConfig
from anellm.device import set_threads
from anellm.model import Model
from anellm.optim import AdamW


def start(job: Mapping[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return a training step, after writing the weights it starts from to the job's file for the peers, if any."""
    set_threads(job["threads"])
    model = Model(ModelConfig.from_dict(job["config"]), seed=job["seed"])
    model.set_dtype(job["dtype"])
    if job["weights"] is not None:
        with Path(job["weights"]).open("wb") as file:
            for tensor in model.tensors:
                model.params[tensor.name].tofile(file)
    optimizer = AdamW(model, job["lr"], tuple(job["betas"]), job["eps"], job["weight_decay"], decay="matrices")
    tokens, targets = (np.array(job[name], np.int32) for name in ("tokens", "targets"))

    def step() -> float:
        loss = model.forward(tokens, targets, training=True)
        model.backward()
        optimizer.step()
        return loss

    tensors = [[tensor.name, list(tensor.shape)] for tensor in model.tensors]
    return step, {"tensors": tensors, "variant": text(lib.anellm_cpu_variant())}
