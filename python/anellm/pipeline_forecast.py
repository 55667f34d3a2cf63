"""What a planned step takes: memory by kind, operations, time on a chip. No device is touched; docs/pipeline.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from anellm import sim_cost
from anellm.activation_checkpoint import SavedLayers
from anellm.config import ModelConfig
from anellm.errors import ConfigError
from anellm.mil import AneProgram, ane_programs
from anellm.model import memory
from anellm.pipeline import PipelinePlan
from anellm.pipeline_schedule import Schedule
from anellm.sim_chips import Chip

RESTART_MS: Final = 50.0  # ANE.md Q16 (MX, OR): exec() of the original trainer, which is a C program
_FP16, _FP32, _ALIGNMENT = 2, 4, 64
_COPIES: Final = 2  # of a weight: in a program of the forward pass, and in one of the backward pass
_MIN_SURFACE: Final = 49152  # Q09
_WAITING: Final = "sdpa_bwd1"  # its inputs stay from forward to backward: a surface for each layer
# Programs are priced in the form that takes weights as inputs, which makes surfaces wider than the planned ones are.
_WIDE: Final = {"max_width": 65536, "max_height": 65536, "max_transpose_extent": 65536, "max_matmul_k": 32768}


@dataclass(frozen=True)
class Workload:
    """A planned step.

    Attributes:
        config: the model.
        plan: its groups.
        saved: what forward keeps: saved_layers() with the boundaries of the plan.
        batch_size: sequences of a micro-batch.
        seq_len: tokens of a sequence.
        accumulation: micro-batches of a step.

    Raises:
        ConfigError: when they do not belong together.
    """

    config: ModelConfig
    plan: PipelinePlan
    saved: SavedLayers
    batch_size: int
    seq_len: int
    accumulation: int

    def __post_init__(self) -> None:
        Schedule(self.plan, self.accumulation)  # checks it
        n = self.config.n_layers
        if self.plan.n_layers != n or self.saved.n_layers != n:
            raise ConfigError(
                f"n_layers: expected the model's {n}, found {self.plan.n_layers} in groups, {self.saved.n_layers} saved"
            )
        if self.saved.starts != tuple(self.plan.boundaries):
            raise ConfigError(
                f"saved layers: expected those of groups from layers {self.plan.boundaries}, found {self.saved.starts}"
            )

    @property
    def rows(self) -> int:
        """Return the tokens of a micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.rows * self.accumulation

    def programs(self) -> list[AneProgram]:
        """Return the programs whose products are those of the planned ones.

        They take weights as inputs. The planned ones hold them, and two pairs of them are one program each; what they
        multiply is the same.
        """
        found = ane_programs(self.config, self.batch_size, self.seq_len)
        return [program for program in found if program.used(training=True, softmax="ane")]


# ---- memory ----------------------------------------------------------------------------------------------------------


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def layer_bytes(config: ModelConfig, batch_size: int, seq_len: int) -> int:
    """Return the size of a layer's activations, its input included, as the model lays them out."""
    one, two = (
        memory(config.replace(n_layers=n), batch_size, seq_len, training=True).activations_bytes for n in (1, 2)
    )
    return two - one


def memory_forecast(load: Workload) -> dict[str, int]:
    """Return bytes by kind; the total of a run is their sum.

    The model's own kinds come from the code that lays its memory out. With one group, those from ``weights`` to
    ``workspace`` are together exactly what memory() says of the policy.
    """
    config, saved, groups = load.config, load.saved, load.plan.groups
    own = memory(config, load.batch_size, load.seq_len, training=True)
    layer = layer_bytes(config, load.batch_size, load.seq_len)
    stream = load.rows * config.dim * _FP32  # the residual stream of a micro-batch
    longest = max(group.n_layers for group in groups)
    whole = saved.buffer_layers >= longest
    segments = max(sum(start in range(g.start, g.end) for start in saved.inputs) for g in groups)
    several = len(groups) > 1
    return {
        "weights": own.params_bytes,
        "gradients": own.grads_bytes,
        "AdamW moments": own.moments_bytes,
        # Of the group at work; nothing else of the others than their boundaries.
        "activations kept for backward": longest * layer if whole else 0,
        "inputs of layers kept for backward": 0 if whole else _aligned(segments * stream),
        "activations of the segment at work": 0 if whole else saved.buffer_layers * layer,
        # Per micro-batch: the stream between groups, and the gradient that goes from one to the next.
        "boundary activations": load.accumulation * len(groups) * stream if several else 0,
        "classifier": own.activations_bytes - config.n_layers * layer,
        "workspace": own.workspace_bytes,
        "surfaces": surface_bytes(load),
        "buffers of weight gradients": gradient_buffer_bytes(config, load.rows),
        "weights in programs, fp16": program_bytes(load),
    }


def surface_bytes(load: Workload) -> int:
    """Return the size of surfaces: those of load.programs() without weights, at least the least size each (Q09)."""
    longest = max(group.n_layers for group in load.plan.groups)
    total = 0
    for program in load.programs():
        for surface in (program.input, program.output):
            values = sum(f.channels * f.columns for f in surface.fields if not f.kind.startswith("weights"))
            waits = program.name == _WAITING and surface is program.input
            total += max(values * _FP16, _MIN_SURFACE) * (longest if waits else 1)
    return total


def gradient_buffer_bytes(config: ModelConfig, rows: int) -> int:
    """Return the size of what the CPU multiplies for weight gradients while the engine goes on."""
    return rows * (4 * config.dim + config.hidden_dim + config.q_dim + 2 * config.kv_dim) * _FP32


def program_bytes(load: Workload) -> int:
    """Return the size of the weights that a process's programs hold."""
    longest = max(group.n_layers for group in load.plan.groups)
    per_layer = sim_cost.block_params(load.config) // load.config.n_layers
    return longest * per_layer * _FP16 * _COPIES


# ---- operations ------------------------------------------------------------------------------------------------------


def flops_forecast(load: Workload) -> dict[str, float]:
    """Return the operations of a step's matrix products by where they are; a multiply-add is two.

    As AneStats counts them: attention over all pairs of tokens, masked ones too.
    """
    config, n, micro = load.config, load.config.n_layers, load.accumulation
    forward, backward = (
        sum(p.flops * p.evaluations for p in load.programs() if p.backward == backward) for backward in (False, True)
    )
    head = 2.0 * load.rows * config.dim * config.vocab_size
    own = memory(config, load.batch_size, load.seq_len, training=True)
    fixed = own.activations_bytes - n * layer_bytes(config, load.batch_size, load.seq_len)
    all_logits = fixed >= load.rows * config.vocab_size * _FP32  # else backward computes them once more
    return {
        "engine, forward": micro * n * forward,
        "engine, forward once more": micro * len(load.saved.recomputed) * forward,
        "engine, backward": micro * n * backward,
        "CPU, weight gradients": micro * 2.0 * load.rows * sim_cost.block_params(config),
        "CPU, classifier": micro * head * (3.0 if all_logits else 4.0),
    }


# ---- time ------------------------------------------------------------------------------------------------------------


def compile_ms(load: Workload, chip: Chip) -> float:
    """Return what the compilations of a step take on a chip.

    Programs without weights are the same for all layers and steps, so that the compiler knows them already (Q62).
    """
    constants, schedule = chip.constants, Schedule(load.plan, load.accumulation)
    groups = [load.plan.groups[schedule.group_of(phase)] for phase in range(schedule.n_phases)]
    return sum(
        group.weight_kernels * constants["compile_ms"]
        + group.static_kernels * constants["cached_compile_ms"]
        + group.programs * constants["load_ms"]
        for group in groups
    )


def restarts_in_a_step(plan: PipelinePlan) -> float:
    """Return the restarts of a step on average, in a long run."""
    return float(plan.restarts_per_step) if len(plan.groups) > 1 else 1.0 / plan.steps_per_process


def time_forecast(load: Workload, chip: Chip) -> dict[str, float]:
    """Return milliseconds of a step by part, on average in a long run; the step takes their sum.

    The micro-steps are those of sim_cost with constant weights. Of forward once more, only the engine's part counts.

    Raises:
        CompileError: when a dimension is beyond what the chip takes.
    """
    recipe = sim_cost.Recipe(load.config.vocab_size, load.accumulation, constant_weights=True)
    product = sim_cost.machine_of(sim_cost.changed(chip, _WIDE))
    gb_s = sim_cost.fit().gb_s[product.cores]
    one = sim_cost.step(load.config, load.programs(), load.rows, product, recipe, gb_s)
    micro = load.accumulation
    return {
        "engine, forward": micro * one.forward,
        "engine, forward once more": micro * one.forward * len(load.saved.recomputed) / load.config.n_layers,
        "engine, backward": micro * one.backward,
        "classifier on the CPU": micro * one.products,
        "weight gradients beyond the engine's time": micro * one.exposed,
        "passes of the CPU over memory": micro * one.passes,
        "compiling and loading": compile_ms(load, chip),
        "restarts": RESTART_MS * restarts_in_a_step(load.plan),
    }
