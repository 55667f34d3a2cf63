"""The contender JAX in a benchmark's child process: see bench_child. Needs nothing but jax and NumPy.

One jitted function is the whole step, AdamW included, and gives its buffers back to the compiler (donated arguments).
For bf16 the matrix products take bf16 inputs and add up in fp32.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Not import statements, so that type checkers need not know them. Without jax this is an ImportError.
jax: Any = importlib.import_module("jax")
np: Any = importlib.import_module("numpy")
jnp: Any = jax.numpy


def read_weights(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights in the job's file by their Hugging Face names."""
    with Path(job["weights"]).open("rb") as file:
        return {
            name: jnp.array(np.fromfile(file, np.float32, math.prod(shape)).reshape(shape))
            for name, shape in job["tensors"]
        }


class Llama:
    """The loss of a Llama model as a function of its weights."""

    def __init__(self, config: Mapping[str, Any], seq_len: int, dtype: str) -> None:
        """Prepare the rotary embedding's tables (T, head_dim / 2)."""
        self.config = config
        self.matmul_dtype = jnp.bfloat16 if dtype == "bf16" else jnp.float32
        half = config["head_dim"] // 2
        angles = np.outer(np.arange(seq_len), config["rope_theta"] ** (-np.arange(half) / half))
        self.cos = jnp.array(np.cos(angles), jnp.float32)[:, None, :]
        self.sin = jnp.array(np.sin(angles), jnp.float32)[:, None, :]

    def linear(self, x: Any, w: Any) -> Any:
        """Return x times the transpose of w."""
        x, w = x.astype(self.matmul_dtype), w.astype(self.matmul_dtype)
        return jnp.einsum("...k,nk->...n", x, w, preferred_element_type=jnp.float32)

    def rotate(self, x: Any) -> Any:
        """Return x (B, T, heads, head_dim) turned by its position: element i pairs with i + head_dim / 2."""
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate((a * self.cos - b * self.sin, b * self.cos + a * self.sin), axis=-1)

    def norm(self, x: Any, w: Any) -> Any:
        """Return x over its root mean square, times w."""
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config["norm_eps"]) * w

    def attention(self, p: Mapping[str, Any], prefix: str, x: Any) -> Any:
        """Return the attention block's output for normed rows x (B, T, dim)."""
        c = self.config
        B, T, _ = x.shape

        def heads(name: str, n: int) -> Any:
            return self.linear(x, p[f"{prefix}self_attn.{name}_proj.weight"]).reshape(B, T, n, c["head_dim"])

        q, k, v = heads("q", c["n_heads"]), heads("k", c["n_kv_heads"]), heads("v", c["n_kv_heads"])
        if c["qk_norm"]:
            q = self.norm(q, p[prefix + "self_attn.q_norm.weight"])
            k = self.norm(k, p[prefix + "self_attn.k_norm.weight"])
        q, k, v = (t.astype(self.matmul_dtype) for t in (self.rotate(q), self.rotate(k), v))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.linear(out.reshape(B, T, -1), p[prefix + "self_attn.o_proj.weight"])

    def mlp(self, p: Mapping[str, Any], prefix: str, x: Any) -> Any:
        """Return the SwiGLU block's output for normed rows x (B, T, dim)."""
        gate, up = (self.linear(x, p[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        return self.linear(jax.nn.silu(gate) * up, p[prefix + "mlp.down_proj.weight"])

    def loss(self, p: Mapping[str, Any], tokens: Any, targets: Any) -> Any:
        """Return the mean cross-entropy of tokens (B, T) and targets (B, T)."""
        embedding = p["model.embed_tokens.weight"]
        x = embedding[tokens]
        for i in range(self.config["n_layers"]):
            prefix = f"model.layers.{i}."
            x = x + self.attention(p, prefix, self.norm(x, p[prefix + "input_layernorm.weight"]))
            x = x + self.mlp(p, prefix, self.norm(x, p[prefix + "post_attention_layernorm.weight"]))
        x = self.norm(x, p["model.norm.weight"])
        logits = self.linear(x, p.get("lm_head.weight", embedding))
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own)


def start_step(job: Mapping[str, Any]) -> Callable[[], float]:
    """Return a training step: Loshchilov and Hutter's AdamW (arXiv:1711.05101) on the gradients of the loss."""
    model = Llama(job["config"], len(job["tokens"][0]), job["dtype"])
    tokens, targets = (jnp.array(job[name], jnp.int32) for name in ("tokens", "targets"))
    lr, (beta1, beta2), eps, decay = job["lr"], job["betas"], job["eps"], job["weight_decay"]

    def update(p: Any, m: Any, v: Any, g: Any, t: Any) -> Any:
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        adam = m / (1 - beta1**t) / (jnp.sqrt(v / (1 - beta2**t)) + eps)
        return p - lr * (adam + (decay * p if p.ndim > 1 else 0.0)), m, v

    def step(params: Any, m: Any, v: Any, t: Any) -> Any:
        loss, grads = jax.value_and_grad(model.loss)(params, tokens, targets)
        new = {name: update(params[name], m[name], v[name], grads[name], t) for name in params}
        return loss, *({name: values[i] for name, values in new.items()} for i in range(3))

    jitted = jax.jit(step, donate_argnums=(0, 1, 2))
    params = read_weights(job)
    m, v = ({name: jnp.zeros_like(p) for name, p in params.items()} for _ in range(2))
    t = 0

    def run() -> float:
        nonlocal params, m, v, t
        t += 1
        loss, params, m, v = jitted(params, m, v, float(t))
        jax.block_until_ready(params)
        return float(loss)

    return run


def start_matmul(job: Mapping[str, Any]) -> Callable[[], float]:
    """Return the job's matrix product; the weight is another one each time, so that it comes from memory."""
    dtype = jnp.bfloat16 if job["dtype"] == "bf16" else jnp.float32
    M, N, K = job["M"], job["N"], job["K"]
    rng = np.random.default_rng(0)

    def random(rows: int, columns: int) -> Any:
        return jnp.array(rng.standard_normal((rows, columns), np.float32), dtype)

    a = random(K, M) if job["trans_a"] else random(M, K)
    weights = [random(N, K) if job["trans_b"] else random(K, N) for _ in range(job["copies"])]
    product = jax.jit(lambda a, b: (a.T if job["trans_a"] else a) @ (b.T if job["trans_b"] else b))
    turn = 0

    def run() -> float:
        nonlocal turn
        turn += 1
        product(a, weights[turn % len(weights)]).block_until_ready()
        return 0.0

    return run


def start(job: Mapping[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return what the job asks to time, and the version."""
    return {"step": start_step, "matmul": start_matmul}[job["task"]](job), {"version": jax.__version__}


# XLA makes a thread for each CPU that the process may use when it first computes: there is no other setting.
if hasattr(os, "sched_setaffinity") and os.environ.get("OMP_NUM_THREADS", "").isdecimal():
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])])
