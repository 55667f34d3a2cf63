"""What each program of a model computes, in float64, and the way of arrays into and out of its packed surfaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from anellm.config import ModelConfig
from anellm.mil import AneField, AneProgram

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """A model's shape with a batch: B sequences of T tokens, padded to Tp."""

    config: ModelConfig
    B: int
    T: int
    Tp: int = field(init=False)

    def __post_init__(self) -> None:
        """Round the length up."""
        object.__setattr__(self, "Tp", -(-self.T // 32) * 32)

    @property
    def scale(self) -> float:
        """Return what scores are multiplied by."""
        return float(self.config.head_dim**-0.5)


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


def pack(
    program: AneProgram, values: Mapping[str, np.ndarray], batch: Batch, *, unused: float = float("nan")
) -> np.ndarray:
    """Return a program's input; what is no field is ``unused``: NaN, so that reading it would show in a simulation."""
    plane = np.full((program.input.channels, program.input.width), unused, np.float16)
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
    """Return x over its root mean square along the last axis, times a weight."""
    found: np.ndarray = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    return found


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x))."""
    found: np.ndarray = 1.0 / (1.0 + np.exp(-x))
    return found


def gelu(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return GELU and its slope; kind is "tanh" (the approximation) or "erf"."""
    if kind == "tanh":
        root, cubic = np.sqrt(2.0 / np.pi), 0.044715
        t = np.tanh(root * (x + cubic * x**3))
        return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * root * (1.0 + 3.0 * cubic * x * x)
    phi = np.vectorize(lambda z: 0.5 * math.erfc(-z * math.sqrt(0.5)), otypes=[np.float64])(x)
    return x * phi, phi + x * np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)


def columns(bias: np.ndarray, dim: int) -> np.ndarray:
    """Return a bias as rows of dim values, zeros at the end: what its field holds as columns."""
    found = np.zeros((-(-bias.size // dim), dim))
    found.reshape(-1)[: bias.size] = bias
    return found


def flat(found: np.ndarray, n: int) -> np.ndarray:
    """Return the bias of n values that columns() or a weight file holds."""
    return found.reshape(-1)[:n]


def repeated(kv: np.ndarray, batch: Batch) -> np.ndarray:
    """Return a key/value head for each query head."""
    return np.repeat(kv, batch.config.n_heads // batch.config.n_kv_heads, axis=1)


def summed(x: np.ndarray, batch: Batch) -> np.ndarray:
    """Return the gradient of what repeated() took."""
    n = batch.config.n_kv_heads
    found: np.ndarray = x.reshape(x.shape[0], n, -1, *x.shape[2:]).sum(2)
    return found


def attention_inputs(values: Arrays, batch: Batch) -> Arrays:
    """Return q, k (rotated, in a Llama), v, q_raw, k_raw from x, wqkv, norms and bqkv."""
    c = batch.config
    raw = values["x"] @ values["wqkv"].T + (flat(values["bqkv"], c.q_dim + 2 * c.kv_dim) if c.bias else 0.0)
    q_raw, k_raw, v = np.split(raw, [c.q_dim, c.q_dim + c.kv_dim], axis=-1)
    q, k = heads(q_raw, c.head_dim), heads(k_raw, c.head_dim)
    if c.qk_norm:
        q, k = (rmsnorm(part, weight, c.norm_eps) for part, weight in zip((q, k), values["norms"], strict=True))
    if c.arch == "llama":
        q, k = rope(q, c.rope_theta), rope(k, c.rope_theta)
    return {"q": rows(q), "k": rows(k), "v": v, "q_raw": q_raw, "k_raw": k_raw}


def scores(q: np.ndarray, k: np.ndarray, batch: Batch) -> np.ndarray:
    """Return q k^T / sqrt(head_dim), (B, n_heads, T, T), of rotated q and k."""
    head_dim = batch.config.head_dim
    found: np.ndarray = heads(q, head_dim) @ repeated(heads(k, head_dim), batch).swapaxes(-1, -2) * batch.scale
    return found


def softmax(s: np.ndarray) -> np.ndarray:
    """Return the causal softmax of scores (B, n, T, T)."""
    masked = np.where(np.tri(s.shape[-1], dtype=bool), s, -np.inf)
    p = np.exp(masked - masked.max(-1, keepdims=True))
    found: np.ndarray = p / p.sum(-1, keepdims=True)
    return found


def attention_values(p: np.ndarray, v: np.ndarray, batch: Batch) -> np.ndarray:
    """Return p v, (B, T, q_dim)."""
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
    """Return gate, up and y from h, w1, w3 and w2."""
    gate, up = values["h"] @ values["w1"].T, values["h"] @ values["w3"].T
    return {"gate": gate, "up": up, "y": (gate * activation(gate) * up) @ values["w2"].T}


def _before_gelu(values: Arrays, pre: np.ndarray, config: ModelConfig) -> np.ndarray:
    return pre + flat(values["b1"], config.hidden_dim) if config.bias else pre


def gelu_forward(values: Arrays, batch: Batch) -> Arrays:
    """Return pre (without its bias) and y from h, w1, b1 and w2."""
    pre = values["h"] @ values["w1"].T
    act, _ = gelu(_before_gelu(values, pre, batch.config), batch.config.gelu)
    return {"pre": pre, "y": act @ values["w2"].T}


def gelu_backward(values: Arrays, batch: Batch) -> Arrays:
    """Return dx and dpre from dy, pre, w1, b1 and w2."""
    _, slope = gelu(_before_gelu(values, values["pre"], batch.config), batch.config.gelu)
    dpre = values["dy"] @ values["w2"] * slope
    return {"dpre": dpre, "dx": dpre @ values["w1"]}


def mlp_forward(values: Arrays, batch: Batch) -> Arrays:
    """Return what ffn_fwd gives."""
    return gelu_forward(values, batch) if batch.config.arch == "gpt2" else ffn_forward(values)


def mlp_backward(values: Arrays, batch: Batch) -> Arrays:
    """Return what ffn_bwd_static gives."""
    return gelu_backward(values, batch) if batch.config.arch == "gpt2" else ffn_backward(values)


def ffn_backward(values: Arrays) -> Arrays:
    """Return dx, dgate and dup from dy, gate, up, w1, w3 and w2."""
    gate, up, s = values["gate"], values["up"], sigmoid(values["gate"])
    dact = values["dy"] @ values["w2"]
    dgate, dup = dact * up * s * (1.0 + gate * (1.0 - s)), dact * gate * s
    return {"dgate": dgate, "dup": dup, "dx": dgate @ values["w1"] + dup @ values["w3"]}


def softmax_backward(p: np.ndarray, dp: np.ndarray, batch: Batch) -> np.ndarray:
    """Return ds, which carries the scale."""
    found: np.ndarray = p * (dp - (p * dp).sum(-1, keepdims=True)) * batch.scale
    return found


def scores_backward(ds: np.ndarray, q: np.ndarray, k: np.ndarray, batch: Batch) -> Arrays:
    """Return dq and dk, of the rotated q and k."""
    head_dim = batch.config.head_dim
    dk = ds.swapaxes(-1, -2) @ heads(q, head_dim)
    return {"dq": rows(ds @ repeated(heads(k, head_dim), batch)), "dk": rows(summed(dk, batch))}


def values_backward(p: np.ndarray, v: np.ndarray, dattn: np.ndarray, batch: Batch) -> Arrays:
    """Return dv and dp."""
    d = heads(dattn, batch.config.head_dim)
    dp = d @ repeated(heads(v, batch.config.head_dim), batch).swapaxes(-1, -2)
    return {"dv": rows(summed(p.swapaxes(-1, -2) @ d, batch)), "dp": dp}


def attention_backward(forward: Arrays, dattn: np.ndarray, batch: Batch) -> Arrays:
    """Return dv, dp, ds, dq, dk (of the rotated q and k); ds carries the scale."""
    found = values_backward(forward["p"], forward["v"], dattn, batch)
    ds = softmax_backward(forward["p"], found["dp"], batch)
    return {**found, "ds": ds, **scores_backward(ds, forward["q"], forward["k"], batch)}


def make_values(batch: Batch, seed: int = 0, *, depth: float = 1.0) -> Arrays:
    """Return inputs and weights as a model has them: normed rows, weights of 1/sqrt(fan-in)."""
    c, g = batch.config, np.random.default_rng(seed)

    def rows_of(n: int) -> np.ndarray:
        return g.standard_normal((batch.B, batch.T, n))

    def weight(out: int, inner: int, scale: float = 1.0) -> np.ndarray:
        found: np.ndarray = g.standard_normal((out, inner)) * scale / np.sqrt(inner)
        return found

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
    if c.arch == "gpt2":
        values["bqkv"] = columns(0.3 * g.standard_normal(c.q_dim + 2 * c.kv_dim), c.dim)
        values["b1"] = columns(0.3 * g.standard_normal(c.hidden_dim), c.dim)
        return {**values, "w13": values["w1"]}
    return {**values, "w13": np.concatenate([values["w1"], values["w3"]])}


def matrices(values: Mapping[str, np.ndarray], batch: Batch) -> Arrays:
    """Return what anellm.mil.bake() takes, of inputs as make_values() and program_inputs() return them."""
    found = {name: values[name] for name in ("wqkv", "wo", "w1", "w3", "w2")}
    if batch.config.qk_norm:
        found |= dict(zip(("q_norm", "k_norm"), values["norms"], strict=True))
    if batch.config.bias:
        c = batch.config
        found |= {"bqkv": flat(values["bqkv"], c.q_dim + 2 * c.kv_dim), "b1": flat(values["b1"], c.hidden_dim)}
    return found


# ---- programs by name ------------------------------------------------------------------------------------------------


def program_inputs(batch: Batch, seed: int = 0) -> Arrays:
    """Return all input fields of all programs, of values that fp16 holds.

    Rows and weights are those of make_values(), gradients have their largest magnitude in [8, 16).
    """
    c, g = batch.config, np.random.default_rng(seed + 1)

    def gradient(n: int) -> np.ndarray:
        d = g.standard_normal((batch.B, batch.T, n))
        found: np.ndarray = d * 15.0 / np.abs(d).max()
        return found

    values = make_values(batch, seed)
    forward = attention_forward(values, batch)
    mlp = mlp_forward(values, batch)
    widths = {
        "dy": c.dim,
        "dgate_up": c.gate_up_dim,
        "dmid": c.dim,
        "dattn": c.q_dim,
        "dqkv": c.q_dim + 2 * c.kv_dim,
    }
    gradients = {name: gradient(n) for name, n in widths.items()}
    backward = attention_backward(forward, gradients["dattn"], batch)
    values |= gradients | {name: forward[name] for name in ("q", "k", "v", "p", "attn")}
    values |= {name: backward[name] for name in ("dp", "ds")}
    values |= {name: mlp[name] for name in ("gate", "up", "pre") if name in mlp}
    return {name: value.astype(np.float16).astype(np.float64) for name, value in values.items()}


def _sdpa_bwd1(v: Arrays, batch: Batch) -> Arrays:
    p = softmax(scores(v["q"], v["k"], batch))
    return {"p": p, **values_backward(p, v["v"], v["dattn"], batch)}


_PROGRAMS: Final[dict[str, Callable[[Arrays, Batch], Arrays]]] = {
    "attn_fwd": attention_forward,
    "attn_scores": attention_forward,
    "attn_values": lambda v, batch: {"attn": attention_values(v["p"], v["v"], batch)},
    "wo_fwd": lambda v, _: {"y": v["attn"] @ v["wo"].T},
    "ffn_fwd": mlp_forward,
    "ffn_bwd_w2": lambda v, _: {"dact": v["dy"] @ v["w2"]},
    "ffn_bwd_w13": lambda v, _: {"dx": v["dgate_up"] @ v["w13"]},
    "wo_bwd": lambda v, _: {"dattn": v["dmid"] @ v["wo"]},
    "qkv_bwd": lambda v, _: {"dx": v["dqkv"] @ v["wqkv"]},
    "sdpa_bwd1": _sdpa_bwd1,
    "sdpa_bwd1_given": lambda v, batch: values_backward(v["p"], v["v"], v["dattn"], batch),
    "sdpa_bwd2": lambda v, batch: scores_backward(softmax_backward(v["p"], v["dp"], batch), v["q"], v["k"], batch),
    "attn_fwd_static": attention_forward,
    "ffn_fwd_static": mlp_forward,
    "ffn_bwd_static": mlp_backward,
    "qkv_bwd_static": lambda v, _: {"dx": v["dqkv"] @ v["wqkv"]},
    "sdpa_bwd1_static": lambda v, batch: _sdpa_bwd1({**v, "dattn": v["dmid"] @ v["wo"]}, batch),
    "sdpa_bwd2_given": lambda v, batch: scores_backward(v["ds"], v["q"], v["k"], batch),
}


def program_outputs(program: AneProgram, values: Arrays, batch: Batch) -> Arrays:
    """Return the output fields of a program, in float64, of the input fields that program_inputs() gives."""
    found = _PROGRAMS[program.name](values, batch)
    return {where.name: found[where.name] for where in program.output.fields}
