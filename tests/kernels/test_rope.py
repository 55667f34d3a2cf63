"""RoPE against float64, finite differences, its portable kernel, and its contract."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    assert_gaps_untouched,
    assert_refused,
    assert_same_bytes_for_any_threads,
    assert_within,
    filled,
    finite_differences,
    normal,
    pointer,
    portable,
    strided,
    unaligned,
)

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL


def reference_table(tokens: int, head_dim: int, start: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    half = head_dim // 2
    angle = np.outer(np.arange(start, start + tokens), theta ** (-2.0 * np.arange(half) / head_dim))
    return np.cos(angle), np.sin(angle)


def reference(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, n_heads: int) -> np.ndarray:
    """Rotate (B, T, n_heads * head_dim) with complex numbers: element i pairs with i + head_dim / 2."""
    b, t, width = x.shape
    heads = x.astype(np.float64).reshape(b, t, n_heads, 2, width // n_heads // 2)
    z = (heads[..., 0, :] + 1j * heads[..., 1, :]) * (cos + 1j * sin)[None, :, None, :]
    return np.stack([z.real, z.imag], axis=-2).reshape(x.shape)


def table(tokens: int, head_dim: int, start: int = 0, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = unaligned(filled(tokens, head_dim // 2)), unaligned(filled(tokens, head_dim // 2))
    check(lib.anellm_rope_table(pointer(cos), pointer(sin), tokens, head_dim, start, theta))
    return cos, sin


def rotate(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, n_heads: int, *, back: bool = False, gap: int = 0
) -> np.ndarray:
    b, t, width = x.shape
    rows = unaligned(strided(x.reshape(b * t, width), width + gap))
    run = lib.anellm_rope_backward if back else lib.anellm_rope_forward
    check(run(pointer(rows), width + gap, pointer(cos), pointer(sin), b, t, n_heads, width // n_heads))
    assert_gaps_untouched(rows, width)
    return rows[:, :width].reshape(x.shape)


shapes = {
    "b": st.integers(1, 3),
    "t": st.integers(1, 7),
    "heads": st.integers(1, 4),
    "half": st.integers(1, 40),
    "gap": st.integers(0, 5),
    "seed": st.integers(0, 99),
}


@given(tokens=st.integers(1, 9), half=st.integers(1, 40), start=st.integers(0, 100_000), theta=st.floats(2.0, 1e6))
def test_table_is_computed_in_double(tokens: int, half: int, start: int, theta: float) -> None:
    cos, sin = table(tokens, 2 * half, start, theta)
    expected_cos, expected_sin = reference_table(tokens, 2 * half, start, theta)
    assert_within(cos, expected_cos, 6e-8)
    assert_within(sin, expected_sin, 6e-8)


def test_table_of_a_later_start_continues_the_first() -> None:
    for whole, tail in zip(table(300, 16), table(100, 16, start=200), strict=True):
        assert np.array_equal(whole[200:], tail)


@given(**shapes)
def test_forward_and_backward_are_the_reference(
    variant: str, b: int, t: int, heads: int, half: int, gap: int, seed: int
) -> None:
    x = normal(seed, b, t, heads * 2 * half)
    cos, sin = table(t, 2 * half, start=seed)
    assert_within(rotate(x, cos, sin, heads, gap=gap), reference(x, cos, sin, heads), 1.5e-7 * np.abs(x).max() * 2)
    assert_within(
        rotate(x, cos, sin, heads, back=True, gap=gap), reference(x, cos, -sin, heads), 1.5e-7 * np.abs(x).max() * 2
    )


def test_positions_do_not_depend_on_the_batch(variant: str) -> None:
    x = np.repeat(normal(0, 1, 6, 40), 3, axis=0)
    out = rotate(x, *table(6, 10), 4)
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], out[2])
    assert np.array_equal(out[0, 0], x[0, 0])  # position 0 is not rotated
    assert not np.array_equal(out[0, 1], x[0, 1])


@given(t=st.integers(1, 3), heads=st.integers(1, 2), half=st.integers(1, 9), seed=st.integers(0, 99))
def test_backward_is_the_derivative(variant: str, t: int, heads: int, half: int, seed: int) -> None:
    x, dout = normal(seed, 1, t, heads * 2 * half), normal(seed + 1, 1, t, heads * 2 * half)
    cos, sin = table(t, 2 * half, start=3)
    slope = finite_differences(lambda v: float((reference(v, cos, sin, heads) * dout).sum()), x)
    assert_within(rotate(dout, cos, sin, heads, back=True), slope, 2e-6)


@pytest.mark.parametrize("half", range(1, 41))
def test_every_tail_matches_portable(variant: str, half: int) -> None:
    x = normal(half, 2, 3, 2 * 2 * half)
    cos, sin = table(3, 2 * half)
    for back in (False, True):
        out = rotate(x, cos, sin, 2, back=back, gap=1)
        out_p = portable(lambda back=back: rotate(x, cos, sin, 2, back=back, gap=1))
        assert_within(out, out_p, 2.5e-7 * np.abs(x).max())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_reaches_its_pair_only(variant: str, value: float) -> None:
    x = normal(0, 1, 2, 26)
    cos, sin = table(2, 26, start=1)
    clean = rotate(x, cos, sin, 1)
    x[0, 1, 4] = value
    out = rotate(x, cos, sin, 1)
    assert not np.isfinite(out[0, 1, [4, 17]]).any()
    keep = np.ones(out.shape, dtype=bool)
    keep[0, 1, [4, 17]] = False
    assert np.array_equal(out[keep], clean[keep])


def test_threads_do_not_change_bytes(variant: str) -> None:
    x = normal(0, 3, 101, 6 * 50)
    cos, sin = table(101, 50)
    assert_same_bytes_for_any_threads(
        lambda: (rotate(x, cos, sin, 6), rotate(x, cos, sin, 6, back=True), *table(300, 50))
    )


def test_bad_arguments_are_refused() -> None:
    x, cos, sin = filled(6, 16), filled(3, 4), filled(3, 4)
    p, c, s = pointer(x), pointer(cos), pointer(sin)
    bad = lib.ANELLM_INVALID
    for name, stride in (("x", "ld_x"), ("dx", "ld_dx")):
        run = lib.anellm_rope_forward if name == "x" else lib.anellm_rope_backward
        for args, word in [
            ((NULL, 16, c, s, 2, 3, 2, 8), f"{name} is NULL"),
            ((p, 16, NULL, s, 2, 3, 2, 8), "cos_in is NULL"),
            ((p, 16, c, NULL, 2, 3, 2, 8), "sin_in is NULL"),
            ((p, 15, c, s, 2, 3, 2, 8), f"{stride} is 15"),
            ((p, 16, c, s, -1, 3, 2, 8), "B is -1"),
            ((p, 16, c, s, 2, -1, 2, 8), "T is -1"),
            ((p, 16, c, s, 2, 3, -1, 8), "n_heads is -1"),
            ((p, 16, c, s, 2, 3, 2, -8), "head_dim is -8"),
            ((p, 16, c, s, 2, 3, 2, 7), "head_dim is 7"),
            ((p, 16, c, s, 2**40, 2**40, 2, 8), "B * T"),
            ((p, 16, c, s, 2, 3, 2**40, 2**40), "n_heads * head_dim"),
        ]:
            assert_refused(run(*args), bad, "anellm_rope_", word, untouched=(x,))
        check(run(NULL, 0, NULL, NULL, 0, 3, 2, 8))
    for args, word in [
        ((NULL, s, 3, 8, 0, 1e4), "cos_out is NULL"),
        ((c, NULL, 3, 8, 0, 1e4), "sin_out is NULL"),
        ((c, s, -3, 8, 0, 1e4), "T is -3"),
        ((c, s, 3, 9, 0, 1e4), "head_dim is 9"),
        ((c, s, 3, 8, -1, 1e4), "start is -1"),
        ((c, s, 3, 8, 2**63 - 2, 1e4), "start is"),
        ((c, s, 3, 8, 0, 0.0), "theta is 0"),
        ((c, s, 3, 8, 0, float("inf")), "theta is inf"),
        ((c, s, 3, 8, 0, float("nan")), "theta is"),
    ]:
        assert_refused(lib.anellm_rope_table(*args), bad, "anellm_rope_table", word, untouched=(cos, sin))
    check(lib.anellm_rope_table(NULL, NULL, 0, 8, 0, 1e4))
