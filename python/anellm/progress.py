"""Show a run as it goes: one live line on a terminal, plain lines elsewhere. Reads records, changes nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_SMOOTHING = 0.9  # of the loss and speed shown, per step


def duration(seconds: float) -> str:
    """Return a time as people read it, e.g. ``1h02m`` or ``1m05s``."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def printable(text: str, encoding: str = "utf-8") -> str:
    """Return a model's text without what would steer the terminal or what it cannot show."""
    clean = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean.encode(encoding, "replace").decode(encoding)


class Progress:
    """A trainer callback that prints.

    Use as a context manager, so that the terminal is left as it was.
    """

    def __init__(
        self,
        steps: int,
        *,
        first_step: int = 0,
        plain: bool = False,
        quiet: bool = False,
        log_interval: int = 10,
        seconds: float = 0.0,
        stream: IO[str] | None = None,
    ) -> None:
        """Prepare to show a run.

        Args:
            steps: the last step.
            first_step: steps done before.
            plain: plain lines even on a terminal.
            quiet: print nothing.
            log_interval: steps between plain lines.
            seconds: what the steps since ``first_step`` have taken, where other processes did them.
            stream: where to print; None: standard output.
        """
        self._stream = stream or sys.stdout
        self._steps, self._first, self._quiet, self._interval = steps, first_step, quiet, log_interval
        self._start = time.perf_counter() - seconds
        self._loss: float | None = None
        self._live = None if plain or quiet or not self._stream.isatty() else self._make_live()
        self._task = self._live.add_task("training", total=steps, completed=first_step) if self._live else None

    def _make_live(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        return Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=Console(file=self._stream),
            transient=True,
            expand=True,
            refresh_per_second=5,
        )

    def __enter__(self) -> Self:
        """Start the live line."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, text="")
            self._live.start()
            # Left visible: a process that is killed could not bring it back.
            self._live.console.show_cursor(True)
        return self

    def __exit__(self, *exc: object) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Show a record of the trainer."""
        if self._quiet:
            return
        kind, step = record["kind"], record["step"]
        if kind == "step":
            self._show_step(record)
        elif kind == "eval" and "message" in record:
            self._line(f"step {step}  validation failed: {record['message']}")
        elif kind == "eval":
            bits = record["bits_per_byte"]
            more = "" if bits is None else f"  bits/byte {bits:.3f}"
            self._line(
                f"step {step}  validation loss {record['val_loss']:.4f}  perplexity {record['perplexity']:.2f}{more}"
            )
        elif kind == "sample":
            text = printable(record["text"], getattr(self._stream, "encoding", None) or "utf-8")
            self._line(f"step {step}  sample:\n" + "\n".join("  | " + line for line in text.split("\n")))
        elif kind == "skip" and "message" in record:
            self._line(f"step {step}  skipped: {record['message']}")
        elif kind == "skip":
            self._line(
                f"step {step}  skipped: {record['n_nonfinite']} non-finite gradients, first in {record['tensor']}"
            )
        elif kind == "interrupt":
            self._line(f"step {step}  interrupted: saving")

    def _show_step(self, record: Mapping[str, Any]) -> None:
        step, loss = record["step"], record["loss"]
        self._loss = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        if self._loss != self._loss:  # NaN: do not let one skipped step blank the rest
            self._loss = None
        done = step - self._first
        left = (time.perf_counter() - self._start) / max(1, done) * (self._steps - step)
        text = (
            f"loss {loss if self._loss is None else self._loss:.4f}  lr {record['lr']:.2e}  "
            f"norm {record['grad_norm']:.2f}  {record['tokens_per_s']:.0f} tok/s  {duration(left)} left"
        )
        if record.get("skipped"):
            text += f"  {record['skipped']} skipped"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, text=text)
        elif step % self._interval == 0 or step == self._steps or done == 1:
            self._line(f"step {step}/{self._steps}  {text}")

    def _line(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)
