"""Fuzz a reader (see targets.py): python tests/fuzz/fuzz_optimizer_state.py -max_total_time=180."""

from harness import run

run("optimizer_state")
