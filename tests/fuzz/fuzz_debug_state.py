"""Fuzz a reader (see targets.py): python tests/fuzz/fuzz_debug_state.py -max_total_time=180."""

from harness import run

run("debug_state")
