"""What all handlers share: the model once it is loaded, its engine, and the requests that are under way.

Here a request becomes a stream of the engine, and here a stream ends when its client goes away. This module knows no
endpoint.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyllama.chat import CHATML, ChatTemplate, ChatTemplateError
from pyllama.engine import Done, Engine, EngineClosed, Request, Stream, Token
from pyllama.models import Model
from pyllama.server.errors import ApiError
from pyllama.tokenizer import Tokenizer

__all__ = ["LOADING", "Defaults", "Service", "SystemPrompt", "events"]

LOADING = "the model is being loaded"
STOPPING = "the server is shutting down"
_POLL_SECONDS = 0.05
"""How often a silent stream looks whether its client is still there."""


@dataclass(frozen=True)
class SystemPrompt:
    """The text before every prompt, and two words that clients ask for at /props."""

    prompt: str = ""
    anti_prompt: str = ""
    assistant_name: str = ""


@dataclass(frozen=True)
class Defaults:
    """What the command line decides for all requests."""

    name: str = ""
    """What the model is called: its alias or its path."""
    n_predict: int = -1
    seed: int = -1
    embedding: bool = False
    api_key: str = ""
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
        self._n_open = 0
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
        engine.set_system_prompt(_encode_system_prompt(tokenizer, self.system_prompt))
        self._engine = engine

    def stop(self) -> None:
        """Ends all streams, soon, and refuses new ones."""
        with self._lock:
            self._stopping = True
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()

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

    def set_system_prompt(self, values: Mapping[str, Any]) -> None:
        """Changes the text that stands before every prompt from now on.

        Args:
            values: the strings ``prompt`` and, if wanted, ``anti_prompt`` and ``assistant_name``.

        Raises:
            ValueError: one of them is no string, or the prompt leaves no room in the context.
        """
        names = ("prompt", "anti_prompt", "assistant_name")
        strings = {name: values[name] for name in names if values.get(name) is not None}
        for name, value in strings.items():
            if not isinstance(value, str):
                raise ValueError(f"system_prompt.{name} must be a string")
        system_prompt = SystemPrompt(**strings)
        if self._engine is not None and system_prompt.prompt != self.system_prompt.prompt:
            self._engine.set_system_prompt(_encode_system_prompt(self._engine.model.tokenizer, system_prompt))
        self.system_prompt = system_prompt

    # -- requests -----------------------------------------------------------------------------------------------------

    def system_tokens(self) -> list[int]:
        """What stands before every prompt; nothing without a system prompt."""
        return _encode_system_prompt(self.model.tokenizer, self.system_prompt)

    @contextlib.contextmanager
    def submit(self, requests: Sequence[Request]) -> Iterator[list[Stream]]:
        """Streams for some requests of one client; those that have not ended at the end of the ``with`` block are cancelled.

        Raises:
            ApiError: 400 for what the engine refuses, 429 when too many requests wait already, 503 when the server stops.
        """
        engine = self.engine
        streams: list[Stream] = []
        self._admit(engine.n_slots + self.defaults.queue)
        try:
            for request in requests:
                streams.append(self._submit(engine, request))
            with self._lock:
                self._streams.update(streams)
                if self._stopping:
                    raise ApiError(503, STOPPING)
            yield streams
        finally:
            for stream in streams:
                stream.cancel()
            with self._lock:
                self._streams.difference_update(streams)
                self._n_open -= 1

    @staticmethod
    def _submit(engine: Engine, request: Request) -> Stream:
        try:
            return engine.submit(request)
        except EngineClosed:
            raise ApiError(503, STOPPING) from None
        except ValueError as error:  # the request's own: GrammarError, an empty prompt, no such slot
            raise ApiError(400, str(error)) from None

    def _admit(self, most: int) -> None:
        with self._lock:
            if self._n_open >= most:
                raise ApiError(429, f"{self._n_open} requests are under way or waiting already; try again later")
            self._n_open += 1


def _encode_system_prompt(tokenizer: Tokenizer, system_prompt: SystemPrompt) -> list[int]:
    return tokenizer.encode(system_prompt.prompt, add_special=True) if system_prompt.prompt else []


def events(stream: Stream, is_gone: Callable[[], bool]) -> Iterator[Token | Done]:
    """A stream's events up to :class:`Done`. When the client is gone the stream is cancelled.

    Raises:
        ApiError: 500 when generation failed, 503 when the server stops.
    """
    while True:
        if is_gone():
            stream.cancel()
        try:
            event = stream.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if isinstance(event, Done):
            if event.reason == "error":
                raise ApiError(500, event.error or "the generation failed")
            if event.reason == "cancelled":
                raise ApiError(503, STOPPING)
            yield event
            return
        yield event
