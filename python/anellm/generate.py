"""The verb ``generate``: write on from a prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from anellm.cli import Result, Verb
from anellm.compress import WEIGHTS, Weights
from anellm.data import read_text
from anellm.device import resolve_device, set_threads
from anellm.errors import ConfigError, DataError
from anellm.inputs import check_fits
from anellm.model import Model, memory
from anellm.options import CommonOptions, option
from anellm.sample import Sampling, StopText, generate_stream
from anellm.tokenizer_base import BaseTokenizer
from anellm.weights import load_pretrained, load_tokenizer

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CommonOptions):
    """The options of ``generate``."""

    model: str | None = option(
        None, "run, checkpoint or Hugging Face directory, llama2.c .bin or GGUF file", group="model"
    )
    tokenizer: str | None = option(
        None, "tokenizer.bin, tokenizer.json or .model [the one beside the model]", group="model"
    )
    weights: str = option(
        "fp32",
        "format of the weights in memory: bf16 (half) and int8 (a quarter) are faster, less exact",
        choices=WEIGHTS,
        group="model",
    )
    prompt: str = option("", "text to write on from", group="text")
    prompt_file: str | None = option(None, "read the prompt from this UTF-8 file, to its last byte", group="text")
    max_new_tokens: int = option(200, "longest text, without the prompt", low=0, high=2**31 - 1, group="text")
    stop: str | None = option(None, "end before this text", group="text")
    num_samples: int = option(1, "texts to write from the same prompt", low=1, high=2**31 - 1, group="text")
    temperature: float = option(0.8, "divides the logits; 0: always the likeliest token", low=0, group="sampling")
    top_k: int = option(0, "choose among this many likeliest tokens; 0: all", low=0, group="sampling")
    top_p: float = option(
        0.9, "choose among the likeliest tokens of this total probability", above=0, high=1, group="sampling"
    )
    min_p: float = option(
        0.0, "choose among tokens at least this fraction as likely as the likeliest", low=0, high=1, group="sampling"
    )
    seed: int = option(1, "same seed, same text", low=0, high=_MAX_SEED, group="sampling")
    stream: bool = option(True, "show the text as it is written", group="output", flag_only=True)


def write_one(
    model: Model,
    tokenizer: BaseTokenizer,
    prompt: list[int],
    config: GenerateConfig,
    index: int,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Write one text, showing it as it comes, and return what ``--json`` says of it."""
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.seed)
    decoder = tokenizer.stream()
    for token in prompt:
        decoder.feed(token)
    gate = StopText(config.stop, show)
    ids: list[int] = []
    stream = generate_stream(
        model,
        prompt,
        config.max_new_tokens,
        sampling,
        stop_ids=tokenizer.stop_ids,
        sample_index=index,
        vocab_size=tokenizer.vocab_size,
    )
    for token in stream:
        ids.append(token)
        if gate.feed(decoder.feed(token)):
            break
    else:
        gate.feed(decoder.flush(), last=True)
    return {"ids": ids, "text": gate.text, "finish_reason": "stop" if gate.found else stream.finish_reason}


def _printable(text: str) -> str:
    """Drop control characters, so that no model can steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or c == "\N{REPLACEMENT CHARACTER}")


def _show(text: str) -> None:
    sys.stdout.write(_printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _prompt(config: GenerateConfig) -> str:
    if config.prompt_file is None:
        return config.prompt
    if config.prompt:
        raise ConfigError("--prompt and --prompt-file exclude each other")
    return read_text(Path(config.prompt_file))


def _load(config: GenerateConfig, path: str) -> Model:
    """Return the model, on the CPU: a token at a time leaves a Neural Engine nothing to do."""
    device = resolve_device(config.device)
    if device != "cpu":
        print(f"device {device}: text is decoded on the CPU, whatever the model was trained on", file=sys.stderr)
    model = Model.from_pretrained(path, device="cpu")
    if config.weights != "fp32":
        model.compress(cast("Weights", config.weights), release=True)
    return model


def run(config: GenerateConfig) -> Result:
    """Generate, and print and return the texts."""
    if config.model is None:
        raise ConfigError("--model: needed, and not given")
    prompt = _prompt(config)
    set_threads(config.threads)
    shape = load_pretrained(config.model).config
    tokenizer = load_tokenizer(config.model, shape, config.tokenizer)
    if tokenizer is None:
        raise DataError(f"{config.model}: expected a tokenizer beside it, found none: name one with --tokenizer")
    ids = tokenizer.encode_prompt(prompt)
    if len(ids) > shape.max_seq_len:
        raise ConfigError(
            f"prompt: expected at most the model's max_seq_len {shape.max_seq_len} tokens, found {len(ids)}"
        )
    check_fits(memory(shape, 1, len(ids), training=False))
    model = _load(config, config.model)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets '?', not an error
    samples: list[dict[str, Any]] = []
    start = time.perf_counter()
    for index in range(config.num_samples):
        if config.num_samples > 1:
            _show(f"--- {index + 1} of {config.num_samples}\n")
        if config.stream:
            _show(prompt)
        samples.append(write_one(model, tokenizer, ids, config, index, _show if config.stream else lambda _: None))
        _show("\n" if config.stream else f"{prompt}{samples[-1]['text']}\n")
    seconds = time.perf_counter() - start
    count = sum(len(sample["ids"]) for sample in samples)
    note = f"{count} tokens in {seconds:.2f} s, {count / max(seconds, 1e-9):.0f} tokens/s, {config.weights} weights"
    if any(sample["finish_reason"] == "context" for sample in samples):
        note += f"; stopped where the model's context of {shape.max_seq_len} tokens was full"
    print(note, file=sys.stderr)
    values = {**samples[0], "prompt": prompt, "model": config.model, "weights": config.weights, "seed": config.seed}
    values["seconds"] = seconds
    return Result({**values, "samples": samples} if config.num_samples > 1 else values)


VERB = Verb("generate", "write text with a model", GenerateConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
