"""A loaded model: tokenizer, program and key/value pool, run with lists of tokens and block numbers.

This module knows files, architectures and the core. It knows nothing of requests or slots, and of sampling only that the core
does it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from pyllama import tokenizer as tokenizers
from pyllama.core import BLOCK_TOKENS, CoreError, ThreadPool, call, cpu_name, create, failure, ffi, lib
from pyllama.gguf import GGUFFile
from pyllama.graph import Graph
from pyllama.models import gemma3, llama
from pyllama.models.hparams import Hparams, ModelError, RopeOptions
from pyllama.models.weights import Weights

__all__ = ["ARCHITECTURES", "KV_TYPES", "Model", "SequenceInput", "load"]

ARCHITECTURES: dict[str, ModuleType] = {"llama": llama, "gemma3": gemma3}
"""``general.architecture`` → the module with its ``read_hparams`` and ``build``."""

KV_TYPES = {"f32": lib.PL_KV_F32, "f16": lib.PL_KV_F16, "q8_0": lib.PL_KV_Q8_0, "q4_0": lib.PL_KV_Q4_0}
"""What keys and values can be kept as. The quantized ones are GGUF's: 32 elements of a head share a scale."""
_QUANTIZED = ("q8_0", "q4_0")
_SPARE_BLOCKS = 2  # beyond n_ctx: room for a copied block and for a partly filled one


@dataclass(slots=True)
class SequenceInput:
    """One sequence's part of a run."""

    tokens: Sequence[int]
    """New tokens."""
    n_past: int
    """Tokens before them, whose keys and values are in ``blocks``."""
    blocks: Sequence[int]
    """Block numbers for positions 0 .. n_past + len(tokens) - 1, BLOCK_TOKENS positions each."""
    outputs: int
    """How many of the last new tokens get a row of logits."""


class Model:
    """Made by :func:`load`. Not thread-safe: one thread runs it (the engine's)."""

    def __init__(
        self, path: Path, gguf: GGUFFile, hp: Hparams, weights: Weights, *, n_ctx: int, n_batch: int, n_threads: int,
        n_threads_batch: int, max_sequences: int, kv_types: tuple[str, str], pool: ThreadPool,
    ) -> None:  # fmt: skip
        self.path, self.hp = path, hp
        self.architecture = hp.architecture
        self.name: str = gguf.get("general.name", path.stem, str)
        self.metadata = {k: v for k, v in gguf.metadata.items() if isinstance(v, (str, int, float, bool))}
        self.tokenizer = tokenizers.from_gguf(gguf)
        self.n_params = sum(int(np.prod(info.shape)) for info in gguf.tensors.values())
        self.n_bytes = sum(info.n_bytes for info in gguf.tensors.values())
        self.n_ctx, self.n_batch, self.max_outputs, self.max_sequences = n_ctx, n_batch, n_batch, max_sequences
        self.n_blocks = -(-n_ctx // BLOCK_TOKENS) + _SPARE_BLOCKS
        self.n_exact = min(n_batch, 32) if kv_types[1] in _QUANTIZED else n_batch
        """So many new tokens of a sequence get in one run what they would get one by one, to the last bit. Longer pieces may read
        quantized values otherwise (see c_core/src/attention.h)."""
        self.n_threads, self.n_threads_batch = n_threads, n_threads_batch
        self.pool = pool
        graph = Graph()
        logits = ARCHITECTURES[hp.architecture].build(graph, hp, weights)
        if (logits.inputs[0].width, logits.width) != (hp.n_embd, hp.n_vocab):  # the widths of the rows that a run fills
            raise ModelError(
                f"{logits.weight.name} has {logits.width} rows of {logits.inputs[0].width}; the model's hyper-parameters say"
                f" {hp.n_vocab} of {hp.n_embd}"
            )
        self.weights = weights
        self.kv = create(
            lib.pl_kv_new, lib.pl_kv_free, hp.n_layer, self.n_blocks, hp.n_head_kv, hp.head_dim,
            *(KV_TYPES[name] for name in kv_types),
        )  # fmt: skip
        self.program = graph.compile(max_tokens=n_batch, max_outputs=n_batch, kv=self.kv, pool=pool)
        # The core's own arrays: plain lists get into them several times as fast as into NumPy's.
        self._tokens = ffi.new("int32_t[]", n_batch)
        self._outputs = ffi.new("int32_t[]", n_batch)
        self._blocks = ffi.new("int32_t[]", self.n_blocks * 2)
        self._sequences = ffi.new("pl_sequence[]", max_sequences)
        self._batch = ffi.new("pl_batch *", {"tokens": self._tokens, "outputs": self._outputs})
        self._batch.sequences = self._sequences
        self._rows = np.empty((0, hp.n_vocab), np.float32)
        self.peaks = np.empty((0, -(-hp.n_vocab // lib.PL_PEAK_LOGITS)), np.float32)
        """float32 [n_outputs or more, n_vocab / PL_PEAK_LOGITS]: the largest of so many logits of the last run, for sampling."""
        self._error = ffi.new("pl_error *")

    def run(self, inputs: Sequence[SequenceInput], *, hidden: bool = False) -> np.ndarray:
        """Evaluates the new tokens of some sequences in one call of the core, with the GIL released.

        Args:
            inputs: at most ``max_sequences`` sequences with at most ``n_batch`` new tokens in all.
            hidden: give the last layer's normed states instead of logits.

        Returns:
            float32 [n_outputs, n_vocab], or [n_outputs, n_embd] with ``hidden``: the requested outputs, in the order of the
            inputs. The array is valid until the next run.

        Raises:
            CoreError: a token, block or length is out of range.
            ValueError: too many sequences or tokens.
        """
        rows = self._prepare(inputs, hidden=hidden)
        threads = self.n_threads if self._batch.n_tokens <= len(inputs) else self.n_threads_batch
        if lib.pl_run(self.program.handle, threads, self._batch, self._error) < 0:
            raise failure(self._error)
        return rows

    def generate(
        self, inputs: Sequence[SequenceInput], samplings: Sequence[ffi.CData], randoms: Sequence[float], ends: Iterable[int]
    ) -> list[int]:
        """Goes on with some sequences for several steps, all in one call of the core, until one of them ends.

        Args:
            inputs: with one new token each, whose logits are wanted, and with blocks for all steps.
            samplings: a ``pl_sampling *`` for each.
            randoms: a number for each sequence at the first step, then at the second one, and so on.
            ends: tokens that end a sequence.

        Returns:
            The tokens that were chosen, in the order of ``randoms``; -1 where there was none to choose.

        Raises:
            CoreError, ValueError: as :meth:`run`.
        """
        self._prepare(inputs)
        end_tokens, tokens = ffi.new("int32_t[]", list(ends)), ffi.new("int32_t[]", len(randoms))
        numbers, pointers = ffi.new("double[]", randoms), ffi.new("pl_sampling *[]", samplings)
        n_steps = len(randoms) // len(inputs)
        fields = (n_steps, self._sequences, pointers, numbers, len(end_tokens), end_tokens, tokens)
        n = lib.pl_generate(
            self.program.handle, self.n_threads, self._batch, ffi.new("pl_generation *", fields), self._error
        )
        if n < 0:
            raise failure(self._error)
        return list(tokens[0 : n * len(inputs)])

    def _prepare(self, inputs: Sequence[SequenceInput], *, hidden: bool = False) -> np.ndarray:
        """Fills the batch; the result is where its outputs will be."""
        batch, blocks = self._batch, self._blocks
        n_tokens = n_outputs = n_blocks = 0
        if len(inputs) > self.max_sequences:
            raise ValueError(f"{len(inputs)} sequences in one run; the model was loaded for {self.max_sequences}")
        if sum([len(item.tokens) for item in inputs]) > self.n_batch:
            raise ValueError(f"more than {self.n_batch} tokens in one run")
        needed = sum([len(item.blocks) for item in inputs])
        if needed > len(blocks):
            blocks = self._blocks = ffi.new("int32_t[]", 2 * needed)
        for sequence, item in zip(self._sequences, inputs):
            count, n_own_blocks = len(item.tokens), len(item.blocks)
            self._tokens[n_tokens : n_tokens + count] = item.tokens
            blocks[n_blocks : n_blocks + n_own_blocks] = item.blocks
            sequence.first, sequence.n_tokens, sequence.n_past = n_tokens, count, item.n_past
            sequence.n_blocks, sequence.blocks = n_own_blocks, blocks + n_blocks
            n_tokens += count
            n_blocks += n_own_blocks
            for token in range(n_tokens - item.outputs, n_tokens):
                self._outputs[n_outputs] = token
                n_outputs += 1
        batch.n_tokens, batch.n_sequences, batch.n_outputs = n_tokens, len(inputs), n_outputs
        if hidden:
            rows = np.empty((n_outputs, self.hp.n_embd), np.float32)
            batch.logits, batch.hidden = ffi.NULL, ffi.from_buffer("float[]", rows)
        else:
            if len(self._rows) < n_outputs:
                self._rows = np.empty((n_outputs, self.hp.n_vocab), np.float32)
                self.peaks = np.empty((n_outputs, self.peaks.shape[1]), np.float32)
            rows = self._rows[:n_outputs]
            batch.logits, batch.hidden = ffi.from_buffer("float[]", self._rows), ffi.NULL
            batch.peaks = ffi.from_buffer("float[]", self.peaks)
        return rows

    def kv_copy(
        self, src_blocks: Sequence[int], src_pos: int, dst_blocks: Sequence[int], dst_pos: int, n: int
    ) -> None:
        """Copies keys and values of positions [src_pos, src_pos + n) of one block list to [dst_pos, dst_pos + n) of another;
        keys are rotated by ``dst_pos - src_pos``. Positions go in ascending order, so that a range may move down over itself.

        Raises:
            CoreError: a block or position is out of range.
        """
        src, dst = ffi.new("int32_t[]", list(src_blocks)), ffi.new("int32_t[]", list(dst_blocks))
        call(lib.pl_kv_copy, self.program.handle, src, len(src_blocks), src_pos, dst, len(dst_blocks), dst_pos, n)

    def close(self) -> None:
        """Gives the memory back; the model cannot be used afterwards."""
        for name in ("program", "kv", "weights", "pool", "_batch", "_sequences", "_rows", "peaks"):
            self.__dict__.pop(name, None)


def load(
    path: str | os.PathLike[str],
    *,
    n_ctx: int = 512,
    n_threads: int | None = None,
    n_threads_batch: int | None = None,
    n_batch: int = 512,
    max_sequences: int = 64,
    kv_type: str | tuple[str, str] = "f16",
    mmap: bool = True,
    mlock: bool = False,
    rope: RopeOptions | None = None,
    progress: Callable[[float], None] | None = None,
    pool: ThreadPool | None = None,
) -> Model:
    """Loads a GGUF file.

    Args:
        n_ctx: tokens in the key/value pool, shared by all sequences; 0: as many as the model was trained with.
        n_threads: threads of a step that generates; None: one per core.
        n_threads_batch: threads of a step that reads a prompt; None: the same.
        n_batch: most new tokens of one run.
        max_sequences: most sequences of one run.
        kv_type: what keys and values are kept as, one of :data:`KV_TYPES`, or one for keys and one for values. The quantized
            types need heads whose size is a multiple of 32.
        mmap: map the metadata of the file instead of reading them; weights are always read.
        mlock: keep the weights in memory.
        rope: how to scale rotary positions, instead of what the file says.
        progress: called with the fraction done.
        pool: threads to run on, those of a model that never runs at the same time; None: its own.

    Raises:
        GGUFError, ModelError: the file is damaged, or not a model that pyllama runs, or memory for it was refused.
        CoreError: threads were refused, or the kernels that ``PYLLAMA_CPU`` names.
        OSError: the file cannot be opened.
        ValueError: an argument is out of range.
    """
    key_type, value_type = (kv_type, kv_type) if isinstance(kv_type, str) else kv_type
    for kind in (key_type, value_type):
        if kind not in KV_TYPES:
            raise ValueError(f"keys or values as {kind!r}; one of {', '.join(KV_TYPES)} is possible")
    if n_ctx < 0 or n_batch < 1 or max_sequences < 1:
        raise ValueError("n_ctx cannot be negative; n_batch and max_sequences must be positive")
    n_threads = n_threads or os.cpu_count() or 1
    n_threads_batch = n_threads_batch or n_threads
    path = Path(path)
    cpu_name()  # raises before anything takes time
    pool = pool or ThreadPool(max(n_threads, n_threads_batch))
    with GGUFFile.open(path, mmap=mmap) as gguf:
        name = gguf.require("general.architecture", str)
        architecture = ARCHITECTURES.get(name)
        if architecture is None:
            raise ModelError(f"architecture {name!r} is not one that pyllama runs ({', '.join(sorted(ARCHITECTURES))})")
        hp = architecture.read_hparams(gguf)
        if rope is not None:
            hp = replace(hp, rope=hp.rope.replaced(rope))
        try:
            weights = Weights(gguf, pool, progress)
            model = Model(
                path, gguf, hp, weights, n_ctx=n_ctx or hp.n_ctx_train, n_batch=n_batch, n_threads=n_threads,
                n_threads_batch=n_threads_batch, max_sequences=max_sequences, kv_types=(key_type, value_type), pool=pool,
            )  # fmt: skip
        except (CoreError, ValueError) as error:
            raise ModelError(f"{path.name}: {error}") from error
    if mlock:
        try:
            model.weights.lock()
        except CoreError as error:  # as every program with this flag does: go on, but say so
            warnings.warn(f"{error}; the weights may be swapped out", RuntimeWarning, stacklevel=2)
    return model
