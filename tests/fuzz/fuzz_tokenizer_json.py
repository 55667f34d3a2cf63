"""Fuzz a reader (see targets.py): python tests/fuzz/fuzz_tokenizer_json.py -max_total_time=180."""

from harness import run

run("tokenizer_json")
