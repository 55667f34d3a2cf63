"""Token files, the hold-out, and the windows: what is drawn, what is never touched, what is refused."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import anellm.data
from anellm.bpe_trainer import train_bpe
from anellm.data import TokenDataset
from anellm.errors import DataError, InvalidError
from anellm.tokenizer import Tokenizer
from anellm.windows import WindowSampler

SEEDS = st.integers(0, 2**64 - 1)
MODES = st.sampled_from(["random", "epoch"])


def counting(n: int) -> TokenDataset:
    """Return data whose ids are their own positions, so that a batch shows where it came from."""
    return TokenDataset(np.arange(n, dtype="<i4"))


def write(path: Path, ids: list[int], dtype: str = "<u2") -> Path:
    np.array(ids, dtype=dtype).tofile(path)
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe("the cat sat on the mat; the rat ate what the cat had not, when they met. " * 4, 300)


# ---- windows


@given(st.data(), SEEDS, MODES)
def test_training_windows_never_touch_held_out_tokens(data: st.DataObject, seed: int, mode: str) -> None:
    n = data.draw(st.integers(3, 400), label="n_tokens")
    val_tokens = data.draw(st.integers(1, n - 2), label="val_tokens")
    train, val = counting(n).split(val_tokens=val_tokens)
    assert train.tokens.tolist() + val.tokens.tolist() == list(range(n))
    length = data.draw(st.integers(1, train.n_tokens - 1), label="T")
    for step in range(4):
        tokens, targets = train.batch(seed, step, 0, 3, length, mode=mode)
        assert tokens.min() >= 0
        assert targets.max() < n - val_tokens
        np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
        np.testing.assert_array_equal(tokens + 1, targets)


@given(SEEDS, st.integers(0, 2**40), st.integers(1, 5), st.integers(1, 4), MODES)
def test_micro_steps_draw_what_one_big_batch_draws(seed: int, step: int, rows: int, micro: int, mode: str) -> None:
    data = counting(1000)
    whole, _ = data.batch(seed, step, 0, rows * micro, 16, mode=mode)
    parts = [data.batch(seed, step, part, rows, 16, micro, mode=mode)[0] for part in reversed(range(micro))]
    np.testing.assert_array_equal(np.concatenate(parts[::-1]), whole)


def test_windows_depend_on_nothing_but_the_arguments() -> None:
    tokens, targets = counting(5000).batch(7, 3, 1, 4, 32, 2)
    other = counting(5000)
    other.batch(8, 100, 0, 4, 32)
    again = other.batch(7, 3, 1, 4, 32, 2)
    np.testing.assert_array_equal(again[0], tokens)
    np.testing.assert_array_equal(again[1], targets)
    assert tokens.dtype == targets.dtype == np.int32
    assert tokens.flags.c_contiguous
    assert targets.flags.c_contiguous
    for changed in ((8, 3, 1), (7, 4, 1), (7, 3, 0)):
        assert not np.array_equal(other.batch(*changed, 4, 32, 2)[0], tokens)


def test_random_starts_are_even_over_the_whole_range() -> None:
    sampler = WindowSampler(n_tokens=20, seq_len=10, seed=1)
    counts = Counter(sampler.start(row) for row in range(20000))
    assert sorted(counts) == list(range(10))  # 0 to n_tokens - seq_len - 1
    # 20,000 draws over 10 places: standard deviation 42; 5 of them
    assert max(abs(count - 2000) for count in counts.values()) < 212


@given(st.integers(2, 600), st.integers(1, 40), SEEDS, st.integers(0, 10**6))
def test_an_epoch_visits_each_window_once(n: int, length: int, seed: int, epoch: int) -> None:
    if n < length + 1:
        return
    sampler = WindowSampler(n, length, seed, "epoch")
    windows = sampler.n_windows
    starts = sorted(sampler.start(epoch * windows + index) for index in range(windows))
    assert 0 <= starts[0] <= length
    assert starts[-1] + length + 1 <= n
    assert starts == [starts[0] + index * length for index in range(windows)]
    # nothing but a bit of the ends is left out
    assert windows * length >= n - 2 * length


def test_epochs_differ_in_order_and_offset() -> None:
    sampler = WindowSampler(64 * 200, 64, seed=5, mode="epoch")
    epochs = [[sampler.start(epoch * sampler.n_windows + i) for i in range(sampler.n_windows)] for epoch in range(20)]
    assert len({min(starts) for starts in epochs}) > 10
    orders = {tuple(start // 64 for start in starts) for starts in epochs}
    assert len(orders) == 20
    # A shuffled list of n has about one element in its old place, and about half its neighbours ascend.
    for starts in epochs:
        assert sum(start // 64 == place for place, start in enumerate(starts)) < 10
        assert 70 < sum(a < b for a, b in itertools.pairwise(starts)) < 130


def test_steps_for_epochs() -> None:
    sampler = WindowSampler(101 * 10, 10, seed=0, mode="epoch")
    assert sampler.n_windows == 100
    assert [sampler.steps_for(epochs, 8) for epochs in (1, 2, 0.5, 0.001)] == [13, 25, 7, 1]


def test_the_generator_is_the_core_s() -> None:
    from anellm._ffi import lib

    data = counting(1000)
    for mode in ("random", "epoch"):
        expected = data.batch(3, 1, 0, 4, 16, mode=mode, rng=lambda s, t, c: int(lib.anellm_rng_u64(s, t, c)))
        np.testing.assert_array_equal(data.batch(3, 1, 0, 4, 16, mode=mode)[0], expected[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "found step -1"),
        ({"micro_step": 2}, "micro_step < 2, found .*micro_step 2"),
        ({"B": 0}, "found .*B 0"),
        ({"T": 0}, "seq_len: expected at least 1, found 0"),
        ({"seed": -1}, r"seed: expected 0 to 2\*\*64 - 1, found -1"),
        ({"seed": 2**64}, "seed: expected 0"),
        ({"mode": "shuffle"}, "expected one of random, epoch, found 'shuffle'"),
    ],
)
def test_bad_batch_arguments(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"seed": 0, "step": 0, "micro_step": 0, "B": 2, "T": 8, "gradient_accumulation_steps": 2}
    with pytest.raises(InvalidError, match=message):
        counting(100).batch(**{**good, **arguments})  # type: ignore[arg-type]


def test_a_window_longer_than_the_data_is_refused() -> None:
    data = TokenDataset(np.zeros(16, dtype="<u2"), source="few.bin")
    assert data.batch(0, 0, 0, 1, 15)[0].shape == (1, 15)
    message = r"few.bin: expected at least 17 tokens .*seq_len 16.*, found 16"
    with pytest.raises(DataError, match=message):
        data.batch(0, 0, 0, 1, 16)
    with pytest.raises(DataError, match=message):
        list(data.eval_windows(1, 16))


# ---- evaluation


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 9)))
def test_eval_windows_are_consecutive(n: int, length: int, rows: int, most: int | None) -> None:
    if n < length + 1:
        return
    data = counting(n)
    batches = list(data.eval_windows(rows, length, most))
    count = (n - 1) // length if most is None else min(most, (n - 1) // length)
    assert data.n_eval_windows(length, most) == count
    assert [len(tokens) for tokens, _ in batches[:-1]] == [rows] * (len(batches) - 1)
    tokens = np.concatenate([batch[0] for batch in batches])
    targets = np.concatenate([batch[1] for batch in batches])
    assert tokens.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(tokens.ravel(), np.arange(count * length))
    np.testing.assert_array_equal(targets, tokens + 1)


def test_eval_windows_of_the_reference_file(data_dir: Path) -> None:
    data = TokenDataset.from_file(data_dir / "text" / "tinystories" / "sample_val.tok512.uint16.bin", vocab_size=512)
    assert (data.n_tokens, data.n_eval_windows(512)) == (1_223_625, 2_389)
    assert sum(targets.size for _, targets in data.eval_windows(64, 512)) == 1_223_168


@pytest.mark.parametrize("bad", [{"B": 0}, {"max_windows": 0}])
def test_bad_eval_arguments(bad: dict[str, int]) -> None:
    with pytest.raises(InvalidError, match="expected at least 1, found 0"):
        list(counting(100).eval_windows(**{"B": 1, "T": 8, **bad}))


# ---- split


def test_split_by_fraction() -> None:
    train, val = counting(1000).split(val_fraction=0.1)
    assert (train.n_tokens, val.n_tokens) == (900, 100)
    assert val.tokens[0] == 900


@pytest.mark.parametrize(
    "arguments",
    [{}, {"val_fraction": 0.1, "val_tokens": 1}, {"val_fraction": 0.0}, {"val_fraction": 1.0}, {"val_fraction": -0.5},
     {"val_fraction": float("nan")}, {"val_fraction": 1e-9}, {"val_tokens": 0}, {"val_tokens": 10}, {"val_tokens": -1}],
)  # fmt: skip
def test_bad_splits(arguments: dict[str, float]) -> None:
    with pytest.raises(InvalidError):
        counting(10).split(**arguments)  # type: ignore[arg-type]


# ---- files


@pytest.mark.parametrize(("dtype", "kind"), [("uint16", "<u2"), ("int32", "<i4"), ("uint32", "<u4")])
def test_token_files(tmp_path: Path, dtype: str, kind: str) -> None:
    ids = [1, 500, 7, 65535 if dtype == "uint16" else 70000, 9]
    path = write(tmp_path / "t.bin", ids, kind)
    data = TokenDataset.from_file(path, dtype)
    assert isinstance(data.tokens, np.memmap)
    assert data.tokens.tolist() == ids
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.n_bytes is None
    assert data.batch(0, 0, 0, 1, 4)[1].tolist() == [ids[1:]]


def test_chunked_scans_equal_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the cat\n<|endoftext|>\nsat on the mat, naïve.\n<|endoftext|>\na rat\n", encoding="utf-8")
    whole = TokenDataset.from_file(text, tokenizer=tokenizer)
    for chunk in (1, 2, 3, 7):
        monkeypatch.setattr(anellm.data, "CHUNK", chunk)
        parts = TokenDataset(whole.tokens, tokenizer=tokenizer)
        assert parts.sha256 == hashlib.sha256(whole.tokens.tobytes()).hexdigest()
        assert (
            parts.n_bytes
            == len(tokenizer.decode_bytes(whole.tokens))
            == len("the catsat on the mat, naïve.a rat\n") + 1
        )
        bad = whole.tokens.copy()
        bad[11] = 300
        with pytest.raises(DataError, match=r"token 11: expected an id from 0 to 299 \(vocab_size 300\), found 300"):
            TokenDataset(bad, tokenizer=tokenizer)


def test_text_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfthe cat\r\n<|endoftext|>\r\nthe mat")
    data = TokenDataset.from_file(path, tokenizer=tokenizer)
    assert data.tokens.tolist() == tokenizer.encode("the cat") + tokenizer.encode("the mat")
    assert data.vocab_size == 300
    assert data.split(val_tokens=1)[0].tokenizer is tokenizer


def test_split_parts_name_positions_in_the_file() -> None:
    _, val = TokenDataset(np.array([1, 2, 3, 900, 5], dtype="<u2"), source="t.bin").split(val_tokens=3)
    with pytest.raises(DataError, match=r"t.bin: token 3: expected an id from 0 to 511 \(vocab_size 512\), found 900"):
        val.check_ids(512)
    with pytest.raises(DataError, match=r"t.bin: token 3: "):
        val.split(val_tokens=2)[1].check_ids(512)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "expected tokens or text, found an empty file"),
        (b"\x01\x00\x02", {}, r"expected a multiple of 2 bytes \(uint16 tokens\), found 3 bytes"),
        (b"\x01\x00" * 3, {"dtype": "int32"}, r"expected a multiple of 4 bytes \(int32 tokens\), found 6 bytes"),
        (np.arange(1, 9, dtype="<i4").tobytes(), {}, "looks like int32 tokens: use --token-dtype int32"),
        (np.arange(1, 9, dtype="<u2").tobytes(), {"dtype": "int32", "vocab_size": 100},
         "token 0: .*found 131073; the file looks like uint16 tokens: use --token-dtype uint16"),
        (np.array([1, 5, 100, 7], "<u2").tobytes(), {"vocab_size": 100}, "token 2: expected .* 0 to 99 .* found 100"),
        (np.array([1, -5], "<i4").tobytes(), {"dtype": "int32"}, "token 1: expected .* 0 to 2147483647, found -5"),
        (np.array([1, 2**31], "<u4").tobytes(), {"dtype": "uint32"}, "token 1: expected .*, found 2147483648"),
    ],
)  # fmt: skip
def test_bad_token_files(tmp_path: Path, content: bytes, options: dict[str, object], message: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        TokenDataset.from_file(path, **options)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)


def test_bad_texts_and_paths(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DataError, match=r"bad.txt:2: expected UTF-8 text, found byte 0xff at 8"):
        TokenDataset.from_file(path, tokenizer=tokenizer)
    with pytest.raises(InvalidError, match="a text needs a tokenizer"):
        TokenDataset.from_file(path)
    path.write_bytes(b"\n<|endoftext|>\n")
    with pytest.raises(DataError, match="expected at least one token, found none"):
        TokenDataset.from_file(path, tokenizer=tokenizer)
    with pytest.raises(DataError, match="cannot open the data: No such file"):
        TokenDataset.from_file(tmp_path / "none.bin")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="expected a folder with data"):
        TokenDataset.from_file(tmp_path / "folder")
    with pytest.raises(InvalidError, match="expected one of uint16, int32, uint32, found 'int8'"):
        TokenDataset.from_file(path, "int8")
    with pytest.raises(InvalidError, match="expected a 1-D array"):
        TokenDataset(np.zeros((2, 2), dtype="<u2"))
    with pytest.raises(InvalidError, match="found 1-D float64"):
        TokenDataset(np.zeros(2))
