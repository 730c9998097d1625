"""A GGUF file's tensors by name, laid out for the core when a model asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyllama.core import CoreError, ThreadPool, call, create, ffi, lib
from pyllama.gguf import GGUFFile, TensorInfo
from pyllama.graph import Matrix, Vector
from pyllama.models.hparams import ModelError

__all__ = ["Weights"]

_FLOAT_TYPES = (lib.PL_F32, lib.PL_F16, lib.PL_BF16)


@dataclass(frozen=True)
class _Layer:
    """One layer's tensors: ``layer["attn_q"]`` is ``blk.<i>.attn_q.weight``."""

    weights: Weights
    index: int

    def __getitem__(self, name: str) -> Any:
        return self.weights[f"blk.{self.index}.{name}"]

    def get(self, name: str) -> Any:
        """The tensor, or None if the file has no such one."""
        return self.weights.get(f"blk.{self.index}.{name}")


class Weights:
    """``weights["token_embd"]`` is ``token_embd.weight``: a :class:`Matrix` of the core, or a float32 :class:`Vector`.

    Matrices are re-laid on first use, all into one mapping of exactly the size that the file's matrices need.
    """

    def __init__(self, gguf: GGUFFile, pool: ThreadPool, progress: Callable[[float], None] | None = None) -> None:
        self._gguf, self._pool, self._progress = gguf, pool, progress
        self._made: dict[str, Matrix | Vector] = {}
        self._total_bytes = max(1, sum(info.n_bytes for info in gguf.tensors.values()))
        self._done_bytes = 0
        size = sum(self._panel_bytes(info) for info in gguf.tensors.values() if len(info.shape) == 2)
        self.arena = create(lib.pl_arena_new, lib.pl_arena_free, max(size, 1))
        self.n_bytes = size

    @staticmethod
    def _panel_bytes(info: TensorInfo) -> int:
        cols, rows = info.shape
        try:
            return call(lib.pl_weight_panel_bytes, info.type, rows, cols)
        except RuntimeError as error:
            raise ModelError(f"tensor {info.name!r}: {error}") from None

    def __getitem__(self, name: str) -> Any:
        found = self.get(name)
        if found is None:
            raise ModelError(f"the tensor {self._full_name(name)!r} is missing")
        return found

    @staticmethod
    def _full_name(name: str) -> str:
        return name if name.endswith(".bias") else f"{name}.weight"

    def get(self, name: str) -> Any:
        """The tensor, or None if the file has no such one."""
        full = self._full_name(name)
        if full not in self._made:
            info = self._gguf.tensors.get(full)
            if info is None:
                return None
            self._made[full] = self._make(info)
            self._done_bytes += info.n_bytes
            if self._progress:
                self._progress(self._done_bytes / self._total_bytes)
        return self._made[full]

    def _make(self, info: TensorInfo) -> Matrix | Vector:
        if len(info.shape) == 1:
            values = np.empty(info.shape[0], np.float32)
            call(
                lib.pl_dequantize, info.type, ffi.from_buffer(self._gguf.data(info.name)), info.n_bytes, info.shape[0],
                ffi.cast("float *", values.ctypes.data),
            )  # fmt: skip
            return Vector(info.name, values)
        if len(info.shape) != 2:
            raise ModelError(f"tensor {info.name!r} has {len(info.shape)} dimensions; 1 or 2 are possible")
        cols, rows = info.shape
        try:
            handle = create(
                lib.pl_weight_read, lib.pl_weight_free,
                self.arena, info.type, rows, cols, self._gguf.fileno(), info.offset, info.n_bytes, self._pool.handle,
            )  # fmt: skip
        except CoreError as error:
            raise ModelError(f"tensor {info.name!r}: {error}") from None
        return Matrix(info.name, rows, cols, info.type in _FLOAT_TYPES, handle)

    def layer(self, index: int) -> _Layer:
        """Tensors of layer ``index``."""
        return _Layer(self, index)

    @property
    def output(self) -> Matrix:
        """The matrix before the logits; files without one use the embedding table."""
        return self.get("output") or self["token_embd"]

    def lock(self) -> None:
        """Keeps the matrices in memory.

        Raises:
            CoreError: the system does not allow it.
        """
        call(lib.pl_arena_lock, self.arena)
