"""Fuzz a reader (see targets.py): python tests/fuzz/fuzz_state.py -max_total_time=180."""

from harness import run

run("state")
