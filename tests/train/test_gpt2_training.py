"""Training a GPT-2 on token ids: it learns, evaluates, goes on writing, and is refused where it cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm.__main__ import main
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.model import Model
from anellm.trainer import Trainer

# Counts up and wraps: what comes next is certain.
IDS = (np.arange(4000) % 65).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_trainer_teaches_it_to_count(dtype: str, compact: bool) -> None:
    records: list[dict[str, Any]] = []
    config = TrainConfig(
        preset="gpt2-char",
        steps=40,
        batch_size=4,
        seq_len=32,
        learning_rate=3e-3,
        warmup_steps=4,
        gradient_accumulation_steps=2,
        eval_interval=20,
        sample_tokens=0,
        dtype=dtype,
        activation_checkpoint="sqrt",
        compact_vocab=compact,
    )
    model = Model.from_preset("gpt2-char", seed=1, n_layers=2, vocab_size=90, padded_vocab_size=128)
    Trainer(model, config, TokenDataset(IDS), TokenDataset(IDS[:300]), callbacks=[records.append]).train()
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(np.log(90), abs=0.1)
    assert losses[-1] < 0.5
    assert model.generate([3, 4, 5], 20, temperature=0.0, stop_ids=()) == list(range(6, 26))
    assert not model.params["transformer.wte.weight"][90:].any()


def test_a_dry_run_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    IDS.tofile(tmp_path / "ids.bin")
    flags = ["train", "--preset", "gpt2-char", "--data", str(tmp_path / "ids.bin"), "--batch-size", "12", "--dry-run"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    config = ModelConfig.from_preset("gpt2-char")
    assert f"({config.n_params()})" in out
    assert f"{config.flops_per_token(64) * 12 * 64:.4g} a step of 768 tokens" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train", "--seq-len", "65", "--out", "r"], "65"),
    ],
)
def test_what_it_cannot_do_is_refused(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    IDS.tofile(tmp_path / "ids.bin")
    assert main([*flags, "--preset", "gpt2-char", "--data", "ids.bin"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
