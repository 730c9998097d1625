"""Guessed tokens change nothing but the number of steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyllama import grammar, kv_cache, models, scheduler, speculation
from pyllama.engine import Done, Engine, Request, Stream
from pyllama.models import Model
from pyllama.sampling import SamplingParams
from pyllama.speculation import LookupSpeculation
from tests.fake_model import FakeModel
from tests.tiny_models import make_gemma3, make_llama

TWO_LETTERS = ((97, 50.0), (98, 50.0))
"""With these biases, texts are of two letters: every run of a few has been there before, and half of all guesses are wrong."""


def result_of(stream: Stream) -> tuple[object, Done]:
    text, samples, done = stream.result()
    return (text, samples, done.reason, done.n_predicted, done.truncated, done.n_past, done.stopping_word), done


def random_requests(seed: int, n: int, n_vocab: int = 256) -> list[Request]:
    rng = random.Random(seed)
    requests = []
    for i in range(n):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8, 1.5]),
            repeat_penalty=rng.choice([1.0, 1.3]),
            seed=i,
            ignore_eos=rng.random() < 0.7,
            n_probs=rng.choice([0, 0, 3]),
            mirostat=rng.choice([0, 0, 0, 2]),
            logit_bias=rng.choice([TWO_LETTERS, TWO_LETTERS, ()]),
            grammar=rng.choice(["", "", "", 'root ::= ("ab" | "abba" | "b")*']),
        )
        prompt = tuple(rng.choices([97, 98], k=rng.choice([1, 4, 30, 90])))
        stop = rng.choice([(), (), ("ababab",), ("bbbb", "aaaab")])
        n_predict = rng.choice([1, 2, 7, 40, 120])
        requests.append(Request(prompt=prompt, sampling=params, n_predict=n_predict, stop=stop, n_keep=rng.choice([0, 5])))
    return requests


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_the_same_with_and_without(seed: int) -> None:
    """Whatever the options, contexts that are too small included."""
    requests = random_requests(seed, 16)
    options = {"n_ctx": [64, 96, 160, 512][seed % 4], "n_batch": [16, 64][seed % 2]}
    with Engine(FakeModel(**options), 1) as engine:
        alone = [result_of(engine.submit(request))[0] for request in requests]
    model = FakeModel(**options, max_sequences=4)
    with Engine(model, 4, n_lookup=6) as engine:
        together = [result_of(stream) for stream in [engine.submit(request) for request in requests]]
        engine._cache.check()
        assert engine._cache.n_available == model.n_blocks
    assert [told for told, _ in together] == alone
    assert sum(done.timings.draft_n for _, done in together) > sum(d.timings.draft_n_accepted for _, d in together) > 0


def test_repetition_takes_fewer_steps() -> None:
    params = SamplingParams(temperature=0.0, grammar='root ::= "abcdefgh "*', ignore_eos=True)
    steps = []
    for n_lookup in (0, 8):
        model = FakeModel(n_ctx=512)
        with Engine(model, n_lookup=n_lookup) as engine:
            text, _, done = engine.submit(Request(prompt=(97,), sampling=params, n_predict=200)).result()
        assert text == ("abcdefgh " * 23)[:200]
        steps.append(len(model.batches))
        assert done.timings.draft_n_accepted == 200 - steps[-1]
    assert steps[1] < steps[0] / 4


@pytest.mark.parametrize(("n_exact", "longest"), [(100, 65), (32, 32), (1, 1)])
def test_guesses_are_as_long_as_a_run_is_exact(n_exact: int, longest: int) -> None:
    """Up to what was asked for: 64."""
    params = SamplingParams(temperature=0.0, grammar='root ::= "abcdefgh "*', ignore_eos=True)
    model = FakeModel(n_ctx=1024, n_batch=100, n_exact=n_exact)
    with Engine(model, n_lookup=64) as engine:
        text = engine.submit(Request(prompt=(97,), sampling=params, n_predict=400)).result()[0]
    assert text == ("abcdefgh " * 45)[:400]
    assert max(sum(batch) for batch in model.batches) == longest


def test_guesses_need_room_in_the_batch() -> None:
    requests = random_requests(1, 6)
    with Engine(FakeModel(n_ctx=512, n_batch=5), 2, n_lookup=6) as engine:
        assert all(stream.result()[2].reason != "error" for stream in [engine.submit(request) for request in requests])


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request, tmp_path_factory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("speculation") / f"{request.param}.gguf"
    {"llama": make_llama, "gemma3": make_gemma3}[request.param](path, quant="Q8_0")
    return path


def same_with_lookup(path: str | Path, n_lookup: int, n_ctx: int, make_requests: Callable[[Model], list[Request]]) -> int:
    """Runs requests one by one, without and with lookup; they must end the same. Returns how many guesses were right."""
    results, n_right = [], 0
    for n in (0, n_lookup):
        model = models.load(path, n_ctx=n_ctx, n_threads=2)
        with Engine(model, n_lookup=n) as engine:
            ends = [result_of(engine.submit(request)) for request in make_requests(model)]
        model.close()
        results.append([told for told, _ in ends])
        n_right += sum(done.timings.draft_n_accepted for _, done in ends)
    assert results[0] == results[1]
    return n_right


def test_a_model_gives_the_same_tokens(path) -> None:
    """Greedy or seeded: every row of logits is the same to the last bit, however many come of one step."""

    def requests(model: Model) -> list[Request]:
        made, n_vocab = [], model.tokenizer.n_vocab
        for seed in range(12):
            prompt = tuple(random.Random(seed).choices(range(10, n_vocab), k=20)) * 2
            temperature = 0.0 if seed % 2 else 0.7
            params = SamplingParams(temperature=temperature, seed=seed, n_probs=2, ignore_eos=True, repeat_penalty=1.0)
            made.append(Request(prompt=prompt, sampling=params, n_predict=100))
        return made

    assert same_with_lookup(path, 7, 1024, requests) > 0


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_real_texts_go_on_the_same(request: pytest.FixtureRequest, name: str) -> None:
    """Greedy, after 600 to 1,400 tokens of sources: the same text, token for token, in fewer steps."""
    sources = [Path(module.__file__).read_text() for module in (grammar, kv_cache, scheduler, speculation)]
    params = SamplingParams(temperature=0.0, repeat_penalty=1.0, n_probs=1, ignore_eos=True)

    def requests(model: Model) -> list[Request]:
        prompts = [tuple(model.tokenizer.encode(text, add_special=True)) for text in sources]
        return [Request(prompt=p[:n], sampling=params, n_predict=80) for p, n in zip(prompts, (600, 900, 1200, 1400))]

    assert same_with_lookup(request.getfixturevalue(f"{name}_path"), 8, 2048, requests) > 40


# ---- guesses --------------------------------------------------------------------------------------------------------


def test_what_followed_the_longest_run_is_guessed() -> None:
    speculation = LookupSpeculation(8)
    speculation.pace.judge(2, 2)
    speculation.pace.judge(4, 4)
    assert speculation.guess([1, 2, 3, 4, 5, 9, 2, 3, 4], 8) == [5, 9, 2, 3, 4, 5, 9, 2]  # and so on
    assert speculation.guess([1, 2, 3, 4, 5, 9, 2, 3, 4, 7], 8) == []
    assert speculation.guess([1, 2, 3, 4, 5, 9, 2, 3, 4, 7, 0, 2, 3, 4], 2) == [7, 0]  # the last time counts
    assert speculation.guess([1, 2, 3, 4, 5, 9, 2, 3, 4, 7, 0, 2, 3, 4, 0, 1, 2, 3, 4], 8) == [5, 9, 2, 3, 4, 7, 0, 2]
    speculation.forget()
    assert speculation.guess([5, 6, 7, 5, 6, 7], 3) == [5, 6, 7]
    assert speculation.guess([5, 6, 7], 0) == []


def test_where_nothing_comes_again_there_is_no_haste() -> None:
    speculation, tokens, idle = LookupSpeculation(8), [1, 2, 3], []
    for token in range(100, 120):
        assert speculation.guess(tokens, 8) == []
        idle.append(speculation.is_idle)
        tokens.append(token)
    assert idle == [False] * 7 + [True] * 13
    assert speculation.guess([*tokens, 1, 2, 3], 8) == [100, 101]
    assert not speculation.is_idle


def test_wrong_guesses_are_made_ever_more_seldom() -> None:
    speculation, tokens = LookupSpeculation(8), [1, 2, 3] * 4
    n_guesses = n_tokens = 0
    for _ in range(1000):
        if guess := speculation.guess(tokens, 8):
            n_guesses += 1
            n_tokens += len(guess)
            speculation.pace.judge(len(guess), 0)
    assert 5 <= n_guesses <= 21
    assert n_tokens <= 2 * n_guesses


def test_right_guesses_grow() -> None:
    speculation, tokens, sizes = LookupSpeculation(8), [1, 2, 3] * 10, []
    for _ in range(4):
        guess = speculation.guess(tokens, 8)
        sizes.append(len(guess))
        speculation.pace.judge(len(guess), len(guess))
        tokens += guess
    assert sizes == [2, 4, 8, 8]
