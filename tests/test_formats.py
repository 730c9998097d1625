"""Reading tensors: every format against the `gguf` package, from the file's layout and from panels."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyllama.core import CoreError, call, create, ffi, lib
from tests.tensors import TYPES, block_elements, dequantized, random_tensor


def dequantize(name: str, data: np.ndarray, n: int) -> np.ndarray:
    out = np.empty(n, np.float32)
    call(lib.pl_dequantize, TYPES[name], ffi.from_buffer(data), data.size, n, ffi.from_buffer("float[]", out))
    return out


def new_weight(name: str, n_rows: int, n_cols: int, data: np.ndarray, arena=ffi.NULL, pool=ffi.NULL):
    source = ffi.from_buffer(data)
    return create(lib.pl_weight_new, lib.pl_weight_free, arena, TYPES[name], n_rows, n_cols, source, data.size, pool)


def weight_rows(weight, rows: list[int], n_cols: int) -> np.ndarray:
    out = np.empty((len(rows), n_cols), np.float32)
    call(lib.pl_weight_rows, weight, rows, len(rows), ffi.from_buffer("float[]", out))
    return out


@pytest.mark.parametrize("name", TYPES)
def test_sizes(name):
    elements, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert lib.pl_type_block_elements(TYPES[name]) == elements
    assert lib.pl_type_block_bytes(TYPES[name]) == n_bytes
    assert lib.pl_type_bytes(TYPES[name], 7, 3 * elements) == 21 * n_bytes


def test_impossible_sizes():
    assert lib.pl_type_block_elements(16) == lib.pl_type_block_bytes(16) == 0
    assert lib.pl_type_bytes(16, 1, 256) == -1  # IQ2_XXS is not read
    assert lib.pl_type_bytes(TYPES["Q4_0"], 1, 33) == -1
    assert lib.pl_type_bytes(TYPES["Q4_0"], -1, 32) == -1
    assert lib.pl_type_bytes(TYPES["F32"], 1, -1) == -1
    assert lib.pl_type_bytes(TYPES["F32"], 1 << 40, 1 << 40) == -1
    assert lib.pl_type_bytes(TYPES["F32"], 1, 1 << 62) == -1
    assert lib.pl_type_bytes(TYPES["F32"], 1 << 62, 0) == 0


@pytest.mark.parametrize("name", TYPES)
def test_dequantize(name):
    rng = np.random.default_rng(1)
    n_cols = 5 * block_elements(name)
    data = random_tensor(rng, name, 20, n_cols)
    np.testing.assert_allclose(
        dequantize(name, data, 20 * n_cols).reshape(20, n_cols), dequantized(name, data), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_every_kind_of_float(name):
    """All bit patterns of the short formats: subnormals, infinities and NaN too."""
    if name == "F32":
        data = np.array([0, -0.0, 1e-45, np.inf, -np.inf, np.nan, 3.4e38], np.float32).view(np.uint8)
        expected = data.view(np.float32)
    else:
        bits = np.arange(65536, dtype=np.uint16)
        data = bits.view(np.uint8)
        expected = (
            bits.view(np.float16).astype(np.float32)
            if name == "F16"
            else (bits.astype(np.uint32) << 16).view(np.float32)
        )
    np.testing.assert_array_equal(dequantize(name, data, expected.size), expected)


def test_dequantize_refuses_what_does_not_fit():
    data = np.zeros(18, np.uint8)
    with pytest.raises(CoreError, match="18 bytes"):
        dequantize("Q4_0", data, 64)
    with pytest.raises(CoreError, match="33 elements"):
        dequantize("Q4_0", data, 33)
    with pytest.raises(CoreError, match="type 99"):
        call(lib.pl_dequantize, 99, ffi.from_buffer(data), 18, 32, ffi.NULL)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("n_rows", [1, 16, 37])
def test_rows_of_a_panel_are_the_file_s(name, n_rows):
    rng = np.random.default_rng(2)
    n_cols = 3 * max(block_elements(name), 5)
    data = random_tensor(rng, name, n_rows, n_cols)
    weight = new_weight(name, n_rows, n_cols, data)
    rows = rng.permutation(n_rows).tolist()
    expected = dequantize(name, data, n_rows * n_cols).reshape(n_rows, n_cols)
    np.testing.assert_array_equal(weight_rows(weight, rows, n_cols), expected[rows])


def test_threads_and_an_arena_make_the_same_panels():
    rng = np.random.default_rng(3)
    data = random_tensor(rng, "Q4_K", 300, 512)
    size = call(lib.pl_weight_panel_bytes, TYPES["Q4_K"], 300, 512)
    arena = create(lib.pl_arena_new, lib.pl_arena_free, 2 * size)
    pool = create(lib.pl_pool_new, lib.pl_pool_free, 3)
    weights = [new_weight("Q4_K", 300, 512, data), *(new_weight("Q4_K", 300, 512, data, arena, pool) for _ in range(2))]
    first, *others = (weight_rows(weight, list(range(300)), 512) for weight in weights)
    for other in others:
        np.testing.assert_array_equal(other, first)
    with pytest.raises(CoreError, match="full"):
        new_weight("Q4_K", 300, 512, data, arena)


def read_weight(path: Path, name: str, n_rows: int, n_cols: int, offset: int, flags: int = os.O_RDONLY, pool=ffi.NULL):
    n_bytes = lib.pl_type_bytes(TYPES[name], n_rows, n_cols)
    file = os.open(path, flags)
    try:
        return create(
            lib.pl_weight_read, lib.pl_weight_free, ffi.NULL, TYPES[name], n_rows, n_cols, file, offset, n_bytes, pool
        )
    finally:
        os.close(file)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("n_rows", "n_cols", "n_threads"), [(1, 256, 1), (37, 512, 2), (330, 4096, 3), (16, 16384, 2)])
def test_a_matrix_is_read_from_a_file(tmp_path, name, n_rows, n_cols, n_threads):
    data = random_tensor(np.random.default_rng(4), name, n_rows, n_cols)
    (tmp_path / "x").write_bytes(b"seven b" + data.tobytes() + b"more")
    pool = create(lib.pl_pool_new, lib.pl_pool_free, n_threads)
    weight = read_weight(tmp_path / "x", name, n_rows, n_cols, 7, pool=pool)
    rows = list(range(n_rows))
    np.testing.assert_array_equal(
        weight_rows(weight, rows, n_cols), weight_rows(new_weight(name, n_rows, n_cols, data), rows, n_cols)
    )


def test_a_matrix_far_into_a_file(tmp_path):
    """Past what 32 bits count."""
    x, offset = np.arange(64 * 33, dtype=np.float32).reshape(64, 33), (1 << 32) + 7
    with (tmp_path / "x").open("wb") as file:
        file.seek(offset)  # what is skipped takes no room
        file.write(x.tobytes())
    np.testing.assert_array_equal(weight_rows(read_weight(tmp_path / "x", "F32", *x.shape, offset), list(range(64)), 33), x)


def test_what_cannot_be_read_from_a_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100 * 18))
    read_weight(tmp_path / "x", "Q4_0", 100, 32, 0)
    with pytest.raises(CoreError, match="the file ends within it"):
        read_weight(tmp_path / "x", "Q4_0", 100, 32, 1)
    with pytest.raises(CoreError, match="it could not be read: Bad file descriptor"):
        read_weight(tmp_path / "x", "Q4_0", 100, 32, 0, os.O_WRONLY)
    with pytest.raises(CoreError, match="Invalid argument"):
        read_weight(tmp_path / "x", "Q4_0", 100, 32, -1)


@pytest.mark.parametrize(
    ("type_", "n_rows", "n_cols", "n_bytes"),
    [
        (99, 1, 32, 18),
        (TYPES["Q4_0"], 0, 32, 0),
        (TYPES["Q4_0"], 1, 0, 0),
        (TYPES["Q4_0"], -1, 32, 18),
        (TYPES["Q4_0"], 1, 33, 18),
        (TYPES["Q4_0"], 1, 32, 17),
        (TYPES["Q4_0"], 1 << 40, 32, 18 << 40),
        (TYPES["F32"], 1, 1 << 40, 4 << 40),
    ],
)
def test_impossible_matrices_are_refused(type_, n_rows, n_cols, n_bytes):
    data = np.zeros(64, np.uint8)
    with pytest.raises(CoreError, match="matrix|type"):
        create(
            lib.pl_weight_new,
            lib.pl_weight_free,
            ffi.NULL,
            type_,
            n_rows,
            n_cols,
            ffi.from_buffer(data),
            n_bytes,
            ffi.NULL,
        )


def test_rows_out_of_range_are_refused():
    weight = new_weight("Q4_0", 3, 32, np.zeros(54, np.uint8))
    for row in (-1, 3, 2**31 - 1):
        with pytest.raises(CoreError, match="the matrix has 3"):
            weight_rows(weight, [row], 32)


@pytest.mark.parametrize("size", [0, -1, 1 << 60])
def test_impossible_arenas_are_refused(size):
    with pytest.raises(CoreError, match="arena"):
        create(lib.pl_arena_new, lib.pl_arena_free, size)
