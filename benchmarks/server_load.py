"""Streams from a server, and the same load on the engine without HTTP: `python benchmarks/server_load.py -m model.gguf`.

Every client sends a prompt of its own and reads its stream to the end. The server is a process of its own, started with the
flags after ``--``, or one that runs already (``--url``). In turns with it the same prompts go to an engine in this process,
with the same settings: the ratio of both throughputs is what HTTP costs. The clients of the server are one thread that reads
whatever socket has something, since what they cost is the server's loss where both share the processor: the report says how much
that is.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a checkout needs no installation

FLAGS = ["-np", "8", "-cb", "-c", "4096"]
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work government number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father power hour "
    "game line end member law car city community name president team minute idea kid body information back parent face others "
    "level office door health person art war history party result change morning reason research girl guy moment air teacher"
).split()


def prompts(n: int, n_words: int, n_shared: int, seed: int) -> list[str]:
    """Texts of ``n_words`` random words, of which the first ``n_shared`` are the same in all."""
    start = random.Random(0).choices(WORDS, k=n_shared)
    draw = random.Random(seed)
    return [" ".join(start + draw.choices(WORDS, k=n_words - n_shared)) for _ in range(n)]


@dataclass
class Answer:
    """When something came of one stream, in seconds after its request: the first token, then one or several at a time."""

    times: list[float] = field(default_factory=list)
    n_tokens: int = 0
    n_prompt: int = 0

    @property
    def each_token(self) -> float:
        """Seconds for each token after the first, in the mean."""
        return (self.times[-1] - self.times[0]) / max(1, self.n_tokens - 1)


@dataclass
class Round:
    """All streams of one go."""

    answers: list[Answer]
    seconds: float
    client_seconds: float = 0.0
    """Of a processor, taken by the clients while the clock ran."""

    @property
    def rate(self) -> float:
        """Generated tokens a second, the reading of the prompts included."""
        return sum(answer.n_tokens for answer in self.answers) / self.seconds

    @property
    def first(self) -> list[float]:
        return [answer.times[0] for answer in self.answers]

    @property
    def each_token(self) -> list[float]:
        return [answer.each_token for answer in self.answers]

    @property
    def pauses(self) -> list[float]:
        """In which a stream shows nothing new."""
        return [b - a for answer in self.answers for a, b in zip(answer.times, answer.times[1:])]


# ---- over HTTP -------------------------------------------------------------------------------------------------------


class Client:
    """A request on a socket of its own, and what has come of its stream."""

    def __init__(self, host: str, port: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = f"POST /completion HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
        self.socket = socket.create_connection((host, port), timeout=60)
        self.request = head.encode() + data
        self.sent = 0.0
        self.received: list[tuple[float, bytes]] = []

    def answer(self) -> Answer:
        """What the bytes say that have come.

        Raises:
            RuntimeError: the answer is none.
        """
        text = b"".join(data for _, data in self.received)
        match = re.search(rb'"tokens_evaluated":(\d+),"tokens_predicted":(\d+)', text)
        times = [now - self.sent for now, data in self.received if b'"stop":false' in data]
        if match is None or not times:
            raise RuntimeError(f"the server did not answer as expected: {text[-500:].decode(errors='replace')}")
        return Answer(times, n_tokens=int(match[2]), n_prompt=int(match[1]))


def over_http(address: tuple[str, int], texts: Sequence[str], options: dict[str, Any]) -> Round:
    """All texts at once, each on a connection of its own."""
    clients = [Client(*address, {"prompt": text, "stream": True, **options}) for text in texts]
    poll = select.poll()
    reading = {}
    for client in clients:
        poll.register(client.socket, select.POLLIN)
        reading[client.socket.fileno()] = client.socket.recv, client.received
    begin, client_begin = time.perf_counter(), time.thread_time()
    for client in clients:
        client.sent = time.perf_counter()
        client.socket.sendall(client.request)
    while reading:  # no more than what has to be done while the server works
        ready = poll.poll()
        now = time.perf_counter()
        for number, _ in ready:
            receive, received = reading[number]
            data = receive(65536)
            if data:
                received.append((now, data))
            else:
                poll.unregister(number)
                del reading[number]
    client_seconds = time.thread_time() - client_begin
    for client in clients:
        client.socket.close()
    seconds = max(client.received[-1][0] for client in clients) - begin
    return Round([client.answer() for client in clients], seconds, client_seconds)


@contextmanager
def running_server(flags: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Starts a server and waits until its model is loaded; yields its address."""
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address, log = None, []
        for line in process.stderr:
            log.append(line)
            if match := re.search(r"listening on http://([\d.]+):(\d+)", line):
                address = match[1], int(match[2])
            if address and "is ready" in line:
                break
        else:
            raise RuntimeError(f"the server ended: {log[-1].strip() if log else f'status {process.wait()}'}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that its log never fills the pipe
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


# ---- without HTTP ----------------------------------------------------------------------------------------------------


class Direct:
    """An engine in this process, with the context and slots that the server's flags say."""

    def __init__(self, flags: Sequence[str]) -> None:
        from pyllama import models, pull
        from pyllama.engine import Engine
        from pyllama.server.flags import parse

        s = parse(list(flags), {})
        self.model = models.load(
            s.model or pull.path_of(), n_ctx=s.ctx_size, n_threads=s.threads, n_threads_batch=s.threads_batch,
            n_batch=s.batch_size, max_sequences=s.parallel, kv_type=s.kv_type,
        )  # fmt: skip
        self.engine = Engine(self.model, s.parallel, continuous=s.cont_batching)
        gc.collect()
        gc.freeze()  # as the server

    def run(self, texts: Sequence[str], options: dict[str, Any]) -> Round:
        """The same as :func:`over_http`."""
        from pyllama.engine import Request
        from pyllama.sampling import SamplingParams

        known = {name: value for name, value in options.items() if name not in ("n_predict", "cache_prompt")}
        sampling = SamplingParams(**known)
        limits = {"n_predict": options["n_predict"], "cache_prompt": options["cache_prompt"]}
        answers, streams = [], []
        begin = time.perf_counter()
        for text in texts:
            answer, sent = Answer(), time.perf_counter()
            tokens = tuple(self.model.tokenizer.encode(text, add_special=True))
            stream = self.engine.submit(Request(prompt=tokens, sampling=sampling, **limits))
            # The engine notes the times itself: a thread that is woken to do that would be what is to be measured.
            stream.listener = lambda note=answer.times.append, sent=sent: note(time.perf_counter() - sent)
            answers.append(answer)
            streams.append(stream)
        for answer, stream in zip(answers, streams):
            _, _, done = stream.result()
            answer.n_prompt, answer.n_tokens = done.n_prompt, done.n_predicted
        return Round(answers, time.perf_counter() - begin)


# ---- the report ------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    first = [seconds for r in rounds for seconds in r.first]
    each_token = [seconds for r in rounds for seconds in r.each_token]
    pauses = [seconds for r in rounds for seconds in r.pauses]
    return {
        "tokens_per_second": median(r.rate for r in rounds),
        "min": min(r.rate for r in rounds),
        "max": max(r.rate for r in rounds),
        "first_token_p50_ms": 1e3 * percentile(first, 50),
        "first_token_p95_ms": 1e3 * percentile(first, 95),
        "each_token_p50_ms": 1e3 * percentile(each_token, 50),
        "pause_p50_ms": 1e3 * percentile(pauses, 50),
        "pause_p95_ms": 1e3 * percentile(pauses, 95),
        "prompt_tokens": median(answer.n_prompt for r in rounds for answer in r.answers),
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['streams']} streams, prompts of {report['http']['prompt_tokens']:.0f} tokens, {report['n_predict']} new ones",
        f"{'':10}{'tokens/s':>10}{'min':>9} – {'max':<9}{'first token p50':>17}{'p95':>8}"
        f"{'each token':>14}{'pause p50':>13}{'p95':>8}",
    ]
    for name in ("http", "engine"):
        if row := report.get(name):
            lines.append(
                f"{name:10}{row['tokens_per_second']:10,.0f}{row['min']:9,.0f} – {row['max']:<9,.0f}"
                f"{row['first_token_p50_ms']:14,.0f} ms{row['first_token_p95_ms']:8,.0f}"
                f"{row['each_token_p50_ms']:11,.1f} ms{row['pause_p50_ms']:10,.1f} ms{row['pause_p95_ms']:8,.1f}"
            )
    if "ratio_quartiles" in report:
        low, ratio, high = (100 * share for share in report["ratio_quartiles"])
        lines.append(f"HTTP reaches {ratio:.1f} % of the engine (median of the turns; half of them: {low:.0f} to {high:.0f} %)")
    busy = report["client_share"]
    lines.append(f"the clients took {100 * busy:.1f} % of the time of one processor")
    return "\n".join(lines)


def measure(args: argparse.Namespace, address: tuple[str, int], direct: Direct | None) -> dict[str, Any]:
    options = {"n_predict": args.n_predict, "ignore_eos": True, "seed": 1, "cache_prompt": args.shared > 0}
    goes = {"http": lambda texts: over_http(address, texts, options)}
    if direct is not None:
        goes["engine"] = lambda texts: direct.run(texts, options)
    rounds: dict[str, list[Round]] = {name: [] for name in goes}
    for i in range(args.rounds + 1):
        texts = prompts(args.streams, args.words, args.shared, seed=i)
        for name in sorted(goes, reverse=i % 2 == 0):
            rounds[name].append(goes[name](texts))
    http, engine = rounds["http"][1:], rounds.get("engine", [])[1:]  # the first of each warms up
    report: dict[str, Any] = {"streams": args.streams, "n_predict": args.n_predict, "http": summary(http)}
    report["client_share"] = median(r.client_seconds / r.seconds for r in http)
    if engine:
        report["engine"] = summary(engine)
        ratios = [a.rate / b.rate for a, b in zip(http, engine)]
        report["ratio_quartiles"] = [percentile(ratios, 25), median(ratios), percentile(ratios, 75)]
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-m", "--model", type=Path, help="GGUF file (default: the server's)")
    parser.add_argument("--url", help="a server that runs already, e.g. http://127.0.0.1:8080")
    parser.add_argument("--no-engine", action="store_true", help="leave the engine without HTTP out")
    parser.add_argument("-s", "--streams", type=int, default=8, metavar="N", help="clients at once (%(default)s)")
    parser.add_argument("-n", "--n-predict", type=int, default=64, metavar="N", help="tokens of each (%(default)s)")
    parser.add_argument("--words", type=int, default=130, metavar="N", help="of each prompt (%(default)s)")
    parser.add_argument(
        "--shared", type=int, default=0, metavar="N", help="of them the same in all prompts (%(default)s)"
    )
    parser.add_argument("-r", "--rounds", type=int, default=25, metavar="N", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("flags", nargs="*", help=f"of the server, after -- ({' '.join(FLAGS)})")
    args = parser.parse_args()
    flags = args.flags or FLAGS
    if args.model is not None:
        flags = ["-m", str(args.model), *flags]
    try:
        direct = None if args.no_engine else Direct(flags)
        if args.url:
            parts = urlsplit(args.url)
            report = measure(args, (parts.hostname or "127.0.0.1", parts.port or 80), direct)
        else:
            with running_server(flags) as address:
                report = measure(args, address, direct)
        if direct is not None:
            direct.engine.close()
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
