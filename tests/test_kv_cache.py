"""Blocks: a random life of sequences over a pool, each position compared with what it has to hold; then the particular rules."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyllama.kv_cache import BlockTable, KVCache

SIZE = 4

Cell = tuple[int, int]
"""Hash of all tokens up to this one, and the position that the cell is good for."""


class Pool:
    """A cache over cells that can be looked at."""

    def __init__(self, n_blocks: int) -> None:
        self.cells: list[list[Cell | None]] = [[None] * SIZE for _ in range(n_blocks)]
        self.cache = KVCache(n_blocks, SIZE, self.copy)

    def copy(self, src_blocks: list[int], src_pos: int, dst_blocks: list[int], dst_pos: int, n: int) -> None:
        for i in range(n):
            source, target = src_pos + i, dst_pos + i
            cell = self.cells[src_blocks[source // SIZE]][source % SIZE]
            assert cell is not None
            self.cells[dst_blocks[target // SIZE]][target % SIZE] = (cell[0], cell[1] + dst_pos - src_pos)

    def contents(self, table: BlockTable, n: int) -> list[Cell | None]:
        return [self.cells[table.blocks[i // SIZE]][i % SIZE] for i in range(n)]

    def evaluate(self, table: BlockTable, tokens: list[int], n_evaluated: int, n: int) -> list[Cell]:
        """What a run of the model would write."""
        cells = [(hash(tuple(tokens[: i + 1])), i) for i in range(n_evaluated, n_evaluated + n)]
        for i, cell in enumerate(cells, n_evaluated):
            self.cells[table.blocks[i // SIZE]][i % SIZE] = cell
        return cells


@dataclass
class Life:
    tokens: list[int]
    table: BlockTable = field(default_factory=BlockTable)
    cells: list[Cell] = field(default_factory=list)
    """What its blocks have to hold, position by position."""


class Lives(RuleBasedStateMachine):
    """Sequences over an alphabet of two tokens, so that prefixes meet all the time."""

    @initialize(n_blocks=st.integers(1, 12))
    def start_pool(self, n_blocks: int) -> None:
        self.pool = Pool(n_blocks)
        self.cache = self.pool.cache
        self.lives: list[Life] = []

    def pick(self, number: int) -> Life:
        return self.lives[number % len(self.lives)]

    def share(self, life: Life) -> None:
        n = self.cache.share(life.table, life.tokens, len(life.cells))
        assert len(life.cells) <= n < max(1, len(life.tokens)) or n == len(life.cells)
        if n > len(life.cells):
            life.cells = [(hash(tuple(life.tokens[: i + 1])), i) for i in range(n)]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), reuse=st.booleans())
    def begin(self, tokens: list[int], reuse: bool) -> None:
        life = Life(tokens)
        self.lives.append(life)
        if reuse:
            self.share(life)

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 99))
    def share_again(self, number: int) -> None:
        self.share(self.pick(number))

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 99), n=st.integers(1, 9), token=st.integers(0, 1))
    def go_on(self, number: int, n: int, token: int) -> None:
        life = self.pick(number)
        before = list(life.table.blocks)
        if len(life.cells) == len(life.tokens):
            life.tokens.append(token)
        n = min(n, len(life.tokens) - len(life.cells))
        n_blocks = -(-(len(life.cells) + n) // SIZE)
        room = self.cache.n_available
        if self.cache.reserve(life.table, len(life.cells) + n):
            assert len(life.table.blocks) == max(n_blocks, len(before))
            if life.table.is_prefix:
                life.cells += self.pool.evaluate(life.table, life.tokens, len(life.cells), n)
            else:  # after a shift the contents depend on what was dropped: anything new will do
                for _ in range(n):
                    at = len(life.cells)
                    life.cells.append((hash((tuple(life.tokens), at, id(life))), at))
                    self.pool.cells[life.table.blocks[at // SIZE]][at % SIZE] = life.cells[-1]
            self.cache.commit(life.table, life.tokens, len(life.cells))
        else:
            assert life.table.blocks == before
            assert n_blocks - len(before) > room

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 99), keep=st.integers(0, 20), data=st.data())
    def shift(self, number: int, keep: int, data: st.DataObject) -> None:
        life = self.pick(number)
        keep = min(keep, len(life.cells))
        n_dropped = data.draw(st.integers(0, len(life.cells) - keep))
        before = self.pool.contents(life.table, len(life.cells))
        if self.cache.drop(life.table, keep, n_dropped, len(life.cells)):
            moved = [(code, at - n_dropped) for code, at in life.cells[keep + n_dropped :]]
            life.cells = life.cells[:keep] + moved
            del life.tokens[keep : keep + n_dropped]
        else:
            assert self.pool.contents(life.table, len(life.cells)) == before

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 99))
    def end(self, number: int) -> None:
        life = self.lives.pop(number % len(self.lives))
        self.cache.release(life.table, life.tokens, len(life.cells))
        assert not life.table.blocks

    @rule(tokens=st.lists(st.integers(0, 1), max_size=10))
    def pin(self, tokens: list[int]) -> None:
        self.cache.pin(tokens)
        assert self.cache.pinned == tuple(tokens)

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        private = [block for life in self.lives for block in life.table.blocks[len(life.table.nodes) :]]
        assert len(private) == self.cache.n_owned_by_sequences
        for life in self.lives:
            assert self.pool.contents(life.table, len(life.cells)) == life.cells

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for life in self.lives:
            self.cache.release(life.table, life.tokens, len(life.cells))
        self.cache.check()
        assert self.cache.n_available == self.cache.n_blocks
        self.cache.clear()
        assert sorted(self.cache._free) == list(range(self.cache.n_blocks))


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# -- the rules one by one ---------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Pool:
    return Pool(10)


def run(pool: Pool, tokens: list[int], *, reuse: bool = True) -> tuple[BlockTable, int]:
    """A sequence whose tokens are all evaluated, and how many of them needed no evaluation."""
    table = BlockTable()
    n = pool.cache.share(table, tokens, 0) if reuse else 0
    assert pool.cache.reserve(table, len(tokens))
    pool.evaluate(table, tokens, n, len(tokens) - n)
    pool.cache.commit(table, tokens, len(tokens))
    return table, n


def finish(pool: Pool, tokens: list[int]) -> int:
    table, n = run(pool, tokens)
    pool.cache.release(table, tokens, len(tokens))
    pool.cache.check()
    return n


def test_one_token_is_always_left_to_evaluate(pool: Pool) -> None:
    for n in (1, 2, SIZE, SIZE + 1, 2 * SIZE):
        assert finish(pool, list(range(n))) < n
        assert finish(pool, list(range(n))) == n - 1


def test_a_prefix_is_shared_to_the_token(pool: Pool) -> None:
    finish(pool, list(range(10)))
    for n in range(1, 10):
        assert pool.cache.share(table := BlockTable(), [*range(n), 99], 0) == n
        assert [code for code, _ in pool.contents(table, n)] == [hash(tuple(range(i + 1))) for i in range(n)]
        pool.cache.release(table, [*range(n), 99], n)


def test_running_sequences_share_blocks_and_a_changed_block_is_a_copy(pool: Pool) -> None:
    first, _ = run(pool, list(range(8)))
    second, n = run(pool, [*range(6), 99, 98])
    assert n == 4 + 2
    assert first.blocks[0] == second.blocks[0]
    assert first.blocks[1] != second.blocks[1]


def test_the_same_computed_twice_is_kept_once(pool: Pool) -> None:
    first, _ = run(pool, list(range(8)))
    second, _ = run(pool, list(range(8)), reuse=False)
    assert first.blocks == second.blocks
    assert pool.cache.n_available == 8


def test_what_others_computed_meanwhile_replaces_own_blocks(pool: Pool) -> None:
    slow = BlockTable()
    pool.cache.reserve(slow, 2)
    pool.evaluate(slow, list(range(10)), 0, 2)
    fast, _ = run(pool, list(range(9)), reuse=False)
    assert pool.cache.share(slow, list(range(10)), 2) == 8
    assert slow.blocks == fast.blocks[:2]
    pool.cache.check()


def test_the_least_recently_used_is_evicted_first(pool: Pool) -> None:
    for start in (100, 200, 300, 400):
        finish(pool, list(range(start, start + 8)))
    finish(pool, list(range(100, 108)))  # used again
    finish(pool, list(range(500, 512)))  # two blocks are free, the third is one of 200's
    assert finish(pool, list(range(200, 208))) == 4
    assert finish(pool, list(range(100, 108))) == 7


def test_a_beginning_is_not_kept_beside_the_whole(pool: Pool) -> None:
    finish(pool, [1, 2])
    finish(pool, [1, 2, 3])
    finish(pool, [1, 2])
    assert pool.cache.n_available - len(pool.cache._free) == 1


def test_a_pinned_prefix_goes_last(pool: Pool) -> None:
    pinned = list(range(10))
    pool.cache.pin(pinned)
    finish(pool, pinned)
    rng = random.Random(0)
    for _ in range(20):
        finish(pool, rng.choices(range(100, 200), k=rng.randrange(1, 28)))
    assert finish(pool, [*pinned, 99]) == 10
    finish(pool, list(range(100, 140)))  # needs every block
    assert finish(pool, [*pinned, 99]) == 0
    finish(pool, pinned)  # and is pinned again
    finish(pool, list(range(200, 228)))
    assert finish(pool, [*pinned, 99]) == 10


def test_a_shift_leaves_shared_blocks_to_the_others(pool: Pool) -> None:
    first, _ = run(pool, list(range(12)))
    second, _ = run(pool, [*range(12), 99])
    before = pool.contents(first, 12)
    assert pool.cache.drop(second, 2, 5, 13)
    assert pool.contents(first, 12) == before
    assert [at for _, at in pool.contents(second, 8)] == list(range(8))
    pool.cache.check()


def test_a_shifted_sequence_leaves_no_prefix(pool: Pool) -> None:
    table, _ = run(pool, list(range(12)))
    assert pool.cache.drop(table, 5, 4, 12)
    tokens = [*range(5), *range(9, 12)]
    pool.cache.release(table, tokens, 8)
    assert finish(pool, tokens) == 4  # the first block was not touched
