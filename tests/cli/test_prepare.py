"""The verb prepare: the same tokens as everywhere else, all of them or nothing, and no surprise in what is written."""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import evaluate, generate, prepare, tokenizer_llmc, train
from anellm.bpe_trainer import default_vocab_size
from anellm.data import TokenDataset
from anellm.errors import DataError
from anellm.tokenizer import Tokenizer, load_tokenizer_file

SMALL = (
    "--preset",
    "stories260k",
    "--batch-size",
    "2",
    "--seq-len",
    "16",
    "--steps",
    "2",
    "--quiet",
    "--sample-tokens",
    "0",
)
STORIES = [f"Story {n}: the king and queen of number {n * n} had a cat." for n in range(40)]


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Tokenizer.shipped().save("tok.bin")
    Path("stories.txt").write_text("\n<|endoftext|>\n".join(STORIES), encoding="utf-8")
    lines = [json.dumps({"text": story}) for story in STORIES]
    Path("stories.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(*argv: str) -> dict[str, Any]:
    assert prepare.main([*argv, "--quiet", "--json", "o.json"]) == 0
    return dict(json.loads(Path("o.json").read_text(encoding="utf-8")))


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert prepare.main([*argv, "--quiet"]) == code
    text = capsys.readouterr().err
    assert text.startswith("anellm prepare: error: ")
    assert text.count("\n") == 1
    return text


def ids(folder: str, part: str = "all", **more: Any) -> np.ndarray:
    return TokenDataset.from_file(folder, part=part, tokenizer=load_tokenizer_file(Path(folder)), **more).tokens[:]


# ---- what is written


def test_the_same_tokens_and_split_as_training_on_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    values = run("stories.txt", "--tokenizer", "tok.bin", "--out", "a", "--shard-tokens", "300")
    tokenizer = Tokenizer.shipped()
    whole = TokenDataset.from_file("stories.txt", tokenizer=tokenizer)
    fit, held_out = whole.split(0.05)
    assert TokenDataset.from_file("a", part="train").sha256 == fit.sha256
    assert TokenDataset.from_file("a", part="val").sha256 == held_out.sha256
    assert values["tokens"] == whole.n_tokens
    assert values["documents"] == len(STORIES)
    assert values["text_bytes"] == sum(map(len, STORIES))
    assert [shard["tokens"] for shard in values["train"][:-1]] == [300] * (fit.n_tokens // 300)
    assert Path("a/tokenizer.bin").read_bytes() == tokenizer.to_bytes()
    manifest = json.loads(Path("a/prepare.json").read_text(encoding="utf-8"))
    assert manifest == {key: value for key, value in values.items() if key != "seconds"}
    for shard in values["train"] + values["val"]:
        data = Path("a", shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["size"], shard["sha256"])
    assert sorted(p.name for p in Path("a").iterdir()) == sorted(
        ["prepare.json", "tokenizer.bin", *(shard["name"] for shard in values["train"] + values["val"])]
    )
    # Training takes tokenizer and held-out tokens from the folder, and gives what training on the text gives.
    assert train.main([*SMALL, "--data", "a", "--out", "r1"]) == 0
    assert train.main([*SMALL, "--data", "stories.txt", "--tokenizer", "tok.bin", "--out", "r2"]) == 0
    weights = [Path(run, "step_00000002/model.safetensors").read_bytes() for run in ("r1", "r2")]
    assert weights[0] == weights[1]
    capsys.readouterr()
    assert evaluate.main(["--model", "r1", "--data", "a", "--seq-len", "16", "--json", "e.json"]) == 0
    measured = json.loads(Path("e.json").read_text(encoding="utf-8"))["windows"]
    assert measured == (held_out.n_tokens - 1) // 16


def test_jsonl_folders_and_patterns_are_the_same_text() -> None:
    Path("folder").mkdir()
    for number in range(2):
        half = STORIES[20 * number : 20 * number + 20]
        Path(f"folder/{number}.txt").write_text("\n<|endoftext|>\n".join(half), encoding="utf-8")
    common = ("--tokenizer", "tok.bin", "--val-tokens", "0", "--format", "raw")
    for name, inputs in {"a": ["stories.txt"], "b": ["stories.jsonl"], "c": ["folder"], "d": ["folder/*.txt"],
                         "e": ["folder/0.txt", "folder/1.txt"]}.items():  # fmt: skip
        run(*inputs, *common, "--out", name)
        assert Path(name, "train_00000.bin").read_bytes() == Path("a/train_00000.bin").read_bytes()
        assert not list(Path(name).glob("val*"))


def test_formats() -> None:
    expected = TokenDataset.from_file("stories.txt", tokenizer=Tokenizer.shipped()).tokens[:]
    sizes = {}
    for kind in prepare.FORMATS:
        run("stories.txt", "--out", kind, "--format", kind, "--tokenizer", "tok.bin", "--val-tokens", "100")
        more = {"dtype": "int32"} if kind == "int32" else {}
        np.testing.assert_array_equal(ids(kind, "train", **more), expected[:-100])
        np.testing.assert_array_equal(ids(kind, "val", **more), expected[-100:])
        sizes[kind] = Path(kind, "val_00000.bin").stat().st_size
    assert sizes == {"anellm": 328, "raw": 200, "llmc": 1224, "int32": 400}
    with pytest.raises(DataError, match="looks like int32 tokens: use --token-dtype int32"):
        ids("int32")


def test_tinystories_gives_the_published_tokens(data_dir: Path) -> None:
    text, folder = data_dir / "text" / "tinystories", data_dir / "tokenizers" / "llama2"
    expected = (text / "sample_val.llama2.uint16.bin").read_bytes()
    for name, inputs in {"a": [str(text / "sample_val.txt")],
                         "b": ["tinystories", "--file", str(text / "sample_val.txt")]}.items():  # fmt: skip
        run(
            *inputs,
            "--tokenizer",
            str(folder / "tokenizer.model"),
            "--out",
            name,
            "--format",
            "raw",
            "--val-tokens",
            "0",
        )
        assert Path(name, "train_00000.bin").read_bytes() == expected
    run(str(text / "sample_val.txt"), "--tokenizer", str(folder / "tokenizer.bin"), "--out", "c", "--val-tokens", "0")
    assert Path("c/train_00000.bin").read_bytes()[128:] == expected


# ---- as llm.c prepares it


def test_tinyshakespeare_gives_llmcs_shards(data_dir: Path) -> None:
    """Hashes: of the files that llm.c's script makes of this text, computed with tiktoken 0.14.0."""
    text = str(data_dir / "text" / "tinyshakespeare" / "input.txt")
    values = run("tinyshakespeare", "--file", text, "--out", "a")
    assert (values["val_tokens"], values["train_tokens"], values["documents"]) == (32_768, 305_260, 7222)
    assert [(shard["size"], shard["sha256"]) for shard in values["val"] + values["train"]] == [
        (66_560, "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62"),
        (611_544, "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8"),
    ]
    assert (values["format"], values["dtype"], values["vocab_size"]) == ("llmc", "uint16", 50257)
    assert values["tokenizer_sha256"] == load_tokenizer_file("gpt2").sha256
    metal = run("tinyshakespeare", "--file", text, "--out", "b", "--format", "int32")
    assert metal["dtype"] == "int32"
    for name in ("val_00000.bin", "train_00000.bin"):  # llm.metal's files: the same ids as int32, without a header
        np.testing.assert_array_equal(np.fromfile(Path("b", name), "<i4"), np.fromfile(Path("a", name), "<u2")[512:])
    np.testing.assert_array_equal(ids("b", "val", dtype="int32"), ids("a", "val"))


def test_sections_of_a_play(capsys: pytest.CaptureFixture[str]) -> None:
    text = "A:\nOne.\n\nB:\nTwo.\n\n\nC:\nThree.\n\n"
    Path("play.txt").write_text(text, encoding="utf-8")
    values = run("tinyshakespeare", "--file", "play.txt", "--out", "a", "--val-tokens", "0")
    gpt2 = load_tokenizer_file("gpt2")
    expected = []
    for section in ("A:\nOne.\n\n", "B:\nTwo.\n\n", "\nC:\nThree.\n\n", ""):
        expected += [50256, *gpt2.encode(section)]
    assert np.fromfile("a/train_00000.bin", "<u2")[512:].tolist() == expected
    assert (values["documents"], values["text_bytes"]) == (4, len(text))
    tokenizer = Tokenizer.shipped()
    run("tinyshakespeare", "--file", "play.txt", "--out", "b", "--val-tokens", "3", "--tokenizer", "tok.bin")
    sections = ("A:\nOne.\n\n", "B:\nTwo.\n\n", "\nC:\nThree.\n\n")
    assert ids("b").tolist() == [token for section in sections for token in tokenizer.encode(section)]
    found = refused(capsys, 4, "tinyshakespeare", "--file", "play.txt", "--out", "c")
    assert f"expected more than the 32768 tokens that are held out, found {len(expected)}" in found
    assert "absent" in refused(capsys, 4, "tinyshakespeare", "--file", "absent", "--out", "c")
    Path("bad").write_bytes(b"a\n\xff")
    assert "bad:2: expected UTF-8 text" in refused(capsys, 4, "tinyshakespeare", "--file", "bad", "--out", "c")


def test_tinystories_in_llmcs_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Stories of a file are shuffled with 1337 plus the file's number in its part; each begins with <|endoftext|>."""
    parts = [STORIES[:10], STORIES[10:25], STORIES[25:40]]
    members = {f"data{n:02}.json": story_list(part) for n, part in enumerate(parts)}
    archive = archive_of("zip", members)
    values = run("tinystories", "--file", archive, "--out", "a")
    gpt2 = load_tokenizer_file("gpt2")
    streams = []
    for part, seed in zip(parts, (1337, 1337, 1338), strict=True):
        order = list(part)
        random.Random(seed).shuffle(order)
        streams.append([token for story in order for token in (50256, *gpt2.encode(story))])
    assert ids("a", "val").tolist() == streams[0]
    assert ids("a", "train").tolist() == streams[1] + streams[2]
    assert (values["format"], values["documents"]) == ("llmc", 40)
    Path("gpt2_tokenizer.bin").write_bytes(tokenizer_llmc.to_bytes(gpt2))
    for number, name in enumerate(("gpt2", "gpt2_tokenizer.bin")):  # named, it is the same
        again = run("tinystories", "--file", archive, "--out", f"b{number}", "--tokenizer", name)
        assert (again["train"], again["val"]) == (values["train"], values["val"])
    # Ids made before might be another tokenizer's: which one has to be said.
    raw = archive_of("tar.gz", {"data00.bin": b"\1\0\2\0"})
    assert "--tokenizer: needed, as there are tokens" in refused(capsys, 2, "tinystories", "--file", raw, "--out", "c")


def test_gpt2_for_any_text() -> None:
    values = run("stories.txt", "--tokenizer", "gpt2", "--out", "a", "--val-tokens", "50")
    gpt2 = load_tokenizer_file("gpt2")
    assert (values["format"], values["vocab_size"], values["documents"]) == ("anellm", 50257, 40)
    expected = [token for story in STORIES for token in (*gpt2.encode(story), 50256)]
    assert [*ids("a", "train"), *ids("a", "val")] == expected
    # Shards of either of llm.c's and llm.metal's kinds train alike.
    weights = []
    for kind, more in (("llmc", ()), ("int32", ("--token-dtype", "int32"))):
        run("stories.txt", "--tokenizer", "gpt2", "--out", kind, "--val-tokens", "50", "--format", kind)
        small = [*SMALL, "--data", kind, "--out", f"r-{kind}", *more]
        assert train.main(small) == 0
        weights.append(Path(f"r-{kind}/step_00000002/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_characters(capsys: pytest.CaptureFixture[str]) -> None:
    text = Path("stories.txt").read_text(encoding="utf-8").replace("\n<|endoftext|>\n", "")
    values = run("stories.txt", "--tokenizer", "char", "--out", "a", "--val-fraction", "0.1")
    tokenizer = load_tokenizer_file(Path("a"))
    assert "".join(tokenizer.characters) == "".join(sorted(set(text)))
    assert values["vocab_size"] == len(set(text))
    assert tokenizer.decode(ids("a", "train")) + tokenizer.decode(ids("a", "val")) == text
    assert values["tokens"] == len(text)
    # Training and writing take the characters from the folder, or from the text itself.
    assert train.main([*SMALL, "--data", "a", "--out", "r1"]) == 0
    flat = [*SMALL, "--data", "stories.txt", "--tokenizer", "char", "--val-fraction", "0.1", "--out", "r2"]
    assert train.main(flat) == 0
    weights = [Path(run, "step_00000002/model.safetensors").read_bytes() for run in ("r1", "r2")]
    assert weights[0] == weights[1]
    assert train.main(["--resume", "--out", "r2", "--steps", "3", "--quiet"]) == 0
    args = ["--model", "r2", "--max-new-tokens", "3", "--no-stream"]
    assert generate.main([*args, "--prompt", "Story"]) == 0
    assert generate.main(args) == 0
    capsys.readouterr()
    assert generate.main([*args, "--prompt", "y\u00fcn"]) == 2
    assert "found '\u00fc' (U+00FC) at character 1" in capsys.readouterr().err
    Path("other.txt").write_text("Story \u00fc", encoding="utf-8")
    words = ("--tokenizer", "a/tokenizer.json", "--out", "r3")
    for found in (refused(capsys, 4, "other.txt", *words),
                  (train.main([*SMALL, "--data", "other.txt", *words]), capsys.readouterr().err)[1]):  # fmt: skip
        assert "other.txt: text: expected one of the 32 characters of a/tokenizer.json, found '\u00fc'" in found
    assert train.main([*SMALL, "--tokenizer", "char", "--data", "a", "--out", "r3"]) == 2
    assert "--tokenizer char: expected a text in --data, found a" in capsys.readouterr().err


# ---- a vocabulary of its own


def test_without_a_tokenizer_one_is_learnt() -> None:
    assert [default_vocab_size(n) for n in (0, 10**5, 262_143, 262_144, 1_115_394, 10**7, 10**9)] == [
        512, 512, 512, 512, 1024, 2048, 8192]  # fmt: skip
    values = run("stories.txt", "--out", "a", "--vocab-size", "300")
    assert values["vocab_size"] == load_tokenizer_file(Path("a")).vocab_size == 300
    assert Path("a/tokenizer.bin").read_bytes() == (run("stories.jsonl", "--out", "b", "--vocab-size", "300"), Path(
        "b/tokenizer.bin").read_bytes())[1]  # fmt: skip
    values = run("stories.txt", "--out", "c")  # too few pairs for 512: as many as there are
    assert 261 <= values["vocab_size"] < 512


def test_one_flag_from_a_text_to_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.txt").write_text("\n".join(STORIES * 3), encoding="utf-8")
    loud = [flag for flag in SMALL if flag != "--quiet"]
    assert train.main([*loud, "--data", "my.txt", "--out", "r"]) == 0
    assert "tokenizer  learnt from my.txt, as none is given: " in capsys.readouterr().out
    kept = Path("r/step_00000002/tokenizer.bin").read_bytes()
    assert Path("r/tokenizer.bin").read_bytes() == kept
    assert Path("r/step_00000002/config.json").is_file()
    # A resumed run keeps its vocabulary, whatever one would learn now.
    Tokenizer.shipped().save("tokenizer.bin")
    assert train.main(["--resume", "--out", "r", "--steps", "4", "--quiet"]) == 0
    assert Path("r/step_00000004/tokenizer.bin").read_bytes() == kept
    assert train.main([*SMALL, "--data", "my.txt", "--out", "again"]) == 0
    assert Path("again/tokenizer.bin").read_bytes() == kept


def test_a_run_keeps_its_tokenizer_json() -> None:
    pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")
    from anellm.byte_level import byte_alphabet
    from anellm.tokenizer_json import JsonTokenizer

    made = JsonTokenizer.from_bpe(["<|endoftext|>", *byte_alphabet(), "he"], ["h e"], "gpt-2", eos_id=0)
    Path("tj").mkdir()
    for name, content in made.files().items():
        Path("tj", name).write_bytes(content)
    values = run("stories.txt", "--tokenizer", "tj", "--out", "a")
    assert (values["tokenizer"], values["documents"]) == ("tokenizer.json", 40)
    found = ids("a", "train")
    assert found[-1] == 0 or int((found == 0).sum()) > 30  # each document ends with the separator
    assert train.main([*SMALL, "--data", "a", "--out", "r"]) == 0
    for folder in ("r", "r/step_00000002"):
        assert {p.name for p in Path(folder).glob("tokenizer*")} == {"tokenizer.json", "tokenizer_config.json"}
    args = ["--model", "r", "--max-new-tokens", "3", "--no-stream", "--json", "g.json"]
    assert generate.main([*args, "--prompt", "he"]) == 0
    assert generate.main(args) == 0  # no prompt: it starts behind a separator


# ---- TinyStories


def archive_of(kind: str, members: dict[str, bytes]) -> str:
    path = Path(f"stories.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, data in members.items():
                Path("member").write_bytes(data)
                tar.add("member", name)
    return str(path)


def story_list(stories: list[str]) -> bytes:
    return json.dumps([{"story": f" {story}\n"} for story in stories]).encode()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_tinystories_archives(kind: str) -> None:
    parts = [STORIES[:10], STORIES[10:30], STORIES[30:]]
    members = {f"all/data{n:02}.json": story_list(part) for n, part in enumerate(parts)}
    run("tinystories", "--file", archive_of(kind, members), "--tokenizer", "tok.bin", "--out", "a")
    tokenizer = Tokenizer.shipped()
    expected = [tokenizer.encode_each(part) for part in parts]
    np.testing.assert_array_equal(ids("a", "val"), expected[0])  # the first file is held out, as in llama2.c
    np.testing.assert_array_equal(ids("a", "train"), np.concatenate(expected[1:]))
    run("tinystories", "--file", f"stories.{kind}", "--tokenizer", "tok.bin", "--out", "b", "--val-fraction", "0.5")
    np.testing.assert_array_equal(ids("b"), np.concatenate(expected))
    # Archives of tokens made before go through as they are.
    raw = {f"data{n:02}.bin": part.tobytes() for n, part in enumerate(expected)}
    values = run("tinystories", "--file", archive_of(kind, raw), "--tokenizer", "tok.bin", "--out", "c")
    np.testing.assert_array_equal(ids("c", "val"), expected[0])
    assert (values["documents"], values["text_bytes"]) == (40, sum(map(len, STORIES)))


# ---- refusals


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n', encoding="utf-8")
    Path("empty.txt").write_bytes(b"")
    Path("there").mkdir()
    Path("there/file").write_bytes(b"")
    Path("link").symlink_to("there")
    bad_ids = archive_of("zip", {"data00.bin": b"\xff\xff"})
    cases: dict[tuple[str, ...], tuple[int, str]] = {
        (): (2, "INPUTS: needed"),
        ("stories.txt",): (2, "--out: needed"),
        ("absent.txt", "--out", "a"): (4, "absent.txt: expected a text or JSONL file, or a recipe (tinyshakespeare"),
        ("tinystorys", "--out", "a"): (4, "or a recipe (tinyshakespeare, tinystories), found nothing"),
        ("tok.bin", "--out", "a"): (4, "expected a name that ends in .txt, .jsonl, .ndjson"),
        ("empty.txt", "--tokenizer", "tok.bin", "--out", "a"): (4, "empty.txt: expected text, found none"),
        ("bad.jsonl", "--tokenizer", "tok.bin", "--out", "a"): (4, "bad.jsonl:2:text: expected a text, found a number"),
        ("stories.txt", "--tokenizer", "stories.txt", "--out", "a"): (4, "stories.txt"),
        ("stories.txt", "--tokenizer", "absent", "--out", "a"): (4, "absent"),
        ("stories.txt", "--out", "there"): (2, "expected a folder that is not there yet or is empty"),
        ("stories.txt", "--out", "link"): (2, "expected a folder that is not there yet or is empty"),
        ("stories.txt", "--out", "tok.bin"): (2, "expected a folder"),
        ("stories.txt", "--out", "a", "--file", "x"): (2, "--file: only for a recipe"),
        ("stories.txt", "--out", "a", "--sha256", "x"): (2, "--sha256: only for a recipe"),
        ("stories.txt", "--out", "a", "--val-tokens", "1", "--val-fraction", "0.1"): (2, "exclude each other"),
        ("stories.txt", "--out", "a", "--vocab-size", "300", "--tokenizer", "tok.bin"): (2, "--vocab-size: only where"),
        ("stories.txt", "--out", "a", "--vocab-size", "100000"): (2, "vocab_size: expected at most"),
        ("stories.txt", "--out", "a", "--val-tokens", "9999999", "--tokenizer", "tok.bin"): (4, "fewer than all"),
        ("tinystories", "--file", "absent.zip", "--out", "a"): (4, "absent.zip"),
        ("tinystories", "--file", bad_ids, "--out", "a"): (2, "--tokenizer: needed, as there are tokens"),
        ("tinystories", "--file", bad_ids, "--out", "a", "--tokenizer", "tok.bin"): (4, "expected ids below 1024 (tok"),
        ("tinystories", "--file", "x", "--url", "http://x", "--out", "a"): (2, "--file: nothing is downloaded"),
    }  # fmt: skip
    for argv, (code, part) in cases.items():
        assert part in refused(capsys, code, *argv)
        assert not Path("a").exists()
    assert not list(Path().glob(".tmp-*"))  # a failure leaves nothing behind


def test_an_empty_folder_is_as_good_as_none() -> None:
    Path("a").mkdir()
    run("stories.txt", "--tokenizer", "tok.bin", "--out", "a")
    assert Path("a/prepare.json").is_file()


def test_words_and_flags_in_any_order() -> None:
    assert prepare.main(["--out", "a", "stories.txt", "--quiet", "stories.jsonl", "--tokenizer", "tok.bin"]) == 0
    assert json.loads(Path("a/prepare.json").read_text(encoding="utf-8"))["sources"] == ["stories.txt", "stories.jsonl"]
    Path("c.toml").write_text('inputs = ["stories.txt"]\nout = "b"\ntokenizer = "tok.bin"\n', encoding="utf-8")
    assert prepare.main(["--config", "c.toml", "--quiet"]) == 0
    Path("c.toml").write_text("inputs = [1]\n", encoding="utf-8")
    assert prepare.main(["--config", "c.toml", "--quiet"]) == 2


# ---- downloads, from this machine to itself


class Server:
    """An HTTP server whose answers can break off, and that notes what it was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.etag, self.break_after, self.ranges, self.breaks = data, '"one"', 0, [], 0
        self.status = 200
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                if server.status != 200:
                    self.send_error(server.status)
                    return
                start = int(asked[6:-1]) if asked and self.headers.get("If-Range") == server.etag else 0
                if start > len(server.data):
                    self.send_error(416)
                    return
                body = server.data[start:]
                self.send_response(206 if start else 200)
                self.send_header("ETag", server.etag)
                self.send_header("Content-Length", str(len(body)))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
                self.end_headers()
                if server.breaks:
                    server.breaks -= 1
                    body = body[: server.break_after]
                    self.close_connection = True
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/stories.zip"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], Server]]:
    pytest.importorskip("pooch", reason="the extra `download` is not installed: pip install 'anellm[download]'")
    from anellm import download

    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[Server] = []

    def start(data: bytes) -> Server:
        servers.append(Server(data))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def fetch(server: Server, sha256: str | None = None) -> Path:
    from anellm.download import fetch as real

    return real(server.url, "stories.zip", sha256, "cache")


DATA = np.random.default_rng(5).bytes(300_000)
DATA_SHA = hashlib.sha256(DATA).hexdigest()


def test_download_and_prepare(serve: Callable[[bytes], Server], capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(Path(archive_of("zip", {"data00.json": story_list(STORIES)})).read_bytes())
    argv = ("tinystories", "--url", server.url, "--download-dir", "cache", "--tokenizer", "tok.bin")
    values = run(*argv, "--out", "a")
    assert values["documents"] == 40
    assert hashlib.sha256(server.data).hexdigest() in capsys.readouterr().err  # to be named next time
    run(*argv, "--out", "b", "--sha256", hashlib.sha256(server.data).hexdigest())
    assert server.ranges == [None]  # it was there
    assert "does not match" in refused(capsys, 4, *argv, "--out", "c", "--sha256", "0" * 64)


def test_shakespeare_is_downloaded_and_its_hash_is_known(
    serve: Callable[[bytes], Server], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    play = b"A:\nOne.\n\nB:\nTwo.\n"
    server = serve(play)
    server.breaks, server.break_after = 1, 8
    argv = ("tinyshakespeare", "--download-dir", "cache", "--val-tokens", "0")
    monkeypatch.setitem(prepare.URLS, "tinyshakespeare", server.url)
    assert "does not match" in refused(capsys, 4, *argv, "--out", "a")  # not the text that the recipe is about
    monkeypatch.setitem(prepare.SHA256, "tinyshakespeare", hashlib.sha256(play).hexdigest())
    assert run(*argv, "--out", "a")["documents"] == 2
    assert run(*argv, "--url", server.url + "?x=1", "--out", "b")["documents"] == 2  # another place says no hash
    assert {p.name for p in Path("cache").iterdir()} == {"tinyshakespeare-stories.zip"}


def test_it_goes_on_where_it_broke_off(serve: Callable[[bytes], Server]) -> None:
    server = serve(DATA)
    server.breaks, server.break_after = 2, 100_000
    assert fetch(server, DATA_SHA).read_bytes() == DATA
    assert server.ranges == [None, "bytes=98304-", "bytes=196608-"]  # in blocks of 16 KiB
    assert [p.name for p in Path("cache").iterdir()] == ["stories.zip"]


def test_another_process_goes_on(serve: Callable[[bytes], Server]) -> None:
    server = serve(DATA)
    server.breaks, server.break_after = 100, 20_000
    with pytest.raises(DataError, match="cannot download: .*run it again to go on"):
        fetch(server, DATA_SHA)
    assert Path("cache/stories.zip.part").stat().st_size == 5 * 16384  # five attempts
    server.breaks, server.ranges = 0, []
    assert fetch(server, DATA_SHA).read_bytes() == DATA
    assert server.ranges == ["bytes=81920-"]


def test_a_file_that_changed_starts_anew(serve: Callable[[bytes], Server]) -> None:
    server = serve(DATA)
    server.breaks, server.break_after = 100, 20_000
    with pytest.raises(DataError):
        fetch(server)
    server.breaks, server.etag, server.data = 0, '"two"', DATA[::-1]
    assert fetch(server).read_bytes() == DATA[::-1]


def test_a_part_longer_than_the_file(serve: Callable[[bytes], Server]) -> None:
    server = serve(DATA[:1000])
    Path("cache").mkdir()
    Path("cache/stories.zip.part").write_bytes(DATA)
    Path("cache/stories.zip.part.json").write_text(json.dumps({"mark": server.etag}), encoding="utf-8")
    assert fetch(server).read_bytes() == DATA[:1000]
    Path("cache/stories.zip").unlink()
    for note in ("", "[]", '{"mark": 5}', "\0"):  # a damaged note: what is there is not trusted
        Path("cache/stories.zip.part").write_bytes(b"x" * 500)
        Path("cache/stories.zip.part.json").write_text(note, encoding="utf-8")
        assert fetch(server).read_bytes() == DATA[:1000]
        Path("cache/stories.zip").unlink()


def test_wrong_hash_and_no_file(serve: Callable[[bytes], Server]) -> None:
    server = serve(DATA)
    with pytest.raises(DataError, match=rf"{server.url}: .*does not match.*") as error:
        fetch(server, "ab" * 32)
    assert DATA_SHA in str(error.value)
    assert not list(Path("cache").iterdir())  # nothing that looks right stays
    server.status = 404
    with pytest.raises(DataError, match="404"):
        fetch(server)
    from anellm.download import fetch as real

    with pytest.raises(DataError, match="expected an http or https address"):
        real("file:///etc/passwd", "x", None, "cache")
