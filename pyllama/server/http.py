"""Waitress, with what a server of long streams needs besides: streams that are written as their pieces come, errors as JSON
objects also where no handler was reached, one log line for each request, clients that do not read given up after the timeout,
and a stop that lets answers be finished.

What comes of a stream is written in the thread that brings it, as far as that needs no waiting. That is the engine's thread. Any
other would have to be woken, to get hold of the interpreter, and to take a processor from the engine's next step, all of whose
threads then wait for the one that was stopped: on a machine with no processors to spare, that takes several times as long as the
writing. What is left is done by the thread that runs the server, whom the system tells who has gone and who reads again.

This module knows sockets and WSGI; nothing of models or of what the paths mean.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections import deque
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
from pyllama.server.errors import JSON, ApiError, error_body

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

Application = Callable[..., Iterable[bytes]]


class Client:
    """Whoever waits for an answer, as a handler sees them."""

    def __init__(self, channel: HTTPChannel) -> None:
        self._channel = channel
        self.body: Iterator[bytes] | None = None
        self.write_news = channel.write_news
        """To be called when the body of a stream has more, in any thread, which then asks the body for it. It does not wait."""

    def stream(self, body: Iterator[bytes]) -> None:
        """Sends these pieces in place of what the handler returns.

        Args:
            body: a generator, which gives ``b""`` instead of waiting. An ``ApiError`` in place of the first piece becomes an
                ordinary error response. It is closed in the end.
        """
        self.body = body

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
    """Leaves what Waitress does with a request, since its answer is a stream, the argument."""


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


class _Task(_Recorded, WSGITask):
    """The application's answer: as a whole, written in the handler's thread, or a stream."""

    def __init__(self, channel: HTTPChannel, request: HTTPRequestParser) -> None:
        super().__init__(channel, request)
        self._writing = threading.Lock()
        self._has_news = self._is_whole = False

    def get_environment(self) -> dict[str, Any]:
        environ = super().get_environment()
        environ.setdefault(NOTES, {})
        environ.setdefault(CLIENT, Client(self.channel))
        return environ

    def execute(self) -> None:
        super().execute()
        body = self.environ[CLIENT].body
        if body is not None:
            self._body: Iterator[bytes] = body
            self.content_length = None
            self.remove_content_length_header()  # of what the handler returned
            raise _HandedOver(self)

    def write_news(self) -> None:
        """Writes what there is of a stream. Any thread may call this."""
        self._has_news = True
        while self._has_news and self._writing.acquire(blocking=False):  # who is writing looks again
            try:
                self._has_news = False
                if not self._is_whole and self._write_all():
                    self._is_whole = True
                    self.channel.server.end_soon(self)
            finally:
                self._writing.release()

    def _write_all(self) -> bool:
        """Writes what there is, as far as that needs no waiting; True: nothing more is to come."""
        try:
            # More than a client reads at its ease is not asked for: it would have to be waited for, and all others with it.
            while self.channel.connected and self.channel.total_outbufs_len <= MAX_UNREAD:
                piece = self._write_some()
                if not piece:
                    return piece is None
            return not self.channel.connected
        except (ClientDisconnected, OSError):
            return True
        except Exception:
            _log.exception("the answer to %s broke off", self.request.path)
            return True

    def _write_some(self) -> bytes | None:
        """Writes the pieces that are there, though not many more than are to be sent at once.

        Returns:
            The last one: None stands for the end, an empty one for what is yet to come.
        """
        pieces: list[bytes] = []
        piece: bytes | None = b""
        n_bytes = 0
        try:
            while n_bytes <= MAX_UNREAD and (piece := next(self._body, None)):
                pieces.append(piece)
                n_bytes += len(piece)
        except ApiError as error:
            self._refuse(error)
            return None
        except Exception:
            if not (pieces or self.wrote_header):
                self._refuse(ApiError(500, "Internal Server Error"))
            raise
        finally:  # what came before a failure is sent
            if pieces or piece is None:
                self._send(pieces, is_whole=piece is None)
        return piece

    def _send(self, pieces: list[bytes], is_whole: bool) -> None:
        if not self.wrote_header:
            self.write(b"")
        self.content_bytes_written += sum(len(piece) for piece in pieces)
        if self.chunked_response:
            pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
            if is_whole:
                pieces.append(b"0\r\n\r\n")
        self.channel.write_now(b"".join(pieces))

    def _refuse(self, error: ApiError) -> None:
        body = error_body(error.status_code, error.message)
        self.status = error.status_line
        others = [header for header in self.response_headers if header[0] != "Content-Type"]
        self.response_headers = [*others, ("Content-Type", JSON)]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)

    def end(self) -> None:
        """Closes the stream and the connection, whatever there may still have been to write."""
        with self._writing:
            self._is_whole = True
        try:
            self._body.close()
        except Exception:
            _log.exception("the answer to %s could not be closed", self.request.path)
        self.channel.close_after_answer()
        self.record()


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
    stream: _Task | None = None
    """The answer that is being written as its pieces come."""
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
        except _HandedOver as handed_over:
            (stream,) = handed_over.args
            self.server.streams.add(stream)  # before anybody can write, and end, it
            self.stream = stream
            self.write_news()

    def write_news(self) -> None:
        """Writes what there is of a stream, or ends it if the client is gone."""
        if self.stream is not None:
            self.stream.write_news()

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
        self.stream = None
        with self.requests_lock:
            self.close_when_flushed = True
            for request in self.requests:
                request.close()
            self.requests = []
        self.last_activity = time.time()

    def handle_read(self) -> None:
        super().handle_read()
        if not self.connected:
            self.write_news()

    def handle_close(self) -> None:
        super().handle_close()
        self.write_news()

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
            if self.total_outbufs_len <= MAX_UNREAD:  # there is room for what had to wait
                self.write_news()
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
    streams: set[_Task]
    """All that have not been closed."""
    ended: deque[_Task]
    """Those of them to which nothing more will be written."""

    def end_soon(self, stream: _Task) -> None:
        """Has a stream closed in the thread that runs the server."""
        self.ended.append(stream)
        self.pull_trigger()

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
                outbuf_high_watermark=MAX_UNREAD + MAX_HEADER,  # so that no stream waits for room behind its own header
            )
        except ValueError as error:
            raise OSError(f"{host!r} is not an address of this machine") from error
        self._dispatcher = ThreadedTaskDispatcher()
        self._streams: set[_Task] = set()
        self._ended: deque[_Task] = deque()
        self._map: dict[int, Any] = {}
        self._listeners: list[_Listener] = []
        self._stopping = False
        self._next_look = 0.0
        try:
            for address in settings.listen:
                listener = _Listener(
                    application, self._map, dispatcher=self._dispatcher, adj=settings, sockinfo=address
                )
                listener.on_request, listener.streams, listener.ended = on_request, self._streams, self._ended
                self._listeners.append(listener)
        except OSError:
            wasyncore.close_all(self._map)
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
        self._ended.extend(self._streams)
        self._end_streams()
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
        self._end_streams()

    def _end_streams(self) -> None:
        while self._ended:
            stream = self._ended.popleft()
            if stream in self._streams:
                self._streams.remove(stream)
                stream.end()

    def _is_busy(self) -> bool:
        channels = [channel for listener in self._listeners for channel in listener.active_channels.values()]
        return any(channel.requests or channel.total_outbufs_len for channel in channels)
