"""The model as a whole: layout, invariants that need no reference, and refusal of bad input.

Agreement with PyTorch is tests/golden's business, agreement of single kernels with float64 tests/kernels'.
"""

from __future__ import annotations

import contextlib
import gc
import threading

import numpy as np
import pytest

from anellm import errors
from anellm._ffi import check, lib
from anellm.config import ModelConfig
from anellm.device import DTYPES
from anellm.model import IGNORE_INDEX, Model, memory, tensor_table

GQA = ModelConfig(
    dim=48, hidden_dim=100, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, vocab_size=97, max_seq_len=64
)
QK_NORM = ModelConfig(
    dim=32,
    hidden_dim=50,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=12,
    vocab_size=61,
    max_seq_len=40,
    tie_embeddings=False,
    qk_norm=True,
)


def batch(config: ModelConfig, B: int, T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def randomize_norms(model: Model, seed: int = 3) -> None:
    rng = np.random.default_rng(seed)
    for tensor in model.tensors:
        if tensor.kind == "vector":
            model.params[tensor.name][...] = rng.uniform(0.5, 1.5, tensor.shape)
    model.weights_changed()


def gradients(model: Model) -> dict[str, np.ndarray]:
    return {name: g.copy() for name, g in model.grads.items()}


@pytest.mark.parametrize("config", [GQA, QK_NORM], ids=["gqa", "qk_norm"])
def test_tensor_table_is_contiguous_and_counts_agree(config: ModelConfig) -> None:
    table = tensor_table(config)
    offset = 0
    for tensor in table:
        assert tensor.offset == offset
        offset += int(np.prod(tensor.shape))
    assert offset == config.n_params()
    names = [t.name for t in table]
    assert len(set(names)) == len(names)
    assert ("lm_head.weight" in names) == (not config.tie_embeddings)
    assert ("model.layers.1.self_attn.q_norm.weight" in names) == config.qk_norm
    kinds = {t.name: t.kind for t in table}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["model.norm.weight"] == "vector"
    assert kinds["model.layers.0.mlp.down_proj.weight"] == "matrix"


def test_init_is_a_pure_function_of_the_seed() -> None:
    a, b, c = Model(GQA, seed=5), Model(GQA, seed=5), Model(GQA, seed=6)
    for tensor in a.tensors:
        np.testing.assert_array_equal(a.params[tensor.name], b.params[tensor.name])
        if tensor.kind == "vector":
            assert (a.params[tensor.name] == 1).all()
        else:
            assert (a.params[tensor.name] != c.params[tensor.name]).mean() > 0.99
            writes_residual = tensor.name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / (np.sqrt(2 * GQA.n_layers) if writes_residual else 1)
            assert a.params[tensor.name].std() == pytest.approx(expected, rel=0.1)


def test_first_loss_of_random_tokens_is_that_of_a_uniform_guess() -> None:
    model = Model(GQA, seed=1)
    assert model.forward(*batch(GQA, 4, 32)) == pytest.approx(np.log(GQA.vocab_size), abs=0.05)


@pytest.mark.parametrize("config", [GQA, QK_NORM], ids=["gqa", "qk_norm"])
def test_same_bytes_for_any_number_of_threads_and_run_twice(config: ModelConfig) -> None:
    tokens, targets = batch(config, 3, 29)
    seen = []
    threads = lib.anellm_get_threads()
    try:
        for n in (1, 2, 3, 2):
            lib.anellm_set_threads(n)
            model = Model(config, seed=2)
            randomize_norms(model)
            loss = model.forward(tokens, targets)
            model.backward()
            seen.append((loss, b"".join(g.tobytes() for g in model.grads.values()), model.grad_norm()))
    finally:
        lib.anellm_set_threads(threads)
    assert all(s == seen[0] for s in seen[1:])


@pytest.mark.parametrize("config", [GQA, QK_NORM], ids=["gqa", "qk_norm"])
def test_accumulation_equals_the_big_batch(config: ModelConfig) -> None:
    model = Model(config, seed=2)
    randomize_norms(model)
    tokens, targets = batch(config, 4, 17)
    model.forward(tokens, targets)
    model.backward()
    big = gradients(model)
    for micro in range(4):
        model.forward(tokens[micro : micro + 1], targets[micro : micro + 1])
        model.backward(0.25, accumulate=micro > 0)
    for name, g in model.grads.items():
        assert np.linalg.norm(g - big[name]) <= 1e-6 * np.linalg.norm(big[name]), name


def test_backward_overwrites_what_was_there_unless_it_accumulates() -> None:
    model = Model(GQA, seed=2)
    tokens, targets = batch(GQA, 2, 11)
    model.enable_training()
    for g in model.grads.values():
        g[...] = np.nan
    model.forward(tokens, targets)
    model.backward()
    once = gradients(model)
    assert all(np.isfinite(g).all() for g in once.values())
    model.forward(tokens, targets)
    model.backward(accumulate=True)
    for name, g in model.grads.items():
        np.testing.assert_allclose(g, 2 * once[name], rtol=1e-5, atol=1e-9)


def test_chunked_classifier_equals_the_one_that_keeps_all_logits() -> None:
    # 2 * 165 * 260,000 logits take more than 320 MiB, so they are computed in chunks; those of half the batch are kept.
    # The bound allows for sums of 260,000 terms in another order.
    config = ModelConfig(dim=4, hidden_dim=6, n_layers=1, n_heads=1, vocab_size=260_000, max_seq_len=165)
    model = Model(config, seed=4)
    tokens, targets = batch(config, 2, 165)
    whole = model.forward(tokens, targets)
    model.backward()
    chunked = gradients(model)
    parts = [model.forward(tokens[i : i + 1], targets[i : i + 1]) for i in range(2)]
    assert whole == pytest.approx(np.mean(parts), rel=1e-6)
    for i in range(2):
        model.forward(tokens[i : i + 1], targets[i : i + 1])
        model.backward(0.5, accumulate=i > 0)
    for name, g in model.grads.items():
        assert np.linalg.norm(g - chunked[name]) <= 1e-5 * np.linalg.norm(chunked[name]), name


def test_inference_equals_training_forward_and_logits_give_the_loss() -> None:
    model = Model(QK_NORM, seed=2)
    randomize_norms(model)
    tokens, targets = batch(QK_NORM, 2, 23)
    loss = model.forward(tokens, targets)
    assert model.forward(tokens, targets, training=False) == loss
    logits = model.forward(tokens).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    per_token = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(model.loss_per_token(tokens, targets), per_token, atol=1e-5)
    assert loss == pytest.approx(per_token.mean(), abs=1e-6)


def test_ignored_targets_are_left_out() -> None:
    model = Model(GQA, seed=2)
    tokens, targets = batch(GQA, 2, 19)
    targets[0, 3:] = IGNORE_INDEX
    losses = model.loss_per_token(tokens, targets)
    assert (losses[targets == IGNORE_INDEX] == 0).all()
    kept = targets != IGNORE_INDEX
    assert model.forward(tokens, targets) == pytest.approx(losses[kept].astype(np.float64).mean(), rel=1e-6)
    targets[...] = IGNORE_INDEX
    assert model.forward(tokens, targets) == 0.0
    model.backward()
    assert model.grad_norm() == (0.0, 0, None)


@pytest.mark.parametrize("config", [GQA, QK_NORM], ids=["gqa", "qk_norm"])
@pytest.mark.parametrize("pieces", [[1] * 20, [20], [7, 1, 12], [3, 17]])
def test_decoding_with_a_cache_equals_the_whole_forward(config: ModelConfig, pieces: list[int]) -> None:
    model = Model(config, seed=9)
    randomize_norms(model)
    for tensor in model.tensors:  # larger weights: logits that differ from place to place
        if tensor.kind != "vector":
            model.params[tensor.name][...] *= 8
    model.weights_changed()
    tokens, _ = batch(config, 1, sum(pieces))
    logits = model.forward(tokens)[0]
    cache, at = model.kvcache(sum(pieces)), 0
    for n in pieces:
        got = model.decode(cache, tokens[0, at : at + n])
        at += n
        np.testing.assert_allclose(got, logits[at - 1], atol=2e-4 * np.abs(logits).max())
        assert len(cache) == at
    with pytest.raises(errors.InvalidError, match="do not fit the cache"):
        model.decode(cache, tokens[0, :1])
    cache.truncate(5)
    np.testing.assert_allclose(model.decode(cache, tokens[0, 5:9]), logits[8], atol=2e-4 * np.abs(logits).max())


def test_prompts_longer_than_a_decode_chunk() -> None:
    config = GQA.replace(max_seq_len=200)
    model = Model(config, seed=9)
    tokens, _ = batch(config, 1, 150)
    np.testing.assert_allclose(model.decode(model.kvcache(150), tokens[0]), model.forward(tokens)[0, -1], atol=1e-5)


def test_bad_tokens_are_refused_before_anything_is_written() -> None:
    model = Model(GQA, seed=2)
    tokens, targets = batch(GQA, 2, 8)
    model.forward(tokens, targets)
    model.backward()
    before = gradients(model)
    for bad in (-1, GQA.vocab_size, 2**31 - 1, IGNORE_INDEX):
        wrong = tokens.copy()
        wrong[1, 2] = bad
        with pytest.raises(IndexError, match=rf"tokens\[10\] = {bad}, must be 0..96"):
            model.forward(wrong, targets)
    wrong = targets.copy()
    wrong[0, 7] = 97
    with pytest.raises(errors.TokenRangeError, match=r"targets\[7\] = 97"):
        model.forward(tokens, wrong)
    cache = model.kvcache(4)
    with pytest.raises(errors.TokenRangeError, match=r"tokens\[1\] = 500"):
        model.decode(cache, np.array([1, 500], np.int32))
    assert len(cache) == 0
    for name, g in model.grads.items():
        np.testing.assert_array_equal(g, before[name])


def test_bad_arguments_name_what_is_wrong() -> None:
    model = Model(GQA, seed=2)
    tokens, targets = batch(GQA, 2, 8)
    with pytest.raises(errors.InvalidError, match="tokens: expected dtype int32, found int64"):
        model.forward(tokens.astype(np.int64), targets)
    with pytest.raises(errors.InvalidError, match=r"targets: expected shape \(2, 8\), found \(2, 7\)"):
        model.forward(tokens, np.ascontiguousarray(targets[:, 1:]))
    with pytest.raises(errors.InvalidError, match="C-contiguous"):
        model.forward(tokens[:, ::2], np.ascontiguousarray(targets[:, ::2]))
    with pytest.raises(errors.InvalidError, match="expected a \\(B, T\\) int32 array"):
        model.forward(tokens[0])
    with pytest.raises(errors.InvalidError, match="T = 65, must be 1..64"):
        model.forward(np.zeros((1, 65), np.int32))
    with pytest.raises(errors.InvalidError, match="T = 0"):
        model.forward(np.zeros((1, 0), np.int32))
    with pytest.raises(errors.InvalidError, match="must be finite"):
        model.backward(float("nan"))
    with pytest.raises(errors.InvalidError, match="max_tokens = 65"):
        model.kvcache(65)
    with pytest.raises(errors.InvalidError, match="device: expected one of auto, cpu, ane, ane-sim, found 'tpu'"):
        Model(GQA, device="tpu")
    with pytest.raises(errors.UnavailableError, match="device ane: "):
        Model(GQA, device="ane")
    with pytest.raises(errors.InvalidError, match="another shape"):
        model.decode(Model(QK_NORM).kvcache(4), tokens[0, :1])
    cache = model.kvcache(4)
    with pytest.raises(errors.InvalidError, match="length = 1, must be 0..0"):
        cache.truncate(1)
    cache.close()
    with pytest.raises(errors.InvalidError, match="cache is closed"):
        model.decode(cache, tokens[0, :1])


def test_backward_needs_a_fresh_training_forward() -> None:
    model = Model(GQA, seed=2)
    tokens, targets = batch(GQA, 1, 8)
    with pytest.raises(errors.InvalidError, match="training is not enabled"):
        _ = model.grads
    with pytest.raises(errors.InvalidError, match="no training forward"):
        model.backward()
    model.forward(tokens, targets, training=False)
    with pytest.raises(errors.InvalidError, match="no training forward"):
        model.backward()
    model.forward(tokens, targets)
    model.backward()
    with pytest.raises(errors.InvalidError, match="each forward serves one backward"):
        model.backward()
    model.forward(tokens, targets)
    model.forward(tokens)  # an evaluation in between takes the activations' place
    with pytest.raises(errors.InvalidError, match="no training forward"):
        model.backward()
    model.forward(tokens, targets)
    model.weights_changed()
    with pytest.raises(errors.InvalidError, match="new weights need a new forward"):
        model.backward()


def test_nonfinite_gradients_are_counted_and_named() -> None:
    model = Model(GQA, seed=2)
    model.forward(*batch(GQA, 1, 8))
    model.backward()
    norm = model.grad_norm()
    expected = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in model.grads.values()))
    assert norm.norm == pytest.approx(expected, rel=1e-9)
    assert model.grad_norm(0.5).norm == pytest.approx(expected / 2, rel=1e-9)
    model.grads["model.layers.1.self_attn.v_proj.weight"][2, 3] = np.inf
    model.grads["model.layers.2.mlp.up_proj.weight"][0, :2] = np.nan
    bad = model.grad_norm()
    assert (bad.n_nonfinite, bad.tensor) == (3, "model.layers.1.self_attn.v_proj.weight")


def test_views_keep_the_memory_alive() -> None:
    view = Model(GQA, seed=2).params["model.norm.weight"]
    gc.collect()
    assert (view == 1).all()
    view[...] = 2
    assert (view == 2).all()


def test_params_are_shared_with_dlpack_and_torch() -> None:
    model = Model(GQA, seed=2)
    name = "model.layers.0.self_attn.o_proj.weight"
    shared = np.from_dlpack(model.params[name])
    shared[0, 0] = 7
    assert model.params[name][0, 0] == 7
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: interop with it is not checked")
    tensor = torch.from_numpy(model.params[name])
    tensor[1, 1] = 9
    assert model.params[name][1, 1] == 9


def test_a_model_in_use_by_another_thread_is_busy() -> None:
    config = ModelConfig(dim=256, hidden_dim=1024, n_layers=4, n_heads=4, vocab_size=4096, max_seq_len=512)
    model = Model(config, seed=1)
    tokens, targets = batch(config, 4, 512)
    busy, results = 0, []
    barrier = threading.Barrier(2)

    def run() -> None:
        barrier.wait()
        while not results:  # the other thread may have it at the moment
            with contextlib.suppress(errors.BusyError):
                results.append(model.forward(tokens, targets))

    worker = threading.Thread(target=run)
    worker.start()
    barrier.wait()
    while worker.is_alive():
        try:
            model.weights_changed()
        except errors.BusyError:
            busy += 1
    worker.join()
    assert busy > 0
    assert results[0] == model.forward(tokens, targets)


def test_memory_forecast_and_inference_takes_parameters_only() -> None:
    forecast = memory(GQA, 2, 16, training=True)
    assert forecast.params_bytes == 4 * GQA.n_params() == forecast.grads_bytes
    assert forecast.moments_bytes == 2 * forecast.params_bytes
    assert forecast.total_bytes == sum(forecast[:-1])
    lean = memory(GQA, 2, 16, training=False)
    assert lean.grads_bytes == lean.moments_bytes == 0
    assert lean.activations_bytes < forecast.activations_bytes
    with pytest.raises(errors.InvalidError, match="T = 65"):
        memory(GQA, 1, 65, training=True)
    # Exceeding any sane machine is a number, not an overflow and not an allocation.
    huge = ModelConfig.from_preset("llama7b")
    assert memory(huge, 1024, 512, training=True).total_bytes > 10**12


def test_dimensions_beyond_the_core_are_refused() -> None:
    for field, value in (("dim", 2**17), ("n_layers", 2000), ("vocab_size", 2**23), ("max_seq_len", 2**21)):
        with pytest.raises(errors.InvalidError, match=field):
            tensor_table(GQA.replace(**{field: value}))


def test_bf16_products_stay_close_to_fp32() -> None:
    tokens, targets = batch(GQA, 3, 40)
    losses, grads = {}, {}
    for dtype in DTYPES:
        model = Model(GQA, seed=5)
        model.set_dtype(dtype)
        losses[dtype] = model.forward(tokens, targets)
        model.backward()
        grads[dtype] = gradients(model)
    fp32, bf16 = grads["fp32"], grads["bf16"]
    assert losses["fp32"] != losses["bf16"], "the dtype made no difference"
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-3)
    for name, expected in fp32.items():
        a, b = expected.astype(np.float64).ravel(), bf16[name].astype(np.float64).ravel()
        assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.999, name
        assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=0.02), name


def test_bf16_does_not_depend_on_the_threads() -> None:
    tokens, targets = batch(QK_NORM, 2, 33)
    before, results = lib.anellm_get_threads(), []
    for threads in (1, 2, 3):
        check(lib.anellm_set_threads(threads))
        model = Model(QK_NORM, seed=6)
        model.set_dtype("bf16")
        results.append((model.forward(tokens, targets), model.backward(), gradients(model)))
    check(lib.anellm_set_threads(before))
    for loss, _, grads in results[1:]:
        assert loss == results[0][0]
        assert all(np.array_equal(grads[name], g) for name, g in results[0][2].items())


def test_setting_the_dtype() -> None:
    model = Model(GQA, seed=1)
    tokens, targets = batch(GQA, 1, 8)
    with pytest.raises(errors.InvalidError, match=r"dtype = 2, must be 0 \(fp32\) or 1 \(bf16\)"):
        check(lib.anellm_model_set_dtype(model._pointer, 2))
    with pytest.raises(errors.InvalidError, match="dtype: expected one of fp32, bf16, found 'fp16'"):
        model.set_dtype("fp16")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidError, match="dtype: expected one of fp32, bf16, found 'int8'"):
        memory(GQA, 1, 8, training=True, dtype="int8")  # type: ignore[arg-type]
    assert model.dtype == "fp32"
    model.forward(tokens, targets)
    model.set_dtype("fp32")
    model.backward()
    model.forward(tokens, targets)
    model.set_dtype("bf16")
    assert model.dtype == "bf16"
    with pytest.raises(errors.InvalidError, match="no training forward"):
        model.backward()


def test_bf16_keeps_less_for_backward() -> None:
    """Per layer and token, 2 hidden_dim numbers of 2 bytes less; one layer's fp32 form is scratch."""
    fp32, bf16 = (memory(GQA, 2, 16, training=True, dtype=dtype) for dtype in DTYPES)
    saved = 2 * 16 * 2 * GQA.hidden_dim * 2
    assert fp32.activations_bytes - bf16.activations_bytes == pytest.approx(GQA.n_layers * saved, abs=64 * GQA.n_layers)
    assert bf16.workspace_bytes - fp32.workspace_bytes == pytest.approx(2 * saved, abs=64)
    assert memory(GQA, 2, 16, training=False) == memory(GQA, 2, 16, training=False, dtype="bf16")
