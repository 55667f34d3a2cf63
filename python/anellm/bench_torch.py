"""The contender PyTorch in a benchmark's child process: see bench_child. Needs nothing but torch and NumPy.

The models are Hugging Face's Llama and GPT-2 written with functions: fused scaled-dot-product attention, fused AdamW,
gradients set to None after each step, and for bf16 autocast over fp32 weights.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Not import statements, so that type checkers need not know them. Without torch this is an ImportError.
torch: Any = importlib.import_module("torch")
np: Any = importlib.import_module("numpy")
F: Any = torch.nn.functional


def read_weights(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights in the job's file, as tensors that want gradients, by their Hugging Face names."""
    params = {}
    with Path(job["weights"]).open("rb") as file:
        for name, shape in job["tensors"]:
            array = np.fromfile(file, np.float32, math.prod(shape)).reshape(shape)
            params[name] = torch.from_numpy(array).clone().requires_grad_()
    return params


class Llama:
    """The loss of a Llama model as a function of its weights."""

    def __init__(self, config: Mapping[str, Any], seq_len: int) -> None:
        """Prepare the rotary embedding's tables (T, head_dim / 2)."""
        self.config = config
        half = config["head_dim"] // 2
        rates = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), rates)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def rotate(self, x: Any) -> Any:
        """Return x (B, heads, T, head_dim) turned by its position: element i pairs with i + head_dim / 2."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), dim=-1).to(x.dtype)

    def norm(self, x: Any, w: Any) -> Any:
        """Return x over its root mean square, times w."""
        return F.rms_norm(x, (x.shape[-1],), w, self.config["norm_eps"])

    def attention(self, p: Mapping[str, Any], prefix: str, x: Any) -> Any:
        """Return the attention block's output for normed rows x (B, T, dim)."""
        c = self.config
        B, T, _ = x.shape

        def heads(name: str, n: int) -> Any:
            return F.linear(x, p[f"{prefix}self_attn.{name}_proj.weight"]).view(B, T, n, c["head_dim"])

        q, k, v = heads("q", c["n_heads"]), heads("k", c["n_kv_heads"]), heads("v", c["n_kv_heads"])
        if c["qk_norm"]:
            q = self.norm(q, p[prefix + "self_attn.q_norm.weight"])
            k = self.norm(k, p[prefix + "self_attn.k_norm.weight"])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = self.rotate(q).to(v.dtype), self.rotate(k).to(v.dtype)
        grouped = c["n_heads"] != c["n_kv_heads"]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return F.linear(out.transpose(1, 2).reshape(B, T, -1), p[prefix + "self_attn.o_proj.weight"])

    def mlp(self, p: Mapping[str, Any], prefix: str, x: Any) -> Any:
        """Return the SwiGLU block's output for normed rows x (B, T, dim)."""
        gate, up = (F.linear(x, p[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        return F.linear(F.silu(gate) * up, p[prefix + "mlp.down_proj.weight"])

    def loss(self, p: Mapping[str, Any], tokens: Any, targets: Any) -> Any:
        """Return the mean cross-entropy of tokens (B, T) and targets (B, T)."""
        embedding = p["model.embed_tokens.weight"]
        x = F.embedding(tokens, embedding)
        for i in range(self.config["n_layers"]):
            prefix = f"model.layers.{i}."
            x = x + self.attention(p, prefix, self.norm(x, p[prefix + "input_layernorm.weight"]))
            x = x + self.mlp(p, prefix, self.norm(x, p[prefix + "post_attention_layernorm.weight"]))
        x = self.norm(x, p["model.norm.weight"])
        logits = F.linear(x, p.get("lm_head.weight", embedding))
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))


class Gpt2:
    """The loss of a GPT-2 model as a function of its weights."""

    def __init__(self, config: Mapping[str, Any], seq_len: int) -> None:
        """Keep what the functions need."""
        self.config, self.seq_len = config, seq_len

    def norm(self, p: Mapping[str, Any], name: str, x: Any) -> Any:
        """Return LayerNorm of x."""
        return F.layer_norm(x, (x.shape[-1],), p[name + ".weight"], p.get(name + ".bias"), self.config["norm_eps"])

    def linear(self, p: Mapping[str, Any], name: str, x: Any) -> Any:
        """Return x times a matrix, plus its bias where there is one."""
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    def attention(self, p: Mapping[str, Any], prefix: str, x: Any) -> Any:
        """Return the attention block's output for normed rows x (B, T, dim)."""
        B, T, dim = x.shape
        parts = self.linear(p, prefix + "attn.c_attn", x).split(dim, dim=2)
        q, k, v = (t.view(B, T, self.config["n_heads"], -1).transpose(1, 2) for t in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.linear(p, prefix + "attn.c_proj", out.transpose(1, 2).reshape(B, T, dim))

    def loss(self, p: Mapping[str, Any], tokens: Any, targets: Any) -> Any:
        """Return the mean cross-entropy of tokens (B, T) and targets (B, T), over the vocabulary without padding."""
        approximate = "tanh" if self.config["gelu"] == "tanh" else "none"
        x = F.embedding(tokens, p["transformer.wte.weight"]) + p["transformer.wpe.weight"][: self.seq_len]
        for i in range(self.config["n_layers"]):
            prefix = f"transformer.h.{i}."
            x = x + self.attention(p, prefix, self.norm(p, prefix + "ln_1", x))
            h = self.linear(p, prefix + "mlp.c_fc", self.norm(p, prefix + "ln_2", x))
            x = x + self.linear(p, prefix + "mlp.c_proj", F.gelu(h, approximate=approximate))
        classifier = p["transformer.wte.weight"][: self.config["vocab_size"]]
        logits = F.linear(self.norm(p, "transformer.ln_f", x), classifier)
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))


def start_step(job: Mapping[str, Any]) -> Callable[[], float]:
    """Return a training step; with job["compile"] through torch.compile."""
    params = read_weights(job)
    architecture = Gpt2 if job["config"]["arch"] == "gpt2" else Llama
    model = architecture(job["config"], len(job["tokens"][0]))
    tokens, targets = (torch.tensor(job[name], dtype=torch.int64) for name in ("tokens", "targets"))
    matrices = [p for p in params.values() if p.dim() > 1]
    vectors = [p for p in params.values() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": job["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=job["lr"], betas=tuple(job["betas"]), eps=job["eps"], fused=True)
    forward = torch.compile(model.loss) if job["compile"] else model.loss
    mixed = job["dtype"] == "bf16"

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = forward(params, tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def start_matmul(job: Mapping[str, Any]) -> Callable[[], float]:
    """Return the job's matrix product; the weight is another one each time, so that it comes from memory."""
    dtype = torch.bfloat16 if job["dtype"] == "bf16" else torch.float32
    M, N, K = job["M"], job["N"], job["K"]
    a = torch.randn((K, M) if job["trans_a"] else (M, K)).to(dtype)
    weights = [torch.randn((N, K) if job["trans_b"] else (K, N)).to(dtype) for _ in range(job["copies"])]
    left = a.t() if job["trans_a"] else a
    rights = [w.t() if job["trans_b"] else w for w in weights]
    out = [torch.empty((M, N), dtype=dtype) for _ in range(job["out_copies"])]
    turn = 0

    def product() -> float:
        nonlocal turn
        turn += 1
        torch.mm(left, rights[turn % len(rights)], out=out[turn % len(out)])
        return 0.0

    return product


def start(job: Mapping[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return what the job asks to time, and the version."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with torch.set_grad_enabled(job["task"] == "step"):
        task = {"step": start_step, "matmul": start_matmul}[job["task"]](job)
    return task, {"version": torch.__version__}
