"""What a training run starts from: tokenizer, model shape, data, and whether it fits into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anellm import checkpoint, tokens
from anellm.bpe_trainer import train_bpe_on
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.documents import read_documents
from anellm.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError
from anellm.machine import available_bytes, human_bytes, human_count
from anellm.model import Memory, memory
from anellm.tokenizer import CHARACTERS, Tokenizer, find_tokenizer_file, load_tokenizer_file
from anellm.tokenizer_base import BaseTokenizer
from anellm.tokenizer_char import CharTokenizer
from anellm.trainer import default_seq_len
from anellm.weights import default_tokenizer, find_tokenizer, load_pretrained

if TYPE_CHECKING:
    from anellm.device import Dtype

DEFAULT_PRESET = "tiny"
SHIPPED_TEXT = Path(__file__).parent / "data" / "shakespeare.txt"  # for other tokenizers than the one that comes along


def load_tokenizer(config: TrainConfig, resumed: Path | None = None) -> BaseTokenizer | None:
    """Return the tokenizer of a run.

    That is the one named, the shipped text's for that text, the one beside the model, the checkpoint or the folder of
    data, or one that is learnt from the text.

    Args:
        config: the options.
        resumed: the checkpoint that training goes on from: its tokenizer stands in for a file that is gone.

    Raises:
        CheckpointError: when the one named is not the checkpoint's.
    """
    path = None if resumed is None else find_tokenizer(resumed)
    kept = None if path is None else load_tokenizer_file(path)
    if resumed is not None and (config.tokenizer is None or (kept is not None and not Path(config.tokenizer).exists())):
        return kept if kept is not None or config.data is not None else Tokenizer.shipped()
    found = _load_tokenizer(config)
    if kept is not None and found is not None and found.sha256 != kept.sha256 and not config.allow_changed_data:
        raise CheckpointError(
            f"{path}: trained with another tokenizer: expected SHA-256 {kept.sha256}, found {found.sha256} "
            f"({config.tokenizer}); --allow-changed-data goes on with it"
        )
    return found


def _load_tokenizer(config: TrainConfig) -> BaseTokenizer | None:
    if config.tokenizer is not None:
        learn = config.tokenizer == CHARACTERS and not Path(CHARACTERS).exists()
        return _learn_characters(config) if learn else load_tokenizer_file(config.tokenizer)
    if config.data is None:
        return Tokenizer.shipped()
    source = None if config.model is None else load_pretrained(config.model)
    path = None if source is None else source.tokenizer_path
    if path is None and Path(config.data).is_dir():
        path = find_tokenizer_file(Path(config.data))  # `anellm prepare` leaves it there
    if path is not None:
        return load_tokenizer_file(path)
    files = tokens.find_data(config.data, "train")
    if source is not None:
        return default_tokenizer(source.config)
    if not tokens.is_text(files[0]):
        return None
    tokenizer = train_bpe_on(text for file in files for text in read_documents(file))
    if not config.quiet:
        print(f"tokenizer  learnt from {config.data}, as none is given: {tokenizer.vocab_size} tokens", flush=True)
    return tokenizer


def _learn_characters(config: TrainConfig) -> CharTokenizer:
    data = config.data or str(SHIPPED_TEXT)
    files = tokens.find_data(data)
    if not tokens.is_text(files[0]):
        raise ConfigError(f"--tokenizer {CHARACTERS}: expected a text in --data, found {data}")
    texts = (text for file in files for text in read_documents(file))
    return CharTokenizer.learn(texts, source=f"the characters of {data}")


def model_config(config: TrainConfig, tokenizer: BaseTokenizer | None, resumed: Path | None = None) -> ModelConfig:
    """Return the shape to train: the model file's, or the preset's with the tokenizer's vocabulary.

    Args:
        config: the options.
        tokenizer: what the data is encoded with.
        resumed: the checkpoint that training goes on from: its shape counts, and a model file need not be there.

    Raises:
        CheckpointError: when the checkpoint is of another shape.
        DataError: when the model's vocabulary is smaller than the tokenizer's; names both.
    """
    if resumed is None:
        return _model_config(config, tokenizer)
    shape = load_pretrained(resumed).config
    if config.model is None or Path(config.model).exists():
        check_resumed_shape(resumed, shape, _model_config(config, tokenizer))
    return shape


def _model_config(config: TrainConfig, tokenizer: BaseTokenizer | None) -> ModelConfig:
    if config.model is None:
        shape = ModelConfig.from_preset(config.preset or DEFAULT_PRESET)
        return shape if tokenizer is None else shape.replace(vocab_size=tokenizer.vocab_size)
    shape = load_pretrained(config.model).config
    if tokenizer is not None and tokenizer.vocab_size > shape.vocab_size:
        raise DataError(
            f"{tokenizer.source}: vocabulary: expected at most {shape.vocab_size} tokens, "
            f"as {config.model} has, found {tokenizer.vocab_size}"
        )
    return shape


def load_data(
    config: TrainConfig, shape: ModelConfig, tokenizer: BaseTokenizer | None
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
    config: TrainConfig, vocab_size: int, tokenizer: BaseTokenizer | None
) -> tuple[TokenDataset, TokenDataset | None]:
    if config.data is None and (tokenizer is None or tokenizer.sha256 == Tokenizer.shipped().sha256):
        data = TokenDataset.shipped()
        data.check_ids(vocab_size)
    elif config.data is None:
        data = TokenDataset.from_file(SHIPPED_TEXT, vocab_size=vocab_size, tokenizer=tokenizer)
    else:
        data = TokenDataset.from_file(config.data, config.token_dtype, vocab_size, tokenizer, "train")
    held_out = config.val_data
    if held_out is None and config.data is not None and tokens.has_held_out(config.data):
        held_out = config.data
    if held_out is not None:
        return data, TokenDataset.from_file(held_out, config.token_dtype, vocab_size, tokenizer, "val")
    return data.split(val_fraction=config.val_fraction) if config.val_fraction > 0 else (data, None)


def forecast(config: TrainConfig, shape: ModelConfig) -> tuple[Memory, dict[str, Any]]:
    """Return a run's memory, and with it what --dry-run reports."""
    seq_len = default_seq_len(config, shape.max_seq_len)
    dtype = cast("Dtype", config.dtype)
    need = memory(
        shape,
        config.batch_size,
        seq_len,
        training=True,
        dtype=dtype,
        activation_checkpoint=config.activation_checkpoint,
        ane=config.ane_options(),
    )
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


def check_resumed_shape(resumed: Path, saved: ModelConfig, wanted: ModelConfig) -> None:
    """Refuse to resume a checkpoint of another shape.

    Raises:
        CheckpointError: naming the fields that differ.
    """
    ours, theirs = wanted.to_dict(), saved.to_dict()
    wrong = [f"{key}: expected {theirs[key]}, found {ours[key]}" for key in ours if ours[key] != theirs[key]]
    if wrong:
        path = resumed / checkpoint.MODEL_CONFIG
        raise CheckpointError(f"{path}: another model's checkpoint: {'; '.join(wrong)}")
