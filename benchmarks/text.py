"""What surrounds a model's runs: `python benchmarks/text.py MODEL.gguf…` prints a table for each model.

    tokenizing   MB/s on texts of 1 MB, one thread
    loading      seconds from a process's start to its first token; of the load alone, beside what reading a mapping of the
                 file and taking as much fresh memory cost; and the most memory that was resident
    a step       microseconds for each token that pass between the core's calls while one request is answered and read; and the
                 tokens per second, beside those of the same runs alone
    a grammar    microseconds for the mask of a JSON grammar, at each token of a document after the first

All figures are medians. The first process after a pause may wait for memory that the system (or a virtual machine's host) has
yet to find: loading is measured with fresh memory at hand.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout needs no installation

import numpy as np  # noqa: E402

from pyllama.core import cpu_name  # noqa: E402
from pyllama.engine import Engine, Request  # noqa: E402
from pyllama.gguf import GGUFFile  # noqa: E402
from pyllama.grammar import Grammar, token_trie  # noqa: E402
from pyllama.models import load, model  # noqa: E402
from pyllama.sampling import SamplingParams  # noqa: E402
from pyllama.tokenizer import Tokenizer, from_gguf  # noqa: E402

JSON_GRAMMAR = r"""
root ::= ws object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws ::= [ \t\n]{0,20}
"""

Rows = list[tuple[str, str]]


def seconds(work: Callable[[], Any], repetitions: int) -> float:
    """The median duration of calls."""
    durations = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begin)
    return median(durations)


# ---- tokenizing ----


def sample_texts(n_bytes: int) -> dict[str, str]:
    """Texts of about ``n_bytes`` in UTF-8, the same ones each time on one machine."""
    rng = random.Random(1)
    root = Path(__file__).resolve().parent.parent
    prose = "".join(path.read_text() for path in [root / "LICENSE", root / "README.md", *sorted(root.glob("docs/*.md"))])
    code = "".join(path.read_text(errors="replace") for path in sorted(Path(os.__file__).parent.glob("[a-f]*.py")))
    records = [{"id": i, "name": f"item {rng.randrange(999)}", "value": rng.random(), "ok": i % 3 == 0} for i in range(9999)]
    scripts = [(0x20, 0x21), (0x370, 0x400), (0x400, 0x460), (0x5D0, 0x5EB), (0x620, 0x64B), (0x905, 0x93A)]
    scripts += [(0x3041, 0x3097), (0x4E00, 0x9FA5), (0xAC00, 0xD7A4)]
    units = {
        "prose": prose,
        "code": code,
        "JSON": json.dumps(records, indent=1),
        "scripts": "".join(chr(rng.randrange(*rng.choice(scripts))) for _ in range(n_bytes // 2)),
        "emoji": "".join(chr(rng.randrange(0x1F300, 0x1F650)) for _ in range(n_bytes // 4)),
        "bytes": rng.randbytes(n_bytes).decode("latin-1"),
        "letters": "a" * n_bytes,
        "spaces": " " * n_bytes,
    }
    texts = {}
    for name, unit in units.items():
        data = unit.encode()
        texts[name] = (data * (n_bytes // len(data) + 1))[:n_bytes].decode(errors="ignore")
    return texts


def tokenizing(tokenizer: Tokenizer, repetitions: int) -> Rows:
    rows = []
    for name, text in sample_texts(1_000_000).items():
        duration = seconds(lambda text=text: tokenizer.encode(text), repetitions)
        rows.append((f"tokenize {name}, MB/s", f"{len(text.encode()) / duration / 1e6:.1f}"))
    return rows


# ---- loading ----


def read_mapping(path: Path) -> None:
    """Maps the file and reads a word of every page."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        words = np.frombuffer(mapping, np.uint8)
        words[: len(words) // 8 * 8].view(np.uint64).sum()
        del words


def take_memory(n_bytes: int) -> None:
    """Has the system find memory of the kind that weights get, which it then has at hand."""
    with mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, n_bytes, mmap.PAGESIZE):
            memory[at] = 1


def load_once(path: Path) -> None:
    """In a process of its own: prints what a load takes."""
    n_bytes = path.stat().st_size
    take_memory(n_bytes + (256 << 20))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    begin = time.perf_counter()
    loaded = load(path)
    duration = time.perf_counter() - begin
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line)
    peak = int(status["VmHWM"].split()[0]) << 10
    print(json.dumps({"load": duration, "peak": peak, "panels": loaded.weights.n_bytes}))


def first_token(path: Path) -> None:
    """In a process of its own: answers with one token."""
    from pyllama import Llama

    Llama(str(path)).create_completion("Hello", max_tokens=1)


def loading(path: Path, repetitions: int) -> Rows:
    def child(what: str) -> str:
        command = [sys.executable, __file__, "--child", what, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    read_mapping(path)
    whole = seconds(lambda: child("token"), repetitions)
    loads = [json.loads(child("load")) for _ in range(repetitions)]
    n_bytes = path.stat().st_size
    mapping = seconds(lambda: read_mapping(path), repetitions)
    load_seconds = median(one["load"] for one in loads)
    return [
        ("process start to first token, s", f"{whole:.2f}"),
        ("load, s", f"{load_seconds:.3f}"),
        ("read the file's mapping, s", f"{mapping:.3f} ({load_seconds / mapping:.1f} times as long: a load)"),
        ("file and panels, MB", f"{n_bytes / 1e6:.0f}, {loads[0]['panels'] / 1e6:.0f}"),
        ("most memory resident, MB", f"{median(one['peak'] for one in loads) / 1e6:.0f}"),
    ]


# ---- a step, and a grammar's masks ----


class TimedCore:
    """The core's library, with the begin and the end of each run noted, and how many steps it made."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.spans: list[tuple[float, float, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def pl_run(self, *args: Any) -> int:
        begin = time.perf_counter()
        status = self._lib.pl_run(*args)
        self.spans.append((begin, time.perf_counter(), 1))
        return status

    def pl_generate(self, *args: Any) -> int:
        begin = time.perf_counter()
        n_steps = self._lib.pl_generate(*args)
        self.spans.append((begin, time.perf_counter(), n_steps))
        return n_steps


def runs_alone(loaded: model.Model, n_prompt: int, n_tokens: int) -> float:
    """Tokens per second of a generation's runs, without anything between them."""
    blocks = list(range(loaded.n_blocks))
    loaded.run([model.SequenceInput([100] * n_prompt, 0, blocks, 1)])
    begin = time.perf_counter()
    for n_past in range(n_prompt, n_prompt + n_tokens):
        loaded.run([model.SequenceInput([100 + n_past], n_past, blocks[: n_past // 32 + 1], 1)])
    return n_tokens / (time.perf_counter() - begin)


def stepping(path: Path, n_tokens: int, repetitions: int) -> Rows:
    model.lib = core = TimedCore(model.lib)
    loaded = load(path, n_ctx=max(512, 2 * n_tokens))
    prompt = tuple(loaded.tokenizer.encode("Once upon a time", add_special=True))
    rows = []
    for name, options, stop in (
        ("default", {}, ()), ("greedy", {"temperature": 0.0}, ()), ("no top-k", {"top_k": 0}, ()), ("a stop string", {}, ("~~",)),
    ):  # fmt: skip
        whole, alone, between = [], [], []
        for _ in range(repetitions + 1):  # the first one warms up
            with Engine(loaded) as engine:
                core.spans.clear()
                params = SamplingParams(seed=1, ignore_eos=True, **options)
                request = Request(prompt=prompt, n_predict=n_tokens + 1, sampling=params, stop=stop, cache_prompt=False)
                timings = engine.submit(request).result()[2].timings
            between.append(1e6 * median((b[0] - a[1]) / b[2] for a, b in zip(core.spans[1:], core.spans[2:])))
            whole.append(1e3 * n_tokens / timings.predicted_ms)
            alone.append(runs_alone(loaded, len(prompt), n_tokens))
        share = median(a / b for a, b in zip(whole[1:], alone[1:]))
        rows.append((f"between two steps, {name}, µs", f"{median(between[1:]):.0f}"))
        rows.append((f"tokens/s, {name}", f"{median(whole[1:]):.0f} ({share:.1%} of {median(alone[1:]):.0f}, the runs alone)"))
    model.lib = core._lib
    loaded.close()
    return rows


def masking(tokenizer: Tokenizer) -> Rows:
    people = [{"name": "Ada Lovelace", "age": 36, "tags": ["maths", "poëtry", None], "at": {"x": -1.5e3, "y": True}}] * 3
    nested: Any = "deep"
    for depth in range(8):  # the grammar wants no more than 20 spaces
        nested = [depth, {"a \"key\"": nested}]
    tokens = tokenizer.encode(json.dumps({"people": people, "nested": nested}, indent=1, ensure_ascii=False))
    trie, matcher = token_trie(tokenizer), Grammar(JSON_GRAMMAR).matcher()
    durations = []
    for token in tokens:
        logits = np.zeros(tokenizer.n_vocab, np.float32)
        durations.append(seconds(lambda logits=logits: matcher.mask(trie, logits), 1))
        if not matcher.accept(tokenizer.token_bytes(token)):
            raise SystemExit("the document does not follow the grammar")
    after = sorted(1e6 * duration for duration in durations[1:])
    return [
        ("mask of the first token, µs", f"{1e6 * durations[0]:.0f}"),
        ("mask of a later one, µs", f"{median(after):.0f} (99 %: {after[len(after) * 99 // 100]:.0f}, most: {after[-1]:.0f})"),
    ]


def report(path: Path, args: argparse.Namespace) -> None:
    with GGUFFile.open(path) as gguf:
        tokenizer = from_gguf(gguf)
    rows = loading(path, args.repetitions)
    if not args.loading:
        rows = tokenizing(tokenizer, args.repetitions) + masking(tokenizer) + rows
        rows += stepping(path, args.tokens, args.repetitions)
    print(f"\n{path.name}: {tokenizer.n_vocab} tokens; kernels: {cpu_name()}\n\n| | |\n| --- | --- |")
    for name, value in rows:
        print(f"| {name} | {value} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-n", "--tokens", type=int, default=128, help="tokens to generate where steps are measured")
    parser.add_argument("--loading", action="store_true", help="measure nothing but loading")
    parser.add_argument("--child", choices=("load", "token"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        (load_once if args.child == "load" else first_token)(args.model[0])
        return 0
    try:
        for path in args.model:
            load(path).close()  # before anything is measured
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in args.model:
        report(path, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
