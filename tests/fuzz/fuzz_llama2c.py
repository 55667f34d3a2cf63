"""Fuzz a reader (see targets.py): python tests/fuzz/fuzz_llama2c.py -max_total_time=180."""

from harness import run

run("llama2c")
