"""Keep a fuzzer's finds: python tests/fuzz/keep.py TARGET FOLDER writes the smallest of them to corpus/TARGET.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TARGET_BYTES = 10_000  # of one target, before hexadecimal doubles it


def main() -> None:
    name, folder = sys.argv[1:]
    kept: dict[str, str] = {}
    total = 0
    for path in sorted(Path(folder).iterdir(), key=lambda p: (p.stat().st_size, p.name)):
        total += path.stat().st_size
        if total > TARGET_BYTES:
            break
        kept[path.name[:12]] = path.read_bytes().hex()
    target = Path(__file__).parent / "corpus" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, indent=0) + "\n")


if __name__ == "__main__":
    main()
