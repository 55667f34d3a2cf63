"""What is fuzzed: each target takes any bytes as one kind of file and lets nothing escape but the project's own errors.

The same targets are replayed over ``corpus/`` by test_corpus.py, and driven by atheris in ``fuzz_<target>.py``.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import json
import shutil
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from anellm import checkpoint, cli, debug_state, metrics, optimizer_state, safeio, tokenizer_llmc, weights
from anellm import tokens as tokens_file
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.errors import AnellmError
from anellm.model import Model
from anellm.pipeline_run import STATE_FILE, PipelineRun
from anellm.rundir import RunDirectory
from anellm.state import TrainState
from anellm.state_file import DATA_OFFSET, HEADER_BYTES, SLOT_BYTES, StateFile
from anellm.tokenizer import Tokenizer, load_tokenizer_file
from anellm.tokenizer_char import CharTokenizer
from anellm.tokenizer_json import JsonTokenizer
from anellm.trainer import Trainer
from anellm.weights_hf import write_safetensors

sys.path.insert(0, str(Path(__file__).parents[1] / "files"))
import gpt2files
import modelfiles

SHAPE = ModelConfig(dim=4, hidden_dim=4, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=8, max_seq_len=4)
GPT2 = ModelConfig(arch="gpt2", bias=True, dim=2, n_layers=1, n_heads=1, vocab_size=3, max_seq_len=4)
DATA = TokenDataset(np.arange(40, dtype=np.uint16) % 8)
VOCABULARY = 300
CLAIMS = b'{"model.norm.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
_LINE = 20_000  # no message is longer


@functools.cache
def folder() -> Path:
    """Return a folder for the file of the day, in memory where that is possible; it goes with the process."""
    shm = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="anellm-fuzz-", dir=shm if shm.is_dir() else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def model() -> Model:
    made = Model(SHAPE, seed=1)
    made.enable_training()
    return made


def one_line(error: AnellmError, path: Path | None = None) -> None:
    """Check that an error says something a person can use."""
    text = " ".join(str(error).split())
    assert 0 < len(text) < _LINE, f"{len(text)} characters"
    assert path is None or path.name in text, text


def read_model(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = weights.load_pretrained(path)
            for name, array in found.tensors:
                assert array.dtype == np.float32, name
                assert np.isfinite(array).all(), name
        except AnellmError as error:
            one_line(error)


@functools.cache
def hf_folder(name: str) -> Path:
    path = folder() / name
    path.mkdir()
    weights.save_hf(path, SHAPE, model().params)
    return path


def safetensors(data: bytes) -> None:
    path = hf_folder("safetensors")
    (path / "model.safetensors").write_bytes(data)
    read_model(path)


def hf_config(data: bytes) -> None:
    path = hf_folder("hf_config")
    (path / "config.json").write_bytes(data)
    read_model(path)


def hf_index(data: bytes) -> None:
    path = hf_folder("hf_index")
    if (path / "model.safetensors").exists():
        (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_bytes(data)
    read_model(path)


def llama2c(data: bytes) -> None:
    path = folder() / "llama2c.bin"
    path.write_bytes(data)
    read_model(path)


def blzt(data: bytes) -> None:
    path = folder() / "blzt.bin"
    path.write_bytes(data)
    read_model(path)


def llmc(data: bytes) -> None:
    path = folder() / "llmc.bin"
    path.write_bytes(data)
    read_model(path)


@functools.cache
def gpt2_folder() -> tuple[Path, dict[str, bytes]]:
    path = folder() / "hf_gpt2"
    weights.save_hf(path, GPT2, gpt2files.gpt2_params(GPT2))
    return path, {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def hf_gpt2(data: bytes) -> None:
    """The first byte says which file of a GPT-2's directory the rest is."""
    if not data:
        return
    path, originals = gpt2_folder()
    name = sorted(originals)[data[0] % len(originals)]
    (path / name).write_bytes(data[1:])
    try:
        read_model(path)
    finally:
        (path / name).write_bytes(originals[name])


def debug(data: bytes) -> None:
    path = folder() / "debug_state.bin"
    path.write_bytes(data)
    try:
        found = debug_state.read(path, GPT2)
    except AnellmError as error:
        one_line(error, path)
        return
    assert found.tokens.max(initial=0) < GPT2.vocab_size
    path = folder() / "debug_again.bin"
    debug_state.write(path, found, GPT2, int.from_bytes(data[4:8], "little"))
    again = debug_state.read(path, GPT2)
    assert np.float32(again.loss) == np.float32(found.loss)
    for name, array in found.grads.items():
        assert np.array_equal(again.grads[name], array), name


def optimizer(data: bytes) -> None:
    path = folder() / "optimizer_state.bin"
    path.write_bytes(data)
    try:
        found = optimizer_state.read(path, GPT2)
    except AnellmError as error:
        one_line(error, path)
        return
    assert all(np.isfinite(array).all() for array in found.moments_m.values())
    assert all((array >= 0).all() for array in found.moments_v.values())


def gguf(data: bytes) -> None:
    path = folder() / "x.gguf"
    path.write_bytes(data)
    read_model(path)
    read_tokenizer(path)


def read_tokenizer(path: Path) -> None:
    try:
        found = load_tokenizer_file(path)
        text = "a text to try, ü\n  x"
        ids = found.encode(text)
        assert all(0 <= token < found.vocab_size for token in ids)
        found.decode(ids)
    except AnellmError as error:
        one_line(error)


def tokenizer(data: bytes) -> None:
    path = folder() / "tokenizer.bin"
    path.write_bytes(data)
    read_tokenizer(path)


def sentencepiece(data: bytes) -> None:
    path = folder() / "tokenizer.model"
    path.write_bytes(data)
    read_tokenizer(path)


def tokenizer_json(data: bytes) -> None:
    path = folder() / "tokenizer.json"
    path.write_bytes(data)
    read_tokenizer(path)


def llmc_tokenizer(data: bytes) -> None:
    path = folder() / "gpt2_tokenizer.bin"
    path.write_bytes(data)
    read_tokenizer(path)


def merges(data: bytes) -> None:
    path = folder() / "merges.txt"
    path.write_bytes(b"#version: 0.2\n" + data)
    read_tokenizer(path)


def jsonl(data: bytes) -> None:
    path = folder() / "text.jsonl"
    path.write_bytes(data)
    try:
        TokenDataset.from_file(path, tokenizer=shipped())
    except AnellmError as error:
        one_line(error)


@functools.cache
def shipped() -> Tokenizer:
    return Tokenizer.shipped()


def tokens(data: bytes) -> None:
    """The first byte says which dtype, and whether the vocabulary is known."""
    if not data:
        return
    path = folder() / "tokens.bin"
    path.write_bytes(data[1:])
    try:
        found = TokenDataset.from_file(
            path, ("uint16", "int32", "uint32")[data[0] % 3], VOCABULARY if data[0] & 4 else None
        )
        found.check_window(4)
        batch, targets = found.batch(1, 0, 0, 2, 4)
        assert batch.min() >= 0
        assert targets.min() >= 0
    except AnellmError as error:
        one_line(error)


def toml(data: bytes) -> None:
    path = folder() / "config.toml"
    path.write_bytes(data)
    try:
        TrainConfig(**cli.read_config_file(TrainConfig, str(path)))
    except AnellmError as error:
        one_line(error)


def metrics_lines(data: bytes) -> None:
    path = folder() / "metrics"
    path.mkdir(exist_ok=True)
    (path / metrics.NAME).write_bytes(data)
    before = list(metrics.read(path))
    metrics.cut(path, 3)
    after = list(metrics.read(path))
    assert after == [record for record in before if record["step"] <= 3] or "NaN" in repr(after).replace("nan", "NaN")
    assert metrics.cut(path, 3) == 0


@functools.cache
def whole_checkpoint() -> Path:
    state = TrainState(step=3, tokens=24, optimizer_step=3, data_sha256=DATA.sha256)
    return checkpoint.save(folder(), 3, model(), state.to_dict(), None)


def sha256(path: Path) -> str:
    """Return a file's hash, a piece at a time: some are bombs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remake(path: Path) -> None:
    """Write a checkpoint's manifest anew, so that its sizes and hashes fit what is there."""
    files = {
        p.name: {"size": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(path.iterdir())
        if p.name != checkpoint.MANIFEST
    }
    manifest = {"format": checkpoint.FORMAT, "step": 3, "files": files}
    (path / checkpoint.MANIFEST).write_bytes(safeio.json_bytes(manifest))


CHECKPOINT_FILES = ("state.json", "checkpoint.json", "config.json", "optimizer.safetensors", "model.safetensors")


def checkpoint_file(data: bytes) -> None:
    """The first byte says which file of a checkpoint the rest is; hashes are made to fit."""
    if not data:
        return
    path = whole_checkpoint()
    name = CHECKPOINT_FILES[data[0] % len(CHECKPOINT_FILES)]
    originals = {p.name: p.read_bytes() for p in path.iterdir()}
    try:
        (path / name).write_bytes(data[1:])
        if name != checkpoint.MANIFEST:
            remake(path)
        try:
            resume(path)
        except AnellmError as error:
            one_line(error)
    finally:
        for file, content in originals.items():
            (path / file).write_bytes(content)


def resume(path: Path) -> Trainer:
    """Open a checkpoint as a trainer does, without writing; what comes out must be fit to train on."""
    run = object.__new__(RunDirectory)
    run.path, run.resumed, run.last_saved = path.parent, checkpoint.open_checkpoint(path), None
    weights.load_pretrained(path)
    config = TrainConfig(steps=5, batch_size=1, seq_len=4)
    trainer = Trainer(model(), config, DATA, run=run)
    assert trainer.state.step == run.resumed.step
    for arrays in (trainer.model.params, trainer.model.moments_m, trainer.model.moments_v):
        assert all(np.isfinite(array).all() for array in arrays.values())
    return trainer


@functools.cache
def state_folder() -> Path:
    """Return a run directory of its own, with a model whose memory comes to be that of the state file."""
    path = folder() / "stated"
    path.mkdir()
    return path


@functools.cache
def stated_trainer() -> Trainer:
    run = object.__new__(RunDirectory)
    run.path, run.resumed, run.last_saved = state_folder(), None, None
    config = TrainConfig(steps=5, batch_size=1, seq_len=4, resume="auto", compile_budget=7, device="ane-sim")
    return Trainer(Model(SHAPE, seed=1), config, DATA, run=run)


@functools.cache
def whole_state() -> bytes:
    """Return a state file before the first step."""
    trainer, path = stated_trainer(), state_folder() / STATE_FILE
    run = trainer._pipeline
    assert run is not None
    StateFile.create(path, run._key, (0, 0, 0, -1, 0), run._values(trainer._values())).close()
    return path.read_bytes()


def state(data: bytes) -> None:
    """The first byte says whether checksums are made to fit; the rest is the slot in force."""
    if not data:
        return
    path, whole = state_folder() / STATE_FILE, whole_state()
    slot = data[1:][: SLOT_BYTES - 64]
    if data[0] % 2 and len(slot) > HEADER_BYTES:
        slot = slot[:308] + struct.pack("<I", len(slot) - HEADER_BYTES) + slot[312:]
        slot = slot[:312] + struct.pack("<I", zlib.crc32(slot[HEADER_BYTES:])) + slot[316:]
        slot = slot[:316] + struct.pack("<I", zlib.crc32(slot[:316])) + slot[320:]
    changed = slot + whole[len(slot) :]
    path.write_bytes(changed)
    trainer = stated_trainer()
    trainer._pipeline = PipelineRun(trainer.model, trainer.config, state_folder())
    try:
        if trainer._load_state():
            assert 0 <= trainer.state.step < 2**53
    except AnellmError as error:
        one_line(error, path)
        assert path.read_bytes()[:DATA_OFFSET] == changed[:DATA_OFFSET] or trainer._going_on
    finally:
        trainer._pipeline.close()
        trainer._going_on = False


TARGETS: dict[str, Callable[[bytes], None]] = {
    "safetensors": safetensors,
    "hf_config": hf_config,
    "hf_index": hf_index,
    "llama2c": llama2c,
    "blzt": blzt,
    "llmc": llmc,
    "hf_gpt2": hf_gpt2,
    "debug_state": debug,
    "optimizer_state": optimizer,
    "gguf": gguf,
    "tokenizer": tokenizer,
    "sentencepiece": sentencepiece,
    "tokenizer_json": tokenizer_json,
    "llmc_tokenizer": llmc_tokenizer,
    "merges": merges,
    "jsonl": jsonl,
    "tokens": tokens,
    "toml": toml,
    "metrics": metrics_lines,
    "checkpoint": checkpoint_file,
    "state": state,
}


def sentencepiece_model(table: Tokenizer) -> bytes:
    """Return a sentencepiece model of a table: protobuf fields 1 (pieces), 2 (trainer) and 3 (normalizer)."""
    parts = []
    for index, (piece, score) in enumerate(zip(table.pieces, table.scores, strict=True)):
        text = piece.strip(b"\n") if index in (1, 2) else piece.replace(b" ", "\u2581".encode())
        kind = (2, 3, 3, 6)[index] if index < 3 else 6 if index < 259 else 1
        body = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        parts.append(b"\n" + bytes([len(body)]) + body)
    return b"".join(parts) + b"\x12\x02\x18\x02" + b"\x1a\x10\n\x08identity\x18\x01\x20\x00\x28\x01"


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
TOKENIZER_JSON = json.dumps(
    {
        "added_tokens": [{"id": 0, "content": "<s>", "special": True, **dict.fromkeys(FLAGS, False)}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
    }
).encode()


@functools.cache
def seeds() -> dict[str, dict[str, bytes]]:
    """Return valid files and near misses to start from: target -> name -> content."""
    made = folder() / "seeds"
    made.mkdir()
    params = model().params
    weights.save_hf(made / "f32", SHAPE, params)
    weights.save_hf(made / "bf16", SHAPE, params, "bfloat16")
    weights.save_llama2c(made / "m.bin", SHAPE, params)
    weights.save_llama2c(made / "m1.bin", SHAPE, params, version=1)
    modelfiles.write_gguf(made / "m.gguf", SHAPE, params)
    wide = modelfiles.random_params(dataclasses.replace(SHAPE, n_kv_heads=2))
    with safeio.atomic_file(made / "one") as file:
        write_safetensors(file, {"model.norm.weight": params["model.norm.weight"]})
    small = Tokenizer(shipped().pieces[:270], shipped().scores[:270])
    ids = np.arange(60) % 50
    u16 = ids.astype("<u2")
    index = {"metadata": {}, "weight_map": dict.fromkeys(params, "model-00001-of-00001.safetensors")}
    whole = whole_checkpoint()
    lines = b"".join(safeio.json_bytes({"kind": "step", "step": n, "loss": 1.5}, None) for n in range(1, 6))
    qwen = {**SHAPE.to_hf(), "model_type": "qwen3", "rope_scaling": None, "rope_parameters": {"rope_type": "default"}}
    f32 = (made / "f32" / "model.safetensors").read_bytes()
    small_gpt2 = gpt2files.gpt2_params(GPT2)
    bpe = JsonTokenizer.from_merges("#version: 0.2\nh e\nl l\nhe ll\n")
    return {
        "llmc": {
            **{f"v{n}": gpt2files.llmc_bytes(GPT2, gpt2files.rough(small_gpt2), n, rows=4) for n in (1, 3, 5)},
            "header": gpt2files.llmc_bytes(GPT2, small_gpt2, 3, rows=4)[:1024],
        },
        "hf_gpt2": {str(n) + name: bytes([n]) + data for n, (name, data) in enumerate(gpt2_folder()[1].items())},
        "debug_state": {f"v{n}": gpt2files.state_bytes(GPT2, 1, version=n, rows=3) for n in (1, 2)},
        "optimizer_state": {
            "whole": gpt2files.optimizer_bytes(GPT2, master=False),
            "shuffled": gpt2files.optimizer_bytes(GPT2, master=False, shuffle=True),
        },
        "llmc_tokenizer": {"small": tokenizer_llmc.to_bytes(bpe), "short": tokenizer_llmc.to_bytes(bpe)[:1100]},
        "merges": {"small": b"h e\nl l\nhe ll\n", "twice": b"a b\na b\n", "odd": b"a  b\nab c d\n\xff\n"},
        "safetensors": {
            "f32": f32,
            "bf16": (made / "bf16" / "model.safetensors").read_bytes(),
            "one": (made / "one").read_bytes(),
            "bomb": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
            "claims": struct.pack("<Q", len(CLAIMS)) + CLAIMS,
        },
        "hf_config": {
            "llama": safeio.json_bytes(SHAPE.to_hf()),
            "qwen": safeio.json_bytes(qwen),
            "nested": b"[" * 5000,
        },
        "hf_index": {"whole": safeio.json_bytes(index), "outside": b'{"weight_map": {"a": "../x"}}'},
        "llama2c": {
            "v0": (made / "m.bin").read_bytes(),
            "v1": (made / "m1.bin").read_bytes(),
            "v2": b"24ka" + struct.pack("<i7iBi", 2, 4, 4, 1, 2, 1, 8, 4, 1, 4).ljust(256, b"\0") + b"\0" * 300,
        },
        "blzt": {
            "v2": modelfiles.blzt_bytes(dataclasses.replace(SHAPE, n_kv_heads=2), wide, 2),
            "v4": modelfiles.blzt_bytes(SHAPE, params, 4),
            "header": modelfiles.blzt_bytes(SHAPE, params, 4)[:96],
        },
        "gguf": {"f32": (made / "m.gguf").read_bytes(), "empty": b"GGUF" + struct.pack("<IQQQ", 3, 0, 0, 0)},
        "tokenizer": {"small": small.to_bytes(), "short": b"\4\0\0\0" + b"\0" * 12},
        "sentencepiece": {"small": sentencepiece_model(small), "short": b"\n\5\n\3<s>"},
        "tokenizer_json": {
            "bpe": TOKENIZER_JSON,
            "nested": b'{"a":' * 3000,
            "gpt2": bpe.to_bytes(),
            "characters": CharTokenizer("ab \n").to_bytes(),
        },
        "jsonl": {"two": b'{"text": "one"}\n{"text": "two", "x": [1]}\n', "odd": b'{"text": 1}\n\xff\n{"t": {}}'},
        "tokens": {
            "u16": b"\6" + ids.astype("<u2").tobytes(),
            "i32": b"\1" + ids.astype("<i4").tobytes(),
            "u32": b"\5" + ids.astype("<u4").tobytes(),
            "odd": b"\0abc",
            "ours": b"\4" + tokens_file.shard_header([u16], VOCABULARY, None) + u16.tobytes(),
            "llmc": b"\4" + tokens_file.llmc_header(u16.size, u16.dtype) + u16.tobytes(),
        },
        "toml": {
            "all": b"seed = 1\nsteps = 10\nlearning_rate = 1e-3\npreset = \"tiny\"\ndata = 'x'\n# note\n",
            "odd": b'steps = 1979-05-27\nseed = 0x10\nmodel = "\\u0000"\n[table]\nx = [1, {a = 1}]\n',
            "deep": b"a = " + b"[" * 3000,
        },
        "metrics": {"whole": lines, "torn": lines[:-7], "odd": b'{"step": true}\n[]\n{"step": 1e3}\n\n{"step": 2}\n'},
        "checkpoint": {
            str(number) + name: bytes([number]) + (whole / name).read_bytes()
            for number, name in enumerate(CHECKPOINT_FILES)
        },
        "state": {
            "whole": b"\0" + whole_state()[: HEADER_BYTES + 900],
            "fitting": b"\1" + whole_state()[:SLOT_BYTES].rstrip(b"\0"),
            "list": b"\1" + whole_state()[:HEADER_BYTES] + b"[1]",
        },
    }


def read_corpus(path: Path) -> dict[str, bytes]:
    """Return the inputs kept in a corpus file: name -> content."""
    return {name: bytes.fromhex(text) for name, text in json.loads(path.read_text()).items()}
