"""Shared fixtures: the real models, fetched once into the user's cache."""

from __future__ import annotations

import os
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
