"""Train on the simulated Neural Engine, beside the CPU, and see what it says when it fails.

python examples/ane_sim.py [STEPS]
"""

from __future__ import annotations

import sys

import anellm

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
tokenizer = anellm.Tokenizer.shipped()
train_data, val_data = anellm.TokenDataset.shipped().split(val_fraction=0.05)
config = anellm.TrainConfig(steps=STEPS, batch_size=4, seq_len=64, warmup_steps=20, eval_interval=0, eval_windows=16)


def new_model() -> anellm.Model:
    """Return the same new model each time."""
    return anellm.Model.from_preset("tiny", n_layers=2, vocab_size=tokenizer.vocab_size, seed=1)


# 1. The same run on the CPU and on the engine of an M4.
for device in ("cpu", "ane-sim"):
    result = anellm.Trainer(new_model(), config, train_data, val_data, device=device).train()
    print(f"{device:8} loss {result.loss:.4f}, validation loss {result.state.val_loss:.4f}")
print(f"of the FLOPs on the engine: {result.ane['ane_flops_share']:.1%}")
print(f"the chip's part of a step, by the model of its times: {result.ane['modelled_ms_per_step']:.2f} ms")

# 2. A model of your own: move it, run it, look at the counters.
model = new_model().to("ane-sim", anellm.AneOptions(chip="m1", numerics="exact"))
tokens, targets = train_data.batch(1, 0, 0, 4, 64)
print(f"{model.ane.device}: loss {model.forward(tokens, targets):.4f}")
model.backward(2.0**8)  # gradients of 256 times the loss
print(f"gradient norm {model.grad_norm(2.0**-8).norm:.4f}")
print(model.ane.stats())


# 3. An engine that overflows twice in the third step: the step is skipped and named, and the run goes on.
def watch(record) -> None:
    """Make the engine fail behind step 2, and show what was skipped."""
    if record["kind"] == "step" and record["step"] == 2:
        trainer.model.ane.device.simulator.inject("eval-inf", after=6, count=2)
    if record["kind"] == "skip":
        print(f"step {record['step']} skipped: {record['message']}")


config = anellm.TrainConfig(steps=6, batch_size=4, seq_len=64)
trainer = anellm.Trainer(new_model(), config, train_data, device="ane-sim", callbacks=[watch])
print(f"{trainer.train().state.skipped_steps} of 6 steps skipped")
