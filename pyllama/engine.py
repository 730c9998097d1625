"""The engine: requests in, token events out.

One thread owns the model. Each of its steps takes a batch from the scheduler, runs it, samples a token for every sequence whose
logits came, and hands the text to that request's :class:`Stream`. Any number of threads may submit requests and read streams.
This module knows nothing of HTTP, chat templates or files.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyllama.core import BLOCK_TOKENS
from pyllama.draft import Ask, DraftModel
from pyllama.kv_cache import KVCache
from pyllama.models import Model, SequenceInput
from pyllama.sampling import Sample, Sampler, SamplingParams
from pyllama.scheduler import BURST_SECONDS, Chunk, ContextFull, Scheduler, Sequence, truncated
from pyllama.speculation import LookupSpeculation, Pace

__all__ = ["Done", "Engine", "EngineClosed", "Request", "Stream", "Timings", "Token"]

_log = logging.getLogger(__name__)
_MOST_UNREAD = 50_000  # events; a stream that nobody reads ends then
_LEAST_CONTEXT = 8
_SHORT_BURST = 4  # steps
_TOGETHER_SECONDS = 0.001  # how much later than another a request may come to begin with it, where nothing runs
_SCORED_AT_ONCE = 32  # tokens whose logits are in memory, which are many where the vocabulary is large


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
    score_prompt: bool = False
    """Tell how likely each token of the prompt was; all of it is evaluated then. Needs ``sampling.n_probs``."""


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
    draft_n: int = 0
    """Tokens that were guessed,"""
    draft_n_accepted: int = 0
    """and of these the ones that sampling gave too."""


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
    """One request's events: iterate until :class:`Done`, which is the last. For one reader at a time."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self.slot_id = request.slot_id
        """The slot in which it runs; known when the first :class:`Token` comes."""
        self.prompt_samples: tuple[Sample, ...] = ()
        """With ``score_prompt``, one for each token of the prompt, also known then. Of the first one nothing is known."""
        self.cancelled = False
        self.listener: Callable[[], None] | None = None
        """Called in the engine's thread when an event has come: it must be quick, and not wait. Events may have come before it
        is set."""
        self._engine = engine
        self._events: queue.SimpleQueue[Token | Done] = queue.SimpleQueue()
        self._ended = False
        self._all_there = threading.Event()
        self._wanted_whole = False

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

    def take(self) -> list[Token | Done]:
        """The events that have come and not been read yet, without waiting."""
        events: list[Token | Done] = []
        while not self._events.empty():
            events.append(self.get())
        return events

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until all events are there, which costs the engine less than a reader that takes them one by one.

        Returns:
            False: they are not there after ``timeout`` seconds.
        """
        self._wanted_whole = True
        return self._all_there.wait(timeout)

    def cancel(self) -> None:
        """Ends the request within a step, or a burst of quick ones (1/60 s); the stream still ends with :class:`Done`."""
        if not (self._ended or self.cancelled):
            self.cancelled = True
            self._engine._has_news()

    def result(self) -> tuple[str, list[Sample], Done]:
        """Waits for the end: all text, all samples, and the last event."""
        self.wait()
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
        self._samples: deque[tuple[Sample, int]] = deque()  # not sent yet, and where in the held text they begin
        self.stopping_word = ""

    def push(self, sample: Sample) -> Token | None:
        """Adds a token.

        Returns:
            What is safe to send, if anything. When a stop string is complete, ``stopping_word`` is set, and nothing comes
            after that.
        """
        piece = self._decoder.push(sample.token)
        if piece and not (self._stop or self._samples):
            return Token(piece, (sample.token,), (sample,))
        self._samples.append((sample, len(self._held)))
        if not piece:
            return None
        self._held += piece
        if not self._stop:
            return self._send(len(self._held))
        at = len(self._held)
        for word in self._stop:
            found = self._held.find(word)
            if 0 <= found < at:
                at, self.stopping_word = found, word
        return self._send(at if self.stopping_word else at - self._longest_beginning())

    def flush(self) -> Token | None:
        """The rest: what was held back, and the replacement of an incomplete character."""
        self._held += self._decoder.flush()
        return self._send(len(self._held), end=True)

    def _longest_beginning(self) -> int:
        """How much of the held text's end is the beginning of a stop string."""
        longest = 0
        for word in self._stop:
            for n in range(min(len(word) - 1, len(self._held)), longest, -1):
                if self._held.endswith(word[:n]):
                    longest = n
                    break
        return longest

    def _send(self, n: int, *, end: bool = False) -> Token | None:
        """The first ``n`` held characters with the tokens that begin in them; in the end with all tokens."""
        text, self._held = self._held[:n], self._held[n:]
        samples = []
        while self._samples and (end or self._samples[0][1] < n):
            samples.append(self._samples.popleft()[0])
        if n and self._samples:
            self._samples = deque((sample, begin - n) for sample, begin in self._samples)
        if not text and not samples:
            return None
        return Token(text, tuple([sample.token for sample in samples]), tuple(samples))


class _Job:
    """A request on its way through the engine."""

    def __init__(self, stream: Stream, sampler: Sampler, text: _Text) -> None:
        self.stream, self.sampler, self.text = stream, sampler, text
        self.request = stream.request
        self.truncated = self.has_text = False
        self.scores: list[Sample] = []
        self.n_predicted = self.n_guessed = self.n_guessed_right = 0
        self.n_tokens = 0  # of the sequence at the last guess
        self.lookup: LookupSpeculation | None = None
        self.draft_pace: Pace | None = None
        self.guess_pace: Pace | None = None  # of whoever made the last guess
        self.started = self.first_token = 0.0

    @property
    def has_haste(self) -> bool:
        """After a few steps already something may be lost by more: behind a stop string, or by what could be guessed."""
        return bool(self.request.stop) or (self.lookup is not None and not self.lookup.is_idle)


class Engine:
    """Runs requests on a model; close it when done, or use it as a context manager.

    Args:
        model: the engine's alone from now on.
        n_slots: requests that are worked on at a time.
        continuous: let a new request join while others run; otherwise it waits until they have ended.
        n_lookup: most tokens to guess in a step, from what followed the same tokens before; 0: none. Where the model's values
            are quantized, no more than 31 are guessed.
        draft: guesses where there is nothing to look up; the engine's alone from now on, too.

    Raises:
        ValueError: there are more slots than a model can run, or its context is tiny, or the draft's vocabulary is another.
    """

    def __init__(
        self, model: Model, n_slots: int = 1, *, continuous: bool = True, n_lookup: int = 0, draft: DraftModel | None = None
    ) -> None:
        if not 1 <= n_slots <= model.max_sequences:
            raise ValueError(f"n_slots is {n_slots}; 1 to {model.max_sequences} are possible")
        if model.n_ctx < _LEAST_CONTEXT:
            raise ValueError(f"a context of {model.n_ctx} tokens is too small; at least {_LEAST_CONTEXT} are needed")
        if n_lookup < 0:
            raise ValueError(f"n_lookup is {n_lookup}; it cannot be negative")
        if draft is not None:
            draft.check_fits(model)
            if draft.n_slots < n_slots:
                raise ValueError(f"n_slots is {n_slots}; the draft model can run {draft.n_slots}")
        self.model, self.n_slots, self.continuous = model, n_slots, continuous
        self.n_lookup, self.draft = n_lookup, draft
        self._start_afresh()
        self._outbox: list[tuple[Stream, Token | Done]] = []
        self._is_urgent = False  # something in it begins or ends a text
        self._delivered = 0.0  # when it was emptied
        self._wake = threading.Condition()  # guards the next four
        self._news = False  # the others have changed; read without the lock
        self._arrived: list[_Job] = []
        self._system: tuple[int, ...] = ()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="pyllama-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread within the core would not notice that the program ends

    # -- for any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Queues a request.

        Raises:
            ValueError: the prompt is empty, or a token is not in the vocabulary, or there is no such slot.
            GrammarError: the grammar is not one.
            EngineClosed: the engine has been closed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Iterable[Request]) -> list[Stream]:
        """Queues some requests at once, so that they begin together; none when one is refused.

        Raises:
            ValueError, GrammarError, EngineClosed: as :meth:`submit`.
        """
        jobs = [self._job_of(request) for request in requests]
        with self._wake:
            if self._closing:
                raise EngineClosed("the engine has been closed")
            self._arrived += jobs
            self._news = True
            self._wake.notify()
        return [job.stream for job in jobs]

    def _job_of(self, request: Request) -> _Job:
        if not request.prompt:
            raise ValueError("the prompt is empty")
        n_vocab = self.model.hp.n_vocab
        if min(request.prompt) < 0 or max(request.prompt) >= n_vocab:
            raise ValueError(f"the prompt has a token that is not in the vocabulary of {n_vocab}")
        if not -1 <= request.slot_id < self.n_slots:
            raise ValueError(f"slot {request.slot_id} does not exist; there are {self.n_slots}")
        if request.score_prompt and not (request.sampling.n_probs and len(request.prompt) < self.model.n_ctx):
            raise ValueError(f"a prompt to be scored needs n_probs, and a context of more than its {len(request.prompt)} tokens")
        stream, tokenizer = Stream(self, request), self.model.tokenizer
        sampler = Sampler(request.sampling, tokenizer, request.prompt, self.model.n_ctx)
        job = _Job(stream, sampler, _Text(tokenizer.stream_decoder(), request.stop))
        if self.n_lookup:
            job.lookup = LookupSpeculation(self.n_lookup)
        if self.draft is not None:
            job.draft_pace = Pace(self.draft.most)
        return job

    def set_system_prompt(self, tokens: Iterable[int]) -> Stream | None:
        """Evaluates tokens with which prompts will begin, and keeps what they share in memory for as long as it can be.

        It replaces the last system prompt; requests that have been submitted are not touched. A context shift spares it, as
        well as the ``n_keep`` tokens after it. No tokens: there is none any more.

        Returns:
            A stream that ends when the tokens are evaluated.

        Raises:
            ValueError, EngineClosed: as :meth:`submit`; or it leaves no room in the context.
        """
        tokens = tuple(tokens)
        if len(tokens) > self.model.n_ctx - _LEAST_CONTEXT:
            raise ValueError(f"the system prompt has {len(tokens)} tokens, the context {self.model.n_ctx}")
        with self._wake:
            self._system = tokens
            self._news = True
        return self.submit(Request(prompt=tokens, n_predict=0)) if tokens else None

    def close(self, timeout: float | None = None) -> bool:
        """Ends all requests with ``cancelled`` and stops the thread.

        Args:
            timeout: seconds to wait for the step that is running; None: for as long as it takes.

        Returns:
            Has the thread stopped?
        """
        with self._wake:
            self._closing = self._news = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        atexit.unregister(self.close)
        return not self._thread.is_alive()

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
        return len(self._scheduler.waiting) + len(self._arrived)

    def _has_news(self) -> None:
        with self._wake:
            self._news = True
            self._wake.notify()

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _start_afresh(self) -> None:
        self._cache = KVCache(self.model.n_blocks, BLOCK_TOKENS, self.model.kv_copy)
        self._scheduler = Scheduler(self.model, self._cache, self.n_slots, continuous=self.continuous)
        self._sequences: set[Sequence] = set()  # all that have not ended

    def _loop(self) -> None:
        try:
            while self._look():
                began = time.perf_counter()
                try:
                    self._step()
                except Exception as error:  # a fault of ours: rather forget everything than go on with wrong books
                    _log.exception("a step of the engine failed")
                    self._give_up("error", f"{type(error).__name__}: {error}")
                if not self._can_wait(time.perf_counter() - began):
                    self._deliver()
        finally:
            with self._wake:
                self._closing = True
            for job in self._arrived:
                self._sequences.add(Sequence(list(job.request.prompt), owner=job))
            self._give_up("cancelled")
            self._deliver()

    def _look(self) -> bool:
        """Takes what other threads have left; sleeps while there is nothing to do. False: the engine is being closed."""
        scheduler = self._scheduler
        if not self._news and (scheduler.running or scheduler.waiting):
            return True
        with self._wake:
            while not (self._news or scheduler.running or scheduler.waiting):
                self._wake.wait()
            if not (scheduler.running or scheduler.waiting):
                # Requests that come at the same moment begin together: read beside the first one's text, they would take longer.
                while 0 < len(self._arrived) < self.n_slots and self._wake.wait(_TOGETHER_SECONDS):
                    pass
            arrived, self._arrived, self._news = self._arrived, [], False
            system = self._system
        if system != self._cache.pinned:
            self._cache.pin(system)
        for job in arrived:
            sequence = self._sequence_of(job)
            self._sequences.add(sequence)
            scheduler.add(sequence)
        for sequence in list(self._sequences):
            if sequence.owner.stream.cancelled:
                self._end(sequence, "cancelled")
        if self._is_urgent:
            self._deliver()
        return not self._closing

    def _sequence_of(self, job: _Job) -> Sequence:
        request, n_prompt = job.request, len(job.request.prompt)
        n_keep = min(self._n_keep(request), n_prompt, self.model.n_ctx - 4)
        tokens = truncated(list(request.prompt), n_keep, self.model.n_ctx)
        job.truncated = len(tokens) < n_prompt
        reuse = request.cache_prompt and not request.score_prompt
        return Sequence(tokens, n_keep=n_keep, reuse=reuse, wanted_slot=request.slot_id, owner=job)

    def _n_keep(self, request: Request) -> int:
        """Tokens that a context shift spares; ``n_keep`` counts neither the system prompt nor the token that begins a text."""
        if request.n_keep < 0:
            return len(request.prompt)
        system, tokenizer = self._cache.pinned, self.model.tokenizer
        if system and request.prompt[: len(system)] == system:
            return len(system) + request.n_keep
        has_bos = tokenizer.add_bos and request.prompt[0] == tokenizer.bos_id
        return request.n_keep + has_bos

    def _step(self) -> None:
        """One batch: schedule, run, sample."""
        if self.n_lookup or self.draft:
            self._guess()
        try:
            chunks = self._scheduler.schedule()
        except ContextFull as full:
            self._end(full.sequence, "error", error=str(full))
            return
        if (n_steps := self._burst(chunks)) > 1:
            self._generate(chunks, n_steps)
            return
        texts, states = [], []
        for chunk in chunks:
            request = chunk.sequence.owner.request
            if request.score_prompt and not chunk.sequence.generating:
                self._score(chunk)
            else:
                (states if request.embedding and chunk.is_last else texts).append(chunk)
        if texts:
            self._run(texts)
        if states:
            self._run(states, hidden=True)

    def _guess(self) -> None:
        running = self._scheduler.running
        ready = [sequence for sequence in running if sequence.generating and sequence.n_waiting == 1]
        for sequence in ready:
            sequence.guess = self._look_up(sequence) if self.n_lookup else []
        # Beside prompts there is no room for guesses, and those of a draft take time.
        if self.draft and len(ready) == len(running):
            self._draft([sequence for sequence in ready if not sequence.guess])

    def _most_guessed(self, sequence: Sequence) -> int:
        """Tokens that a guess may have at most."""
        job: _Job = sequence.owner
        # A full context is going to be shifted, and then other tokens come before the guess.
        n_free = self.model.n_ctx - sequence.n_evaluated - 1
        n_wanted = job.request.n_predict - job.n_predicted - 1 if job.request.n_predict > 0 else n_free
        return min(n_free, n_wanted, self.model.n_exact - 1)

    def _look_up(self, sequence: Sequence) -> list[int]:
        job: _Job = sequence.owner
        if len(sequence.tokens) < job.n_tokens:
            job.lookup.forget()
        job.n_tokens = len(sequence.tokens)
        job.guess_pace = job.lookup.pace
        most = self._most_guessed(sequence)
        return job.lookup.guess(sequence.tokens, most) if most > 0 else []

    def _draft(self, sequences: list[Sequence]) -> None:
        asked = []
        for sequence in sequences:
            most = self._most_guessed(sequence)
            if most > 0 and (n := sequence.owner.draft_pace.next()):
                asked.append((sequence, Ask(sequence.slot, sequence.tokens, min(n, most))))
        for (sequence, _), guess in zip(asked, self.draft.guess([ask for _, ask in asked])):
            sequence.guess, sequence.owner.guess_pace = guess, sequence.owner.draft_pace

    def _run(self, chunks: list[Chunk], *, hidden: bool = False) -> None:
        inputs = [self._input(chunk) for chunk in chunks]
        before = time.perf_counter()
        try:
            rows = self.model.run(inputs, hidden=hidden)
        except Exception as error:  # a failed step ends its requests, not the engine
            for chunk in chunks:
                self._end(chunk.sequence, "error", error=f"{type(error).__name__}: {error}")
            return
        self._scheduler.advance(chunks, time.perf_counter() - before)
        n_rows, peaks = 0, self.model.peaks
        for chunk in chunks:
            job: _Job = chunk.sequence.owner
            if not job.started:
                job.started, job.stream.slot_id = before, chunk.sequence.slot
            if chunk.is_last:
                row, end = rows[n_rows], n_rows + 1 + len(chunk.guess)
                if hidden:
                    self._end(chunk.sequence, "limit", embedding=row.copy())
                elif self._sample(chunk.sequence, job, row, peaks[n_rows]) and chunk.guess:
                    self._sample_guessed(chunk, job, rows[n_rows + 1 : end], peaks[n_rows + 1 : end])
                n_rows = end

    def _burst(self, chunks: list[Chunk]) -> int:
        """How many steps the core may make on its own."""
        if not chunks or any(chunk.guess for chunk in chunks):
            return 1
        most = _SHORT_BURST if any(chunk.sequence.owner.has_haste for chunk in chunks) else self.model.n_ctx
        for chunk in chunks:
            sequence = chunk.sequence
            job: _Job = sequence.owner
            if not (sequence.generating and chunk.is_last and chunk.n == 1) or job.sampler.core is None:
                return 1
            if job.request.n_predict > 0:
                most = min(most, job.request.n_predict - job.n_predicted)
            if job.draft_pace is not None:
                most = min(most, 1 + job.draft_pace.pause)
        return self._scheduler.burst(chunks, most)

    def _generate(self, chunks: list[Chunk], n_steps: int) -> None:
        """As :meth:`_run`, several steps at once."""
        sequences = [chunk.sequence for chunk in chunks]
        samplers = [sequence.owner.sampler for sequence in sequences]
        inputs = [SequenceInput(s.tokens[-1:], s.n_evaluated, s.table.blocks, 1) for s in sequences]
        randoms = [sampler.take_randoms(n_steps) for sampler in samplers]
        in_order = [random for step in zip(*randoms) for random in step]
        before = time.perf_counter()
        try:
            tokens = self.model.generate(inputs, [s.core for s in samplers], in_order, self.model.tokenizer.eog_ids)
        except Exception as error:  # as in _run
            for sequence in sequences:
                self._end(sequence, "error", error=f"{type(error).__name__}: {error}")
            return
        n_made = len(tokens) // len(chunks)
        self._scheduler.advance(chunks, (time.perf_counter() - before) / n_made, n_made)
        for i, sequence in enumerate(sequences):
            samplers[i].put_back(randoms[i][n_made:])
            if sequence.owner.draft_pace is not None:
                sequence.owner.draft_pace.skip(n_made - 1)
            self._take_burst(sequence, tokens[i :: len(chunks)])

    def _take_burst(self, sequence: Sequence, tokens: list[int]) -> None:
        job: _Job = sequence.owner
        for i, token in enumerate(tokens):
            if i:
                self._scheduler.accept(sequence)
            if token < 0:
                self._end(sequence, "error", error=job.sampler.why_nothing())
                return
            if not self._take(sequence, job, Sample(token)):
                return

    def _score(self, chunk: Chunk) -> None:
        """Evaluates a part of a prompt, a few tokens at a time, and notes how likely each of the next ones was."""
        sequence, is_last = chunk.sequence, chunk.is_last
        job: _Job = sequence.owner
        first, end = sequence.n_evaluated, sequence.n_evaluated + chunk.n
        before = time.perf_counter()
        if not job.started:
            job.started, job.stream.slot_id = before, sequence.slot
        if first == 0:
            job.scores = [Sample(sequence.tokens[0])]
        try:
            for at in range(first, end, _SCORED_AT_ONCE):
                tokens = sequence.tokens[at : min(at + _SCORED_AT_ONCE, end)]
                rows = self.model.run([SequenceInput(tokens, at, sequence.table.blocks, len(tokens))])
                following = sequence.tokens[at + 1 : at + 1 + len(tokens)]
                n_vocab = self.model.tokenizer.n_vocab
                job.scores += [job.sampler.score(token, row[:n_vocab]) for token, row in zip(following, rows)]
        except Exception as error:  # as in _run
            self._end(sequence, "error", error=f"{type(error).__name__}: {error}")
            return
        self._scheduler.advance([chunk], time.perf_counter() - before)
        if is_last:
            job.stream.prompt_samples = tuple(job.scores)
            self._sample(sequence, job, rows[-1], None)

    @staticmethod
    def _input(chunk: Chunk) -> SequenceInput:
        s = chunk.sequence
        tokens = s.tokens[s.n_evaluated : s.n_evaluated + chunk.n] + chunk.guess
        return SequenceInput(tokens, s.n_evaluated, s.table.blocks, 1 + len(chunk.guess) if chunk.is_last else 0)

    def _sample_guessed(self, chunk: Chunk, job: _Job, rows: np.ndarray, peaks: np.ndarray) -> None:
        """Goes on sampling for as long as the guess was right."""
        sequence, n_right = chunk.sequence, 0
        job.n_guessed += len(chunk.guess)
        for token, row, row_peaks in zip(chunk.guess, rows, peaks):
            if sequence.tokens[-1] != token:
                break
            n_right += 1
            job.n_guessed_right += 1
            self._scheduler.accept(sequence)
            if not self._sample(sequence, job, row, row_peaks):
                break
        job.guess_pace.judge(len(chunk.guess), n_right)

    def _sample(self, sequence: Sequence, job: _Job, logits: np.ndarray, peaks: np.ndarray | None) -> bool:
        """Takes a token and sends the text that it brings; False: the sequence has ended."""
        if not sequence.generating:
            sequence.generating = True
            job.first_token = time.perf_counter()
        n_predict, tokenizer = job.request.n_predict, self.model.tokenizer
        if n_predict == 0:
            self._end(sequence, "limit")
            return False
        try:
            sample = job.sampler.sample(logits[: tokenizer.n_vocab], peaks)  # files may pad the vocabulary
        except Exception as error:  # e.g. a grammar that no token fits: this request's own problem
            self._end(sequence, "error", error=str(error))
            return False
        return self._take(sequence, job, sample)

    def _take(self, sequence: Sequence, job: _Job, sample: Sample) -> bool:
        """Adds a token to the text, which goes on (True) or ends."""
        n_predict = job.request.n_predict
        if sample.token in self.model.tokenizer.eog_ids:
            self._end(sequence, "eos")
            return False
        sequence.tokens.append(sample.token)
        job.n_predicted += 1
        event, stream = job.text.push(sample), job.stream
        if event is not None:
            self._outbox.append((stream, event))
            self._is_urgent |= not job.has_text
            job.has_text = True
        if job.text.stopping_word:
            self._end(sequence, "word")
        elif job.sampler.finished:
            self._end(sequence, "eos")
        elif 0 < n_predict <= job.n_predicted:
            self._end(sequence, "limit")
        elif stream._events.qsize() >= _MOST_UNREAD and not stream._wanted_whole:
            self._end(sequence, "error", error="nobody reads this stream")
        else:
            return True
        return False

    def _end(
        self, sequence: Sequence, reason: str, *, error: str | None = None, embedding: np.ndarray | None = None
    ) -> None:
        self._scheduler.remove(sequence)
        self._sequences.discard(sequence)
        self._report(sequence, reason, error=error, embedding=embedding)

    def _give_up(self, reason: str, error: str | None = None) -> None:
        """Ends everything and forgets what is cached."""
        for sequence in self._sequences:
            self._report(sequence, reason, error=error)
        self._start_afresh()

    def _report(
        self, sequence: Sequence, reason: str, *, error: str | None = None, embedding: np.ndarray | None = None
    ) -> None:
        job: _Job = sequence.owner
        ended = time.perf_counter()
        if reason != "word" and (rest := job.text.flush()) is not None:
            self._outbox.append((job.stream, rest))
        done = Done(
            reason=reason,
            stopping_word=job.text.stopping_word,
            n_prompt=len(job.request.prompt),
            n_past=len(sequence.tokens),
            n_reused=sequence.n_reused,
            n_predicted=job.n_predicted,
            truncated=job.truncated or sequence.shifted,
            timings=Timings(
                sequence.n_prompt_run,
                1e3 * ((job.first_token or ended) - (job.started or ended)),
                job.n_predicted,
                1e3 * (ended - job.first_token) if job.first_token else 0.0,
                job.n_guessed,
                job.n_guessed_right,
            ),
            slot_id=max(sequence.slot, 0),
            error=error,
            embedding=embedding,
        )
        self._outbox.append((job.stream, done))
        self._is_urgent = True

    def _can_wait(self, seconds: float) -> bool:
        """Would readers hear soon enough of what there is after another step as long as the last one, in ``seconds``?"""
        return not self._is_urgent and time.perf_counter() + seconds < self._delivered + BURST_SECONDS

    def _deliver(self) -> None:
        """Wakes the readers, once all of a step's tokens are there."""
        self._delivered, self._is_urgent = time.perf_counter(), False
        for stream, event in self._outbox:
            stream._events.put(event)
            if isinstance(event, Done):
                stream._all_there.set()
        # Streams that have the same listener are one client's.
        for listener in dict.fromkeys(stream.listener for stream, _ in self._outbox):
            if listener is not None:
                _tell(listener)
        self._outbox.clear()


def _tell(listener: Callable[[], None]) -> None:
    try:
        listener()
    except Exception:  # a fault of ours, and not of the other streams
        _log.exception("what listens to a stream failed")
