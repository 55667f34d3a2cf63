"""The verb convert: every pair of formats, what it checks, and what it refuses."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import checkpoint, convert, weights
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.tokenizer import Tokenizer, load_tokenizer_file

EXACT = ["stories260K.bin", "stories260K.v1.bin", ".", "stories260K.f32.gguf"]
TARGETS = [("hf", ()), ("hf", ("--max-shard-bytes", 200_000)), ("llama2c", ()), ("llama2c-v1", ())]


def run(*args: object, code: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Run the verb in this process and return what --json wrote."""
    words = [str(a) for a in args]
    if out is not None:
        words += ["--json", str(out)]
    assert convert.main(words) == code
    return json.loads(out.read_text()) if out is not None and out.exists() else {}


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    """Return the folder of a real model in every format."""
    path = data_dir / "weights" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"{path} is missing")
    return path


def logits(path: Path) -> np.ndarray:
    model = Model.from_pretrained(path, device="cpu")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 64)).astype(np.int32)
    return model.forward(tokens)


@pytest.mark.parametrize("source", [*EXACT, "stories260K.q8_0.gguf", "stories260K.v2_gs4.bin"])
@pytest.mark.parametrize(("kind", "flags"), TARGETS)
def test_every_pair(stories: Path, tmp_path: Path, source: str, kind: str, flags: tuple[Any, ...]) -> None:
    if "q8_0" in source:
        pytest.importorskip("gguf", reason="quantised GGUF files need the extra 'gguf', which is not installed")
    out = tmp_path / "new" / ("hf" if kind == "hf" else "model.bin")
    found = run("--model", stories / source, "--out", out, "--format", kind, *flags, out=tmp_path / "o.json")
    assert (found["verified"], found["max_logit_difference"]) == (True, 0.0)
    assert (found["format"], found["dtype"], found["n_params"]) == (kind, "float32", 260_032)
    assert all(Path(path).stat().st_size == size for path, size in found["files"].items())
    assert (len(found["files"]) > 3) == bool(flags)
    expected = logits(stories / (source if source not in EXACT else EXACT[0]))
    np.testing.assert_allclose(logits(out), expected, rtol=0, atol=1e-5)
    # And on to the next format, back to where it came from.
    back = tmp_path / "back.bin"
    run("--model", out, "--out", back, "--format", "llama2c-v1", "--no-verify")
    if source in EXACT:
        assert back.read_bytes() == (stories / "stories260K.v1.bin").read_bytes()


def test_tokenizer_comes_along(stories: Path, data_dir: Path, tmp_path: Path) -> None:
    """The one inside a GGUF file, the one beside the weights, and the one that is named."""
    original = (data_dir / "tokenizers" / "tok512" / "tok512.bin").read_bytes()
    found = run(
        "--model", stories / "stories260K.f32.gguf", "--out", tmp_path / "a", "--format", "hf", out=tmp_path / "o"
    )
    assert found["tokenizer"] == str(tmp_path / "a" / "tokenizer.bin")
    assert (tmp_path / "a" / "tokenizer.bin").read_bytes() == original
    run("--model", tmp_path / "a", "--out", tmp_path / "b" / "b.bin", "--format", "llama2c")
    assert (tmp_path / "b" / "tokenizer.bin").read_bytes() == original
    named = data_dir / "tokenizers" / "tok512" / "tok512.bin"
    source = ("--model", stories / "stories260K.bin")
    run(*source, "--out", tmp_path / "c", "--format", "hf", "--tokenizer", named)
    assert (tmp_path / "c" / "tokenizer.bin").read_bytes() == original
    found = run(*source, "--out", tmp_path / "d", "--format", "hf", out=tmp_path / "o")
    assert found["tokenizer"] is None
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["config.json", "model.safetensors"]


# ---- on a small model that needs no data ---------------------------------------------------------------------------

SHAPE = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a Hugging Face directory with the shipped tokenizer."""
    tokenizer = Tokenizer.shipped()
    model = Model(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size), "cpu", seed=3)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save(tmp_path / "small" / "tokenizer.bin")
    return tmp_path / "small"


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 3e-4), ("bfloat16", 3e-3)])
def test_half_precision(
    small: Path, tmp_path: Path, dtype: str, largest: float, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", small, "--out", tmp_path / "half", "--format", "hf", "--dtype", dtype)
    found = run(*args, out=tmp_path / "o.json")
    assert 0 < found["max_logit_difference"] < largest
    assert found["dtype"] == dtype
    shown = capsys.readouterr().out
    assert f"largest difference of a logit {found['max_logit_difference']:.3g}" in shown
    assert "every weight is the source's, rounded" in shown
    # Rounded once: doing it again changes nothing.
    again = run("--model", tmp_path / "half", *args[2:3], tmp_path / "again", *args[4:], out=tmp_path / "o.json")
    assert again["max_logit_difference"] == 0
    name = "model.safetensors"
    assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_only_differences_within_the_dtype_pass(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A writer that changes one weight, one dimension, or the tokenizer is found out."""
    real = weights.save_llama2c

    def one_weight(path: Path, config: ModelConfig, params: Any, version: int) -> None:
        real(path, config, params, version)
        data = bytearray(path.read_bytes())
        data[-4:] = struct.pack("<f", struct.unpack("<f", data[-4:])[0] + 1e-7)
        path.write_bytes(data)

    def one_dimension(path: Path, config: ModelConfig, params: Any, version: int) -> None:
        real(path, config.replace(max_seq_len=17), params, version)

    args = ("--model", small, "--format", "llama2c-v1", "--overwrite", "--out", tmp_path / "a.bin")
    for change, expected in ((one_weight, "mlp.up_proj.weight: expected"), (one_dimension, "max_seq_len: expected 16")):
        monkeypatch.setattr(weights, "save_llama2c", change)
        run(*args, code=4)
        assert expected in capsys.readouterr().err
        run(*args, "--no-verify")
    monkeypatch.setattr(weights, "save_llama2c", real)
    run(*args)

    other = Tokenizer.shipped()
    other = Tokenizer(other.pieces[:300], other.scores[:300])
    monkeypatch.setattr(convert, "load_tokenizer_file", lambda _: other)
    run(*args, code=4)
    assert "expected the source's tokenizer, found another" in capsys.readouterr().err


def test_nothing_is_overwritten(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in small.iterdir()}
    (tmp_path / "x.bin").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_bytes(b"mine")
    for kind, out, expected in (
        ("hf", small, "not empty: --overwrite"),
        ("hf", tmp_path / "full", "not empty: --overwrite"),
        ("hf", tmp_path / "x.bin", "expected a directory or nothing, found a file"),
        ("llama2c", tmp_path / "x.bin", "exists: --overwrite replaces it"),
        ("llama2c", tmp_path / "full", "found a folder"),
    ):
        run("--model", small, "--format", kind, "--out", out, code=2)
        assert expected in capsys.readouterr().err
    assert {p: p.read_bytes() for p in small.iterdir()} == before
    assert (tmp_path / "x.bin").read_bytes() == b"mine"
    run("--model", small, "--format", "hf", "--out", tmp_path / "full", "--overwrite")
    run("--model", small, "--format", "llama2c", "--out", tmp_path / "x.bin", "--overwrite")
    assert (tmp_path / "full" / "note").read_bytes() == b"mine"
    (tmp_path / "empty").mkdir()
    run("--model", small, "--format", "hf", "--out", tmp_path / "empty")


def test_in_place(small: Path, tmp_path: Path) -> None:
    """A directory may be rewritten in another dtype; the source is in memory by then."""
    config = weights.load_pretrained(small).config
    run("--model", small, "--format", "hf", "--out", small, "--overwrite", "--dtype", "float16")
    assert weights.load_pretrained(small).config == config
    assert json.loads((small / "config.json").read_text())["torch_dtype"] == "float16"


def test_other_tokenizers_stay(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in the folder of a llama2.c file may belong to another model."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tokenizer.bin").write_bytes(b"another model's")
    args = ("--model", small, "--format", "llama2c", "--out", folder / "a.bin")
    run(*args, code=2)
    assert "tokenizer.bin: another tokenizer is there: --overwrite" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["tokenizer.bin"]
    run(*args, "--overwrite")
    assert (folder / "tokenizer.bin").read_bytes() == (small / "tokenizer.bin").read_bytes()
    run("--model", small, "--format", "llama2c-v1", "--out", folder / "b.bin")  # the same one is there
    (folder / "tokenizer.bin").unlink()
    (folder / "tokenizer.bin").symlink_to(small / "tokenizer.bin")
    run(*args, "--overwrite", code=2)
    assert "symbolic link" in capsys.readouterr().err


def test_tokenizer_json(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer.json comes along with its tokenizer_config.json, and nothing hides it."""
    pytest.importorskip("tokenizers", reason="tokenizer.json needs the extra 'tokenizers', which is not installed")
    from anellm.tokenizer_json import JsonTokenizer

    alphabet = [chr(v) for v in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    made = JsonTokenizer.from_bpe(["<|endoftext|>", *alphabet], [], "gpt-2", bos_id=0, eos_id=0, control_ids=[0])
    (small / "tokenizer.bin").unlink()
    for name, data in made.files().items():
        (small / name).write_bytes(data)
    folder = tmp_path / "models"
    run("--model", small, "--format", "llama2c", "--out", folder / "a.bin")
    assert {p.name for p in folder.iterdir()} == {"a.bin", *made.files()}
    assert load_tokenizer_file(folder).sha256 == made.sha256
    Tokenizer.shipped().save(folder / "tokenizer.bin")  # would be found first
    args = ("--model", small, "--format", "llama2c-v1", "--out", folder / "b.bin")
    run(*args, code=2)
    assert "tokenizer.bin: another tokenizer is there" in capsys.readouterr().err
    run(*args, "--overwrite")
    assert load_tokenizer_file(folder).sha256 == made.sha256


def test_a_checkpoint_is_a_source_but_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.shipped()
    model = Model(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size), "cpu", seed=3)
    model.save_pretrained(tmp_path / "run" / "step_00000001")
    step = tmp_path / "run" / "step_00000001"
    (step / checkpoint.MANIFEST).write_text("{}")
    tokenizer.save(tmp_path / "run" / "tokenizer.bin")
    run("--model", step, "--format", "hf", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.bin").is_file()
    for out, kind in ((step, "hf"), (step / "a.bin", "llama2c")):
        run("--model", tmp_path / "out", "--format", kind, "--out", out, "--overwrite", code=2)
        assert "checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        ((), 2, "--model: needed, and not given"),
        (("--model", "x"), 2, "--out: needed, and not given"),
        (("--model", "x", "--out", "y"), 2, "--format: needed, and not given"),
        (("--model", "x", "--out", "y", "--format", "gguf"), 2, "--format: expected one of hf, llama2c, llama2c-v1"),
        (("--model", "x", "--out", "y", "--format", "hf", "--dtype", "int8"), 2, "--dtype: expected one of float32"),
        (("--model", "x", "--out", "y", "--format", "hf", "--max-shard-bytes", "0"), 2, "expected at least 1, found 0"),
        (("--model", "x", "--out", "y", "--format", "llama2c", "--dtype", "float16"), 2, "llama2c file holds float32"),
        (("--model", "absent", "--out", "y", "--format", "hf"), 4, "absent: expected a model"),
    ],
)
def test_refusals(
    tmp_path: Path,
    args: tuple[str, ...],
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(*args, code=code)
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_express(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "rope_theta": 500000.0}))
    run("--model", small, "--format", "llama2c", "--out", tmp_path / "x" / "a.bin", code=2)
    assert "rope_theta 500000 is not 10000" in capsys.readouterr().err
    assert not (tmp_path / "x" / "a.bin").exists()


def test_a_value_beyond_the_dtype(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model.from_pretrained(small)
    model.params["model.norm.weight"][2] = 1e5
    model.save_pretrained(small)
    run("--model", small, "--format", "hf", "--dtype", "float16", "--out", tmp_path / "half", code=3)
    assert "model.norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()
    run("--model", small, "--format", "hf", "--dtype", "bfloat16", "--out", tmp_path / "half")


def test_damaged_source(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(small, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    run("--model", tmp_path / "broken", "--format", "hf", "--out", tmp_path / "out", code=4)
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_python_api(small: Path, tmp_path: Path) -> None:
    """What the verb does is there without it."""
    from anellm.errors import InvalidError

    model = Model.from_pretrained(small)
    model.save_pretrained(tmp_path / "a", dtype="bfloat16", max_shard_bytes=4000)
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    model.save_pretrained(tmp_path / "a.bin", "llama2c-v1")
    assert (tmp_path / "a.bin").read_bytes()[:8] == b"24ka\x01\0\0\0"
    for kind, details, expected in (
        ("llama2c", {"dtype": "float16"}, "dtype: format llama2c is one file of float32"),
        ("llama2c-v1", {"max_shard_bytes": 5}, "max_shard_bytes: format llama2c-v1"),
        ("gguf", {}, "format: expected one of hf, llama2c, llama2c-v1, llmc, llmc-v1, llmc-v5, found 'gguf'"),
    ):
        with pytest.raises(InvalidError, match=expected):
            model.save_pretrained(tmp_path / "b", kind, **details)
