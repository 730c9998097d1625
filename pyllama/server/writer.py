"""Writes all streams: what comes is written in the thread that brings it, as far as that needs no waiting.

That is the engine's thread. Any other would have to be woken, to get hold of the interpreter, and to take a processor from the
engine's next step, all of whose threads then wait for the one that was stopped: on a machine with no processors to spare, that
takes several times as long as the writing. What is left is done by one thread here: the end of each answer, and a look now
and then at those whose client was too slow, or has gone.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod

__all__ = ["Answer", "Writer"]

_LOOK_SECONDS = 0.05


class Answer(ABC):
    """What is written piece by piece. Its methods do not raise, and one thread at a time calls them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Of whoever writes."""
        self.is_written = False

    @abstractmethod
    def write_news(self) -> bool:
        """Writes what there is, as far as that needs no waiting; True: that was the last of it."""

    @abstractmethod
    def end(self) -> None:
        """Called once, when all is written or nothing more shall be."""


class Writer:
    """Begins when it is made."""

    def __init__(self) -> None:
        self._to_do: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._open: set[Answer] = set()
        self._thread = threading.Thread(target=self._run, name="pyllama-writer", daemon=True)
        self._thread.start()

    def take(self, answer: Answer) -> None:
        """Writes an answer from now on. Any thread may call this."""
        self._open.add(answer)
        self._to_do.put(answer)

    def write(self, answer: Answer) -> None:
        """Writes what an answer has, without waiting. Any thread may call this."""
        if answer.lock.acquire(blocking=False):
            try:
                self._write(answer)
            finally:
                answer.lock.release()
        else:
            self._to_do.put(answer)  # who is writing may have looked already

    def stop(self, timeout: float) -> None:
        """Ends all answers, and the thread."""
        self._to_do.put(None)
        self._thread.join(timeout)

    def _write(self, answer: Answer) -> None:
        if not answer.is_written and answer.write_news():
            answer.is_written = True
            self._to_do.put(answer)

    def _run(self) -> None:
        next_look = 0.0
        while True:
            try:
                answer = self._to_do.get(timeout=_LOOK_SECONDS if self._open else None)
                if answer is None:
                    break
                self._attend(answer)
            except queue.Empty:
                pass
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _LOOK_SECONDS
                for answer in list(self._open):
                    self._attend(answer)
        for answer in list(self._open):
            with answer.lock:
                answer.is_written = True
            answer.end()

    def _attend(self, answer: Answer) -> None:
        with answer.lock:
            self._write(answer)
        if answer.is_written and answer in self._open:
            self._open.discard(answer)
            answer.end()
