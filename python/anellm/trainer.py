"""The training loop, and the state that it carries."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from anellm import checkpoint
from anellm.ane_run import EngineRun, place_of
from anellm.config import DEFAULT_STEPS, ModelConfig, TrainConfig
from anellm.device import cpu_variant, follow_cpu_variant
from anellm.errors import (
    AnellmError,
    CheckpointError,
    ConfigError,
    DivergedError,
    EvalError,
    InvalidError,
    NonFiniteError,
    TornStateError,
)
from anellm.image import Handover, Restart, take_signals
from anellm.measure import Measurement, measure
from anellm.metrics import rss_mib
from anellm.model import GradNorm
from anellm.optim import AdamW, clip_scale
from anellm.pipeline_run import PipelineRun
from anellm.power import EnergyRun, open_source
from anellm.profile import Tracer
from anellm.rundir import AUTO, RunDirectory
from anellm.schedule import default_learning_rate, learning_rate
from anellm.state import TrainState, check_between

if TYPE_CHECKING:
    from anellm.data import TokenDataset
    from anellm.device import Dtype
    from anellm.model import Model
    from anellm.tokenizer_base import BaseTokenizer

Record = Mapping[str, Any]
_LONGEST_DEFAULT = 1024  # sequences are not longer than this unless asked for: attention is quadratic


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        state: where it stands.
        loss: training loss of the last step, in nats a token; None when there was none.
        interrupted: stopped by a signal before its last step.
        out: the run directory, or None.
        ane: device, chip, numerics, share of the FLOPs and modelled time of the Neural Engine; empty on the CPU.
        images: images, restarts and compilations of a run by a plan; else empty.
        energy: what the steps took, by EnergyRun.summary(); empty where it is not known.
    """

    state: TrainState
    loss: float | None
    interrupted: bool
    out: Path | None
    ane: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    energy: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def default_seq_len(config: TrainConfig, max_seq_len: int) -> int:
    """Return the tokens in a sequence: what the config says, or the model's longest up to a limit.

    Raises:
        ConfigError: when it is beyond the model's longest.
    """
    seq_len = config.seq_len if config.seq_len is not None else min(max_seq_len, _LONGEST_DEFAULT)
    if seq_len > max_seq_len:
        raise ConfigError(f"--seq-len: expected at most the model's longest, {max_seq_len}, found {seq_len}")
    return seq_len


def place(model: Model, config: TrainConfig) -> TrainConfig:
    """Bring a model to the device that a config names, and return the config with what the model computes on.

    Raises:
        UnavailableError, UnsupportedError: see Model.to().
    """
    if not config.is_met_by(getattr(model, "device", "cpu"), getattr(model, "ane_options", None)):
        model.to(config.device, config.ane_options())
    engine = getattr(model, "ane", None)
    return config if engine is None else config.on_device(model.device, engine.device.options)


def resolve(config: TrainConfig, shape: ModelConfig, train_data: TokenDataset) -> TrainConfig:
    """Return a config whose seq_len, steps and learning rates are numbers.

    Raises:
        ConfigError: when seq_len is beyond the model's longest, or min_learning_rate above a default learning_rate.
        DataError: when the data is shorter than one window.
    """
    seq_len = default_seq_len(config, shape.max_seq_len)
    rows = config.batch_size * config.gradient_accumulation_steps
    sampler = train_data.sampler(seq_len, config.seed, config.window_order)
    steps = config.steps
    if config.epochs is not None:
        steps = sampler.steps_for(config.epochs, rows)
    peak = config.learning_rate
    if peak is None:
        peak = default_learning_rate(shape.n_params_without_embeddings(), pretrained=config.model is not None)
    minimum = peak / 10 if config.min_learning_rate is None else config.min_learning_rate
    return dataclasses.replace(
        config,
        seq_len=seq_len,
        steps=steps or DEFAULT_STEPS,
        epochs=None,
        learning_rate=peak,
        min_learning_rate=minimum,
    )


class Trainer:
    """Train a model by a TrainConfig.

    The step that the loop takes reads top to bottom in ``_step``; callbacks get a record at its end and change nothing.
    ``n_ids`` is the number of ids that the classifier computes; ``warning`` says why a run that is gone on with will
    not be the same to the last digit, or is None.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        train_data: TokenDataset,
        val_data: TokenDataset | None = None,
        tokenizer: BaseTokenizer | None = None,
        *,
        callbacks: Sequence[Callable[[Record], None]] = (),
        run: RunDirectory | None = None,
        optimizer: AdamW | None = None,
        device: str | None = None,
        handover: Handover | None = None,
        replace: bool = False,
    ) -> None:
        """Prepare a run, or the rest of one.

        Args:
            model: the model; its weights are overwritten when a checkpoint is resumed.
            config: the options. Without ``out`` nothing is written to disk.
            train_data: tokens to train on.
            val_data: tokens held out; None trains without validation.
            tokenizer: for samples, and to be kept with checkpoints.
            callbacks: called with each record (kinds device, fallback, step, skip, eval, sample, save, image, interrupt
                and efficiency), to read only.
            run: the run directory when it is open already; None opens ``config.out``.
            optimizer: None makes the config's AdamW.
            device: what the model computes on from now on, with the config's options for it; None: the config's
                ``device``, where that is "auto" the model's.
            handover: what the image before this one left; of the run that ``run`` is.
            replace: where a plan asks for another process, it replaces this one: train() raises Restart then. Else
                child processes compute.

        Raises:
            UnavailableError, UnsupportedError: see Model.to().
            DeviceError: when too many processes in a row got nothing done (docs/pipeline.md).
            ConfigError, CheckpointError, DataError, BusyError: see RunDirectory and resolve().
        """
        self.model, self.train_data, self.val_data, self.tokenizer = model, train_data, val_data, tokenizer
        config = resolve(config, model.config, train_data)
        self.config = config = place(model, config if device is None else dataclasses.replace(config, device=device))
        self.seq_len, self.steps, self.peak = (
            int(config.seq_len or 0),
            int(config.steps or 0),
            config.learning_rate or 0.0,
        )
        if val_data is not None:
            val_data.check_window(self.seq_len)
        self._prompt = (
            [] if tokenizer is None or not config.sample_tokens else tokenizer.encode_prompt(config.sample_prompt)
        )
        if config.sample_tokens and len(self._prompt) > model.config.max_seq_len:
            raise ConfigError(
                f"--sample-prompt: expected at most {model.config.max_seq_len} tokens, the model's longest, "
                f"found {len(self._prompt)}"
            )
        self.optimizer = optimizer or AdamW(
            model,
            self.peak,
            (config.adam_beta1, config.adam_beta2),
            config.adam_epsilon,
            config.weight_decay,
            config.decay,
        )
        model.set_dtype(cast("Dtype", config.dtype))
        model.set_activation_checkpoint(config.activation_checkpoint)
        self.warning: str | None = None
        self.state = TrainState(
            data_sha256=train_data.sha256,
            val_sha256=None if val_data is None else val_data.sha256,
            cpu_variant=cpu_variant(),
        )
        self.callbacks = tuple(callbacks)
        self.n_ids = model.config.vocab_size
        self._loss: float | None = None
        self._stop = False
        self._step_start = time.perf_counter()
        self._last_saved: int | None = None
        self._energy = EnergyRun(None)
        self._owns_run = run is None
        self.run = RunDirectory(config.out, config.resume) if run is None and config.out is not None else run
        self._pipeline: PipelineRun | None = None
        self._partial: Mapping[str, Any] | None = None  # of a step that another process has begun
        self._handover, self._going_on = handover, False
        try:
            self._open(replace=replace)
        except BaseException:
            self._close()
            raise

    def _open(self, *, replace: bool) -> None:
        """Take over where a run stands, and bring the model there."""
        config, model = self.config, self.model
        if config.by_plan():
            folder = None if self.run is None else self.run.path
            self._pipeline = PipelineRun(model, config, folder, handover=self._handover, replace=replace)
            self._pipeline.on_image_end = self._end_image
        self._ane = EngineRun(getattr(model, "ane", None) if self._pipeline is None else self._pipeline.engine)
        self._tracer = Tracer(config.profile, inside=self._ane.engine is not None)
        if not self._load_state() and self.run is not None and self.run.resumed is not None:
            self._restore(self.run.resumed)
        if config.compact_vocab:
            self._compact_vocabulary()

    def _close(self, *, done: bool = False) -> None:
        """Let go of what the run has open; ``done``: a checkpoint holds its state."""
        if self._pipeline is not None:
            self._pipeline.close(done=done)
        if self.run is not None and self._owns_run:
            self.run.close()

    def _compact_vocabulary(self) -> None:
        """Reduce the classifier to the ids that occur in the data."""
        occurs = self.train_data.occurring_ids(self.model.config.vocab_size)
        if self.val_data is not None:
            occurs |= self.val_data.occurring_ids(self.model.config.vocab_size)
        ids = np.flatnonzero(occurs).astype(np.int32)
        try:
            self.model.compact_vocabulary(ids, equalize=self.state.step == 0)
        except InvalidError as error:
            raise ConfigError(f"--compact-vocab: this run cannot go on with it: {error}") from None
        self.n_ids = len(ids)
        if self._pipeline is not None:
            self._pipeline.reduce_classifier(ids)

    def _load_state(self) -> bool:
        """Take over the state of a run in the middle of a step, and return whether there was one.

        --resume with the path of a checkpoint goes on from that one.
        """
        pipeline, run, resume = self._pipeline, self.run, self.config.resume
        if pipeline is None or run is None:
            return False
        own = resume is not None and (resume == AUTO or Path(resume).resolve() == run.path.resolve())
        if not own and self._handover is None:
            return False
        try:
            values = pipeline.load(0 if run.resumed is None else run.resumed.step)
        except TornStateError as error:
            if self._handover is not None:
                raise
            self.warning = f"going on from the last checkpoint: {error}"
            return False
        if values is None:
            return False
        what = f"{pipeline.path}: run"
        check_between(values, what)
        state = TrainState.from_dict(values["state"], what)
        if state.step != pipeline.step:
            raise CheckpointError(f"{what}: step: expected {pipeline.step} by the schedule, found {state.step}")
        self._check_data(pipeline.path, state)
        self.optimizer.load_state_dict({"step": state.optimizer_step})
        if values["ane"] is not None:
            self._ane.load(values["ane"], pipeline.path)
        self._ane.go_on(values["partial"], pipeline.path)
        self._partial, self._step_start = values["partial"], time.perf_counter() - values["step_seconds"]
        self._stop = self._handover is not None and values["stop"] is True
        self._last_saved = values["last_saved"]
        pipeline.accept()
        self._take_state(state)
        self._going_on = True
        return True

    def _take_state(self, state: TrainState) -> None:
        """Go on from a state; another tier of kernels gives other last digits, and after some steps other ones."""
        self.state = state
        warning = None if state.cpu_variant is None else follow_cpu_variant(state.cpu_variant)
        self.warning = "; ".join(filter(None, (self.warning, warning))) or None
        state.cpu_variant = cpu_variant()

    def _values(self) -> dict[str, Any]:
        """Return what another process needs to go on from here, besides weights, gradients and moments."""
        return {
            "state": self.state.to_dict(),
            "ane": self._ane.state(),
            "stop": self._stop,
            "last_saved": None if self.run is None else self.run.last_saved,
            "partial": self._ane.partial(),
            "step_seconds": time.perf_counter() - self._step_start,
        }

    def _end_image(self) -> None:
        """Record what this image did."""
        if self._pipeline is not None:
            self._emit({"kind": "image", "step": self.state.step, **self._pipeline.record()})

    def _restore(self, source: checkpoint.Checkpoint) -> None:
        """Take over a checkpoint's state, weights and moments."""
        state = TrainState.from_dict(source.state, str(source.path / checkpoint.STATE))
        if state.step != source.step:
            raise CheckpointError(f"{source.path / checkpoint.STATE}: step: expected {source.step}, found {state.step}")
        self._check_data(source.path, state)
        checkpoint.load_tensors(source, self.model)
        self.optimizer.load_state_dict({"step": state.optimizer_step})
        self._ane.restore(source.path)
        self._take_state(state)

    def _check_data(self, source: Path, state: TrainState) -> None:
        """Refuse other data than the checkpoint's, or take it over where that is allowed.

        Losses on other held-out data do not compare: the best one starts over.
        """
        ours = self.state
        held_out = "nothing held out" if self.val_data is None else self.val_data.source
        for what, theirs, found, where in (
            ("training", state.data_sha256, ours.data_sha256, self.train_data.source),
            ("held-out", state.val_sha256, ours.val_sha256, held_out),
        ):
            if theirs != found and not self.config.allow_changed_data:
                raise CheckpointError(
                    f"{source}: trained with other data: expected SHA-256 {theirs} of the {what} tokens, "
                    f"found {found} ({where}); --allow-changed-data goes on with it"
                )
        if state.val_sha256 != ours.val_sha256:
            state.val_loss = state.best_val_loss = state.best_step = None
        state.data_sha256, state.val_sha256 = ours.data_sha256, ours.val_sha256

    # ---- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Train until the last step, or until SIGINT or SIGTERM: then the step is finished and saved.

        Raises:
            DivergedError: when ``max_bad_steps`` steps in a row had non-finite gradients.
            EvalError: when as many could not be taken, and the device failed in the last of them.
            CompileError: when a device refuses a program.
            CheckpointError: when a checkpoint cannot be written.
            Restart: where a plan asks for another process, and this one is to be replaced.
        """
        done = False
        if self._pipeline is None:  # of many processes none counts them all
            self._energy = EnergyRun(open_source())
        try:
            self._begin_run()
            with self._tracer, self._signals():
                if self._ane.engine is not None and self._handover is None:
                    self._emit({"kind": "device", "step": self.state.step, **self._ane.describe()})
                if self.state.step == 0 and not self._going_on and (self.run is None or self.run.resumed is None):
                    self._evaluate()
                while self.state.step < self.steps and (not self._stop or self._partial is not None):
                    with self._tracer.span("step", step=self.state.step + 1):
                        self._step()
                    self._after_step()
                    if self._pipeline is not None:
                        self._ane.begin_step()
                        self._step_start = time.perf_counter()
                        self._pipeline.end_step(self._values())
                interrupted = self._stop and self.state.step < self.steps
                if interrupted:
                    self._emit({"kind": "interrupt", "step": self.state.step})
                self._end_image()
                if efficiency := self._ane.efficiency.summary():
                    self._emit({"kind": "efficiency", "step": self.state.step, **efficiency})
                self._save()
            done = True
            out = None if self.run is None else self.run.path
            images = {} if self._pipeline is None else self._pipeline.summary()
            energy = self._energy.summary()
            return TrainResult(self.state, self._loss, interrupted, out, self._ane.summary(), images, energy)
        finally:
            self._energy.close()
            self._ane.close()
            self._close(done=done)

    def _begin_run(self) -> None:
        """Open the files of the run directory."""
        run = self.run
        if run is None:
            return
        if self._handover is not None:
            run.go_on(self._last_saved)
            return
        run.begin(
            self.config, self._manifest(), self._tokenizer_files(), step=self.state.step if self._going_on else None
        )
        if run.resumed is not None:  # the kill may have come between a checkpoint and its note
            run.retain(self.config, self.state.best_step, self.state.best_val_loss)

    def _step(self) -> None:
        """Take one step: micro-steps, the gradient's norm, the update."""
        config, state = self.config, self.state
        if self._partial is None:
            self._step_start = time.perf_counter()
        lr = self.learning_rate(state.step)
        n_micro = config.gradient_accumulation_steps
        loss, gradient, error = math.nan, GradNorm(math.nan, 0, None), None
        self._ane.begin_step(self._partial)
        self._partial = None
        self._energy.begin_step()
        try:
            loss, gradient = self._gradient(n_micro)
        except (NonFiniteError, EvalError) as failure:
            error = failure  # of a device: weights and moments are as they were, gradients are not to be used
        self._tell_fallbacks()
        if self._pipeline is not None:
            self._pipeline.begin_update()
        bad = gradient.n_nonfinite > 0 or not math.isfinite(gradient.norm) or not math.isfinite(loss)
        if not bad:
            with self._tracer.span("optimizer"), self._ane.efficiency.optimizer():
                self.optimizer.step(lr, clip_scale(gradient.norm, config.max_grad_norm) / self._ane.scale)
            state.optimizer_step += 1
            state.bad_steps = 0
        tokens = config.batch_size * self.seq_len * n_micro
        state.tokens += tokens
        state.step += 1
        self._ane.end_step()
        seconds = time.perf_counter() - self._step_start
        state.seconds += seconds
        self._loss = loss if math.isfinite(loss) else None
        logged = state.step % config.log_interval == 0 or state.step in (1, self.steps)
        self._emit(
            {
                "kind": "step",
                "step": state.step,
                "loss": loss,
                "lr": lr,
                "grad_norm": gradient.norm,
                "tokens": state.tokens,
                "seconds": state.seconds,
                "tokens_per_s": tokens / max(seconds, 1e-9),
                "rss_mib": round(rss_mib(), 1),
                **self._energy.step_values(tokens, logged=logged),
                **self._ane.step_values(state.skipped_steps + bad, activations=logged and error is None),
            }
        )
        if not isinstance(error, EvalError):  # that says nothing about the range of numbers
            self._ane.update(finite=not bad)
        if bad:
            self._skip(gradient, error)

    def _gradient(self, n_micro: int) -> tuple[float, GradNorm]:
        """Return a step's loss and the size of its gradient, without the loss scale that the gradient itself has."""
        config, model, scale = self.config, self.model, self._ane.scale
        loss = 0.0

        def batch(micro: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
            return self.train_data.batch(
                config.seed, self.state.step, micro, config.batch_size, self.seq_len, n_micro, config.window_order
            )

        if self._pipeline is not None:
            for each in self._pipeline.gradients(self.state.step, batch, scale, self._values):
                loss += each / n_micro
            return loss, model.grad_norm() if scale == 1.0 else model.grad_norm(1.0 / scale)
        for micro in range(n_micro):
            with self._tracer.span("batch"):
                tokens, targets = batch(micro)
            with self._tracer.span("forward"):
                loss += model.forward(tokens, targets, training=True) / n_micro
            with self._tracer.span("backward"):
                model.backward(scale / n_micro, accumulate=micro > 0)  # the first overwrites
        with self._tracer.span("grad_norm"):
            return loss, model.grad_norm() if scale == 1.0 else model.grad_norm(1.0 / scale)

    def _skip(self, gradient: GradNorm, error: AnellmError | None) -> None:
        """Count a step that could not be taken, clear its gradients, and stop after too many in a row.

        Args:
            gradient: what was not finite in it.
            error: what the device said, where it was the device that failed.
        """
        state = self.state
        for array in self.model.grads.values():
            array[...] = 0
        state.bad_steps += 1
        state.skipped_steps += 1
        record: dict[str, Any] = {
            "kind": "skip",
            "step": state.step,
            "tensor": gradient.tensor,
            "n_nonfinite": gradient.n_nonfinite,
        }
        if error is not None:
            reason = "evaluation" if isinstance(error, EvalError) else "non-finite"
            record |= {"n_nonfinite": None, **place_of(str(error))._asdict(), "reason": reason, "message": str(error)}
        self._emit(record)
        if state.bad_steps >= self.config.max_bad_steps:
            newest = checkpoint.find_checkpoint(self.run.path) if self.run is not None else None
            kept = f"; the last good checkpoint is {newest}" if newest else ""
            stopped = f"stopped at step {state.step}: {state.bad_steps} steps in a row"
            if isinstance(error, EvalError):
                raise EvalError(f"{stopped} could not be taken: {error}{kept}") from error
            if error is not None:
                raise DivergedError(f"{stopped} were not finite: {error}; try a lower --learning-rate{kept}") from error
            raise DivergedError(
                f"{stopped} had non-finite gradients, first in {gradient.tensor or 'the loss'} "
                f"({gradient.n_nonfinite} values); try a lower --learning-rate{kept}"
            )

    def _after_step(self) -> None:
        """Evaluate, sample and save where it is due."""
        config, step = self.config, self.state.step
        last = step == self.steps
        if last or (config.eval_interval and step % config.eval_interval == 0):
            self._evaluate()
        if last or self._sample_due(step):
            with self._tracer.span("sample"):
                self._sample()
        is_best = self.state.best_step == step
        if last or is_best or (config.save_interval and step % config.save_interval == 0):
            self._save()

    def _sample_due(self, step: int) -> bool:
        interval = self.config.sample_interval
        if interval is None:
            return step == self.steps // 2
        return interval > 0 and step % interval == 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the step after ``step`` steps."""
        config = self.config
        return learning_rate(
            step,
            steps=self.steps,
            peak=self.peak,
            minimum=float(config.min_learning_rate or 0),
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            decay_steps=config.decay_steps,
        )

    # ---- what happens beside it -------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Measure the held-out loss; a non-finite one never becomes the best."""
        if self.val_data is None:
            return
        self._energy.pause()
        state, config = self.state, self.config
        try:
            with self._tracer.span("eval"):
                found = measure(self.model, self.val_data, config.batch_size, self.seq_len, config.eval_windows)
        except (NonFiniteError, EvalError) as error:  # of a device; the next steps tell whether it goes on
            found = Measurement(math.nan, 0, 0, 0.0, None)
            more = {"message": str(error)}
        else:
            more = self._ane.activations() if self._pipeline is None else {}  # by a plan the CPU evaluates
        self._tell_fallbacks()
        loss = found.loss
        state.val_loss = loss if math.isfinite(loss) else None
        if state.step > 0 and math.isfinite(loss) and (state.best_val_loss is None or loss < state.best_val_loss):
            state.best_val_loss, state.best_step = loss, state.step
        self._emit(
            {
                "kind": "eval",
                "step": state.step,
                "val_loss": loss,
                "perplexity": found.perplexity,
                "bits_per_byte": found.bits_per_byte,
                "tokens": found.tokens,
                **more,
            }
        )

    def _tell_fallbacks(self) -> None:
        """Record which programs the engine has refused since the last call."""
        found = self._ane.new_fallbacks()
        for each in found:
            self._emit({"kind": "fallback", "step": self.state.step, **each})
        if found and self.run is not None:
            self.run.amend_manifest({"fallbacks": self._ane.fallbacks()})

    def _sample(self) -> None:
        """Write a text with the model as it is now."""
        config = self.config
        if self.tokenizer is None or config.sample_tokens == 0:
            return
        self._energy.pause()
        from anellm.sample import Sampling, generate_stream

        sampling = Sampling(
            temperature=config.sample_temperature,
            top_k=config.sample_top_k,
            top_p=config.sample_top_p,
            seed=config.seed,
        )
        index = self.state.step % 2**32
        try:
            stream = generate_stream(
                self.model,
                self._prompt,
                config.sample_tokens,
                sampling,
                stop_ids=self.tokenizer.stop_ids,
                sample_index=index,
                vocab_size=self.tokenizer.vocab_size,
            )
            text = self.tokenizer.decode([*self._prompt, *stream])
        except NonFiniteError:
            return  # the weights have left the range of fp32: whether to stop is max_bad_steps' business
        self._emit({"kind": "sample", "step": self.state.step, "prompt": config.sample_prompt, "text": text})

    def _save(self) -> None:
        """Write a checkpoint, note the best, and remove what the retention rule gives up."""
        state = self.state
        if self.run is None or self.run.last_saved == state.step:
            return
        self._energy.pause()
        with self._tracer.span("save"):
            files = {**self._tokenizer_files(), **self._ane.files()}
            path = self.run.save(state.step, self.model, state.to_dict(), files)
            self.run.retain(self.config, state.best_step, state.best_val_loss)
        self._call_back({"kind": "save", "step": state.step, "path": str(path)})

    def _tokenizer_files(self) -> dict[str, bytes]:
        return {} if self.tokenizer is None else self.tokenizer.files()

    def _emit(self, record: Record) -> None:
        """Give a record to metrics.jsonl and the callbacks."""
        if self.run is not None and record["kind"] != "interrupt":
            self.run.write(record)
        self._call_back(record)

    def _call_back(self, record: Record) -> None:
        for callback in self.callbacks:
            callback(record)

    def _manifest(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "n_params": self.model.config.n_params(),
            "device": getattr(self.model, "device", "cpu"),
            **self._ane.describe(),
            "dtype": self.config.dtype,
            "activation_checkpoint": self.config.activation_checkpoint,
            "cpu_variant": self.state.cpu_variant,
            "data": self.train_data.source,
            "data_sha256": self.state.data_sha256,
            "data_tokens": self.train_data.n_tokens,
            "val_tokens": None if self.val_data is None else self.val_data.n_tokens,
            "tokenizer_sha256": None if self.tokenizer is None else self.tokenizer.sha256,
            "resumed_from_step": self.state.step or None,
        }

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM ask for a stop after the step, and the second one end the process at once.

        Only the main thread can do that; elsewhere signals stay as they are.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: object) -> None:
            self._stop = True
            signal.signal(number, signal.SIG_DFL)

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, ask) for number in numbers}
        if self._handover is not None and take_signals(self._handover):
            self._stop = True
        try:
            yield
        except Restart:
            before.clear()  # they stay in force until exec(): see hold_signals()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
