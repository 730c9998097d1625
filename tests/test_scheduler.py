"""The scheduler without an engine: a model that only counts, and a clock that says what each batch costs."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from pyllama.kv_cache import KVCache
from pyllama.scheduler import Chunk, ContextFull, Scheduler, Sequence, truncated

SIZE = 32


class Run:
    """Schedules, and pretends to run what comes: every sequence generates numbers until it has ``wants`` of them."""

    def __init__(self, *, n_ctx=256, n_batch=64, n_slots=4, continuous=True, step_seconds=0.004, token_seconds=0.0005):
        self.cache = KVCache(-(-n_ctx // SIZE) + 2, SIZE, lambda *_: None)
        model = SimpleNamespace(n_ctx=n_ctx, n_batch=n_batch)
        self.scheduler = Scheduler(model, self.cache, n_slots, continuous=continuous)
        self.step_seconds, self.token_seconds = step_seconds, token_seconds
        self.history: list[tuple[dict[Sequence, int], float]] = []

    def add(self, n_prompt: int, wants: int = 10, seed: int = 0, **options) -> Sequence:
        tokens = options.pop("tokens", None) or random.Random(seed).choices(range(10**6), k=n_prompt)
        sequence = Sequence(list(tokens), owner=SimpleNamespace(wants=wants), **options)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        if chunks:
            n = sum(chunk.n for chunk in chunks)
            assert n <= self.scheduler.model.n_batch
            seconds = self.step_seconds + self.token_seconds * n
            last = [chunk.sequence for chunk in chunks if chunk.is_last]
            self.history.append(({chunk.sequence: chunk.n for chunk in chunks}, seconds))
            for chunk in chunks:
                assert len(chunk.sequence.table.blocks) * SIZE >= chunk.sequence.n_evaluated + chunk.n
                assert chunk.sequence.n_evaluated + chunk.n <= self.scheduler.model.n_ctx
            self.scheduler.advance(chunks, seconds)
            for sequence in last:
                sequence.generating = True
                sequence.owner.wants -= 1
                sequence.tokens.append(-sequence.number - 1)
                if sequence.owner.wants <= 0:
                    self.scheduler.remove(sequence)
        self.cache.check()
        return chunks

    def all(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.running and not self.scheduler.waiting:
                break
            self.step()
        else:
            raise AssertionError("it never ends")
        assert self.cache.n_available == self.cache.n_blocks

    def sizes(self, sequence: Sequence) -> list[int]:
        return [batch[sequence] for batch, _ in self.history if sequence in batch]


def test_a_prompt_alone_takes_whole_batches() -> None:
    run = Run()
    sequence = run.add(150, wants=3)
    run.all()
    assert run.sizes(sequence) == [64, 64, 22, 1, 1]


def test_bursts_take_a_sixtieth_of_a_second() -> None:
    """Even one that was too long, since others had joined meanwhile, tells how long the next may be."""
    run = Run(step_seconds=0.002, token_seconds=0.0)
    run.add(5, wants=100)
    assert run.scheduler.burst(run.step(), 100) == 1  # nothing is known yet
    run.step()
    chunks = run.scheduler.schedule()
    assert [run.scheduler.burst(chunks, most) for most in (1, 3, 100)] == [1, 3, 8]
    run.scheduler.advance(chunks, 0.005, 8)
    assert run.scheduler.burst(chunks, 100) == 3


@pytest.mark.parametrize(("step", "token"), [(0.004, 0.0005), (0.04, 0.006), (0.02, 0.0002), (0.003, 0.003)])
def test_a_long_prompt_makes_no_step_much_longer(step: float, token: float) -> None:
    run = Run(n_ctx=4096, n_batch=512, step_seconds=step, token_seconds=token)
    streams = [run.add(20, wants=2000, seed=i) for i in range(3)]
    for _ in range(30):
        run.step()
    ordinary = run.history[-1][1]
    long = run.add(1500, wants=1, seed=9)
    before = len(run.history)
    while long.owner.wants:
        run.step()
    beside = run.history[before:]
    assert all(batch.get(stream) == 1 for batch, _ in beside for stream in streams)
    assert max(seconds for _, seconds in beside) <= max(4 * ordinary, ordinary + 16 * token) + 1e-9
    chunks = run.sizes(long)
    assert sum(chunks) == 1500
    assert min(chunks[:-1]) >= 16
    assert max(chunks) >= min(400, (2.5 * ordinary - step) / token)  # and none much shorter than it may be


def test_prompts_come_in_order_of_arrival() -> None:
    run = Run()
    first, second, third = (run.add(n, wants=1, seed=n) for n in (50, 40, 30))
    run.all()
    assert [list(batch.values()) for batch, _ in run.history] == [[50, 14], [26, 30]]
    assert run.sizes(second) == [14, 26]
    assert third in run.history[1][0] and first not in run.history[1][0]


def test_slots_and_the_queue() -> None:
    run = Run(n_slots=2)
    sequences = [run.add(5, seed=i) for i in range(3)] + [run.add(5, seed=3, wanted_slot=0)]
    run.step()
    assert [sequence.slot for sequence in sequences[:2]] == [0, 1]
    assert list(run.scheduler.waiting) == sequences[2:]
    run.all()
    assert sequences[3].slot == 0


def test_a_wanted_slot_does_not_hold_others_up() -> None:
    run = Run(n_slots=2)
    run.add(5, wants=50)
    picky, other = run.add(5, seed=1, wanted_slot=0), run.add(5, seed=2)
    run.step()
    assert other in run.scheduler.running
    assert picky in run.scheduler.waiting
    run.all()


def test_without_continuous_batching_new_ones_wait_for_all() -> None:
    run = Run(continuous=False)
    first, second = run.add(5, wants=5), run.add(5, wants=9, seed=1)
    run.step()
    late = [run.add(5, seed=i) for i in (2, 3)]
    while run.scheduler.running:
        run.step()
    assert not set(late) & {sequence for batch, _ in run.history for sequence in batch}
    assert (len(run.sizes(first)), len(run.sizes(second))) == (5, 9)
    run.step()
    assert run.scheduler.running == late


def test_the_youngest_gives_way_and_comes_back() -> None:
    run = Run(n_ctx=96)
    old, young = run.add(30, wants=60), run.add(50, wants=45, seed=1)
    while young in run.scheduler.running or not run.history:
        run.step()
        assert old in run.scheduler.running
    n_generated = len(young.tokens) - 50
    assert 0 < n_generated < 45
    assert young.n_evaluated == 0
    run.all()
    assert len(old.tokens) == 90
    assert len(young.tokens) == 95
    assert young.n_prompt_run == 50
    assert sum(run.sizes(young)) < 50 + 45 + 30  # what had not been evicted meanwhile was not computed again


def test_a_new_prompt_is_not_begun_if_it_would_only_be_preempted() -> None:
    run = Run(n_ctx=256)
    run.add(150, wants=20)
    run.step()
    big = run.add(180, seed=1)
    for _ in range(10):
        run.step()
        assert big in run.scheduler.waiting
    run.all()
    assert run.sizes(big)[:3] == [64, 64, 52]


def test_a_prefix_that_is_being_computed_is_awaited() -> None:
    run = Run(n_ctx=1024, n_batch=64)
    start = random.Random(5).choices(range(10**6), k=100)
    sequences = [run.add(0, tokens=start + [i] * 20, wants=5) for i in range(4)]
    run.all()
    assert [sequence.n_prompt_run for sequence in sequences] == [120, 24, 24, 24]  # 96 of 100 are in full blocks
    assert [sequence.n_reused for sequence in sequences] == [0, 96, 96, 96]
    assert all(sequence.n_reused + sequence.n_prompt_run == 120 for sequence in sequences)


def test_without_reuse_nothing_is_shared() -> None:
    run = Run(n_ctx=1024)
    sequences = [run.add(100, wants=1, reuse=False) for _ in range(3)]
    run.all()
    assert [sum(run.sizes(sequence)) for sequence in sequences] == [100] * 3


def test_a_full_context_is_shifted_as_documented() -> None:
    run = Run(n_ctx=64)
    sequence = run.add(20, wants=100, n_keep=10)
    while not sequence.shifted:
        run.step()
        assert len(sequence.tokens) <= 65
    assert len(sequence.tokens) == 65 - 27 + 1  # half of 64 - 10 went before the token that was waiting, and one came
    run.all()
    assert len(sequence.tokens) <= 65


def test_a_shift_that_needs_blocks_waits_for_older_ones() -> None:
    """Two sequences share nearly all of the pool; the younger one reaches the end of the context first."""
    run = Run(n_ctx=128, n_batch=128)
    start = random.Random(1).choices(range(10**6), k=96)
    old = run.add(0, tokens=[*start, 1], wants=20)
    young = run.add(0, tokens=[*start, *range(29)], wants=40, n_keep=0)
    run.all()
    assert old.owner.wants == young.owner.wants == 0
    assert young.shifted


def test_a_context_too_small_to_go_on() -> None:
    run = Run(n_ctx=1, n_batch=4)
    sequence = run.add(1)
    run.step()
    with pytest.raises(ContextFull) as caught:
        run.step()
    assert caught.value.sequence is sequence


def test_more_sequences_than_a_batch_has_room_for() -> None:
    run = Run(n_batch=2, n_slots=4)
    for i in range(4):
        run.add(3, wants=5, seed=i)
    run.all()


def test_random_lives_end_and_leave_nothing() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        n_ctx = rng.choice([64, 96, 200])
        run = Run(
            n_ctx=n_ctx, n_batch=rng.choice([4, 16, 64]), n_slots=rng.randrange(1, 6), continuous=rng.random() < 0.7
        )
        stem = rng.choices(range(100), k=n_ctx)
        sequences = []
        for _ in range(15):
            tokens = stem[: rng.randrange(0, n_ctx // 2)] + rng.choices(range(100), k=rng.randrange(1, n_ctx // 3))
            wants = rng.randrange(1, 40)
            options = {"reuse": rng.random() < 0.8, "n_keep": rng.randrange(0, n_ctx // 2)}
            sequences.append(run.add(0, tokens=tokens, wants=wants, **options))
            for _ in range(rng.randrange(0, 12)):
                run.step()
            if rng.random() < 0.2:
                gone = rng.choice(sequences)
                run.scheduler.remove(gone)
                gone.owner.wants = 0
        run.all()
        assert all(sequence.owner.wants == 0 for sequence in sequences)


def test_truncated_prompts() -> None:
    assert truncated(list(range(9)), 2, 10) == list(range(9))
    assert truncated(list(range(10)), 2, 10) == [0, 1, 6, 7, 8, 9]
    assert truncated(list(range(100)), 0, 10) == list(range(95, 100))
    for n_ctx in range(8, 20):
        for n_keep in range(n_ctx - 3):
            for n in range(n_ctx, 5 * n_ctx):
                prompt = list(range(n))
                kept = truncated(prompt, n_keep, n_ctx)
                assert len(kept) < n_ctx
                assert kept[:n_keep] == prompt[:n_keep]
                assert kept[n_keep:] == prompt[n - len(kept) + n_keep :]
                assert len(kept) - n_keep >= (n_ctx - n_keep) // 2
                assert (n - len(kept)) % ((n_ctx - n_keep) // 2) == 0
