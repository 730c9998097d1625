"""Shared fixtures: the real models, fetched once into the user's cache."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from pyllama import pull


def _real_model(variable: str, name: str) -> Path:
    """The model's file: what the environment variable names, else from the cache, else fetched."""
    if local := os.environ.get(variable):
        return Path(local)
    try:
        return pull.path_of(name)
    except pull.PullError as error:
        pytest.skip(f"{name} cannot be had: {error}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return _real_model("PYLLAMA_TEST_SMOLLM2", "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    return _real_model("PYLLAMA_TEST_GEMMA", "gemma-3-270m")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what this machine could not test, so that nobody takes a green run for a whole one."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    if not reasons:
        return
    terminalreporter.section("NOT TESTED ON THIS MACHINE", red=True, bold=True)
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5} tests: {reason.removeprefix('Skipped: ')}", red=True)
