"""GPT-2 in plain PyTorch, for make_goldens.py: the mathematics of Radford et al. 2019, and of nanoGPT's variant.

Matrices are (out, in) as in anellm; transformers keeps the transpose of them (Conv1D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def make_weights(c: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw fp32 weights: activations near 1, norms uniform in [0.5, 1.5], biases of size 0.3, padding zero."""

    def matrix(out: int, fan_in: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(out, fan_in, generator=generator) * (scale / fan_in**0.5)

    def put(name: str, weight: torch.Tensor) -> None:
        w[name + ".weight"] = weight
        if c["bias"]:
            w[name + ".bias"] = 0.3 * torch.randn(weight.shape[0], generator=generator)

    def norm(n: int) -> torch.Tensor:
        return 0.5 + torch.rand(n, generator=generator)

    dim, hidden = c["dim"], c["hidden_dim"]
    w: dict[str, torch.Tensor] = {}
    w["transformer.wte.weight"] = matrix(c["padded_vocab_size"], dim)
    w["transformer.wte.weight"][c["vocab_size"] :] = 0
    w["transformer.wpe.weight"] = matrix(c["max_seq_len"], dim)
    for i in range(c["n_layers"]):
        p = f"transformer.h.{i}."
        put(p + "ln_1", norm(dim))
        put(p + "attn.c_attn", matrix(3 * dim, dim, 1.5))
        put(p + "attn.c_proj", matrix(dim, dim))
        put(p + "ln_2", norm(dim))
        put(p + "mlp.c_fc", matrix(hidden, dim, 1.5))
        put(p + "mlp.c_proj", matrix(dim, hidden))
    put("transformer.ln_f", norm(dim))
    return w


def layer_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Ba, Kiros and Hinton, arXiv:1607.06450."""
    centered = x - x.mean(-1, keepdim=True)
    out = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps) * w
    return out if b is None else out + b


def forward(c: dict, w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, vocab_size) of tokens (B, T)."""
    B, T = tokens.shape
    H, D = c["n_heads"], c["dim"] // c["n_heads"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, w[name + ".weight"], w.get(name + ".bias"), c["norm_eps"])

    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:T]
    mask = torch.full((T, T), float("-inf"), dtype=x.dtype).triu(1)
    for i in range(c["n_layers"]):
        p = f"transformer.h.{i}."
        q, k, v = (
            part.view(B, T, H, D).transpose(1, 2)
            for part in linear(norm(x, p + "ln_1"), p + "attn.c_attn").split(c["dim"], dim=2)
        )
        scores = q @ k.transpose(2, 3) / D**0.5 + mask
        h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * D)
        x = x + linear(h, p + "attn.c_proj")
        h = linear(norm(x, p + "ln_2"), p + "mlp.c_fc")
        x = x + linear(F.gelu(h, approximate="tanh" if c["gelu"] == "tanh" else "none"), p + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"][: c["vocab_size"]].T
