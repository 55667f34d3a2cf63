"""Token files: every kind read as what it is, every damage refused, folders and patterns as one run of tokens."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anellm import tokens
from anellm.bpe_trainer import train_bpe
from anellm.data import TokenDataset
from anellm.errors import DataError, InvalidError
from anellm.tokenizer import Tokenizer
from anellm.tokens import Concatenated, find_data, llmc_header, read_header, shard_header

VOCAB = 300
SHA = "ab" * 32


def ids(n: int, dtype: str = "<u2", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, n).astype(dtype)


def ours(array: np.ndarray, vocab_size: int = VOCAB, sha256: str | None = SHA) -> bytes:
    return shard_header([array], vocab_size, sha256) + array.tobytes()


def llmc(array: np.ndarray) -> bytes:
    return llmc_header(array.size, array.dtype) + array.tobytes()


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe("the cat sat on the mat; the rat ate what the cat had not, when they met. " * 4, VOCAB)


# ---- formats


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<u4"])
def test_every_kind_gives_the_same_tokens(tmp_path: Path, dtype: str) -> None:
    array = ids(1000, dtype)
    names = {"<u2": "uint16", "<i4": "int32", "<u4": "uint32"}
    kinds = {"raw": array.tobytes(), "ours": ours(array)}
    if dtype != "<i4":
        kinds["llmc"] = llmc(array)
    found = {}
    for kind, data in kinds.items():
        dataset = TokenDataset.from_file(save(tmp_path / f"{kind}.bin", data), names[dtype], VOCAB)
        np.testing.assert_array_equal(dataset.tokens[:], array)
        assert dataset.tokens.dtype == array.dtype
        found[kind] = dataset.sha256
    assert len(set(found.values())) == 1  # so that a run goes on with its tokens in another kind of file


def test_layouts_byte_by_byte() -> None:
    array = np.array([1, 2, 258], "<u2")
    data = ours(array, 259)
    assert data[:8] == b"\x89ANTOK\r\n"
    assert struct.unpack_from("<IIQQ", data, 8) == (1, 1, 259, 3)
    assert data[32:64] == bytes.fromhex(SHA)
    assert struct.unpack_from("<I", data, 64) == (zlib.crc32(array.tobytes()),)
    assert data[68:124] == b"\0" * 56
    assert struct.unpack_from("<I", data, 124) == (zlib.crc32(data[:124]),)
    assert data[128:] == b"\x01\0\x02\0\x02\x01"
    assert np.frombuffer(llmc(array)[:1024], "<i4").tolist()[:4] == [20240520, 1, 3, 0]
    assert np.frombuffer(llmc(array.astype("<u4"))[:1024], "<i4").tolist()[:4] == [20240801, 7, 3, 0]
    with pytest.raises(InvalidError, match="uint16 or uint32"):
        llmc_header(3, np.dtype("<i4"))
    with pytest.raises(InvalidError, match="below 2\\*\\*31"):
        llmc_header(1 << 31, np.dtype("<u2"))


def test_header_says_what_the_file_holds(tmp_path: Path) -> None:
    file = read_header(save(tmp_path / "a.bin", ours(ids(9))))
    assert (file.count, file.offset, file.vocab_size, file.tokenizer_sha256) == (9, 128, VOCAB, SHA)
    assert read_header(save(tmp_path / "b.bin", ours(ids(9), sha256=None))).tokenizer_sha256 is None
    raw = read_header(save(tmp_path / "c.bin", ids(9).tobytes()))
    assert (raw.count, raw.offset, raw.vocab_size, raw.tokenizer_sha256, raw.crc32) == (9, 0, None, None, None)


# ---- damage


@pytest.mark.parametrize("make", [ours, llmc])
def test_cut_anywhere(tmp_path: Path, make: Callable[[np.ndarray], bytes]) -> None:
    data = make(np.full(200, VOCAB - 1, "<u2"))
    header = len(data) - 400
    path = tmp_path / "cut.bin"
    for size in [*range(header + 1), *range(header + 1, len(data), 8)]:
        save(path, data[:size])
        with pytest.raises(DataError, match=r"cut\.bin"):
            TokenDataset.from_file(path, vocab_size=VOCAB)
    save(path, data + b"\0\0")
    with pytest.raises(DataError, match="bytes behind the last token"):
        TokenDataset.from_file(path, vocab_size=VOCAB)


def test_no_bit_of_our_shards_flips_unseen(tmp_path: Path) -> None:
    data = ours(ids(200))
    rng = random.Random(1)
    path = tmp_path / "flip.bin"
    places = [*range(128 * 8), *(rng.randrange(128 * 8, len(data) * 8) for _ in range(200))]
    for bit in places:
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        save(path, bytes(broken))
        with pytest.raises(DataError, match=r"flip\.bin"):
            TokenDataset.from_file(path, vocab_size=VOCAB)


def test_bits_flip_under_a_new_checksum(tmp_path: Path) -> None:
    """With the header's CRC made anew, a flip is refused or means something else that is as whole."""
    data = ours(ids(200))
    path = tmp_path / "flip.bin"
    opened = 0
    for bit in range(64, 124 * 8):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        broken[124:128] = struct.pack("<I", zlib.crc32(bytes(broken[:124])))
        save(path, bytes(broken))
        try:
            dataset = TokenDataset.from_file(path, vocab_size=None)
        except DataError as error:
            assert "flip.bin" in str(error)
        else:
            opened += 1
            assert 32 <= bit // 8 < 64 or 16 <= bit // 8 < 24  # another tokenizer, or a larger vocabulary
            assert dataset.n_tokens == 200
    assert 256 < opened < 256 + 64


@given(st.integers(0, 1023), st.integers(0, 255), st.booleans())
@settings(max_examples=200)
def test_llmc_headers_with_any_byte_changed(tmp_path: Path, at: int, value: int, four: bool) -> None:
    data = bytearray(llmc(ids(50, "<u4" if four else "<u2")))
    data[at] = value
    try:
        dataset = TokenDataset.from_file(save(tmp_path / "x.bin", bytes(data)), vocab_size=VOCAB)
    except DataError as error:
        assert "x.bin" in str(error)
    else:
        assert dataset.n_tokens == 50


@given(st.binary(max_size=300), st.sampled_from([b"", tokens.MAGIC, struct.pack("<i", 20240520)]))
@settings(max_examples=300)
def test_any_bytes(tmp_path: Path, body: bytes, start: bytes) -> None:
    try:
        dataset = TokenDataset.from_file(save(tmp_path / "x.bin", start + body), vocab_size=VOCAB)
    except DataError as error:
        assert "x.bin" in str(error)
    else:
        assert dataset.n_tokens == len(start + body) // 2
        assert int(dataset.tokens[:].max()) < VOCAB


def with_crc(*, version: int = 1, code: int = 1, vocab: int = VOCAB, count: int = 9, tail: bytes = b"") -> bytes:
    head = struct.pack("<8sIIQQ32sI", tokens.MAGIC, version, code, vocab, count, b"\0" * 32, 0) + tail
    head = head.ljust(124, b"\0")
    return head + struct.pack("<I", zlib.crc32(head)) + ids(9).tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_crc(version=2), "version: expected 1, found 2"),
        (with_crc(code=9), r"dtype: expected 1 \(uint16\), 2 \(int32\), 3 \(uint32\), found 9"),
        (with_crc(vocab=0), "vocab_size: expected 1 to 2147483647, found 0"),
        (with_crc(vocab=1 << 40), "vocab_size: expected 1 to"),
        (with_crc(count=0), "count: expected at least one token, found 0"),
        (with_crc(count=1 << 40), r"count: 1099511627776 tokens of 2 bytes: expected a file of .*truncated"),
        (with_crc(count=(1 << 63) + 1), "truncated"),
        (with_crc(code=2), r"count: 9 tokens of 4 bytes.*truncated"),
        (with_crc(tail=b"\1"), "reserved bytes: expected zeros"),
        (with_crc(), "CRC-32 of the tokens"),
        (struct.pack("<3i", 20240520, 2, 4).ljust(1024, b"\0"), r"version: expected 1 \(llm.c shard .*\), found 2"),
        (struct.pack("<3i", 20240801, 1, 4).ljust(1024, b"\0"), "version: expected 7"),
        (struct.pack("<3i", 20240520, 1, -1).ljust(1024, b"\0"), "count: expected at least one token, found -1"),
        (struct.pack("<3i", 20240520, 1, 2**31 - 1).ljust(1024, b"\0"), "truncated"),
        (struct.pack("<3i", 20240326, 3, 9).ljust(1024, b"\0"), "expected a token file, found an llm.c model"),
        (b"GGUF\3\0\0\0", "found a GGUF model"),
        (b"PK\3\4....", "found a zip archive"),
        (b"\x1f\x8b....", "found a gzip file"),
        (b"\1\0\2", r"expected a multiple of 2 bytes \(uint16 tokens\), found 3"),
        (b"", "found an empty file"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = save(tmp_path / "bad.bin", data)
    tracemalloc.start()
    with pytest.raises(DataError, match=message) as error:
        TokenDataset.from_file(path)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_made_with_another_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path / "a.bin", ours(ids(50), sha256=tokenizer.sha256))
    assert TokenDataset.from_file(path, tokenizer=tokenizer).tokenizer is tokenizer
    tokenizer.save(tmp_path / "other.bin")
    save(path, ours(ids(50), sha256=SHA))
    other = Tokenizer.from_file(tmp_path / "other.bin")
    with pytest.raises(DataError, match=rf"a\.bin: tokenizer: .*{SHA}.*{other.sha256} .*other\.bin"):
        TokenDataset.from_file(path, tokenizer=other)
    assert TokenDataset.from_file(path).n_tokens == 50  # nothing to compare with
    with pytest.raises(DataError, match="vocab_size: expected at most 299, found 300"):
        TokenDataset.from_file(path, vocab_size=299)
    low = np.array([1, 2, 3, VOCAB], "<u2")
    with pytest.raises(DataError, match=rf"token 3: expected an id from 0 to {VOCAB - 1}"):
        TokenDataset.from_file(save(path, ours(low)), vocab_size=5000)  # the file's own promise counts


# ---- several files as one


@given(st.data())
def test_concatenated_equals_numpy(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    parts = [np.arange(100 * i, 100 * i + size, dtype="<u2") for i, size in enumerate(sizes)]
    whole, joined = np.concatenate(parts), Concatenated(parts)
    bound = st.none() | st.integers(-3, sum(sizes) + 3)
    for _ in range(3):
        window = slice(data.draw(bound), data.draw(bound))
        np.testing.assert_array_equal(joined[window], whole[window])
        assert joined[window].dtype == whole.dtype
    begin = data.draw(st.integers(0, sum(sizes) - 1))
    end = data.draw(st.integers(begin + 1, sum(sizes)))
    inner = joined.part(begin, end)
    assert inner.size == end - begin
    np.testing.assert_array_equal(inner[:], whole[begin:end])
    np.testing.assert_array_equal(inner[1:3], whole[begin:end][1:3])
    np.testing.assert_array_equal(joined[::2], whole[::2])


def test_a_folder_is_one_run_of_tokens(tmp_path: Path) -> None:
    """Windows cross from file to file, and everything is as it is for one file."""
    array = ids(1000)
    (tmp_path / "parts").mkdir()
    for number, (begin, end) in enumerate([(0, 37), (37, 38), (38, 700), (700, 1000)]):
        save(tmp_path / "parts" / f"p{number}.bin", ours(array[begin:end]))
    (tmp_path / "parts" / "tokenizer.bin").write_bytes(b"no data")
    (tmp_path / "parts" / "notes.md").write_text("no data")
    one = TokenDataset.from_file(save(tmp_path / "one.bin", array.tobytes()), vocab_size=VOCAB)
    for path in (tmp_path / "parts", f"{tmp_path}/parts/p*.bin"):
        many = TokenDataset.from_file(path, vocab_size=VOCAB)
        assert many.sha256 == one.sha256
        for a, b in ((one, many), (one.split(0.1)[0], many.split(0.1)[0]), (one.split(0.1)[1], many.split(0.1)[1])):
            assert a.n_tokens == b.n_tokens
            for x, y in zip(a.eval_windows(2, 17), b.eval_windows(2, 17), strict=True):
                np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(
                a.batch(3, 1, 0, 4, 30, rng=lambda *k: hash(k) % 2**64),
                b.batch(3, 1, 0, 4, 30, rng=lambda *k: hash(k) % 2**64),
            )
    save(tmp_path / "parts" / "p9.bin", ours(ids(5, "<i4")))
    with pytest.raises(DataError, match=r"p9\.bin: dtype: expected uint16, as .*p0\.bin has, found int32"):
        TokenDataset.from_file(tmp_path / "parts")


def test_held_out_files_of_a_folder(tmp_path: Path) -> None:
    names = ["b_train_1.bin", "b_val_0.bin", "interval.bin", "x-validation.bin"]
    for name in names:
        save(tmp_path / name, ids(9).tobytes())
    assert [p.name for p in find_data(tmp_path)] == names
    assert [p.name for p in find_data(tmp_path, "val")] == ["b_val_0.bin", "x-validation.bin"]
    assert [p.name for p in find_data(tmp_path, "train")] == ["b_train_1.bin", "interval.bin"]
    assert tokens.has_held_out(tmp_path)
    assert not tokens.has_held_out(tmp_path / names[0])
    for name in (names[0], names[2]):
        (tmp_path / name).unlink()
    assert find_data(tmp_path, "train") == find_data(tmp_path, "val") == find_data(tmp_path)
    with pytest.raises(InvalidError, match="part"):
        find_data(tmp_path, "test")


def test_what_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected files of this pattern, found none"):
        find_data(f"{tmp_path}/*.bin")
    with pytest.raises(DataError, match="expected a folder with data"):
        find_data(tmp_path)
    save(tmp_path / "a.bin", b"\0\0")
    save(tmp_path / "a.txt", b"x")
    with pytest.raises(DataError, match="found both"):
        find_data(tmp_path)
    assert find_data(save(tmp_path / "odd[1].bin", b"\0\0")) == [tmp_path / "odd[1].bin"]  # a name, not a pattern
