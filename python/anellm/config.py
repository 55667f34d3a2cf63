"""What a model is (``ModelConfig``, from model_config.py) and what a training run is (``TrainConfig``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from anellm.activation_checkpoint import check_policy
from anellm.device import DTYPES
from anellm.errors import ConfigError
from anellm.model_config import ModelConfig, preset_names
from anellm.options import DeviceOptions, check_config, option
from anellm.recipes import options_of_recipe, recipe_names

__all__ = ["DEFAULT_STEPS", "ModelConfig", "TrainConfig", "preset_names"]

DEFAULT_STEPS = 1000
_MAX = 2**53  # the largest range in which JSON readers keep whole numbers exact


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DeviceOptions):
    """Every option of a training run: defaults, flags, config file and what a run directory keeps.

    A step is one optimizer update; every interval is in steps, and 0 means never.

    Raises:
        ConfigError: naming the option, what was expected and what was found.
    """

    recipe: str | None = option(
        None,
        "a published run: defaults for these options, which flags and --config override",
        choices=recipe_names(),
        group="model",
        flag_only=True,
    )
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
        "tokenizer.bin, tokenizer.json, .model, or gpt2, or char: the text's characters "
        "[beside --model, in --data, else learnt from the text]",
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
    compile_budget: int | None = option(
        None,
        "programs that a process may compile: layers are taken in groups that fit, and a new process goes on where "
        "it is spent [with --ane-mode static: 119]",
        low=1,
        high=2**31 - 1,
        group="optimization",
    )
    compile_headroom: float = option(
        0.1, "part of the compile budget that is left alone", above=0, below=1, group="optimization"
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

    @classmethod
    def from_recipe(cls, name: str, **options: Any) -> Self:
        """Return the options of a recipe.

        Args:
            name: of a recipe; see recipes.recipe_names().
            options: values that override the recipe's.

        Raises:
            ConfigError: when there is no such recipe, or an option is impossible.
        """
        given = {**options, "recipe": name}
        return cls(**options_of_recipe(given), **given)

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
        if self.profile is not None and self.by_plan():
            raise ConfigError("--profile: not with --compile-budget or --ane-mode static, whose processes are many")
        if self.compact_vocab and self.model is not None:
            raise ConfigError("--compact-vocab: only for new models, found --model: its rows are not to be replaced")
        self._check_paths()

    def _check_paths(self) -> None:
        for name in ("model", "data", "val_data", "tokenizer", "out", "resume", "profile"):
            if getattr(self, name) == "":
                raise ConfigError(f"--{name.replace('_', '-')}: expected a path, found nothing")

    def _given(self) -> dict[str, Any]:
        """See DeviceOptions; a device with static programs keeps to the budget by itself, too."""
        values = super()._given()
        if self.compile_budget is not None and self.ane_mode == "static":
            values["compile_budget"] = self.compile_budget
        return values

    def by_plan(self) -> bool:
        """Return whether the layers are taken in groups that a process can compile (docs/pipeline.md)."""
        return self.compile_budget is not None or self.ane_mode == "static"
