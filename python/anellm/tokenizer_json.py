"""Byte-pair tokenizers in Hugging Face's ``tokenizer.json``.

GPT-2's kind is encoded here, all others by the ``tokenizers`` package (an extra).
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anellm import safeio, saferead
from anellm.byte_level import byte_alphabet, encoder_of, is_version
from anellm.errors import DataError, UnavailableError
from anellm.tokenizer_base import DOCUMENT_SEPARATOR, BaseTokenizer

FILE_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
LIMIT_BYTES = 128 << 20
_MOST_HOLES = 1 << 16  # ids that no token has, below the largest
_END_NAMES = (DOCUMENT_SEPARATOR, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>")
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
GPT2_VOCAB_SIZE = 50257
_GPT2_MERGES = "data/gpt2.bpe.zlib"  # OpenAI's vocab.bpe
_SPACE = "\u2581"  # what stands for a space in vocabularies of sentencepiece's kind

# How GGUF files call the ways of cutting text into words, and what each means (llama.cpp's llama-vocab.cpp; the
# expressions are those of the models' own tokenizer.json).
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTE_LEVEL, "use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": [_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _BYTE_LEVEL],
    "qwen2": [_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _BYTE_LEVEL],
    "default": [
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
        _split(r"\p{N}+"),
        _split("[0-9][0-9][0-9]"),
        _BYTE_LEVEL,
    ],
}
_ALIASES = {
    "phi-2": "gpt-2", "mpt": "gpt-2", "olmo": "gpt-2", "jais": "gpt-2",
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "codeshell": "smollm",
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "smaug-bpe": "llama-bpe",
    "dbrx": "llama-bpe", "stablelm2": "qwen2", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip


class JsonTokenizer(BaseTokenizer):
    """A byte-pair vocabulary in ``tokenizer.json``, with what the tokenizer_config.json beside it says of its ends.

    Whether a text begins with a token, and which, is the file's own rule: tokenizer_config.json's add_bos_token where
    it is there, else the post-processor's template. GPT-2 and SmolLM2 have none, so documents end with
    ``<|endoftext|>`` instead.
    """

    file_name = FILE_NAME

    def __init__(self, data: bytes, config: bytes | None = None, *, source: str = FILE_NAME) -> None:
        """Build a tokenizer.

        Args:
            data: content of tokenizer.json.
            config: content of tokenizer_config.json, or None.
            source: what to call it in an error.

        Raises:
            DataError: naming source, field, expected and found, if it is damaged or of a kind that is not supported.
            UnavailableError: if it is not of GPT-2's kind, and the ``tokenizers`` package is not installed.
        """
        self._data, self._config, self.source = data, config, source
        values = saferead.parse_json(data, source, DataError)
        settings = saferead.parse_json(config, f"{source}: {CONFIG_NAME}", DataError) if config is not None else {}
        vocab, added = _vocabulary(values, source)
        self._set_bytes(values, vocab, added)
        _check_merges(values["model"], vocab, source)
        self._own = encoder_of(values, vocab, added)
        self._backend: Any = _backend(data, source) if self._own is None else None
        self._special_ids = frozenset(index for index, (_, special) in added.items() if special)
        self._special_texts = [text for text, special in added.values() if special and text]
        self._set_ends(settings, {**vocab, **{text: index for index, (text, _) in added.items()}})

    @classmethod
    def from_file(cls, path: str | Path) -> JsonTokenizer:
        """Read a tokenizer.json, and the tokenizer_config.json beside it where there is one.

        Raises:
            DataError: naming file, field, expected and found.
            UnavailableError: if the ``tokenizers`` package is not installed.
        """
        path = Path(path)
        config = path.with_name(CONFIG_NAME)
        return cls(
            saferead.read_regular(path, DataError, LIMIT_BYTES, follow=True),
            saferead.read_regular(config, DataError, LIMIT_BYTES, follow=True) if config.is_file() else None,
            source=str(path),
        )

    @classmethod
    def gpt2(cls) -> JsonTokenizer:
        """Return GPT-2's tokenizer, which comes with the package: 50,257 tokens, the last one ``<|endoftext|>``."""
        return _gpt2()

    @classmethod
    def from_merges(cls, text: str, *, source: str = "vocab.bpe") -> JsonTokenizer:
        """Build a tokenizer of GPT-2's kind from its merges alone.

        Ids are those of GPT-2's encoder.json: bytes in the order of their alphabet, merges, ``<|endoftext|>``.

        Args:
            text: content of a ``vocab.bpe`` or ``merges.txt``: a line ``#version``, then "left right", best first.
            source: what to call it in an error.

        Raises:
            DataError: naming source, merge, expected and found.
        """
        merges = [line for line in text.split("\n") if line and not line.startswith("#version")]
        tokens = [*byte_alphabet(), *(line.replace(" ", "", 1) for line in merges), DOCUMENT_SEPARATOR]
        end = len(tokens) - 1
        return cls.from_bpe(tokens, merges, "gpt-2", bos_id=end, eos_id=end, add_bos=False, source=source)

    @classmethod
    def from_bpe(
        cls,
        tokens: Sequence[str],
        merges: Sequence[str],
        pre: str = "default",
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        control_ids: Collection[int] = (),
        user_ids: Collection[int] = (),
        add_bos: bool | None = None,
        source: str = "tokenizer",
    ) -> JsonTokenizer:
        """Build a byte-level tokenizer from the parts that a GGUF file has (``tokenizer.ggml.model`` = "gpt2").

        Args:
            tokens: text of each token, in the alphabet of byte-level BPE.
            merges: "left right", best first.
            pre: how text is cut into words (``tokenizer.ggml.pre``): gpt-2, smollm, llama-bpe, qwen2, default.
            bos_id: the token that begins a text, or None.
            eos_id: the token that ends a text, or None.
            control_ids: tokens that plain text never gives (type 3); bos_id and eos_id are always among them.
            user_ids: tokens that are found in text as they are, before anything is merged (type 4).
            add_bos: whether texts begin with bos_id (``tokenizer.ggml.add_bos_token``); None takes the rule of
                ``pre``: only llama-bpe does.
            source: what to call it in an error.

        Raises:
            DataError: on an unknown ``pre``, an id out of range, a token twice, or merges that do not fit the tokens.
            UnavailableError: if the ``tokenizers`` package is not installed.
        """
        kind = _ALIASES.get(pre, pre)
        if kind not in _PRE_TOKENIZERS:
            known = ", ".join([*_PRE_TOKENIZERS, *_ALIASES])
            raise DataError(f"{source}: pre-tokenizer: expected one of {known}, found {pre[:100]!r}")
        vocab: dict[str, int] = {}
        for index, token in enumerate(tokens):
            if vocab.setdefault(token, index) != index:
                raise DataError(f"{source}: token {index}: expected each once, found {token[:100]!r} as {vocab[token]}")
        ends = {"bos_id": bos_id, "eos_id": eos_id}
        special = {*control_ids, *(index for index in ends.values() if index is not None)}
        for index in (*special, *user_ids):
            if not 0 <= index < len(tokens):
                name = next((key for key, value in ends.items() if value == index), "control or user token")
                raise DataError(f"{source}: {name}: expected 0 to {len(tokens) - 1}, found {index}")
        values = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": index, "content": tokens[index], "single_word": False, "lstrip": False, "rstrip": False}
                | {"normalized": False, "special": index in special}
                for index in sorted({*special, *user_ids})
            ],
            "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[kind]},
            "post_processor": None,
            "decoder": _GPT2,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
            | {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
            | {"ignore_merges": kind == "llama-bpe", "vocab": vocab, "merges": list(merges)},
        }
        begins = (kind == "llama-bpe" if add_bos is None else add_bos) and bos_id is not None
        config = {
            "add_bos_token": begins,
            "bos_token": None if bos_id is None else tokens[bos_id],
            "eos_token": None if eos_id is None else tokens[eos_id],
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return cls(safeio.json_bytes(values, None), safeio.json_bytes(config), source=source)

    def is_gpt2(self) -> bool:
        """Return whether this gives what gpt2() gives, whatever file it is from."""
        return self._own is not None and list(self.token_table) == list(self.gpt2().token_table)

    @property
    def token_table(self) -> Sequence[bytes]:
        """Return the bytes of each token; those that begin, end or steer texts have none."""
        return self._bytes

    def to_bytes(self) -> bytes:
        """Return the content of tokenizer.json, as it was read."""
        return self._data

    def files(self) -> dict[str, bytes]:
        """Return tokenizer.json and, where there is one, tokenizer_config.json."""
        return {FILE_NAME: self._data} | ({} if self._config is None else {CONFIG_NAME: self._config})

    def _set_bytes(
        self, values: Mapping[str, Any], vocab: Mapping[str, int], added: Mapping[int, tuple[str, bool]]
    ) -> None:
        """Fill the decoder's table: the bytes of each token."""
        byte_level = _is_byte_level(values, self.source)
        table = [b""] * (1 + max([*vocab.values(), *added]))
        inverse = byte_alphabet()
        for text, index in vocab.items():
            if index in added:
                continue
            if byte_level:
                try:
                    table[index] = bytes([inverse[char] for char in text])
                except KeyError as error:
                    raise DataError(
                        f"{self.source}: token {index}: expected characters of the byte-level alphabet, "
                        f"found {error.args[0]!r}"
                    ) from None
            else:
                byte = _BYTE_TOKEN.fullmatch(text)
                table[index] = bytes([int(byte[1], 16)]) if byte else _utf8(text.replace(_SPACE, " "))
        for index, (text, special) in added.items():
            table[index] = b"" if special else _utf8(text)
        self._bytes = table
        self._drops_space = np.array([not byte_level and text.startswith(b" ") for text in table], dtype=np.bool_)

    def _set_ends(self, settings: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        """Find which tokens begin, end and separate texts."""
        begins: list[int] = []
        ends: list[int] = []
        if self._backend is not None:
            encoding = self._backend.encode("a", add_special_tokens=True)
            mask = list(encoding.special_tokens_mask)
            text_at = mask.index(0) if 0 in mask else len(mask)
            begins, ends = encoding.ids[:text_at], [i for i, m in zip(encoding.ids, mask, strict=True) if m][text_at:]
        if len(begins) > 1:
            raise DataError(f"{self.source}: post_processor: expected at most one token before a text, found {begins}")
        self.bos_id = begins[0] if begins else _named(settings, "bos_token", ids)
        rule = settings.get("add_bos_token")
        self.add_bos = (rule if isinstance(rule, bool) else bool(begins)) and self.bos_id is not None
        special = {text: ids[text] for text in self._special_texts}
        by_name = next((special[name] for name in _END_NAMES if name in special), None)
        eos_id = _named(settings, "eos_token", ids)
        self.eos_id = eos_id if eos_id is not None else ends[0] if ends else by_name
        self.separator_id = special.get(DOCUMENT_SEPARATOR, self.eos_id)
        known = {self.bos_id, self.eos_id, self.separator_id} - {None}
        self.stop_ids = self._special_ids | {int(index) for index in known if index is not None}

    def _encode_text(self, text: str) -> list[int]:
        text.encode("utf-8")  # a lone surrogate is refused here, with its place
        ids = self._encode_plain(text)
        if not self._special_ids.isdisjoint(ids):
            # Merges, or a whole word that is in the vocabulary, spelt a special token: cut each one in the text apart.
            pattern = "|".join(re.escape(name) for name in sorted(self._special_texts, key=len, reverse=True))
            cuts = [match.start() + 1 for match in re.finditer(pattern, text)]
            parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            ids = [index for part in parts if part for index in self._encode_plain(part)]
            ids = [index for index in ids if index not in self._special_ids]
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if self._own is not None:
            return self._own.encode(text)
        return list(self._backend.encode(text, add_special_tokens=False).ids)


@functools.cache
def _gpt2() -> JsonTokenizer:
    data = (Path(__file__).parent / _GPT2_MERGES).read_bytes()
    return JsonTokenizer.from_merges(zlib.decompress(data).decode("utf-8"), source="gpt2")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _named(settings: Mapping[str, Any], key: str, ids: Mapping[str, int]) -> int | None:
    """Return the id of a token that tokenizer_config.json names."""
    value = settings.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    return ids.get(name) if isinstance(name, str) else None


def _vocabulary(values: Mapping[str, Any], source: str) -> tuple[dict[str, int], dict[int, tuple[str, bool]]]:
    """Return the id of each token's text, and the text of each added token with whether it is special."""
    model = values.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise DataError(f"{source}: model.type: expected BPE, found {kind!r}"[:300])
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise DataError(f"{source}: model.vocab: expected an object with tokens, found {type(vocab).__name__}")
    listed = values.get("added_tokens") or []
    if not isinstance(listed, list):
        raise DataError(f"{source}: added_tokens: expected a list, found {type(listed).__name__}")
    added: dict[int, tuple[str, bool]] = {}
    limit = len(vocab) + len(listed) + _MOST_HOLES
    for number, item in enumerate(listed):
        index, text = (item.get("id"), item.get("content")) if isinstance(item, dict) else (None, None)
        if not isinstance(index, int) or not _is_id(index, limit) or not isinstance(text, str):
            raise DataError(f"{source}: added_tokens[{number}]: expected an id and a content, found {item!r}"[:300])
        if vocab.get(text, index) != index:
            raise DataError(f"{source}: added_tokens[{number}]: id: expected {vocab[text]!r}, found {index}"[:300])
        added[index] = (text, item.get("special") is True)
    owner: dict[int, str] = {}
    for text, index in vocab.items():
        if not _is_id(index, limit):
            raise DataError(f"{source}: token {text[:100]!r}: id: expected 0 to {limit - 1}, found {index!r}"[:300])
        if owner.setdefault(index, text) != text:
            raise DataError(f"{source}: token {text[:100]!r}: id {index}: also of {owner[index][:100]!r}")
    return vocab, added


def _check_merges(model: Mapping[str, Any], vocab: Mapping[str, int], source: str) -> None:
    """Refuse a merge of what is no token, or to what is none: the package panics at some, on the user's terminal."""
    merges, prefix = model.get("merges"), model.get("continuing_subword_prefix")
    n_prefix = len(prefix) if isinstance(prefix, str) else 0
    for number, item in enumerate(merges if isinstance(merges, list) else ()):
        pair = item.split(" ") if isinstance(item, str) else item
        if is_version(item):
            continue
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise DataError(f"{source}: model.merges[{number}]: expected two tokens, found {item!r}"[:300])
        for part in (*pair, pair[0] + pair[1][n_prefix:]):
            if part not in vocab:
                raise DataError(f"{source}: model.merges[{number}]: expected tokens, found {part[:100]!r}"[:300])


def _is_id(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def _types(node: object) -> Iterator[str]:
    """Yield the type of a normalizer, pre-tokenizer or decoder, and of what it is made of."""
    if isinstance(node, dict):
        inner = node.get("decoders") or node.get("pretokenizers")
        if isinstance(inner, list):
            for item in inner:
                yield from _types(item)
        else:
            yield str(node.get("type"))


def _is_byte_level(values: Mapping[str, Any], source: str) -> bool:
    """Return whether tokens are spelt in the byte-level alphabet, else in plain text with U+2581 for spaces."""
    decoder = values.get("decoder")
    types = set(_types(decoder if decoder is not None else values.get("pre_tokenizer")))
    if "ByteLevel" in types:
        return True
    if types and types <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return False
    found = ", ".join(sorted(types))[:100] or "none"
    raise DataError(f"{source}: decoder: expected ByteLevel, or Replace with ByteFallback, or Metaspace, found {found}")


def _backend(data: bytes, source: str) -> Any:
    """Return the package's tokenizer, set to treat special tokens in a text as text."""
    try:
        import tokenizers
    except ImportError:
        raise UnavailableError(
            f"{source}: a tokenizer.json needs the tokenizers package: pip install 'anellm[tokenizers]'"
        ) from None
    try:
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        backend.encode("a")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # noqa: BLE001  the package's panics are no Exceptions
        raise DataError(f"{source}: expected a tokenizer.json, found {str(error)[:200]}") from None
    return backend
