"""A slice of the damaged model files (`make fuzz` runs all of them, under sanitizers)."""

from __future__ import annotations

from tests.fuzz_gguf import run_cases


def test_damaged_files_are_refused_or_run() -> None:
    outcomes, failures = run_cases(first=0, n_cases=400)
    assert not failures, "\n".join(failures)
    assert sum(outcomes.values()) == 400
    assert outcomes["ran"] > 20 and outcomes["refused: GGUFError"] > 50
