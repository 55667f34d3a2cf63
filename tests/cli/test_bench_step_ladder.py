"""``bench step-ladder``: every rung is there, computes the same, and what is told of it adds up."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from anellm import bench, bench_step, bench_step_ladder, cli
from anellm._ffi import lib, text
from anellm.bench_step_ladder import BF16_TIERS, FP32_TIERS, Rung
from anellm.errors import InternalError

ARGS = [
    "step-ladder",
    "--preset",
    "stories260k",
    "--vocab-size",
    "96",
    "--seq-len",
    "8",
    "--rounds",
    "2",
    "--steps",
    "1",
]
VARIANTS = text(lib.anellm_cpu_variants()).split(",")


@pytest.fixture(autouse=True)
def _threads():
    before = lib.anellm_get_threads()
    yield
    lib.anellm_set_threads(before)


def ladder(tmp_path: Path, *args: str) -> dict[str, Any]:
    path = tmp_path / "ladder.json"
    argv = [*ARGS, *args, "--figure", str(tmp_path / "ladder.svg"), "--json", str(path)]
    assert bench.main(argv) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ladder")
    return {**ladder(folder, "--threads", "2"), "svg": (folder / "ladder.svg").read_text()}


def test_every_tier_is_a_rung_or_missing(found: dict[str, Any]) -> None:
    entries = {entry["name"]: entry for entry in found["ladder"]}
    ran = {(entry["variant"], entry["threads"]) for entry in entries.values()}
    assert ran == {("naive", 1)} | {(tier, n) for tier in VARIANTS for n in (1, 2)}
    assert len(entries) == len(ran)
    for entry in entries.values():
        assert entry["dtype"] == ("bf16" if entry["variant"] in BF16_TIERS else "fp32")
    known = {*FP32_TIERS, *BF16_TIERS} - {"naive"}
    assert set(found["missing"]) == known - set(VARIANTS)
    for tier, line in found["missing"].items():
        assert line.startswith(f"{tier}: not available: CPU variant")
    assert next(iter(entries)) == "naive loops"
    assert "dtype" not in found


def test_figures_of_every_rung(found: dict[str, Any]) -> None:
    references = found["reference"]
    ms = {entry["name"]: entry["ms"] for entry in found["ladder"]}
    assert set(references) == {entry["dtype"] for entry in found["ladder"]}
    assert set(found["peak_gflops"]) == set(found["peak_tier"]) == set(references)
    for entry in found["ladder"]:
        assert 0 < entry["min_ms"] <= entry["ms"]
        assert entry["iterations_per_s"] == pytest.approx(1e3 / entry["ms"])
        assert entry["tokens_per_s"] == pytest.approx(8e3 / entry["ms"])
        assert entry["gflops"] == pytest.approx(found["flops"] / entry["ms"] / 1e6)
        assert entry["rss_mib"] > 1
        assert entry["timed_steps"] == 2
        assert entry["warm"]
        assert entry["ratio"] == {dtype: pytest.approx(entry["ms"] / ms[name]) for dtype, name in references.items()}
        assert entry["in_turns"] == (entry["name"] in references.values())
    best = next(tier for tier in VARIANTS if tier in FP32_TIERS)
    assert references["fp32"] == Rung(best, "fp32", 2).name


def test_every_rung_computes_the_same(found: dict[str, Any]) -> None:
    """Three losses of each, the last two after updates; naive loops and the fastest kernels round differently."""
    losses = found["first_losses"]
    ours = losses["fp32"]["anellm"]
    assert len(losses["fp32"]["naive loops"]) == 3
    for dtype, of in losses.items():
        for name, values in of.items():
            assert bench_step.agree(ours, values, dtype), name
    assert losses["fp32"]["naive loops"] != ours


def test_drawing(found: dict[str, Any]) -> None:
    root = ET.fromstring(found["svg"])  # our own file
    assert len(root.findall("{*}rect")) == 1 + len(found["ladder"])
    texts = ["".join(node.itertext()) for node in root.findall("{*}text")]
    assert "naive loops" in texts


def test_one_thread_is_one_rung_of_each_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ladder(tmp_path, "--threads", "1", "--compare", "numpy")
    assert [entry["threads"] for entry in found["ladder"]] == [1] * (1 + len(VARIANTS))
    out = capsys.readouterr().out
    assert "numpy: has no training step" in out
    assert "GFLOP/s" in out.splitlines()[0]
    assert "naive loops" in out
    assert f"over {found['reference']['fp32']}; the peak of" in out


def test_a_slow_rung_is_timed_once_and_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step_ladder, "_COLD_MS", 0.0)
    job = bench.job_of(cli.parse(bench.BenchConfig, [*ARGS, "--threads", "1"], "bench"))
    common = bench_step.step_job(job, tmp_path)
    rung = Rung("naive", "fp32", 1)
    exact = bench_step_ladder.climb(Rung("portable", "fp32", 1), common, [], 9)["ms"]
    assert len(exact) == 1
    with pytest.raises(
        InternalError, match=r"naive loops computes something else: its first losses are \[.*\], not \[1"
    ):
        bench_step_ladder.climb(rung, common, [1.0], 9)
    monkeypatch.setattr(bench_step_ladder, "_COLD_MS", 1e9)
    warm = bench_step_ladder.climb(rung, common, [], 9)
    assert warm["warm"]
    assert 2 <= len(warm["ms"]) <= 9


def test_a_rung_must_run_with_its_own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.job_of(cli.parse(bench.BenchConfig, [*ARGS, "--threads", "1"], "bench"))
    real = bench_step_ladder.Contender

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(real(*args, **kwargs), environment={"ANELLM_CPU": "portable"})

    monkeypatch.setattr(bench_step_ladder, "Contender", forgetful)
    with pytest.raises(InternalError, match="naive loops ran with the kernels of portable"):
        bench_step_ladder.climb(Rung("naive", "fp32", 1), bench_step.step_job(job, tmp_path), [], 1)


def test_names_of_rungs() -> None:
    assert Rung("naive", "fp32", 1).name == "naive loops"
    assert Rung("avx2", "fp32", 1).name == "avx2, 1 thread"
    assert Rung("amx", "bf16", 16).name == "amx (bf16), 16 threads"


def test_cold_rungs_are_told(capsys: pytest.CaptureFixture[str], found: dict[str, Any]) -> None:
    first = {**found["ladder"][0], "warm": False, "rss_mib": None}
    bench_step_ladder.show({**found, "ladder": [first, *found["ladder"][1:]]})
    out = capsys.readouterr().out
    assert "one step without warm-up: naive loops" in out
    assert out.splitlines()[1].split()[7] == "-"
