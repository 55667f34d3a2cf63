"""Write GPT-2 files with PyTorch and transformers, for tests of what reads them: the folder ``gpt2`` beside this file.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/make_gpt2_files.py

The model is random and small: 2 layers, dim 16, 2 heads, 37 tokens, 12 positions. ``hf`` is what save_pretrained()
writes, ``body`` the same without the classifier (GPT2Model: names without their prefix), in bfloat16. ``v3.bin`` and
``state.bin`` are in llm.c's layouts (github.com/karpathy/llm.c, train_gpt2.py): its model file of version 3 and its
debug state of version 2, with logits, loss and gradients by PyTorch, and after them (not llm.c's) in ``losses.json``
the losses of ten steps of AdamW as in its test_gpt2.c (lr 1e-4, betas .9 and .999, eps 1e-8, weight decay .01 on all).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent / "gpt2"
V, C, L, NH, T_MAX = 37, 16, 2, 2, 12
B, T = 2, 8
PARTS = [f"{name}.{kind}" for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
         for kind in ("weight", "bias")]  # fmt: skip
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in transformers, (out, in) in llm.c


def tensors(values: dict[str, torch.Tensor]) -> bytes:
    """Return tensors in llm.c's order, wte padded with zeros to 128 rows."""
    names = ["wte.weight", "wpe.weight", *(f"h.{i}.{part}" for part in PARTS for i in range(L)),
             "ln_f.weight", "ln_f.bias"]  # fmt: skip
    parts = []
    for name in names:
        value = values["transformer." + name].detach()
        value = value.T.contiguous() if name.endswith(CONV1D) else value
        value = torch.nn.functional.pad(value, (0, 0, 0, -V % 128)) if name == "wte.weight" else value
        parts.append(value.numpy().astype("<f4").tobytes())
    return b"".join(parts)


def header(*values: int) -> bytes:
    """Return 256 int32."""
    return struct.pack(f"<{len(values)}i", *values).ljust(1024, b"\0")


def main() -> None:
    """Write the files."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    config = GPT2Config(vocab_size=V, n_positions=T_MAX, n_embd=C, n_layer=L, n_head=NH, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * 0.3 + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
    model.save_pretrained(HERE / "hf")
    (HERE / "hf" / "generation_config.json").unlink(missing_ok=True)
    model.transformer.to(torch.bfloat16).save_pretrained(HERE / "body")
    model = GPT2LMHeadModel.from_pretrained(HERE / "hf").train()
    params = dict(model.named_parameters())
    (HERE / "v3.bin").write_bytes(header(20240326, 3, T_MAX, V, L, NH, C, 128) + tensors(params))
    tokens = torch.randint(0, V, (B, T + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), y.reshape(-1))
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            grads = {name: value.grad for name, value in model.named_parameters()}
            ids = np.stack([x.numpy(), y.numpy()]).astype("<i4").tobytes()
            numbers = logits.detach().numpy().astype("<f4").tobytes() + struct.pack("<f", loss.item())
            (HERE / "state.bin").write_bytes(header(20240327, 2, B, T) + ids + numbers + tensors(grads))
        optimizer.step()
    (HERE / "losses.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
