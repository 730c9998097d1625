"""Hyper-parameters as GGUF metadata gives them, checked, and the rotary embeddings that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pyllama.gguf import GGUFFile
from pyllama.graph import Rope, Vector

__all__ = ["Hparams", "ModelError", "make_rope"]

_MOST = 1 << 20  # no dimension of a real model is larger; a lying file is refused before anything is allocated


class ModelError(ValueError):
    """A file that is a GGUF, but not a model that can be run; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Hparams:
    """What all decoder families have in common. Sizes are in elements."""

    architecture: str
    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    rms_eps: float
    n_rot: int
    rope_base: float
    rope_scaling: str
    """``none``, ``linear`` or ``yarn``."""
    rope_factor: float
    """By how much the context was stretched (1: not at all)."""
    n_ctx_orig: int
    """The context before stretching."""

    @classmethod
    def read(cls, gguf: GGUFFile, *, rms_eps: float = 1e-5, rope_base: float = 10000.0) -> Hparams:
        """Reads ``<architecture>.*`` keys; the keyword arguments are the family's defaults.

        Raises:
            ModelError: a key is missing, or its value is out of range.
        """
        arch = gguf.require("general.architecture", str)

        def integer(key: str, default: int | None = None, least: int = 1) -> int:
            name = f"{arch}.{key}"
            value = gguf.require(name, int) if default is None else gguf.get(name, default, int)
            if not least <= value <= _MOST:
                raise ModelError(f"{name} is {value}; {least} to {_MOST} is possible")
            return value

        def real(key: str, default: float) -> float:
            name = f"{arch}.{key}"
            value = float(gguf.get(name, default, float))
            if not (math.isfinite(value) and value > 0):
                raise ModelError(f"{name} is {value}; a positive number is needed")
            return value

        n_embd, n_head = integer("embedding_length"), integer("attention.head_count")
        head_dim = integer("attention.key_length", n_embd // n_head, least=2)
        if gguf.get(f"{arch}.attention.value_length", head_dim, int) != head_dim:
            raise ModelError(f"{arch}.attention.value_length differs from key_length, which pyllama cannot run")
        n_head_kv = integer("attention.head_count_kv", n_head)
        if n_head % n_head_kv:
            raise ModelError(f"{n_head} heads cannot share {n_head_kv} key/value heads evenly")
        n_ctx_train = integer("context_length")
        n_rot = integer("rope.dimension_count", head_dim, least=2)
        if n_rot % 2 or n_rot > head_dim:
            raise ModelError(f"{arch}.rope.dimension_count is {n_rot}; an even number up to the head's {head_dim} is needed")
        scaling = gguf.get(f"{arch}.rope.scaling.type", "", str)
        factor = real("rope.scaling.factor", 1.0)
        if scaling not in ("", "none", "linear", "yarn"):
            raise ModelError(f"{arch}.rope.scaling.type is {scaling!r}, which pyllama does not know")
        tokens = gguf.metadata.get("tokenizer.ggml.tokens")
        table = gguf.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise ModelError("the tensor 'token_embd.weight' is missing or is not a matrix")
        n_vocab = table.shape[1]
        if tokens is not None and len(tokens) > n_vocab:
            raise ModelError(f"the vocabulary has {len(tokens)} tokens, the embedding table {n_vocab} rows")
        return cls(
            architecture=arch,
            n_vocab=n_vocab,
            n_ctx_train=n_ctx_train,
            n_embd=n_embd,
            n_layer=integer("block_count"),
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_ff=integer("feed_forward_length"),
            rms_eps=real("attention.layer_norm_rms_epsilon", rms_eps),
            n_rot=n_rot,
            rope_base=real("rope.freq_base", rope_base),
            rope_scaling=scaling if factor != 1.0 and scaling else ("linear" if factor != 1.0 else "none"),
            rope_factor=factor,
            n_ctx_orig=integer("rope.scaling.original_context_length", n_ctx_train),
        )


def make_rope(
    hp: Hparams, *, halves: bool, base: float | None = None, stretched: bool = True, factors: Vector | None = None
) -> Rope:
    """The rotation of one kind of layer.

    Args:
        halves: columns i and i + n/2 rotate together (else 2i and 2i + 1).
        base: instead of ``hp.rope_base``.
        stretched: apply the file's context scaling.
        factors: divisors of the frequencies [n_rot / 2], as long-context Llama 3 files carry them.

    Linear scaling is Chen et al. 2023, YaRN is Peng et al. 2023.
    """
    n, base = hp.n_rot, base or hp.rope_base
    frequencies = base ** (-np.arange(0, n, 2, dtype=np.float64) / n)
    if factors is not None:
        if len(factors) != n // 2:
            raise ModelError(f"{factors.name} has {len(factors)} elements; {n // 2} are needed")
        if not np.all(factors.data > 0):
            raise ModelError(f"{factors.name} has elements that are not positive")
        frequencies = frequencies / factors.data
    magnitude = 1.0
    if stretched and hp.rope_scaling == "linear":
        frequencies = frequencies / hp.rope_factor
    elif stretched and hp.rope_scaling == "yarn":
        if base <= 1:
            raise ModelError(f"a rotary base of {base} cannot be stretched by YaRN; one above 1 is needed")

        def column(turns: float) -> float:
            """The pair of columns that turns ``turns`` times within the original context."""
            return n * math.log(hp.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(0, math.floor(column(32))), min(n - 1, math.ceil(column(1)))
        ramp = np.clip((np.arange(n // 2) - low) / max(0.001, high - low), 0.0, 1.0)
        frequencies = frequencies / hp.rope_factor * ramp + frequencies * (1 - ramp)
        magnitude = 1.0 + 0.1 * math.log(hp.rope_factor)
    if not np.all(np.abs(frequencies) <= np.finfo(np.float32).max):
        raise ModelError(f"a rotary base of {base} stretched by {hp.rope_factor} leads to frequencies that are no numbers")
    return Rope(Vector("rope frequencies", frequencies.astype(np.float32)), halves, magnitude)
