"""Perplexity of a text under a model, by the usual method: windows of ``n_ctx`` tokens that do not overlap, of which the second
half is scored, each token given those before it in its window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pyllama.core import BLOCK_TOKENS
from pyllama.models import Model, SequenceInput

__all__ = ["Estimate", "perplexity"]


@dataclass(frozen=True)
class Estimate:
    """After ``n_windows`` windows: the perplexity, its standard error, and the number of tokens scored."""

    n_windows: int
    value: float
    error: float
    n_scored: int


def perplexity(model: Model, text: str, n_ctx: int = 512) -> Iterator[Estimate]:
    """Scores a text; gives an estimate after each window, the last of which is the result.

    Args:
        model: loaded with a context of at least ``n_ctx``.
        n_ctx: tokens of a window.

    Raises:
        ValueError: the text does not fill a window, or the window is too small or larger than the model's context.
    """
    if not 4 <= n_ctx <= model.n_ctx:
        raise ValueError(f"windows of {n_ctx} tokens; 4 to {model.n_ctx} are possible")
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text, add_special=True, parse_special=False)
    if len(tokens) < n_ctx:
        raise ValueError(f"the text has {len(tokens)} tokens, a window {n_ctx}")
    losses: list[np.ndarray] = []
    for window in range(len(tokens) // n_ctx):
        piece = tokens[window * n_ctx : (window + 1) * n_ctx]
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            piece[0] = tokenizer.bos_id
        losses.append(_losses(model, piece, n_ctx // 2))
        scored = np.concatenate(losses)
        mean = float(scored.mean())
        spread = float(scored.std(ddof=1)) / math.sqrt(len(scored)) if len(scored) > 1 else 0.0
        yield Estimate(window + 1, math.exp(mean), math.exp(mean) * spread, len(scored))


def _losses(model: Model, tokens: list[int], first: int) -> np.ndarray:
    """Negative log-likelihoods of tokens[first + 1:], float64."""
    blocks = list(range(-(-len(tokens) // BLOCK_TOKENS)))
    losses = []
    # Batches of rows that stay small even with a vocabulary of a quarter of a million.
    step = min(model.n_batch, 128)
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        outputs = min(len(chunk), max(0, start + len(chunk) - first))
        rows = model.run([SequenceInput(chunk, start, blocks, outputs)])
        for i, row in enumerate(rows):
            position = start + len(chunk) - outputs + i
            if position + 1 < len(tokens):
                row = row.astype(np.float64)
                highest = row.max()
                losses.append(highest + math.log(np.exp(row - highest).sum()) - row[tokens[position + 1]])
    return np.array(losses)
