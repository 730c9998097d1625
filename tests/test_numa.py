"""Memory on machines with several nodes."""

from __future__ import annotations

import ctypes
import platform
import sys
import threading

import pytest

from pyllama.core import CoreError, interleave_memory, memory_nodes
from pyllama.server import main
from tests.serving import ServerProcess
from tests.tiny_models import make_llama

INTERLEAVE = 3
_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}.get(platform.machine())


def policy_after(nodes: list[int]) -> int:
    """The memory policy of a thread that asked for this, and of threads that it starts."""
    seen: list[int | Exception] = []

    def look() -> None:
        mode = ctypes.c_int(-1)
        ctypes.CDLL(None).syscall(_GET_MEMPOLICY, ctypes.byref(mode), None, 0, None, 0)
        seen.append(mode.value)

    def ask() -> None:
        try:
            interleave_memory(nodes)
        except CoreError as error:
            seen.append(error)
            return
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    if isinstance(seen[0], Exception):
        raise seen[0]
    return seen[0]


@pytest.mark.skipif(sys.platform != "linux" or _GET_MEMPOLICY is None, reason="no memory policies here")
def test_memory_is_spread():
    nodes = memory_nodes()
    assert nodes == sorted(set(nodes)) and nodes
    try:
        mode = policy_after(nodes)
    except CoreError as error:
        if "not permitted" in str(error):
            pytest.skip("memory policies are forbidden here")
        raise
    assert mode == INTERLEAVE


@pytest.mark.parametrize("node", [-1, 1024, 2**31 - 1])
def test_nodes_out_of_range_are_refused(node):
    with pytest.raises(CoreError, match="out of range|kind of system"):
        interleave_memory([node])


def test_several_nodes_and_what_the_system_refuses(monkeypatch, caplog):
    spread: list[list[int]] = []
    monkeypatch.setattr(main, "memory_nodes", lambda: [0, 1])
    monkeypatch.setattr(main, "interleave_memory", spread.append)
    caplog.set_level("INFO", "pyllama.server")
    monkeypatch.setattr(main.log, "propagate", True)
    main._spread_memory()
    assert spread == [[0, 1]] and "spread over 2 nodes" in caplog.text

    def refuse(nodes: list[int]) -> None:
        raise CoreError("not today")

    monkeypatch.setattr(main, "interleave_memory", refuse)
    main._spread_memory()
    assert "--numa has no effect: not today" in caplog.text


@pytest.mark.skipif(len(memory_nodes()) > 1, reason="this machine has several nodes")
def test_one_node_is_said_to_be_one(tmp_path):
    make_llama(tmp_path / "tiny.gguf")
    with ServerProcess("-m", tmp_path / "tiny.gguf", "--numa") as server:
        assert sum("--numa has no effect: this machine has one memory node" in line for line in server.log) == 1
