"""A draft model changes nothing but the number of steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pyllama import models, scheduler
from pyllama.core import BLOCK_TOKENS
from pyllama.draft import Ask, DraftModel
from pyllama.engine import Done, Engine, Request
from pyllama.models import SequenceInput
from pyllama.sampling import SamplingParams
from tests.fake_model import FakeModel
from tests.test_speculation import random_requests as random_options
from tests.test_speculation import result_of
from tests.tiny_models import make_gemma3, make_llama

MOST = 6
N_SLOTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("draft")
    make_llama(folder / "target.gguf")
    make_llama(folder / "random.gguf", n_layer=1, seed=5)
    make_llama(folder / "wide.gguf", n_head=2, n_head_kv=1, n_ctx=1024)
    make_gemma3(folder / "gemma.gguf")
    make_llama(folder / "other.gguf", specials=["<|other|>"])
    return folder


def load_target(folder: Path, *, n_ctx: int = 512, n_batch: int = 512, n_slots: int = 1) -> models.Model:
    return models.load(
        folder / "target.gguf", n_ctx=n_ctx, n_batch=n_batch, max_sequences=n_slots, n_threads=1
    )


def answers(
    folder: Path, requests: list[Request], draft_name: str | None, *, n_slots: int = 1, n_lookup: int = 0, **options: int
) -> tuple[list[object], list[Done]]:
    """What the requests give, all at a time if there are several slots."""
    target = load_target(folder, n_slots=n_slots, **options)
    draft = None if draft_name is None else DraftModel.load(folder / draft_name, target, n_slots, MOST)
    with Engine(target, n_slots, draft=draft, n_lookup=n_lookup) as engine:
        if n_slots == 1:
            ends = [engine.submit(request).result() for request in requests]
        else:
            ends = [stream.result() for stream in [engine.submit(request) for request in requests]]
        engine._cache.check()
    assert all(done.reason != "error" for _, _, done in ends)
    return [(text, [sample.token for sample in samples], done.reason) for text, samples, done in ends], [
        done for _, _, done in ends
    ]


def random_requests(n: int, n_predict: int = 60, temperatures: tuple[float, ...] = (0.0, 0.8)) -> list[Request]:
    """Prompts of which some begin alike."""
    rng = random.Random(n)
    beginning = tuple(rng.choices(range(10, 250), k=40))
    return [
        Request(
            prompt=beginning[: rng.choice([0, 40])] + tuple(rng.choices(range(10, 250), k=rng.choice([3, 25]))),
            sampling=SamplingParams(
                temperature=temperatures[i % len(temperatures)], seed=i, ignore_eos=True, repeat_penalty=1.0
            ),
            n_predict=n_predict,
        )
        for i in range(n)
    ]


def total(ends: list[Done]) -> tuple[int, int]:
    """Tokens guessed and right."""
    return sum(done.timings.draft_n for done in ends), sum(done.timings.draft_n_accepted for done in ends)


@pytest.mark.parametrize("draft_name", ["target.gguf", "random.gguf"])
@pytest.mark.parametrize("n_lookup", [0, 3])
def test_answers_are_the_same_with_and_without(folder, draft_name, n_lookup) -> None:
    """One request at a time."""
    requests = random_requests(7)
    expected, _ = answers(folder, requests, None)
    got, ends = answers(folder, requests, draft_name, n_lookup=n_lookup)
    assert got == expected
    assert total(ends)[0] > 0


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_the_same_on_several_slots(seed: int) -> None:
    """With a model without rounding, whatever the options, contexts that are too small included."""
    requests = random_options(seed, 16)
    options = {"n_ctx": [64, 96, 160, 512][seed % 4], "n_batch": [16, 64][seed % 2]}
    with Engine(FakeModel(**options), 1) as engine:
        alone = [result_of(engine.submit(request))[0] for request in requests]
    draft = DraftModel(FakeModel(**options, max_sequences=4), MOST)
    with Engine(FakeModel(**options, max_sequences=4), 4, draft=draft, n_lookup=seed % 2) as engine:
        together = [result_of(stream) for stream in [engine.submit(request) for request in requests]]
        engine._cache.check()
    assert [told for told, _ in together] == alone
    assert total([done for _, done in together])[0] > 0


@pytest.mark.parametrize("draft_name", ["target.gguf", "random.gguf"])
def test_a_context_shift(folder, draft_name) -> None:
    requests = random_requests(4, n_predict=200)
    expected, _ = answers(folder, requests, None, n_ctx=96, n_batch=32)
    got, ends = answers(folder, requests, draft_name, n_ctx=96, n_batch=32)
    assert got == expected
    assert all(done.truncated for done in ends) and total(ends)[0] > 0


def test_sequences_that_take_each_others_blocks(folder) -> None:
    requests = random_requests(9, n_predict=120)
    _, ends = answers(folder, requests, "target.gguf", n_slots=N_SLOTS, n_ctx=160, n_batch=32)
    assert all(done.n_predicted == 120 for done in ends) and total(ends)[1] > 0


def test_the_model_itself_is_nearly_always_right_and_another_hardly_ever(folder) -> None:
    requests = random_requests(3, n_predict=100, temperatures=(0.0,))
    _, ends = answers(folder, requests, "target.gguf")
    n_guessed, n_right = total(ends)
    assert n_right > 0.95 * n_guessed and n_right > 200
    _, ends = answers(folder, requests, "random.gguf")
    n_guessed, n_right = total(ends)
    assert n_right < 0.3 * n_guessed < 0.3 * 100


def recorded(run: Callable[..., np.ndarray], sizes: list[int]) -> Callable[..., np.ndarray]:
    """``Model.run`` that notes how many tokens of the first sequence are in each run."""

    def record(inputs: list[SequenceInput], **options: bool) -> np.ndarray:
        sizes.append(len(inputs[0].tokens))
        return run(inputs, **options)

    return record


@pytest.mark.parametrize(
    ("kv_type", "longest"), [("f16", 65), ("f32", 65), ("q8_0", 32), (("f16", "q4_0"), 32), (("q8_0", "f16"), 65)]
)
def test_long_guesses_far_into_a_context(folder, kv_type, longest) -> None:
    """Greedy, with the model as its own draft: the same to the last bit, though steps are of as many tokens as can be."""
    prompt = tuple(random.Random(1).choices(range(10, 250), k=700))
    params = SamplingParams(temperature=0.0, n_probs=3, ignore_eos=True, repeat_penalty=1.0)
    found, steps = [], []
    for most in (0, 64):
        target = models.load(folder / "wide.gguf", n_ctx=1024, n_threads=2, max_sequences=1, kv_type=kv_type)
        draft = DraftModel.load(folder / "wide.gguf", target, 1, most, kv_type=kv_type) if most else None
        target.run = recorded(target.run, steps)
        with Engine(target, draft=draft) as engine:
            text, samples, done = engine.submit(Request(prompt=prompt, sampling=params, n_predict=300)).result()
        found.append((text, samples, done.reason))
    assert found[0] == found[1]
    assert max(steps[-10:]) == longest


def test_while_a_wrong_draft_pauses_the_core_makes_several_steps(folder, monkeypatch) -> None:
    """Of the same answers, and with as long a pause as if it made them one by one."""
    requests, found, bursts = random_requests(3, n_predict=100), [], []
    generate = models.Model.generate

    def counted(model: models.Model, inputs: list[SequenceInput], *more: object) -> list[int]:
        tokens = generate(model, inputs, *more)
        bursts.append(len(tokens))
        return tokens

    monkeypatch.setattr(models.Model, "generate", counted)
    for longest in (scheduler._LONGEST_BURST, 1):
        monkeypatch.setattr(scheduler, "_LONGEST_BURST", longest)
        monkeypatch.setattr(scheduler, "BURST_SECONDS", 1000.0)
        got, ends = answers(folder, requests, "random.gguf")
        found.append((got, total(ends)))
    assert found[0] == found[1]
    assert sum(bursts) > 100 and max(bursts) > 3


@pytest.mark.parametrize("name", ["gemma.gguf", "other.gguf"])
def test_another_vocabulary_is_refused(folder, name) -> None:
    with pytest.raises(ValueError, match="another vocabulary"):
        DraftModel.load(folder / name, load_target(folder), 1, MOST)


def test_a_draft_for_too_few_slots_is_refused(folder) -> None:
    target = load_target(folder, n_slots=2)
    with pytest.raises(ValueError, match="the draft model can run 1"):
        Engine(target, 2, draft=DraftModel.load(folder / "target.gguf", target, 1, MOST))


# ---- guesses ----------------------------------------------------------------------------------------------------------


def greedy(model: models.Model, tokens: list[int], n: int) -> list[int]:
    """The slow way: all of the text again for each token."""
    blocks, text = list(range(model.n_blocks)), list(tokens)
    for _ in range(n):
        row = model.run([SequenceInput(text, 0, blocks, 1)])[0]
        text.append(int(np.argmax(row[: model.tokenizer.n_vocab])))
    return text[len(tokens) :]


def test_guesses_are_what_the_model_says_whatever_happens_to_the_text(folder) -> None:
    """It goes on, is changed in the middle, is cut, is another one; slots are asked together and alone."""
    rng, target, oracle = random.Random(3), load_target(folder), load_target(folder)
    draft = DraftModel.load(folder / "target.gguf", target, N_SLOTS, MOST)
    texts = [rng.choices(range(10, 250), k=30) for _ in range(N_SLOTS)]
    for _ in range(15):
        slots = rng.sample(range(N_SLOTS), rng.randint(1, N_SLOTS))
        asked = [Ask(slot, list(texts[slot]), rng.randint(1, MOST)) for slot in slots]
        for ask, guess in zip(asked, draft.guess(asked)):
            assert guess == greedy(oracle, ask.tokens, ask.most)
            texts[ask.slot] += guess[: rng.randint(0, len(guess))] + [rng.randrange(10, 250)]
            if rng.random() < 0.3:
                start = rng.randrange(len(texts[ask.slot]) - 5)
                del texts[ask.slot][start : start + 5]


def test_a_long_text_is_read_over_several_calls(folder) -> None:
    target = load_target(folder, n_batch=16)
    draft = DraftModel.load(folder / "target.gguf", target, 1, MOST)
    ask = Ask(0, list(range(10, 50)), 3)
    assert [len(draft.guess([ask])[0]) for _ in range(4)] == [0, 0, 3, 3]


def test_idle_slots_give_their_blocks_up(folder) -> None:
    target = load_target(folder, n_ctx=4 * BLOCK_TOKENS)
    draft = DraftModel.load(folder / "target.gguf", target, N_SLOTS, MOST)
    text = [10 + i % 200 for i in range(4 * BLOCK_TOKENS - 8)]
    expected = draft.guess([Ask(0, text, 4)])
    assert draft.guess([Ask(1, text, 4)]) == expected
    assert draft.guess([Ask(1, text, 4), Ask(2, text, 4)]) == [*expected, []]  # no room for both
    assert draft.guess([Ask(2, text, 4)]) == expected
    owned = draft._free + [block for slot in draft._slots for block in slot.blocks]
    assert sorted(owned) == list(range(draft.model.n_blocks))
