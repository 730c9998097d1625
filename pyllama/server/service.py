"""What all handlers share: the model once it is loaded, its engine, and the requests that are under way.

Here a request becomes a stream of the engine, and here a stream ends when its client goes away. This module knows no
endpoint.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

from pyllama.chat import CHATML, ChatTemplate, ChatTemplateError
from pyllama.engine import Done, Engine, EngineClosed, Request, Stream, Token
from pyllama.models import Model
from pyllama.server.errors import ApiError
from pyllama.server.http import Client
from pyllama.tokenizer import Tokenizer

__all__ = ["LOADING", "Defaults", "Service", "SystemPrompt", "events"]

LOADING = "the model is being loaded"
STOPPING = "the server is shutting down"
_POLL_SECONDS = 0.05
"""How often those who wait for all of an answer look whether its client is still there."""


@dataclass(frozen=True)
class SystemPrompt:
    """The text before every prompt, and two words that clients ask for at /props."""

    prompt: str = ""
    anti_prompt: str = ""
    assistant_name: str = ""

    @classmethod
    def read(cls, value: object, name: str = "system_prompt") -> SystemPrompt:
        """From JSON: the text alone, or an object with ``prompt`` and, if wanted, ``anti_prompt`` and ``assistant_name``.

        Raises:
            ValueError: it is neither; ``name`` is what the message calls it.
        """
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be an object or a string")
        members = {f.name: value[f.name] for f in fields(cls) if value.get(f.name) is not None}
        for member, text in members.items():
            if not isinstance(text, str):
                raise ValueError(f"{name}.{member} must be a string")
        return cls(**members)


@dataclass(frozen=True)
class Defaults:
    """What the command line decides for all requests."""

    name: str = ""
    """What the model is called: its alias or its path."""
    n_predict: int = -1
    seed: int = -1
    embedding: bool = False
    api_keys: tuple[str, ...] = ()
    """One of them must come with each POST request; none: nobody is asked."""
    queue: int = 64
    """Requests that may wait for a slot; more are refused."""


@dataclass
class Service:
    """Made before the model is there; :meth:`start` opens it for requests."""

    defaults: Defaults = field(default_factory=Defaults)
    created: int = field(default_factory=lambda: int(time.time()))
    system_prompt: SystemPrompt = field(default_factory=SystemPrompt)

    def __post_init__(self) -> None:
        self._engine: Engine | None = None
        self._chat_template: ChatTemplate | None = None
        self._no_chat = ""
        self._encoded: tuple[str, tuple[int, ...]] = ("", ())  # the system prompt, and its tokens
        self._n_open = 0
        self._system_lock = threading.Lock()
        self._lock = threading.Lock()
        self._streams: set[Stream] = set()
        self._stopping = False

    # -- the model comes and goes -------------------------------------------------------------------------------------

    def start(self, engine: Engine, chat_template: str | None = None) -> None:
        """Requests are answered from now on.

        Args:
            engine: with the model.
            chat_template: stands for the model's own; ``chatml`` for that one.

        Raises:
            ValueError: the system prompt leaves no room in the context.
            ChatTemplateError: the template that was given is none. The model's own may be broken: all but chats work then.
        """
        tokenizer = engine.model.tokenizer
        try:
            self._chat_template = ChatTemplate.of(tokenizer, CHATML if chat_template == "chatml" else chat_template)
        except ChatTemplateError as error:
            if chat_template is not None:
                raise
            self._no_chat = str(error)
        self._encoded = self.system_prompt.prompt, _encode_system_prompt(tokenizer, self.system_prompt)
        engine.set_system_prompt(self._encoded[1])
        self._engine = engine

    def stop(self) -> None:
        """Ends all streams, soon, and refuses new ones."""
        with self._lock:
            self._stopping = True
            streams = list(self._streams)
        _cancel(streams)

    @property
    def is_ready(self) -> bool:
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """Raises ``ApiError`` 503 while the model is being loaded."""
        if self._engine is None:
            raise ApiError(503, LOADING)
        return self._engine

    @property
    def model(self) -> Model:
        return self.engine.model

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises ``ApiError``: 503 while the model is being loaded, 501 when it brings a template that is none."""
        self.engine  # noqa: B018 - refuses while there is no model
        if self._chat_template is None:
            raise ApiError(501, self._no_chat)
        return self._chat_template

    # -- requests -----------------------------------------------------------------------------------------------------

    def system_tokens(self, system_prompt: SystemPrompt | None = None) -> tuple[int, ...]:
        """What stands before every prompt under a system prompt; None for the current one."""
        text, tokens = self._encoded
        if system_prompt is None or system_prompt.prompt == text:
            return tokens
        return _encode_system_prompt(self.model.tokenizer, system_prompt)

    def after_system_prompt(self, tokens: Sequence[int], system_prompt: SystemPrompt | None) -> tuple[int, ...]:
        """A prompt that is complete in itself, BOS included, after a system prompt; None for the current one."""
        system = self.system_tokens(system_prompt)
        opening = self.model.tokenizer.opening
        begin = len(opening) if system and list(tokens[: len(opening)]) == opening else 0
        return (*system, *tokens[begin:])

    @contextlib.contextmanager
    def submit(self, requests: Sequence[Request], system_prompt: SystemPrompt | None = None) -> Iterator[list[Stream]]:
        """Streams for some requests of one client; those that have not ended at the end of the ``with`` block are cancelled.

        Args:
            system_prompt: stands before every prompt from now on, those of these requests included. Requests that have come
                before go on as they began.

        Raises:
            ApiError: 400 for what the engine refuses, 429 when too many requests wait already, 503 when the server stops.
        """
        engine = self.engine
        streams: list[Stream] = []
        self._admit(engine.n_slots + self.defaults.queue)
        try:
            with _refusals(), self._system_prompt_of(system_prompt, engine):
                streams = engine.submit_all(requests)
            with self._lock:
                self._streams.update(streams)
                if self._stopping:
                    raise ApiError(503, STOPPING)
            yield streams
        finally:
            _cancel(streams)
            with self._lock:
                self._streams.difference_update(streams)
                self._n_open -= 1

    @contextlib.contextmanager
    def _system_prompt_of(self, system_prompt: SystemPrompt | None, engine: Engine) -> Iterator[None]:
        """Changes the system prompt, before the requests that bring it are submitted in the ``with`` block; unless they are
        refused."""
        if system_prompt is None:
            yield
            return
        with self._system_lock:
            before, tokens = self._encoded[1], self.system_tokens(system_prompt)
            if tokens == before:
                yield
            else:
                engine.set_system_prompt(tokens)
                try:
                    yield
                except BaseException:
                    engine.set_system_prompt(before)
                    raise
            self._encoded, self.system_prompt = (system_prompt.prompt, tokens), system_prompt

    def _admit(self, most: int) -> None:
        with self._lock:
            if self._n_open >= most:
                message = f"{self._n_open} requests are under way or waiting already; try again later"
                raise ApiError(429, message, Retry_After="1")
            self._n_open += 1


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns what the engine refuses into ``ApiError``."""
    try:
        yield
    except EngineClosed:
        raise ApiError(503, STOPPING) from None
    except ValueError as error:  # the request's own: GrammarError, an empty prompt, no such slot
        raise ApiError(400, str(error)) from None


def _encode_system_prompt(tokenizer: Tokenizer, system_prompt: SystemPrompt) -> tuple[int, ...]:
    text = system_prompt.prompt
    return (*tokenizer.opening, *tokenizer.encode(text)) if text else ()


def events(
    streams: Sequence[Stream], client: Client, *, whole: bool = False
) -> Iterator[tuple[int, Token | Done | None]]:
    """The events of one client's streams, each with its stream's number, up to every one's :class:`Done`.

    Args:
        client: who gets the answer.
        whole: wait until all events are there; when the client is gone the streams are cancelled. Otherwise an event that is
            None stands for those that are yet to come, and the client gets to know when they have.

    Raises:
        ApiError: 500 when generation failed, 503 when the server stops.
    """
    for stream in streams:
        if whole:
            _await(stream, streams, client)
        else:
            stream.listener = client.write_news
    running = dict(enumerate(streams))
    while running:
        for index, stream in list(running.items()):
            for event in stream.take():
                if isinstance(event, Done):
                    _check(event)
                    del running[index]
                yield index, event
        if running:
            yield 0, None


def _await(stream: Stream, streams: Sequence[Stream], client: Client) -> None:
    """Waits until a stream has ended, which all do soon when the client is gone."""
    while not stream.wait(_POLL_SECONDS):
        if client.is_gone():
            _cancel(streams)


def _cancel(streams: Iterable[Stream]) -> None:
    for stream in streams:
        stream.cancel()


def _check(done: Done) -> None:
    """Raises ``ApiError`` for an end that is no answer."""
    if done.reason == "error":
        raise ApiError(500, done.error or "the generation failed")
    if done.reason == "cancelled":
        raise ApiError(503, STOPPING)
