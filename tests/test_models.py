"""Whole models: tiny random ones against the NumPy oracle, and what a run must not depend on (batching, blocks, threads)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pyllama.core import CoreError
from pyllama.models import Model, ModelError, SequenceInput, load
from tests import tiny_models
from tests.numpy_models import Reference
from tests.test_products import kernel_sets

TOKENS = [3, 17, 42, 7, 7, 99, 120, 5, 64, 33] * 5  # 50 tokens: more than a block


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def tiny_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    getattr(tiny_models, f"make_{request.param}")(path, quant="F32")
    return path


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return load(tiny_path, n_ctx=256, n_threads=2, kv_type="f32")


def blocks_for(n: int, first: int = 0) -> list[int]:
    return list(range(first, first + -(-n // 32)))


def at_once(model: Model, tokens: list[int], blocks: list[int] | None = None) -> np.ndarray:
    blocks = blocks or blocks_for(len(tokens))
    return model.run([SequenceInput(tokens, 0, blocks, len(tokens))]).copy()


def test_logits_are_the_oracle_s(model: Model, tiny_path: Path) -> None:
    expected = Reference(tiny_path).logits(TOKENS)
    np.testing.assert_allclose(at_once(model, TOKENS), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("cpu", kernel_sets())
def test_other_kernels_agree(tiny_path: Path, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    best = at_once(load(tiny_path, n_ctx=128, kv_type="f32"), TOKENS)
    monkeypatch.setenv("PYLLAMA_CPU", cpu)
    np.testing.assert_allclose(at_once(load(tiny_path, n_ctx=128, kv_type="f32"), TOKENS), best, rtol=1e-3, atol=1e-3)


def test_token_by_token_is_the_same(model: Model) -> None:
    whole = at_once(model, TOKENS)
    blocks = [5, 1]
    for i, token in enumerate(TOKENS):
        row = model.run([SequenceInput([token], i, blocks, 1)])[0]
        np.testing.assert_allclose(row, whole[i], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"final_logit_softcapping": 3.0}])
@pytest.mark.parametrize("n_specials", [0, 1, 7, 16])
def test_peaks_are_the_largest_logits(tmp_path: Path, n_specials: int, more: dict[str, float]) -> None:
    path = tmp_path / "tiny.gguf"
    tiny_models.make_gemma3(path, specials=[f"<special {i}>" for i in range(n_specials)], more=more)
    model = load(path, n_ctx=64, n_threads=2)
    for outputs in (1, 3, 20):
        rows = model.run([SequenceInput(TOKENS[:20], 0, [0], outputs)])
        padded = np.pad(rows, ((0, 0), (0, -model.hp.n_vocab % 32)), constant_values=-np.inf)
        np.testing.assert_array_equal(model.peaks[:outputs], padded.reshape(outputs, -1, 32).max(axis=2))


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("make", [tiny_models.make_llama, tiny_models.make_gemma3])
def test_the_division_into_runs_changes_no_bit(make: Callable[..., None], quant: str, tmp_path: Path) -> None:
    """What a token gets must not depend on how many others are in its run."""
    path = tmp_path / "tiny.gguf"
    make(path, n_embd=64, n_ff=128, quant=quant)
    model = load(path, n_ctx=256)
    tokens = (TOKENS * 3)[:120]
    blocks = blocks_for(len(tokens))
    whole = model.run([SequenceInput(tokens, 0, blocks, 1)]).copy()
    for sizes in ([1] * 120, [119, 1], [60, 60], [2] * 60, [45, 15, 60], [33, 32, 31, 24], [112, 8], [5] * 24):
        n_past = 0
        for size in sizes:
            rows = model.run([SequenceInput(tokens[n_past : n_past + size], n_past, blocks, 1)])
            n_past += size
        np.testing.assert_array_equal(rows, whole, err_msg=str(sizes))


@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
@pytest.mark.parametrize(
    "make", [tiny_models.make_llama, partial(tiny_models.make_llama, n_head=8, n_head_kv=8), tiny_models.make_gemma3]
)
def test_the_number_of_threads_changes_no_bit(make: Callable[..., None], quant: str, tmp_path: Path) -> None:
    """Token by token, every thread does for itself what is done once for several tokens."""
    path = tmp_path / "tiny.gguf"
    make(path, n_embd=256, n_ff=512, quant=quant)

    def run(n_threads: int) -> list[np.ndarray]:
        model = load(path, n_ctx=64, n_threads=n_threads)
        return [model.run([SequenceInput([t], i, blocks_for(50), 1)])[0].copy() for i, t in enumerate(TOKENS)]

    alone = run(1)
    for n_threads in (2, 3, 7):
        np.testing.assert_array_equal(run(n_threads), alone, err_msg=f"{n_threads} threads")


def continuation(model: Model, tokens: list[int], n_past: int, sizes: list[int], others: list[SequenceInput]) -> np.ndarray:
    """Logits of the tokens from ``n_past`` on, read in pieces of these sizes, beside other sequences."""
    blocks, rows = blocks_for(len(tokens)), []
    for size in sizes:
        piece = SequenceInput(tokens[n_past : n_past + size], n_past, blocks, size)
        rows.append(model.run([*others, piece])[-size:].copy())
        n_past += size
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("cpu", "kv_type", "quant"),
    [
        ("", "f16", "Q8_0"),
        ("", "q8_0", "Q8_0"),
        ("", "f16", "F16"),
        ("avx2", "f16", "F16"),
        ("avx2", "q8_0", "Q8_0"),
        ("scalar", "f16", "Q8_0"),
    ],
)
@pytest.mark.parametrize("make", [tiny_models.make_llama, partial(tiny_models.make_gemma3, n_layer=6, sliding_window=600)])
def test_far_into_a_context_nothing_that_runs_beside_changes_a_bit(
    make: Callable[..., None], cpu: str, kv_type: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in steps of guessed tokens, beside other sequences, with any number of threads; with windows and without."""
    if cpu and cpu not in kernel_sets():
        pytest.skip(f"this processor does not run {cpu}")
    monkeypatch.setenv("PYLLAMA_CPU", cpu)
    path = tmp_path / "tiny.gguf"
    make(path, n_embd=128, quant=quant)
    tokens = [3 + (i * i + 7 * i) % 241 for i in range(1040 if cpu != "scalar" else 530)]
    n = len(tokens) - 32
    expected = None
    for n_threads in (1, 3):
        model = load(path, n_ctx=2048, n_threads=n_threads, max_sequences=32, kv_type=kv_type)
        size = 512 if n_threads == 1 or kv_type == "q8_0" else 23
        for at in range(0, n, size):
            model.run([SequenceInput(tokens[at : min(n, at + size)], at, blocks_for(len(tokens)), 0)])
        short = SequenceInput(tokens[:7], 0, [50], 1)
        many = [SequenceInput([9], 40 + i, [51, 52], 1) for i in range(9)]
        for sizes in ([1] * 32, [9, 1, 22], [32]):
            for others in ([], [short], many):
                rows = continuation(model, tokens, n, sizes, others)
                expected = rows if expected is None else expected
                np.testing.assert_array_equal(rows, expected, err_msg=f"{n_threads} {sizes} {len(others)}")
        model.close()


def test_a_batch_of_sequences_is_each_alone(model: Model) -> None:
    """Different lengths, pasts and blocks; one that generates beside others that read."""
    prompts = [TOKENS[:33], TOKENS[5:6], TOKENS[10:30]]
    alone = [at_once(model, prompt)[-1] for prompt in prompts]
    model.run([SequenceInput(prompts[0][:32], 0, [7, 2], 0)])
    together = model.run(
        [
            SequenceInput(prompts[0][32:], 32, [7, 2], 1),
            SequenceInput(prompts[1], 0, [3], 1),
            SequenceInput(prompts[2], 0, [0], 1),
        ]
    )
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-3, atol=1e-3)


def test_copied_blocks_give_the_same(model: Model) -> None:
    whole = at_once(model, TOKENS, [0, 1])
    model.kv_copy([0, 1], 0, [4, 5], 0, 40)
    row = model.run([SequenceInput(TOKENS[40:], 40, [4, 5], 1)])[0]
    np.testing.assert_allclose(row, whole[-1], rtol=1e-3, atol=1e-3)


KV_TYPES = [("f16", "f16"), ("q8_0", "q8_0"), ("f16", "q4_0"), ("q4_0", "f32")]


@pytest.mark.parametrize("kv_type", KV_TYPES, ids="-".join)
def test_keys_and_values_of_other_types(tmp_path: Path, kv_type: tuple[str, str]) -> None:
    """The logits are about those of floats, at once and token by token, and after a copy."""
    path = tmp_path / "model.gguf"
    tiny_models.make_llama(path, n_embd=128, n_head=4, n_head_kv=2, quant="F32")
    expected = at_once(load(path, n_ctx=128, kv_type="f32"), TOKENS)
    model = load(path, n_ctx=128, kv_type=kv_type)
    tolerance = 0.15 if "q4_0" in kv_type else 0.015

    def close(got: np.ndarray, wanted: np.ndarray) -> bool:
        return bool(np.linalg.norm(got - wanted) < tolerance * np.linalg.norm(wanted))

    assert close(at_once(model, TOKENS), expected)
    model.kv_copy([0, 1], 0, [3, 2], 0, 49)
    assert close(model.run([SequenceInput(TOKENS[49:], 49, [3, 2], 1)])[0], expected[-1])
    rows = [model.run([SequenceInput([token], i, [0, 1], 1)])[0].copy() for i, token in enumerate(TOKENS)]
    assert close(np.stack(rows), expected)


def test_heads_that_cannot_be_quantized(tmp_path: Path) -> None:
    path = tmp_path / "narrow.gguf"
    tiny_models.make_llama(path)
    with pytest.raises(ModelError, match="a head of 16 is not a multiple of 32"):
        load(path, kv_type=("f16", "q8_0"))
    with pytest.raises(ValueError, match="'q5_1'; one of f32, f16, q8_0, q4_0"):
        load(path, kv_type="q5_1")


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
def test_shifted_keys_are_as_if_computed_there(tmp_path: Path, kv_type: str) -> None:
    """In a model of one layer keys depend on their token and position alone, so that a shift can be checked exactly."""
    for make in (tiny_models.make_llama, tiny_models.make_gemma3):
        path = tmp_path / "one.gguf"
        make(path, n_layer=1, quant="F32", n_head=2, n_head_kv=1)
        model = load(path, n_ctx=256, kv_type=kv_type)
        at_once(model, TOKENS, [0, 1])
        model.kv_copy([0, 1], 13, [3, 4], 3, 30)  # tokens 13..42 move to positions 3..32
        model.run([SequenceInput(TOKENS[:3], 0, [3, 4], 0)])
        kept = TOKENS[:3] + TOKENS[13:43]
        row = model.run([SequenceInput([9], len(kept), [3, 4], 1)])[0].copy()
        expected = at_once(model, [*kept, 9], [5, 6])[-1]
        error = np.linalg.norm(row - expected) / np.linalg.norm(expected)
        assert error < {"f32": 1e-3, "f16": 5e-3, "q8_0": 0.015, "q4_0": 0.15}[kv_type]  # rounded a second time


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_every_tensor_type_runs(tmp_path: Path, quant: str) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.make_llama(path, n_embd=256, n_head=8, n_head_kv=4, n_ff=512, quant=quant)
    expected = Reference(path).logits(TOKENS)
    got = at_once(load(path, n_ctx=64, kv_type="f32"), TOKENS)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < (0.002 if quant in ("F16", "BF16") else 0.02)  # activations are quantized to 8 bits


def test_hidden_states(model: Model) -> None:
    logits = at_once(model, TOKENS)
    hidden = model.run([SequenceInput(TOKENS, 0, blocks_for(len(TOKENS)), 3)], hidden=True)
    assert hidden.shape == (3, model.hp.n_embd)
    again = at_once(model, TOKENS)
    np.testing.assert_array_equal(logits, again)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (SequenceInput([100000], 0, [0], 1), "not in the vocabulary"),
        (SequenceInput([-1], 0, [0], 1), "not in the vocabulary"),
        (SequenceInput([1], 32, [0], 1), "do not fit into 1 blocks"),
        (SequenceInput([1], 0, [10000], 1), "block 10000 does not exist"),
        (SequenceInput([1], -1, [0], 1), "malformed"),
        (SequenceInput([], 0, [0], 0), "1 to"),
    ],
)
def test_inputs_out_of_range_are_refused(model: Model, item: SequenceInput, message: str) -> None:
    with pytest.raises(CoreError, match=message):
        model.run([item])
    at_once(model, TOKENS)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    tiny_models.make_llama(path, architecture="mamba")
    with pytest.raises(ModelError, match="'mamba' is not one that pyllama runs"):
        load(path)
