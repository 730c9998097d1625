"""Waitress, with what a server of long streams needs besides: streams that are written as their pieces come, errors as JSON
objects also where no handler was reached, one log line for each request, clients that do not read given up after the timeout,
and a stop that lets answers be finished.

This module knows sockets and WSGI; nothing of models or of what the paths mean.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import BadRequest

from pyllama import __version__
from pyllama.server.errors import JSON, error_body
from pyllama.server.writer import Answer, Writer

__all__ = ["CLIENT", "MAX_BODY", "NOTES", "Client", "RequestRecord", "Server"]

_log = logging.getLogger(__name__)

MAX_BODY = 16 << 20
"""Bytes of a request's body."""
MAX_HEADER = 64 << 10
MAX_CONNECTIONS = 500
"""Beyond these, the ones that have been waited for longest make room. Well below the usual limit of 1024 open files."""
MAX_UNREAD = 1 << 20
"""Bytes of a stream that wait for a slow reader before the stream itself has to wait."""
LINGER_SECONDS = 5.0
"""How long what a refused client still sends is read and dropped, so that it gets to see the answer."""
STOP_SECONDS = 5.0
"""How long a stop waits for answers to be finished."""
NOTES = "pyllama.notes"
"""Key of the WSGI environment under which a handler finds a dictionary for what it wants to see in the log."""
CLIENT = "pyllama.client"
"""Key of the WSGI environment under which a handler finds the :class:`Client`."""
_BODY = "pyllama.body"
"""Key of the WSGI environment for the body that the writer is to write."""

Application = Callable[..., Iterable[bytes]]


class Client:
    """Whoever waits for an answer, as a handler sees them."""

    def __init__(self, channel: HTTPChannel) -> None:
        self._channel = channel
        self.takes_news = False
        """To be set by a handler whose body gives ``b""`` instead of waiting as soon as ``write_news`` is there."""
        self.write_news: Callable[[], None] | None = None
        """To be called when such a body has more, in any thread, which then asks the body for it. It does not wait."""

    def is_gone(self) -> bool:
        """Is the connection closed?"""
        return not self._channel.connected


class RequestRecord(NamedTuple):
    """What is logged of a request."""

    client: str
    method: str
    path: str
    status: int
    n_bytes: int
    """Of the answer's body."""
    seconds: float
    notes: dict[str, Any]


class _HandedOver(BaseException):
    """Leaves what Waitress does with a request: the answer, its argument, is the writer's from now on."""


class _Recorded:
    """A task that reports itself when it is done."""

    def service(self) -> None:
        try:
            super().service()  # type: ignore[misc]
        except _HandedOver:
            raise
        except BaseException:
            self.record()
            raise
        else:
            self.record()

    def record(self) -> None:
        environ = getattr(self, "environ", None) or {}
        request, channel = self.request, self.channel
        channel.server.on_request(
            RequestRecord(
                client=channel.addr[0],
                method=request.command,
                path=request.path,
                status=int(self.status.split(" ", 1)[0]),
                n_bytes=self.content_bytes_written,
                seconds=time.time() - self.start_time,
                notes=environ.get(NOTES, {}),
            )
        )


class _Task(_Recorded, WSGITask, Answer):
    """The application's answer, written in the handler's thread or by the writer."""

    def __init__(self, channel: HTTPChannel, request: HTTPRequestParser) -> None:
        WSGITask.__init__(self, channel, request)
        Answer.__init__(self)

    def get_environment(self) -> dict[str, Any]:
        environ = super().get_environment()
        environ.setdefault(NOTES, {})
        environ.setdefault(CLIENT, Client(self.channel))
        return environ

    def execute(self) -> None:
        super().execute()
        if _BODY in self.environ:
            self._body: Iterator[bytes] = iter(self.environ[_BODY])
            raise _HandedOver(self)

    def write_news(self) -> bool:
        pieces: list[bytes] = []
        try:
            try:
                is_whole = self._gather(pieces)
            finally:  # what came before a failure is sent
                if pieces:
                    self._send(pieces)
            if is_whole:
                self.finish()
            return is_whole
        except (ClientDisconnected, OSError):
            return True
        except Exception:
            _log.exception("the answer to %s broke off", self.request.path)
            return True

    def _gather(self, pieces: list[bytes]) -> bool:
        """Adds the pieces that are there; True: the last is among them. More than a client reads at its ease would have to wait
        for it, and all others with it."""
        n_unread = self.channel.total_outbufs_len
        while n_unread <= MAX_UNREAD:
            piece = next(self._body, None)
            if not piece:
                return piece is None
            pieces.append(piece)
            n_unread += len(piece)
        return False

    def _send(self, pieces: list[bytes]) -> None:
        if not self.wrote_header:
            self.write(b"")
        self.content_bytes_written += sum(len(piece) for piece in pieces)
        if self.chunked_response:
            pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
        self.channel.write_now(b"".join(pieces))

    def end(self) -> None:
        try:
            self.environ[_BODY].close()
        except Exception:
            _log.exception("the answer to %s could not be closed", self.request.path)
        self.channel.close_after_answer()
        self.record()


def _with_bodies_for_the_writer(application: Application) -> Application:
    """Keeps bodies that take news back from Waitress, which would wait for them in the handler's thread."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = application(environ, start_response)
        if not environ[CLIENT].takes_news:
            return body
        environ[_BODY] = body
        return ()

    return call


class _RefusedTask(_Recorded, ErrorTask):
    """The answer to a request that Waitress refused: no HTTP, or too much of it."""

    def execute(self) -> None:
        error = self.request.error
        message = f"the body is larger than {MAX_BODY} bytes" if error.code == 413 else error.body
        body = error_body(error.code, f"{error.reason}: {message}")
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", JSON), ("Access-Control-Allow-Origin", "*")]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.channel.lingers = True
        self.write(body)


class _Parser(HTTPRequestParser):
    command = path = "-"  # for requests that never tell them

    def received(self, data: bytes) -> int:
        n = super().received(data)
        if self.chunked and len(self.body_rcv.control_line) + len(self.body_rcv.trailer) > MAX_HEADER:
            self.error = BadRequest("what stands between the chunks is too long")
            self.completed = True
        if self.error:
            self.expect_continue = False  # nobody wants the rest
        return n

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a length of thousands of digits, an address that is none
            raise ParsingError(str(error)) from None


class _Channel(HTTPChannel):
    """One connection."""

    task_class = _Task
    error_task_class = _RefusedTask
    parser_class = _Parser
    lingers = False
    """Shall what still arrives be dropped for a while before the connection is closed?"""
    lingering_until: float | None = None
    arriving: _Parser | None = None
    """A request of which a part is still to come,"""
    arriving_since: float = 0.0
    """and when its first bytes came."""

    def service(self) -> None:
        try:
            super().service()
        except _HandedOver as task:
            self.server.take_over(task.args[0])

    def write_now(self, data: bytes) -> None:
        """Sends what can be sent and keeps the rest, as ``write_soon``, which is several times as slow."""
        with self.outbuf_lock:
            if self.connected and not self.total_outbufs_len:
                with contextlib.suppress(OSError):  # write_soon will meet it again
                    data = data[self.socket.send(data) :]
                    self.last_activity = time.time()
        if data:
            self.write_soon(data)

    def close_after_answer(self) -> None:
        """Closes the connection when all is sent; what else was asked for on it is dropped, as Waitress does."""
        with self.requests_lock:
            self.close_when_flushed = True
            for request in self.requests:
                request.close()
            self.requests = []
        if self.connected:
            self.server.pull_trigger()
        self.last_activity = time.time()

    def readable(self) -> bool:
        return self.lingering_until is not None or super().readable()

    def received(self, data: bytes) -> bool:
        accepted = self.lingering_until is None and super().received(data)
        if self.request is not self.arriving:
            self.arriving, self.arriving_since = self.request, self.last_activity
        return accepted

    def handle_write(self) -> None:
        if self.socket is None:  # reading, just before, has found that the client is gone
            return
        if not (self.lingers and self.close_when_flushed):
            super().handle_write()
            return
        self._flush_exception(self._flush_some)
        if self.socket is None:  # so has writing
            return
        if not self.total_outbufs_len:
            # Closing now, with input unread, would reset the connection, and the answer would be lost on its way.
            self.close_when_flushed = False
            self.lingering_until = time.time() + LINGER_SECONDS
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:
                self.will_close = True
        if self.will_close:
            self.handle_close()

    def is_overdue(self, now: float, cutoff: float) -> bool:
        """Has the client taken nothing of its answer since ``cutoff``, or lingered too long?"""
        unread = self.total_outbufs_len and self.last_activity < cutoff
        return bool(unread) or (self.lingering_until is not None and self.lingering_until < now)

    @property
    def waited_for_since(self) -> float:
        """Since when the client has owed a request, or the rest of one: single bytes now and then do not count."""
        return self.last_activity if self.arriving is None else self.arriving_since

    def is_waited_for(self, now: float) -> bool:
        """Is nothing being answered, and has the client owed something for a second?"""
        return not self.requests and not self.total_outbufs_len and self.waited_for_since < now - 1

    def is_left(self) -> bool:
        """Has the client closed a connection on which it has sent more than is read ahead? Where the system can tell."""
        if len(self.requests) <= self.adj.channel_request_lookahead or self.total_outbufs_len or not _CLOSED:
            return False
        poll = select.poll()
        poll.register(self.socket, _CLOSED)
        return bool(poll.poll(0))


_CLOSED = getattr(select, "POLLRDHUP", 0)


class _Listener(TcpWSGIServer):
    """One listening socket."""

    channel_class = _Channel
    on_request: Callable[[RequestRecord], None]
    writer: Writer

    def take_over(self, task: _Task) -> None:
        """Lets the writer write the rest of an answer."""
        task.environ[CLIENT].write_news = functools.partial(self.writer.write, task)
        self.writer.take(task)

    def close_overdue(self, now: float) -> None:
        """Closes connections that are overdue or left, and where there are too many those that are waited for.

        Not to be called from within the loop: it would take a new connection for the closed one whose number it got.
        """
        channels = list(self.active_channels.values())
        cutoff = now - self.adj.channel_timeout
        closing = [channel for channel in channels if channel.is_overdue(now, cutoff) or channel.is_left()]
        if self.in_connection_overflow:
            waited_for = [channel for channel in channels if channel.is_waited_for(now)]
            waited_for.sort(key=lambda channel: channel.waited_for_since)
            closing += waited_for[: len(channels) // 4 + 1]
        for channel in closing:
            channel.handle_close()


class Server:
    """Listens from the moment it is made; answers while :meth:`run` runs.

    Args:
        application: WSGI. Its environment has :data:`NOTES` and :data:`CLIENT`.
        host, port: where to listen; a host name with several addresses means all of them. Port 0: any free one.
        n_threads: requests that can be answered at once.
        timeout: seconds after which a client that sends or reads nothing is given up.
        on_request: called with a record of every request, in any thread.

    Raises:
        OSError: it is not possible to listen there.
    """

    def __init__(
        self,
        application: Application,
        host: str,
        port: int,
        *,
        n_threads: int,
        timeout: float,
        on_request: Callable[[RequestRecord], None],
    ) -> None:
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        try:
            settings = Adjustments(
                host=host,
                port=port,
                threads=n_threads,
                ident=f"pyllama/{__version__}",
                asyncore_use_poll=True,
                channel_request_lookahead=1,  # goes on reading during an answer, and so sees that a client has gone
                channel_timeout=max(1, round(timeout)),
                cleanup_interval=1,
                connection_limit=MAX_CONNECTIONS,
                log_socket_errors=False,
                max_request_body_size=MAX_BODY,
                max_request_header_size=MAX_HEADER,
                outbuf_high_watermark=MAX_UNREAD,
            )
        except ValueError as error:
            raise OSError(f"{host!r} is not an address of this machine") from error
        self._dispatcher = ThreadedTaskDispatcher()
        self._writer = Writer()
        self._map: dict[int, Any] = {}
        self._listeners: list[_Listener] = []
        self._stopping = False
        self._next_look = 0.0
        try:
            for address in settings.listen:
                listener = _Listener(
                    _with_bodies_for_the_writer(application),
                    self._map,
                    dispatcher=self._dispatcher,
                    adj=settings,
                    sockinfo=address,
                )
                listener.on_request, listener.writer = on_request, self._writer
                self._listeners.append(listener)
        except OSError:
            wasyncore.close_all(self._map)
            self._writer.stop(1)
            raise
        self._dispatcher.set_thread_count(n_threads)

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Hosts and ports on which it listens."""
        return [(listener.effective_host, int(listener.effective_port)) for listener in self._listeners]

    def run(self, on_stop: Callable[[], None] = lambda: None) -> None:
        """Answers requests until :meth:`stop`. Then nobody else is let in, ``on_stop`` is called (in this thread: it should end
        the answers that are under way, soon), and what is left to say is sent within a few seconds.
        """
        while not self._stopping:
            self._poll(1.0)
        for listener in self._listeners:
            listener.accepting = False
            wasyncore.dispatcher.close(listener)
        end = time.monotonic() + STOP_SECONDS
        on_stop()
        while self._is_busy() and time.monotonic() < end:
            self._poll(0.05)
        self._dispatcher.shutdown(timeout=1)
        self._writer.stop(1)
        wasyncore.close_all(self._map)

    def stop(self) -> None:
        """Makes :meth:`run` return. Any thread and any signal handler may call this."""
        self._stopping = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # it is closed already
                listener.pull_trigger()

    def _poll(self, seconds: float) -> None:
        wasyncore.loop(timeout=seconds, use_poll=True, map=self._map, count=1)
        now = time.time()
        if now >= self._next_look:
            self._next_look = now + 1
            for listener in self._listeners:
                listener.close_overdue(now)

    def _is_busy(self) -> bool:
        channels = [channel for listener in self._listeners for channel in listener.active_channels.values()]
        return any(channel.requests or channel.total_outbufs_len for channel in channels)
