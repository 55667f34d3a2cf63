"""csrc/kernels/table.inc against the source: every kernel is listed, defined and called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anellm._ffi import lib, text

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "kernels"
pytestmark = pytest.mark.skipif(not KERNELS.is_dir(), reason=f"no C source at {KERNELS}")

ROW = re.compile(r"^ANELLM_VARIANT\((\w+), (\w+), ([\w |]+)\)$", re.MULTILINE)
DEFINITION = re.compile(r"^(?!static |.*\bstatic )[A-Za-z][\w *]*\b([a-z]\w*)__([a-z0-9]+)\([^;\n]*$", re.MULTILINE)


def table() -> str:
    return (KERNELS / "table.inc").read_text(encoding="utf-8")


def rows() -> list[tuple[str, str, str]]:
    """Return (kernel, variant, features) of every row."""
    return ROW.findall(table())


def listed() -> list[str]:
    return re.findall(r"^ANELLM_KERNEL\((\w+)\)$", table(), re.MULTILINE)


def test_every_line_is_understood() -> None:
    lines = [line for line in table().splitlines() if re.match(r"\s*ANELLM_", line)]
    assert len(lines) == len(rows()) + len(listed())
    assert len(rows()) > 20


def test_each_kernel_is_listed_once_with_a_portable_variant_first() -> None:
    names = listed()
    assert len(set(names)) == len(names)
    order: dict[str, list[str]] = {name: [] for name in names}
    current = ""
    for line in table().splitlines():
        if match := re.match(r"ANELLM_KERNEL\((\w+)\)", line):
            current = match[1]
        elif match := ROW.match(line):
            assert match[1] == current, f"{line}: outside the rows of its kernel"
            order[current].append(match[2])
    for name, variants in order.items():
        assert variants[0] == "portable", name
        assert len(set(variants)) == len(variants), name


def test_rows_and_definitions_are_the_same_set() -> None:
    defined = {}
    for path in sorted(KERNELS.glob("*.c")):
        for kernel, variant in DEFINITION.findall(path.read_text(encoding="utf-8")):
            assert (kernel, variant) not in defined, f"{kernel}__{variant} is defined twice"
            defined[kernel, variant] = path.stem
            suffix = "" if variant == "portable" else f"_{variant}"
            assert path.stem.endswith(suffix), f"{kernel}__{variant} is in {path.name}"
    assert set(defined) == {(kernel, variant) for kernel, variant, _ in rows()}


def test_variants_are_ranked_and_name_their_features() -> None:
    ranks = set(re.findall(r"ANELLM_RANK_(\w+) =", (KERNELS / "dispatch.h").read_text(encoding="utf-8")))
    for kernel, variant, features in rows():
        assert variant in ranks, f"{kernel}: no rank for {variant}"
        assert (features.strip() == "0") == (variant in ("portable", "naive")), f"{kernel}__{variant}"


def test_every_kernel_is_called_through_the_table() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in KERNELS.parent.rglob("*.c"))
    for kernel in listed():
        assert re.search(rf"->{kernel}\b", code), f"{kernel} is in the table, but nothing calls it"


def test_the_tiers_offered_are_those_with_rows() -> None:
    features = set(text(lib.anellm_cpu_features()).split(","))
    needed = {"ANELLM_CPU_" + name.upper() for name in features}
    runnable = {variant for _, variant, needs in rows() if needs == "0" or set(needs.split(" | ")) <= needed}
    assert set(text(lib.anellm_cpu_variants()).split(",")) == runnable - {"naive"}
