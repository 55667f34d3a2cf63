"""Record what PyTorch computes for small Llama and GPT-2 models, for test_torch_goldens.py.

Run with `python tests/golden/make_goldens.py [FOLDER [NAME ...]]` where PyTorch 2.13.0 (CPU) is installed; the tests
themselves need only the .npz files that it writes. GPT-2 is in torch_gpt2.py; the Llama below is the mathematics of
transformers' Llama and Qwen3 in plain PyTorch (half-split rotary embedding, grouped key/value heads, SwiGLU, optional
q/k norm). All is computed in float64 from fp32 weights, so that the numbers are PyTorch's without its fp32 rounding;
the fp32 run is done as well, and how far it is off is stored, to tell what an fp32 engine can be asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_gpt2

STEPS = 20
LR, BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0

# Sizes are odd on purpose: tails of every vector width, T no multiple of anything.
CASES: dict[str, dict[str, object]] = {
    "mha_tied": {
        "dim": 24, "hidden_dim": 52, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 6, "vocab_size": 67,
        "max_seq_len": 32, "norm_eps": 1e-5, "rope_theta": 10000.0, "tie_embeddings": True, "qk_norm": False,
        "B": 3, "T": 13,
    },
    "gqa_untied": {
        "dim": 32, "hidden_dim": 45, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "head_dim": 4, "vocab_size": 53,
        "max_seq_len": 32, "norm_eps": 1e-5, "rope_theta": 10000.0, "tie_embeddings": False, "qk_norm": False,
        "B": 2, "T": 17,
    },
    "gqa_tied_qknorm": {
        "dim": 20, "hidden_dim": 36, "n_layers": 3, "n_heads": 6, "n_kv_heads": 3, "head_dim": 8, "vocab_size": 41,
        "max_seq_len": 16, "norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_embeddings": True, "qk_norm": True,
        "B": 2, "T": 11,
    },
    "one_head": {
        "dim": 6, "hidden_dim": 7, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 6, "vocab_size": 11,
        "max_seq_len": 8, "norm_eps": 1e-5, "rope_theta": 10000.0, "tie_embeddings": False, "qk_norm": False,
        "B": 1, "T": 5,
    },
    "mqa_wide": {
        "dim": 72, "hidden_dim": 101, "n_layers": 1, "n_heads": 4, "n_kv_heads": 1, "head_dim": 18, "vocab_size": 103,
        "max_seq_len": 48, "norm_eps": 1e-5, "rope_theta": 10000.0, "tie_embeddings": True, "qk_norm": False,
        "B": 2, "T": 37,
    },
    "gpt2_bias_tanh": {
        "arch": "gpt2", "dim": 36, "hidden_dim": 144, "n_layers": 2, "n_heads": 4, "vocab_size": 61,
        "padded_vocab_size": 128, "max_seq_len": 24, "norm_eps": 1e-5, "bias": True, "gelu": "tanh", "B": 3, "T": 13,
    },
    "gpt2_erf": {
        "arch": "gpt2", "dim": 20, "hidden_dim": 80, "n_layers": 3, "n_heads": 4, "vocab_size": 47,
        "padded_vocab_size": 47, "max_seq_len": 11, "norm_eps": 1e-5, "bias": False, "gelu": "erf", "B": 2, "T": 11,
    },
    "gpt2_bias_erf_odd": {
        "arch": "gpt2", "dim": 21, "hidden_dim": 50, "n_layers": 1, "n_heads": 3, "vocab_size": 37,
        "padded_vocab_size": 39, "max_seq_len": 40, "norm_eps": 1e-6, "bias": True, "gelu": "erf", "B": 2, "T": 37,
    },
    "gpt2_tanh_one_head": {
        "arch": "gpt2", "dim": 7, "hidden_dim": 28, "n_layers": 2, "n_heads": 1, "vocab_size": 11,
        "padded_vocab_size": 16, "max_seq_len": 8, "norm_eps": 1e-5, "bias": False, "gelu": "tanh", "B": 1, "T": 5,
    },
}  # fmt: skip


def make_weights(c: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw fp32 weights: matrices of the scale that keeps activations near 1, norms uniform in [0.5, 1.5]."""
    if c.get("arch") == "gpt2":
        return torch_gpt2.make_weights(c, generator)

    def matrix(out: int, fan_in: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(out, fan_in, generator=generator) * (scale / fan_in**0.5)

    def norm(n: int) -> torch.Tensor:
        return 0.5 + torch.rand(n, generator=generator)

    dim, hidden, q, kv = c["dim"], c["hidden_dim"], c["n_heads"] * c["head_dim"], c["n_kv_heads"] * c["head_dim"]
    w = {"model.embed_tokens.weight": matrix(c["vocab_size"], dim)}
    for i in range(c["n_layers"]):
        p = f"model.layers.{i}."
        w[p + "input_layernorm.weight"] = norm(dim)
        w[p + "self_attn.q_proj.weight"] = matrix(q, dim, 1.5)
        w[p + "self_attn.k_proj.weight"] = matrix(kv, dim, 1.5)
        w[p + "self_attn.v_proj.weight"] = matrix(kv, dim)
        w[p + "self_attn.o_proj.weight"] = matrix(dim, q)
        if c["qk_norm"]:
            w[p + "self_attn.q_norm.weight"] = norm(c["head_dim"])
            w[p + "self_attn.k_norm.weight"] = norm(c["head_dim"])
        w[p + "post_attention_layernorm.weight"] = norm(dim)
        w[p + "mlp.gate_proj.weight"] = matrix(hidden, dim)
        w[p + "mlp.up_proj.weight"] = matrix(hidden, dim)
        w[p + "mlp.down_proj.weight"] = matrix(dim, hidden)
    w["model.norm.weight"] = norm(dim)
    if not c["tie_embeddings"]:
        w["lm_head.weight"] = matrix(c["vocab_size"], dim)
    return w


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich, arXiv:1910.07467."""
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim/2) of x (B, heads, T, head_dim) by position; Su et al., arXiv:2104.09864."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency).to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def forward(c: dict, w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, vocab_size) of tokens (B, T)."""
    if c.get("arch") == "gpt2":
        return torch_gpt2.forward(c, w, tokens)
    B, T = tokens.shape
    H, KV, D, eps = c["n_heads"], c["n_kv_heads"], c["head_dim"], c["norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    mask = torch.full((T, T), float("-inf"), dtype=x.dtype).triu(1)
    for i in range(c["n_layers"]):
        p = f"model.layers.{i}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        q = (h @ w[p + "self_attn.q_proj.weight"].T).view(B, T, H, D)
        k = (h @ w[p + "self_attn.k_proj.weight"].T).view(B, T, KV, D)
        v = (h @ w[p + "self_attn.v_proj.weight"].T).view(B, T, KV, D).transpose(1, 2)
        if c["qk_norm"]:
            q = rms_norm(q, w[p + "self_attn.q_norm.weight"], eps)
            k = rms_norm(k, w[p + "self_attn.k_norm.weight"], eps)
        q, k = rotate(q.transpose(1, 2), c["rope_theta"]), rotate(k.transpose(1, 2), c["rope_theta"])
        k, v = k.repeat_interleave(H // KV, dim=1), v.repeat_interleave(H // KV, dim=1)
        scores = q @ k.transpose(2, 3) / D**0.5 + mask
        h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * D)
        x = x + h @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if c["tie_embeddings"] else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def loss_of(c: dict, w: dict[str, torch.Tensor], tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy over the targets that are not -100."""
    return F.cross_entropy(forward(c, w, tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)


def train(c: dict, start: dict, tokens: torch.Tensor, targets: torch.Tensor, decay: str, clip: bool) -> list[float]:
    """Return the losses before each of STEPS AdamW updates on one batch."""
    w = {name: value.clone().requires_grad_() for name, value in start.items()}
    decayed = [v for v in w.values() if decay == "all" or v.ndim == 2]
    others = [v for v in w.values() if decay != "all" and v.ndim != 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(c, w, tokens, targets)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(list(w.values()), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses


def record(name: str, c: dict, seed: int, folder: Path) -> None:
    """Write NAME.npz."""
    generator = torch.Generator().manual_seed(seed)
    weights = make_weights(c, generator)
    tokens = torch.randint(0, c["vocab_size"], (c["B"], c["T"]), generator=generator)
    targets = torch.randint(0, c["vocab_size"], (c["B"], c["T"]), generator=generator)
    targets[0, 1] = targets[-1, c["T"] - 2] = -100
    series = {"matrices": ("matrices", False), "all": ("all", False), "clipped": ("matrices", True)}
    result: dict[torch.dtype, dict[str, np.ndarray]] = {}
    for dtype in (torch.float64, torch.float32):
        start = {key: value.to(dtype) for key, value in weights.items()}
        live = {key: value.clone().requires_grad_() for key, value in start.items()}
        logits = forward(c, live, tokens)
        loss = loss_of(c, live, tokens, targets)
        loss.backward()
        out = {"logits": logits.detach().numpy().astype(np.float32), "loss": np.float64(loss.item())}
        out |= {f"grad/{key}": value.grad.numpy().astype(np.float32) for key, value in live.items()}
        out |= {f"losses/{key}": np.array(train(c, start, tokens, targets, *how)) for key, how in series.items()}
        result[dtype] = out
    exact, single = result[torch.float64], result[torch.float32]
    grads = [key for key in exact if key.startswith("grad/")]
    norm = float(np.sqrt(sum(np.square(exact[k], dtype=np.float64).sum() for k in grads)))
    error = {
        "logits_absolute": float(np.abs(exact["logits"] - single["logits"]).max()),
        "gradients_relative": max(
            float(np.linalg.norm(exact[k] - single[k]) / np.linalg.norm(exact[k])) for k in grads
        ),
        "losses_relative": max(float(np.abs(single[f"losses/{k}"] / exact[f"losses/{k}"] - 1).max()) for k in series),
    }
    about = {
        "config": {k: v for k, v in c.items() if k not in ("B", "T")},
        "made_with": f"torch {torch.__version__}, float64, seed {seed}",
        "adamw": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM},
        "grad_norm": norm,
        "error_of_torch_float32": error,
    }
    arrays = {f"weight/{key}": value.numpy() for key, value in weights.items()}
    arrays |= {"tokens": tokens.numpy().astype(np.int32), "targets": targets.numpy().astype(np.int32)}
    np.savez_compressed(folder / f"{name}.npz", about=np.array(json.dumps(about)), **arrays, **exact)
    print(f"{name}: loss {float(exact['loss']):.6f}, gradient norm {norm:.4f}, {error}")


def main() -> None:
    """Record every case, or those named, into the folder given, or the one of this file."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    torch.set_num_threads(1)
    for seed, (name, case) in enumerate(CASES.items(), 1):
        if not sys.argv[2:] or name in sys.argv[2:]:
            record(name, case, seed, folder)


if __name__ == "__main__":
    main()
