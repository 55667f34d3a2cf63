"""Run one target under atheris; every ``fuzz_<target>.py`` ends here."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

with atheris.instrument_imports(include=["anellm"]):
    import targets


def run(name: str) -> None:
    """Fuzz a target with libFuzzer's options from the command line (-max_total_time=180, say).

    It starts from the seeds and the kept corpus, in a folder of its own unless one is named.
    """
    target = targets.TARGETS[name]
    options = sys.argv[1:]
    if all(word.startswith("-") for word in options):
        work = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
        options.append(str(work))
    else:
        work = Path(next(word for word in options if not word.startswith("-")))
        work.mkdir(exist_ok=True)
    for seed, content in targets.seeds()[name].items():
        (work / seed).write_bytes(content)
    kept = HERE / "corpus" / f"{name}.json"
    if kept.exists():
        for seed, content in targets.read_corpus(kept).items():
            (work / seed).write_bytes(content)
    atheris.Setup([sys.argv[0], *options], target)
    atheris.Fuzz()
