"""Train a small model with the Python API, then write with it.

    python examples/train.py [STEPS]

The Trainer of `python -m anellm.train` does the same and more (evaluation, checkpoints, metrics): see the end.
"""

from __future__ import annotations

import sys

import anellm

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
BATCH_SIZE, SEQ_LEN = 8, 128

# The text that comes with the package, already tokenised. TokenDataset.from_file(path) reads yours.
tokenizer = anellm.Tokenizer.shipped()
train_data, val_data = anellm.TokenDataset.shipped().split(val_fraction=0.05)

# 1. A loop of your own: forward, backward, clip, update.
model = anellm.Model.from_preset("tiny", n_layers=2, vocab_size=tokenizer.vocab_size, seed=1)
optimizer = anellm.AdamW(model, learning_rate=3e-3, weight_decay=0.1)
for step in range(STEPS):
    tokens, targets = train_data.batch(1, step, 0, BATCH_SIZE, SEQ_LEN)  # seed 1, this step, micro-step 0
    loss = model.forward(tokens, targets)
    model.backward()
    norm = model.grad_norm().norm
    optimizer.step(3e-3 * min(1.0, (step + 1) / 20), grad_scale=min(1.0, 1.0 / norm))
    if step % 20 == 0 or step == STEPS - 1:
        print(f"step {step:4d}  loss {loss:.3f}  gradient norm {norm:.2f}")

losses = [model.forward(*batch, training=False) for batch in val_data.eval_windows(BATCH_SIZE, SEQ_LEN, 32)]
print(f"validation loss {sum(losses) / len(losses):.3f}")

# Parameters are NumPy views of the model's own memory: read them, or write and say so.
embedding = model.params["model.embed_tokens.weight"]
print(f"embedding {embedding.shape} {embedding.dtype}, standard deviation {embedding.std():.3f}")
embedding *= 1.0
model.weights_changed()

prompt = tokenizer.encode("ROMEO.\n", bos=True)
print(tokenizer.decode([*prompt, *model.generate(prompt, 60, temperature=0.8, seed=1)]))

# 2. The same with the Trainer. Give TrainConfig an `out` to get checkpoints, metrics and exact resumption.
config = anellm.TrainConfig(steps=STEPS, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, learning_rate=3e-3, warmup_steps=20)
trainer = anellm.Trainer(
    anellm.Model.from_preset("tiny", n_layers=2, vocab_size=tokenizer.vocab_size, seed=1), config, train_data, val_data
)
result = trainer.train()
print(f"Trainer: {result.state.step} steps, validation loss {result.state.val_loss:.3f}")
