"""The engine with a real model: streams side by side, long prompts beside them, shared prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyllama.engine import Done, Engine, Request
from pyllama.models import load
from pyllama.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True)
TEXT = "The old lighthouse keeper had counted ships for forty years, and he wrote down the name of every one of them. "


@pytest.fixture(scope="module")
def engine(smollm2_path: Path):
    model = load(smollm2_path, n_ctx=4096)
    with Engine(model, 4) as engine:
        yield engine
    model.close()


def request(engine: Engine, text: str, n_predict: int, **options) -> Request:
    prompt = tuple(engine.model.tokenizer.encode(text, add_special=True))
    return Request(prompt=prompt, n_predict=n_predict, sampling=GREEDY, **options)


def test_sixteen_streams_on_four_slots(engine: Engine) -> None:
    subjects = "bread glass rivers trains bees clocks maps salt ink bells kites ropes lamps wool stairs chess".split()
    requests = [request(engine, f"Here is how people made {subject} long ago:", 24) for subject in subjects]
    alone = [engine.submit(r).result()[0] for r in requests]
    together = [engine.submit(r) for r in requests]
    assert [stream.result()[0] for stream in together] == alone


def test_a_stream_goes_on_beside_a_long_prompt(engine: Engine) -> None:
    """In steps, not seconds, which a busy machine stretches: the prompt is read in many small chunks, and the stream gets a
    token with each."""
    stream = engine.submit(request(engine, "Once upon a time", 400, cache_prompt=False))
    for _ in range(50):
        stream.get()
    prompt = request(engine, TEXT * 61, 1, cache_prompt=False)
    assert len(prompt.prompt) > 1400
    long = engine.submit(prompt)
    n_beside = 0
    while engine.n_running + engine.n_waiting > 1:
        stream.get()
        n_beside += 1
    stream.cancel()
    assert long.result()[2].timings.prompt_n == len(prompt.prompt)
    assert n_beside >= 10


def test_a_shared_prefix_is_evaluated_once_in_any_slot(engine: Engine) -> None:
    prefix = TEXT * 8
    first = engine.submit(request(engine, prefix + "One day", 8, slot_id=0)).result()[2]
    fresh = engine.submit(request(engine, prefix + "At night", 16, slot_id=1, cache_prompt=False)).result()
    text, _, done = engine.submit(request(engine, prefix + "At night", 16, slot_id=2)).result()
    assert first.n_prompt > 150
    assert done.timings.prompt_n == 1  # the request before had the very same prompt
    _, _, other = engine.submit(request(engine, prefix + "In spring", 16, slot_id=3)).result()
    assert other.timings.prompt_n <= 4
    assert text == fresh[0]


def test_a_context_that_overflows_goes_on(smollm2_path: Path) -> None:
    model = load(smollm2_path, n_ctx=96)
    with Engine(model, 1) as engine:
        events = list(engine.submit(request(engine, "Once upon a time", 300, n_keep=4)))
        assert isinstance(events[-1], Done)
        assert events[-1].truncated
        assert events[-1].n_predicted == 300
        text = "".join(event.text for event in events[:-1])
        assert len(set(text.split())) > 20  # still words, not noise
    model.close()
