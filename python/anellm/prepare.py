"""The verb ``prepare``: text into shards of tokens, once, so that training starts at once."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anellm import safeio, tokens
from anellm.archives import Source, open_sources
from anellm.bpe_trainer import train_bpe_on
from anellm.cli import Result, Verb
from anellm.data import read_text
from anellm.documents import read_documents
from anellm.errors import ConfigError, DataError, InvalidError
from anellm.machine import human_bytes, human_count
from anellm.options import option
from anellm.tokenizer import CHARACTERS, GPT2, load_tokenizer_file
from anellm.tokenizer_base import BaseTokenizer
from anellm.tokenizer_char import CharTokenizer
from anellm.tokenizer_json import JsonTokenizer

# Where llama2.c and llm.c take them from: Shakespeare (Karpathy's char-rnn), and TinyStories (Eldan and Li 2023,
# arXiv:2305.07759), whose hash is not published there.
URLS = {
    "tinyshakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinystories": "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz",
}
SHA256 = {"tinyshakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
RECIPES = tuple(URLS)
MANIFEST = "prepare.json"
FORMATS = ("anellm", "raw", "llmc", "int32")
_HELD_OUT_TOKENS = 32_768  # of tinyshakespeare, as llm.c's script takes them from the beginning
_SHUFFLE_SEED = 1337  # of llm.c's tinystories.py: this and the file's number within its part
_SPOOL = "spool"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The options of ``prepare``.

    Raises:
        ConfigError: naming the option, what was expected and what was found.
    """

    inputs: tuple[str, ...] = option(
        (), f"text (.txt) or JSONL files, folders or patterns; or a recipe: {', '.join(RECIPES)}", group="input"
    )
    file: str | None = option(
        None, "for a recipe: its archive (.zip, .tar.gz) or text, fetched before; nothing is downloaded", group="input"
    )
    url: str | None = option(None, "for a recipe: where to download it from [its usual place]", group="input")
    sha256: str | None = option(None, "for a download: SHA-256 that it must have", group="input")
    download_dir: str | None = option(None, "where downloads are kept [the user's cache folder]", group="input")
    tokenizer: str | None = option(
        None,
        "tokenizer.bin, tokenizer.json, .model, or gpt2, or char: its characters "
        "[gpt2 for a recipe, else one is learnt from the text]",
        group="tokens",
    )
    vocab_size: int | None = option(
        None, "tokens to learn [by the text's size, 512 to 8192]", low=261, high=2**20, group="tokens"
    )
    val_fraction: float | None = option(
        None, "part of the tokens to hold out, from the end [0.05]", low=0, high=0.5, group="tokens"
    )
    val_tokens: int | None = option(None, "tokens to hold out, from the end", low=0, high=2**53, group="tokens")
    out: str | None = option(None, "folder to write; it must not be there yet", group="output")
    format: str | None = option(
        None,
        "kind of shards: with a checked header, without any, llm.c's, or int32 without any as llm.metal's "
        "[llmc for a recipe with gpt2, else anellm]",
        choices=FORMATS,
        group="output",
    )
    shard_tokens: int = option(100_000_000, "most tokens in a shard", low=1, high=2**31 - 1, group="output")
    quiet: bool = option(False, "print only errors", group="output", flag_only=True)
    json: str | None = option(None, "write the result to this file as JSON", group="output", flag_only=True)

    def __post_init__(self) -> None:
        if self.val_fraction is not None and self.val_tokens is not None:
            raise ConfigError("--val-fraction and --val-tokens exclude each other")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ConfigError("--vocab-size: only where a tokenizer is learnt, found --tokenizer with it")
        for name in ("tokenizer", "out", "file", "url", "download_dir"):
            if getattr(self, name) == "":
                raise ConfigError(f"--{name.replace('_', '-')}: expected a value, found nothing")

    @property
    def recipe(self) -> str | None:
        """Return the recipe asked for, or None."""
        return self.inputs[0] if len(self.inputs) == 1 and self.inputs[0] in RECIPES else None


# ---- where text comes from -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sources(config: PrepareConfig) -> Iterator[list[Source]]:
    """Open what there is to encode."""
    if config.recipe is not None:
        path = _recipe_file(config, config.recipe)
        if config.recipe == "tinyshakespeare":
            yield [Source(str(path), lambda: _sections(path))]
            return
        with open_sources(path) as found:
            yield found
        return
    for name in ("file", "url", "sha256", "download_dir"):
        if getattr(config, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: only for a recipe ({', '.join(RECIPES)})")
    files = [file for path in config.inputs for file in tokens.find_data(path)]
    for file in files:
        if not file.is_file():
            what = f"a text or JSONL file, or a recipe ({', '.join(RECIPES)})"
            raise DataError(f"{file}: expected {what}, found {'no plain file' if file.exists() else 'nothing'}")
        if not tokens.is_text(file):
            raise DataError(f"{file}: expected a name that ends in {', '.join(tokens.TEXT_SUFFIXES)}")
    yield [Source(str(file), lambda file=file: iter(read_documents(file))) for file in files]  # type: ignore[misc]


def _recipe_file(config: PrepareConfig, recipe: str) -> Path:
    if config.file is not None:
        if config.url is not None or config.sha256 is not None:
            raise ConfigError("--file: nothing is downloaded, found --url or --sha256 with it")
        return Path(config.file)
    from anellm.download import fetch

    url = config.url or URLS[recipe]
    name = f"tinyshakespeare-{url.rsplit('/', 1)[-1]}" if recipe == "tinyshakespeare" else url.rsplit("/", 1)[-1]
    sha256 = SHA256.get(recipe) if config.sha256 is None and config.url is None else config.sha256
    return fetch(url, name.split("?")[0] or recipe, sha256, config.download_dir)


def _sections(path: Path) -> Iterator[str]:
    """Yield what stands between blank lines, each with the blank line behind it, as llm.c's tinyshakespeare.py does."""
    sections = read_text(path).split("\n\n")
    for number, section in enumerate(sections, 1):
        yield section if number == len(sections) else f"{section}\n\n"


def _shuffled(sources: Sequence[Source]) -> list[Source]:
    """Return the sources with the stories of each list in the order that llm.c's tinystories.py gives them.

    The first file is a part of its own (held out), the others are numbered anew. One file's stories are in memory.
    """

    def read(source: Source, number: int) -> Iterator[Any]:
        items = list(source.read())
        random.Random(_SHUFFLE_SEED + number).shuffle(items)  # noqa: S311  not for secrets
        yield from items

    numbers = [max(0, place - 1) for place in range(len(sources))]
    return [
        replace(source, read=partial(read, source, number)) if source.name.endswith(".json") else source
        for source, number in zip(sources, numbers, strict=True)
    ]


def _tokenizer(config: PrepareConfig, sources: Sequence[Source]) -> BaseTokenizer:
    """Return the tokenizer asked for, or learn one."""
    name = config.tokenizer
    if name is None and config.recipe is not None and config.vocab_size is None:
        return load_tokenizer_file(GPT2)
    found = (item for source in sources for item in source.read())
    if name == CHARACTERS and not Path(name).exists():
        return CharTokenizer.learn((_text(item) for item in found), source=f"the characters of {config.inputs[0]}")
    if name is not None:
        return load_tokenizer_file(name)
    return train_bpe_on((_text(item) for item in found), config.vocab_size)


def _text(item: Any) -> str:
    if not isinstance(item, str):
        raise ConfigError("--tokenizer: needed, as there are tokens in the archive: the one they were made with")
    return item


# ---- from text to shards ---------------------------------------------------------------------------------------------


class _Spool:
    """All ids in one temporary file, so that where to cut is known before anything is written for good."""

    def __init__(
        self, file: safeio.NewFile, tokenizer: BaseTokenizer, *, show: bool, named: bool, separator: int | None
    ) -> None:
        self.file, self.tokenizer, self._show, self._named = file, tokenizer, show, named
        self._separator = separator  # what stands in front of each document instead of behind it
        self.n_tokens = self.n_documents = self.n_bytes = 0
        self.ends: list[int] = []  # of each source
        self._pending: list[np.ndarray[Any, Any]] = []
        self._n_pending, self._shown = 0, time.monotonic()

    def take(self, source: Source) -> None:
        """Encode a source."""
        tokenizer = self.tokenizer
        for item in source.read():
            if isinstance(item, str):
                ids = np.array(self._encoded(item, source.name), dtype=tokenizer.token_dtype)
                self.n_documents += bool(ids.size)
                self.n_bytes += len(item.encode("utf-8"))
            else:
                if not self._named:
                    _text(item)
                self._check(item, source.name)
                ids = item.astype(tokenizer.token_dtype)
                starts = tokenizer.bos_id if tokenizer.add_bos else tokenizer.separator_id
                self.n_documents += int(np.count_nonzero(item == starts)) if starts is not None else 0
                self.n_bytes += tokenizer.count_bytes(item)
            self._pending.append(ids)
            self._n_pending += ids.size
            self.n_tokens += ids.size
            if self._n_pending >= tokens.CHUNK:
                self.flush()
        self.ends.append(self.n_tokens)

    def _encoded(self, text: str, name: str) -> list[int]:
        try:
            if self._separator is None:
                return self.tokenizer.encode_document(text)
            return [self._separator, *self.tokenizer.encode(text)]
        except InvalidError as error:  # a character that the tokenizer lacks
            raise DataError(f"{name}: {error}") from None

    def _check(self, ids: np.ndarray[Any, Any], name: str) -> None:
        if ids.size and int(ids.max()) >= self.tokenizer.vocab_size:
            raise DataError(
                f"{name}: expected ids below {self.tokenizer.vocab_size} ({self.tokenizer.source}), "
                f"found {int(ids.max())}"
            )

    def flush(self) -> None:
        """Write what is held back, and show how far it is."""
        for ids in self._pending:
            self.file.write(ids.data)
        self._pending, self._n_pending = [], 0
        now = time.monotonic()
        if self._show and now - self._shown > 1:
            self._shown = now
            text = f"\r{human_count(self.n_documents)} documents, {human_bytes(self.n_bytes)}, "
            print(f"{text}{human_count(self.n_tokens)} tokens ", end="", file=sys.stderr, flush=True)


def _held_out(config: PrepareConfig, spool: _Spool) -> tuple[int, int]:
    """Return which tokens are held out, as begin and end: from the end, or the first of several members."""
    n = spool.n_tokens
    if config.val_tokens is None and config.val_fraction is None and config.recipe and len(spool.ends) > 1:
        return 0, spool.ends[0]  # as llama2.c and llm.c do: the first file is held out
    if config.val_tokens is None and config.val_fraction is None and config.recipe == "tinyshakespeare":
        if n <= _HELD_OUT_TOKENS:
            raise DataError(
                f"{config.recipe}: expected more than the {_HELD_OUT_TOKENS} tokens that are held out, found {n}"
            )
        return 0, _HELD_OUT_TOKENS
    fraction = 0.05 if config.val_fraction is None else config.val_fraction
    count = round(n * fraction) if config.val_tokens is None else config.val_tokens
    if count >= n:
        raise DataError(f"--val-tokens: expected fewer than all {n} tokens, found {count}")
    return n - count, n


def _write_shards(
    folder: safeio.NewDirectory,
    name: str,
    ids: np.ndarray[Any, Any],
    config: PrepareConfig,
    kind: str,
    tokenizer: BaseTokenizer,
) -> list[dict[str, Any]]:
    """Write one part as shards, and return what the manifest says of them."""
    written = []
    for number, begin in enumerate(range(0, ids.size, config.shard_tokens)):
        shard = ids[begin : begin + config.shard_tokens]
        if kind == "llmc" and shard.dtype.itemsize == 4:
            shard = shard.view("<u4")
        head = b""
        if kind == "anellm":
            head = tokens.shard_header([shard], tokenizer.vocab_size, tokenizer.sha256)
        elif kind == "llmc":
            head = tokens.llmc_header(shard.size, shard.dtype)
        file_name = f"{name}_{number:05d}.bin"
        with folder.file(file_name) as file:
            file.write(head)
            for at in range(0, shard.size, tokens.CHUNK):
                part = shard[at : at + tokens.CHUNK]
                file.write(np.ascontiguousarray(part, dtype="<i4" if kind == "int32" else part.dtype).data)
        written.append({"name": file_name, "tokens": int(shard.size), **folder.files[file_name]})
    return written


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Encode text and write shards, the tokenizer and prepare.json to a new folder: all of it, or nothing.

    Returns:
        What prepare.json holds.

    Raises:
        ConfigError: on options that do not go together.
        DataError: naming file, line, field, expected and found.
    """
    if not config.inputs or config.out is None:
        raise ConfigError(f"{'INPUTS' if not config.inputs else '--out'}: needed, and not given")
    out = Path(config.out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"--out {out}: expected a folder that is not there yet or is empty, found something")
    with _sources(config) as sources:
        tokenizer = _tokenizer(config, sources)
        safeio.make_directory(out.absolute().parent)
        with safeio.atomic_directory(out.absolute()) as folder:
            values = _encode(config, sources, tokenizer, folder)
            folder.write_bytes(MANIFEST, safeio.json_bytes(values))
    return values


def _encode(
    config: PrepareConfig, sources: Sequence[Source], tokenizer: BaseTokenizer, folder: safeio.NewDirectory
) -> dict[str, Any]:
    """Encode all sources into a folder, and return what prepare.json holds."""
    show = not config.quiet and sys.stderr.isatty()
    # llm.c's order of things: <|endoftext|> in front of each document, stories shuffled.
    as_llmc = config.recipe is not None and isinstance(tokenizer, JsonTokenizer) and tokenizer.is_gpt2()
    kind = config.format or ("llmc" if as_llmc else "anellm")
    with folder.file(_SPOOL) as file:
        separator = tokenizer.separator_id if as_llmc else None
        spool = _Spool(file, tokenizer, show=show, named=config.tokenizer is not None, separator=separator)
        for source in _shuffled(sources) if as_llmc else sources:
            spool.take(source)
        spool.flush()
    if show:
        print(file=sys.stderr)
    path = folder.path / _SPOOL
    if not spool.n_tokens:
        raise DataError(f"{' '.join(config.inputs)}: expected text, found none")
    ids = np.memmap(path, dtype=tokenizer.token_dtype, mode="r")
    begin, end = _held_out(config, spool)
    train = ids[end:] if begin == 0 else ids[:begin]
    values = {
        "format": kind,
        "dtype": "int32" if kind == "int32" else tokenizer.token_dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.file_name,
        "tokenizer_sha256": tokenizer.sha256,
        "documents": spool.n_documents,
        "text_bytes": spool.n_bytes,
        "tokens": spool.n_tokens,
        "train_tokens": int(train.size),
        "val_tokens": end - begin,
        "sources": [source.name for source in sources],
        "train": _write_shards(folder, "train", train, config, kind, tokenizer),
        "val": _write_shards(folder, "val", ids[begin:end], config, kind, tokenizer),
    }
    for name, content in tokenizer.files().items():
        folder.write_bytes(name, content)
    path.unlink()
    del folder.files[_SPOOL]
    return values


def run(config: PrepareConfig) -> Result:
    """Prepare, and print what was made."""
    start = time.perf_counter()
    values = prepare(config)
    values["seconds"] = time.perf_counter() - start
    if not config.quiet:
        per_token = values["text_bytes"] / values["tokens"]
        print(
            f"{values['documents']} documents, {human_bytes(values['text_bytes'])}: {values['tokens']} tokens of "
            f"{values['vocab_size']} ({per_token:.2f} bytes a token) in {values['seconds']:.1f} s"
        )
        shards = f"{len(values['train'])} + {len(values['val'])} shards"
        print(f"{shards}: {values['train_tokens']} tokens to train on, {values['val_tokens']} held out")
        print(f"train:  anellm train --data {config.out}")
    return Result(values)


VERB = Verb("prepare", "turn text into shards of tokens, with any tokenizer or one that is learnt", PrepareConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
