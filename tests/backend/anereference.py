"""What each program of a model computes, in float64, and the way of arrays into and out of its packed surfaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from anellm.config import ModelConfig
from anellm.mil import AneField, AneProgram
from anellm.sim import Program, Simulator

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """A model's shape with a batch: B sequences of T tokens, padded to Tp."""

    config: ModelConfig
    B: int
    T: int
    Tp: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "Tp", -(-self.T // 32) * 32)

    @property
    def scale(self) -> float:
        return self.config.head_dim**-0.5


def model(dim: int, hidden: int, n_heads: int, n_kv_heads: int, head_dim: int, *, qk_norm: bool = False) -> ModelConfig:
    return ModelConfig(
        dim=dim, hidden_dim=hidden, n_layers=1, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        vocab_size=32, max_seq_len=4096, qk_norm=qk_norm, norm_eps=1e-6 if qk_norm else 1e-5,
    )  # fmt: skip


# ---- surfaces --------------------------------------------------------------------------------------------------------


def pack_field(plane: np.ndarray, where: AneField, value: np.ndarray, batch: Batch) -> None:
    """Write one field of a (channels, width) fp16 plane.

    Args:
        plane: what is written to.
        where: the field.
        value: (B, T, channels) for rows, (rows, columns) for weights, (B, n_heads, T, T) for scores.
        batch: the shape.
    """
    out = np.zeros((where.channels, where.columns))
    if where.kind == "rows":
        padded = np.zeros((batch.B, batch.Tp, where.channels))
        padded[:, : batch.T] = value
        out[:] = padded.reshape(-1, where.channels).T
    elif where.kind == "scores":
        padded = np.zeros((batch.B, batch.config.n_heads, batch.Tp, batch.Tp))
        padded[:, :, : batch.T, : batch.T] = value
        out[:] = padded.transpose(1, 2, 0, 3).reshape(where.channels, where.columns)
    else:
        given = value if where.kind == "weights" else value.T
        out[: given.shape[0], : given.shape[1]] = given
    plane[where.slices] = out


def pack(program: AneProgram, values: Mapping[str, np.ndarray], batch: Batch) -> np.ndarray:
    """Return a program's input; what is no field stays NaN, so that reading it would show."""
    plane = np.full((program.input.channels, program.input.width), np.nan, np.float16)
    for where in program.input.fields:
        pack_field(plane, where, values[where.name], batch)
    return plane.reshape(program.input.shape)


def unpack(program: AneProgram, output: np.ndarray, batch: Batch) -> Arrays:
    """Return the fields of a program's output, without padding: (B, T, channels), or (B, n_heads, T, T)."""
    plane = output.reshape(program.output.channels, program.output.width).astype(np.float64)
    found = {}
    for where in program.output.fields:
        part = plane[where.slices]
        if where.kind == "scores":
            n = batch.config.n_heads
            full = part.reshape(n, batch.Tp, batch.B, batch.Tp).transpose(2, 0, 1, 3)
            found[where.name] = full[:, :, : batch.T, : batch.T]
        else:
            found[where.name] = part.T.reshape(batch.B, batch.Tp, where.channels)[:, : batch.T]
    return found


def evaluate(
    sim: Simulator, program: AneProgram, values: Mapping[str, np.ndarray], batch: Batch
) -> tuple[Arrays, Program]:
    """Compile and run a program on arrays; return its fields, and the compiled program with its findings."""
    compiled = sim.compile(program.mil, program.files)
    output = compiled.run({"a_input0": pack(program, values, batch)})["z_output0"]
    return unpack(program, output, batch), compiled


# ---- the model in float64 --------------------------------------------------------------------------------------------


def heads(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Return (B, n, T, head_dim) of (B, T, n * head_dim)."""
    return x.reshape(*x.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)


def rows(x: np.ndarray) -> np.ndarray:
    """Return (B, T, n * head_dim) of (B, n, T, head_dim)."""
    moved = x.transpose(0, 2, 1, 3)
    return moved.reshape(*moved.shape[:2], -1)


def rope(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotate heads (B, n, T, head_dim): dimension i with i + head_dim/2, by t theta^(-2i / head_dim)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[2])[:, None] * theta ** (-np.arange(half) / half)
    c, s = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def repeated(kv: np.ndarray, batch: Batch) -> np.ndarray:
    """Return a key/value head for each query head."""
    return np.repeat(kv, batch.config.n_heads // batch.config.n_kv_heads, axis=1)


def summed(x: np.ndarray, batch: Batch) -> np.ndarray:
    """Return the gradient of what repeated() took."""
    n = batch.config.n_kv_heads
    return x.reshape(x.shape[0], n, -1, *x.shape[2:]).sum(2)


def attention_inputs(values: Arrays, batch: Batch) -> Arrays:
    """Return q, k (rotated), v, q_raw, k_raw from x, wqkv and norms."""
    c = batch.config
    raw = values["x"] @ values["wqkv"].T
    q_raw, k_raw, v = np.split(raw, [c.q_dim, c.q_dim + c.kv_dim], axis=-1)
    q, k = heads(q_raw, c.head_dim), heads(k_raw, c.head_dim)
    if c.qk_norm:
        q, k = (rmsnorm(part, weight, c.norm_eps) for part, weight in zip((q, k), values["norms"], strict=True))
    q, k = rope(q, c.rope_theta), rope(k, c.rope_theta)
    return {"q": rows(q), "k": rows(k), "v": v, "q_raw": q_raw, "k_raw": k_raw}


def scores(q: np.ndarray, k: np.ndarray, batch: Batch) -> np.ndarray:
    head_dim = batch.config.head_dim
    return heads(q, head_dim) @ repeated(heads(k, head_dim), batch).swapaxes(-1, -2) * batch.scale


def softmax(s: np.ndarray) -> np.ndarray:
    """Return the causal softmax of scores (B, n, T, T)."""
    masked = np.where(np.tri(s.shape[-1], dtype=bool), s, -np.inf)
    p = np.exp(masked - masked.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def attention_values(p: np.ndarray, v: np.ndarray, batch: Batch) -> np.ndarray:
    return rows(p @ repeated(heads(v, batch.config.head_dim), batch))


def attention_forward(values: Arrays, batch: Batch) -> Arrays:
    """Return all that attn_fwd and attn_scores give, and p."""
    found = attention_inputs(values, batch)
    found["scores"] = scores(found["q"], found["k"], batch)
    found["p"] = softmax(found["scores"])
    found["attn"] = attention_values(found["p"], found["v"], batch)
    found["y"] = found["attn"] @ values["wo"].T
    return found


def ffn_forward(values: Arrays, activation: Callable[[np.ndarray], np.ndarray] = sigmoid) -> Arrays:
    gate, up = values["h"] @ values["w1"].T, values["h"] @ values["w3"].T
    return {"gate": gate, "up": up, "y": (gate * activation(gate) * up) @ values["w2"].T}


def attention_backward(forward: Arrays, dattn: np.ndarray, batch: Batch) -> Arrays:
    """Return dv, dp, ds, dq, dk (of the rotated q and k); ds carries the scale."""
    head_dim = batch.config.head_dim
    p, d = forward["p"], heads(dattn, head_dim)
    q, k = heads(forward["q"], head_dim), repeated(heads(forward["k"], head_dim), batch)
    dp = d @ repeated(heads(forward["v"], head_dim), batch).swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * batch.scale
    return {
        "dv": rows(summed(p.swapaxes(-1, -2) @ d, batch)),
        "dp": dp,
        "ds": ds,
        "dq": rows(ds @ k),
        "dk": rows(summed(ds.swapaxes(-1, -2) @ q, batch)),
    }


def make_values(batch: Batch, seed: int = 0, *, depth: float = 1.0) -> Arrays:
    """Return inputs and weights as a model has them: normed rows, weights of 1/sqrt(fan-in)."""
    c, g = batch.config, np.random.default_rng(seed)

    def rows_of(n: int) -> np.ndarray:
        return g.standard_normal((batch.B, batch.T, n))

    def weight(out: int, inner: int, scale: float = 1.0) -> np.ndarray:
        return g.standard_normal((out, inner)) * scale / np.sqrt(inner)

    values = {
        "x": rows_of(c.dim),
        "h": rows_of(c.dim),
        "wqkv": weight(c.q_dim + 2 * c.kv_dim, c.dim),
        "wo": weight(c.dim, c.q_dim, depth),
        "norms": 1.0 + 0.3 * g.standard_normal((2, c.head_dim)),
        "w1": weight(c.hidden_dim, c.dim),
        "w3": weight(c.hidden_dim, c.dim),
        "w2": weight(c.dim, c.hidden_dim, depth),
    }
    return {**values, "w13": np.concatenate([values["w1"], values["w3"]])}
