"""The verb ``check``: a GPT-2 against a debug state, as llm.c's test_gpt2.c does it.

A debug state (debug_state.py) holds a batch with the logits, loss and gradients of a reference. Then ten steps of AdamW
on that batch, whose losses are compared too: with those of a file, or with those that llm.c publishes for GPT-2 124M.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from anellm import debug_state, safeio, saferead
from anellm.cli import Result, Verb
from anellm.debug_state import DebugState
from anellm.device import DTYPES, Dtype, set_threads
from anellm.errors import ConfigError, DataError
from anellm.inputs import check_fits
from anellm.model import Model, memory
from anellm.model_config import ModelConfig
from anellm.optim import AdamW
from anellm.options import CommonOptions, option
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
_LOSS_TOLERANCE: Final = 1e-4

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
class CheckConfig(CommonOptions):
    """The options of ``check``."""

    model: str | None = option(None, "GPT-2: llm.c file, Hugging Face directory or run", group="model")
    dtype: str = option("fp32", "what matrix products multiply", choices=DTYPES, group="model")
    debug_state: str | None = option(None, "llm.c's debug state to compare with", group="reference")
    losses: str | None = option(
        None,
        f"JSON list of the {STEPS} losses to compare with [the file STATE{_LOSSES_SUFFIX} beside the state; "
        "for llm.c's own state of GPT-2 124M those that it publishes]",
        group="reference",
    )
    tolerance: float = option(
        1e-4,
        "largest difference of logits and gradients, as a part of the tensor's largest value",
        above=0,
        group="reference",
    )
    loss_tolerance: float | None = option(
        None,
        f"largest difference of losses [{_LOSS_TOLERANCE:g}; {_PUBLISHED_TOLERANCE:g} for those that llm.c publishes]",
        above=0,
        group="reference",
    )
    write_debug_state: str | None = option(
        None, f"write what the model gives to this file, and its losses to FILE{_LOSSES_SUFFIX}", group="output"
    )
    batch_size: int | None = option(
        None, "without --debug-state: sequences of the batch to write [4]", low=1, high=2**20, group="output"
    )
    seq_len: int | None = option(
        None,
        "without --debug-state: tokens in a sequence [64, or the model's longest]",
        low=1,
        high=2**24,
        group="output",
    )
    seed: int | None = option(
        None, "without --debug-state: seed of the batch's ids, which are drawn at random [1]", low=0, group="output"
    )

    def __post_init__(self) -> None:
        for name in ("model", "debug_state", "losses", "write_debug_state"):
            if getattr(self, name) == "":
                raise ConfigError(f"--{name.replace('_', '-')}: expected a path, found nothing")
        if self.model is None:
            raise ConfigError("--model: needed, and not given")
        if self.debug_state is None and self.write_debug_state is None:
            raise ConfigError("expected --debug-state to compare with, or --write-debug-state, found neither")
        if self.debug_state is None:
            self._refuse(("losses", "loss_tolerance"), "only with --debug-state")
            return
        self._refuse(("batch_size", "seq_len", "seed"), "only without --debug-state, which has a batch")
        target = self.write_debug_state
        if target is not None and Path(target).resolve() == Path(self.debug_state).resolve():
            raise ConfigError(f"--write-debug-state: expected another file than --debug-state, found {target}")

    def _refuse(self, names: Sequence[str], why: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: {why}")


class Row(NamedTuple):
    """One comparison.

    Attributes:
        name: of the tensor, or "logits".
        difference: largest absolute difference; NaN where one side has none.
        largest: largest absolute value of the reference.
        ok: whether it is within the tolerance.
    """

    name: str
    difference: float
    largest: float
    ok: bool


class Step(NamedTuple):
    """One step of AdamW: its loss in nats, the reference's (None where there is none), and the time it took."""

    loss: float
    expected: float | None
    ok: bool
    seconds: float


@dataclass
class _Report:
    rows: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    loss: Step | None = None

    def wrong(self) -> list[str]:
        """Return the names of what is not within tolerance."""
        names = [row.name for row in self.rows if not row.ok]
        names += [] if self.loss is None or self.loss.ok else ["loss"]
        return names + [f"loss of step {i}" for i, step in enumerate(self.steps) if not step.ok]


def compare(name: str, found: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float) -> Row:
    """Compare two tensors of one shape.

    Args:
        name: of the tensor.
        found: what the model gives.
        expected: the reference.
        tolerance: largest difference, as a part of the reference's largest absolute value.
    """
    largest = max(-float(expected.min()), float(expected.max()))
    difference = float(np.abs(found - expected).max())
    return Row(name, difference, largest, difference <= tolerance * largest)


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
    tolerance = config.loss_tolerance or _LOSS_TOLERANCE
    beside = Path(str(config.debug_state) + _LOSSES_SUFFIX)
    if config.losses is not None or beside.is_file():
        return read_losses(beside if config.losses is None else Path(config.losses)), tolerance
    is_124m = shape.replace(padded_vocab_size=50304) == ModelConfig.from_preset("gpt2")
    if is_124m and state.tokens.shape == (4, 64) and abs(state.loss - _PUBLISHED[0]) < _PUBLISHED_TOLERANCE:
        return _PUBLISHED, config.loss_tolerance or _PUBLISHED_TOLERANCE
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
    shape = load_pretrained(str(config.model)).config
    refuse_inexpressible(shape, "llm.c debug state")
    state = None if config.debug_state is None else debug_state.read(config.debug_state, shape)
    expected, loss_tolerance = ((), 0.0) if state is None else _reference_losses(config, shape, state)
    tokens, targets = _random_batch(config, shape) if state is None else (state.tokens, state.targets)
    check_fits(memory(shape, *tokens.shape, training=True, dtype=cast("Dtype", config.dtype)))
    model = Model.from_pretrained(str(config.model), device=config.device)
    model.set_dtype(cast("Dtype", config.dtype))
    report, written = _Report(), config.write_debug_state
    logits = model.forward(tokens)
    model.enable_training()
    optimizer = AdamW(model, _LEARNING_RATE, betas=_BETAS, eps=_EPSILON, weight_decay=_WEIGHT_DECAY, decay="all")
    for step in range(STEPS):
        begin = time.perf_counter()
        loss = model.forward(tokens, targets, training=True)
        model.backward()
        if step == 0 and state is not None:
            _compare_state(report, state, logits, loss, model, config.tolerance, loss_tolerance)
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
    model: Model,
    tolerance: float,
    loss_tolerance: float,
) -> None:
    report.rows.append(compare("logits", logits, state.logits, tolerance))
    report.loss = Step(loss, state.loss, abs(loss - state.loss) <= loss_tolerance, 0.0)
    report.rows += [compare(name, model.grads[name], grad, tolerance) for name, grad in state.grads.items()]


def _finish(config: CheckConfig, report: _Report, shape: tuple[int, ...]) -> Result:
    """Print the table and return the result."""
    B, T = shape
    print(f"batch_size: {B}\nseq_len: {T}")
    width = max([0, *(len(row.name) for row in report.rows)])
    for row in report.rows:
        word = "OK    " if row.ok else "NOT OK"
        kind = "" if row.name == "logits" else llmc_name(row.name)
        print(f"{word}  {row.name:{width}}  {kind:9}  maxdiff {row.difference:.2e}  of {row.largest:.2e}")
    if report.loss is not None:
        print(f"{'OK    ' if report.loss.ok else 'NOT OK'}  loss {report.loss.loss:.6f}  {report.loss.expected:.6f}")
    for i, step in enumerate(report.steps):
        wanted = "" if step.expected is None else f"  expected {step.expected:.6f}"
        word = "" if step.expected is None and step.ok else "  OK" if step.ok else "  NOT OK"
        print(f"step {i}: loss {step.loss:.6f}{wanted}{word}  ({step.seconds * 1e3:.0f} ms)")
    if config.debug_state is not None and report.steps[0].expected is None:
        print("losses of the steps: no reference (--losses FILE.json)")
    wrong = report.wrong()
    if config.write_debug_state is not None:
        print(f"wrote {config.write_debug_state} and {config.write_debug_state}{_LOSSES_SUFFIX}")
    if config.debug_state is not None or wrong:
        print("overall okay: 1" if not wrong else f"overall okay: 0; not within tolerance: {', '.join(wrong)}")
    values = {
        "ok": not wrong,
        "wrong": wrong,
        "tensors": [row._asdict() for row in report.rows],
        "loss": None if report.loss is None else report.loss._asdict(),
        "steps": [step._asdict() for step in report.steps],
    }
    return Result(values, 1 if wrong else 0)


VERB = Verb("check", "compare a GPT-2's logits, gradients and ten losses with llm.c's debug state", CheckConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
