"""How generation fares while other programs want the processor's cores.

    python benchmarks/contention.py -m model.gguf

Generates by itself and beside busy loops, one, half as many as there are cores, and as many, in turns; the figures are
medians. With a busy loop for each core a fair system leaves half of the processor: half the speed is the most that can be
reached.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a checkout needs no installation

from pyllama import models  # noqa: E402
from pyllama.core import BLOCK_TOKENS  # noqa: E402
from pyllama.models import Model, SequenceInput  # noqa: E402

_POSITIONS = 2 * BLOCK_TOKENS
_SETTLING_SECONDS = 0.2  # in which the system finds the busy loops a core


def seconds_of_steps(model: Model, seconds: float) -> list[float]:
    """How long each step took, of as many as fit into ``seconds``; each evaluates one token."""
    steps: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        position = len(steps) % _POSITIONS
        model.run([SequenceInput([1], position, range(position // BLOCK_TOKENS + 1), 1)])
        steps.append(time.perf_counter() - begin)
    return steps


def beside(model: Model, n_loops: int, seconds: float) -> list[float]:
    """:func:`seconds_of_steps` while ``n_loops`` other processes never pause."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_loops)]
    try:
        time.sleep(_SETTLING_SECONDS)
        return seconds_of_steps(model, seconds)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("-t", "--threads", type=int, help="threads (default: one for each core)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each turn (%(default)s)")
    args = parser.parse_args()
    try:
        model = models.load(args.model, n_ctx=_POSITIONS, n_threads=args.threads)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds_of_steps(model, 0.5)
    n_cores = os.cpu_count() or 1
    numbers = sorted({0, 1, n_cores // 2, n_cores})
    turns = [{n: beside(model, n, args.seconds) for n in numbers} for _ in range(args.turns)]
    alone = median(len(turn[0]) / sum(turn[0]) for turn in turns)
    print(f"{model.name}, {model.n_threads} threads")
    print(f"{'busy loops':>10}{'tokens/s':>10}{'of that alone':>15}{'step p50':>12}{'p95':>10}")
    for n in numbers:
        rate = median(len(turn[n]) / sum(turn[n]) for turn in turns)
        steps = sorted(step for turn in turns for step in turn[n])
        p50, p95 = (1e3 * steps[int(share * (len(steps) - 1))] for share in (0.5, 0.95))
        print(f"{n:10}{rate:10.1f}{100 * rate / alone:13.0f} %{p50:9.1f} ms{p95:7.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
