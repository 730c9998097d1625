"""Which tokens of which sequence go into the next batch.

Sequences that generate come first, one token each; what is left of the batch goes to prompts, in chunks that are small while
streams run, so that a long prompt never freezes them. When the pool of blocks runs dry, the youngest sequence gives its blocks
up and is computed again later; when one sequence alone fills the pool, its oldest tokens are dropped (context shift).

This module knows tokens and blocks, not text, sampling or threads.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyllama.kv_cache import BlockTable, KVCache

__all__ = ["Chunk", "ContextFull", "Scheduler", "Sequence"]

_LEAST_CHUNK = 16
_CHUNK_STEPS = 2.0  # a chunk of a prompt may cost the running streams about this many ordinary steps


class ContextFull(RuntimeError):
    """A sequence cannot go on: there are not enough blocks for it, even alone."""


class _Model(Protocol):
    n_ctx: int
    n_batch: int
    max_sequences: int

    def kv_copy(self, src_blocks: list[int], src_pos: int, dst_blocks: list[int], dst_pos: int, n: int) -> None: ...


@dataclass(eq=False, slots=True)
class Sequence:
    """One request's tokens on their way."""

    tokens: list[int]
    """Prompt and generated tokens; after a context shift without the dropped ones."""
    n_keep: int = 0
    """Tokens at the beginning that a context shift spares."""
    reuse: bool = True
    """Whether earlier sequences' blocks may be shared."""
    wanted_slot: int = -1
    owner: Any = None
    """Whatever the engine keeps with the sequence."""
    slot: int = -1
    table: BlockTable = field(default_factory=BlockTable)
    n_evaluated: int = 0
    """Tokens whose keys and values are in the table's blocks."""
    n_reused: int = 0
    """Tokens that were not evaluated because an earlier sequence had done so, at the first admission."""
    n_run: int = 0
    """Tokens evaluated in all."""
    n_prompt_run: int = 0
    """Tokens evaluated before the first one was generated."""
    generating: bool = False
    shifted: bool = False
    number: int = 0
    """Order of arrival."""

    @property
    def n_waiting(self) -> int:
        """Tokens that are yet to be evaluated."""
        return len(self.tokens) - self.n_evaluated


@dataclass(slots=True)
class Chunk:
    """``n`` tokens of a sequence, from ``n_evaluated`` on, for one run; logits are wanted if they are its last ones."""

    sequence: Sequence
    n: int

    @property
    def is_last(self) -> bool:
        return self.n == self.sequence.n_waiting


class Scheduler:
    """Holds the waiting and the running sequences.

    Args:
        model: runs the batches; used for copies of blocks here.
        n_slots: most sequences at a time.
        continuous: admit a sequence while others run; otherwise it waits until they have ended.
    """

    def __init__(self, model: _Model, cache: KVCache, n_slots: int, *, continuous: bool) -> None:
        self.model, self.cache, self.n_slots, self.continuous = model, cache, n_slots, continuous
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self._numbers = itertools.count()
        self._step_seconds = self._token_seconds = 0.0  # of a step that only generates; of a prompt's token

    # -- sequences come and go ----------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        sequence.number = next(self._numbers)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it is; its blocks stay known as prefixes."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.cache.release(sequence.table, sequence.tokens, sequence.n_evaluated)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _admit(self) -> None:
        if not self.continuous and self.running:
            return
        free = set(range(self.n_slots)) - {sequence.slot for sequence in self.running}
        for sequence in list(self.waiting):
            if not free:
                return
            if sequence.wanted_slot >= 0 and sequence.wanted_slot not in free:
                continue
            if self.running and self.cache.n_missing(sequence.tokens) > self.cache.n_available:
                return  # it would only be preempted again
            sequence.slot = sequence.wanted_slot if sequence.wanted_slot >= 0 else min(free)
            free.discard(sequence.slot)
            self.waiting.remove(sequence)
            self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        sequence.table, sequence.n_evaluated = self.cache.acquire(sequence.tokens, reuse=sequence.reuse)
        if sequence.n_run == 0:
            sequence.n_reused = sequence.n_evaluated
        self.running.append(sequence)
        self.running.sort(key=lambda other: other.number)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks; it waits at the front, to be computed again."""
        self.running.remove(sequence)
        self.cache.release(sequence.table, sequence.tokens, sequence.n_evaluated)
        sequence.n_evaluated = 0
        self.waiting.appendleft(sequence)

    # -- the next batch -----------------------------------------------------------------------------------------------

    def schedule(self) -> list[Chunk]:
        """The next batch; empty if there is nothing to do.

        Raises:
            ContextFull: ``args[1]`` is a sequence that can never go on; the caller ends it and calls again.
        """
        self._admit()
        chunks: list[Chunk] = []
        budget = self.model.n_batch
        generating = [s for s in self.running if s.n_waiting == 1 and s.generating]
        for sequence in generating:
            if budget and sequence in self.running and len(chunks) < self.model.max_sequences and self._make_room(sequence, 1):
                chunks.append(Chunk(sequence, 1))
                budget -= 1
        if chunks:
            budget = min(budget, self._chunk_beside_streams())
        for sequence in list(self.running):
            if budget <= 0 or len(chunks) >= self.model.max_sequences:
                break
            if sequence not in self.running or (sequence.n_waiting == 1 and sequence.generating):
                continue
            n = min(sequence.n_waiting, budget)
            if self._make_room(sequence, n):
                chunks.append(Chunk(sequence, n))
                budget -= n
        return [chunk for chunk in chunks if chunk.sequence in self.running]

    def _chunk_beside_streams(self) -> int:
        if not self._step_seconds or not self._token_seconds:
            return 2 * _LEAST_CHUNK
        return max(_LEAST_CHUNK, int(_CHUNK_STEPS * self._step_seconds / self._token_seconds))

    def _make_room(self, sequence: Sequence, n: int) -> bool:
        """Blocks for the sequence's next ``n`` tokens, if need be by preempting younger ones or dropping its own oldest tokens.
        False: it has to wait for older ones."""
        if sequence.n_evaluated + n > self.model.n_ctx:
            self._shift(sequence)
        while not self.cache.reserve(sequence.table, sequence.n_evaluated + n):
            youngest = self.running[-1]
            if youngest is not sequence:
                self._preempt(youngest)
            elif len(self.running) > 1:
                return False  # older sequences are running and will give blocks back
            else:
                self._shift(sequence)
        return True

    def _shift(self, sequence: Sequence) -> None:
        """Drops the older half of what follows the first ``n_keep`` tokens; the rest moves up, its keys rotated."""
        keep = min(sequence.n_keep, max(0, sequence.n_evaluated - 4))
        dropped = (sequence.n_evaluated - keep) // 2
        if dropped < 1:
            raise ContextFull("the context is too small for this request", sequence)
        before = self.cache.own_from(sequence.table, keep)
        while before is None:
            if self.running[-1] is sequence:
                raise ContextFull("there are too few blocks to shift the context", sequence)
            self._preempt(self.running[-1])
            before = self.cache.own_from(sequence.table, keep)
        moved = sequence.n_evaluated - keep - dropped
        self.model.kv_copy(before, keep + dropped, sequence.table.blocks, keep, moved)
        del sequence.tokens[keep : keep + dropped]
        sequence.n_evaluated -= dropped
        sequence.shifted = True
        self.cache.forget(sequence.table, sequence.n_evaluated)

    def advance(self, chunks: list[Chunk], seconds: float) -> None:
        """Counts a batch as evaluated.

        Args:
            seconds: what the run took.
        """
        n_prompt = 0
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.n_evaluated += chunk.n
            sequence.n_run += chunk.n
            if not sequence.generating:
                sequence.n_prompt_run += chunk.n
                n_prompt += chunk.n
            self.cache.commit(sequence.table, sequence.tokens, sequence.n_evaluated)
        if n_prompt == 0:
            self._step_seconds = _blend(self._step_seconds, seconds)
        elif n_prompt >= _LEAST_CHUNK:
            beside = self._step_seconds if n_prompt < sum(chunk.n for chunk in chunks) else 0.0
            self._token_seconds = _blend(self._token_seconds, max(seconds - beside, 0.1 * seconds) / n_prompt)


def _blend(old: float, new: float) -> float:
    """A running mean that forgets slowly and is not thrown off by one interrupted step."""
    return new if old == 0.0 else 0.9 * old + 0.1 * min(new, 4 * old)

