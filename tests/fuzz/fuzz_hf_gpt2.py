"""Fuzz a reader (see targets.py): python tests/fuzz/fuzz_hf_gpt2.py -max_total_time=180."""

from harness import run

run("hf_gpt2")
