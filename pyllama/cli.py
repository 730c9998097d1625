"""The command line: ``pyllama serve|complete|chat|tokenize|inspect|bench|perplexity|pull``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllama import __version__, pull

if TYPE_CHECKING:
    from pyllama.llama import Llama

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:  # the server has its own flags, the documented ones
        from pyllama.server.main import main as serve

        return serve(arguments[1:], prog="pyllama serve")
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone; nothing of what is still in the buffer can be sent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        print(f"pyllama: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyllama", description="Language models from GGUF files, on your own machine."
    )
    parser.add_argument("--version", action="version", version=f"pyllama {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("serve", help="answer HTTP requests (see `pyllama serve --help`)")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        found.set_defaults(run=run)
        return found

    p = command("complete", _complete, "continue a text")
    _add_model(p)
    _add_sampling(p, n_predict=128)
    p.add_argument("prompt", nargs="?", help="the text (default: the standard input)")

    p = command("chat", _chat, "talk with a model")
    _add_model(p, n_ctx=2048)
    _add_sampling(p, n_predict=-1)
    p.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")

    p = command("tokenize", _tokenize, "show the tokens of a text")
    _add_path(p)
    p.add_argument("--json", action="store_true", help="print a JSON array of numbers")
    p.add_argument("--no-special", action="store_true", help="no begin-of-text token; control tokens are plain text")
    p.add_argument("text", nargs="?", help="the text (default: the standard input)")

    p = command("inspect", _inspect, "show what a GGUF file holds")
    _add_path(p)
    p.add_argument("--json", action="store_true", help="print JSON")

    from pyllama import bench

    bench.add_arguments(command("bench", bench.run, "measure a model's speed beside the machine's limits"))

    p = command("perplexity", _perplexity, "measure how well a model predicts a text")
    _add_model(p)
    p.add_argument("-f", "--file", type=Path, required=True, help="the text, UTF-8")

    p = command("pull", _pull, "fetch a model, or list those that can be fetched")
    p.add_argument("name", nargs="?", help="one of the list")
    return parser


def _add_path(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "-m", "--model", type=Path, metavar="FILE", help="GGUF file (default: SmolLM2-135M-Instruct, fetched once)"
    )


def _add_model(p: argparse.ArgumentParser, n_ctx: int = 512) -> None:
    from pyllama.bench import add_kv_types

    _add_path(p)
    p.add_argument("-c", "--ctx-size", type=int, default=n_ctx, metavar="N", help="tokens of context (%(default)s)")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: one per core)")
    add_kv_types(p)


def _add_sampling(p: argparse.ArgumentParser, n_predict: int) -> None:
    p.add_argument("-n", "--n-predict", type=int, default=n_predict, metavar="N",
                   help="most tokens to generate, -1 for no limit (%(default)s)")  # fmt: skip
    p.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (%(default)s)"
    )
    p.add_argument("--top-k", type=int, default=40, metavar="K", help="(%(default)s)")
    p.add_argument("--top-p", type=float, default=0.95, metavar="P", help="(%(default)s)")
    p.add_argument("--min-p", type=float, default=0.05, metavar="P", help="(%(default)s)")
    p.add_argument("--repeat-penalty", type=float, default=1.1, metavar="X", help="(%(default)s)")
    p.add_argument("--seed", type=int, default=-1, help="of the random numbers; -1: a new one each time")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--grammar-file", type=Path, metavar="FILE", help="GBNF that the answer must follow")
    form.add_argument("-j", "--json-schema", metavar="JSON", help="JSON schema that the answer must satisfy")
    form.add_argument("--json-schema-file", type=Path, metavar="FILE", help="the same from a file")


def _path(args: argparse.Namespace) -> Path:
    return args.model or pull.path_of()


def _llama(args: argparse.Namespace) -> Llama:
    from pyllama.bench import kv_type_of
    from pyllama.llama import Llama

    type_k, type_v = kv_type_of(args)
    return Llama(
        _path(args), n_ctx=args.ctx_size, n_threads=args.threads, n_parallel=1, type_k=type_k, type_v=type_v
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_tokens": args.n_predict if args.n_predict >= 0 else None,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
        "seed": args.seed,
        "grammar": _grammar(args),
        "stream": True,
    }


def _grammar(args: argparse.Namespace) -> str | None:
    if args.grammar_file:
        return args.grammar_file.read_text(encoding="utf-8")
    schema = args.json_schema_file.read_text(encoding="utf-8") if args.json_schema_file else args.json_schema
    if schema is None:
        return None
    from pyllama.json_schema import to_gbnf

    try:
        return to_gbnf(json.loads(schema))
    except json.JSONDecodeError as error:
        raise ValueError(f"the schema is not JSON: {error}") from None


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _standard_input() -> str:
    """All of it, without the newline that ends its last line."""
    return sys.stdin.read().removesuffix("\n")


def _complete(args: argparse.Namespace) -> int:
    prompt = _standard_input() if args.prompt is None else args.prompt
    with _llama(args) as llm:
        _say(prompt)
        for chunk in llm.create_completion(prompt, **_options(args)):
            _say(chunk["choices"][0]["text"])
        _say("\n")
    return 0


def _chat(args: argparse.Namespace) -> int:
    """Turns of a conversation until the end of the input; an interrupt ends the running answer only."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    with _llama(args) as llm:
        for line in _lines():
            messages.append({"role": "user", "content": line})
            _forget_oldest(llm, messages)
            answer: list[str] = []
            try:
                for chunk in llm.create_chat_completion(messages, **_options(args)):
                    text = chunk["choices"][0]["delta"].get("content") or ""
                    answer.append(text)
                    _say(text)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
            _say("\n")
            messages.append({"role": "assistant", "content": "".join(answer)})
    return 0


def _forget_oldest(llm: Llama, messages: list[dict[str, str]]) -> None:
    """Drops the first turns of a conversation until at least a quarter of the context is left for the answer."""
    first = 1 if messages[0]["role"] == "system" else 0
    while len(messages) > first + 1 and len(llm.chat_tokens(messages)) > 0.75 * llm.n_ctx():
        del messages[first : first + 2]


def _lines() -> Iterator[str]:
    """What the user says, line by line, with a prompt and editing on a terminal; lines of nothing but spaces are left out."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines once this is there
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                _say("\n")
            return
        if line:
            yield line


def _tokenize(args: argparse.Namespace) -> int:
    from pyllama import tokenizer
    from pyllama.gguf import GGUFFile

    text = _standard_input() if args.text is None else args.text
    with GGUFFile.open(_path(args)) as gguf:
        t = tokenizer.from_gguf(gguf)
    tokens = t.encode(text, add_special=not args.no_special, parse_special=not args.no_special)
    if args.json:
        print(json.dumps(tokens))
        return 0
    for token in tokens:
        print(f"{token:7d}  {t.token_text(token)!r}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from pyllama.gguf import GGUFFile

    with GGUFFile.open(_path(args)) as gguf:
        metadata = {key: _shown(value) for key, value in gguf.metadata.items()}
        tensors = [(t.name, t.type_name, list(t.shape), t.n_bytes) for t in gguf.tensors.values()]
        version = gguf.version
    if args.json:
        rows = [dict(zip(("name", "type", "shape", "n_bytes"), row, strict=True)) for row in tensors]
        print(json.dumps({"version": version, "metadata": metadata, "tensors": rows}, ensure_ascii=False, indent=1))
        return 0
    print(f"GGUF version {version}, {len(metadata)} metadata keys, {len(tensors)} tensors")
    for key, value in metadata.items():
        text = json.dumps(value, ensure_ascii=False)
        print(f"  {key} = {text if len(text) <= 100 else text[:97] + '...'}")
    for name, kind, shape, n_bytes in tensors:
        print(f"  {name:40} {kind:6} {' x '.join(map(str, shape)):>16} {n_bytes:12,} bytes")
    return 0


def _shown(value: Any) -> Any:
    """A metadata value for people: of arrays, the length and the first elements."""
    if isinstance(value, str | int | float | bool):
        return value
    first = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v.item() for v in value[:5]]
    return {"n": len(value), "first": first}


def _perplexity(args: argparse.Namespace) -> int:
    from pyllama.bench import kv_type_of
    from pyllama.models import load
    from pyllama.perplexity import perplexity

    text = args.file.read_text(encoding="utf-8", errors="replace")
    model = load(_path(args), n_ctx=args.ctx_size, n_threads=args.threads, max_sequences=1, kv_type=kv_type_of(args))
    estimate = None
    for estimate in perplexity(model, text, args.ctx_size):
        print(f"[{estimate.n_windows}] {estimate.value:.4f}", end="  ", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    assert estimate is not None  # perplexity() refuses a text without a window
    print(f"perplexity {estimate.value:.4f} +/- {estimate.error:.4f} over {estimate.n_scored} tokens")
    return 0


def _pull(args: argparse.Namespace) -> int:
    if args.name is not None:
        print(pull.path_of(args.name))
        return 0
    for name, model in pull.KNOWN.items():
        kept = pull.cached_path(name)
        print(f"{name:24} {model.n_bytes / 1e6:6.0f} MB  {model.description}{f'  [{kept}]' if kept else ''}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
