"""What every tokenizer can do, whatever file it is read from: one base class, and the decoder that streams."""

from __future__ import annotations

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from anellm.errors import InvalidError, TokenRangeError

DOCUMENT_SEPARATOR = "<|endoftext|>"


class BaseTokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        file_name: the name its main file is kept under, beside weights and in checkpoints.
        source: what it was read from, for messages.
        bos_id: the token that begins a text; None where the vocabulary has none.
        eos_id: the token that ends a text; None where the vocabulary has none.
        add_bos: whether a text begins with bos_id, by the tokenizer's own data.
        separator_id: the token that ends each document where none begins it (add_bos is False); None for none.
        stop_ids: tokens that end a text when a model writes them: those that begin, end or steer texts.
    """

    file_name: ClassVar[str]
    source: str
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    separator_id: int | None
    stop_ids: frozenset[int]

    _bytes: Sequence[bytes]  # of each token
    _drops_space: npt.NDArray[np.bool_]  # whether a token loses its leading space right after bos_id

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Return the content of its main file."""

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Return the ids of a text that is not empty, without bos_id and eos_id.

        Raises:
            UnicodeEncodeError: if it holds a lone surrogate.
        """

    def files(self) -> dict[str, bytes]:
        """Return every file that it is kept as, by name; the main one first."""
        return {self.file_name: self.to_bytes()}

    def save(self, path: str | Path) -> None:
        """Write its main file; reading it and saving it again gives the same bytes."""
        Path(path).write_bytes(self.to_bytes())

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of its main file, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return len(self._bytes)

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Return the smallest of uint16 and int32 that holds every id."""
        return np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<i4")

    # ---- encoding ---------------------------------------------------------------------------------------------------

    def encode(self, text: str, bos: bool | None = None, eos: bool = False) -> list[int]:
        """Encode text to token ids.

        Whatever the text says, it never gives a token that begins, ends or steers texts: ``<s>`` in it is text.

        Args:
            text: any string without lone surrogates.
            bos: whether to begin with bos_id; None does as add_bos says.
            eos: whether to end with eos_id.

        Returns:
            Token ids, each in [0, vocab_size).

        Raises:
            InvalidError: if the text holds a lone surrogate, which has no UTF-8 form, or if bos_id or eos_id is asked
                for and the vocabulary has none.
        """
        ids: list[int] = []
        if self.add_bos if bos is None else bos:
            ids.append(self._required(self.bos_id, "begins"))
        if text:
            try:
                ids += self._encode_text(text)
            except UnicodeEncodeError:
                at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
                raise InvalidError(
                    f"text: expected Unicode text, found the lone surrogate {text[at]!r} at character {at}"
                ) from None
        if eos:
            ids.append(self._required(self.eos_id, "ends"))
        return ids

    def _required(self, token: int | None, does: str) -> int:
        if token is None:
            raise InvalidError(f"the tokenizer has no token that {does} a text")
        return token

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text to write on from: as encode() does, but never to nothing.

        Raises:
            InvalidError: as encode() does; or if the text is empty, and no token begins or separates texts.
        """
        ids = self.encode(text)
        if ids:
            return ids
        if self.separator_id is None:
            raise InvalidError("prompt: expected text, found none: this tokenizer has no token that begins a text")
        return [self.separator_id]

    def encode_documents(self, text: str) -> npt.NDArray[Any]:
        """Encode text that holds documents separated by ``<|endoftext|>``.

        The marker is never encoded as text. Each document that is not empty begins with bos_id or, where add_bos is
        False, ends with separator_id. Newlines right before and after a marker belong to it.

        Returns:
            Token ids (n,), of token_dtype.

        Raises:
            InvalidError: if the text holds a lone surrogate.
        """
        return self.encode_each(split_documents(text))

    def encode_each(self, documents: Iterable[str]) -> npt.NDArray[Any]:
        """Encode documents one after the other, as encode_documents() does with what it has split."""
        parts = [np.array(self.encode_document(document), dtype=self.token_dtype) for document in documents]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.token_dtype)

    def encode_document(self, text: str) -> list[int]:
        """Encode one document, with the token that begins or ends it; an empty one gives nothing."""
        if not text:
            return []
        ids = self.encode(text)
        if not self.add_bos and self.separator_id is not None:
            ids.append(self.separator_id)
        return ids

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that token ids stand for; tokens that begin, end or steer texts give nothing.

        Where encoding puts a space in front of the text, the space that leads the first token after bos_id is dropped.

        Raises:
            TokenRangeError: if an id is outside the vocabulary.
        """
        stream = TokenStream(self)
        return b"".join([stream.feed_bytes(int(token)) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that token ids stand for, with U+FFFD in place of bytes that are not UTF-8.

        Raises:
            TokenRangeError: if an id is outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> TokenStream:
        """Return a decoder that takes one id at a time."""
        return TokenStream(self)

    def token_bytes(self, token: int) -> int:
        """Return the number of bytes that a token decodes to: 0 for bos_id and eos_id.

        Raises:
            TokenRangeError: if the id is outside the vocabulary.
        """
        self._check(token)
        return len(self._bytes[token])

    def count_bytes(self, ids: npt.ArrayLike) -> int:
        """Return ``len(decode_bytes(ids))`` for an array of ids, without decoding them.

        Raises:
            TokenRangeError: if an id is outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return 0
        self._check(int(array.min()))
        self._check(int(array.max()))
        dropped = self._drops_space[array[1:]] & (array[:-1] == (-1 if self.bos_id is None else self.bos_id))
        return int(self._byte_lengths[array].sum()) - int(np.count_nonzero(dropped))

    @cached_property
    def _byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(text) for text in self._bytes], dtype=np.int64)

    def _check(self, token: int) -> None:
        if not 0 <= token < len(self._bytes):
            raise TokenRangeError(f"token id: expected 0 to {len(self._bytes) - 1}, found {token}")


class TokenStream:
    """Decode token ids as they come, never giving out half a code point."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        """Start at the beginning of a text; the tokenizer's stream() is the usual way here."""
        self._tokenizer = tokenizer
        self._after_bos = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed_bytes(self, token: int) -> bytes:
        """Return the bytes of the next token.

        Raises:
            TokenRangeError: if the id is outside the vocabulary.
        """
        tokenizer = self._tokenizer
        tokenizer._check(token)
        drop = self._after_bos and bool(tokenizer._drops_space[token])
        self._after_bos = token == tokenizer.bos_id
        return tokenizer._bytes[token][drop:]

    def feed(self, token: int) -> str:
        """Return the text that the next token completes; bytes of an unfinished code point wait.

        Raises:
            TokenRangeError: if the id is outside the vocabulary.
        """
        return self._decoder.decode(self.feed_bytes(token))

    def flush(self) -> str:
        """Return what is left at the end of the text: U+FFFD for an unfinished code point, else nothing."""
        return self._decoder.decode(b"", final=True)


def split_documents(text: str) -> list[str]:
    """Return the documents between ``<|endoftext|>`` markers, without the newlines around them; none is empty."""
    parts = text.split(DOCUMENT_SEPARATOR)
    last = len(parts) - 1
    for index in range(last):
        parts[index] = parts[index].rstrip("\r\n")
        parts[index + 1] = parts[index + 1].lstrip("\r\n")
    return [part for part in parts if part]
