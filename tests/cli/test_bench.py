"""The verb bench: what it reports is there and adds up. Nothing here looks at how fast anything was."""

from __future__ import annotations

import json
import math
import struct
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from anellm import (
    bench,
    bench_decode,
    bench_kernels,
    bench_ladder,
    bench_load,
    bench_peers,
    bench_step,
    bench_svg,
    bench_timing,
    cli,
)
from anellm._ffi import lib, text
from anellm.config import ModelConfig
from anellm.errors import ConfigError, InternalError

SHAPE = ["--preset", "stories260k", "--vocab-size", "96", "--seq-len", "8"]
QUICK = ["--rounds", "2", "--steps", "1", "--threads", "2"]


@pytest.fixture(autouse=True)
def _threads():
    before = lib.anellm_get_threads()
    yield
    lib.anellm_set_threads(before)


def measure(tmp_path: Path, *args: str) -> dict[str, Any]:
    """Run the verb and return what --json wrote."""
    path = tmp_path / "bench.json"
    assert bench.main([*args, *SHAPE, *QUICK, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def script(tmp_path: Path, name: str, body: str) -> str:
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def bare_python(tmp_path: Path) -> str:
    """Return a Python that has nothing but the standard library."""
    return script(tmp_path, "python", f'exec "{sys.executable}" -I -S "$@"')


def job(*args: str, what: str = "step") -> bench.BenchJob:
    return bench.job_of(cli.parse(bench.BenchConfig, [what, *SHAPE, *QUICK, *args], "bench"))


# ---- options -------------------------------------------------------------------------------------------------------


def test_what_stands_alone_anywhere(tmp_path: Path) -> None:
    for argv in (["load", *QUICK], [*QUICK, "load"], ["--steps", "1", "load", "--rounds", "2"]):
        assert cli.parse(bench.BenchConfig, argv, "bench").what == "load"
    assert cli.parse(bench.BenchConfig, [], "bench").what == "step"
    file = tmp_path / "c.toml"
    file.write_text('what = "decode"\n')
    assert cli.parse(bench.BenchConfig, ["--config", str(file)], "bench").what == "decode"
    assert cli.parse(bench.BenchConfig, ["load", "--config", str(file)], "bench").what == "load"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stp"], "WHAT: expected one of step, kernels, decode, load, matmul-ladder, step-ladder, found 'stp'"),
        (["step", "load"], "unexpected argument 'load'"),
        (["--what", "step"], "unknown flag --what"),
        (["--compare", "torhc"], "--compare: unknown peer 'torhc'; did you mean torch?"),
        (["--compare", "numpy,jaxx"], "--compare: unknown peer 'jaxx'; did you mean jax?"),
        (["--seq-len", "4096"], "--seq-len: expected at most the model's longest, 1024, found 4096"),
        (["matmul-ladder", "--figure", "x.png"], "--figure: expected a name that ends in .svg, found 'x.png'"),
        (["step", "--figure", "x.svg"], "--figure: only for matmul-ladder and step-ladder, found step"),
        (["step-ladder", "--figure", "x"], "--figure: expected a name that ends in .svg, found 'x'"),
        (["step-ladder", "--dtype", "bf16"], "--dtype: step-ladder measures fp32 and, where the CPU has it, bf16"),
        (["load", "--runc", "x"], "--runc: only for decode, found load"),
        (["decode", "--tokens", "1024"], "--tokens: expected less than the model's longest, 1024, found 1024"),
        (["--torch-python", "/no/such", "--compare", "torch"], "torch: cannot run /no/such: No such file"),
    ],
)
def test_wrong_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = [] if "1024" in message else SHAPE
    assert bench.main([*argv, *shape, *QUICK]) == 2
    assert message in capsys.readouterr().err


def test_peers_are_named_once() -> None:
    assert bench_peers.parse_compare(" jax, torch,jax,") == ["jax", "torch"]
    assert bench_peers.parse_compare("") == []
    with pytest.raises(ConfigError, match="unknown peer"):
        bench_peers.parse_compare("torch jax")


# ---- step ----------------------------------------------------------------------------------------------------------


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(tmp_path, "step")
    ours = found["anellm"]
    assert 0 < ours["min_ms"] <= ours["ms"]
    assert ours["rss_mib"] > 1
    assert ours["timed_steps"] == 2
    assert found["peers"] == found["ratio"] == found["missing"] == {}
    flops = ModelConfig.from_preset("stories260k", vocab_size=96).flops_per_token(8) * 8
    assert found["flops"] == flops
    assert found["gflops"] == ours["gflops"] == pytest.approx(flops / ours["ms"] / 1e6)
    assert ours["iterations_per_s"] == pytest.approx(1e3 / ours["ms"])
    assert ours["tokens_per_s"] == pytest.approx(8e3 / ours["ms"])
    assert found["fraction_of_peak"] == pytest.approx(found["gflops"] / found["peak_gflops"])
    assert found["peak_gflops"] > 0
    assert found["machine"]["cpu_variant"] == text(lib.anellm_cpu_variant())
    assert len(found["first_losses"]["anellm"]) == 3
    out = capsys.readouterr().out
    head = out.splitlines()[0].split()
    assert head[:6] == ["ms", "least", "it/s", "tokens/s", "GFLOP/s", "MiB"]
    assert float(out.splitlines()[1].split()[5]) == pytest.approx(ours["gflops"], abs=0.051)
    assert "6 operations for each weight" in out
    assert f"peak of {found['peak_tier']}" in out


def test_step_in_bf16(tmp_path: Path) -> None:
    """Rounded inputs change the loss a little, so that it is seen that they are rounded."""
    exact, rounded = (measure(tmp_path, "step", "--dtype", dtype) for dtype in ("fp32", "bf16"))
    assert (exact["dtype"], rounded["dtype"]) == ("fp32", "bf16")
    a, b = exact["first_losses"]["anellm"], rounded["first_losses"]["anellm"]
    assert bench_step.agree(a, b, "bf16")
    assert a != b


def test_step_goes_on_without_a_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = bare_python(tmp_path)
    found = measure(tmp_path, "step", "--compare", "torch,numpy", "--torch-python", python)
    assert set(found["missing"]) == {"torch", "numpy"}
    line = found["missing"]["torch"]
    assert line.startswith(f"torch: cannot be imported by {python} (No module named 'torch')")
    assert "pip install torch==" in line
    assert "--torch-python" in line
    assert line in capsys.readouterr().out
    assert found["anellm"]["ms"] > 0
    assert found["peers"] == {}


def test_summary_of_a_race() -> None:
    times = {
        "anellm": {"ms": [4.0, 2.0, 3.0], "rss_mib": 10.0},
        "torch": {"ms": [9.0, 5.0, 6.0, 7.0], "rss_mib": 20.0},
    }
    found = bench_step.summarise(times, n_tokens=6, flops=3e6, peak=2.0)
    assert found["anellm"] == {
        "ms": 3.0, "min_ms": 2.0, "rss_mib": 10.0, "timed_steps": 3, "iterations_per_s": 1e3 / 3, "tokens_per_s": 2e3,
        "gflops": 1.0,
    }  # fmt: skip
    assert found["peers"]["torch"]["ms"] == 6.5
    assert found["ratio"] == {"torch": 6.5 / 3.0}
    assert found["ratio_of_minima"] == {"torch": 2.5}
    assert found["gflops"] == 1.0
    assert found["fraction_of_peak"] == 0.5
    assert found["fraction_of_peak_of_minimum"] == 0.75


def test_targets_are_the_next_tokens_of_a_circle(tmp_path: Path) -> None:
    found = bench_step.step_job(job("--batch-size", "3"), tmp_path)
    tokens, targets = ([x for row in found[name] for x in row] for name in ("tokens", "targets"))
    assert len(tokens) == 24
    assert targets == [*tokens[1:], tokens[0]]


def test_contenders_must_compute_the_same(tmp_path: Path) -> None:
    race = bench_step.Race(job(), tmp_path)
    try:
        race.enter(bench_peers.Contender("anellm", "anellm"))
        race.enter(bench_peers.Contender("twin", "anellm"))
        assert race.losses["twin"] == race.losses["anellm"]
        with pytest.raises(InternalError, match="other computes something else"):
            race.enter(bench_peers.Contender("other", "anellm", options={"seed": 2}))
        # The first loss is the same, the later ones tell that the update is not.
        with pytest.raises(InternalError, match="slow computes something else"):
            race.enter(bench_peers.Contender("slow", "anellm", options={"lr": 1e-2}))
        assert [child.contender.name for child in race.running] == ["anellm", "twin"]
        calls = []
        times = bench_peers.alternate(race.running, 3, 2, 1, lambda: calls.append(1))
        assert {name: len(entry["ms"]) for name, entry in times.items()} == {"anellm": 6, "twin": 6}
        assert len(calls) == 3
    finally:
        race.close()


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    race = bench_step.Race(job(), tmp_path)
    with pytest.raises(bench_peers.ChildError, match="broken: ConfigError: dim: expected"):
        race.enter(bench_peers.Contender("broken", "anellm", options={"config": {**race.common["config"], "dim": 0}}))
    with pytest.raises(bench_peers.ChildError, match="gone: its process ended: out of luck"):
        race.enter(bench_peers.Contender("gone", "anellm", script(tmp_path, "gone", "echo out of luck >&2; exit 3")))
    assert race.running == []


def test_children_do_not_inherit_slow_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "512")
    environment = script(tmp_path, "env", 'env >"$0.txt"')
    child = bench_peers.Child(bench_peers.Contender("x", "anellm", environment, {"GLIBC_TUNABLES": "a=1"}), 3)
    child.close()
    lines = Path(environment + ".txt").read_text().splitlines()
    assert not [line for line in lines if line.startswith("OPENBLAS_") and "THREADS" not in line]
    assert {"OPENBLAS_NUM_THREADS=3", "OMP_NUM_THREADS=3", "GLIBC_TUNABLES=a=1"} <= set(lines)


def test_losses_agree_within_the_tolerance() -> None:
    assert bench_step.agree([10.0, 9.0], [10.009, 9.0], "fp32")
    assert not bench_step.agree([10.0, 9.0], [10.0, 9.01], "fp32")
    assert bench_step.agree([10.0, 9.0], [10.0, 9.01], "bf16")
    assert not bench_step.agree([10.0], [math.nan], "fp32")


# ---- the others ----------------------------------------------------------------------------------------------------


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "_SECONDS", 0.0)
    monkeypatch.setattr(bench_timing.Peak, "sample", lambda _self: None)
    found = measure(tmp_path, "kernels", "--compare", "numpy")
    tiers = set(text(lib.anellm_cpu_variants()).split(","))
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["kernels"]:
        rows.setdefault((row["kernel"], row["shape"]), []).append(row)
    kernels = {kernel.split()[0] for kernel, _ in rows}
    assert kernels >= {
        "matmul",
        "attention_forward",
        "attention_backward",
        "rmsnorm_forward",
        "swiglu_backward",
        "adamw",
    }
    for (kernel, _), of_case in rows.items():
        assert {row["variant"] for row in of_case} == tiers, kernel
        portable = of_case[0]
        assert portable["variant"] == "portable"
        assert portable["ratio_to_portable"] == 1.0
        for row in of_case:
            assert row["ratio_to_portable"] == pytest.approx(portable["min_ms"] / row["min_ms"])
            assert (row["gflops"] is None) != (row["gbs"] is None)
            assert set(row["ratio"]) == ({"numpy"} if kernel.split()[0] == "matmul" else set())
            if row["gflops"] is not None:
                dtype = "bf16" if kernel.startswith("matmul_bf16") else "fp32"
                peak = found["peak_gflops"][bench_timing.peak_tier(row["variant"], dtype)]
                assert row["fraction_of_peak"] == pytest.approx(row["gflops"] / peak)
    assert found["missing"] == {}
    assert text(lib.anellm_cpu_variant()) in tiers


def test_jax_has_no_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["step", "--preset", "gpt2", "--compare", "torch,jax"]) == 2
    assert "--compare: jax has only a Llama here, found --preset gpt2" in capsys.readouterr().err


def test_every_operation_of_the_core_is_measured() -> None:
    """Whatever stands in the C interface as a kernel has a case."""
    shape = ModelConfig.from_preset("stories260k", vocab_size=96)
    found = {case.kernel.split()[0] for case in bench_kernels.cases(shape, 1, 8)}
    ops = {"embedding", "rmsnorm", "rope", "attention", "swiglu", "cross_entropy"}
    expected = {f"{op}_{way}" for op in ops for way in ("forward", "backward")}
    expected |= {f"convert_{a}_to_{b}" for x in ("f16", "bf16") for a, b in (("f32", x), (x, "f32"))}
    expected |= {"matmul", "matmul_bf16", "matvec_f32", "matvec_bf16", "matvec_int8", "adamw", "grad_norm"}
    assert found >= expected
    shape = ModelConfig.from_preset("gpt2-char")
    gpt2 = {case.kernel.split()[0]: case for case in bench_kernels.cases(shape, 1, 8)}
    assert set(gpt2) >= {f"{op}_{way}" for op in ("layernorm", "bias", "gelu") for way in ("forward", "backward")}
    assert not set(gpt2) & {"rmsnorm_forward", "rope_forward", "swiglu_forward"}
    for name in ("layernorm_backward", "bias_forward", "gelu_backward"):
        gpt2[name].run()  # its arguments are accepted
    assert all(hasattr(lib, f"anellm_{name}") for name in found | set(gpt2))


def test_decode_against_a_program(tmp_path: Path) -> None:
    runc = script(tmp_path, "run", 'cp "$1" "$0.bin"; cp "$7" "$0.tokenizer"; echo "$@" >"$0.args"; '
                                   'echo "text"; echo "achieved tok/s: 250.0" >&2')  # fmt: skip
    found = measure(tmp_path, "decode", "--tokens", "5", "--runc", runc)
    ours, theirs = found["anellm"], found["peers"]["llama2.c"]
    assert theirs["ms"] == 4.0
    assert theirs["tokens_per_s"] == 250.0
    assert found["ratio"] == {"llama2.c": pytest.approx(4.0 / ours["ms"])}
    config = ModelConfig.from_preset("stories260k", vocab_size=96)
    assert found["weight_bytes"] == 4 * config.n_params()
    assert ours["fraction_of_read"] == pytest.approx(found["weight_bytes"] / ours["ms"] / 1e6 / found["read_gbs"])
    assert "-t 0 -n 5" in Path(runc + ".args").read_text()
    assert Path(runc + ".bin").stat().st_size > 4 * config.n_params()


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_decode_with_smaller_weights(weights: str, tmp_path: Path) -> None:
    found = measure(tmp_path, "decode", "--tokens", "3", "--weights", weights)
    config = ModelConfig.from_preset("stories260k", vocab_size=96)
    vectors = (2 * config.n_layers + 1) * config.dim
    matrices = config.n_params() - vectors
    rest = found["weight_bytes"] - 4 * vectors
    if weights == "bf16":
        assert rest == 2 * matrices
    else:
        assert 1.0 < rest / matrices < 1.2  # hidden_dim 172 leaves a short group in each row
    assert found["weights"] == weights


def test_written_tokenizer(tmp_path: Path) -> None:
    """A reader of the format takes every entry, to the last byte; ours wants byte tokens too, run.c does not."""
    path = tmp_path / "tokenizer.bin"
    bench_decode.write_tokenizer(path, 300)
    data = path.read_bytes()
    (longest,) = struct.unpack_from("<i", data)
    words, at = [], 4
    while at < len(data):
        _, n = struct.unpack_from("<fi", data, at)
        words.append(data[at + 8 : at + 8 + n])
        at += 8 + n
    assert at == len(data)
    assert len(set(words)) == 300
    assert max(map(len, words)) == longest


def test_decode_program_that_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["decode", "--tokens", "2", "--runc", script(tmp_path, "run", "exit 7")]
    assert bench.main([*argv, *SHAPE, *QUICK]) == 2
    assert "--runc: expected a line 'achieved tok/s: ...'" in capsys.readouterr().err


def test_load(tmp_path: Path) -> None:
    found = measure(tmp_path, "load", "--compare", "jax")
    assert set(found["formats"]) == set(bench_load.FORMATS)
    size = 4 * ModelConfig.from_preset("stories260k", vocab_size=96).n_params()
    for entry in found["formats"].values():
        assert entry["bytes"] > size / 2
        assert entry["ms"] >= entry["min_ms"] > 0
    assert "jax" in found["missing"]


def test_matmul_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "ladder.svg"
    found = measure(tmp_path, "matmul-ladder", "--figure", str(figure), "--compare", "numpy")
    names = [entry["name"] for entry in found["ladder"]]
    assert names == [*bench_ladder.rungs(), "anellm", "numpy"]
    sizes = found["sizes"]
    assert (sizes["M"], sizes["N"], sizes["K"]) == (8, 172, 64)
    for entry in found["ladder"]:
        assert entry["gflops"] == pytest.approx(2 * 8 * 172 * 64 / entry["ms"] / 1e6)
        assert entry["fraction_of_peak"] == pytest.approx(entry["gflops"] / found["peak_gflops"])
    assert "naive" in capsys.readouterr().out
    root = ET.fromstring(figure.read_text())  # our own file
    assert len(root.findall("{*}rect")) == 1 + len(names)


def test_chart_escapes_its_texts() -> None:
    drawing = bench_svg.bar_chart('a < b & "c"', "x/s", [("<n>", 1.0, "&"), ("zero", 0.0, "")], 2.0, "limit > all")
    root = ET.fromstring(drawing)
    texts = ["".join(node.itertext()) for node in root.findall("{*}text")]
    assert 'a < b & "c"' in texts
    assert "<n>" in texts
    assert "limit > all: 2 x/s" in texts
    long = ET.fromstring(bench_svg.bar_chart("t", "u", [("n" * 40, 1.0, "")], 2.0, "limit"))
    assert float(long.findall("{*}rect")[1].attrib["x"]) > 40 * 6 > float(root.findall("{*}rect")[1].attrib["x"])
    assert bench_svg.bar_chart("t", "u", [], 0.0, "none").endswith("</svg>\n")


def test_decode_bytes_leave_a_separate_embedding_out() -> None:
    from anellm.model import Model

    config = ModelConfig.from_preset("stories260k", vocab_size=96, tie_embeddings=False)
    model = Model(config)
    assert bench_decode.weight_bytes(model) == 4 * (config.n_params() - 96 * config.dim)
