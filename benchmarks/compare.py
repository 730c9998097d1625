"""pyllama and every installed peer on the same GGUF files, in turns.

    python benchmarks/compare.py -m model.gguf --work p512 n64 n64@7000 n64x8 --plot speed.png

Each turn of each engine is a process of its own, so that no engine's threads spin while another is measured. The figures are
medians over all turns. Limits are those of `pyllama.bench`, measured before and after each workload of each turn, since a shared
machine's speed changes meanwhile. Sampling is left out everywhere: each step evaluates a given token of each sequence and fetches
its logits.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a checkout needs no installation

from pyllama.bench import Costs, Machine, Workload, measure_machine  # noqa: E402
from pyllama.core import ThreadPool  # noqa: E402
from pyllama.gguf import GGUFFile  # noqa: E402

DEFAULT_WORK = ("p512", "n64")
_BATCH = 512
_MEASURING_SECONDS = 0.25


class Engine(Protocol):
    """A loaded model with room for some sequences."""

    n_vocab: int

    def evaluate(self, tokens: Sequence[int], n_past: int, n_sequences: int = 1) -> None:
        """Evaluates tokens at positions n_past .. of each of the first sequences, and has the logits of the last ones ready.
        What stood there is forgotten."""


class Pyllama:
    def __init__(self, path: str, positions: int, n_sequences: int, n_threads: int) -> None:
        from pyllama import models
        from pyllama.core import BLOCK_TOKENS

        self._block_tokens, self._n_blocks = BLOCK_TOKENS, -(-positions // BLOCK_TOKENS)
        self.model = models.load(
            path,
            n_ctx=n_sequences * self._n_blocks * BLOCK_TOKENS,
            n_threads=n_threads,
            n_batch=_BATCH,
            max_sequences=n_sequences,
        )
        self.n_vocab = self.model.hp.n_vocab

    def evaluate(self, tokens: Sequence[int], n_past: int, n_sequences: int = 1) -> None:
        from pyllama.models import SequenceInput

        for chunk, past, is_last in _chunks(tokens, n_past, n_sequences):
            used = -(-(past + len(chunk)) // self._block_tokens)
            firsts = [i * self._n_blocks for i in range(n_sequences)]
            self.model.run([SequenceInput(chunk, past, range(first, first + used), int(is_last)) for first in firsts])

    def costs(self) -> dict[str, Any]:
        return asdict(Costs.of(self.model))


class IkLlamaCpp:
    """ik_llama.cpp by its wheel ik-llama-cpp-python, one level below its `generate`, whose sampling loop is in Python."""

    def __init__(
        self, path: str, positions: int, n_sequences: int, n_threads: int, flash_attention: bool = False
    ) -> None:
        from ik_llama_cpp import _ctypes_api, _internals

        self._api = _ctypes_api
        self._model = _internals.IkModel(path)
        # (The wheel's own class leaves flash attention off on processors without AVX-VNNI.)
        self._context = _internals.IkContext(
            self._model,
            n_ctx=n_sequences * (-(-positions // 256) * 256 + 256),
            n_threads=n_threads,
            flash_attn=flash_attention,
            n_seq_max=n_sequences,
        )
        self.n_vocab = self._model.n_vocab
        self._forget = _ctypes_api._lib.llama_kv_cache_seq_rm  # the wheel does not declare it
        self._forget.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        self._forget.restype = ctypes.c_bool

    def evaluate(self, tokens: Sequence[int], n_past: int, n_sequences: int = 1) -> None:
        for i in range(n_sequences):
            self._forget(self._context.ctx, i, n_past, -1)
        for chunk, past, is_last in _chunks(tokens, n_past, n_sequences):
            batch = self._api.llama_batch_init(len(chunk) * n_sequences, 0, 1)
            _fill(batch, chunk, past, n_sequences, is_last)
            status = self._context.decode(batch)
            self._api.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
        for i in range(n_sequences):
            self._context.get_logits(len(chunk) * (i + 1) - 1)


class IkLlamaCppFlash(IkLlamaCpp):
    def __init__(self, path: str, positions: int, n_sequences: int, n_threads: int) -> None:
        super().__init__(path, positions, n_sequences, n_threads, flash_attention=True)


class LlamaCpp:
    """llama.cpp by llama-cpp-python's low-level API."""

    def __init__(self, path: str, positions: int, n_sequences: int, n_threads: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p())
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_sequences * (-(-positions // 256) * 256 + 256)
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = n_threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def evaluate(self, tokens: Sequence[int], n_past: int, n_sequences: int = 1) -> None:
        api = self._api
        for i in range(n_sequences):
            api.llama_memory_seq_rm(api.llama_get_memory(self._context), i, n_past, -1)
        for chunk, past, is_last in _chunks(tokens, n_past, n_sequences):
            batch = api.llama_batch_init(len(chunk) * n_sequences, 0, 1)
            _fill(batch, chunk, past, n_sequences, is_last)
            status = api.llama_decode(self._context, batch)
            api.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
        for i in range(n_sequences):
            api.llama_get_logits_ith(self._context, len(chunk) * (i + 1) - 1)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _SILENT(_level: int, _text: bytes, _data: object) -> None:
    """llama.cpp's log, which nobody reads here."""


def _chunks(tokens: Sequence[int], n_past: int, n_sequences: int) -> Iterable[tuple[list[int], int, bool]]:
    """(tokens, position of the first, is it the last chunk?), for runs of at most a batch."""
    size = _BATCH // n_sequences
    for i in range(0, len(tokens), size):
        yield list(tokens[i : i + size]), n_past + i, i + size >= len(tokens)


def _fill(batch: Any, tokens: Sequence[int], n_past: int, n_sequences: int, is_last: bool) -> None:
    """Puts the same tokens into each sequence of a llama_batch; each one's last gets logits if ``is_last``."""
    batch.n_tokens = len(tokens) * n_sequences
    for at in range(batch.n_tokens):
        sequence, i = divmod(at, len(tokens))
        batch.token[at], batch.pos[at] = tokens[i], n_past + i
        batch.n_seq_id[at] = 1
        batch.seq_id[at][0] = sequence
        batch.logits[at] = int(is_last and i == len(tokens) - 1)


ENGINES: dict[str, tuple[str, Callable[[str, int, int, int], Engine]]] = {
    "pyllama": ("pyllama", Pyllama),
    "ik_llama.cpp": ("ik_llama_cpp", IkLlamaCpp),
    "ik_llama.cpp-fa": ("ik_llama_cpp", IkLlamaCppFlash),
    "llama.cpp": ("llama_cpp", LlamaCpp),
}
"""Name → (module that has to be installed, class)."""


# ---- turns -----------------------------------------------------------------------------------------------------------


def turn(args: argparse.Namespace) -> None:
    """One turn of one engine on one model, in this process. Prints a line of JSON for each workload, with its rates and what the
    machine could do before and after, and one with what pyllama's steps cost at least: a peer that crashes loses only what comes
    after."""
    import numpy as np

    positions = max(work.depth + max(work.n_prompt, work.n_generate) for work in args.work)
    n_sequences = max(work.n_sequences for work in args.work)
    engine = ENGINES[args.turn][1](str(args.model[0]), positions, n_sequences, args.threads)
    tokens = np.random.default_rng(0).integers(0, engine.n_vocab, positions).tolist()
    pool = ThreadPool(args.threads)
    machines = [measure_machine(pool, args.threads, _MEASURING_SECONDS)]
    for work in args.work:
        rates = _rates(engine, work, tokens, args.repetitions)
        machines.append(measure_machine(pool, args.threads, _MEASURING_SECONDS))
        print(json.dumps({"rates": rates, "machines": [asdict(m) for m in machines[-2:]]}), flush=True)
    if isinstance(engine, Pyllama):
        print(json.dumps({"costs": engine.costs()}))


def _rates(engine: Engine, work: Workload, tokens: list[int], repetitions: int) -> list[float]:
    """Tokens a second in each repetition, after one that is not counted."""
    depth, rates = work.depth, []
    if depth:
        engine.evaluate(tokens[:depth], 0, work.n_sequences)
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        if work.n_prompt:
            engine.evaluate(tokens[depth : depth + work.n_prompt], depth)
        else:
            for i in range(depth, depth + work.n_generate):
                engine.evaluate(tokens[i : i + 1], i, work.n_sequences)
        rates.append(work.n_tokens / (time.perf_counter() - begin))
    return rates[1:]


def turn_in_a_process(args: argparse.Namespace, model: Path, engine: str) -> list[dict[str, Any]]:
    """The lines that the turn printed."""
    command = [sys.executable, __file__, "--turn", engine, "-m", model, "-t", args.threads]
    command += ["--repetitions", args.repetitions, "--work", *args.texts]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode and (engine == "pyllama" or not lines):
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(f"{engine} failed: {said[-1]}")
    return lines


def compare(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """All turns of all engines on one model."""
    engines = args.engines or [
        n for n, (module, _) in ENGINES.items() if n == "pyllama" or importlib.util.find_spec(module)
    ]
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in engines}
    for _ in range(args.turns):
        for name in engines:
            turns[name].append(turn_in_a_process(args, model, name))
    costs = Costs(**turns["pyllama"][0][-1]["costs"]) if "pyllama" in turns else None
    rows, machines = [], []
    for i, work in enumerate(args.work):
        for name in engines:
            lines = [t[i] for t in turns[name] if i < len(t) and "rates" in t[i]]
            if not lines:
                print(f"{name} crashed before the end of: {work}", file=sys.stderr)
                continue
            machines += [m for line in lines for m in line["machines"]]
            limits = [costs.limit(_average(line["machines"]), work, _BATCH) for line in lines] if costs else []
            rates = [rate for line in lines for rate in line["rates"]]
            fractions = [rate / limit for line, (limit, _) in zip(lines, limits) for rate in line["rates"]]
            rows.append(
                {
                    "work": str(work),
                    "engine": name,
                    "tokens_per_second": median(rates),
                    "min": min(rates),
                    "max": max(rates),
                    "limit": median(limit for limit, _ in limits) if limits else None,
                    "bound": limits[0][1] if limits else None,
                    "fraction": median(fractions) if fractions else None,
                }
            )
    for row in rows:
        ours = next((r for r in rows if (r["work"], r["engine"]) == (row["work"], "pyllama")), None)
        row["ratio"] = ours["tokens_per_second"] / row["tokens_per_second"] if ours else None
    return {"model": model.name, "machine": _summary(machines), "rows": rows}


def _average(measured: list[dict[str, Any]]) -> Machine:
    """What the machine could do while something ran: about what it did before and after."""
    rates = {name: sum(m[name] for m in measured) / len(measured) for name in ("read_gbps", "int8_gops")}
    return Machine(**{**measured[0], **rates})


def _summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine, with the least and the most of each rate."""
    ranges = {name: [f(m[name] for m in measured) for f in (min, max)] for name in ("read_gbps", "int8_gops")}
    return {**measured[0], **ranges}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def table(comparison: dict[str, Any]) -> str:
    machine = comparison["machine"]
    read, int8 = ("{:,.0f} to {:,.0f}".format(*machine[name]) for name in ("read_gbps", "int8_gops"))
    lines = [
        f"{comparison['model']}: {machine['cpu']}, {machine['n_threads']} threads, reads {read} GB/s, int8 {int8} Gop/s"
    ]
    lines.append(f"{'':36}{'engine':18}{'tokens/s':>10}{'min':>10} – {'max':<10}{'ours is':>8}{'of limit':>10}")
    for row in comparison["rows"]:
        ratio = f"{row['ratio']:.2f} x" if row["ratio"] and row["engine"] != "pyllama" else ""
        fraction = f"{100 * row['fraction']:.0f} %" if row["fraction"] else ""
        lines.append(
            f"{row['work']:36}{row['engine']:18}{row['tokens_per_second']:10,.1f}{row['min']:10,.1f} – {row['max']:<10,.1f}"
            f"{ratio:>8}{fraction:>10}"
        )
    return "\n".join(lines)


def plot(comparisons: list[dict[str, Any]], path: Path) -> None:
    """A picture: for each model and workload one bar for each engine, as a fraction of the machine's limit."""
    from matplotlib import pyplot

    engines = list(dict.fromkeys(row["engine"] for c in comparisons for row in c["rows"]))
    figure, panels = pyplot.subplots(
        len(comparisons), 1, squeeze=False, figsize=(9, 2.7 * len(comparisons) + 0.5), layout="constrained"
    )
    for panel, comparison in zip(panels[:, 0], comparisons):
        works = list(dict.fromkeys(row["work"] for row in comparison["rows"]))
        width = 0.8 / len(engines)
        for e, engine in enumerate(engines):
            for row in comparison["rows"]:
                if row["engine"] == engine:
                    at = works.index(row["work"]) + (e - (len(engines) - 1) / 2) * width
                    share = 100 * (row["fraction"] or 0)
                    panel.bar(at, share, 0.92 * width, color=f"C{e}", label=engine if row["work"] == works[0] else None)
                    rate = row["tokens_per_second"]
                    panel.text(at, share + 1, f"{rate:,.0f}", ha="center", va="bottom", fontsize=7)
        panel.set_title(comparison["model"], loc="left", fontsize=10)
        panel.set_xticks(range(len(works)), works, fontsize=8)
        panel.set_ylim(0, 115)
        panel.set_ylabel("% of the limit", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(fontsize=8, ncols=len(engines), frameon=False, loc="upper right")
    figure.suptitle("Share of the machine's limit (numbers: tokens per second)", fontsize=11)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-m", "--model", type=Path, nargs="+", required=True, help="GGUF files")
    parser.add_argument("-t", "--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument(
        "--work",
        nargs="+",
        default=DEFAULT_WORK,
        metavar="WORK",
        help="p512: a prompt of 512 tokens; n64: 64 generated; n64@7000: after 7,000 others; n64x8: in 8 sequences",
    )
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="(all that are installed)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="processes of each engine (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="in a process (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a picture too; needs matplotlib")
    parser.add_argument("--turn", choices=list(ENGINES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.texts = args.work
    try:
        args.work = [Workload.parse(text) for text in args.texts]
    except ValueError as error:
        parser.error(str(error))
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.turn:
        turn(args)
        return 0
    try:
        for model in args.model:
            GGUFFile.open(model).close()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        comparisons = [compare(args, model) for model in args.model]
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(comparisons, indent=2) if args.json else "\n\n".join(table(c) for c in comparisons))
    if args.plot:
        plot(comparisons, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
