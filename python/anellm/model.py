"""A model: its parameters as NumPy views, forward, backward, and writing on from a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from anellm import errors
from anellm._ffi import Handle, check, ffi, lib, ptr, text
from anellm.activation_checkpoint import checkpoint_interval
from anellm.compress import RemainingParams, Weights, weights_kind
from anellm.config import ModelConfig
from anellm.device import DTYPES, AneOptions, Dtype, configure, resolve_device
from anellm.model_config import DIMS, GELUS
from anellm.sample import BOS_ID, EOS_ID, Sampling, TokenStream, generate_stream

if TYPE_CHECKING:
    from anellm.ane import ModelEngine

IGNORE_INDEX: int = lib.ANELLM_IGNORE_INDEX
INIT_STD = 0.02

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class TensorInfo(NamedTuple):
    """One parameter tensor: where it lies in the flat vector of all parameters.

    Attributes:
        name: the Hugging Face name.
        shape: (out, in) for matrices, (n,) for vectors.
        offset: first element, counted in floats.
        kind: "matrix", "embedding", "positions" or "vector"; AdamW's ``decay="matrices"`` leaves vectors out.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    kind: str


class Memory(NamedTuple):
    """Bytes that a model takes, by kind."""

    params_bytes: int
    grads_bytes: int
    moments_bytes: int
    activations_bytes: int
    workspace_bytes: int
    total_bytes: int


class GradNorm(NamedTuple):
    """The gradient's size.

    Attributes:
        norm: L2 norm over all parameters; inf or NaN when some are.
        n_nonfinite: how many gradients are inf or NaN.
        tensor: name of the first tensor that holds one, or None.
    """

    norm: float
    n_nonfinite: int
    tensor: str | None


def _c_config(config: ModelConfig) -> Any:
    c = ffi.new("anellm_config *")
    c.arch = lib.ANELLM_ARCH_GPT2 if config.arch == "gpt2" else lib.ANELLM_ARCH_LLAMA
    for name in DIMS:
        setattr(c, name, getattr(config, name))
    for name in ("tie_embeddings", "qk_norm", "bias"):
        setattr(c, name, int(getattr(config, name)))
    c.gelu = GELUS.index(config.gelu)
    c.norm_eps = config.norm_eps
    c.rope_theta = 0.0 if config.arch == "gpt2" else config.rope_theta
    check(lib.anellm_config_check(c))
    return c


def _dtype_code(dtype: str) -> int:
    if dtype not in DTYPES:
        raise errors.InvalidError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    return DTYPES.index(dtype)


def tensor_table(config: ModelConfig) -> list[TensorInfo]:
    """Return every parameter tensor of a model, in memory order.

    Raises:
        InvalidError: on dimensions beyond what the core can hold.
    """
    c = _c_config(config)
    n_tensors = ffi.new("int64_t *")
    check(lib.anellm_params_count(n_tensors, ffi.NULL, c))
    info = ffi.new("anellm_tensor_info *")
    kinds = {
        lib.ANELLM_TENSOR_MATRIX: "matrix",
        lib.ANELLM_TENSOR_EMBEDDING: "embedding",
        lib.ANELLM_TENSOR_POSITIONS: "positions",
    }
    table = []
    for i in range(n_tensors[0]):
        check(lib.anellm_params_info(info, c, i))
        shape = tuple(info.shape[k] for k in range(info.ndim))
        table.append(TensorInfo(text(info.name), shape, info.offset, kinds.get(info.kind, "vector")))
    return table


def memory(
    config: ModelConfig,
    batch_size: int,
    seq_len: int,
    *,
    training: bool,
    dtype: Dtype = "fp32",
    activation_checkpoint: str = "all",
    ane: AneOptions | None = None,
) -> Memory:
    """Return the memory that a model will take, without taking any.

    Args:
        config: the model's dimensions.
        batch_size: sequences (B) in a forward pass.
        seq_len: tokens (T) in each.
        training: count gradients, moments and what backward needs.
        dtype: as for Model.set_dtype().
        activation_checkpoint: as for Model.set_activation_checkpoint().
        ane: how it computes on an ANE device: surfaces count as workspace. None: on the CPU.

    Raises:
        ConfigError: on an unknown policy.
        UnsupportedError: when a dimension of the model is beyond what any engine takes.
    """
    info = ffi.new("anellm_memory_info *")
    c_config = _c_config(config)
    interval = checkpoint_interval(config.n_layers, activation_checkpoint)
    check(lib.anellm_memory(info, c_config, batch_size, seq_len, int(training), _dtype_code(dtype), interval))
    if ane is not None:
        from anellm.ane import memory_bytes

        more = memory_bytes(c_config, batch_size, seq_len, training=training, options=ane)
        info.workspace_bytes += more
        info.total_bytes += more
    return Memory(*(getattr(info, name) for name in Memory._fields))


class _Span:
    """Floats inside a C object, which it keeps alive: NumPy views of it have it as their base."""

    def __init__(self, owner: Handle, pointer: Any, n: int) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "version": 3,
            "shape": (n,),
            "typestr": "<f4",
            "data": (int(ffi.cast("uintptr_t", pointer)), False),
        }


class KVCache(Handle):
    """Keys and values of the tokens that a model has seen: see Model.kvcache()."""

    def __len__(self) -> int:
        """Return the number of tokens in the cache."""
        return int(lib.anellm_kvcache_length(self.pointer))

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises:
            InvalidError: on a length outside 0..len(cache).
        """
        check(lib.anellm_kvcache_truncate(self.pointer, length))


class Model:
    """A transformer in memory, with new weights. See also from_preset() and from_pretrained().

    Weights start as normal(0, 0.02), those that write to the residual stream divided by sqrt(2 n_layers), norms as 1,
    biases as 0.

    Args:
        config: the model's dimensions.
        device: "cpu", "ane", "ane-sim" (the Neural Engine, simulated), or "auto" (ANELLM_DEVICE, else the CPU).
        seed: of the weights, 0 to 2^64 - 1; None leaves them zero, for weights that are about to be written.
        ane: how "ane" and "ane-sim" compute; None: as AneOptions() says.

    Attributes:
        device: the name of what computes: "cpu", "ane" or "ane-sim".
        ane: the Neural Engine it computes on, with its counters; None on the CPU.

    Raises:
        InvalidError: on impossible dimensions, or ``ane`` with the CPU.
        OutOfMemoryError: when the system refuses the memory.
        UnavailableError: when there is no such device.
        UnsupportedError: when the device cannot compute a model of this shape.
    """

    def __init__(
        self, config: ModelConfig, device: str = "auto", *, seed: int | None = 0, ane: AneOptions | None = None
    ) -> None:
        """See the class."""
        configure()
        self.config = config
        self.device = "cpu"
        self.ane: ModelEngine | None = None
        wanted = resolve_device(device)
        self.tokenizer_path: Path | None = None
        out = ffi.new("anellm_model **")
        check(lib.anellm_model_create(out, _c_config(config), b"cpu"))
        self._handle = Handle(out[0], lib.anellm_model_free, "model")
        self.tensors = tensor_table(config)
        self.params = self._views(lib.anellm_model_params(self._pointer))
        self.dtype: Dtype = "fp32"  # what forward() and backward() multiply: see set_dtype()
        self.activation_checkpoint = "all"
        self.weights: Weights = "fp32"  # what decode() reads: see compress()
        self._training_views: list[Mapping[str, FloatArray]] | None = None
        self.to(wanted, ane)
        if seed is not None:
            check(lib.anellm_model_init(self._pointer, seed, INIT_STD))

    @property
    def _pointer(self) -> Any:
        return self._handle.pointer

    def _views(self, pointer: Any) -> Mapping[str, FloatArray]:
        last = self.tensors[-1]
        n = last.offset + int(np.prod(last.shape))
        flat = np.asarray(_Span(self._handle, pointer, n))
        return {t.name: flat[t.offset : t.offset + int(np.prod(t.shape))].reshape(t.shape) for t in self.tensors}

    # ---- making and keeping ------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls, config: ModelConfig, device: str = "auto", *, seed: int | None = 0, ane: AneOptions | None = None
    ) -> Model:
        """Return a model with new weights: the same as ``Model(config, device, seed=seed, ane=ane)``."""
        return cls(config, device, seed=seed, ane=ane)

    @classmethod
    def from_preset(
        cls,
        name: str,
        device: str = "auto",
        *,
        seed: int | None = 0,
        ane: AneOptions | None = None,
        **overrides: Any,
    ) -> Model:
        """Return a model of a preset's shape with new weights; ``overrides`` replace fields of its ModelConfig.

        Raises:
            ConfigError: on an unknown preset or field.
        """
        return cls(ModelConfig.from_preset(name, **overrides), device, seed=seed, ane=ane)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "auto", *, ane: AneOptions | None = None) -> Model:
        """Return the model of a file or directory; its tokenizer, if one lies there, is named by ``tokenizer_path``.

        Args:
            path: a llama2.c, llm.c, GGUF or BLZT file, a Hugging Face directory, a checkpoint, or a run's directory.
            device: as for Model.
            ane: as for Model.

        Raises:
            DataError: when the path holds no model, or a damaged one.
        """
        from anellm import weights

        source = weights.load_pretrained(path)
        model = cls(source.config, device, seed=None, ane=ane)
        for name, array in source.tensors:
            model.params[name][...] = array
        model.tokenizer_path = source.tokenizer_path
        model.weights_changed()
        return model

    def save_pretrained(
        self,
        path: str | Path,
        format: Literal["hf", "llama2c", "llama2c-v1", "llmc", "llmc-v1", "llmc-v5"] = "hf",
        *,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        max_shard_bytes: int | None = None,
    ) -> None:
        """Write the model so that from_pretrained() and other programs read it.

        Args:
            path: a directory for "hf" (config.json and model.safetensors), a file for the others.
            format: "hf"; for a Llama "llama2c" (the .bin file of version 0) or "llama2c-v1"; for a GPT-2 "llmc"
                (llm.c's file of version 3), "llmc-v1" or "llmc-v5" (bfloat16).
            dtype: what weights are rounded to, for "hf"; the other formats have one of their own.
            max_shard_bytes: tensor bytes in one file of "hf", at least 1; None: 5 GB.

        Raises:
            InvalidError: on an unknown format or dtype, or a model that the format cannot express.
            NonFiniteError: on inf or NaN among the weights, or a value that the dtype cannot hold; nothing is written.
        """
        from anellm import weights

        weights.save(path, self.config, self.params, format, dtype, max_shard_bytes)

    def to(self, device: str, ane: AneOptions | None = None) -> Model:
        """Let another device compute from now on, and return the model; weights, gradients and moments stay.

        On ANE devices attention and mlp blocks run on the engine, all else on the CPU: generate() and decode() too.

        Args:
            device: as for Model.
            ane: as for Model.

        Raises:
            InvalidError: on ``ane`` with the CPU.
            UnavailableError: when there is no such device.
            UnsupportedError: when the device cannot compute a model of this shape or dtype; the model stays where it
                was.
        """
        name = resolve_device(device)
        if name != "cpu" and self.dtype != "fp32":
            raise errors.UnsupportedError(f"device {name}: expected a model of dtype fp32, found {self.dtype}")
        if name == "cpu":
            if ane is not None:
                raise errors.InvalidError("ane: only for the devices ane and ane-sim, found cpu")
            if self.ane is not None:
                self.ane.detach()
            self.ane = None
        else:
            from anellm.ane import AneDevice, ModelEngine

            self.ane = ModelEngine(self._handle, self.config.n_layers, AneDevice(name, ane or AneOptions()))
        self.device = name
        return self

    @property
    def ane_options(self) -> AneOptions | None:
        """Return how the model computes on an ANE device; None on the CPU."""
        return None if self.ane is None else self.ane.device.options

    # ---- parameters -----------------------------------------------------------------------------------------------

    def weights_changed(self) -> None:
        """Tell the model that its parameters were written to from outside; call it before the next forward()."""
        check(lib.anellm_model_weights_changed(self._pointer))

    def set_dtype(self, dtype: Dtype) -> None:
        """Choose what forward() and backward() multiply matrices with; a model starts with "fp32".

        Parameters, gradients, moments and sums are fp32 in any case. On a CPU without a bf16 unit (tiers avx512bf16
        and amx of ``anellm info``) bf16 saves memory, not time.

        Args:
            dtype: "fp32", or "bf16": inputs of matrix products, and the largest of the activations that are kept for
                backward(), are rounded to bf16 (to nearest, ties to even; a number is off by at most 1/256).

        Raises:
            InvalidError: on another dtype.
            UnsupportedError: on bf16 where a Neural Engine computes: its products are fp16.
        """
        check(lib.anellm_model_set_dtype(self._pointer, _dtype_code(dtype)))
        self.dtype = dtype

    def set_activation_checkpoint(self, policy: str) -> None:
        """Choose what a training forward() keeps for backward(); a model starts with "all".

        What is not kept is computed again. Losses and gradients stay the same: on the CPU bit for bit.

        Args:
            policy: "all", "boundary", "sqrt", "every:N" or "none": see anellm.activation_checkpoint.saved_layers().

        Raises:
            ConfigError: on another policy.
        """
        check(lib.anellm_model_set_checkpoint(self._pointer, checkpoint_interval(self.config.n_layers, policy)))
        self.activation_checkpoint = policy

    def compact_vocabulary(self, ids: np.ndarray[Any, Any] | None, *, equalize: bool = False) -> None:
        """Let the classifier compute only some ids: as exact as with all, and faster the fewer there are.

        The ids that are left out must never be a token or target in training, and their rows of the classifier must be
        equal; then they stay equal, and count in the softmax as one column of their joint weight. Losses are those of
        the whole vocabulary, up to rounding; logits and decoding use the whole table.

        Args:
            ids: (n,) int32, ascending: those that occur. None: all of them again.
            equalize: set the rows of all others to that of the first of them, as befits a new model.

        Raises:
            InvalidError: on ids that do not ascend, or unequal rows.
            TokenRangeError: on an id outside the vocabulary.
        """
        if ids is None:
            check(lib.anellm_model_compact_vocab(self._pointer, ffi.NULL, 0))
            return
        pointer = ptr(ids, np.int32, (len(ids),), name="ids")
        if equalize and len(ids):
            left_out = np.ones(self.config.vocab_size, bool)
            left_out[ids[(ids >= 0) & (ids < self.config.vocab_size)]] = False
            others = np.flatnonzero(left_out)
            table = self.params[self.tensors[0].name if self.config.tie_embeddings else "lm_head.weight"]
            if len(others):
                table[others] = table[others[0]]
                self.weights_changed()
        check(lib.anellm_model_compact_vocab(self._pointer, pointer, len(ids)))

    def compress(self, weights: Weights, *, release: bool = False) -> None:
        """Make compressed copies of the weights that decode() reads: it is faster by as much as they are smaller.

        Decoding with them is less exact; forward() still uses the fp32 weights. Copies follow weights_changed() and
        the optimizer. Of a tied embedding the copy is looked up too; a separate one stays fp32.

        Args:
            weights: "bf16" (half the bytes; a weight is off by at most 1/256), "int8" (over a quarter; off by at
                most 1/254 of the largest among the 64 of its group, along a row), "fp32" (drops the copies).
            release: give the fp32 matrices back to the system. From then on the model can only decode: all else is
                refused, reading a released matrix from ``params`` too. An array that was taken from ``params`` before
                holds nothing of use any more.

        Raises:
            InvalidError: on an unknown format, ``release`` with "fp32", or a model whose weights were released.
            OutOfMemoryError: when the system refuses the memory.
        """
        check(lib.anellm_model_compress(self._pointer, weights_kind(weights), int(release)))
        self.weights = weights
        if release:
            tied = self.config.tie_embeddings
            gone = frozenset(t.name for t in self.tensors if t.kind == "matrix" or (t.kind == "embedding" and tied))
            self.params = RemainingParams(self.params, gone, weights)

    def enable_training(self) -> None:
        """Take memory for gradients and moments (zero). The first training forward() does it by itself."""
        check(lib.anellm_model_enable_training(self._pointer))

    def _training(self, which: int) -> Mapping[str, FloatArray]:
        if self._training_views is None:
            pointers = [lib.anellm_model_grads(self._pointer)]
            pointers += [lib.anellm_model_moments(self._pointer, i) for i in (0, 1)]
            if ffi.NULL in pointers:
                raise errors.InvalidError("training is not enabled: call enable_training(), or forward with targets")
            self._training_views = [self._views(p) for p in pointers]
        return self._training_views[which]

    @property
    def grads(self) -> Mapping[str, FloatArray]:
        """Return the gradients by tensor name, as views.

        Raises:
            InvalidError: when training is not enabled.
        """
        return self._training(0)

    @property
    def moments_m(self) -> Mapping[str, FloatArray]:
        """Return AdamW's first moments by tensor name, as views; raises as ``grads``."""
        return self._training(1)

    @property
    def moments_v(self) -> Mapping[str, FloatArray]:
        """Return AdamW's second moments by tensor name, as views; raises as ``grads``."""
        return self._training(2)

    def n_params(self) -> int:
        """Return the number of parameters."""
        return self.config.n_params()

    def memory(self, batch_size: int, seq_len: int, *, training: bool = True) -> Memory:
        """Return the memory that a pass over (batch_size, seq_len) tokens takes in all."""
        return memory(
            self.config,
            batch_size,
            seq_len,
            training=training,
            dtype=self.dtype,
            activation_checkpoint=self.activation_checkpoint,
            ane=self.ane_options,
        )

    # ---- forward and backward -------------------------------------------------------------------------------------

    @overload
    def forward(self, tokens: np.ndarray[Any, Any], targets: None = None) -> FloatArray: ...
    @overload
    def forward(
        self, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], *, training: bool = True
    ) -> float: ...
    def forward(
        self, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any] | None = None, *, training: bool = True
    ) -> float | FloatArray:
        """Return the logits, or with targets the mean cross-entropy in nats.

        Args:
            tokens: (B, T) int32, T at most config.max_seq_len.
            targets: (B, T) int32; IGNORE_INDEX (-100) leaves a place out of the mean.
            training: with targets: keep what backward() needs.

        Returns:
            Logits (B, T, vocab_size) float32 without targets, else the loss.

        Raises:
            InvalidError: on a wrong shape or dtype.
            TokenRangeError: on an id outside the vocabulary.
            OutOfMemoryError: when the system refuses the memory.
        """
        B, T = _batch_shape(tokens)
        if targets is None:
            logits = np.empty((B, T, self.config.vocab_size), np.float32)
            self._forward(tokens, None, training=False, logits=logits)
            return logits
        loss = ffi.new("double *")
        self._forward(tokens, targets, training=training, loss=loss)
        return float(loss[0])

    def loss_per_token(self, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> FloatArray:
        """Return each token's cross-entropy in nats, 0 where the target is IGNORE_INDEX; keeps nothing for backward().

        Args:
            tokens: (B, T) int32.
            targets: (B, T) int32.

        Returns:
            (B, T) float32.
        """
        losses = np.empty(_batch_shape(tokens), np.float32)
        self._forward(tokens, targets, training=False, losses=losses)
        return losses

    def _forward(
        self,
        tokens: np.ndarray[Any, Any],
        targets: np.ndarray[Any, Any] | None,
        *,
        training: bool,
        loss: Any = ffi.NULL,
        losses: FloatArray | None = None,
        logits: FloatArray | None = None,
    ) -> None:
        B, T = _batch_shape(tokens)
        try:
            check(
                lib.anellm_model_forward(
                    self._pointer,
                    loss,
                    ffi.NULL,
                    ptr(losses, np.float32, (B, T), write=True, name="losses"),
                    ptr(logits, np.float32, (B, T, self.config.vocab_size), write=True, name="logits"),
                    ptr(tokens, np.int32, (B, T), name="tokens"),
                    ptr(targets, np.int32, (B, T), name="targets"),
                    B,
                    T,
                    int(training),
                )
            )
        finally:
            if self.ane is not None:
                self.ane.note_refusals()

    def backward(self, scale: float = 1.0, *, accumulate: bool = False) -> None:
        """Compute the gradients of scale * loss of the last training forward().

        Args:
            scale: multiplies the loss, e.g. 1 / gradient_accumulation_steps.
            accumulate: add to the gradients instead of overwriting them.

        Raises:
            InvalidError: without a training forward() before it; each forward serves one backward.
        """
        check(lib.anellm_model_backward(self._pointer, scale, int(accumulate)))

    def grad_norm(self, scale: float = 1.0) -> GradNorm:
        """Return the L2 norm of scale * gradients, and what is not finite among them.

        Raises:
            InvalidError: when training is not enabled.
        """
        norm, bad, first = ffi.new("double *"), ffi.new("int64_t *"), ffi.new("int64_t *")
        check(lib.anellm_model_grad_norm(self._pointer, norm, bad, first, scale))
        tensor = self.tensors[first[0]].name if first[0] >= 0 else None
        return GradNorm(float(norm[0]), int(bad[0]), tensor)

    # ---- decoding -------------------------------------------------------------------------------------------------

    def kvcache(self, max_tokens: int | None = None) -> KVCache:
        """Return an empty cache for decode().

        Args:
            max_tokens: how many tokens it can hold; None means config.max_seq_len.

        Raises:
            InvalidError: on a size outside 1..max_seq_len.
        """
        out = ffi.new("anellm_kvcache **")
        size = self.config.max_seq_len if max_tokens is None else max_tokens
        check(lib.anellm_kvcache_create(out, self._pointer, size))
        return KVCache(out[0], lib.anellm_kvcache_free, "cache")

    def decode(self, cache: KVCache, tokens: np.ndarray[Any, Any]) -> FloatArray:
        """Append tokens to a cache and return the logits that follow the last of them.

        Args:
            cache: from kvcache(); used by one thread at a time.
            tokens: (n,) int32, n at least 1.

        Returns:
            (vocab_size,) float32.

        Raises:
            InvalidError: when the cache is full or belongs to a model of another shape.
            TokenRangeError: on an id outside the vocabulary; the cache is unchanged.
        """
        n = int(np.size(tokens))
        logits = np.empty(self.config.vocab_size, np.float32)
        check(
            lib.anellm_model_decode(
                self._pointer,
                cache.pointer,
                ptr(logits, np.float32, write=True),
                ptr(tokens, np.int32, (n,), name="tokens"),
                n,
            )
        )
        return logits

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.9,
        min_p: float = 0.0,
        seed: int = 1337,
        stop_ids: Collection[int] = (BOS_ID, EOS_ID),
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Write on from a prompt and return the new tokens; Sampling says what the settings mean.

        Args:
            ids: the prompt's tokens, at least one (BOS to start a new text).
            max_new_tokens: how many at most; generation also ends where max_seq_len is full.
            temperature: 0 takes the likeliest token each time.
            top_k: 0 is off.
            top_p: 1 is off.
            min_p: 0 is off.
            seed: the same seed gives the same text.
            stop_ids: tokens that end the text; they are not returned.
            on_token: called with each token as it comes.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        found = []
        for token in self.stream(ids, max_new_tokens, sampling, stop_ids=stop_ids):
            found.append(token)
            if on_token is not None:
                on_token(token)
        return found

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop_ids: Collection[int] = (BOS_ID, EOS_ID),
        sample_index: int = 0,
    ) -> TokenStream:
        """Return an iterator over new tokens: see anellm.sample.generate_stream."""
        return generate_stream(self, ids, max_new_tokens, sampling, stop_ids=stop_ids, sample_index=sample_index)

    def __repr__(self) -> str:
        """Return the shape in a line."""
        c = self.config
        return (
            f"Model({c.arch}, dim={c.dim}, hidden_dim={c.hidden_dim}, n_layers={c.n_layers}, n_heads={c.n_heads}, "
            f"n_kv_heads={c.n_kv_heads}, vocab_size={c.vocab_size}, params={self.n_params()}, device={self.device})"
        )


def _batch_shape(tokens: Any) -> tuple[int, int]:
    shape = getattr(tokens, "shape", None)
    if shape is None or len(shape) != 2:
        found = type(tokens).__name__ if shape is None else f"shape {shape}"
        raise errors.InvalidError(f"tokens: expected a (B, T) int32 array, found {found}")
    return int(shape[0]), int(shape[1])
