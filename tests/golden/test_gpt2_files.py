"""GPT-2 files that transformers and PyTorch wrote (make_gpt2_files.py): read, and computed with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anellm import convert, debug_state, weights
from anellm.model import Model
from anellm.optim import AdamW

FOLDER = Path(__file__).parent / "gpt2"
LOSSES = json.loads((FOLDER / "losses.json").read_text(encoding="utf-8"))


def test_the_directory_and_llm_cs_file_are_the_same_model() -> None:
    ours, theirs, body = (weights.load_pretrained(FOLDER / name) for name in ("hf", "v3.bin", "body"))
    assert (ours.config.arch, ours.config.vocab_size, ours.config.padded_vocab_size) == ("gpt2", 37, 37)
    assert theirs.config == ours.config.replace(padded_vocab_size=128)
    assert body.config == ours.config
    for (name, a), (other, b), (third, c) in zip(ours.tensors, theirs.tensors, body.tensors, strict=True):
        assert name == other == third
        np.testing.assert_array_equal(a, b[: a.shape[0]])
        np.testing.assert_allclose(c, a, rtol=2**-8)  # body is bfloat16


@pytest.mark.parametrize("name", ["hf", "v3.bin"])
def test_logits_gradients_and_ten_losses(name: str) -> None:
    model = Model.from_pretrained(FOLDER / name, device="cpu")
    state = debug_state.read(FOLDER / "state.bin", model.config)
    np.testing.assert_allclose(model.forward(state.tokens), state.logits, rtol=0, atol=1e-5)
    model.enable_training()
    optimizer = AdamW(model, 1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decay="all")
    for step, expected in enumerate(LOSSES):
        loss = model.forward(state.tokens, state.targets, training=True)
        model.backward()
        assert abs(loss - expected) < 1e-5
        if step == 0:
            assert abs(loss - state.loss) < 1e-5
            for tensor, gradient in state.grads.items():
                error = np.abs(model.grads[tensor] - gradient).max()
                assert error <= 1e-5 * np.abs(gradient).max(), tensor
        optimizer.step(1e-4)


def test_what_is_written_is_what_pytorch_wrote(tmp_path: Path) -> None:
    for source in ("hf", "v3.bin"):
        out = tmp_path / source
        words = ["--model", str(FOLDER / source), "--out", str(out), "--format", "llmc", "--overwrite"]
        assert convert.main(words) == 0
        assert out.read_bytes() == (FOLDER / "v3.bin").read_bytes()
    model = Model.from_pretrained(FOLDER / "v3.bin", device="cpu")
    state = debug_state.read(FOLDER / "state.bin", model.config)
    debug_state.write(tmp_path / "state.bin", state, model.config)
    assert (tmp_path / "state.bin").read_bytes() == (FOLDER / "state.bin").read_bytes()
