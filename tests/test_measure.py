"""The machine's limits: that they are measured, not what they are."""

from __future__ import annotations

import math

import pytest

from pyllama.core import CoreError, ThreadPool, call, ffi, lib


@pytest.fixture(params=["scalar", ""])
def kernels(request, monkeypatch):
    monkeypatch.setenv("PYLLAMA_CPU", request.param)


@pytest.mark.parametrize("n_threads", [0, 1, 2, 9])
def test_rates_are_positive(kernels, n_threads):
    pool = ThreadPool(2)
    rate = ffi.new("double *")
    call(lib.pl_measure_read_bandwidth, pool.handle, n_threads, 3 << 20, 0.0, rate)
    assert 0 < rate[0] < 1e5
    call(lib.pl_measure_int8_rate, pool.handle, n_threads, 0.0, rate)
    assert 0 < rate[0] < 1e6
    call(lib.pl_measure_int8_rate, ffi.NULL, n_threads, 0.0, rate)
    assert rate[0] > 0


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, 1e9])
def test_impossible_times_are_refused(seconds):
    rate = ffi.new("double *")
    with pytest.raises(CoreError, match="seconds"):
        call(lib.pl_measure_read_bandwidth, ffi.NULL, 0, 1 << 20, seconds, rate)
    with pytest.raises(CoreError, match="seconds"):
        call(lib.pl_measure_int8_rate, ffi.NULL, 0, seconds, rate)


@pytest.mark.parametrize("size", [0, -1, (1 << 20) - 1, 1 << 60])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(CoreError, match="bytes"):
        call(lib.pl_measure_read_bandwidth, ffi.NULL, 0, size, 0.0, ffi.new("double *"))
