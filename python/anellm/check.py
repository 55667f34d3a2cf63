"""The verb ``check``: a GPT-2 against a debug state, as llm.c's test_gpt2.c does it.

A debug state (debug_state.py) holds a batch with the logits, loss and gradients of a reference. Then ten steps of AdamW
on that batch, whose losses are compared too: with those of a file, or with those that llm.c publishes for GPT-2 124M.
``--layer-by-layer`` compares two devices instead, and is in check_layers.py.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from anellm import check_layers, debug_state, safeio, saferead
from anellm.ane_run import describe_engine, evaluation_summary
from anellm.cli import Result, Verb
from anellm.debug_state import DebugState
from anellm.device import DTYPES, Dtype, named_device, set_threads
from anellm.differences import SINGLE, UNITS, Row, arithmetic, compare
from anellm.errors import ConfigError, DataError
from anellm.inputs import check_fits
from anellm.model import Model, memory
from anellm.model_config import ModelConfig, preset_names
from anellm.optim import AdamW
from anellm.options import DeviceOptions, option
from anellm.weights import load_pretrained
from anellm.weights_llmc import refuse_inexpressible

STEPS: Final = 10
_LEARNING_RATE, _BETAS, _EPSILON, _WEIGHT_DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01  # of gpt2_update() in test_gpt2.c
_LOSSES_SUFFIX: Final = ".losses.json"
_LIMIT_BYTES: Final = 1 << 16

# What test_gpt2.c (github.com/karpathy/llm.c) expects of GPT-2 124M on the batch of gpt2_124M_debug_state.bin, B 4 and
# T 64, and its tolerance.
_PUBLISHED: Final = (
    5.270007133483887,
    4.059706687927246,
    3.3751230239868164,
    2.8007826805114746,
    2.315382242202759,
    1.8490285873413086,
    1.3946564197540283,
    0.9991465210914612,
    0.6240804195404053,
    0.37651097774505615,
)
_PUBLISHED_TOLERANCE: Final = 1e-2
_TOLERANCE, _LOSS_TOLERANCE = 1e-4, 1e-4

# A Neural Engine multiplies fp16. What a layer may be off is a part of what it adds, and the errors of layers are
# independent: their sums are off by no larger part, however many there are (docs/ane.md). 0.05 is what test_gpt2.cu
# allows the losses of 16-bit arithmetic.
_FP16_TOLERANCE: Final = (check_layers.FORWARD_UNITS + check_layers.BACKWARD_UNITS) * UNITS["fp16"]
_FP16_LOSS_TOLERANCE: Final = 0.05

# What llm.c calls the tensors of a layer.
_KINDS: Final = {
    "wte": "wte",
    "wpe": "wpe",
    "ln_1": "ln1",
    "c_attn": "qkv",
    "attn.c_proj": "attproj",
    "ln_2": "ln2",
    "c_fc": "fc",
    "mlp.c_proj": "fcproj",
    "ln_f": "lnf",
}


@dataclass(frozen=True, kw_only=True)
class CheckConfig(DeviceOptions):
    """The options of ``check``."""

    model: str | None = option(
        None,
        "GPT-2: llm.c file, Hugging Face directory or run; with --layer-by-layer any model",
        group="model",
    )
    preset: str | None = option(
        None,
        "with --layer-by-layer, instead of --model: shape of a model with random weights",
        choices=tuple(preset_names()),
        group="model",
    )
    dtype: str = option("fp32", "what matrix products multiply", choices=DTYPES, group="model")
    layer_by_layer: bool = option(
        False,
        "compare each layer with that of another device: both get the input and the gradient that the reference has",
        group="reference",
    )
    reference: str | None = option(
        None, "with --layer-by-layer: the device to compare with [cpu]", choices=("cpu", "ane-sim"), group="reference"
    )
    debug_state: str | None = option(
        None, "llm.c's debug state to compare with; with --layer-by-layer its batch is taken", group="reference"
    )
    losses: str | None = option(
        None,
        f"JSON list of the {STEPS} losses to compare with [the file STATE{_LOSSES_SUFFIX} beside the state; "
        "for llm.c's own state of GPT-2 124M those that it publishes]",
        group="reference",
    )
    tolerance: float | None = option(
        None,
        f"largest difference: on the CPU as a part of the tensor's largest value [{_TOLERANCE:g}]; on ANE devices "
        f"[{_FP16_TOLERANCE:.2g}] and with --layer-by-layer as a part of its Frobenius norm",
        above=0,
        group="reference",
    )
    loss_tolerance: float | None = option(
        None,
        f"largest difference of losses [{_LOSS_TOLERANCE:g}; {_PUBLISHED_TOLERANCE:g} for those that llm.c publishes; "
        f"on ANE devices {_FP16_LOSS_TOLERANCE:g}]",
        above=0,
        group="reference",
    )
    write_debug_state: str | None = option(
        None, f"write what the model gives to this file, and its losses to FILE{_LOSSES_SUFFIX}", group="output"
    )
    batch_size: int | None = option(
        None, "without --debug-state: sequences in the batch [4]", low=1, high=2**20, group="output"
    )
    seq_len: int | None = option(
        None,
        "without --debug-state: tokens in a sequence [64, or the model's longest]",
        low=1,
        high=2**24,
        group="output",
    )
    seed: int | None = option(
        None,
        "without --debug-state: seed of what is drawn at random, the batch's ids and the weights of --preset [1]",
        low=0,
        high=2**64 - 1,
        group="output",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "debug_state", "losses", "write_debug_state"):
            if getattr(self, name) == "":
                raise ConfigError(f"--{name.replace('_', '-')}: expected a path, found nothing")
        if self.debug_state is not None:
            self._refuse(("batch_size", "seq_len", "seed"), "only without --debug-state, which has a batch")
        if self.layer_by_layer:
            self._check_layer_by_layer()
            return
        self._refuse(("preset", "reference"), "only with --layer-by-layer")
        if self.model is None:
            raise ConfigError("--model: needed, and not given")
        if self.debug_state is None and self.write_debug_state is None:
            raise ConfigError("expected --debug-state to compare with, or --write-debug-state, found neither")
        if self.debug_state is None:
            self._refuse(("losses", "loss_tolerance"), "only with --debug-state")
            return
        target = self.write_debug_state
        if target is not None and Path(target).resolve() == Path(self.debug_state).resolve():
            raise ConfigError(f"--write-debug-state: expected another file than --debug-state, found {target}")

    def _check_layer_by_layer(self) -> None:
        self._refuse(("losses", "loss_tolerance", "write_debug_state"), "only without --layer-by-layer")
        if (self.model is None) == (self.preset is None):
            raise ConfigError("--model, --preset: expected one of the two")
        if self.debug_state is not None:
            self._refuse(("preset",), "only without --debug-state")
        device, reference = named_device(self.device), self.reference or "cpu"
        if device == reference and (device != "cpu" or self.dtype == "fp32"):
            raise ConfigError(
                f"--layer-by-layer: expected --device, or --dtype, other than those of --reference {reference}, found "
                f"{device}, {self.dtype}: it would be compared with itself"
            )

    def _refuse(self, names: Sequence[str], why: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: {why}")


class Step(NamedTuple):
    """One step of AdamW: its loss in nats, the reference's (None where there is none), and the time it took."""

    loss: float
    expected: float | None
    ok: bool
    seconds: float


@dataclass
class _Report:
    model: Model
    rows: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    loss: Step | None = None
    tolerances: dict[str, float] = field(default_factory=dict)
    told: str = ""  # the same in words

    def wrong(self) -> list[str]:
        """Return the names of what is not within tolerance."""
        names = [row.name for row in self.rows if not row.ok]
        names += [] if self.loss is None or self.loss.ok else ["loss"]
        return names + [f"loss of step {i}" for i, step in enumerate(self.steps) if not step.ok]


def llmc_name(name: str) -> str:
    """Return what llm.c's test calls the gradient of a tensor: "dqkvw" for "transformer.h.0.attn.c_attn.weight"."""
    stem, _, kind = name.rpartition(".")
    (found,) = (ours for theirs, ours in _KINDS.items() if stem.endswith(theirs))
    return f"d{found}" + ("" if found in ("wte", "wpe") else kind[0])


def read_losses(path: Path) -> tuple[float, ...]:
    """Read the reference's losses.

    Raises:
        DataError: naming the file, expected and found.
    """
    data = saferead.read_regular(path, DataError, _LIMIT_BYTES, follow=True)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    good = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if not good or len(values) != STEPS:
        found = f"{len(values)} values" if good else "something else"
        raise DataError(f"{path}: expected a list of {STEPS} finite numbers, found {found}")
    return tuple(float(value) for value in values)


def _reference_losses(config: CheckConfig, shape: ModelConfig, state: DebugState) -> tuple[Sequence[float], float]:
    """Return the losses to compare with, none where there are none, and their tolerance."""
    fp16 = arithmetic(config.device, config.dtype) == "fp16"
    tolerance = config.loss_tolerance or (_FP16_LOSS_TOLERANCE if fp16 else _LOSS_TOLERANCE)
    beside = Path(str(config.debug_state) + _LOSSES_SUFFIX)
    if config.losses is not None or beside.is_file():
        return read_losses(beside if config.losses is None else Path(config.losses)), tolerance
    is_124m = shape.replace(padded_vocab_size=50304) == ModelConfig.from_preset("gpt2")
    if is_124m and state.tokens.shape == (4, 64) and abs(state.loss - _PUBLISHED[0]) < _PUBLISHED_TOLERANCE:
        return _PUBLISHED, config.loss_tolerance or max(tolerance, _PUBLISHED_TOLERANCE)
    return (), tolerance


def _random_batch(config: CheckConfig, shape: ModelConfig) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    n_rows, n_tokens = config.batch_size or 4, config.seq_len or min(64, shape.max_seq_len)
    if n_tokens > shape.max_seq_len:
        raise ConfigError(f"--seq-len: expected at most the model's longest, {shape.max_seq_len}, found {n_tokens}")
    rng = np.random.default_rng(1 if config.seed is None else config.seed)
    ids = rng.integers(0, shape.vocab_size, (n_rows, n_tokens + 1), np.int32)
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def run(config: CheckConfig) -> Result:
    """Compare, and print and return the table."""
    set_threads(config.threads)
    source = None if config.model is None else load_pretrained(config.model)
    shape = ModelConfig.from_preset(str(config.preset)) if source is None else source.config
    if config.debug_state is not None or not config.layer_by_layer:
        refuse_inexpressible(shape, "llm.c debug state")
    state = None if config.debug_state is None else debug_state.read(config.debug_state, shape)
    tokens, targets = _random_batch(config, shape) if state is None else (state.tokens, state.targets)
    if config.layer_by_layer:
        return check_layers.run(config, shape, None if source is None else source.tensors, tokens, targets)
    return _run_all(config, shape, state, tokens, targets)


def _run_all(
    config: CheckConfig,
    shape: ModelConfig,
    state: DebugState | None,
    tokens: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
) -> Result:
    expected, loss_tolerance = ((), 0.0) if state is None else _reference_losses(config, shape, state)
    ane, dtype = config.ane_options(), cast("Dtype", config.dtype)
    check_fits(memory(shape, *tokens.shape, training=True, dtype=dtype, ane=ane))
    model = Model.from_pretrained(str(config.model), device=config.device, ane=ane)
    model.set_dtype(dtype)
    report, written = _Report(model), config.write_debug_state
    logits = model.forward(tokens)
    model.enable_training()
    optimizer = AdamW(model, _LEARNING_RATE, betas=_BETAS, eps=_EPSILON, weight_decay=_WEIGHT_DECAY, decay="all")
    for step in range(STEPS):
        begin = time.perf_counter()
        loss = model.forward(tokens, targets, training=True)
        model.backward()
        if step == 0 and state is not None:
            _compare_state(report, state, logits, loss, config.tolerance, loss_tolerance)
        if step == 0 and written is not None:
            grads = dict(model.grads)
            found = DebugState(tokens=tokens, targets=targets, logits=logits, loss=loss, grads=grads)
            debug_state.write(written, found, model.config)
        optimizer.step(_LEARNING_RATE)
        wanted = expected[step] if expected else None
        ok = math.isfinite(loss) if wanted is None else abs(loss - wanted) <= loss_tolerance
        report.steps.append(Step(loss, wanted, ok, time.perf_counter() - begin))
    if written is not None:
        losses = [step.loss for step in report.steps]
        safeio.write_bytes(Path(written + _LOSSES_SUFFIX), safeio.json_bytes(losses, None))
    return _finish(config, report, tokens.shape)


def _compare_state(
    report: _Report,
    state: DebugState,
    logits: npt.NDArray[np.float32],
    loss: float,
    tolerance: float | None,
    loss_tolerance: float,
) -> None:
    norm, grads = report.model.ane is not None, report.model.grads
    limit = tolerance or (_FP16_TOLERANCE if norm else _TOLERANCE)
    report.rows.append(compare("logits", logits, state.logits, limit, norm=norm))
    report.loss = Step(loss, state.loss, abs(loss - state.loss) <= loss_tolerance, 0.0)
    report.rows += [compare(name, grads[name], grad, limit, norm=norm) for name, grad in state.grads.items()]
    of = f"of its Frobenius norm, {SINGLE * limit:.2g} of the largest for a single value" if norm else "of its largest"
    report.tolerances = {"tolerance": limit, "loss_tolerance": loss_tolerance, "norm": norm}
    report.told = f"tolerances: a tensor {limit:.2g} {of}; a loss {loss_tolerance:g}"


def _finish(config: CheckConfig, report: _Report, shape: tuple[int, ...]) -> Result:
    """Print the table and return the result."""
    B, T = shape
    print(f"batch_size: {B}\nseq_len: {T}")
    width = max([0, *(len(row.name) for row in report.rows)])
    for row in report.rows:
        word = "OK    " if row.ok else "NOT OK"
        kind = "" if row.name == "logits" else llmc_name(row.name)
        error = f"  error {row.error:.2e}" if report.tolerances["norm"] else ""
        print(f"{word}  {row.name:{width}}  {kind:9}  maxdiff {row.difference:.2e}  of {row.largest:.2e}{error}")
    if report.loss is not None:
        print(f"{'OK    ' if report.loss.ok else 'NOT OK'}  loss {report.loss.loss:.6f}  {report.loss.expected:.6f}")
    for i, step in enumerate(report.steps):
        wanted = "" if step.expected is None else f"  expected {step.expected:.6f}"
        word = "" if step.expected is None and step.ok else "  OK" if step.ok else "  NOT OK"
        print(f"step {i}: loss {step.loss:.6f}{wanted}{word}  ({step.seconds * 1e3:.0f} ms)")
    if config.debug_state is not None and report.steps[0].expected is None:
        print("losses of the steps: no reference (--losses FILE.json)")
    wrong, engine = report.wrong(), report.model.ane
    told = {} if engine is None else evaluation_summary(engine) | {"modelled_ms": None}
    for line in filter(None, (report.told, describe_engine(told) if told else "")):
        print(line)
    if config.write_debug_state is not None:
        print(f"wrote {config.write_debug_state} and {config.write_debug_state}{_LOSSES_SUFFIX}")
    if config.debug_state is not None or wrong:
        print("overall okay: 1" if not wrong else f"overall okay: 0; not within tolerance: {', '.join(wrong)}")
    values = {
        "ok": not wrong,
        "wrong": wrong,
        **report.tolerances,
        **told,
        "tensors": [row._asdict() for row in report.rows],
        "loss": None if report.loss is None else report.loss._asdict(),
        "steps": [step._asdict() for step in report.steps],
    }
    return Result(values, 1 if wrong else 0)


VERB = Verb(
    "check", "compare a GPT-2 with llm.c's debug state, or each layer of a device with another's", CheckConfig, run
)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
