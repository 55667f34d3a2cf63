"""What a training run starts from: tokenizer, model shape, data, and whether it fits into memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anellm import checkpoint, safeio
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.errors import CheckpointError, DataError, OutOfMemoryError
from anellm.machine import available_bytes, human_bytes, human_count
from anellm.model import Memory, memory
from anellm.tokenizer import Tokenizer
from anellm.trainer import default_seq_len
from anellm.weights import load_pretrained

DEFAULT_PRESET = "tiny"


def load_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """Return the tokenizer of a run: the one named, the shipped text's, or the one beside the model or checkpoint."""
    if config.tokenizer is not None:
        return Tokenizer.from_file(config.tokenizer)
    if config.data is None:
        return Tokenizer.shipped()
    path = load_pretrained(config.model).tokenizer_path if config.model is not None else None
    return None if path is None else Tokenizer.from_file(path)


def model_config(config: TrainConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Return the shape to train: the model file's, or the preset's with the tokenizer's vocabulary.

    Raises:
        DataError: when the model's vocabulary is smaller than the tokenizer's; names both.
    """
    if config.model is None:
        shape = ModelConfig.from_preset(config.preset or DEFAULT_PRESET)
        return shape if tokenizer is None else shape.replace(vocab_size=tokenizer.vocab_size)
    shape = load_pretrained(config.model).config
    if tokenizer is not None and tokenizer.vocab_size > shape.vocab_size:
        raise DataError(
            f"{config.tokenizer or 'the shipped tokenizer'}: vocabulary: expected at most {shape.vocab_size} tokens, "
            f"as {config.model} has, found {tokenizer.vocab_size}"
        )
    return shape


def load_data(
    config: TrainConfig, shape: ModelConfig, tokenizer: Tokenizer | None
) -> tuple[TokenDataset, TokenDataset | None]:
    """Return the training and held-out tokens; None when nothing is held out.

    Raises:
        DataError: when a file is damaged, holds an id outside the vocabulary, or a part is shorter than a window.
    """
    train_data, val_data = _open_data(config, shape.vocab_size, tokenizer)
    seq_len = default_seq_len(config, shape.max_seq_len)
    train_data.check_window(seq_len)
    if val_data is not None:
        try:
            val_data.check_window(seq_len)
        except DataError as error:
            part = (
                "--val-data" if config.val_data else f"the part that --val-fraction {config.val_fraction:g} holds out"
            )
            raise DataError(f"{part}: {error}") from None
    return train_data, val_data


def _open_data(
    config: TrainConfig, vocab_size: int, tokenizer: Tokenizer | None
) -> tuple[TokenDataset, TokenDataset | None]:
    if config.data is None:
        data = TokenDataset.shipped()
        data.check_ids(vocab_size)
    else:
        data = TokenDataset.from_file(config.data, config.token_dtype, vocab_size, tokenizer)
    if config.val_data is not None:
        return data, TokenDataset.from_file(config.val_data, config.token_dtype, vocab_size, tokenizer)
    return data.split(val_fraction=config.val_fraction) if config.val_fraction > 0 else (data, None)


def forecast(config: TrainConfig, shape: ModelConfig) -> tuple[Memory, dict[str, Any]]:
    """Return a run's memory, and with it what --dry-run reports."""
    seq_len = default_seq_len(config, shape.max_seq_len)
    need = memory(shape, config.batch_size, seq_len, training=True)
    tokens = config.batch_size * seq_len * config.gradient_accumulation_steps
    return need, {
        "model": shape.to_dict(),
        "n_params": shape.n_params(),
        **need._asdict(),
        "available_bytes": available_bytes(),
        "tokens_per_step": tokens,
        "flops_per_token": shape.flops_per_token(seq_len),
        "flops_per_step": shape.flops_per_token(seq_len) * tokens,
    }


def print_forecast(values: Mapping[str, Any]) -> None:
    """Print what --dry-run reports."""
    print(f"parameters   {human_count(values['n_params'])} ({values['n_params']})")
    for name in ("params", "grads", "moments", "activations", "workspace", "total"):
        print(f"{name:12} {human_bytes(values[name + '_bytes'])}")
    free = values["available_bytes"]
    print(f"available    {'unknown' if free is None else human_bytes(free)}")
    print(f"FLOPs        {values['flops_per_step']:.4g} a step of {values['tokens_per_step']} tokens")


def check_fits(need: Memory) -> None:
    """Refuse a model that is known not to fit, before any memory is taken for it.

    Raises:
        OutOfMemoryError: saying how much is needed for what, and how much there is.
    """
    free = available_bytes()
    if free is not None and need.total_bytes > free:
        raise OutOfMemoryError(
            f"this needs {human_bytes(need.total_bytes)} (of them activations {human_bytes(need.activations_bytes)}), "
            f"and {human_bytes(free)} are available; try a smaller --preset, --batch-size or --seq-len"
        )


def check_resumed_shape(found: checkpoint.Checkpoint, shape: ModelConfig) -> None:
    """Refuse to resume a checkpoint of another shape.

    Raises:
        CheckpointError: naming the fields that differ.
    """
    path = found.path / checkpoint.MODEL_CONFIG
    saved = ModelConfig.from_hf(safeio.read_json(path, CheckpointError), str(path))
    ours, theirs = shape.to_dict(), saved.to_dict()
    wrong = [f"{key}: expected {theirs[key]}, found {ours[key]}" for key in ours if ours[key] != theirs[key]]
    if wrong:
        raise CheckpointError(f"{path}: another model's checkpoint: {'; '.join(wrong)}")
