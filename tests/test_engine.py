"""The engine over a fake model: equality with one-by-one, sharing, preemption, shifts, stop strings, cancellation, errors."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from pyllama.engine import Done, Engine, EngineClosed, Request, Stream
from pyllama.sampling import SamplingParams
from tests.fake_model import FakeModel

GREEDY = SamplingParams(temperature=0.0, repeat_penalty=1.0)


def request(prompt: list[int], n_predict: int = 20, **options) -> Request:
    options.setdefault("sampling", GREEDY)
    return Request(prompt=tuple(prompt), n_predict=n_predict, **options)


def tokens_of(stream: Stream) -> tuple[list[int], Done]:
    _, samples, done = stream.result()
    return [sample.token for sample in samples], done


def prompt_of(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97, 123), k=n)


@pytest.fixture
def engine():
    with Engine(FakeModel(), n_slots=4) as engine:
        yield engine
        assert engine._cache.n_available == engine.model.n_blocks
        engine._cache.check()


def test_one_request(engine: Engine) -> None:
    prompt = prompt_of(10)
    tokens, done = tokens_of(engine.submit(request(prompt)))
    assert tokens == engine.model.greedy(prompt, 20)
    assert done.n_prompt == 10
    assert done.n_predicted == len(tokens)
    assert done.timings.prompt_n == 10
    assert done.reason == ("limit" if len(tokens) == 20 else "eos")
    assert not done.truncated


def test_many_at_once_give_the_same_as_one_by_one(engine: Engine) -> None:
    prompts = [prompt_of(1 + 5 * i % 40, i) for i in range(16)]
    streams = [engine.submit(request(prompt)) for prompt in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        assert tokens_of(stream)[0] == engine.model.greedy(prompt, 20)


def test_what_comes_at_the_same_moment_begins_together(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr("pyllama.engine._TOGETHER_SECONDS", 5.0)  # however slow the machine
    began = time.monotonic()
    streams = []
    for n in (3, 4, 5, 6):
        streams.append(engine.submit(request(prompt_of(n), 2)))
        time.sleep(0.01)
    for stream in streams:
        tokens_of(stream)
    assert engine.model.batches[0] == [3, 4, 5, 6]
    assert time.monotonic() - began < 5  # as many as there are slots wait for nobody


@pytest.mark.parametrize("quick", [True, False])
def test_quick_steps_are_told_of_together(engine: Engine, monkeypatch, quick: bool) -> None:
    monkeypatch.setattr("pyllama.engine._TOGETHER_SECONDS", 0.3)  # so that it is listened to before it begins
    monkeypatch.setattr("pyllama.engine.BURST_SECONDS", 1000.0 if quick else 0.0)
    step_by_step = SamplingParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True, n_probs=1)
    stream = engine.submit(request(prompt_of(5), 9, sampling=step_by_step))
    n_told: list[int] = []
    stream.listener = lambda: n_told.append(stream._events.qsize())
    stream.wait()
    # The first token never waits, nor does the end, with which the last one comes.
    assert n_told == ([1, 10] if quick else [*range(1, 9), 10])


def test_the_first_text_never_waits(engine: Engine, monkeypatch) -> None:
    """Though it comes with the second token only, which completes a character."""
    monkeypatch.setattr("pyllama.engine._TOGETHER_SECONDS", 0.3)  # as above
    monkeypatch.setattr("pyllama.engine.BURST_SECONDS", 1000.0)
    stream = engine.submit(request(prompt_of(5), 5, sampling=SamplingParams(grammar='root ::= "\u00e9" [a-z]*', ignore_eos=True)))
    n_told: list[int] = []
    stream.listener = lambda: n_told.append(stream._events.qsize())
    stream.wait()
    assert n_told == [1, 5]


def test_a_shared_prefix_is_evaluated_once(engine: Engine) -> None:
    start = prompt_of(70)
    tokens_of(engine.submit(request(start, 1)))
    prompt = start[:67] + prompt_of(5, 9)
    tokens, done = tokens_of(engine.submit(request(prompt)))
    assert done.timings.prompt_n == 5
    assert done.n_reused == 67
    assert tokens == engine.model.greedy(prompt, 20)
    _, done = tokens_of(engine.submit(request(prompt, 1)))
    assert done.timings.prompt_n == 1
    tokens, done = tokens_of(engine.submit(request(prompt, cache_prompt=False)))
    assert done.timings.prompt_n == 72
    assert tokens == engine.model.greedy(prompt, 20)


def test_an_answer_is_a_prefix_too(engine: Engine) -> None:
    prompt = prompt_of(40)
    tokens, _ = tokens_of(engine.submit(request(prompt)))
    _, done = tokens_of(engine.submit(request(prompt + tokens + prompt_of(3, 5), 1)))
    assert done.timings.prompt_n == 4  # the last token of the answer was never evaluated


def test_a_pool_too_small_for_all_preempts_and_loses_nothing() -> None:
    model = FakeModel(n_ctx=96, n_batch=32)
    with Engine(model, n_slots=4) as engine:
        prompts = [prompt_of(20 + i, i) for i in range(8)]
        streams = [engine.submit(request(prompt, 40)) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            assert tokens_of(stream)[0] == model.greedy(prompt, 40)
        engine._cache.check()


@pytest.mark.parametrize("seed", range(12))
def test_random_mixes_on_a_tiny_pool(seed: int) -> None:
    """Whatever meets in a pool that is too small, each request gets what it would get alone."""
    rng = random.Random(seed)
    model = FakeModel(n_ctx=rng.choice([64, 96, 160, 256]), n_batch=rng.choice([8, 32, 64]))
    with Engine(model, n_slots=rng.choice([1, 3, 4]), continuous=rng.random() < 0.8) as engine:
        stems = [prompt_of(rng.randrange(1, 60), i) for i in range(3)]
        system = stems[0][:40] if rng.random() < 0.5 else [0]
        engine.set_system_prompt(system)
        jobs = []
        for i in range(20):
            prompt = rng.choice(stems)[: rng.randrange(1, 60)] + prompt_of(rng.choice([1, 5, 10, 150]), 100 + i)
            keep = -1 if prompt[: len(system)] == system else rng.choice([0, 20, -1])
            n = rng.choice([0, 1, 5, 25, 100])
            params = SamplingParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=rng.random() < 0.5)
            options = {"cache_prompt": rng.random() < 0.8, "slot_id": rng.choice([-1, -1, -1, 0]), "sampling": params}
            job = request(prompt, n, n_keep=keep, **options)
            stream = engine.submit(job)
            if rng.random() < 0.15:
                stream.cancel()
            jobs.append((job, stream))
            if rng.random() < 0.3:
                time.sleep(0.002)
        for job, stream in jobs:
            tokens, done = tokens_of(stream)
            expected = model.greedy(job.prompt, job.n_predict, n_keep=job.n_keep, ignore_eos=job.sampling.ignore_eos)
            if stream.cancelled:
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected
                assert done.reason in ("eos", "limit")
        engine._cache.check()
        assert engine._cache.n_available == model.n_blocks


def test_a_full_context_is_shifted() -> None:
    model = FakeModel(n_ctx=64)
    with Engine(model, n_slots=1) as engine:
        prompt = prompt_of(20)
        ignore = SamplingParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True)
        tokens, done = tokens_of(engine.submit(request(prompt, 500, n_keep=10, sampling=ignore)))
        assert len(tokens) == 500
        assert done.truncated
        history, generated = list(prompt), []
        while len(generated) < 500:
            if len(history) > 64:  # 64 evaluated: 27 of the 54 after the kept ones go
                del history[10:37]
            logits = model._logits(history)
            logits[299] = -1e9
            generated.append(int(logits.argmax()))
            history.append(generated[-1])
        assert tokens == generated
        engine._cache.check()
        again, _ = tokens_of(engine.submit(request(prompt, 5, sampling=ignore)))
        assert again == generated[:5]


def test_a_shift_beside_others_that_share_its_blocks() -> None:
    model = FakeModel(n_ctx=192, n_batch=64)
    ignore = SamplingParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True)
    with Engine(model, n_slots=2) as engine:
        prompt = prompt_of(70)
        long = engine.submit(request(prompt, 400, n_keep=5, sampling=ignore))
        for i in range(10):
            other = prompt[:66] + prompt_of(4, i)
            assert tokens_of(engine.submit(request(other, 10)))[0] == model.greedy(other, 10)
        tokens, done = tokens_of(long)
        assert len(tokens) == 400
        assert done.truncated
        engine._cache.check()


def test_a_prompt_longer_than_the_context_keeps_its_ends() -> None:
    model = FakeModel(n_ctx=64)
    with Engine(model, n_slots=1) as engine:
        prompt = prompt_of(300)
        tokens, done = tokens_of(engine.submit(request(prompt, 3, n_keep=8)))
        assert done.truncated
        assert done.n_prompt == 300
        assert done.timings.prompt_n < 64
        kept = prompt[:8] + prompt[300 - (done.timings.prompt_n - 8) :]
        assert tokens == model.greedy(kept, 3)


def test_no_prediction_evaluates_the_prompt(engine: Engine) -> None:
    prompt = prompt_of(40)
    tokens, done = tokens_of(engine.submit(request(prompt, 0)))
    assert tokens == []
    assert done.reason == "limit"
    _, done = tokens_of(engine.submit(request(prompt, 1)))
    assert done.timings.prompt_n == 1


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_stop_strings(engine: Engine, length: int) -> None:
    prompt = prompt_of(12, length)
    text, _, _ = engine.submit(request(prompt, 40)).result()
    word = text[5 : 5 + length]
    expected = text[: text.find(word)]
    stream = engine.submit(request(prompt, 40, stop=(word, "never in it")))
    pieces = [event.text for event in stream if not isinstance(event, Done)]
    assert "".join(pieces) == expected
    _, _, done = engine.submit(request(prompt, 40, stop=(word,))).result()
    assert (done.reason, done.stopping_word) == ("word", word)


def test_text_held_for_a_stop_string_comes_in_the_end(engine: Engine) -> None:
    prompt = prompt_of(12)
    text, _, _ = engine.submit(request(prompt, 15)).result()
    for n in range(1, 6):
        held, samples, done = engine.submit(request(prompt, 15, stop=(text[-n:] + "!",))).result()
        assert held == text
        assert len(samples) == done.n_predicted


def test_characters_are_never_split() -> None:
    model = FakeModel(ascii_only=False)
    with Engine(model, n_slots=1) as engine:
        for seed in range(5):
            prompt = prompt_of(5, seed)
            tokens = model.greedy(prompt, 60)
            expected = b"".join(model.tokenizer.token_bytes(token) for token in tokens).decode("utf-8", "replace")
            text, samples, _ = engine.submit(request(prompt, 60)).result()
            assert text == expected
            assert [sample.token for sample in samples] == tokens


def test_a_long_prompt_does_not_freeze_a_stream() -> None:
    """How long steps may get is the scheduler's test; this clock is a busy machine's."""
    model = FakeModel(n_ctx=2048, n_batch=512)
    model.seconds_per_token = 0.0005
    with Engine(model, n_slots=2) as engine:
        ignore = SamplingParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True)
        stream = engine.submit(request(prompt_of(3), 400, sampling=ignore))
        for _ in range(20):
            stream.get()
        long = engine.submit(request(prompt_of(1500, 2), 1))
        tokens_of(long)
        chunks = [batch for batch in model.batches if sum(batch) > 16]
        assert len(chunks) > 6
        assert all(batch[0] == 1 and sum(batch) < 256 for batch in chunks)
        stream.cancel()


def test_without_continuous_batching_a_prompt_waits() -> None:
    model = FakeModel()
    with Engine(model, n_slots=4, continuous=False) as engine:
        first = engine.submit(request(prompt_of(5), 30))
        first.get()
        streams = [engine.submit(request(prompt_of(5, i), 10)) for i in (1, 2, 3)]
        for i, stream in zip((1, 2, 3), streams, strict=True):
            assert tokens_of(stream)[0] == model.greedy(prompt_of(5, i), 10)
        lengths = [len(batch) for batch in model.batches]
        assert lengths[:25] == [1] * 25
        assert 3 in lengths


def test_slots(engine: Engine) -> None:
    streams = [engine.submit(request(prompt_of(5, i), 5, slot_id=2)) for i in range(3)]
    assert [tokens_of(stream)[1].slot_id for stream in streams] == [2, 2, 2]
    with pytest.raises(ValueError, match="slot 4 does not exist"):
        engine.submit(request([97], slot_id=4))


def test_cancelling_frees_the_slot(engine: Engine) -> None:
    engine.model.seconds_per_token = 0.001
    ignore = SamplingParams(temperature=0.0, ignore_eos=True)
    streams = [engine.submit(request(prompt_of(5, i), -1, sampling=ignore)) for i in range(6)]
    for stream in streams[:4]:
        stream.get()
    for stream in streams:
        stream.cancel()
    for stream in streams:
        assert tokens_of(stream)[1].reason == "cancelled"
    assert engine.n_running == engine.n_waiting == 0


def test_a_failing_step_ends_its_requests_only(engine: Engine) -> None:
    engine.model.fail_on = 200
    _, done = tokens_of(engine.submit(request([97, 200, 98])))
    assert done.reason == "error"
    assert "the model failed" in done.error
    assert tokens_of(engine.submit(request(prompt_of(5))))[0] == engine.model.greedy(prompt_of(5), 20)


def test_a_fault_in_the_books_ends_what_runs_and_no_more(engine: Engine, monkeypatch, caplog) -> None:
    prompt = prompt_of(40)
    tokens_of(engine.submit(request(prompt, 5)))

    def broken(*_: object) -> None:
        raise RuntimeError("no copy")

    monkeypatch.setattr(engine._cache, "_copy", broken)
    ends = [tokens_of(engine.submit(request(prompt[:35] + [97 + i], 500, n_keep=9)))[1] for i in range(2)]
    assert [done.reason for done in ends] == ["error", "limit"]  # a new pool knows nothing that could be copied
    assert ends[0].error == "RuntimeError: no copy"
    assert "no copy" in caplog.text


def test_a_grammar_that_nothing_fits_ends_its_request_only(engine: Engine) -> None:
    other = engine.submit(request(prompt_of(5), 30))
    params = SamplingParams(temperature=0.0, grammar='root ::= "\u00e9"', logit_bias=((0xC3, -float("inf")),))
    _, done = tokens_of(engine.submit(request(prompt_of(6), 5, sampling=params)))
    assert done.reason == "error"
    assert "grammar" in done.error
    assert tokens_of(other)[0] == engine.model.greedy(prompt_of(5), 30)


def test_a_complete_grammar_ends_its_request_at_once(engine: Engine, monkeypatch) -> None:
    steps = []
    run = engine.model.run
    monkeypatch.setattr(engine.model, "run", lambda *args, **options: steps.append(1) or run(*args, **options))
    params = SamplingParams(temperature=0.0, grammar='root ::= "abc" [0-9]')
    for n_predict in (100, 4):  # also where the limit is reached with the last token
        steps.clear()
        text, samples, done = engine.submit(request(prompt_of(6), n_predict, sampling=params)).result()
        assert (len(text), text[:3], done.reason) == (4, "abc", "eos")
        assert len(samples) == done.n_predicted == len(steps) == 4
    params = SamplingParams(temperature=0.0, grammar='root ::= "abc" [0-9]*', ignore_eos=True)  # may go on
    tokens, done = tokens_of(engine.submit(request(prompt_of(6), 7, sampling=params)))
    assert (len(tokens), done.reason) == (7, "limit")


def test_a_stream_that_nobody_reads_ends(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr("pyllama.engine._MOST_UNREAD", 50)
    monkeypatch.setattr("pyllama.engine.BURST_SECONDS", 0.0)
    stream = engine.submit(request(prompt_of(5), -1, sampling=SamplingParams(ignore_eos=True)))
    while engine.n_running + engine.n_waiting:
        time.sleep(0.01)
    _, done = tokens_of(stream)
    assert (done.reason, done.error) == ("error", "nobody reads this stream")
    assert 50 <= done.n_predicted <= 52


def test_a_system_prompt_is_evaluated_once_and_spared(engine: Engine) -> None:
    system = prompt_of(45, 7)
    assert engine.set_system_prompt(system).result()[2].timings.prompt_n == 45
    ignore = SamplingParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True)
    tokens_of(engine.submit(request(prompt_of(100, 8), 300, sampling=ignore)))  # goes through the whole pool
    streams = [engine.submit(request(system + prompt_of(5, i), 10)) for i in range(4)]
    for i, stream in enumerate(streams):
        tokens, done = tokens_of(stream)
        assert tokens == engine.model.greedy(system + prompt_of(5, i), 10)
        assert done.timings.prompt_n == 5
    tokens, done = tokens_of(engine.submit(request(system + prompt_of(5), 300, n_keep=2, sampling=ignore)))
    assert done.truncated
    assert tokens == engine.model.greedy(system + prompt_of(5), 300, n_keep=47, ignore_eos=True)
    assert engine.set_system_prompt(()) is None
    assert tokens_of(engine.submit(request(system, 3)))[0] == engine.model.greedy(system, 3)
    assert engine._cache.pinned == ()
    with pytest.raises(ValueError, match="the system prompt has 125 tokens, the context 128"):
        engine.set_system_prompt([97] * 125)


def test_the_token_that_begins_a_text_is_spared() -> None:
    model = FakeModel(n_ctx=64)
    model.tokenizer.add_bos, model.tokenizer.bos_id = True, 1
    with Engine(model) as engine:
        for prompt, spared in (([1, *prompt_of(20)], 4), (prompt_of(20), 3)):
            tokens, _ = tokens_of(engine.submit(request(prompt, 100, n_keep=3)))
            assert tokens == model.greedy(prompt, 100, n_keep=spared)


def test_threads_that_submit_read_and_cancel(engine: Engine) -> None:
    wrong = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(6):
            prompt = prompt_of(rng.randrange(1, 40), rng.randrange(5))
            stream = engine.submit(request(prompt, 30))
            expected, tokens = engine.model.greedy(prompt, 30), []
            stop_after = rng.choice([3, 99])
            for event in stream:
                if isinstance(event, Done):
                    if (event.reason == "cancelled") != stream.cancelled and len(tokens) < 30:
                        wrong.append((seed, i, event))
                    break
                tokens += event.tokens
                if len(tokens) >= stop_after:
                    stream.cancel()
            if tokens != expected[: len(tokens)]:
                wrong.append((seed, i, tokens, expected))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.n_running == engine.n_waiting == 0


def test_bad_requests_are_refused(engine: Engine) -> None:
    for prompt, message in (([], "empty"), ([300], "not in the vocabulary"), ([-1], "not in the vocabulary")):
        with pytest.raises(ValueError, match=message):
            engine.submit(request(prompt))
    with pytest.raises(ValueError, match="grammar"):
        engine.submit(request([97], sampling=SamplingParams(grammar="root ::= (")))


def test_embeddings(engine: Engine) -> None:
    prompt = prompt_of(100)
    generating = engine.submit(request(prompt_of(5), 20))
    _, _, done = engine.submit(request(prompt, embedding=True)).result()
    assert done.embedding.tolist() == engine.model._logits(prompt)[:4].tolist()
    assert tokens_of(generating)[0] == engine.model.greedy(prompt_of(5), 20)


def test_closing_ends_everything() -> None:
    model = FakeModel()
    model.seconds_per_token = 0.001
    engine = Engine(model, n_slots=1)
    streams = [engine.submit(request(prompt_of(5), -1, sampling=SamplingParams(ignore_eos=True))) for _ in range(3)]
    streams[0].get()
    engine.close()
    assert all(tokens_of(stream)[1].reason == "cancelled" for stream in streams)
    with pytest.raises(EngineClosed):
        engine.submit(request([97]))
    assert not any(thread.name == "pyllama-engine" for thread in threading.enumerate())


def scored(engine: Engine, prompt: list[int], n_predict: int = 2) -> Stream:
    sampling = SamplingParams(temperature=0.0, repeat_penalty=1.0, n_probs=2)
    return engine.submit(request(prompt, n_predict, sampling=sampling, score_prompt=True))


def assert_scores(model: FakeModel, stream: Stream, prompt: list[int]) -> None:
    assert [sample.token for sample in stream.prompt_samples] == prompt
    assert stream.prompt_samples[0].logprob is None
    for i, sample in enumerate(stream.prompt_samples[1:], 1):
        logits = model._logits(prompt[:i]).astype(float)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert sample.logprob == pytest.approx(logprobs[sample.token], abs=1e-5)
        assert [token for token, _ in sample.top_logprobs] == np.argsort(-logits)[:2].tolist()


@pytest.mark.parametrize("n_batch", [5, 64])
def test_how_likely_a_prompt_was(n_batch: int) -> None:
    """In parts as they come, and again although it was seen before; more than the pool holds at a time."""
    with Engine(FakeModel(n_batch=n_batch), n_slots=4) as engine:
        prompts = [prompt_of(n, n) for n in (1, 2, 33, 70, 90, 100)] + [prompt_of(90, 90)]
        plain = engine.submit(request(prompts[3]))
        streams = [scored(engine, prompt, n_predict=i % 3) for i, prompt in enumerate(prompts)]
        for i, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            assert tokens_of(stream)[0] == engine.model.greedy(prompt, i % 3)
            assert_scores(engine.model, stream, prompt)
        assert tokens_of(plain)[0] == engine.model.greedy(prompts[3], 20)
        assert plain.prompt_samples == ()
        engine.model.fail_on = 10
        assert tokens_of(scored(engine, [97, 10, 98]))[1].reason == "error"
        assert engine._cache.n_available == engine.model.n_blocks
        engine._cache.check()
        with pytest.raises(ValueError, match="needs n_probs"):
            engine.submit(request(prompts[0], score_prompt=True))
        with pytest.raises(ValueError, match="more than its 128 tokens"):
            scored(engine, prompt_of(128))
