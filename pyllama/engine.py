"""The engine: requests in, token events out.

One thread owns the model. Each of its steps takes a batch from the scheduler, runs it, samples a token for every sequence whose
logits came, and hands the text to that request's :class:`Stream`. Any number of threads may submit requests and read streams.
This module knows nothing of HTTP, chat templates or files.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyllama.core import BLOCK_TOKENS
from pyllama.kv_cache import KVCache
from pyllama.models import Model, SequenceInput
from pyllama.sampling import Sample, Sampler, SamplingParams
from pyllama.scheduler import Chunk, ContextFull, Scheduler, Sequence

__all__ = ["Done", "Engine", "EngineClosed", "Request", "Stream", "Timings", "Token"]

_MOST_UNREAD = 100_000  # events; a stream that nobody reads is cancelled then


class EngineClosed(RuntimeError):
    """The engine was closed before the request could end."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate, and how."""

    prompt: tuple[int, ...]
    """Tokens; with fewer than one there is nothing to go on from, and the request is refused."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n_predict: int = -1
    """Most tokens to generate; -1: no limit; 0: only evaluate the prompt."""
    n_keep: int = 0
    """Tokens of the prompt that a context shift spares; -1: all."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of it."""
    cache_prompt: bool = True
    """Share blocks that earlier requests have computed."""
    slot_id: int = -1
    """The slot to run in; -1: any."""
    embedding: bool = False
    """Give the last token's state instead of generating."""


@dataclass(frozen=True, slots=True)
class Token:
    """Some new text: never part of a character, never the beginning of a stop string."""

    text: str
    tokens: tuple[int, ...]
    samples: tuple[Sample, ...]
    """One for each token, with what ``n_probs`` asked for."""


@dataclass(frozen=True, slots=True)
class Timings:
    prompt_n: int
    """Prompt tokens that were evaluated, which shared ones are not."""
    prompt_ms: float
    predicted_n: int
    predicted_ms: float


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of every stream."""

    reason: str
    """``eos``, ``limit``, ``word`` (a stop string), ``cancelled`` or ``error``."""
    stopping_word: str
    n_prompt: int
    """Tokens of the prompt."""
    n_past: int
    """Tokens of prompt and answer that are in the context in the end."""
    n_reused: int
    """Tokens of the prompt that needed no evaluation."""
    n_predicted: int
    truncated: bool
    """Tokens were dropped because the context was full."""
    timings: Timings
    slot_id: int
    error: str | None = None
    embedding: np.ndarray | None = None
    """float32 [n_embd], for requests that asked for it."""


class Stream:
    """One request's events: iterate until :class:`Done`, which is the last."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self.slot_id = request.slot_id
        """The slot in which it runs; known when the first :class:`Token` comes."""
        self.cancelled = False
        self._engine = engine
        self._events: queue.SimpleQueue[Token | Done] = queue.SimpleQueue()
        self._ended = False

    def __iter__(self) -> Iterator[Token | Done]:
        while not self._ended:
            yield self.get()

    def get(self, timeout: float | None = None) -> Token | Done:
        """The next event.

        Raises:
            queue.Empty: none came within ``timeout`` seconds.
            StopIteration: the stream has ended.
        """
        if self._ended:
            raise StopIteration
        event = self._events.get(timeout=timeout)
        self._ended = isinstance(event, Done)
        return event

    def cancel(self) -> None:
        """Ends the request within a step; the stream still ends with :class:`Done`."""
        self.cancelled = True
        self._engine.wake()

    def result(self) -> tuple[str, list[Sample], Done]:
        """Waits for the end: all text, all samples, and the last event."""
        text: list[str] = []
        samples: list[Sample] = []
        for event in self:
            if isinstance(event, Done):
                return "".join(text), samples, event
            text.append(event.text)
            samples += event.samples
        raise EngineClosed("the stream has been read already")


class _Text:
    """Turns tokens into text that may be sent: whole characters, and nothing that could be the beginning of a stop string."""

    def __init__(self, decoder: Any, stop: tuple[str, ...]) -> None:
        self._decoder, self._stop = decoder, tuple(word for word in stop if word)
        self._held = ""
        self._samples: deque[tuple[Sample, int]] = deque()  # what is not sent yet, with the length of its text
        self.stopping_word = ""

    @property
    def in_character(self) -> bool:
        """The last token ended within a character."""
        return self._decoder.pending

    def push(self, sample: Sample) -> Token | None:
        """Adds a token; the text that is safe to send, if any. Sets ``stopping_word`` if one is complete."""
        piece = self._decoder.push(sample.token)
        self._samples.append((sample, len(piece)))
        if not piece:
            return None
        self._held += piece
        found = [(at, word) for word in self._stop if (at := self._held.find(word)) >= 0]
        if found:
            at, self.stopping_word = min(found)
            return self._send(at)
        return self._send(len(self._held) - self._longest_beginning())

    def flush(self) -> Token | None:
        """The rest: what was held back, and the replacement of an incomplete character."""
        rest = self._decoder.flush()
        if rest and self._samples:
            sample, length = self._samples.pop()
            self._samples.append((sample, length + len(rest)))
        self._held += rest
        return self._send(len(self._held)) if self._held or self._samples else None

    def _longest_beginning(self) -> int:
        """How much of the held text's end is the beginning of a stop string."""
        longest = 0
        for word in self._stop:
            for n in range(min(len(word) - 1, len(self._held)), longest, -1):
                if self._held.endswith(word[:n]):
                    longest = n
                    break
        return longest

    def _send(self, n: int) -> Token | None:
        """Sends the first ``n`` held characters with the tokens that begin in them."""
        if n == 0 and self._held:
            return None
        text, self._held = self._held[:n], self._held[n:]
        samples, left = [], n
        while self._samples and (left > 0 or self._samples[0][1] == 0):
            sample, length = self._samples.popleft()
            samples.append(sample)
            if length > left:  # the rest of this token's text comes with a later event, or never
                self._samples.appendleft((_CONTINUED, length - left))
                break
            left -= length
        samples = [sample for sample in samples if sample is not _CONTINUED]
        return Token(text, tuple(sample.token for sample in samples), tuple(samples))


_CONTINUED = Sample(-1)


class _Job:
    """A request on its way through the engine."""

    def __init__(self, stream: Stream, sampler: Sampler, text: _Text, n_prompt: int, truncated: bool) -> None:
        self.stream, self.sampler, self.text = stream, sampler, text
        self.n_prompt, self.truncated = n_prompt, truncated
        self.n_predicted = 0
        self.started = self.first_token = 0.0


class Engine:
    """Runs requests on a model; close it when done, or use it as a context manager.

    Args:
        n_slots: requests that are worked on at a time.
        continuous: let a new request join while others run; otherwise it waits until they have ended.
    """

    def __init__(self, model: Model, n_slots: int = 1, *, continuous: bool = True) -> None:
        if not 1 <= n_slots <= model.max_sequences:
            raise ValueError(f"n_slots is {n_slots}; 1 to {model.max_sequences} are possible")
        self.model, self.n_slots = model, n_slots
        self._cache = KVCache(model.n_blocks, BLOCK_TOKENS, lambda src, dst, n: model.kv_copy([src], 0, [dst], 0, n))
        self._scheduler = Scheduler(model, self._cache, n_slots, continuous=continuous)
        self._submitted: deque[Stream] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="pyllama-engine", daemon=True)
        self._thread.start()

    # -- for any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Queues a request.

        Raises:
            ValueError: the prompt is empty, or a token is not in the vocabulary, or there is no such slot.
            GrammarError: the grammar is not one.
            EngineClosed: the engine has been closed.
        """
        if not request.prompt:
            raise ValueError("the prompt is empty")
        n_vocab = self.model.hp.n_vocab
        if min(request.prompt) < 0 or max(request.prompt) >= n_vocab:
            raise ValueError(f"the prompt has a token that is not in the vocabulary of {n_vocab}")
        if not -1 <= request.slot_id < self.n_slots:
            raise ValueError(f"slot {request.slot_id} does not exist; there are {self.n_slots}")
        stream = Stream(self, request)
        stream.sampler = Sampler(request.sampling, self.model.tokenizer, request.prompt, self.model.n_ctx)
        with self._wake:
            if self._closing:
                raise EngineClosed("the engine has been closed")
            self._submitted.append(stream)
            self._wake.notify()
        return stream

    def wake(self) -> None:
        """Makes the engine look at its streams, if it sleeps."""
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """Ends all requests with ``cancelled`` and stops the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_running(self) -> int:
        """Requests in slots."""
        return len(self._scheduler.running)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._scheduler.waiting) + len(self._submitted)

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._wake:
                while not (self._closing or self._submitted or scheduler.running or scheduler.waiting):
                    self._wake.wait()
                arrived = list(self._submitted)
                self._submitted.clear()
                closing = self._closing
            for stream in arrived:
                scheduler.add(self._make_sequence(stream))
            if closing:
                for sequence in [*scheduler.running, *scheduler.waiting]:
                    self._end(sequence, "cancelled")
                return
            for sequence in [*scheduler.running, *scheduler.waiting]:
                if sequence.owner.stream.cancelled:
                    self._end(sequence, "cancelled")
            self._step()

    def _make_sequence(self, stream: Stream) -> Sequence:
        request, n_ctx = stream.request, self.model.n_ctx
        tokens, truncated = list(request.prompt), False
        n_keep = len(tokens) if request.n_keep < 0 else min(request.n_keep, len(tokens))
        if self.model.tokenizer.add_bos and n_keep and request.n_keep >= 0:
            n_keep = min(n_keep + 1, len(tokens))
        n_keep = min(n_keep, max(0, n_ctx - 4))
        if len(tokens) >= n_ctx and len(tokens) > 1:
            # As the documented server does: drop whole half-contexts after the first n_keep tokens.
            half = max(1, (n_ctx - n_keep) // 2)
            dropped = -(-(len(tokens) - n_ctx + 1) // half) * half
            del tokens[n_keep : n_keep + min(dropped, len(tokens) - n_keep - 1)]
            truncated = True
        text = _Text(self.model.tokenizer.stream_decoder(), request.stop)
        job = _Job(stream, stream.sampler, text, len(request.prompt), truncated)
        return Sequence(
            tokens, n_keep=n_keep, reuse=request.cache_prompt, wanted_slot=request.slot_id, owner=job
        )

    def _step(self) -> None:
        """One batch: schedule, run, sample."""
        try:
            chunks = self._scheduler.schedule()
        except ContextFull as full:
            self._end(full.args[1], "error", error=full.args[0])
            return
        if not chunks:
            return
        before = time.perf_counter()
        for chunk in chunks:
            if not chunk.sequence.owner.started:
                chunk.sequence.owner.started = before
        hidden = [chunk for chunk in chunks if chunk.is_last and chunk.sequence.owner.stream.request.embedding]
        ordinary = [chunk for chunk in chunks if chunk not in hidden] if hidden else chunks
        try:
            if ordinary:
                self._run(ordinary)
            if hidden:
                self._embed(hidden)
        except Exception as error:  # a failed step ends its requests, not the engine
            for chunk in chunks:
                if chunk.sequence in self._scheduler.running:
                    self._end(chunk.sequence, "error", error=f"{type(error).__name__}: {error}")

    def _run(self, chunks: list[Chunk]) -> None:
        before = time.perf_counter()
        inputs = [self._input(chunk, 1 if chunk.is_last else 0) for chunk in chunks]
        rows = self.model.run(inputs)
        self._scheduler.advance(chunks, time.perf_counter() - before)
        n_vocab, row = self.model.tokenizer.n_vocab, 0
        for chunk, item in zip(chunks, inputs, strict=True):
            if item.outputs:
                logits = rows[row, :n_vocab]  # files may pad the vocabulary
                row += 1
                try:
                    self._accept(chunk.sequence, logits)
                except Exception as error:  # e.g. a grammar that no token fits: this request's own problem
                    self._end(chunk.sequence, "error", error=str(error))

    @staticmethod
    def _input(chunk: Chunk, outputs: int) -> SequenceInput:
        s = chunk.sequence
        tokens = s.tokens[-1:] if chunk.n == 1 and chunk.is_last else s.tokens[s.n_evaluated : s.n_evaluated + chunk.n]
        return SequenceInput(tokens, s.n_evaluated, s.table.blocks, outputs)

    def _embed(self, chunks: list[Chunk]) -> None:
        before = time.perf_counter()
        rows = self.model.run([self._input(chunk, 1) for chunk in chunks], hidden=True)
        self._scheduler.advance(chunks, time.perf_counter() - before)
        for chunk, row in zip(chunks, rows, strict=True):
            self._end(chunk.sequence, "limit", embedding=row.copy())

    def _accept(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Samples a token and sends what it brings."""
        job: _Job = sequence.owner
        request = job.stream.request
        if not sequence.generating:
            sequence.generating = True
            job.stream.slot_id = sequence.slot
            job.first_token = time.perf_counter()
        if request.n_predict == 0:
            self._end(sequence, "limit")
            return
        sample = job.sampler.sample(logits)
        if sample.token in self.model.tokenizer.eog_ids:
            self._end(sequence, "eos")
            return
        job.n_predicted += 1
        sequence.tokens.append(sample.token)
        event = job.text.push(sample)
        if event is not None and (event.text or event.tokens):
            job.stream._events.put(event)
        if job.text.stopping_word:
            self._end(sequence, "word")
        elif 0 < request.n_predict <= job.n_predicted:
            self._end(sequence, "limit")
        elif job.stream._events.qsize() > _MOST_UNREAD:
            self._end(sequence, "error", error="nobody reads this stream")

    def _end(self, sequence: Sequence, reason: str, *, error: str | None = None, embedding: np.ndarray | None = None) -> None:
        job: _Job = sequence.owner
        ended = time.perf_counter()
        self._scheduler.remove(sequence)
        if reason != "word" and (rest := job.text.flush()) is not None:
            job.stream._events.put(rest)
        job.stream._events.put(
            Done(
                reason=reason,
                stopping_word=job.text.stopping_word,
                n_prompt=job.n_prompt,
                n_past=len(sequence.tokens),
                n_reused=sequence.n_reused,
                n_predicted=job.n_predicted,
                truncated=job.truncated or sequence.shifted,
                timings=Timings(
                    sequence.n_prompt_run,
                    1e3 * ((job.first_token or ended) - (job.started or ended)),
                    job.n_predicted,
                    1e3 * (ended - job.first_token) if job.first_token else 0.0,
                ),
                slot_id=max(sequence.slot, 0),
                error=error,
                embedding=embedding,
            )
        )
