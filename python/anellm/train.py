"""The verb ``train``: from a text or tokens to a model, in a run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anellm import ane_auto, curve, inputs, metrics, recipes, rundir, saferead
from anellm.ane import check_usable
from anellm.ane_run import count_skips, describe_engine
from anellm.cli import EXIT_INTERRUPTED, Result, Verb, is_whole_process
from anellm.config import ModelConfig, TrainConfig
from anellm.device import set_threads
from anellm.efficiency import describe as describe_efficiency
from anellm.errors import CheckpointError
from anellm.image import Handover, Restart, replace_process, take_handover
from anellm.machine import human_bytes, human_count
from anellm.measure import perplexity
from anellm.model import Model
from anellm.options import unused_device_options
from anellm.power import describe_energy
from anellm.progress import Progress, duration
from anellm.tokenizer import find_tokenizer_file, load_tokenizer_file
from anellm.trainer import Trainer, TrainResult, default_seq_len


def weaker_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the run that --resume goes on with; where it begins one, those of --recipe.

    Args:
        given: the options from flags and --config, which come first.
    """
    return options_of_run(given) or recipes.options_of_recipe(given)


def options_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that --resume takes from the run it goes on with; those that are given come first.

    Args:
        given: the options from flags and --config.
    """
    resume, out = given.get("resume"), given.get("out")
    if resume is None:
        return {}
    found = Path(out) if out else rundir.newest_run()
    source = found if resume == rundir.AUTO else rundir.run_of(Path(resume))
    if source is None:
        return {}
    values = rundir.read_config(source)
    if values:
        values["out"] = str(source)
    # What belongs to the machine, and one side of each pair where the other side is given now. An ANE device computes
    # other bits than the CPU does: a run stays where it is unless another device is given.
    drop = {"threads"}
    if "device" in given or values.get("device", "auto") in ("auto", "cpu"):
        drop |= {"device"} | unused_device_options(given.get("device", "cpu"))
    for a, b in (("steps", "epochs"), ("model", "preset")):
        drop |= {a} if b in given else {b} if a in given else set()
    return {key: value for key, value in values.items() if key not in drop}


def run(config: TrainConfig) -> Result:
    """Train, and return the summary."""
    handover = take_handover()
    threads = set_threads(config.threads)
    if handover is not None:
        return _go_on(config, handover)
    if config.dry_run:
        resumed = None if config.resume is None else rundir.resume_path(config.resume, config.out)
        shape = inputs.model_config(config, inputs.load_tokenizer(config, resumed), resumed)
        config = _settle(config, shape, resumed, test=False)
        _, report = inputs.forecast(config, shape)
        inputs.print_forecast(report)
        return Result(report)
    name = config.preset or (Path(config.model).stem if config.model else inputs.DEFAULT_PRESET)
    config = dataclasses.replace(
        config,
        out=config.out or str(rundir.new_run_path(config.recipe or name)),
        preset=config.preset if config.model else config.preset or inputs.DEFAULT_PRESET,
    )
    if config.resume is None or (config.resume == rundir.AUTO and not Path(str(config.out)).is_dir()):
        return _run(config, threads, name, None)
    # What goes on from a checkpoint has its shape and tokenizer: the files that the run began with may be gone.
    with contextlib.closing(rundir.RunDirectory(str(config.out), config.resume)) as directory:
        for reason in directory.damaged:
            print(f"anellm train: warning: a newer checkpoint is passed over: {reason}", file=sys.stderr)
        return _run(config, threads, name, directory)


def _go_on(config: TrainConfig, handover: Handover) -> Result:
    """Go on with a run in the middle, in the place of the process that left the handover."""
    path = Path(handover.out)
    config = dataclasses.replace(config, **{**rundir.read_config(path), "out": handover.out, "threads": config.threads})
    with contextlib.closing(rundir.RunDirectory(path, lock=handover.lock)) as directory:
        manifest = saferead.read_json(path / rundir.MANIFEST, CheckpointError)
        shape = ModelConfig.from_dict(manifest.get("model", {}), str(path / rundir.MANIFEST))
        kept = find_tokenizer_file(path)  # the run's own: the files that it began with may be gone
        tokenizer = None if kept is None else load_tokenizer_file(kept)
        train_data, val_data = inputs.load_data(config, shape, tokenizer)
        model = Model(shape, config.device, seed=None, ane=config.ane_options())
        trainer = Trainer(
            model, config, train_data, val_data, tokenizer, run=directory, handover=handover, replace=is_whole_process()
        )
        return _train(trainer, config, directory, shape, handed_over=True)


def _train(
    trainer: Trainer,
    config: TrainConfig,
    directory: rundir.RunDirectory,
    shape: ModelConfig,
    *,
    handed_over: bool = False,
) -> Result:
    """Train, show how it goes, and how it ended; or go on in a new image of this process."""
    state = trainer.state
    try:
        with Progress(
            trainer.steps,
            first_step=0 if handed_over else state.step,
            plain=config.plain,
            quiet=config.quiet,
            log_interval=config.log_interval,
            seconds=state.seconds if handed_over else 0.0,
        ) as progress:
            trainer.callbacks += (progress,)
            result = trainer.train()
    except Restart as restart:
        replace_process(directory, restart)
    return finish(result, config, directory.path, shape)


def _settle(config: TrainConfig, shape: ModelConfig, resumed: Path | None, *, test: bool) -> TrainConfig:
    """Return a config whose device is "ane" where "auto" stands for that.

    A run that goes on stays where it is: one on an engine has its name in its options.
    """
    stay = "the run that goes on began there" if resumed is not None else None
    if config.dtype != "fp32":
        stay = f"--dtype {config.dtype} is for it alone"
    seq_len = default_seq_len(config, shape.max_seq_len)
    say = None if config.quiet else lambda line: print(f"auto    {line}", flush=True)
    return ane_auto.settle(config, shape, config.batch_size, seq_len, training=True, stay=stay, test=test, say=say)


def _run(config: TrainConfig, threads: int, name: str, opened: rundir.RunDirectory | None) -> Result:
    """Train in a run directory: the one that is open already, or a new one once everything else is known to fit."""
    resumed = None if opened is None or opened.resumed is None else opened.resumed.path
    check_usable(config.device, config.ane_options())
    tokenizer = inputs.load_tokenizer(config, resumed)
    shape = inputs.model_config(config, tokenizer, resumed)
    config = _settle(config, shape, resumed, test=True)
    need, _ = inputs.forecast(config, shape)
    inputs.check_fits(need)
    train_data, val_data = inputs.load_data(config, shape, tokenizer)
    directory = opened or rundir.RunDirectory(str(config.out), config.resume)
    try:
        if directory.resumed is not None:
            model = Model(shape, config.device, seed=None, ane=config.ane_options())
        elif config.model is not None:
            model = Model.from_pretrained(config.model, config.device, ane=config.ane_options())
        else:
            model = Model(shape, config.device, seed=config.seed, ane=config.ane_options())
        trainer = Trainer(model, config, train_data, val_data, tokenizer, run=directory, replace=is_whole_process())
        if trainer.warning is not None:
            print(f"anellm train: warning: {trainer.warning}", file=sys.stderr)
        if not config.quiet:
            held_out = "nothing held out" if val_data is None else f"{human_count(val_data.n_tokens)} tokens held out"
            ids = f", {trainer.n_ids} of {shape.vocab_size} ids occur" if config.compact_vocab else ""
            if config.recipe is not None and not trainer.state.step:
                for line in recipes.notes(config.recipe, config.model, config.data):
                    print(f"recipe  {line}")
            print(f"model   {name}: {human_count(shape.n_params())} parameters{ids}")
            print(f"data    {train_data.source}: {human_count(train_data.n_tokens)} tokens, {held_out}")
            device = model.device if model.ane is None else model.ane.device
            print(
                f"device  {device} ({trainer.state.cpu_variant}, {config.dtype}), {threads} threads; "
                f"{human_bytes(need.total_bytes)} of memory needed"
            )
            print(f"run     {directory.path}", "" if not trainer.state.step else f"from step {trainer.state.step}")
        return _train(trainer, config, directory, shape)
    finally:
        directory.close()


def finish(result: TrainResult, config: TrainConfig, path: Path, shape: ModelConfig) -> Result:
    """Print how the run ended and return the summary."""
    state = result.state
    if not config.quiet:
        ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
        width = min(100, max(20, shutil.get_terminal_size().columns - 12))
        print("\n" + curve.draw(*curve.points(metrics.read(path)), width, ascii_only=ascii_only) + "\n")
    val = "" if state.val_loss is None else f", validation loss {state.val_loss:.4f}"
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    how = "interrupted at" if result.interrupted else "done:"
    print(f"{how} step {state.step} in {duration(state.seconds)}{loss}{val}")
    skips = count_skips(metrics.read(path)) if state.skipped_steps else {}
    if skips:
        print(f"skipped {state.skipped_steps} steps:", ", ".join(f"{name} ({count})" for name, count in skips.items()))
    if result.ane:
        print(describe_engine(result.ane))
        for line in describe_efficiency(result.ane["efficiency"]):
            print(line)
    if energy := describe_energy(result.energy):
        print(f"energy: {energy}")
    if result.images:
        print(
            f"{result.images['groups']} groups of layers, {result.images['restarts']} restarts, "
            f"{result.images['compiles']} compilations"
        )
    if result.interrupted:
        print(f"go on:  anellm train --resume --out {path}")
    print(f"write:  anellm generate --model {path}")
    values = {
        **state.to_dict(),
        "out": str(path),
        "n_params": shape.n_params(),
        "loss": result.loss,
        "perplexity": None if state.val_loss is None else perplexity(state.val_loss),
        "interrupted": result.interrupted,
        **result.ane,
        **result.images,
        **result.energy,
        **({"skips": skips} if skips else {}),
    }
    return Result(values, EXIT_INTERRUPTED if result.interrupted else 0)


VERB = Verb(
    "train",
    "train a model on text; with no arguments, a small one on the text that comes along",
    TrainConfig,
    run,
    base=weaker_options,
)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
