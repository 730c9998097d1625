"""The C core, seen from Python: cffi in ABI mode over ``pyllama_core.h``, the one source of truth for both sides.

This module finds and loads the shared library and turns its errors into exceptions. It knows nothing of models, files or
requests; pointers stop here and in ``graph.py``.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cffi
from cffi.recompiler import make_py_source

__all__ = [
    "BLOCK_TOKENS", "CoreError", "ThreadPool", "call", "cpu_name", "create", "failure", "ffi", "interleave_memory", "lib",
    "memory_nodes",
]  # fmt: skip


class CoreError(RuntimeError):
    """The core refused or failed; the message says why."""


def _candidates() -> list[tuple[Path, Path]]:
    """Pairs of (library, header), most wanted first."""
    name = {"darwin": "libpyllama_core.dylib", "win32": "pyllama_core.dll"}.get(sys.platform, "libpyllama_core.so")
    package = Path(__file__).resolve().parent
    source_header = package.parent / "c_core" / "include" / "pyllama_core.h"
    pairs = []
    if override := os.environ.get("PYLLAMA_CORE"):
        header = source_header if source_header.exists() else package / "_core" / "pyllama_core.h"
        return [(Path(override), header)]
    pairs.append((package / "_core" / name, package / "_core" / "pyllama_core.h"))
    pairs.append((package.parent / "build" / name, source_header))
    return pairs


def _declarations(header: Path) -> str:
    """The header without what a C preprocessor would eat, except integer constants."""
    text = header.read_text(encoding="utf-8")
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("#") or re.match(r"#define \w+ \d+$", line)]
    return "\n".join(lines)


def _parsed(declarations: str) -> Any:
    """An FFI that knows the declarations.

    It is made by way of the tables that cffi otherwise writes into modules: a plain ``cffi.FFI`` parses the name of every
    type where it is used first, for which it reads all declarations again, 2 ms each time.
    """
    parser, tables = cffi.FFI(), io.StringIO()
    parser.cdef(declarations)
    parser.set_source("pyllama_core", None)
    make_py_source(parser, "pyllama_core", tables)
    module: dict[str, Any] = {}
    exec(tables.getvalue(), module)
    return module["ffi"]


def _load() -> tuple[Any, Any]:
    candidates = _candidates()
    for library, header in candidates:
        if library.exists() and header.exists():
            ffi = _parsed(_declarations(header))
            return ffi, ffi.dlopen(str(library))
    looked = ", ".join(str(library) for library, _ in candidates)
    raise ImportError(f"the pyllama core library was not found (looked for {looked}); run `make setup` or `pip install .`")


ffi, lib = _load()

BLOCK_TOKENS: int = lib.PL_BLOCK_TOKENS
"""Tokens in one block of the key/value pool."""


def failure(error: Any) -> CoreError:
    """The exception for a ``pl_error *`` that the core has filled."""
    return CoreError(ffi.string(error.message).decode("utf-8", "replace"))


def call(function: Any, *args: Any) -> int:
    """Calls a core function whose last parameter is a ``pl_error *`` and whose result is negative on failure.

    Raises:
        CoreError: with the core's message.
    """
    error = ffi.new("pl_error *")
    result = function(*args, error)
    if result < 0:
        raise failure(error)
    return result


def create(function: Any, free: Any, *args: Any) -> Any:
    """Calls a ``_new`` function of the core; the object is freed with the Python handle.

    Raises:
        CoreError: with the core's message.
    """
    error = ffi.new("pl_error *")
    pointer = function(*args, error)
    if pointer == ffi.NULL:
        raise failure(error)
    return ffi.gc(pointer, free)


def cpu_name() -> str:
    """Name of the kernel set that the core uses: ``scalar``, ``avx2``, ``avx_vnni``, ``avx512``, ``avx512_bf16``, ``neon`` or
    ``neon_i8mm``. It is the best that this processor runs, or the one that the environment variable ``PYLLAMA_CPU`` names.

    Raises:
        CoreError: the variable names one that the processor does not run, or that does not exist.
    """
    error = ffi.new("pl_error *")
    name = lib.pl_cpu_name(error)
    if name == ffi.NULL:
        raise failure(error)
    return ffi.string(name).decode()


def memory_nodes() -> list[int]:
    """The machine's memory nodes (NUMA) by number; one where the system does not say."""
    try:
        text = Path("/sys/devices/system/node/online").read_text()
    except OSError:
        return [0]
    ranges = [part.split("-") for part in text.strip().split(",")]
    return [node for ends in ranges for node in range(int(ends[0]), int(ends[-1]) + 1)]


def interleave_memory(nodes: Sequence[int]) -> None:
    """Spreads what this thread, and threads that it starts from now on, allocate evenly over memory nodes, so that each
    thread has its share of near and far memory, and all memory channels work.

    Raises:
        CoreError: the system does not permit it.
    """
    call(lib.pl_interleave_memory, list(nodes), len(nodes))


class ThreadPool:
    """A persistent team of ``n_threads`` threads (the calling thread is one of them)."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.handle = create(lib.pl_pool_new, lib.pl_pool_free, n_threads)
