"""A draft model: a smaller model of the same vocabulary that says what a larger one may go on with (Leviathan et al. 2023).

It keeps, for each slot, the keys and values of the tokens it has read there, as far as its blocks go. What a sequence did not
accept, shifted away or never had is found by comparing tokens, so nobody has to tell it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyllama.core import BLOCK_TOKENS
from pyllama.models import Model, SequenceInput, load

__all__ = ["Ask", "DraftModel"]


@dataclass(slots=True)
class Ask:
    """A sequence for which a guess is wanted."""

    slot: int
    tokens: Sequence[int]
    """Prompt and answer so far."""
    most: int
    """Tokens of the guess, at least one."""


@dataclass(eq=False, slots=True)
class _Slot:
    tokens: list[int] = field(default_factory=list)
    """Those whose keys and values are in the blocks."""
    blocks: list[int] = field(default_factory=list)


class DraftModel:
    """Guesses for the sequences of an engine, in the engine's thread.

    Args:
        model: the draft's alone from now on. It runs at least one sequence for each of the engine's slots.
        most: tokens of a guess.
    """

    def __init__(self, model: Model, most: int) -> None:
        self.model, self.most = model, most
        self._slots = [_Slot() for _ in range(model.max_sequences)]
        self._free = list(range(model.n_blocks))

    @classmethod
    def load(cls, path: str | os.PathLike[str], target: Model, n_slots: int, most: int, **options: Any) -> DraftModel:
        """Loads a draft for a model, on whose threads it runs.

        Args:
            options: as of :func:`pyllama.models.load`.

        Raises:
            ValueError: its vocabulary is another; and what :func:`pyllama.models.load` raises.
        """
        model = load(
            path,
            n_ctx=target.n_ctx,
            n_threads=target.n_threads,
            n_threads_batch=target.n_threads_batch,
            n_batch=target.n_batch,
            max_sequences=n_slots,
            pool=target.pool,
            **options,
        )
        draft = cls(model, most)
        draft.check_fits(target)
        return draft

    @property
    def n_slots(self) -> int:
        return len(self._slots)

    def check_fits(self, target: Model) -> None:
        """Makes sure that a token means the same to both models.

        Raises:
            ValueError: it does not.
        """
        (text, ends), (wanted_text, wanted_ends) = (m.tokenizer.token_table() for m in (self.model, target))
        same = text == wanted_text and ends.tolist() == wanted_ends.tolist()
        if not same or self.model.tokenizer.special_ids != target.tokenizer.special_ids:
            raise ValueError(
                f"the draft model {self.model.name!r} has another vocabulary than {target.name!r}"
                f" ({self.model.tokenizer.n_vocab} and {target.tokenizer.n_vocab} tokens): they must have the same"
            )

    def guess(self, asked: Sequence[Ask]) -> list[list[int]]:
        """What the model would go on with, greedily, one list for each: empty where it has yet to read more of the tokens
        (at most ``n_batch`` in a call, so that a long prompt does not freeze streams), or has no room for them."""
        guesses: list[list[int]] = [[] for _ in asked]
        ready = self._read(asked)
        while ready:
            for at, token in self._run(ready):
                guesses[at].append(token)
            ready = [
                (at, self._slots[asked[at].slot], guesses[at][-1:], True)
                for at, *_ in ready
                if 0 < len(guesses[at]) < asked[at].most
            ]
        return guesses

    def _read(self, asked: Sequence[Ask]) -> list[tuple[int, _Slot, Sequence[int], bool]]:
        """For each that can be worked on: its number, its slot, the next tokens, and whether they are the last ones."""
        parts, room = [], self.model.n_batch
        busy = [self._slots[ask.slot] for ask in asked]
        for at, (ask, slot) in enumerate(zip(asked, busy)):
            n_known = min(_n_equal(slot.tokens, ask.tokens), len(ask.tokens) - 1)
            del slot.tokens[n_known:]
            new = ask.tokens[n_known : n_known + room]
            # Files may pad the vocabulary with tokens that only a prompt of numbers can have.
            if new and max(new) < self.model.hp.n_vocab and self._reserve(slot, len(ask.tokens) + ask.most, busy):
                parts.append((at, slot, new, n_known + len(new) == len(ask.tokens)))
                room -= len(new)
        return parts

    def _run(self, parts: Sequence[tuple[int, _Slot, Sequence[int], bool]]) -> list[tuple[int, int]]:
        """Evaluates tokens: number and next token of each part that is the last."""
        rows = self.model.run(
            [SequenceInput(tokens, len(slot.tokens), slot.blocks, int(is_last)) for _, slot, tokens, is_last in parts]
        )
        for _, slot, tokens, _ in parts:
            slot.tokens += tokens
        best = rows[:, : self.model.tokenizer.n_vocab].argmax(axis=1).tolist()
        return list(zip([at for at, _, _, is_last in parts if is_last], best))

    def _reserve(self, slot: _Slot, n_tokens: int, busy: Sequence[_Slot]) -> bool:
        """Blocks for so many tokens, if need be those of slots that nobody asks about now. False: there are too few."""
        n_blocks = -(-n_tokens // BLOCK_TOKENS)
        self._free += slot.blocks[n_blocks:]
        del slot.blocks[n_blocks:]
        n_missing = n_blocks - len(slot.blocks)
        for other in self._slots:
            if n_missing > len(self._free) and other not in busy:
                self._free += other.blocks
                other.tokens, other.blocks = [], []
        if n_missing > len(self._free):
            return False
        slot.blocks += [self._free.pop() for _ in range(n_missing)]
        return True


def _n_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
