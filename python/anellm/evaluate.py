"""The verb ``evaluate``: a model's loss, perplexity and bits per byte on text or tokens."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

from anellm.cli import Result, Verb, set_threads
from anellm.data import TokenDataset
from anellm.errors import ConfigError
from anellm.inputs import check_fits
from anellm.model import Model, memory
from anellm.options import CommonOptions, option
from anellm.weights import load_pretrained, load_tokenizer

_LONGEST_DEFAULT = 1024  # windows are not longer than this unless asked for: attention is quadratic


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CommonOptions):
    """The options of ``evaluate``."""

    model: str | None = option(None, "run, checkpoint or Hugging Face directory, or llama2.c .bin file", group="model")
    tokenizer: str | None = option(None, "tokenizer.bin [the one beside the model]", group="model")
    data: str | None = option(None, "raw token file, or UTF-8 text that ends in .txt", group="data")
    token_dtype: str = option(
        "uint16", "type of the ids in a raw token file", choices=("uint16", "int32", "uint32"), group="data"
    )
    seq_len: int | None = option(
        None, f"tokens in a window [the model's longest, at most {_LONGEST_DEFAULT}]", low=1, high=2**24, group="data"
    )
    max_windows: int = option(0, "measure only the first windows; 0: all", low=0, high=2**62, group="data")
    batch_size: int = option(8, "windows at a time", low=1, high=2**20, group="data")


@dataclass(frozen=True)
class Measurement:
    """A model's loss over consecutive windows of data.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        tokens: targets that were measured.
        windows: windows they were in.
        seconds: how long it took.
        n_bytes: bytes of text that the targets stand for; None where the tokenizer is not known.
    """

    loss: float
    tokens: int
    windows: int
    seconds: float
    n_bytes: int | None

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the numbers that ``--json`` writes."""
        nats = self.loss * self.tokens
        return {
            "loss": self.loss,
            "perplexity": math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else math.inf,
            "bits_per_byte": nats / math.log(2) / self.n_bytes if self.n_bytes else None,
            "tokens": self.tokens,
            "windows": self.windows,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds if self.seconds > 0 else None,
        }


def measure(model: Model, data: TokenDataset, batch_size: int, seq_len: int, max_windows: int = 0) -> Measurement:
    """Measure a model on consecutive windows that do not overlap; what is left at the end is not measured.

    Args:
        model: the model.
        data: the tokens; each is predicted from those before it in its window.
        batch_size: windows at a time.
        seq_len: tokens in a window.
        max_windows: stop after so many; 0 takes all.

    Raises:
        DataError: when the data is shorter than one window.
    """
    total = data.n_eval_windows(seq_len, max_windows or None)
    nats, windows, shown = 0.0, 0, 0.0
    start = time.perf_counter()
    for tokens, targets in data.eval_windows(batch_size, seq_len, max_windows or None):
        nats += model.forward(tokens, targets, training=False) * targets.size  # a float64 sum
        windows += len(tokens)
        now = time.perf_counter()
        if sys.stderr.isatty() and (now - shown > 1 or windows == total):
            shown = now
            end = "\n" if windows == total else ""
            print(f"\r{windows}/{total} windows, loss {nats / (windows * seq_len):.4f}", end=end, file=sys.stderr)
    seconds = time.perf_counter() - start
    count = windows * seq_len
    n_bytes = None
    if data.tokenizer is not None:
        # The first token is context only; it is counted and taken off, since a space after BOS counts as nothing.
        seen = TokenDataset(data.tokens[: count + 1], tokenizer=data.tokenizer, checked=True)
        n_bytes = (seen.n_bytes or 0) - data.tokenizer.count_bytes(data.tokens[:1])
    return Measurement(nats / count, count, windows, seconds, n_bytes)


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
    data = TokenDataset.from_file(config.data, config.token_dtype, shape.vocab_size, tokenizer)
    check_fits(memory(shape, config.batch_size, seq_len, training=False))
    model = Model.from_pretrained(config.model, device=config.device)
    found = measure(model, data, config.batch_size, seq_len, config.max_windows)
    values = {**found.to_dict(), "model": config.model, "data": config.data, "seq_len": seq_len}
    values["tokenizer_sha256"] = tokenizer.sha256 if tokenizer is not None else None
    bits = values["bits_per_byte"]
    print(
        f"loss {values['loss']:.6f}  perplexity {values['perplexity']:.4f}  "
        + (f"bits per byte {bits:.4f}  " if bits is not None else "")
        + f"({found.tokens} tokens in {found.windows} windows of {seq_len}, {found.seconds:.1f} s, "
        f"{found.tokens / max(found.seconds, 1e-9):.0f} tokens/s)"
    )
    return Result(values)


VERB = Verb("evaluate", "measure a model's loss and perplexity on text", EvaluateConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
