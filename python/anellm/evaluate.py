"""The verb ``evaluate``: a model's loss, perplexity and bits per byte on text or tokens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from anellm import ane_auto
from anellm.ane_run import describe_engine, evaluation_summary
from anellm.cli import Result, Verb
from anellm.data import TokenDataset
from anellm.device import set_threads
from anellm.errors import ConfigError
from anellm.inputs import check_fits
from anellm.measure import measure
from anellm.model import Model, memory
from anellm.options import DeviceOptions, option
from anellm.weights import load_pretrained, load_tokenizer

_LONGEST_DEFAULT = 1024  # windows are not longer than this unless asked for: attention is quadratic


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DeviceOptions):
    """The options of ``evaluate``."""

    model: str | None = option(
        None, "run, checkpoint or Hugging Face directory, llama2.c .bin or GGUF file", group="model"
    )
    tokenizer: str | None = option(
        None, "tokenizer.bin, tokenizer.json or .model [the one beside the model]", group="model"
    )
    data: str | None = option(
        None, "text (.txt), JSONL or token file, folder or pattern; of a folder, its held-out files", group="data"
    )
    token_dtype: str = option(
        "uint16",
        "type of the ids in a token file without a header",
        choices=("uint16", "int32", "uint32"),
        group="data",
    )
    seq_len: int | None = option(
        None, f"tokens in a window [the model's longest, at most {_LONGEST_DEFAULT}]", low=1, high=2**24, group="data"
    )
    max_windows: int = option(0, "measure only the first windows; 0: all", low=0, high=2**62, group="data")
    batch_size: int = option(8, "windows at a time", low=1, high=2**20, group="data")


def _show(total: int) -> Callable[[int, float], None] | None:
    """Return what keeps a line on stderr up to date, where that is a terminal."""
    if not sys.stderr.isatty():
        return None
    shown = 0.0

    def show(windows: int, loss: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown > 1 or windows == total:
            shown = now
            end = "\n" if windows == total else ""
            print(f"\r{windows}/{total} windows, loss {loss:.4f}", end=end, file=sys.stderr)

    return show


def run(config: EvaluateConfig) -> Result:
    """Evaluate, and print and return the result."""
    if config.model is None or config.data is None:
        raise ConfigError(f"--{'model' if config.model is None else 'data'}: needed, and not given")
    set_threads(config.threads)
    shape = load_pretrained(config.model).config
    longest = shape.max_seq_len
    seq_len = config.seq_len or min(longest, _LONGEST_DEFAULT)
    if seq_len > longest:
        raise ConfigError(f"--seq-len: expected at most the model's max_seq_len {longest}, found {seq_len}")
    tokenizer = load_tokenizer(config.model, shape, config.tokenizer)
    data = TokenDataset.from_file(config.data, config.token_dtype, shape.vocab_size, tokenizer, "val")
    say = lambda line: print(f"auto  {line}", file=sys.stderr, flush=True)  # noqa: E731
    settled = ane_auto.settle(config, shape, config.batch_size, seq_len, training=False, say=say)
    ane = settled.ane_options()
    check_fits(memory(shape, config.batch_size, seq_len, training=False, ane=ane))
    model = Model.from_pretrained(config.model, device=settled.device, ane=ane)
    show = _show(data.n_eval_windows(seq_len, config.max_windows or None))
    found = measure(model, data, config.batch_size, seq_len, config.max_windows, show)
    values = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "windows": found.windows,
        "seconds": found.seconds,
        "tokens_per_s": found.tokens_per_s,
        "model": config.model,
        "data": config.data,
        "seq_len": seq_len,
    }
    values["tokenizer_sha256"] = tokenizer.sha256 if tokenizer is not None else None
    engine = None if model.ane is None else evaluation_summary(model.ane)
    values |= engine or {}
    bits = values["bits_per_byte"]
    print(
        f"loss {values['loss']:.6f}  perplexity {values['perplexity']:.4f}  "
        + (f"bits per byte {bits:.4f}  " if bits is not None else "")
        + f"({found.tokens} tokens in {found.windows} windows of {seq_len}, {found.seconds:.1f} s, "
        f"{found.tokens / max(found.seconds, 1e-9):.0f} tokens/s)"
    )
    if engine is not None:
        print(describe_engine(engine))
    return Result(values)


VERB = Verb("evaluate", "measure a model's loss and perplexity on text", EvaluateConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
