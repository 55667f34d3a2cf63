"""The verb ``sweep``: the same training with several learning rates, one after another, and a picture of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anellm import curve, line_chart, metrics, recipes, rundir, safeio, train
from anellm.cli import EXIT_INTERRUPTED, Result, Verb, set_whole_process
from anellm.config import DEFAULT_STEPS, TrainConfig
from anellm.errors import ConfigError, DivergedError, UnavailableError
from anellm.inputs import DEFAULT_PRESET
from anellm.options import check_config, option, option_fields

_JSON, _SVG, _PNG = "sweep.json", "sweep.svg", "sweep.png"


def _left_out() -> Any:
    """Return a field that is no option: what makes no sense for several runs."""
    return dataclasses.field(default=None, init=False)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """The options of ``sweep``: those of ``train``, with several learning rates."""

    learning_rate: str | None = option(  # type: ignore[assignment]
        None, "highest learning rates, separated by commas: 3e-4,1e-3", group="sweep"
    )
    out: str | None = option(
        None, "folder of the runs, one in each, and of their picture [runs/sweep-NAME-TIME]", group="sweep"
    )
    resume: None = _left_out()
    allow_changed_data: bool = dataclasses.field(default=False, init=False)
    profile: None = _left_out()
    dry_run: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self) -> None:
        check_config(self)
        if self.learning_rate is None:
            raise ConfigError("--learning-rate: expected rates separated by commas, as 3e-4,1e-3, found none")
        if self.out == "":
            raise ConfigError("--out: expected a path, found nothing")
        for rate in self.rates():
            self.train_config(rate, "run")  # refuses what train would refuse

    def rates(self) -> dict[str, float]:
        """Return the learning rates by the text that they are given as.

        Raises:
            ConfigError: naming what is no rate, or is there twice.
        """
        found: dict[str, float] = {}
        for word in (self.learning_rate or "").split(","):
            text = word.strip()
            try:
                rate = float(text)
            except ValueError:
                rate = math.nan
            if not (math.isfinite(rate) and rate > 0) or not text.isascii():
                raise ConfigError(f"--learning-rate: expected positive numbers separated by commas, found {word!r}")
            if rate in found.values():
                raise ConfigError(f"--learning-rate: expected each rate once, found {text} twice")
            found[text] = rate
        return found

    def train_config(self, rate: str, out: str) -> TrainConfig:
        """Return the options of one run.

        Args:
            rate: one of rates().
            out: its run directory.
        """
        values = {item.name: getattr(self, item.name) for item in option_fields(SweepConfig)}
        return TrainConfig(**{**values, "learning_rate": self.rates()[rate], "out": out, "json": None})


def options_of_sweep(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe, and evaluations often enough for a curve where nothing is said about them.

    Args:
        given: the options from flags and --config.
    """
    values = recipes.options_of_recipe(given)
    values.pop("learning_rate", None)  # several are needed
    if "eval_interval" not in given and given.get("epochs") is None:
        steps = given.get("steps") or values.get("steps") or DEFAULT_STEPS
        usual = values.get("eval_interval", TrainConfig.eval_interval)
        values["eval_interval"] = max(1, min(usual, steps // 10))
    return values


def _run_one(config: TrainConfig) -> dict[str, Any]:
    """Train once; a run that diverges is a result too."""
    try:
        result = train.run(config)
    except DivergedError as error:
        print(f"diverged: {error}")
        return {"diverged": str(error), "interrupted": False}
    return {"diverged": None, **result.values}


def _points(out: str) -> list[tuple[int, float]]:
    return curve.points(metrics.read(Path(out)))[1]


def run(config: SweepConfig) -> Result:
    """Train with each learning rate, and return what came of it."""
    name = config.recipe or config.preset or (Path(config.model).stem if config.model else DEFAULT_PRESET)
    out = Path(config.out) if config.out else rundir.new_run_path(f"sweep-{name}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: expected a new or empty folder")
    set_whole_process(whole=False)  # exec() would repeat the sweep, not the run
    runs: list[dict[str, Any]] = []
    for text, rate in config.rates().items():
        folder = str(out / f"lr-{text}")
        print(f"--- learning rate {text}", flush=True)
        values = _run_one(config.train_config(text, folder))
        runs.append(
            {
                "learning_rate": rate,
                "out": folder,
                "steps": values.get("step"),
                "loss": values.get("loss"),
                "val_loss": values.get("val_loss"),
                "best_val_loss": values.get("best_val_loss"),
                "best_step": values.get("best_step"),
                "seconds": values.get("seconds"),
                "diverged": values["diverged"],
                "interrupted": values["interrupted"],
                "curve": _points(folder),
            }
        )
        if values["interrupted"]:
            break
    return _finish(name, out, runs)


def _finish(name: str, out: Path, runs: list[dict[str, Any]]) -> Result:
    """Print the table, write the JSON and the pictures, and return the result."""
    measured = [each for each in runs if each["best_val_loss"] is not None and each["diverged"] is None]
    best = min(measured, key=lambda each: float(each["best_val_loss"]), default=None)
    values = {"name": name, "out": str(out), "runs": runs, "best": None if best is None else best["learning_rate"]}
    print(f"\n{'learning rate':>13}  {'steps':>6}  {'loss':>8}  {'val loss':>8}  {'best':>8}  at step")
    for each in runs:
        cells = [_cell(each[key]) for key in ("loss", "val_loss", "best_val_loss")]
        end = "diverged" if each["diverged"] else f"{each['best_step'] or '-'}" + ("  <- best" if each is best else "")
        print(f"{each['learning_rate']:>13g}  {each['steps'] or '-':>6}  " + "  ".join(cells) + f"  {end}")
    out.mkdir(parents=True, exist_ok=True)
    safeio.write_bytes(out / _JSON, safeio.json_bytes(values))
    print(f"\nwrote {out / _JSON}")
    if any(each["curve"] for each in runs):
        _draw(name, out, runs)
    else:
        print("no picture: nothing was held out, so there are no validation losses")
    return Result(values, EXIT_INTERRUPTED if any(each["interrupted"] for each in runs) else 0)


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.4f'):>8}"


def _draw(name: str, out: Path, runs: list[dict[str, Any]]) -> None:
    """Write the pictures."""
    curves = [line_chart.Curve(f"{each['learning_rate']:g}", each["curve"]) for each in runs]
    words = (f"{name}: validation loss by learning rate", "step", "nats")
    safeio.write_bytes(out / _SVG, line_chart.svg(*words, curves).encode("utf-8"))
    print(f"wrote {out / _SVG}")
    try:
        safeio.write_bytes(out / _PNG, line_chart.png(*words, curves))
    except UnavailableError as error:
        print(f"no {_PNG}: {error}")
    else:
        print(f"wrote {out / _PNG}")


VERB = Verb(
    "sweep",
    "train with several learning rates, one after another, and draw their validation losses",
    SweepConfig,
    run,
    base=options_of_sweep,
)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
