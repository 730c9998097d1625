"""Products of matrices with activations: every format and every kernel set that this processor runs, over all edges."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from pyllama.core import CoreError, call, cpu_name, create, ffi, lib
from tests.tensors import QUANTIZED, TYPES, block_elements, dequantized, quantized_activations, random_tensor
from tests.test_formats import new_weight

KERNEL_SETS = ("scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "neon", "neon_i8mm")


def kernel_sets() -> list[str]:
    """Those that this processor runs."""
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for name in KERNEL_SETS:
            patch.setenv("PYLLAMA_CPU", name)
            with contextlib.suppress(CoreError):
                found.append(cpu_name())
        return found


@pytest.fixture(params=kernel_sets())
def kernels(request, monkeypatch):
    monkeypatch.setenv("PYLLAMA_CPU", request.param)
    return request.param


@pytest.fixture(scope="module")
def pools():
    return {1: ffi.NULL, **{n: create(lib.pl_pool_new, lib.pl_pool_free, n) for n in (2, 3)}}


def product(weight, n_rows: int, x: np.ndarray, pool=ffi.NULL) -> np.ndarray:
    """x times the transpose of the matrix: ``float32 [n_tokens, n_rows]``; the memory around the result stays untouched."""
    guard = 64
    out = np.full(guard + len(x) * n_rows + guard, -7, np.float32)
    inner = out[guard:-guard]
    call(lib.pl_weight_product, weight, ffi.from_buffer("float[]", x), len(x), ffi.from_buffer("float[]", inner), pool)
    assert (out[:guard] == -7).all() and (out[-guard:] == -7).all()
    return inner.reshape(len(x), n_rows)


def check(name: str, n_rows: int, n_cols: int, n_tokens: int, pool=ffi.NULL, seed: int = 0) -> None:
    rng = np.random.default_rng([seed, n_rows, n_cols, n_tokens])
    data = random_tensor(rng, name, n_rows, n_cols)
    x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
    weights = dequantized(name, data).astype(np.float64)
    as_used = quantized_activations(x) if name in QUANTIZED else x
    got = product(new_weight(name, n_rows, n_cols, data), n_rows, x, pool)
    # Rounding grows with the numbers that are summed, which symmetric formats see before their offset is taken off.
    size = np.abs(as_used).sum(axis=1)[:, None] * np.abs(weights).max(axis=1)
    assert (np.abs(got - as_used.astype(np.float64) @ weights.T) <= 1e-6 * size).all()
    if name in QUANTIZED:
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weights, axis=1)
        assert (np.abs(got - x.astype(np.float64) @ weights.T) <= 0.02 * size).all()


@pytest.mark.parametrize("name", TYPES)
def test_tokens(kernels, name):
    """Every number of tokens that fills tiles differently; 37 rows are two panels and a part of one."""
    for n_tokens in [*range(1, 31), 64, 97]:
        check(name, 37, 2 * block_elements(name) if name in QUANTIZED else 67, n_tokens)


@pytest.mark.parametrize("name", TYPES)
def test_the_number_of_tokens_changes_no_bit(kernels, name):
    """Nor does their place among the others."""
    n_rows, n_cols = 53, 3 * block_elements(name) if name in QUANTIZED else 67
    weight = new_weight(name, n_rows, n_cols, random_tensor(np.random.default_rng(8), name, n_rows, n_cols))
    x = np.random.default_rng(9).standard_normal((52, n_cols)).astype(np.float32)
    alone = np.concatenate([product(weight, n_rows, row[None]) for row in x])
    for n_tokens in [*range(2, 20), 52]:
        for first in (0, 52 - n_tokens):
            together = product(weight, n_rows, x[first : first + n_tokens])
            np.testing.assert_array_equal(together, alone[first : first + n_tokens], err_msg=str(n_tokens))


@pytest.mark.parametrize("name", TYPES)
def test_rows_and_columns(kernels, name):
    unit = block_elements(name)
    for n_rows in (1, 15, 16, 17, 48, 131):
        for n_cols in (unit, 3 * unit, 5 * unit, 2048 if unit > 1 else 130):
            check(name, n_rows, n_cols, 1)
            check(name, n_rows, n_cols, 7)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads(kernels, pools, name, n_threads):
    check(name, 333, 512, 1, pools[n_threads])
    check(name, 333, 512, 50, pools[n_threads])


def test_chunks_of_tiles(kernels, pools):
    """So many activations that they are taken in several chunks."""
    check("Q4_0", 40, 8192, 90, pools[2])
    check("F32", 20, 8192, 90, pools[2])


def test_activations_are_quantized_alike(kernels):
    """Rows that pick one column each show the quantized activations themselves: equal in every kernel set, to the bit."""
    rng = np.random.default_rng(5)
    n_cols = 96
    blocks = np.zeros((n_cols, n_cols // 32, 20), np.uint8)  # Q4_1: d, m, 16 bytes of codes
    blocks[:, :, 0:2] = np.array([1], np.float16).view(np.uint8)
    for column in range(n_cols):
        at = column % 32
        blocks[column, column // 32, 4 + at % 16] = 1 if at < 16 else 16
    weight = new_weight("Q4_1", n_cols, n_cols, blocks)
    x = rng.standard_normal((9, n_cols)).astype(np.float32)
    x *= np.exp(rng.uniform(-60, 60, (9, 1))).astype(np.float32)
    x[1] = 0
    x[2, :32] = 1e-40  # too small for a scale
    x[3] = np.arange(n_cols) - n_cols / 2 + 0.5  # halves between two codes
    x[3, ::32] = 127  # ... of scale 1
    x[4, 0] = 3e38
    np.testing.assert_array_equal(product(weight, n_cols, x), quantized_activations(x))


@pytest.mark.parametrize("name", QUANTIZED)
def test_extreme_codes(kernels, name):
    """All code bits set meets the largest activations: no sum may overflow on the way."""
    n_cols = 4 * block_elements(name)
    data = random_tensor(np.random.default_rng(6), name, 16, n_cols)
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        halves = random_tensor(np.random.default_rng(7), name, 16, n_cols)
        differs = data != halves  # everything but the scales, but for chance
        extreme = np.where(differs, np.uint8(byte), halves)
        weights = dequantized(name, extreme).astype(np.float64)
        if not np.isfinite(weights).all():
            continue
        for sign in (1, -1):
            x = np.full((5, n_cols), sign, np.float32)
            expected = quantized_activations(x).astype(np.float64) @ weights.T
            got = product(new_weight(name, 16, n_cols, extreme), 16, x)
            assert (np.abs(got - expected) <= 1e-6 * n_cols * np.abs(weights).max(axis=1)).all()


@pytest.mark.parametrize("n_tokens", [0, -1, 1 << 30])
def test_impossible_numbers_of_tokens_are_refused(n_tokens):
    weight = new_weight("Q4_0", 16, 32, np.zeros(16 * 18, np.uint8))
    with pytest.raises(CoreError, match="tokens"):
        call(lib.pl_weight_product, weight, ffi.NULL, n_tokens, ffi.NULL, ffi.NULL)


@pytest.mark.parametrize("name", ["no-such-set", "AVX2", "x" * 1000, *sorted({*KERNEL_SETS} - {*kernel_sets()})])
def test_kernels_that_cannot_be_had_are_refused(monkeypatch, name):
    """By whatever works with them, with the names of those that can be had."""
    weight, x = new_weight("Q4_0", 16, 32, np.zeros(16 * 18, np.uint8)), np.zeros((1, 32), np.float32)
    pool, rate = create(lib.pl_pool_new, lib.pl_pool_free, 1), ffi.new("double *")
    monkeypatch.setenv("PYLLAMA_CPU", name)
    why = "do not run here" if name in KERNEL_SETS else "no such kernels"
    message = f"PYLLAMA_CPU is '{name[:40]}', but .*{why}: .* runs {', '.join(kernel_sets())}"
    for use in (
        cpu_name,
        lambda: product(weight, 16, x),
        lambda: create(lib.pl_kv_new, lib.pl_kv_free, 1, 1, 1, 32, 0, 0),
        lambda: call(lib.pl_measure_int8_rate, pool, 0, 0.0, rate),
        lambda: call(lib.pl_measure_read_bandwidth, pool, 0, 1 << 20, 0.0, rate),
    ):
        with pytest.raises(CoreError, match=message):
            use()


def test_no_name_is_the_best_kernels(monkeypatch):
    monkeypatch.delenv("PYLLAMA_CPU", raising=False)
    best = cpu_name()
    monkeypatch.setenv("PYLLAMA_CPU", "")
    assert cpu_name() == best
