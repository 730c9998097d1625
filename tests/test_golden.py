"""Both real models against the golden files: tokenizations, greedy texts and log-probabilities of an established engine, and
the perplexity of a text that every Debian system carries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pyllama.models import Model, SequenceInput, load
from tests.test_products import kernel_sets

DATA = Path(__file__).parent / "data"
MARGIN = 0.35  # nats between the reference's two best tokens, above which the same one must win here
MEAN_DIFFERENCE = 0.06  # of the best token's log-probability


def golden(name: str) -> dict:
    return json.loads((DATA / f"golden_{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def case(request: pytest.FixtureRequest):
    model = load(request.getfixturevalue(f"{request.param}_path"), n_ctx=256)
    yield model, golden(request.param)
    model.close()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def forced(model: Model, prompt: list[int], answer: list[int], *, step_by_step: bool) -> np.ndarray:
    """Log-probabilities before each token of ``answer``, float64 [len(answer), n_vocab]."""
    blocks = list(range(-(-(len(prompt) + len(answer)) // 32)))
    if not step_by_step:
        tokens = prompt + answer[:-1]
        return log_softmax(model.run([SequenceInput(tokens, 0, blocks, len(answer))]))
    rows = [log_softmax(model.run([SequenceInput(prompt, 0, blocks, 1)]))[0]]
    for i, token in enumerate(answer[:-1]):
        rows.append(log_softmax(model.run([SequenceInput([token], len(prompt) + i, blocks, 1)]))[0])
    return np.stack(rows)


def check_rows(rows: np.ndarray, tops: list[list[tuple[int, float]]], mean_difference: float = MEAN_DIFFERENCE) -> None:
    """The reference's best tokens win, but for near-ties, and are about as likely as there."""
    differences = []
    for row, ((best, best_logprob), (_, second_logprob), *_) in zip(rows, tops, strict=True):
        differences.append(abs(row[best] - best_logprob))
        if best_logprob - second_logprob > MARGIN:
            assert row.argmax() == best
    assert np.mean(differences) <= mean_difference


def test_tokenizations_are_the_reference_s(case) -> None:
    model, data = case
    for entry in data["tokenize"]:
        assert model.tokenizer.encode(entry["text"]) == entry["tokens"], entry["text"]
        assert model.tokenizer.encode(entry["text"], add_special=True) == entry["tokens_bos"], entry["text"]


@pytest.mark.parametrize("step_by_step", [True, False], ids=["step by step", "at once"])
def test_greedy_follows_the_reference(case, step_by_step: bool) -> None:
    """Along the reference's own tokens, so that one near-tie does not end the comparison."""
    model, data = case
    for entry in data["greedy"]:
        prompt = model.tokenizer.encode(entry["prompt"], add_special=True)
        assert len(prompt) == entry["n_prompt"]
        check_rows(forced(model, prompt, entry["tokens"], step_by_step=step_by_step), entry["top"])


@pytest.mark.parametrize("cpu", kernel_sets())
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_every_kernel_set_follows_the_reference(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str, cpu: str
) -> None:
    """The beginning of an answer, so that plain C takes a few seconds; step by step it gets what it gets at once."""
    monkeypatch.setenv("PYLLAMA_CPU", cpu)
    model = load(request.getfixturevalue(f"{name}_path"), n_ctx=64)
    entry = golden(name)["greedy"][0]
    prompt = model.tokenizer.encode(entry["prompt"], add_special=True)
    rows = forced(model, prompt, entry["tokens"][:12], step_by_step=False)
    check_rows(rows, entry["top"][:12], 2 * MEAN_DIFFERENCE)  # a dozen tokens differ more than two hundred
    np.testing.assert_allclose(forced(model, prompt, entry["tokens"][:4], step_by_step=True), rows[:4], atol=1e-3)
    model.close()


def test_text_of_the_greedy_tokens(case) -> None:
    model, data = case
    for entry in data["greedy"]:
        assert model.tokenizer.decode(entry["tokens"]) == entry["content"]
