"""What a model is: its shape, and the presets that have names."""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from anellm.errors import ConfigError
from anellm.options import check_keys, nearest

_INT32_MAX = 2**31 - 1
ARCHITECTURES = ("llama", "gpt2")
GELUS = ("tanh", "erf")
_ROPE_THETA = 10000.0
_PAD = 128  # a padded vocabulary is a multiple of this, as in llm.c


DIMS = (
    "dim",
    "hidden_dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "vocab_size",
    "max_seq_len",
    "padded_vocab_size",
)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _with_padding(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the changes, and where those change a padded vocabulary's size, its padding anew."""
    padded, changed = values.get("padded_vocab_size"), {**values, **changes}
    if "vocab_size" in changes and "padded_vocab_size" not in changes and padded:
        size = changes["vocab_size"]
        pads = padded != values["vocab_size"] and isinstance(size, int)
        changed["padded_vocab_size"] = -(-size // _PAD) * _PAD if pads else 0
    return changed


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files("anellm").joinpath("data/presets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def preset_names() -> list[str]:
    """Return the names of the model presets, in the order of data/presets.toml."""
    return list(_presets())


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama or GPT-2 model. Checked when made, so that no impossible one exists.

    Args:
        dim: width of the residual stream.
        hidden_dim: width of the SwiGLU layer, or of GPT-2's GELU layer; there, 0 or None means 4 * dim.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of n_heads; 0 or None means n_heads, which GPT-2 always has.
        head_dim: width of one head, even in a Llama, dim / n_heads in a GPT-2; 0 or None means dim / n_heads.
        vocab_size: tokens that there are.
        max_seq_len: longest sequence, in tokens; in a GPT-2 the rows of the position table.
        norm_eps: epsilon of RMSNorm (Llama) or LayerNorm (GPT-2).
        rope_theta: base of the rotary embedding's wavelengths; a GPT-2 has none, so there it stays as it is.
        tie_embeddings: the classifier is the embedding table, as it always is in a GPT-2.
        qk_norm: RMSNorm over each head of q and k before the rotary embedding (Qwen3).
        arch: "llama" or "gpt2".
        bias: matrices and norms have biases; only GPT-2.
        gelu: GPT-2's activation: "tanh" (the approximation that OpenAI's weights were trained with) or "erf" (exact).
        padded_vocab_size: rows of GPT-2's embedding table, at least vocab_size; the rows behind the vocabulary are
            zero, never predicted and never trained. 0 or None means vocab_size, which a Llama always has.

    Raises:
        ConfigError: naming the field, what was expected and what was found.
    """

    dim: int
    hidden_dim: int = 0
    n_layers: int
    n_heads: int
    n_kv_heads: int = 0
    head_dim: int = 0
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = _ROPE_THETA
    tie_embeddings: bool = True
    qk_norm: bool = False
    arch: str = "llama"
    bias: bool = False
    gelu: str = "tanh"
    padded_vocab_size: int = 0

    def __post_init__(self) -> None:
        if not self.n_kv_heads:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if not self.head_dim:
            for name in ("dim", "n_heads"):
                self._check_dim(name)
            if self.dim % self.n_heads:
                raise ConfigError(
                    f"dim: expected a multiple of n_heads={self.n_heads} where head_dim is not given, found {self.dim}"
                )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if not self.hidden_dim and self.arch == "gpt2":
            self._check_dim("dim")
            object.__setattr__(self, "hidden_dim", 4 * self.dim)
        if not self.padded_vocab_size:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)
        self.validate()

    def _check_dim(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name}: expected a whole number, found {value!r}")
        if not 1 <= value <= _INT32_MAX:
            raise ConfigError(f"{name}: expected 1 to {_INT32_MAX}, found {value}")

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field, what was expected and what was found.
        """
        if self.arch not in ARCHITECTURES:
            raise ConfigError(f"arch: expected one of {', '.join(ARCHITECTURES)}, found {self.arch!r}")
        for name in DIMS:
            self._check_dim(name)
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ConfigError(f"{name}: expected a number, found {value!r}")
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a finite number above 0, found {value}")
        for name in ("tie_embeddings", "qk_norm", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false, found {getattr(self, name)!r}")
        if self.gelu not in GELUS:
            raise ConfigError(f"gelu: expected one of {', '.join(GELUS)}, found {self.gelu!r}")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse fields that do not go together, or that the architecture does not have."""
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_kv_heads: expected a divisor of n_heads={self.n_heads}, found {self.n_kv_heads}")
        if self.padded_vocab_size < self.vocab_size:
            raise ConfigError(
                f"padded_vocab_size: expected at least vocab_size={self.vocab_size}, found {self.padded_vocab_size}"
            )
        if self.arch == "llama":
            if self.head_dim % 2:
                raise ConfigError(
                    f"head_dim: expected an even number (the rotary embedding turns pairs), found {self.head_dim}"
                )
            only = {"bias": False, "gelu": "tanh", "padded_vocab_size": self.vocab_size}
        else:
            only = {
                "n_kv_heads": self.n_heads,
                "head_dim": self.dim // self.n_heads,
                "rope_theta": _ROPE_THETA,
                "tie_embeddings": True,
                "qk_norm": False,
            }
            if self.dim % self.n_heads:
                raise ConfigError(f"dim: expected a multiple of n_heads={self.n_heads}, found {self.dim}")
        for name, value in only.items():
            found = getattr(self, name)
            if found != value:
                raise ConfigError(f"{name}: expected {_shown(value)} with arch {self.arch}, found {_shown(found)}")

    @property
    def q_dim(self) -> int:
        """Return the width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Return the width of all key heads together (as of all value heads)."""
        return self.n_kv_heads * self.head_dim

    @property
    def gate_up_dim(self) -> int:
        """Return the rows of the MLP's first matrix: gate and up in a Llama, what GELU gets in a GPT-2."""
        return (1 if self.arch == "gpt2" else 2) * self.hidden_dim

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """Return a preset's shape, with fields replaced by ``overrides``.

        Raises:
            ConfigError: on an unknown name or field (naming the nearest), or an impossible shape.
        """
        presets = _presets()
        if name not in presets:
            raise ConfigError(f"preset: unknown name {name!r}{nearest(name, presets)}")
        return cls.from_dict(_with_padding(presets[name], overrides), source=f"preset {name}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "model config") -> ModelConfig:
        """Return the shape written by to_dict().

        Raises:
            ConfigError: on an unknown key (naming the nearest), a missing one, or an impossible value.
        """
        fields = dataclasses.fields(cls)
        check_keys(values, [f.name for f in fields], source)
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        if values.get("arch") != "gpt2":
            required.add("hidden_dim")
        missing = [f.name for f in fields if f.name in required and f.name not in values]
        if missing:
            raise ConfigError(f"{source}: missing {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return every field, as numbers, strings and booleans."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with fields replaced, checked again; a padded vocabulary of another size is padded anew."""
        return self.from_dict(_with_padding(self.to_dict(), changes))

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a Hugging Face config.json."""
        from anellm.hfconfig import to_hf

        return to_hf(self)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Return the shape that a Hugging Face config.json describes.

        Raises:
            DataError: naming the source, the key, what was expected and what was found; also for what is
                not supported (biases, scaled rotary embeddings, sliding windows, other model types).
        """
        from anellm.hfconfig import from_hf

        return from_hf(values, source)

    def n_params(self) -> int:
        """Return the number of parameters; the rows that pad a vocabulary are none."""
        norm = self.dim * (2 if self.bias else 1)
        layer = self._layer_matmul_params() + 2 * norm + (2 * self.head_dim if self.qk_norm else 0)
        if self.bias:
            layer += 3 * self.q_dim + self.hidden_dim + 2 * self.dim
        return self._embedding_params() + self.n_layers * layer + norm

    def n_params_without_embeddings(self) -> int:
        """Return the number of parameters besides the embedding tables and a separate classifier."""
        return self.n_params() - self._embedding_params()

    def _embedding_params(self) -> int:
        positions = self.max_seq_len if self.arch == "gpt2" else 0
        return (self.vocab_size * (1 if self.tie_embeddings else 2) + positions) * self.dim

    def _layer_matmul_params(self) -> int:
        attention = 2 * self.q_dim * self.dim + 2 * self.kv_dim * self.dim
        return attention + (self.gate_up_dim + self.hidden_dim) * self.dim

    def flops_per_token(self, seq_len: int) -> int:
        """Return the floating-point operations of one training token, forward and backward.

        Defined as ``6 * P + 6 * n_layers * q_dim * seq_len``. P counts the weights that multiply activations: the
        matrices of every block, and the classifier once whether tied or not; the embedding lookup and the norms
        are left out. A weight costs 2 operations forward and 4 backward. The second term is the attention itself:
        q·k and p·v take 2 * 2 * q_dim operations a pair of tokens, times 3 with the backward pass, over the
        seq_len / 2 keys that a causal query sees on average.

        Args:
            seq_len: tokens in a sequence.

        Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1, with the causal half of the attention.
        """
        matmul = self.n_layers * self._layer_matmul_params() + self.vocab_size * self.dim
        return 6 * matmul + 6 * self.n_layers * self.q_dim * seq_len
