"""What a training run does besides where its model computes on a Neural Engine: loss scale, counters, state."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anellm import checkpoint, safeio, saferead
from anellm.ane import ModelEngine, share
from anellm.efficiency import Efficiency, read_sums
from anellm.errors import CheckpointError, InvalidError
from anellm.loss_scaler import LossScaler

STATE = "ane.json"  # in a checkpoint of a run on an ANE device
_KEYS = {"scaler", "ane_softmax", "exponents"}
_INT32 = range(-(2**31), 2**31)
_PLACE = re.compile(r"\bprogram (\w+), layer ([0-9]+): (?:(?:max \|(\w+)\| is|output (\w+(?: or \w+)?) is) )?")


class Place(NamedTuple):
    """Where in a model a result on the engine was wrong; None for what is not known."""

    program: str | None = None
    layer: int | None = None
    tensor: str | None = None


def place_of(message: str) -> Place:
    """Return the place that an error of the C core names."""
    found = _PLACE.search(message)
    return Place() if found is None else Place(found[1], int(found[2]), found[3] or found[4])


def where(record: Mapping[str, Any]) -> str:
    """Return in words what a skip record names as the place, e.g. ``program ffn_bwd_w2, layer 3, dy``."""
    program, layer, tensor = (record.get(key) for key in ("program", "layer", "tensor"))
    parts = [f"program {program}" if program else "", "" if layer is None else f"layer {layer}", tensor or ""]
    return ", ".join(part for part in parts if part) or "the loss"


def count_skips(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how often each place made a step be skipped, the most frequent first."""
    return dict(Counter(where(record) for record in records if record.get("kind") == "skip").most_common())


def fallbacks(engine: ModelEngine) -> list[dict[str, Any]]:
    """Return the programs that the engine refused, for records and summaries."""
    return [refusal._asdict() for refusal in engine.refusals]


def _flops(ane: float, cpu: float) -> dict[str, float | None]:
    """Return what a summary says about operations of matrix products, forward and backward."""
    return {"ane_flops": ane, "cpu_flops": cpu, "ane_flops_share": share(ane, cpu)}


def evaluation_summary(engine: ModelEngine) -> dict[str, Any]:
    """Return what the result of an evaluation says about the engine."""
    device, stats = engine.device, engine.stats()
    return {
        **device.describe(),
        **_flops(stats.total_ane_flops, stats.total_cpu_flops),
        "fallbacks": fallbacks(engine),
        "modelled_ms": None if device.simulator is None else device.counters()["modelled_ms"],
    }


def describe_engine(summary: Mapping[str, Any]) -> str:
    """Return a summary of the engine, of a run or an evaluation, in a line."""
    share = summary["ane_flops_share"]
    name = " ".join(filter(None, (summary["device"], summary["chip"])))
    parts = [] if share is None else [f"{share:.1%} of the FLOPs on the Neural Engine, {1 - share:.1%} on the CPU"]
    if summary["fallbacks"]:
        refused = {f"{each['part']} (for {each['program']} is refused)": None for each in summary["fallbacks"]}
        parts.append(f"on the CPU for want of a program: {', '.join(refused)}")
    for key, what in (("modelled_ms_per_step", "ms a step"), ("modelled_ms", "ms")):
        if summary.get(key) is not None:
            parts.append(f"the chip would take {summary[key]:.1f} {what}, by the model of its times")
    return f"{name}: {'; '.join(parts)}" if parts else name


class EngineRun:
    """Keep a run's loss scale and report on its Neural Engine; without an engine there is nothing to do or report.

    Attributes:
        engine: the model's engine, or None.
        scaler: the loss scale, or None where gradients are not scaled.
        efficiency: where the time of the steps goes.
    """

    def __init__(self, engine: ModelEngine | None) -> None:
        """Begin with the first loss scale."""
        self.engine = engine
        self.scaler = LossScaler() if engine is not None and engine.device.options.scaling else None
        self._before: tuple[int, int, float] = (0, 0, 0.0)
        self._earlier_activations: list[float] = []
        self._modelled_ms = 0.0
        self._steps = 0
        self._n_told = 0
        self._flops_before = self._total_flops()
        self.efficiency = Efficiency(getattr(engine, "read_sums", read_sums))

    @property
    def scale(self) -> float:
        """Return what the loss is multiplied by; gradients come out times it."""
        return 1.0 if self.scaler is None else self.scaler.scale

    def update(self, *, finite: bool) -> None:
        """Take note of a step; see LossScaler."""
        if self.scaler is not None:
            self.scaler.update(finite=finite)

    # ---- reports ------------------------------------------------------------------------------------------------

    def _counts(self) -> tuple[int, int, float]:
        if self.engine is None:
            return 0, 0, 0.0
        stats = self.engine.stats()
        return stats.rescales, stats.retries, self.engine.device.counters()["modelled_ms"]

    def _total_flops(self) -> tuple[float, float]:
        """Return the operations so far, on the engine and on the CPU."""
        if self.engine is None:
            return 0.0, 0.0
        stats = self.engine.stats()
        return stats.total_ane_flops, stats.total_cpu_flops

    def begin_step(self, partial: Mapping[str, Any] | None = None) -> None:
        """Remember where the counters stand.

        Args:
            partial: what partial() gave in another process that has begun this step.
        """
        rescales, retries, modelled_ms = self._counts()
        earlier = (partial or {}).get("counts", (0, 0, 0.0))
        self._before = rescales - earlier[0], retries - earlier[1], modelled_ms - earlier[2]
        self._earlier_activations = list((partial or {}).get("activations", ()))
        if self.engine is not None:
            self.efficiency.begin(self._total_flops())

    def partial(self) -> dict[str, Any]:
        """Return what came of a step so far, for the process that goes on with it; nothing without an engine."""
        if self.engine is None:
            return {}
        counts = [now - before for now, before in zip(self._counts(), self._before, strict=True)]
        return {
            "counts": counts,
            "activations": self.activations()["max_activation"],
            "flops": [now - before for now, before in zip(self._total_flops(), self._flops_before, strict=True)],
            "modelled_ms": self._modelled_ms,
            "steps": self._steps,
            "efficiency": self.efficiency.state(self._total_flops()),
        }

    def go_on(self, partial: Mapping[str, Any], path: Path) -> None:
        """Count on from where another process was, which gave this by partial(), and which stood in a file.

        Raises:
            CheckpointError: when it is none of this model's.
        """
        if self.engine is None:
            return
        n = {"counts": 3, "activations": len(self.engine.activations()), "flops": 2, "modelled_ms": None, "steps": None}
        for name, length in n.items():
            found = partial.get(name)
            numbers = found if isinstance(found, list) else [found]
            right = isinstance(found, list) == (length is not None) and len(numbers) == (length or 1)
            if not right or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers):
                raise CheckpointError(f"{path}: partial: {name}: expected {length or 1} numbers, found {found!r:.80}")
        ane, cpu = self._total_flops()
        self._flops_before = ane - partial["flops"][0], cpu - partial["flops"][1]
        self._modelled_ms, self._steps = partial["modelled_ms"], partial["steps"]
        try:
            self.efficiency.go_on(partial.get("efficiency"))
        except InvalidError as error:
            raise CheckpointError(f"{path}: partial: {error}") from None

    def end_step(self) -> None:
        """Stop the time of a step."""
        self.efficiency.end(self._total_flops())

    def close(self) -> None:
        """Stop counting."""
        self.efficiency.close()

    def step_values(self, skipped: int, *, activations: bool) -> dict[str, Any]:
        """Return what metrics.jsonl says about a step besides, since begin_step().

        Args:
            skipped: steps skipped so far.
            activations: list the largest activation of each layer as well.
        """
        if self.engine is None:
            return {}
        stats = self.engine.stats()
        rescales, retries, modelled_ms = (
            now - before for now, before in zip(self._counts(), self._before, strict=True)
        )
        self._steps += 1
        if self._steps == 2:
            self._modelled_ms = 0.0  # the first compiles
        self._modelled_ms += modelled_ms
        values: dict[str, Any] = {
            "loss_scale": self.scale,
            "skipped": skipped,
            "rescales": rescales,
            "retries": retries,
            "ane_flops_share": stats.flops_share,
            "modelled_ms": modelled_ms if self.engine.device.simulator is not None else None,
        }
        return values | (self.activations() if activations else {})

    def fallbacks(self) -> list[dict[str, Any]]:
        """Return the programs that were refused, for records and summaries."""
        return [] if self.engine is None else fallbacks(self.engine)

    def new_fallbacks(self) -> list[dict[str, Any]]:
        """Return the programs that were refused since the last call."""
        found = self.fallbacks()[self._n_told :]
        self._n_told += len(found)
        return found

    def activations(self) -> dict[str, Any]:
        """Return the largest activations of the last forward, by layer, for a record."""
        if self.engine is None:
            return {}
        found, earlier = self.engine.activations(), self._earlier_activations
        return {"max_activation": [max(pair) for pair in zip(found, earlier, strict=True)] if earlier else found}

    def describe(self) -> dict[str, Any]:
        """Return the engine's name and settings; nothing without one."""
        return {} if self.engine is None else self.engine.device.describe()

    def summary(self) -> dict[str, Any]:
        """Return what the run's summary says about the engine, over the steps of this process."""
        if self.engine is None:
            return {}
        timed = self.engine.device.simulator is not None and self._steps > 0
        ane, cpu = (now - before for now, before in zip(self._total_flops(), self._flops_before, strict=True))
        return {
            **self.describe(),
            **_flops(ane, cpu),
            "fallbacks": self.fallbacks(),
            "modelled_ms_per_step": self._modelled_ms / max(1, self._steps - 1) if timed else None,
            "loss_scale": self.scale,
            **self._compiles(),
            "efficiency": self.efficiency.summary(),
        }

    def _compiles(self) -> dict[str, int]:
        """Return how many programs a real engine compiled, and how many macOS had from before."""
        if self.engine is None or self.engine.device.simulator is not None:
            return {}
        counters = self.engine.device.counters()
        return {"compiles": int(counters["compiles"]), "cache_hits": int(counters["cache_hits"])}

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """Return the state as JSON-serialisable values; None without an engine."""
        if self.engine is None:
            return None
        return {
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "ane_softmax": self.engine.device.options.softmax,
            "exponents": self.engine.exponents(),
        }

    def files(self) -> dict[str, bytes]:
        """Return the state as a checkpoint's file; none without an engine."""
        state = self.state()
        return {} if state is None else {STATE: safeio.json_bytes(state, indent=None)}

    def restore(self, path: Path) -> None:
        """Take over the state of a checkpoint; one of a run on another device, or with other settings, has none for us.

        Raises:
            CheckpointError: naming the file, the key, what was expected and what was found.
        """
        if self.engine is not None and checkpoint.has_file(path, STATE):
            self.load(saferead.read_json(path / STATE, CheckpointError), path / STATE)

    def load(self, state: Mapping[str, Any], path: Path) -> None:
        """Take over what state() gave, which stood in a file.

        Raises:
            CheckpointError: naming the file, the key, what was expected and what was found.
        """
        if self.engine is None:
            return
        if state.keys() != _KEYS:
            raise CheckpointError(f"{path}: expected the keys {', '.join(sorted(_KEYS))}")
        scaler, exponents = state["scaler"], state["exponents"]
        if not isinstance(exponents, list) or not all(
            isinstance(e, int) and not isinstance(e, bool) and e in _INT32 for e in exponents
        ):
            raise CheckpointError(f"{path}: exponents: expected a list of 32-bit whole numbers")
        if scaler is not None and not isinstance(scaler, dict):
            raise CheckpointError(f"{path}: scaler: expected an object or null, found {scaler!r:.80}")
        if scaler is None or self.scaler is None or state["ane_softmax"] != self.engine.device.options.softmax:
            return
        try:
            self.scaler.load_state_dict(scaler)
            self.engine.set_exponents(exponents)
        except InvalidError as error:
            raise CheckpointError(f"{path}: {error}") from None
