"""pyllama and every installed peer on the same GGUF file, in turns: `python benchmarks/compare.py -m model.gguf`.

Each turn of each engine is a process of its own, so that no engine's threads spin while another is measured. The figures are
medians over all turns; limits are those of `benchmarks/bench.py`, measured in pyllama's turns. Sampling is left out
everywhere: each step evaluates a given token and fetches its logits.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a checkout needs no installation


class Engine(Protocol):
    """A loaded model with one sequence."""

    n_vocab: int

    def evaluate(self, tokens: Sequence[int], n_past: int) -> None:
        """Evaluates tokens at positions n_past .. and has the last one's logits ready. What stood there is forgotten."""


class Pyllama:
    def __init__(self, path: str, n_ctx: int, n_threads: int) -> None:
        from pyllama import models

        self.model = models.load(path, n_ctx=n_ctx, n_threads=n_threads)
        self.n_vocab = self.model.hp.n_vocab

    def evaluate(self, tokens: Sequence[int], n_past: int) -> None:
        from pyllama.core import BLOCK_TOKENS
        from pyllama.models import SequenceInput

        for i in range(0, len(tokens), self.model.n_batch):
            chunk = tokens[i : i + self.model.n_batch]
            blocks = range(-(-(n_past + i + len(chunk)) // BLOCK_TOKENS))
            self.model.run([SequenceInput(chunk, n_past + i, blocks, int(i + len(chunk) == len(tokens)))])

    def limits(self, work: dict[str, Any]) -> tuple[float, str]:
        from pyllama.bench import Costs, Workload, measure_machine

        machine = measure_machine(self.model.pool, self.model.n_threads, seconds=0.5)
        return Costs.of(self.model).limit(machine, Workload(**work), self.model.n_batch)


class IkLlamaCpp:
    """ik_llama.cpp by its wheel ik-llama-cpp-python, one level below its `generate`, whose sampling loop is in Python."""

    def __init__(self, path: str, n_ctx: int, n_threads: int, flash_attention: bool = False) -> None:
        from ik_llama_cpp import _ctypes_api, _internals

        self._api, self._internals = _ctypes_api, _internals
        self._model = _internals.IkModel(path)
        # (The wheel's own class leaves flash attention off on processors without AVX-VNNI.)
        self._context = _internals.IkContext(self._model, n_ctx=n_ctx, n_threads=n_threads, flash_attn=flash_attention)
        self.n_vocab = self._model.n_vocab
        self._forget = _ctypes_api._lib.llama_kv_cache_seq_rm  # the wheel does not declare it
        self._forget.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        self._forget.restype = ctypes.c_bool

    def evaluate(self, tokens: Sequence[int], n_past: int) -> None:
        self._forget(self._context.ctx, 0, n_past, -1)
        for i in range(0, len(tokens), 512):
            chunk = list(tokens[i : i + 512])
            batch = self._internals.make_batch_range(chunk, pos_start=n_past + i, logits_last=i + 512 >= len(tokens))
            status = self._context.decode(batch)
            self._api.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
        self._context.get_logits(-1)


class IkLlamaCppFlash(IkLlamaCpp):
    def __init__(self, path: str, n_ctx: int, n_threads: int) -> None:
        super().__init__(path, n_ctx, n_threads, flash_attention=True)


class LlamaCpp:
    """llama.cpp by llama-cpp-python."""

    def __init__(self, path: str, n_ctx: int, n_threads: int) -> None:
        import llama_cpp

        self._llama = llama_cpp.Llama(
            path, n_ctx=n_ctx, n_batch=512, n_threads=n_threads, n_threads_batch=n_threads, verbose=False
        )
        self.n_vocab = self._llama.n_vocab()

    def evaluate(self, tokens: Sequence[int], n_past: int) -> None:
        self._llama.n_tokens = n_past
        self._llama.eval(tokens)


ENGINES: dict[str, tuple[str, Callable[[str, int, int], Engine]]] = {
    "pyllama": ("pyllama", Pyllama),
    "ik_llama.cpp": ("ik_llama_cpp", IkLlamaCpp),
    "ik_llama.cpp-fa": ("ik_llama_cpp", IkLlamaCppFlash),
    "llama.cpp": ("llama_cpp", LlamaCpp),
}
"""Name → (module that has to be installed, class)."""


def workloads(args: argparse.Namespace) -> list[dict[str, int]]:
    prompt = [{"n_prompt": args.n_prompt, "depth": args.depth}] if args.n_prompt else []
    return prompt + ([{"n_generate": args.n_gen, "depth": args.depth}] if args.n_gen else [])


def turn(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One turn of one engine, in this process: for each workload its rates and, from pyllama, its limit."""
    import numpy as np

    depth, positions = args.depth, args.depth + max(args.n_prompt, args.n_gen)
    engine = ENGINES[args.turn][1](str(args.model), -(-positions // 256) * 256 + 256, args.threads)
    tokens = np.random.default_rng(0).integers(0, engine.n_vocab, positions).tolist()
    if depth:
        engine.evaluate(tokens[:depth], 0)
    results = []
    for work in workloads(args):
        n = work.get("n_prompt", 0) or work["n_generate"]
        rates = []
        for _ in range(args.repetitions + 1):
            begin = time.perf_counter()
            if "n_prompt" in work:
                engine.evaluate(tokens[depth : depth + n], depth)
            else:
                for i in range(depth, depth + n):
                    engine.evaluate(tokens[i : i + 1], i)
            rates.append(n / (time.perf_counter() - begin))
        limit, bound = engine.limits(work) if isinstance(engine, Pyllama) else (None, None)
        results.append({"work": work, "rates": rates[1:], "limit": limit, "bound": bound})  # the first one warms up
    return results


def turn_in_a_process(args: argparse.Namespace, engine: str) -> list[dict[str, Any]]:
    options = {"-m": args.model, "-t": args.threads, "-p": args.n_prompt, "-n": args.n_gen, "-d": args.depth}
    command = [sys.executable, __file__, "--turn", engine, "--repetitions", str(args.repetitions)]
    command += [str(part) for pair in options.items() for part in pair]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{engine} failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All turns of all engines; one entry for each workload and engine."""
    engines = args.engines or [
        n for n, (module, _) in ENGINES.items() if n == "pyllama" or importlib.util.find_spec(module)
    ]
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in engines}
    for _ in range(args.turns):
        for name in engines:
            turns[name].append(turn_in_a_process(args, name))
    rows = []
    for i, work in enumerate(workloads(args)):
        rates = {name: [rate for t in turns[name] for rate in t[i]["rates"]] for name in engines}
        ours = turns.get("pyllama", [])
        limit = max((t[i]["limit"] for t in ours), default=None)
        for name in engines:
            rows.append(
                {
                    "work": work,
                    "engine": name,
                    "tokens_per_second": median(rates[name]),
                    "min": min(rates[name]),
                    "max": max(rates[name]),
                    "ratio": median(rates["pyllama"]) / median(rates[name]) if ours else None,
                    "limit": limit,
                    "fraction": median(rates[name]) / limit if limit else None,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':28}{'engine':18}{'tokens/s':>10}{'min':>10} – {'max':<10}{'ours is':>8}{'of limit':>10}"]
    for row in rows:
        work = row["work"]
        what = f"prompt {work['n_prompt']}" if "n_prompt" in work else f"generate {work['n_generate']}"
        what += f" at depth {work['depth']}" if work["depth"] else ""
        ratio = f"{row['ratio']:.2f} x" if row["ratio"] and row["engine"] != "pyllama" else ""
        fraction = f"{100 * row['fraction']:.0f} %" if row["fraction"] else ""
        lines.append(
            f"{what:28}{row['engine']:18}{row['tokens_per_second']:10,.1f}{row['min']:10,.1f} – {row['max']:<10,.1f}"
            f"{ratio:>8}{fraction:>10}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("-t", "--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument(
        "-p", "--n-prompt", type=int, default=512, metavar="N", help="tokens of the prompt (%(default)s)"
    )
    parser.add_argument("-n", "--n-gen", type=int, default=64, metavar="N", help="tokens to generate (%(default)s)")
    parser.add_argument("-d", "--depth", type=int, default=0, metavar="N", help="tokens that come before (%(default)s)")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="(all that are installed)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="processes of each engine (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="in a process (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--turn", choices=list(ENGINES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(turn(args)))
        return 0
    try:
        rows = compare(args)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
