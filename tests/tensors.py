"""Tensors of random bytes in GGUF's formats, and what they mean according to the ``gguf`` package."""

from __future__ import annotations

import gguf
import numpy as np

TYPES = {
    name: int(gguf.GGMLQuantizationType[name])
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
}
QUANTIZED = [name for name in TYPES if name.startswith("Q")]

# Where a block holds half-precision numbers (bytes from its beginning); all its other bytes may be anything.
_HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def block_elements(name: str) -> int:
    """Columns in one block of a type."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]


def random_tensor(rng: np.random.Generator, name: str, n_rows: int, n_cols: int) -> np.ndarray:
    """Bytes ``uint8 [n_rows, bytes per row]`` of a tensor: any codes, scales of both signs up to 1."""
    values = rng.uniform(-1, 1, (n_rows, n_cols)).astype(np.float32)
    if name == "F32":
        return values.view(np.uint8)
    if name == "F16":
        return values.astype(np.float16).view(np.uint8)
    if name == "BF16":
        return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
    elements, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (n_rows, n_cols // elements, n_bytes), dtype=np.uint8)
    for at in _HALVES[name]:
        scales = rng.uniform(-1, 1, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    return np.ascontiguousarray(blocks.reshape(n_rows, -1))


def dequantized(name: str, data: np.ndarray) -> np.ndarray:
    """The ``float32 [n_rows, n_cols]`` that the ``gguf`` package reads in a tensor's bytes."""
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).astype(np.float32)


def quantized_activations(x: np.ndarray) -> np.ndarray:
    """What the core makes of activations ``float32 [n, width]``: int8 with one scale per 32 columns, expanded again."""
    groups = x.reshape(len(x), -1, 32)
    scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    normal = scale >= np.finfo(np.float32).tiny
    inverse = np.where(normal, np.float32(1) / np.where(normal, scale, np.float32(1)), np.float32(0))
    return (np.rint(groups * inverse) * scale).reshape(x.shape)
