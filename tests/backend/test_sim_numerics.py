"""The simulator's arithmetic against published cases (docs/simulator.md) and an independent model of the rules."""

# ruff: noqa: E501 (programs stand in long lines)
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milprograms import blob, conv1x1, files, ints, program, scalar, tensor, unary, weight

from anellm._ffi import lib
from anellm.sim import Simulator

HALF = np.float16
INF = float("inf")


def padded(values: list[float], n: int = 64) -> list[float]:
    return [*values, *[0.0] * (n - len(values))]


def mac(x: object, w: object, chip: str = "m4", *, bias: float | None = None, **options: str) -> float:
    """Return sum x w of a 1x1 conv with one output channel."""
    a, b = np.asarray(x, HALF), np.asarray(w, HALF)
    constants, extra, weights = "", "", [b.reshape(1, -1, 1, 1)]
    if bias is not None:
        constants, extra = weight("B", (1,), offset=64 + 64 * (1 + -(-b.nbytes // 64))), ", bias = B"
        weights.append(np.array([bias], HALF))
    text = conv1x1(a.size, 1, extra=extra, constants=constants)
    inputs = np.zeros((1, a.size, 1, 32), HALF)
    inputs[0, :, 0, :] = a[:, None]
    return float(Simulator(chip, **options).compile(text, files(blob(*weights))).run({"x": inputs})["y"][0, 0, 0, 7])


# Case -> x, w, result, as published for M4 and M6 (ANE.md 3.9; M6 8.2).
PUBLISHED = {
    "overflow sticks": ([16384, 16384, -16384, -16384, 1], [1] * 5, INF),
    "negative overflow sticks": ([-16384, -16384, 16384, 16384], [1] * 4, -INF),
    "below the ceiling": ([16384, 16376], [1, 1], 32768.0),
    "32760 prints as 32768": ([32752, 8], [1, 1], 32768.0),
    "at the ceiling": ([16384, 16384], [1, 1], INF),
    "the ceiling of one product": ([256], [128], INF),
    "half away: 2049": ([2048, 1], [1, 1], 2050.0),
    "half away: -2049": ([-2048, -1], [1, 1], -2050.0),
    "half away: 1 + 2^-11": ([1, 2**-11], [1, 1], 1.0009765625),
    "inf is 65536": ([INF], [0.25], 16384.0),
    "0x7E00 is 98304": ([np.array(0x7E00, np.uint16).view(HALF)], [0.25], 24576.0),
    "0x7FFF is 131008": ([np.array(0x7FFF, np.uint16).view(HALF)], [0.125], 16376.0),
    "inf overflows": ([INF], [1], INF),
    "the smallest product kept": ([2**-8], [2**-8], 2**-16),
    "exponents -17: dropped": ([2**-9], [2**-8], 0.0),
    "exponents -17, 1.98 units: dropped": ([1.99 * 2**-9], [1.99 * 2**-8], 0.0),
    "exponents -16, 1.5 units: 2": ([1.5 * 2**-8], [2**-8], 2 * 2**-16),
    "dropped, each of 64": ([2**-9] * 64, [2**-8] * 64, 0.0),
    "subnormals count as -14": ([2**-24], [4], 0.0),
    "half a unit of a subnormal: away": ([2**-15], [2**-2], 2**-16),
    "-0 is +0": ([-0.0], [1], 0.0),
    "scale is fixed: w = 16": ([2**-12], [16], 2**-8),
    "scale is fixed: w = 256": ([2**-16], [256], 2**-8),
    "scale is fixed: w = 4096": ([2**-20], [4096], 2**-8),
}


@pytest.mark.parametrize("chip", ["m4", "m6"])
@pytest.mark.parametrize("case", PUBLISHED)
def test_published_products(case: str, chip: str) -> None:
    x, w, want = PUBLISHED[case]
    got = mac(padded(list(x)), padded(list(w)), chip)
    assert got == want
    assert not np.signbit(got) or got < 0


def test_m1_sums_groups_of_four_in_fp16() -> None:
    assert mac([4096] + [1] * 1024, [1] * 1025, "m1") == 5116.0
    assert mac(padded([2048, 1]), padded([1, 1]), "m1") == 2048.0  # half to even
    assert mac(padded([16376, 16376]), padded([1, 1]), "m1") == 32752.0  # passes
    assert mac(padded([2**-8]), padded([2**-8]), "m1") == 0.0  # a subnormal product


def test_bias_is_the_first_value_of_the_sum() -> None:
    assert mac(padded([1]), padded([1]), bias=2.0) == 3.0
    assert mac(padded([-16384]), padded([1]), bias=40000.0) == INF  # over the ceiling before the first product
    assert mac(padded([0]), padded([0]), bias=2**-17) == 2**-16  # half away


def test_wide_fp32_drops_nothing() -> None:
    assert mac(padded([2**-9]), padded([2**-8]), mac="wide_fp32") == 2**-17
    assert mac(padded([16384, 16384, -16384, 1]), padded([1] * 4), mac="wide_fp32") == 16384.0
    assert mac(padded([16384, 16384]), padded([1, 1]), mac="wide_fp32") == INF


# ---- an independent model: rationals ------------------------------------------------------------------------------


def parts(bits: int) -> tuple[int, int, int]:
    """Return sign, exponent and mantissa (11 bits) of an fp16 as the multiply-accumulate unit reads it."""
    field, low = bits >> 10 & 31, bits & 1023
    sign = -1 if bits & 0x8000 else 1
    return (sign, -14, low) if field == 0 else (sign, field - 15, 1024 + low)


def half_away(value: Fraction) -> int:
    cut = (abs(value) + Fraction(1, 2)).__floor__()
    return cut if value >= 0 else -cut


def model(x: list[int], w: list[int]) -> float:
    total = 0
    for a, b in zip(x, w, strict=True):
        (sa, ea, ma), (sb, eb, mb) = parts(a), parts(b)
        if ea + eb <= -17:
            continue
        total += half_away(Fraction(sa * sb * ma * mb) * Fraction(2) ** (ea + eb - 20 + 16))
        if abs(total) >= 1 << 31:
            return INF if total > 0 else -INF
    value = Fraction(total, 1 << 16)
    if value == 0:
        return 0.0
    exponent = -14
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - 10)
    return float(half_away(value / unit) * unit)


def random_bits(rng: np.random.Generator, n: int, low: int, high: int) -> np.ndarray:
    """fp16 bit patterns with exponent fields from low to high - 1."""
    fields = rng.integers(low, high, n)
    return (rng.integers(0, 2, n) << 15 | fields << 10 | rng.integers(0, 1024, n)).astype(np.uint16)


RANGES = [
    (0, 8, 9, 16),
    (5, 12, 8, 16),
    (10, 16, 10, 16),
    (14, 18, 13, 17),
    (18, 26, 8, 16),
    (20, 32, 2, 31),
    (0, 32, 0, 32),
]


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("variant", ["portable", "avx2", "best"])
def test_sums_are_those_of_the_rules(ranges: tuple[int, int, int, int], variant: str) -> None:
    """Every kernel and the serial path, bit by bit, over all magnitudes that fp16 has."""
    rng = np.random.default_rng(ranges[0] * 100 + ranges[1])
    K, M, N = 40, 9, 64
    a = random_bits(rng, M * K, *ranges[:2]).reshape(M, K)
    b = random_bits(rng, K * N, *ranges[2:]).reshape(K, N)
    name = {"best": b"auto"}.get(variant, variant.encode())
    before = lib.anellm_cpu_variant()
    if lib.anellm_cpu_set_variant(name) != lib.ANELLM_OK:
        pytest.skip(f"this machine has no {variant}")
    try:
        text = conv1x1(K, M, N)
        y = (
            Simulator("m4")
            .compile(text, files(blob(a.view(HALF).reshape(M, K, 1, 1))))
            .run({"x": b.view(HALF).reshape(1, K, 1, N)})["y"]
        )
    finally:
        assert lib.anellm_cpu_set_variant(before) == lib.ANELLM_OK
    want = np.array([[model(a[i].tolist(), b[:, j].tolist()) for j in range(N)] for i in range(M)])
    np.testing.assert_array_equal(y[0, :, 0].astype(np.float64), want)


def product_model(a: np.ndarray, b: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """Return a (M, K) times b (K, N), bit patterns, by the rules in 64-bit integers."""
    split = [(np.where(x & 0x8000, -1, 1), x >> 10 & 31, x & 1023) for x in (a.astype(np.int64), b.astype(np.int64))]
    exponent = [np.where(field == 0, -14, field - 15) for _, field, _ in split]
    mantissa = [sign * np.where(field == 0, low, low + 1024) for sign, field, low in split]
    e = exponent[0][:, :, None] + exponent[1][None]
    m = mantissa[0][:, :, None] * mantissa[1][None]
    shift = np.maximum(4 - e, 0)  # units of 2^-16
    magnitude = (np.abs(m) << np.maximum(e - 4, 0)) + np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0) >> shift
    units = np.where(e <= -17, 0, np.sign(m) * magnitude)
    start = np.floor(np.abs(bias) * 65536 + 0.5).astype(np.int64) * np.sign(bias).astype(np.int64)
    start = np.broadcast_to(start, (a.shape[0], b.shape[1]))[:, None]
    prefixes = np.cumsum(np.concatenate([start, units], 1), 1)
    over = np.abs(prefixes) >= 1 << 31
    hit = over.any(1)
    sign = np.sign(np.take_along_axis(prefixes, over.argmax(1)[:, None], 1)[:, 0])
    total = np.abs(prefixes[:, -1]).astype(np.float64) / 65536
    unit = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(total, 2.0**-20))), -14) - 10)
    value = np.sign(prefixes[:, -1]) * np.floor(total / unit + 0.5) * unit
    return np.where(hit, np.where(sign > 0, INF, -INF), value)


LONG = [(9, 17, 4, 14), (14, 17, 9, 11), (15, 18, 12, 16), (18, 24, 12, 20), (20, 26, 14, 22), (0, 32, 0, 32)]


@pytest.mark.parametrize("ranges", LONG)
@pytest.mark.parametrize("variant", ["portable", "avx2", "best"])
@pytest.mark.parametrize("flags", [(False, False), (True, True)])
def test_long_sums_in_batches(ranges: tuple[int, int, int, int], variant: str, flags: tuple[bool, bool]) -> None:
    """Over several blocks of k, with edges on all sides: sums that fit fp32, that need fp64, and that overflow."""
    rng = np.random.default_rng(sum(ranges))
    K, M, N = 333, 13, 39
    a = random_bits(rng, 2 * M * K, *ranges[:2]).reshape(2, M, K)
    b = random_bits(rng, 2 * K * N, *ranges[2:]).reshape(2, K, N)
    b[1, :, 5] = 0
    a[0, :, 40:90] = 0
    before = lib.anellm_cpu_variant()
    if lib.anellm_cpu_set_variant({"best": b"auto"}.get(variant, variant.encode())) != lib.ANELLM_OK:
        pytest.skip(f"this machine has no {variant}")
    x, y = (v.swapaxes(1, 2) if f else v for v, f in zip((a, b), flags, strict=True))
    constants = "".join(scalar(n, "bool", str(f).lower()) for n, f in zip(("tx", "ty"), flags, strict=True))
    text = program(f"{tensor(x.shape)} x, {tensor(y.shape)} y",
                   f"{constants}{tensor((2, M, N))} z = matmul(x = x, y = y, transpose_x = tx, transpose_y = ty);", "z")  # fmt: skip
    try:
        inputs = {"x": np.ascontiguousarray(x).view(HALF), "y": np.ascontiguousarray(y).view(HALF)}
        got = Simulator("m4", rows="any").compile(text).run(inputs)["z"]
    finally:
        assert lib.anellm_cpu_set_variant(before) == lib.ANELLM_OK
    np.testing.assert_array_equal(got.astype(np.float64), [product_model(a[i], b[i]) for i in range(2)])


def test_bias_of_whole_tiles() -> None:
    rng = np.random.default_rng(8)
    w, x = random_bits(rng, 9 * 64, 12, 16).reshape(9, 64), random_bits(rng, 64 * 32, 10, 16).reshape(64, 32)
    bias = np.array([0.3, -7, 2**-17, 1000, 32760, -32767, 40000, -65504, 0], HALF)
    text = conv1x1(64, 9, extra=", bias = B", constants=weight("B", (9,), offset=128 + 9 * 128))
    data = blob(w.view(HALF).reshape(9, 64, 1, 1), bias)
    y = Simulator("m4").compile(text, files(data)).run({"x": x.view(HALF).reshape(1, 64, 1, 32)})["y"]
    want = product_model(w, x, bias.astype(np.float64)[:, None])
    np.testing.assert_array_equal(y[0, :, 0].astype(np.float64), want)


def test_ties_are_rounded_away_wherever_they_stand() -> None:
    """Products exactly half way between two units, of both signs, by every kernel that this machine has."""
    rng = np.random.default_rng(5)
    odd = rng.integers(0, 16, (1, 64, 1, 32)) * 2 + 1  # 32..63 / 32 times 2^-12: an odd multiple of 2^-17
    x = ((32 + odd % 32) * np.where(rng.integers(0, 2, odd.shape) == 1, 1.0, -1.0) * 2.0**-12).astype(HALF)
    w = np.full((8, 64, 1, 1), 2.0**-5, HALF)
    y = Simulator("m4").compile(conv1x1(64, 8), files(blob(w))).run({"x": x})["y"]
    for j in range(32):
        column = x[0, :, 0, j].view(np.uint16).tolist()
        assert float(y[0, 0, 0, j]) == model(column, [w.view(np.uint16)[0, 0, 0, 0].item()] * 64)


# ---- fast is never kinder -----------------------------------------------------------------------------------------


def gradient_case(absmax: float, std: float, numerics: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a gradient through a matrix of 768 by 256, the true one, and how many products were not exact."""
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((256, 768)) * std).astype(HALF)
    x = rng.standard_normal((768, 32))
    x = (x / np.abs(x).max() * absmax).astype(HALF)
    simulator = Simulator("m4", numerics=numerics)
    compiled = simulator.compile(conv1x1(768, 256), files(blob(w.reshape(256, 768, 1, 1))))
    y = compiled.run({"x": x.reshape(1, 768, 1, 32)})["y"][0, :, 0].astype(np.float64)
    return y, w.astype(np.float64) @ x.astype(np.float64), simulator.counters()["mac_fast"]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-300))


# (deviation of the weights, absmax of dY) -> cosine with the true gradient, as worked out from the rules in ANE.md 3.9
VANISHING = {
    (0.02, 4e-4): 0.04, (0.036, 4e-4): 0.23, (0.02, 1e-3): 0.34, (0.036, 1e-3): 0.59, (0.02, 1e-2): 0.985,
    (0.036, 1e-2): 0.996, (0.02, 0.1): 0.9999, (0.036, 1.0): 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("std", "absmax"), [*VANISHING, (0.02, 1e-4), (0.036, 2e-4), (0.036, 2e-3), (0.02, 5e-3)])
def test_fast_is_never_kinder_than_exact(std: float, absmax: float) -> None:
    """At the magnitudes of unscaled gradients, fast loses what exact loses, element by element."""
    exact, true, _ = gradient_case(absmax, std, "exact")
    fast, _, n_fast = gradient_case(absmax, std, "fast")
    assert n_fast == 0
    np.testing.assert_array_equal(fast, exact)
    if (std, absmax) in VANISHING:
        want = VANISHING[std, absmax]
        assert abs(cosine(exact, true) - want) < max(0.2 * (1 - want), 2e-4)


def both(w: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return w x (M, N) under exact and fast, and how many tiles took the short way, and did not."""
    (M, K), N = w.shape, x.shape[1]
    results = {}
    for numerics in ("exact", "fast"):
        simulator = Simulator("m4", numerics=numerics)
        compiled = simulator.compile(conv1x1(K, M, N), files(blob(w.reshape(M, K, 1, 1))))
        results[numerics] = compiled.run({"x": x.reshape(1, K, 1, N)})["y"][0, :, 0].astype(np.float64)
    counters = simulator.counters()
    return results["exact"], results["fast"], counters["mac_fast"], counters["mac_exact"]


def assert_within_bound(exact: np.ndarray, fast: np.ndarray) -> None:
    """2^-11 of the largest, and one rounding to fp16 that may fall on the other side."""
    allowed = np.abs(exact).max() * 2.0**-11 + np.abs(exact) * 2.0**-10
    assert (np.abs(fast - exact) <= allowed).all()


@pytest.mark.parametrize(
    ("K", "std", "absmax", "short"),
    [(64, 0.5, 8.0, True), (128, 0.6, 4.0, True), (768, 0.036, 8.0, True), (768, 0.05, 4.0, True),
     (2048, 0.05, 8.0, True), (768, 0.02, 0.1, False), (768, 0.02, 1e-2, False), (2048, 0.02, 1e-3, False)],
)  # fmt: skip
def test_fast_stays_within_its_bound(K: int, std: float, absmax: float, short: bool) -> None:
    """And takes the short way for normed activations and scaled gradients, but not for unscaled ones."""
    rng = np.random.default_rng(4)
    w = (rng.standard_normal((256, K)) * std).astype(HALF)
    x = rng.standard_normal((K, 256))
    exact, fast, n_short, _ = both(w, (x / np.abs(x).max() * absmax).astype(HALF))
    assert (n_short > 0) == short
    assert_within_bound(exact, fast)
    if not short:
        np.testing.assert_array_equal(exact, fast)


def test_fast_lets_small_rows_vanish() -> None:
    """Rows of 1e-4 among rows of 8, as tokens without a gradient have them: they are 0 in both."""
    rng = np.random.default_rng(6)
    w, x = (rng.standard_normal((64, 768)) * 0.05).astype(HALF), rng.standard_normal((768, 512))
    x = (x * np.where(np.arange(512) % 32 == 7, 3e-5, 20.0)).astype(HALF)
    exact, fast, n_short, n_exact = both(w, x)
    assert n_short == 0  # each tile has such a column
    assert n_exact > 0
    np.testing.assert_array_equal(exact, fast)
    assert (exact[:, 7] == 0).mean() > 0.9
    x[:, : 32 * 13] = (rng.standard_normal((768, 32 * 13)) * 20).astype(HALF)
    exact, fast, n_short, n_exact = both(w, x)
    assert n_short > 0
    assert n_exact > 0
    np.testing.assert_array_equal(exact[:, 32 * 13 :], fast[:, 32 * 13 :])
    assert_within_bound(exact, fast)


@given(st.integers(0, 2**32), st.floats(-14, 4), st.floats(-12, 0), st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=25)
def test_fast_keeps_nothing_that_exact_loses(seed: int, size: float, std: float, tail: float) -> None:
    """Random magnitudes and tails, rows and columns of very different sizes."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((24, 200)) * 2.0**std * np.exp2(rng.uniform(-tail, tail, (24, 1)))
    x = rng.standard_normal((200, 64)) * 2.0**size * np.exp2(2 * tail * rng.standard_normal((200, 64)))
    exact, fast, _, _ = both(w.astype(HALF), np.clip(x, -6e4, 6e4).astype(HALF))
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(finite, np.isfinite(fast))
    assert_within_bound(np.where(finite, exact, 0), np.where(finite, fast, 0))


def test_fast_does_not_overlook_the_ceiling() -> None:
    x, w = np.full((1, 64, 1, 32), 64.0, HALF), np.full((8, 64, 1, 1), 16.0, HALF)
    for numerics in ("exact", "fast"):
        y = Simulator("m4", numerics=numerics).compile(conv1x1(64, 8), files(blob(w))).run({"x": x})["y"]
        assert np.isinf(y).all()


# ---- the elementwise unit ------------------------------------------------------------------------------------------


def elementwise(op: str, x: object, y: object, chip: str = "m4") -> np.ndarray:
    a, b = np.zeros(32, HALF), np.zeros(32, HALF)
    a[: np.size(x)], b[: np.size(y)] = x, y
    kind = tensor((1, 1, 1, 32))
    text = program(f"{kind} a, {kind} b", f"{kind} c = {op}(x = a, y = b);", "c")
    shape = (1, 1, 1, 32)
    return (
        Simulator(chip).compile(text).run({"a": a.reshape(shape), "b": b.reshape(shape)})["c"].reshape(-1)[: np.size(x)]
    )


@pytest.mark.parametrize(
    ("op", "x", "y", "want"),
    [
        ("add", 2048.0, 1.0, 2050.0),
        ("sub", -2048.0, 1.0, -2050.0),
        ("add", 65504.0, 32.0, INF),
        ("add", 65504.0, 8.0, 65504.0),
        ("mul", 2**-24, 0.5, 2**-24),
        ("mul", 2**-24, 0.25, 0.0),
        ("add", 2**-24, 2**-24, 2**-23),
        ("add", float("nan"), 1.0, INF),
        ("sub", INF, INF, 0.0),
        ("mul", 0.0, INF, 0.0),
        ("pow", 4.0, -0.5, 0.5),
        ("real_div", 1.0, 3.0, 0.333251953125),
        ("floor_div", -7.0, 2.0, -4.0),
        ("maximum", -1.0, 3.0, 3.0),
        ("minimum", -1.0, 3.0, -1.0),
    ],
)
def test_published_elementwise(op: str, x: float, y: float, want: float) -> None:
    assert float(elementwise(op, x, y)[0]) == want


def test_m1_rounds_half_to_even() -> None:
    assert float(elementwise("add", 2048.0, 1.0, "m1")[0]) == 2048.0


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), min_size=32, max_size=32))
@settings(max_examples=40)
def test_add_and_mul_round_once(pairs: list[tuple[int, int]]) -> None:
    """Against float64, which holds sums and products of fp16 numbers exactly."""
    bits = np.array(pairs, np.uint16)
    a, b = bits[:, 0].copy().view(HALF), bits[:, 1].copy().view(HALF)
    keep = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(keep, a, HALF(1)), np.where(keep, b, HALF(1))
    for op, exact in (("add", a.astype(np.float64) + b), ("mul", a.astype(np.float64) * b)):
        got = elementwise(op, a, b).astype(np.float64)
        magnitude = np.abs(exact)
        exponent = np.maximum(np.floor(np.log2(np.maximum(magnitude, 2.0**-30))), -14)
        unit = 2.0 ** (exponent - 10)
        rounded = np.floor(magnitude / unit + 0.5) * unit
        want = np.copysign(np.where(magnitude >= 65520, INF, rounded), exact)
        np.testing.assert_array_equal(got, want)


# ---- activations ---------------------------------------------------------------------------------------------------


def activation(op: str, x: object, chip: str = "m4", extra: str = "", constants: str = "") -> np.ndarray:
    values = np.asarray(x, HALF).reshape(-1)
    n = -(-values.size // 16) * 16
    padding = np.zeros(n, HALF)
    padding[: values.size] = values
    text = unary(op, n, extra, constants)
    return Simulator(chip).compile(text).run({"x": padding.reshape(1, 1, 1, n)})["y"].reshape(-1)[: values.size]


def gelu(x: np.ndarray) -> np.ndarray:
    from math import erf, sqrt

    return np.array([0.5 * v * (1 + erf(v / sqrt(2))) for v in x])


GELU = {"extra": ", mode = md", "constants": scalar("md", "string", '"EXACT"')}


@pytest.mark.parametrize(
    ("op", "function", "most", "span"),
    [
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), 3.4e-3, 12),
        ("tanh", np.tanh, 1.6e-3, 12),
        ("silu", lambda x: x / (1 + np.exp(-x)), 1.55e-2, 7.9),
        ("gelu", gelu, 6.3e-3, 3.9),
    ],
)
def test_activations_err_as_published(op: str, function: object, most: float, span: float) -> None:
    """The greatest errors of M6 8.5: no larger, and of that size."""
    x = np.linspace(-span, span, 4096).astype(HALF)
    error = np.abs(
        activation(op, x, **(GELU if op == "gelu" else {})).astype(np.float64) - function(x.astype(np.float64))
    )
    assert most / 2 < error.max() <= most


def test_activations_published_values() -> None:
    grid = np.arange(-8, 8.5, 0.5)
    want = (1 / (1 + np.exp(-grid))).astype(HALF)
    np.testing.assert_array_equal(activation("sigmoid", grid), want)  # samples are exact
    assert activation("sigmoid", [20.0]) == want[-1]  # clamped
    assert activation("sigmoid", [-20.0]) == want[0]
    low = 1 / (1 + np.exp(9.938))  # M1's table goes on to there
    np.testing.assert_allclose(activation("sigmoid", [-20.0], "m1").astype(np.float64), low, rtol=2**-10)
    assert activation("silu", [0.5]) == HALF(0.296)
    assert activation("silu", [0.0]) == HALF(-1.26e-3)
    assert activation("gelu", [0.25], **GELU) == HALF(0.1436)
    assert activation("gelu", [0.0], **GELU) == HALF(-5.4e-4)
    np.testing.assert_array_equal(activation("tanh", [-1.3]), -activation("tanh", [1.3]))
    assert activation("softplus", [12.0]) == 0
    assert activation("softsign", [INF]) == 0
    assert activation("round", [1025.0]) != 1025
    assert activation("round", [2.5]) == 3


def test_exp_err_and_overflow() -> None:
    x = np.linspace(-9, 11, 4001).astype(HALF)
    got, want = activation("exp", x).astype(np.float64), np.exp(x.astype(np.float64))
    ulp = 2.0 ** (np.floor(np.log2(want)) - 10)
    assert np.abs((got - want) / np.maximum(ulp, 2**-24)).max() <= 9
    assert np.isfinite(activation("exp", [11.0859]))
    assert np.isinf(activation("exp", [11.094]))


@pytest.mark.parametrize(
    ("op", "function", "ulps"),
    [("sqrt", np.sqrt, 1.2), ("rsqrt", lambda x: x**-0.5, 2.1), ("inverse", lambda x: 1 / x, 2.1)],
)
def test_range_reduced_tables(op: str, function: object, ulps: float) -> None:
    x = np.exp(np.linspace(np.log(0.01), np.log(6e4), 4096)).astype(HALF)
    extra = {} if op == "sqrt" else {"extra": ", epsilon = ep", "constants": scalar("ep", "fp16", "0x1p-24")}
    got, want = activation(op, x, **extra).astype(np.float64), function(x.astype(np.float64))
    ulp = np.maximum(2.0 ** (np.floor(np.log2(want)) - 10), 2.0**-24)
    assert (np.abs(got - want) / ulp).max() <= ulps + 0.05


def test_zero_and_negative_arguments() -> None:
    eps = {"extra": ", epsilon = ep", "constants": scalar("ep", "fp16", "0x1p-24")}
    assert activation("sqrt", [-1.0]) == 0
    assert activation("log", [-1.0], **eps) == 0
    assert activation("rsqrt", [-1.0], **eps) == 0
    assert activation("log", [-(2.0**-24)], **eps) == HALF(-45440)
    assert np.isposinf(activation("inverse", [-(2.0**-24)], **eps))


# ---- reductions and softmax ----------------------------------------------------------------------------------------


def reduce(op: str, x: np.ndarray, axes: list[int], chip: str = "m4", keep: str = "true") -> np.ndarray:
    shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
    body = f"{ints('ax', axes)} {scalar('kd', 'bool', keep)}\n{tensor(shape)} r = {op}(x = x, axes = ax, keep_dims = kd);\n"
    body += f"{tensor(x.shape)} y = add(x = z, y = r);"
    kind = tensor(x.shape)
    zeros = np.zeros(x.shape, HALF)
    y = Simulator(chip, rows="any").compile(program(f"{kind} x, {kind} z", body, "y")).run({"x": x, "z": zeros})["y"]
    return y[tuple(slice(0, 1) if i in axes else slice(None) for i in range(x.ndim))]


def test_reduce_sum_is_narrow() -> None:
    ones = np.ones((1, 2048, 1, 32), HALF)
    assert (reduce("reduce_sum", ones, [1]) == 2048).all()
    more = np.ones((1, 3000, 1, 32), HALF)
    assert (reduce("reduce_sum", more, [1]) != 3000).all()
    assert (reduce("reduce_sum", more, [1], "m1") == 2048).all()  # half to even: stuck


def test_sum_of_squares_overflows() -> None:
    assert np.isinf(reduce("reduce_sum_square", np.full((1, 768, 1, 32), 10.0, HALF), [1])).all()


def test_softmax_errs_as_published() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, 4, 16, 64)) * 2).astype(HALF)
    kind = tensor(x.shape)
    text = program(f"{kind} x", f"{scalar('ax', 'int32', '-1')}\n{kind} y = softmax(x = x, axis = ax);", "y")
    got = Simulator("m4").compile(text).run({"x": x})["y"].astype(np.float64)
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True).astype(np.float64))
    want = e / e.sum(-1, keepdims=True)
    assert np.abs(got - want).max() <= 4e-4
    shifted = Simulator("m4").compile(text).run({"x": np.full_like(x, -65504)})["y"]
    np.testing.assert_allclose(shifted.astype(np.float64), 1 / 64, atol=1e-4)
