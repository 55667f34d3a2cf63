"""What a model is (``ModelConfig``) and what a training run is (``TrainConfig``)."""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from anellm.activation_checkpoint import check_policy
from anellm.device import DTYPES
from anellm.errors import ConfigError
from anellm.options import DeviceOptions, check_config, check_keys, nearest, option

_INT32_MAX = 2**31 - 1
ARCHITECTURES = ("llama",)


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files("anellm").joinpath("data/presets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def preset_names() -> list[str]:
    """Return the names of the model presets, in the order of data/presets.toml."""
    return list(_presets())


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama model. Checked when made, so that no impossible one exists.

    Args:
        dim: width of the residual stream.
        hidden_dim: width of the SwiGLU layer.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of n_heads; 0 or None means n_heads.
        head_dim: width of one head, even; 0 or None means dim / n_heads.
        vocab_size: rows of the embedding table.
        max_seq_len: longest sequence, in tokens.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary embedding's wavelengths.
        tie_embeddings: the classifier is the embedding table.
        qk_norm: RMSNorm over each head of q and k before the rotary embedding (Qwen3).
        arch: "llama".

    Raises:
        ConfigError: naming the field, what was expected and what was found.
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = 0
    head_dim: int = 0
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    qk_norm: bool = False
    arch: str = "llama"

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
        for name in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_seq_len"):
            self._check_dim(name)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_kv_heads: expected a divisor of n_heads={self.n_heads}, found {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim: expected an even number (the rotary embedding turns pairs), found {self.head_dim}"
            )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ConfigError(f"{name}: expected a number, found {value!r}")
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a finite number above 0, found {value}")
        for name in ("tie_embeddings", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false, found {getattr(self, name)!r}")

    @property
    def q_dim(self) -> int:
        """Return the width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Return the width of all key heads together (as of all value heads)."""
        return self.n_kv_heads * self.head_dim

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """Return a preset's shape, with fields replaced by ``overrides``.

        Raises:
            ConfigError: on an unknown name or field (naming the nearest), or an impossible shape.
        """
        presets = _presets()
        if name not in presets:
            raise ConfigError(f"preset: unknown name {name!r}{nearest(name, presets)}")
        return cls.from_dict({**presets[name], **overrides}, source=f"preset {name}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "model config") -> ModelConfig:
        """Return the shape written by to_dict().

        Raises:
            ConfigError: on an unknown key (naming the nearest), a missing one, or an impossible value.
        """
        fields = dataclasses.fields(cls)
        check_keys(values, [f.name for f in fields], source)
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise ConfigError(f"{source}: missing {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return every field, as numbers, strings and booleans."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with fields replaced, checked again."""
        return self.from_dict({**self.to_dict(), **changes})

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
        """Return the number of parameters."""
        layer = self._layer_matmul_params() + 2 * self.dim + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * layer + self.dim

    def n_params_without_embeddings(self) -> int:
        """Return the number of parameters besides the embedding table and a separate classifier."""
        return self.n_params() - self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    def _layer_matmul_params(self) -> int:
        attention = 2 * self.q_dim * self.dim + 2 * self.kv_dim * self.dim
        return attention + 3 * self.hidden_dim * self.dim

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


DEFAULT_STEPS = 1000
_MAX = 2**53  # the largest range in which JSON readers keep whole numbers exact


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DeviceOptions):
    """Every option of a training run: defaults, flags, config file and what a run directory keeps.

    A step is one optimizer update; every interval is in steps, and 0 means never.

    Raises:
        ConfigError: naming the option, what was expected and what was found.
    """

    preset: str | None = option(None, "shape of a new model [tiny]", choices=tuple(preset_names()), group="model")
    model: str | None = option(
        None, "start from the weights of a model file, Hugging Face directory or run", group="model"
    )

    data: str | None = option(
        None, "text (.txt), JSONL or token file, folder or pattern [the text that comes along]", group="data"
    )
    val_data: str | None = option(
        None,
        "held-out data of the same kinds [held-out files in the folder of --data, else a part of it]",
        group="data",
    )
    val_fraction: float = option(
        0.05, "part of the data held out when there is no held-out data", low=0, high=0.5, group="data"
    )
    tokenizer: str | None = option(
        None,
        "tokenizer.bin, tokenizer.json or .model [beside --model, in --data, else learnt from the text]",
        group="data",
    )
    token_dtype: str = option(
        "uint16",
        "type of the ids in a token file without a header",
        choices=("uint16", "int32", "uint32"),
        group="data",
    )
    window_order: str = option(
        "epoch",
        "training windows: each once an epoch in a new order, or drawn at random",
        choices=("epoch", "random"),
        group="data",
    )

    out: str | None = option(None, "run directory [runs/PRESET-TIME]", group="run")
    resume: str | None = option(
        None,
        "go on from the newest checkpoint of --out, or from this one; starts fresh when there is none",
        bare="auto",
        group="run",
        flag_only=True,
    )
    allow_changed_data: bool = option(
        False, "with --resume: go on with other data or another tokenizer than before", group="run", flag_only=True
    )
    seed: int = option(1, "seed of weights, windows and samples", low=0, high=_MAX, group="run")
    steps: int | None = option(None, f"steps to train [{DEFAULT_STEPS}]", low=1, high=_MAX, group="run")
    epochs: float | None = option(None, "passes over the data, instead of --steps", above=0, group="run")
    save_interval: int = option(100, "steps between checkpoints; there is always one at the end", low=0, group="run")
    keep_last: int = option(2, "newest checkpoints to keep", low=1, group="run")
    keep_every: int = option(0, "keep each checkpoint whose step is a multiple of this", low=0, group="run")

    batch_size: int = option(8, "sequences in a micro-step", low=1, high=2**20, group="optimization")
    seq_len: int | None = option(
        None, "tokens in a sequence [the model's longest, at most 1024]", low=1, high=2**24, group="optimization"
    )
    dtype: str = option(
        "fp32",
        "what matrix products multiply; sums, weights and moments are fp32 in any case",
        choices=DTYPES,
        group="optimization",
    )
    activation_checkpoint: str = option(
        "all",
        "layers whose activations are kept for backward, which computes the others again: "
        "all, boundary, sqrt, every:N or none",
        group="optimization",
    )
    compact_vocab: bool = option(
        False,
        "compute the softmax over the ids that occur in the data; of a new model, as exact as with all",
        group="optimization",
    )
    gradient_accumulation_steps: int = option(1, "micro-steps in a step", low=1, high=2**20, group="optimization")
    learning_rate: float | None = option(
        None,
        "highest learning rate [by the model's size: 1.3e-3 for tiny, 6.9e-4 for stories110m; a tenth with --model]",
        low=0,
        group="optimization",
    )
    min_learning_rate: float | None = option(
        None, "where a schedule that decays ends [a tenth of --learning-rate]", low=0, group="optimization"
    )
    schedule: str = option(
        "cosine",
        "how the learning rate goes on after the warmup",
        choices=("constant", "linear", "cosine", "wsd"),
        group="optimization",
    )
    warmup_steps: int = option(40, "steps of linear warmup", low=0, high=_MAX, group="optimization")
    decay_steps: int | None = option(
        None, "last steps that decay, for wsd [a fifth of all]", low=1, high=_MAX, group="optimization"
    )
    adam_beta1: float = option(0.9, "decay of AdamW's first moment", low=0, below=1, group="optimization")
    adam_beta2: float = option(0.95, "decay of AdamW's second moment", low=0, below=1, group="optimization")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0, group="optimization")
    weight_decay: float = option(0.1, "decoupled weight decay", low=0, group="optimization")
    decay: str = option("matrices", "which tensors decay", choices=("matrices", "all"), group="optimization")
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0: do not clip", low=0, group="optimization")
    max_bad_steps: int = option(
        10,
        "stop after this many steps in a row with non-finite gradients, or that a device failed in",
        low=1,
        group="optimization",
    )

    eval_interval: int = option(
        100, "steps between evaluations; also at the start and the end", low=0, group="evaluation"
    )
    eval_windows: int = option(64, "most held-out sequences in an evaluation; 0: all", low=0, group="evaluation")
    sample_interval: int | None = option(
        None, "steps between samples [one in the middle; always one at the end]", low=0, group="evaluation"
    )
    sample_tokens: int = option(160, "tokens in a sample; 0: no samples", low=0, high=2**24, group="evaluation")
    sample_prompt: str = option("", "text that a sample goes on from", group="evaluation")
    sample_temperature: float = option(0.8, "temperature of samples; 0: the likeliest token", low=0, group="evaluation")
    sample_top_k: int = option(0, "sample among this many likeliest tokens; 0: all", low=0, group="evaluation")
    sample_top_p: float = option(
        0.95, "sample among the likeliest tokens of this total probability", above=0, high=1, group="evaluation"
    )

    log_interval: int = option(10, "steps between plain lines", low=1, group="output", flag_only=True)
    plain: bool = option(False, "plain lines, no live line", group="output", flag_only=True)
    quiet: bool = option(False, "print only the end and errors", group="output", flag_only=True)
    profile: str | None = option(
        None, "write where the time goes to this file, for ui.perfetto.dev", group="output", flag_only=True
    )
    dry_run: bool = option(
        False, "print parameters, memory and FLOPs of a step, and stop", group="output", flag_only=True
    )

    def __post_init__(self) -> None:
        check_config(self)
        super().__post_init__()
        check_policy(self.activation_checkpoint, "--activation-checkpoint")
        if self.dtype != "fp32" and self.ane_options() is not None:
            raise ConfigError(f"--dtype {self.dtype}: only for --device cpu, found --device {self.device}")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"--steps and --epochs exclude each other, found {self.steps} and {self.epochs:g}")
        if self.model is not None and self.preset is not None:
            raise ConfigError(f"--model and --preset exclude each other, found {self.model} and {self.preset}")
        peak, end = self.learning_rate, self.min_learning_rate
        if end is not None and peak is not None and end > peak:
            raise ConfigError(f"--min-learning-rate: expected at most --learning-rate={peak:g}, found {end:g}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ConfigError(f"--decay-steps: only for --schedule wsd, found --schedule {self.schedule}")
        if self.val_data is not None and self.data is None:
            raise ConfigError("--val-data: expected --data with it")
        if self.compact_vocab and self.model is not None:
            raise ConfigError("--compact-vocab: only for new models, found --model: its rows are not to be replaced")
        for name in ("model", "data", "val_data", "tokenizer", "out", "resume", "profile"):
            if getattr(self, name) == "":
                raise ConfigError(f"--{name.replace('_', '-')}: expected a path, found nothing")
