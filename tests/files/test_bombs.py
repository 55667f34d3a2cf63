"""Model files of a few hundred bytes that claim to hold 2^40 weights: refused before any memory is taken."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from modelfiles import ARRAY, F32, SMALL, STRING, U8, field, gguf_bytes, gguf_fields, info, text

from anellm.config import ModelConfig

CONFIG = ModelConfig(**SMALL)
BIG = 1 << 20  # rows and columns: 2^40 weights
LIMIT_BYTES = 50 << 20

# Opens each path it is given under a limit of address space that leaves 50 MB, and says how it was refused.
CHILD = """
import resource, sys
from pathlib import Path
from anellm import errors, weights, weights_gguf, weights_hf, weights_llama2c
from anellm.model import Model
from anellm.config import ModelConfig
from anellm.tokenizer import load_tokenizer_file
weights.tensor_shapes(ModelConfig(dim=4, hidden_dim=4, n_layers=1, n_heads=2, vocab_size=8, max_seq_len=4))
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]),) * 2)
for path in sys.argv[2:]:
    for open_it in (Model.from_pretrained, load_tokenizer_file):
        try:
            open_it(path)
            print("opened", path)
        except errors.DataError as error:
            print("refused")
        except BaseException as error:
            print(type(error).__name__, error, path)
"""


def gguf_with(*more: bytes, n_fields: int | None = None, n_tensors: int | None = None) -> bytes:
    """Return a GGUF file without tensors."""
    fields = [field(key, *value) for key, value in gguf_fields(CONFIG).items()]
    return gguf_bytes([*fields, *more], [], b"", n_fields=n_fields, n_tensors=n_tensors)


def bombs() -> dict[str, bytes]:
    """Return files by name; a name with a folder is part of a Hugging Face directory."""
    long = struct.pack("<7iB", BIG, BIG, 1, 4, 4, BIG, BIG, 1)
    shape = {"dtype": "F32", "shape": [BIG, BIG], "data_offsets": [0, 4 * BIG * BIG]}
    safetensors = json.dumps({"model.embed_tokens.weight": shape}).encode()
    config = json.dumps({**CONFIG.to_hf(), "num_hidden_layers": 2**31 - 1, "vocab_size": 2**31 - 1}).encode()
    tensor = info("token_embd.weight", (BIG, BIG), 0, 0)
    fields = [field(key, *value) for key, value in gguf_fields(CONFIG).items()]
    return {
        "v0.bin": struct.pack("<7i", BIG, BIG, 1, 4, 4, BIG, BIG).ljust(200, b"\0"),
        "v0_layers.bin": struct.pack("<7i", 8, 8, 2**31 - 1, 4, 4, 8, 8).ljust(200, b"\0"),
        "v1.bin": (struct.pack("<4si", b"24ka", 1) + long).ljust(256, b"\0"),
        "v2.bin": (struct.pack("<4si", b"24ka", 2) + long + struct.pack("<i", 1)).ljust(256, b"\0"),
        "fields.gguf": gguf_with(n_fields=1 << 40),
        "tensors.gguf": gguf_with(n_tensors=1 << 40),
        "weights.gguf": gguf_bytes(fields, [tensor], b""),
        "tokens.gguf": gguf_with(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, 1 << 40)),
        "scores.gguf": gguf_with(text("tokenizer.ggml.scores") + struct.pack("<IIQ", ARRAY, F32, 1 << 40)),
        "bytes.gguf": gguf_with(text("x") + struct.pack("<IIQ", ARRAY, U8, 1 << 40)),
        "string.gguf": gguf_with(text("x") + struct.pack("<IQ", STRING, 1 << 40)),
        "key.gguf": gguf_with(struct.pack("<Q", 1 << 40)),
        "hf/model.safetensors": struct.pack("<Q", len(safetensors)) + safetensors,
        "hf/config.json": json.dumps(CONFIG.to_hf()).encode(),
        "header/model.safetensors": struct.pack("<Q", 1 << 40) + b"{}",
        "header/config.json": json.dumps(CONFIG.to_hf()).encode(),
        "layers/model.safetensors": struct.pack("<Q", 2) + b"{}",
        "layers/config.json": config,
    }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory that a process has is read from /proc")
def test_bombs(tmp_path: Path) -> None:
    paths = []
    for name, data in bombs().items():
        assert len(data) < 1500
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        target = path.parent if "/" in name else path
        if target not in paths:
            paths.append(target)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(LIMIT_BYTES), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    lines = child.stdout.split("\n")[:-1]
    assert len(lines) == 2 * len(paths)
    assert set(lines) == {"refused"}, child.stdout
