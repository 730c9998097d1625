"""Which tokens of which sequence go into the next batch.

Sequences that generate come first, one token each; what is left of the batch goes to prompts, in chunks that are small while
streams run, so that a long prompt never freezes them. When the pool of blocks runs dry, the youngest sequence gives its blocks
up and is computed again later; when a sequence fills the context alone, its oldest tokens are dropped (context shift).

This module knows tokens and blocks, not text, sampling or threads.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyllama.kv_cache import BlockTable, KVCache

__all__ = ["BURST_SECONDS", "Chunk", "ContextFull", "Scheduler", "Sequence", "truncated"]

_LEAST_CHUNK = 16
BURST_SECONDS = 1 / 60
"""What is generated within so short a time may be told of at once: screens show nothing more often."""
_LONGEST_BURST = 8
_STEPS_BESIDE = 3.0  # a step with a chunk of a prompt may take as long as about this many that only generate


class ContextFull(RuntimeError):
    """``sequence`` cannot go on: the context is too small for it, even alone."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__("the context is too small for this request")
        self.sequence = sequence


class _Model(Protocol):
    n_ctx: int
    n_batch: int
    max_sequences: int


@dataclass(eq=False, slots=True)
class Sequence:
    """One request's tokens on their way."""

    tokens: list[int]
    """Prompt and generated tokens; after a context shift without the dropped ones."""
    n_keep: int = 0
    """Tokens at the beginning that a context shift spares."""
    reuse: bool = True
    """Whether other sequences' blocks may be shared."""
    wanted_slot: int = -1
    owner: Any = None
    """Whatever the engine keeps with the sequence."""
    slot: int = -1
    table: BlockTable = field(default_factory=BlockTable)
    n_evaluated: int = 0
    """Tokens whose keys and values are in the table's blocks."""
    n_reused: int = 0
    """Tokens before the first generated one that needed no evaluation, since another sequence had done it."""
    n_prompt_run: int = 0
    """Tokens evaluated before the first one was generated."""
    generating: bool = False
    """The prompt has been evaluated once, and a token been generated."""
    guess: list[int] = field(default_factory=list)
    """What may follow the tokens."""
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
    is_last: bool
    """No token waits after them."""
    guess: list[int] = field(default_factory=list)
    """Tokens after the last one, to be evaluated as well: they may be what is going to be sampled."""


def truncated(prompt: list[int], n_keep: int, n_ctx: int) -> list[int]:
    """A prompt that leaves room in the context: of a longer one, halves of the context after the first ``n_keep`` tokens are
    left out, as many as need be. So does llama.cpp's server.

    Args:
        n_keep: at most ``n_ctx - 2``.
    """
    if len(prompt) < n_ctx:
        return prompt
    half = (n_ctx - n_keep) // 2
    n_dropped = (len(prompt) - n_keep - half) // half * half
    return prompt[:n_keep] + prompt[n_keep + n_dropped :]


class Scheduler:
    """Holds the waiting and the running sequences.

    Args:
        model: for its limits.
        n_slots: most sequences at a time.
        continuous: admit a sequence while others run; otherwise it waits until they have ended.
    """

    def __init__(self, model: _Model, cache: KVCache, n_slots: int, *, continuous: bool) -> None:
        self.model, self.cache, self.n_slots, self.continuous = model, cache, n_slots, continuous
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self._numbers = itertools.count()
        self._step_seconds = 0.0  # of a step that only generates
        self._chunk_beside = _LEAST_CHUNK  # tokens of prompts in a step beside streams

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
            missing = self.cache.n_missing(sequence.tokens, reuse=sequence.reuse)
            if self.running and missing > self.cache.n_available - self._n_promised():
                return  # it would only be preempted again
            sequence.slot = sequence.wanted_slot if sequence.wanted_slot >= 0 else min(free)
            free.discard(sequence.slot)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.running.sort(key=lambda other: other.number)

    def _n_promised(self) -> int:
        """Blocks that running sequences have yet to get for the tokens they have."""
        return sum(max(0, len(s.tokens) // self.cache.block_tokens + 1 - len(s.table.blocks)) for s in self.running)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks; it waits at the front, to be computed again."""
        self.running.remove(sequence)
        self.cache.release(sequence.table, sequence.tokens, sequence.n_evaluated)
        sequence.n_evaluated = 0
        if not sequence.generating:
            sequence.n_reused = 0
        self.waiting.appendleft(sequence)

    # -- the next batch -----------------------------------------------------------------------------------------------

    def schedule(self) -> list[Chunk]:
        """The next batch; empty if there is nothing to do.

        Raises:
            ContextFull: the caller ends its sequence and calls again.
        """
        if self.waiting:
            self._admit()
        chunks: list[Chunk] = []
        for sequence in tuple(self.running):
            wants_one = sequence.generating and sequence.n_waiting == 1 and sequence in self.running
            if wants_one and len(chunks) < self.model.n_batch and self._make_room(sequence, 1):
                chunks.append(Chunk(sequence, 1, True))
        if len(chunks) < len(self.running):
            self._add_prompts(chunks)
        else:
            self._add_guesses(chunks)
        return [chunk for chunk in chunks if chunk.sequence in self.running]

    def _add_guesses(self, chunks: list[Chunk]) -> None:
        """Fills the batch up with guesses, as far as blocks for them can be had without taking others'."""
        room = 0
        for chunk in chunks:
            if chunk.sequence.guess:
                room = room or self.model.n_batch - len(chunks)
                self._add_guess(chunk, room)
                room -= len(chunk.guess)
                if room <= 0:
                    return

    def _add_guess(self, chunk: Chunk, room: int) -> None:
        sequence = chunk.sequence
        n_evaluated = sequence.n_evaluated + 1
        guess = sequence.guess[: min(room, self.model.n_ctx - n_evaluated)]
        if guess and self.cache.reserve(sequence.table, n_evaluated + len(guess)):
            chunk.guess = guess

    def burst(self, chunks: list[Chunk], most: int) -> int:
        """How many steps these sequences, which all generate, may make before anybody looks at them again; there are blocks for
        so many then.

        Args:
            most: tokens that each of them may still get.
        """
        if not self._step_seconds:
            return 1
        n_steps = min(most, _LONGEST_BURST, int(BURST_SECONDS / self._step_seconds))
        for chunk in chunks:
            n_steps = min(n_steps, self.model.n_ctx - chunk.sequence.n_evaluated)
        if n_steps < 2:
            return 1
        reserve = self.cache.reserve
        enough = all(reserve(chunk.sequence.table, chunk.sequence.n_evaluated + n_steps) for chunk in chunks)
        return n_steps if enough else 1

    def accept(self, sequence: Sequence) -> None:
        """Counts one more token as evaluated: a guess that sampling gave too, or one of a burst."""
        sequence.n_evaluated += 1
        self.cache.commit(sequence.table, sequence.tokens, sequence.n_evaluated)

    def _add_prompts(self, chunks: list[Chunk]) -> None:
        """Fills the batch up with chunks of prompts, or of what was preempted, in order of arrival."""
        budget = self.model.n_batch - len(chunks)
        if chunks:
            budget = min(budget, self._chunk_beside)
        computed_now = set()
        for sequence in tuple(self.running):
            if budget <= 0:
                return
            if sequence not in self.running or (sequence.generating and sequence.n_waiting == 1):
                continue
            if sequence.reuse:
                self._share(sequence)
            block = self.cache.next_block(sequence.table, sequence.tokens)
            if block in computed_now and sequence.reuse:
                continue  # another sequence has it in this batch; it will be shared in the next
            n = min(sequence.n_waiting, budget, self.model.n_ctx - sequence.n_evaluated)
            if n > 0 and self._make_room(sequence, n):
                chunks.append(Chunk(sequence, n, n == sequence.n_waiting))
                budget -= n
                if block is not None:
                    computed_now.add(block)

    def _share(self, sequence: Sequence) -> None:
        before = sequence.n_evaluated
        sequence.n_evaluated = self.cache.share(sequence.table, sequence.tokens, before)
        if not sequence.generating:
            sequence.n_reused += sequence.n_evaluated - before

    def _make_room(self, sequence: Sequence, n: int) -> bool:
        """Blocks for the sequence's next ``n`` tokens, if need be by preempting younger ones or dropping its own oldest tokens.
        False: it has to wait for older ones."""
        end = sequence.n_evaluated + n
        if end <= min(len(sequence.table.blocks) * self.cache.block_tokens, self.model.n_ctx):
            return True
        if end > self.model.n_ctx and not self._shift(sequence):
            return False
        while not self.cache.reserve(sequence.table, sequence.n_evaluated + n):
            if not self._preempt_younger(sequence):
                return False
        return True

    def _preempt_younger(self, sequence: Sequence) -> bool:
        """Makes the youngest sequence wait; False if that is this one, which has to wait for older ones itself.

        Raises:
            ContextFull: there is no other.
        """
        if len(self.running) == 1:
            raise ContextFull(sequence)
        if self.running[-1] is sequence:
            return False
        self._preempt(self.running[-1])
        return True

    def _shift(self, sequence: Sequence) -> bool:
        """Drops the older half of what follows the first ``n_keep`` tokens; the rest moves up. False: it has to wait."""
        keep = min(sequence.n_keep, max(0, sequence.n_evaluated - 4))
        n_dropped = (sequence.n_evaluated - keep) // 2
        if n_dropped < 1:
            raise ContextFull(sequence)
        while not self.cache.drop(sequence.table, keep, n_dropped, sequence.n_evaluated):
            if not self._preempt_younger(sequence):
                return False
        del sequence.tokens[keep : keep + n_dropped]
        sequence.n_evaluated -= n_dropped
        sequence.shifted = True
        return True

    def advance(self, chunks: list[Chunk], seconds: float, n_steps: int = 1) -> None:
        """Counts a batch as evaluated; of a burst, its first step.

        Args:
            seconds: what the run took; of a burst, a step of it in the mean.
            n_steps: of the burst.
        """
        n_prompt = n_streams = n_guessed = 0
        for chunk in chunks:
            sequence = chunk.sequence
            n_guessed += len(chunk.guess)
            if not sequence.generating:
                sequence.n_prompt_run += chunk.n
            if sequence.generating and sequence.n_waiting == 1:
                n_streams += 1
            else:
                n_prompt += chunk.n
            sequence.n_evaluated += chunk.n
            self.cache.commit(sequence.table, sequence.tokens, sequence.n_evaluated)
        if n_guessed:
            return
        if n_prompt == 0:
            # A running mean, which one interrupted step does not throw off.
            mean = self._step_seconds or seconds
            weight = 0.8**n_steps
            self._step_seconds = weight * mean + (1 - weight) * min(seconds, 4 * mean)
        elif n_streams and self._step_seconds:
            self._adapt(n_prompt, seconds)

    def _adapt(self, n_prompt: int, seconds: float) -> None:
        """Learns how large a chunk may be beside streams.

        A chunk r times as large takes at most r times as long, since a part of each step is the same for every size. So this
        comes near to the wanted time from below.
        """
        ratio = _STEPS_BESIDE * self._step_seconds / seconds
        if n_prompt == self._chunk_beside or ratio < 1:
            self._chunk_beside = max(_LEAST_CHUNK, min(int(n_prompt * min(ratio, 2.0)), self.model.n_batch))
