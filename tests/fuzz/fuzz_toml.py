"""Fuzz a reader (see targets.py): python tests/fuzz/fuzz_toml.py -max_total_time=180."""

from harness import run

run("toml")
