"""``bench decode``: generating tokens one by one, against the speed at which the weights can be read."""

from __future__ import annotations

import math
import os
import re
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from anellm._ffi import lib
from anellm.bench_timing import BenchJob, Times, bandwidth_gbs, table
from anellm.compress import Weights
from anellm.errors import ConfigError
from anellm.model import Model

_SPEED = re.compile(r"achieved tok/s:\s*([0-9.]+)")


def weight_bytes(model: Model) -> int:
    """Return the bytes of weights that each token needs: all, but of separate tables none to speak of."""
    total = 0
    for tensor in model.tensors:
        n = math.prod(tensor.shape)
        if tensor.kind == "positions":
            continue
        if tensor.kind == "vector" or model.weights == "fp32":
            total += 0 if tensor.kind == "embedding" and not model.config.tie_embeddings else 4 * n
        elif tensor.kind == "matrix" or model.config.tie_embeddings:
            scales = n // tensor.shape[-1] * -(-tensor.shape[-1] // lib.ANELLM_QUANTIZE_GROUP)
            total += 2 * n if model.weights == "bf16" else n + 4 * scales
    return total


def decode_once(model: Model, n_tokens: int) -> float:
    """Decode greedily from BOS and return the milliseconds for a token, the first not counted."""
    cache = model.kvcache(n_tokens + 1)
    try:
        token = np.array([1], np.int32)
        token[0] = np.argmax(model.decode(cache, token))
        start = time.perf_counter()
        for _ in range(n_tokens):
            token[0] = np.argmax(model.decode(cache, token))
        return 1e3 * (time.perf_counter() - start) / n_tokens
    finally:
        cache.close()


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a llama2.c tokenizer whose tokens are words of no meaning, for a model of no meaning.

    Source: github.com/karpathy/llama2.c, tokenizer.py: the longest token's bytes, then a score, a length and the bytes
    of each token.
    """
    words = [f"{i:05d}".encode() for i in range(vocab_size)]
    body = b"".join(struct.pack("<fi", -float(i), len(word)) + word for i, word in enumerate(words))
    path.write_bytes(struct.pack("<i", max(map(len, words))) + body)


def runc_once(program: str, folder: Path, n_tokens: int, threads: int) -> float:
    """Return the milliseconds that llama2.c's program takes for a token.

    Raises:
        ConfigError: when the program cannot be run or does not tell its speed.
    """
    command = [program, str(folder / "model.bin"), "-t", "0", "-n", str(n_tokens), "-z", str(folder / "tokenizer.bin")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, check=False)  # noqa: S603  the user named it
    except OSError as error:
        raise ConfigError(f"--runc: cannot run {program}: {error.strerror}") from None
    match = _SPEED.search((done.stderr + done.stdout).decode("utf-8", "replace"))
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--runc: expected a line 'achieved tok/s: ...' of {program}, exit status {done.returncode}")
    return 1e3 / float(match[1])


def run(job: BenchJob) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    if job.tokens >= job.shape.max_seq_len:
        raise ConfigError(
            f"--tokens: expected less than the model's longest, {job.shape.max_seq_len}, found {job.tokens}"
        )
    model = Model(job.shape, seed=1)
    fp32_bytes = weight_bytes(model)
    times: dict[str, list[float]] = {"anellm": []}
    with tempfile.TemporaryDirectory(prefix="anellm-bench-") as name:
        folder = Path(name)
        if job.runc is not None:
            model.save_pretrained(folder / "model.bin", "llama2c")
            write_tokenizer(folder / "tokenizer.bin", job.shape.vocab_size)
            times["llama2.c"] = []
        if job.weights != "fp32":
            model.compress(cast("Weights", job.weights), release=True)
        n_bytes = weight_bytes(model)
        read = bandwidth_gbs(n_bytes, job.threads)
        for _ in range(job.rounds):
            times["anellm"].append(decode_once(model, job.tokens))
            if job.runc is not None:
                times["llama2.c"].append(runc_once(job.runc, folder, job.tokens, job.threads))
    read = max(read, bandwidth_gbs(n_bytes, job.threads))
    rows, found = [], {}
    for who, ms in times.items():
        t = Times.of(ms)
        gbs = (n_bytes if who == "anellm" else fp32_bytes) / t.median / 1e6
        found[who] = {"ms": t.median, "min_ms": t.least, "tokens_per_s": 1e3 / t.median, "gbs": gbs}
        found[who]["fraction_of_read"] = gbs / read
        rows.append([who, f"{t.median:.3f}", f"{1e3 / t.median:.1f}", f"{gbs:.1f}", f"{gbs / read:.2f}"])
    ours = found.pop("anellm")
    print(table(["", "ms", "tokens/s", "GB/s", "of reading"], rows))
    print(f"{n_bytes / 1e6:.1f} MB of {job.weights} weights a token; reading as many bytes: {read:.1f} GB/s")
    missing = {name: f"{name}: decoding is compared with llama2.c only: --runc PATH" for name in job.compare}
    for line in missing.values():
        print(line)
    return {
        **job.describe(),
        "weights": job.weights,
        "tokens": job.tokens,
        "weight_bytes": n_bytes,
        "read_gbs": read,
        "anellm": ours,
        "peers": found,
        "ratio": {who: entry["ms"] / ours["ms"] for who, entry in found.items()},
        "missing": missing,
        "method": f"greedy, {job.tokens} tokens after the first, random weights, {job.rounds} rounds in turns; ms is a "
        "token's, the median of the rounds; the bandwidth is the better of two measurements, before and after",
    }
