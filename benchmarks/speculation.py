"""What guessed tokens bring: the same texts without guesses, with lookup and with a draft model, in turns.

    python benchmarks/speculation.py -m model.gguf --model-draft smaller.gguf

Tokens per second are those of the answer, medians over the turns; a ratio is the median of the turns' ratios. Every text has to
be the same with and without guesses. `right` tells how many of the guessed tokens were.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout needs no installation

from pyllama import models  # noqa: E402
from pyllama.draft import DraftModel  # noqa: E402
from pyllama.engine import Done, Engine, Request  # noqa: E402
from pyllama.models import Model  # noqa: E402
from pyllama.sampling import SamplingParams  # noqa: E402

GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0}
N_CTX = 4096


@dataclass(frozen=True)
class Task:
    name: str
    prompt: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of sampling; the defaults are those of pyllama."""


def tasks() -> list[Task]:
    """From texts of which nearly everything has been there before to those of which nothing has."""
    code = inspect.getsource(bisect)
    rewritten = f"A file:\n```python\n{code}```\nThe same file once more:\n```python\n{code[: len(code) // 4]}"
    story = "Once upon a time there was a lighthouse keeper who"
    return [
        Task("code, once more", rewritten, GREEDY),
        Task("code, continued", inspect.getsource(heapq)[:4000], GREEDY),
        Task("a story, greedy", story, GREEDY),
        Task("a story", story),
        Task("temperature 1.8", story, {"temperature": 1.8}),
    ]


def answer(model: Model, task: Task, n_tokens: int, n_lookup: int, draft: DraftModel | None) -> tuple[str, Done]:
    """One answer of ``n_tokens`` and the one that ends the prompt; nothing is left of earlier ones."""
    tokens = tuple(model.tokenizer.encode(task.prompt, add_special=True))
    params = SamplingParams(seed=1, ignore_eos=True, **task.options)
    fresh = None if draft is None else DraftModel(draft.model, draft.most)
    with Engine(model, n_lookup=n_lookup, draft=fresh) as engine:
        text, _, done = engine.submit(Request(prompt=tokens, sampling=params, n_predict=n_tokens + 1)).result()
    return text, done


def measure(model: Model, task: Task, args: argparse.Namespace, draft: DraftModel | None) -> str:
    ways = {"without": (0, None), "lookup": (args.draft, None)}
    if draft is not None:
        ways["draft"] = (0, draft)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    texts, guesses = {}, {}
    for _ in range(args.turns + 1):  # the first one warms up
        for name, way in ways.items():
            texts[name], done = answer(model, task, args.tokens, *way)
            rates[name].append(1e3 * args.tokens / done.timings.predicted_ms)
            guesses[name] = f"{done.timings.draft_n_accepted} of {done.timings.draft_n}"
    if len(set(texts.values())) != 1:
        raise RuntimeError(f"{task.name}: the texts differ")
    line = f"{task.name:20}{median(rates['without'][1:]):9.0f}"
    for name in list(ways)[1:]:
        ratio = median(a / b for a, b in zip(rates[name][1:], rates["without"][1:]))
        line += f"{median(rates[name][1:]):12.0f}{ratio:7.2f}{guesses[name]:>14}"
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a smaller model of the same vocabulary")
    parser.add_argument("-t", "--threads", type=int, help="threads (default: one for each core)")
    parser.add_argument("-n", "--tokens", type=int, default=160, help="of each answer (%(default)s)")
    parser.add_argument("--draft", type=int, default=8, metavar="N", help="most tokens of a guess (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="(%(default)s)")
    args = parser.parse_args()
    try:
        model = models.load(args.model, n_ctx=N_CTX, n_threads=args.threads, max_sequences=1)
        draft = args.model_draft and DraftModel.load(args.model_draft, model, 1, args.draft)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{model.name}, {model.n_threads} threads; guesses of up to {args.draft} tokens")
    columns = ["lookup"] + (["draft"] if draft else [])
    print(f"{'tokens/s':20}{'without':>9}" + "".join(f"{name:>12}{'ratio':>7}{'right':>14}" for name in columns))
    for task in tasks():
        print(measure(model, task, args, draft), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
