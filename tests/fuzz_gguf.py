"""Damaged model files: every one must load and run, or be refused with an error that pyllama means to raise.

    python -m tests.fuzz_gguf --cases 10000 --processes 2

Each case follows from its number alone. Workers are processes of their own, so that a crash, a hang or an excess of memory is
told of with the case's number and the rest goes on; ``--first N --cases 1`` runs that case again, ``--keep FILE`` writes it to
a file.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

SECONDS_PER_CASE = 60  # under sanitizers, on a machine that does something else as well
MOST_BYTES = 128 << 20  # that a case may take beyond what the process had before

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by GGUF type
_STRING, _ARRAY = 8, 9
_SAMPLED = 6  # elements of an array whose places are noted


@dataclass
class Layout:
    """Where a sound file keeps its numbers: (offset, width in bytes). Of an array's elements only the first few are noted."""

    structure: list[tuple[int, int]] = field(default_factory=list)
    """Counts, lengths, types, dimensions, offsets."""
    values: list[tuple[int, int]] = field(default_factory=list)
    """Values in the metadata."""
    texts: list[tuple[int, int]] = field(default_factory=list)
    """Keys, names and strings."""
    end: int = 0
    """Where the tensors' data begin, but for the padding."""


class _Walker:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.layout = data, 0, Layout()

    def number(self, width: int, kind: str = "structure", noted: bool = True) -> int:
        if noted:
            getattr(self.layout, kind).append((self.at, width))
        self.at += width
        return int.from_bytes(self.data[self.at - width : self.at], "little")

    def text(self, noted: bool = True) -> None:
        length = self.number(8, noted=noted)
        if length and noted:
            self.layout.texts.append((self.at, length))
        self.at += length

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            element, count = self.number(4), self.number(8)
            for i in range(count):
                sampled = i < _SAMPLED  # or the vocabulary would draw most of the faults
                if element == _STRING:
                    self.text(sampled)
                elif sampled:
                    self.number(_WIDTHS[element], "values")
                else:
                    self.at += _WIDTHS[element]
        else:
            self.number(_WIDTHS[kind], "values")

    def walk(self) -> Layout:
        self.at = 4
        self.number(4)
        n_tensors, n_keys = self.number(8), self.number(8)
        for _ in range(n_keys):
            self.text()
            self.value(self.number(4))
        for _ in range(n_tensors):
            self.text()
            for _ in range(self.number(4)):
                self.number(8)
            self.number(4)
            self.number(8)
        self.layout.end = self.at
        return self.layout


@functools.cache
def originals() -> list[tuple[bytes, Layout]]:
    """Sound files to damage: both architectures, several formats."""
    from tests.tiny_models import make_gemma3, make_llama

    made = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for quant in ("F32", "Q4_0", "BF16"):
            make_llama(path, n_layer=1, n_embd=32, n_head=2, n_head_kv=1, n_ff=32, quant=quant)
            made.append(path.read_bytes())
        make_llama(path, n_layer=1, n_embd=256, n_head=2, n_head_kv=1, n_ff=256, quant="Q4_K")
        made.append(path.read_bytes())
        yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
        make_llama(path, n_layer=1, n_embd=32, n_head=2, n_ff=32, quant="Q5_1", more=yarn, rope_factors=True)
        made.append(path.read_bytes())
        make_gemma3(path, n_layer=2, n_embd=32, n_head=2, head_dim=16, n_ff=32, quant="F16")
        made.append(path.read_bytes())
        linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "final_logit_softcapping": 30.0}
        linear["attention.sliding_window_pattern"] = 2
        make_gemma3(path, n_layer=2, n_embd=32, n_head=2, head_dim=16, n_ff=32, quant="Q8_0", more=linear)
        made.append(path.read_bytes())
    return [(data, _Walker(data).walk()) for data in made]


def _lie(rng: random.Random, old: int, width: int, size: int) -> int:
    """A number that may be put where ``old`` was."""
    top = 1 << 8 * width
    edges = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, top, *(1 << bits for bits in (16, 20, 31, 32, 48, 62, 63))]
    near = [old + 1, old - 1, old * 2, old // 2, old ^ 1 << rng.randrange(8 * width), size, size // 2]
    special = (float("nan"), float("inf"), -1.0, 0.0, 1.0, 1e-40, 1e38, 3.7)
    floats = [struct.unpack("<I", struct.pack("<f", number))[0] for number in special]
    choices = [rng.choice(edges), rng.choice(edges) - 1, rng.choice(near), -rng.choice(edges), rng.randrange(top)]
    return rng.choice([*choices, rng.choice(floats)]) % top


def damaged(number: int) -> bytes:
    """Case ``number``: a sound file with one to four faults."""
    rng = random.Random(number)
    original, layout = originals()[number % len(originals())]
    data = bytearray(original)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        _damage(rng, data, layout)
    return bytes(data)


def _damage(rng: random.Random, data: bytearray, layout: Layout) -> None:
    kind = rng.choice(
        ["structure"] * 5 + ["values"] * 4 + ["text", "swap", "header bits", "bits", "cut", "cut header", "splice"]
    )
    size, head = max(1, len(data)), max(1, min(layout.end, len(data)))
    if kind in ("structure", "values"):
        at, width = rng.choice(getattr(layout, kind))
        old = int.from_bytes(data[at : at + width], "little")
        data[at : at + width] = _lie(rng, old, width, size).to_bytes(width, "little")
    elif kind == "swap":
        (a, width), (b, other) = rng.choice(layout.structure), rng.choice(layout.structure)
        if width == other:
            data[a : a + width], data[b : b + width] = data[b : b + width], data[a : a + width]
    elif kind == "text":
        at, length = rng.choice(layout.texts)
        at += rng.randrange(length)
        data[at : at + 1] = rng.choice([b"\0", b" ", b"\xff", b"\xc3", rng.randbytes(1)])
    elif kind in ("bits", "header bits"):
        for _ in range(rng.choice([1, 8, 64])):
            at = rng.randrange(head if kind == "header bits" else size)
            if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
    elif kind in ("cut", "cut header"):
        del data[rng.randrange(head if kind == "cut header" else size) :]
    else:
        at, length = rng.randrange(head), rng.choice([1, 4, 8, 100])
        if rng.random() < 0.5:
            del data[at : at + length]
        else:
            data[at:at] = rng.randbytes(length)


def try_file(path: Path, mmap: bool) -> str:
    """Loads the file and uses the model for a moment. What happened, in a word or two.

    Raises:
        Exception: one that pyllama does not mean to raise.
    """
    from pyllama.core import CoreError
    from pyllama.models import SequenceInput, load

    try:
        model = load(path, n_ctx=64, n_threads=1, n_batch=32, max_sequences=2, mmap=mmap)
    except (ValueError, CoreError) as error:  # GGUFError and ModelError are ValueErrors
        if not str(error) or "memory" in str(error):  # no file is so large that memory may be short
            raise
        return f"refused: {type(error).__name__}"
    try:
        tokenizer = model.tokenizer
        tokens = tokenizer.encode("Hello, world! <|im_end|>", add_special=True)[:24] or [0]
        tokenizer.decode(tokens, special=True)
        tokenizer.token_table()
        model.run([SequenceInput(tokens, 0, [0], 1)])
        model.run([SequenceInput([0], len(tokens), [0], 1)], hidden=True)
        return "ran"
    except (ValueError, CoreError) as error:
        return f"loaded, then refused: {type(error).__name__}"
    finally:
        model.close()


def _worker(first: int, last: int, step: int, folder: Path) -> None:
    """Runs cases; before each, its number goes to the standard output, and what went wrong after it."""
    try_file(_write(folder, originals()[0][0]), True)  # what is made once is made before memory is limited
    if "asan" not in os.environ.get("LD_PRELOAD", "") and Path("/proc/self/statm").exists():
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, last, step):
        print(f"case {number}", flush=True)
        path = _write(folder, damaged(number))
        signal.alarm(SECONDS_PER_CASE)  # not caught: a hang in the core ends the process, too
        try:
            outcome = try_file(path, mmap=number % 3 != 0)
        except Exception as error:
            traceback.print_exc()
            outcome = f"FAILED: {type(error).__name__}: {error}"
        signal.alarm(0)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if after - before > MOST_BYTES >> 10:
            outcome = f"FAILED: {(after - before) >> 10} MB of memory were used"
            before = after
        print(outcome.replace("\n", " "), flush=True)


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "damaged.gguf"
    path.unlink(missing_ok=True)  # a mapping of the last one may still be there
    path.write_bytes(data)
    return path


def run_cases(first: int, n_cases: int, n_processes: int = 1) -> tuple[dict[str, int], list[str]]:
    """Runs cases in worker processes.

    Returns:
        How often each outcome came, and a description of every failure.
    """
    outcomes: dict[str, int] = {}
    failures: list[str] = []
    last = first + n_cases
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for i in range(n_processes):
            own = Path(folder) / str(i)
            own.mkdir()
            workers.append((own, _start(first + i, last, n_processes, own)))
        while workers:
            own, process = workers.pop()
            output, errors = process.communicate()
            lines = output.splitlines()
            for case, outcome in zip(lines[::2], lines[1::2], strict=False):
                outcomes[outcome.split(": ")[0] if "FAILED" in outcome else outcome] = outcomes.get(outcome, 0) + 1
                if "FAILED" in outcome:
                    failures.append(f"{case}: {outcome}\n{errors[-3000:]}")
            if process.returncode:
                died = f"{lines[-1] if lines else 'before the first case'}: the process ended with {process.returncode}"
                failures.append(f"{died}\n{errors[:6000]}")
                outcomes["DIED"] = outcomes.get("DIED", 0) + 1
                if lines and len(failures) < 50:
                    workers.append((own, _start(int(lines[-1].split()[1]) + n_processes, last, n_processes, own)))
    return outcomes, failures


def _start(first: int, last: int, step: int, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "tests.fuzz_gguf"]
    command += ["--worker", *map(str, (first, last, step, folder))]
    # For a core with AddressSanitizer: freed memory is not kept for long, and an allocation beyond the bound ends the process.
    options = f"quarantine_size_mb=16:max_allocation_size_mb={MOST_BYTES >> 20}"
    environment = {**os.environ, "ASAN_OPTIONS": ":".join(filter(None, [os.environ.get("ASAN_OPTIONS"), options]))}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=Path(__file__).resolve().parent.parent,
        env=environment,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="write the first case here instead of running it")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        first, last, step, folder = args.worker
        _worker(int(first), int(last), int(step), Path(folder))
        return 0
    if args.keep:
        args.keep.write_bytes(damaged(args.first))
        return 0
    outcomes, failures = run_cases(args.first, args.cases, args.processes)
    for failure in failures:
        print(failure, file=sys.stderr)
    for outcome, count in sorted(outcomes.items(), key=lambda item: -item[1]):
        print(f"{count:6}  {outcome}")
    print(f"{args.cases} damaged files, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
