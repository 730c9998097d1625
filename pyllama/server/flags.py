"""The server's flags: one table, from which the command line, its help and the environment variables are read."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllama import __version__
from pyllama.models import KV_TYPES

__all__ = ["FLAGS", "Flag", "Settings", "parse"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the flags say."""

    threads: int | None
    threads_batch: int | None
    model: Path | None
    """None: the default model, fetched when it is missing."""
    alias: str | None
    ctx_size: int
    """0: what the model was trained with."""
    batch_size: int
    n_predict: int
    """For requests that do not say; -1: without end."""
    memory_f32: bool
    cache_type_k: str | None
    """This and the next one: None for what ``memory_f32`` says."""
    cache_type_v: str | None
    mlock: bool
    no_mmap: bool
    numa: str | None
    rope_scaling: str | None
    """This and the next ones: None for what the model's file says."""
    rope_freq_base: float | None
    rope_freq_scale: float | None
    yarn_ext_factor: float | None
    yarn_attn_factor: float | None
    yarn_beta_fast: float | None
    yarn_beta_slow: float | None
    yarn_orig_ctx: int | None
    seed: int
    parallel: int
    cont_batching: bool
    embedding: bool
    system_prompt_file: Path | None
    chat_template: str | None
    timeout: float
    host: str
    port: int
    path: Path | None
    api_key: tuple[str, ...]
    api_key_file: tuple[str, ...]
    queue: int
    """Requests that may wait for a slot."""
    lookup: bool
    model_draft: Path | None
    draft_max: int
    log_format: str
    verbose: bool
    n_gpu_layers: int | None
    main_gpu: int | None
    tensor_split: str | None
    lora: Path | None
    lora_base: Path | None
    mmproj: Path | None

    @property
    def kv_type(self) -> tuple[str, str]:
        """What keys and values are kept as."""
        default = "f32" if self.memory_f32 else "f16"
        return self.cache_type_k or default, self.cache_type_v or default

    @property
    def without_effect(self) -> list[str]:
        """One line for each flag that was given and has nothing to act on yet."""
        return [
            f"{flag.names[-1]} has no effect: {flag.missing}"
            for flag in FLAGS
            if flag.missing and getattr(self, flag.field) is not flag.default
        ]


@dataclass(frozen=True)
class Flag:
    """A row of the table."""

    names: tuple[str, ...]
    """The long form comes last."""
    env: str
    """Environment variable for where the flag is not given."""
    help: str
    default: Any = None
    type: Callable[[str], Any] = str
    """``bool``: a switch, which takes no value."""
    metavar: str = "N"
    without_value: Any = None
    """What the flag means when no value follows; None: one has to."""
    missing: str = ""
    """Why the flag has no effect."""

    @property
    def field(self) -> str:
        """Its name in :class:`Settings`."""
        return self.names[-1].lstrip("-").replace("-", "_")


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return integer


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and 1 <= value <= 1e7):
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 10000000")
    return value


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    return path


def _choice(*choices: str) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not possible, but {' or '.join(choices)}")
        return text

    return choice


def _number(low: float, default: float) -> Callable[[str], float | None]:
    """A number from ``low`` on; ``default`` stands for what holds without the flag."""

    def number(text: str) -> float | None:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if value == default:
            return None
        if not low <= value <= 1e30:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} on")
        return value

    return number


def _tokens_or_none(text: str) -> int | None:
    return _integer(0)(text) or None


def _keys(text: str) -> tuple[str, ...]:
    return tuple(key for key in (part.strip() for part in text.split(",")) if key)


def _key_file(text: str) -> tuple[str, ...]:
    try:
        lines = Path(text).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise argparse.ArgumentTypeError(f"{text!r} has no keys in it")
    return keys


_NO_GPU = "pyllama was built without a GPU back end"

FLAGS = (
    Flag(
        ("-t", "--threads"),
        "LLAMA_ARG_THREADS",
        "threads for generation (default: one per core)",
        None,
        _integer(1, 1024),
    ),
    Flag(
        ("-tb", "--threads-batch"),
        "LLAMA_ARG_THREADS_BATCH",
        "threads for prompts (default: as --threads)",
        None,
        _integer(1, 1024),
    ),
    Flag(
        ("-m", "--model"),
        "LLAMA_ARG_MODEL",
        "GGUF file (default: SmolLM2-135M-Instruct, fetched once)",
        None,
        Path,
        "FNAME",
    ),
    Flag(("-a", "--alias"), "LLAMA_ARG_ALIAS", "the model's name in answers (default: its path)", None, str, "ALIAS"),
    Flag(("-c", "--ctx-size"), "LLAMA_ARG_CTX_SIZE", "tokens of context; 0: the model's own", 512, _integer(0)),
    Flag(("-b", "--batch-size"), "LLAMA_ARG_BATCH", "most tokens evaluated at once", 512, _integer(1)),
    Flag(("-n", "--n-predict"), "LLAMA_ARG_N_PREDICT", "tokens to predict; -1: without end", -1, _integer(-1)),
    Flag(("--memory-f32",), "LLAMA_ARG_MEMORY_F32", "keys and values in 32 bits instead of 16", False, bool),
    Flag(
        ("-ctk", "--cache-type-k"),
        "LLAMA_ARG_CACHE_TYPE_K",
        f"type that keys are kept as: {', '.join(KV_TYPES)} (default: f16)",
        None,
        _choice(*KV_TYPES),
        "TYPE",
    ),
    Flag(
        ("-ctv", "--cache-type-v"),
        "LLAMA_ARG_CACHE_TYPE_V",
        f"type that values are kept as: {', '.join(KV_TYPES)} (default: f16)",
        None,
        _choice(*KV_TYPES),
        "TYPE",
    ),
    Flag(("--mlock",), "LLAMA_ARG_MLOCK", "keep the model from being swapped out", False, bool),
    Flag(
        ("--no-mmap",),
        "LLAMA_ARG_NO_MMAP",
        "read the model's metadata instead of mapping them (weights are always read)",
        False,
        bool,
    ),
    Flag(
        ("--numa",),
        "LLAMA_ARG_NUMA",
        "spread memory evenly over the nodes of a NUMA machine",
        None,
        _choice("distribute"),
        "distribute",
        without_value="distribute",
    ),
    Flag(
        ("--rope-scaling",),
        "LLAMA_ARG_ROPE_SCALING_TYPE",
        "how rotary positions are stretched: none, linear or yarn (default: as the model's file says)",
        None,
        _choice("none", "linear", "yarn"),
        "KIND",
    ),
    Flag(
        ("--rope-freq-base",),
        "LLAMA_ARG_ROPE_FREQ_BASE",
        "base of rotary positions (default: the file's)",
        None,
        _number(0, 0),
    ),
    Flag(
        ("--rope-freq-scale",),
        "LLAMA_ARG_ROPE_FREQ_SCALE",
        "factor on rotary frequencies: 1/N stretches the context N times (default: the file's)",
        None,
        _number(0, 0),
    ),
    Flag(
        ("--yarn-orig-ctx",),
        "LLAMA_ARG_YARN_ORIG_CTX",
        "YaRN: tokens of context before stretching (default: the file's)",
        None,
        _tokens_or_none,
    ),
    Flag(
        ("--yarn-ext-factor",),
        "LLAMA_ARG_YARN_EXT_FACTOR",
        "YaRN: its share beside linear scaling, 0 to 1 (default: 1 with YaRN)",
        None,
        _number(0, -1),
    ),
    Flag(
        ("--yarn-attn-factor",),
        "LLAMA_ARG_YARN_ATTN_FACTOR",
        "YaRN: factor on magnitudes (default: 1)",
        None,
        _number(0, -1),
    ),
    Flag(
        ("--yarn-beta-slow",),
        "LLAMA_ARG_YARN_BETA_SLOW",
        "YaRN: turns below which columns are scaled linearly (default: 1)",
        None,
        _number(0, -1),
    ),
    Flag(
        ("--yarn-beta-fast",),
        "LLAMA_ARG_YARN_BETA_FAST",
        "YaRN: turns above which columns are left alone (default: 32)",
        None,
        _number(0, -1),
    ),
    Flag(("-s", "--seed"), "LLAMA_ARG_SEED", "for requests that give none; -1: random", -1, _integer(-1, 2**32 - 1)),
    Flag(("-np", "--parallel"), "LLAMA_ARG_N_PARALLEL", "slots: requests answered at once", 1, _integer(1, 256)),
    Flag(
        ("-cb", "--cont-batching"),
        "LLAMA_ARG_CONT_BATCHING",
        "start a request while others run, instead of after them",
        False,
        bool,
    ),
    Flag(("--embeddings", "--embedding"), "LLAMA_ARG_EMBEDDINGS", "enable the embedding endpoints", False, bool),
    Flag(
        ("-spf", "--system-prompt-file"),
        "LLAMA_ARG_SYSTEM_PROMPT_FILE",
        "JSON file with the system prompt of all slots",
        None,
        Path,
        "FNAME",
    ),
    Flag(
        ("--chat-template",),
        "LLAMA_ARG_CHAT_TEMPLATE",
        "Jinja2 source of a chat template, or 'chatml' (default: the model's own)",
        None,
        str,
        "TEMPLATE",
    ),
    Flag(("-to", "--timeout"), "LLAMA_ARG_TIMEOUT", "seconds without reading or writing", 600, _seconds),
    Flag(("--host",), "LLAMA_ARG_HOST", "address to listen on", "127.0.0.1", str, "HOST"),
    Flag(("--port",), "LLAMA_ARG_PORT", "port to listen on", 8080, _integer(0, 65535), "PORT"),
    Flag(
        ("--path",),
        "LLAMA_ARG_STATIC_PATH",
        "directory of pages that come before the built-in ones",
        None,
        _directory,
        "DIR",
    ),
    Flag(
        ("--api-key",),
        "LLAMA_API_KEY",
        "key that POST requests must bring, or several with commas between",
        (),
        _keys,
        "KEY",
    ),
    Flag(("--api-key-file",), "LLAMA_API_KEY_FILE", "file with more keys, one on a line", (), _key_file, "FNAME"),
    Flag(
        ("--queue",),
        "LLAMA_ARG_QUEUE",
        "requests that may wait for a slot; more are answered 429",
        64,
        _integer(0, 1024),
    ),
    Flag(
        ("--lookup",),
        "LLAMA_ARG_LOOKUP",
        "guess tokens from what followed the same ones before, and check several in a step",
        False,
        bool,
    ),
    Flag(
        ("-md", "--model-draft"),
        "LLAMA_ARG_MODEL_DRAFT",
        "smaller model of the same vocabulary that guesses tokens, several of which are checked in a step",
        None,
        Path,
        "FNAME",
    ),
    Flag(
        ("--draft", "--draft-max"),
        "LLAMA_ARG_DRAFT_MAX",
        "most tokens of a guess; no more than 31 with a quantized -ctv",
        8,
        _integer(1, 64),
    ),
    Flag(("--log-format",), "LLAMA_ARG_LOG_FORMAT", "text or json", "text", _choice("text", "json"), "FORMAT"),
    Flag(("-v", "--verbose"), "LLAMA_ARG_VERBOSE", "log more", False, bool),
    Flag(
        ("-ngl", "--n-gpu-layers"), "LLAMA_ARG_N_GPU_LAYERS", "layers on the GPU", None, _integer(-1), missing=_NO_GPU
    ),
    Flag(("-mg", "--main-gpu"), "LLAMA_ARG_MAIN_GPU", "GPU for small tensors", None, _integer(0), missing=_NO_GPU),
    Flag(
        ("-ts", "--tensor-split"),
        "LLAMA_ARG_TENSOR_SPLIT",
        "shares of several GPUs",
        None,
        str,
        "SPLIT",
        missing=_NO_GPU,
    ),
    Flag(("--lora",), "LLAMA_ARG_LORA", "LoRA adapter", None, Path, "FNAME", missing="adapters are not built yet"),
    Flag(("--lora-base",), "LLAMA_ARG_LORA_BASE", "base of the adapter", None, Path, "FNAME", missing="see --lora"),
    Flag(
        ("--mmproj",),
        "LLAMA_ARG_MMPROJ",
        "projector for images",
        None,
        Path,
        "FILE",
        missing="images are not built yet",
    ),
)


def parse(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ, prog: str = "server.py"
) -> Settings:
    """Settings from the command line; where a flag is not given, from its environment variable; else its default.

    Prints a message and raises ``SystemExit`` when something is wrong, or for ``--help`` and ``--version``.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serves a language model from a GGUF file over HTTP.",
        epilog="Every flag can also be given as an environment variable: " + ", ".join(f.env for f in FLAGS) + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pyllama {__version__}")
    for flag in FLAGS:
        default = _from_environment(parser, flag, environ)
        shown = "" if flag.default in (None, ()) or flag.type is bool else f" (default: {flag.default})"
        text = (flag.help + shown).replace("%", "%%")
        if flag.type is bool:
            parser.add_argument(*flag.names, dest=flag.field, action="store_true", default=default, help=text)
        else:
            how = {"type": flag.type, "default": default, "metavar": flag.metavar, "help": text}
            if flag.without_value is not None:
                how |= {"nargs": "?", "const": flag.without_value}
            parser.add_argument(*flag.names, dest=flag.field, **how)
    return Settings(**vars(parser.parse_args(argv)))


def _from_environment(parser: argparse.ArgumentParser, flag: Flag, environ: Mapping[str, str]) -> Any:
    text = environ.get(flag.env, "")
    if not text:
        return flag.default
    if flag.type is bool:
        if text.lower() in ("1", "true", "on", "yes"):
            return True
        if text.lower() in ("0", "false", "off", "no"):
            return False
        parser.error(f"{flag.env}: {text!r} is neither true nor false")
    try:
        return flag.type(text)
    except argparse.ArgumentTypeError as error:
        parser.error(f"{flag.env}: {error}")
