"""Several steps in one call of the core: the same tokens as step by step, whatever ends a text, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyllama import models, scheduler
from pyllama.core import CoreError, ffi
from pyllama.engine import _SHORT_BURST, Engine, Request
from pyllama.models import Model, SequenceInput
from pyllama.sampling import Sampler, SamplingParams
from tests.fake_model import N_VOCAB, FakeModel
from tests.tiny_models import make_gemma3, make_llama


@pytest.fixture(autouse=True)
def quick_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts are as long as may be, however slow the machine."""
    monkeypatch.setattr(scheduler, "BURST_SECONDS", 1000.0)


@pytest.fixture(params=["llama", "gemma3"], scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path: Path = tmp_path_factory.mktemp("bursts") / "tiny.gguf"
    {"llama": make_llama, "gemma3": make_gemma3}[request.param](path, quant="Q8_0")
    model = models.load(path, n_ctx=512, n_threads=2, max_sequences=8)
    yield model
    model.close()


def random_requests(seed: int, n: int, n_vocab: int) -> list[Request]:
    rng = random.Random(seed)
    options = [{}, {"temperature": 0.0}, {"mirostat": 2}, {"mirostat": 1}, {"top_k": 0}, {"top_k": 0, "min_p": 0.0}]
    options += [{"presence_penalty": 0.5, "repeat_last_n": 7}, {"logit_bias": ((5, 2.0), (9, -3.0))}, {"n_probs": 2}]
    requests = []
    for _ in range(n):
        params = SamplingParams(seed=rng.randrange(1000), ignore_eos=rng.random() < 0.3, **rng.choice(options))
        prompt = tuple(rng.choices(range(3, n_vocab), k=rng.randrange(1, 40)))
        stop = (chr(97 + rng.randrange(26)) * 2,) if rng.random() < 0.2 else ()
        requests.append(Request(prompt=prompt, sampling=params, n_predict=rng.choice([1, 2, 9, 40, 100]), stop=stop))
    return requests


def answers(model: Model | FakeModel, requests: list[Request], n_slots: int, n_lookup: int = 0) -> list[tuple]:
    with Engine(model, n_slots, n_lookup=n_lookup) as engine:
        results = [stream.result() for stream in engine.submit_all(requests)]
        engine._cache.check()
    return [(text, samples, done.reason, done.n_predicted, done.n_past, done.error) for text, samples, done in results]


def test_the_same_tokens_as_one_by_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = random_requests(1, 24, model.tokenizer.n_vocab)
    calls: list[int] = []
    generate = model.generate

    def counted(*args):
        tokens = generate(*args)
        calls.append(len(tokens) // len(args[0]))
        return tokens

    monkeypatch.setattr(model, "generate", counted)
    alone = [answers(model, [request], 1)[0] for request in requests]
    together = answers(model, requests, 6)
    assert max(calls) == scheduler._LONGEST_BURST
    calls.clear()
    assert answers(model, requests, 2, n_lookup=3) == together
    assert _SHORT_BURST in calls
    monkeypatch.setattr(scheduler, "_LONGEST_BURST", 1)
    n_calls = len(calls)
    assert [answers(model, [request], 1)[0] for request in requests] == alone
    assert len(calls) == n_calls
    assert together == alone


@pytest.mark.parametrize("n_ctx", [64, 96])
def test_in_little_room(n_ctx: int) -> None:
    """Few blocks, so that sequences wait for each other, are computed again and shift."""
    rng, greedy = random.Random(n_ctx), SamplingParams(temperature=0.0, repeat_penalty=1.0)
    requests = []
    for _ in range(12):
        prompt = tuple(rng.choices(range(97, 123), k=rng.randrange(1, 40)))
        requests.append(Request(prompt=prompt, sampling=greedy, n_predict=rng.choice([2, 9, 40, 100])))
    fake = FakeModel(n_ctx=n_ctx)
    for request, (_, samples, reason, *_) in zip(requests, answers(fake, requests, 4)):
        assert reason in ("eos", "limit")
        assert [sample.token for sample in samples] == fake.greedy(list(request.prompt), request.n_predict)


def test_a_failure_ends_all_requests_of_its_burst_and_no_more() -> None:
    greedy = SamplingParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True)
    requests = [Request(prompt=prompt, sampling=greedy, n_predict=40) for prompt in ((97, 98), (99, 100, 101))]
    fake = FakeModel(ascii_only=False)
    expected = [fake.greedy(list(request.prompt), 40, ignore_eos=True) for request in requests]
    fake.fail_on = expected[0][6]
    assert all(fake.fail_on not in (*request.prompt, *tokens[:6]) for request, tokens in zip(requests, expected))
    with Engine(fake, 2) as engine:
        for stream in engine.submit_all(requests):
            _, samples, done = stream.result()
            assert (done.reason, done.error) == ("error", "RuntimeError: the model failed")
            assert done.n_predicted == len(samples) < 6
        fake.fail_on = None
        for stream, tokens in zip(engine.submit_all(requests), expected):
            assert [sample.token for sample in stream.result()[1]] == tokens
        engine._cache.check()


def test_nothing_to_choose_from() -> None:
    params = SamplingParams(logit_bias=tuple((token, -np.inf) for token in range(N_VOCAB)))
    for n_predict in (1, 50):
        fake = FakeModel()
        ((_, samples, reason, _, _, error),) = answers(fake, [Request(prompt=(97,), sampling=params, n_predict=n_predict)], 1)
        assert (samples, reason, error) == ([], "error", "no token can be drawn: every logit is -inf or not a number")


def test_nothing_to_choose_from_in_the_core(model: Model) -> None:
    biases = tuple((token, -np.inf) for token in range(model.tokenizer.n_vocab))
    sampler = Sampler(SamplingParams(logit_bias=biases), model.tokenizer, (), 64)
    assert model.generate([SequenceInput([3], 0, [0], 1)], [sampler.core], [0.5] * 4, ()) == [-1]


def test_numbers_that_were_not_used_come_again() -> None:
    fake = FakeModel()
    drawn, expected = (Sampler(SamplingParams(seed=7), fake.tokenizer, (), 64) for _ in range(2))
    numbers = expected.take_randoms(12)
    taken = drawn.take_randoms(5)
    drawn.put_back(taken[2:])
    taken[2:] = drawn.take_randoms(4)
    drawn.put_back(taken[5:])
    taken[5:] = drawn.take_randoms(7)
    assert taken == numbers


def test_what_the_core_refuses(model: Model) -> None:
    sampler = Sampler(SamplingParams(), model.tokenizer, (), 64)
    two_tokens = SequenceInput([3, 4], 0, [0], 2)
    for inputs, randoms, words in (
        ([two_tokens], [0.5] * 3, "one new token"),
        ([SequenceInput([3], 0, [0], 0)], [0.5] * 3, "one new token"),
        ([SequenceInput([3], 0, [0], 1)], [], "one or more steps"),
        ([SequenceInput([3], 30, [0], 1)], [0.5] * 3, "do not fit into 1 blocks"),
    ):
        with pytest.raises(CoreError, match=words):
            model.generate(inputs, [sampler.core] * len(inputs), randoms, ())
    large = ffi.new("pl_sampling *", {"n_vocab": model.hp.n_vocab + 1})
    with pytest.raises(CoreError, match="a vocabulary of"):
        model.generate([SequenceInput([3], 0, [0], 1)], [large], [0.5], ())
