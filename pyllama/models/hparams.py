"""Hyper-parameters as GGUF metadata gives them, checked, and the rotary embeddings that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pyllama.gguf import GGUFFile
from pyllama.graph import Rope, Vector

__all__ = ["Hparams", "ModelError", "RopeOptions", "RopeScaling", "make_rope"]

T = TypeVar("T")
_MOST = 1 << 20  # no dimension of a real model is larger; a lying file is refused before anything is allocated


class ModelError(ValueError):
    """A file that is a GGUF, but not a model that can be run; the message says why."""


@dataclass(frozen=True, kw_only=True)
class RopeOptions:
    """What to do about rotary positions instead of what a file says; None: as the file says. The names are llama.cpp's."""

    scaling: str | None = None
    """``none``, ``linear`` or ``yarn``."""
    freq_base: float | None = None
    freq_scale: float | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_orig_ctx: int | None = None


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched beyond the context that a model was trained with.

    Linear scaling is Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation"; YaRN
    is Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models".
    """

    kind: str
    """``none``, ``linear`` or ``yarn``."""
    base: float
    scale: float
    """Factor on the frequencies: 1/s for a context that is stretched s times."""
    ext_factor: float
    """How much of YaRN to mix into linear scaling: 0 none, 1 all."""
    attn_factor: float
    """Factor on cosine and sine besides the one that follows from YaRN."""
    beta_fast: float
    """Columns that turn more often than this within the original context keep their frequencies under YaRN."""
    beta_slow: float
    """Columns that turn less often than this have theirs scaled linearly."""
    n_ctx_orig: int
    """The context before stretching."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "linear", "yarn"):
            raise ModelError(f"rotary positions cannot be scaled by {self.kind!r}; none, linear and yarn are possible")
        for name in ("base", "scale", "attn_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not 1e-30 <= value <= 1e30:
                raise ModelError(f"the {name} of rotary positions is {value}; a number above 0 is needed")
        if not 0 <= self.ext_factor <= 1e30:
            raise ModelError(f"the ext_factor of rotary positions is {self.ext_factor}; 0 or more is needed")
        if self.n_ctx_orig < 1:
            raise ModelError(f"the n_ctx_orig of rotary positions is {self.n_ctx_orig}; 1 or more is needed")

    def replaced(self, options: RopeOptions) -> RopeScaling:
        """With what the options say; a kind that is given decides anew about ``ext_factor`` and whether there is a scale."""
        kind = options.scaling or self.kind
        ext_factor = self.ext_factor if options.scaling in (None, self.kind) else float(kind == "yarn")
        return RopeScaling(
            kind=kind,
            base=_or(options.freq_base, self.base),
            scale=1.0 if kind == "none" else _or(options.freq_scale, self.scale),
            ext_factor=_or(options.yarn_ext_factor, ext_factor),
            attn_factor=_or(options.yarn_attn_factor, 1.0) * self.attn_factor,
            beta_fast=_or(options.yarn_beta_fast, self.beta_fast),
            beta_slow=_or(options.yarn_beta_slow, self.beta_slow),
            n_ctx_orig=_or(options.yarn_orig_ctx, self.n_ctx_orig),
        )

    @property
    def magnitude(self) -> float:
        """Factor on cosine and sine; YaRN's part makes up for the lower entropy of longer contexts."""
        return self.attn_factor * (1.0 - 0.1 * math.log(self.scale) if self.ext_factor else 1.0)

    def stretch(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        """Scaled frequencies, float64 [n / 2] like those given, which the n rotated columns turn by with each position."""
        if not self.ext_factor:
            return frequencies * self.scale
        if base <= 1:
            raise ModelError(f"a rotary base of {base} cannot be stretched by YaRN; one above 1 is needed")
        n = 2 * len(frequencies)

        def column(turns: float) -> float:
            """The pair of columns that turns ``turns`` times within the original context."""
            return n * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(0, math.floor(column(self.beta_fast))), min(n - 1, math.ceil(column(self.beta_slow)))
        ramp = np.clip((np.arange(n // 2) - low) / max(0.001, high - low), 0.0, 1.0)
        kept = (1 - ramp) * self.ext_factor
        return frequencies * self.scale * (1 - kept) + frequencies * kept


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


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
    rope: RopeScaling

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

        def real(key: str, default: float, least: float = 1e-30) -> float:
            name = f"{arch}.{key}"
            value = float(gguf.get(name, default, float))
            if not (math.isfinite(value) and value >= least):
                raise ModelError(f"{name} is {value}; a {'positive' if least else 'finite'} number is needed")
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
        kind = gguf.get(f"{arch}.rope.scaling.type", "linear", str)
        if kind not in ("none", "linear", "yarn"):
            raise ModelError(f"{arch}.rope.scaling.type is {kind!r}, which pyllama does not know")
        rope = RopeScaling(
            kind=kind,
            base=real("rope.freq_base", rope_base),
            scale=1.0 if kind == "none" else 1.0 / real("rope.scaling.factor", real("rope.scale_linear", 1.0)),
            ext_factor=real("rope.scaling.yarn_ext_factor", float(kind == "yarn"), least=0.0),
            attn_factor=real("rope.scaling.attn_factor", 1.0) * real("rope.scaling.yarn_attn_factor", 1.0),
            beta_fast=real("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=real("rope.scaling.yarn_beta_slow", 1.0),
            n_ctx_orig=integer("rope.scaling.original_context_length", n_ctx_train),
        )
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
            rope=rope,
        )


def make_rope(
    hp: Hparams, *, halves: bool, base: float | None = None, stretched: bool = True, factors: Vector | None = None
) -> Rope:
    """The rotation of one kind of layer.

    Args:
        halves: columns i and i + n/2 rotate together (else 2i and 2i + 1).
        base: instead of ``hp.rope.base``.
        stretched: apply ``hp.rope``.
        factors: divisors of the frequencies [n_rot / 2], as long-context Llama 3 files carry them.
    """
    n, base = hp.n_rot, base or hp.rope.base
    frequencies = base ** (-np.arange(0, n, 2, dtype=np.float64) / n)
    if factors is not None:
        if len(factors) != n // 2:
            raise ModelError(f"{factors.name} has {len(factors)} elements; {n // 2} are needed")
        if not np.all(factors.data > 0):
            raise ModelError(f"{factors.name} has elements that are not positive")
        frequencies = frequencies / factors.data
    if stretched:
        frequencies = hp.rope.stretch(frequencies, base)
    if not np.all(np.abs(frequencies) <= np.finfo(np.float32).max):
        raise ModelError(f"a rotary base of {base} scaled by {hp.rope.scale} leads to frequencies that are no numbers")
    vector = Vector("rope frequencies", frequencies.astype(np.float32))
    return Rope(vector, halves, hp.rope.magnitude if stretched else 1.0)
