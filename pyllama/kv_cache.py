"""Who owns which block of keys and values: allocation, the prefix tree, copy-on-write, eviction.

There are no arrays here, only block numbers. What a sequence has computed stays in a tree of blocks, each node one block whose
tokens follow those of its parent, so that any later prompt that begins the same way can share the blocks. A prefix that ends
within a block is shared too: that part of the block is copied. A node is in use while a sequence's table holds it; nodes that
nobody uses are evicted, the least recently used leaf first, when a block is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["BlockTable", "KVCache"]


@dataclass(eq=False, slots=True)
class _Node:
    """A block in the tree: up to ``block_tokens`` tokens (fewer only in a leaf)."""

    block: int
    tokens: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    users: int = 0
    last_use: int = 0


@dataclass(eq=False, slots=True)
class BlockTable:
    """One sequence's blocks, in the order of its positions."""

    blocks: list[int] = field(default_factory=list)
    nodes: list[_Node] = field(default_factory=list)
    """The tree's nodes for the first ``len(nodes)`` blocks; the blocks after them belong to this sequence alone."""
    is_prefix: bool = True
    """The blocks hold what their tokens alone would give, so they may join the tree; not so after a context shift."""


class KVCache:
    """The pool of ``n_blocks`` blocks of ``block_tokens`` tokens each.

    Args:
        copy: ``copy(src_block, dst_block, n)`` copies the first n positions of a block to the same positions of another.
    """

    def __init__(self, n_blocks: int, block_tokens: int, copy: Callable[[int, int, int], None]) -> None:
        self.n_blocks, self.block_tokens = n_blocks, block_tokens
        self._copy = copy
        self._free = list(range(n_blocks - 1, -1, -1))
        self._root = _Node(-1, (), None)
        self._nodes: set[_Node] = set()
        self._clock = 0
        self._private_blocks = 0
        self._shifted: list[_Node] = []  # nodes that a context shift still reads from

    # -- a sequence's life --------------------------------------------------------------------------------------------

    def acquire(self, tokens: Sequence[int], *, reuse: bool = True) -> tuple[BlockTable, int]:
        """A table for a new sequence, with the blocks of the longest known prefix of ``tokens``.

        At least one token is left over, since logits come only from evaluating one.

        Returns:
            The table, and how many of its first tokens need no evaluation.
        """
        table = BlockTable()
        if not reuse:
            return table, 0
        size, node, matched = self.block_tokens, self._root, 0
        while matched + size < len(tokens):
            child = node.children.get(tuple(tokens[matched : matched + size]))
            if child is None:
                break
            self._use(child, table)
            node, matched = child, matched + size
        part, n = self._longest_part(node, tokens[matched : min(matched + size, len(tokens) - 1)])
        if part is None:
            return table, matched
        part.users += 1  # not to be evicted for the copy of itself
        block = self._take_block()
        part.users -= 1
        if block is None:
            return table, matched
        self._touch(part)
        self._copy(part.block, block, n)
        table.blocks.append(block)
        return table, matched + n

    def reserve(self, table: BlockTable, n_tokens: int) -> bool:
        """Makes the table long enough for ``n_tokens`` positions; False (and no change) if there are too few blocks."""
        missing = -(-n_tokens // self.block_tokens) - len(table.blocks)
        if missing <= 0:
            return True
        taken: list[int] = []
        while len(taken) < missing:
            block = self._take_block()
            if block is None:
                for unused in taken:
                    self._give_back(unused)
                return False
            taken.append(block)
        table.blocks += taken
        return True

    def commit(self, table: BlockTable, tokens: Sequence[int], n_evaluated: int) -> None:
        """Puts the blocks that the first ``n_evaluated`` tokens have filled into the tree, for others to share."""
        size = self.block_tokens
        while table.is_prefix and (len(table.nodes) + 1) * size <= n_evaluated:
            self._join(table, tuple(tokens[len(table.nodes) * size : (len(table.nodes) + 1) * size]))

    def release(self, table: BlockTable, tokens: Sequence[int], n_evaluated: int) -> None:
        """Ends the sequence's use of its blocks; what they hold stays in the tree as long as there is room."""
        self.commit(table, tokens, n_evaluated)
        rest = tuple(tokens[len(table.nodes) * self.block_tokens : n_evaluated])
        if table.is_prefix and rest:
            self._join(table, rest)
        for block in table.blocks[len(table.nodes) :]:
            self._give_back(block)
        for node in table.nodes:
            node.users -= 1
        table.blocks, table.nodes = [], []

    def own_from(self, table: BlockTable, position: int) -> list[int] | None:
        """Makes the blocks from ``position`` on the sequence's own, to be rewritten by a context shift.

        Blocks that others use too are replaced by empty ones, of which the part before ``position`` is copied.

        Returns:
            The blocks as they were, from which the caller copies; None (and no change) if there are too few blocks. The
            caller ends with :meth:`forget`.
        """
        first = position // self.block_tokens
        while len(table.nodes) > first and self._detach(table.nodes[-1]):
            table.nodes.pop()
            self._private_blocks += 1
        before = list(table.blocks)
        shared = table.nodes[first:]
        fresh: list[int] = []
        for _ in shared:
            block = self._take_block()
            if block is None:
                for unused in fresh:
                    self._give_back(unused)
                return None
            fresh.append(block)
        if shared and position % self.block_tokens:
            self._copy(before[first], fresh[0], position % self.block_tokens)
        table.blocks[first : first + len(fresh)] = fresh
        del table.nodes[first:]
        table.is_prefix = False
        self._shifted = shared
        return before

    def forget(self, table: BlockTable, n_tokens: int) -> None:
        """Ends a context shift: drops shared blocks that were only read from, and the blocks beyond ``n_tokens``."""
        for node in self._shifted:
            node.users -= 1
        self._shifted = []
        keep = -(-n_tokens // self.block_tokens)
        for block in table.blocks[keep:]:
            self._give_back(block)
        del table.blocks[keep:]

    # -- accounting ---------------------------------------------------------------------------------------------------

    @property
    def n_available(self) -> int:
        """Blocks that are free or could be evicted."""
        return len(self._free) + sum(1 for node in self._nodes if node.users == 0)

    def n_missing(self, tokens: Sequence[int]) -> int:
        """Blocks that a sequence of ``tokens`` and one more would need beside those that others are using already."""
        size, node, shared = self.block_tokens, self._root, 0
        while (shared + 1) * size < len(tokens):
            child = node.children.get(tuple(tokens[shared * size : (shared + 1) * size]))
            if child is None or not child.users:
                break
            node, shared = child, shared + 1
        return len(tokens) // size + 1 - shared

    def clear(self) -> None:
        """Forgets every prefix that no sequence uses."""
        while (node := self._oldest_unused_leaf()) is not None:
            self._remove(node)

    def check(self) -> None:
        """Asserts that every block has exactly one owner and that users of a node use its ancestors too."""
        in_tree = [node.block for node in self._nodes]
        owned = self._free + in_tree
        assert len(owned) == len(set(owned)), "a block has two owners"
        assert len(owned) + self._private_blocks == self.n_blocks, "a block is lost"
        for node in self._nodes:
            assert node.users >= 0
            assert node.parent is not None
            assert node.parent.children[node.tokens] is node
            assert node.parent is self._root or (node.parent in self._nodes and node.parent.users >= node.users)
            assert not node.children or len(node.tokens) == self.block_tokens

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        node.last_use = self._clock

    def _use(self, node: _Node, table: BlockTable) -> None:
        node.users += 1
        self._touch(node)
        table.nodes.append(node)
        table.blocks.append(node.block)

    def _longest_part(self, node: _Node, tokens: Sequence[int]) -> tuple[_Node | None, int]:
        """The child that shares the most first tokens with ``tokens``, and how many."""
        best, longest = None, 0
        for child in node.children.values():
            n = 0
            for ours, theirs in zip(tokens, child.tokens, strict=False):
                if ours != theirs:
                    break
                n += 1
            if n > longest:
                best, longest = child, n
        return best, longest

    def _join(self, table: BlockTable, tokens: tuple[int, ...]) -> None:
        """Moves the table's first own block, which holds ``tokens``, into the tree."""
        parent = table.nodes[-1] if table.nodes else self._root
        index = len(table.nodes)
        node = parent.children.get(tokens)
        if node is None:
            self._drop_beginnings(parent, tokens)
            node = _Node(table.blocks[index], tokens, parent)
            parent.children[tokens] = node
            self._nodes.add(node)
        else:  # someone else computed the same meanwhile: use theirs
            self._free.append(table.blocks[index])
            table.blocks[index] = node.block
        self._private_blocks -= 1
        node.users += 1
        self._touch(node)
        table.nodes.append(node)

    def _drop_beginnings(self, parent: _Node, tokens: tuple[int, ...]) -> None:
        """Evicts unused leaves that hold no more than the beginning of what is about to join beside them."""
        for child in list(parent.children.values()):
            if not child.users and not child.children and child.tokens == tokens[: len(child.tokens)]:
                self._remove(child)

    def _detach(self, node: _Node) -> bool:
        """Takes a node out of the tree if its only user is the caller's table; what follows it and is unused is evicted."""
        if node.users != 1:
            return False
        below = list(node.children.values())
        while below:
            child = below.pop()
            below += child.children.values()
            self._free.append(child.block)
            self._nodes.discard(child)
        del node.parent.children[node.tokens]
        self._nodes.discard(node)
        return True

    def _take_block(self) -> int | None:
        if not self._free:
            node = self._oldest_unused_leaf()
            if node is None:
                return None
            self._remove(node)
        self._private_blocks += 1
        return self._free.pop()

    def _give_back(self, block: int) -> None:
        self._private_blocks -= 1
        self._free.append(block)

    def _oldest_unused_leaf(self) -> _Node | None:
        unused = (node for node in self._nodes if node.users == 0 and not node.children)
        return min(unused, key=lambda node: node.last_use, default=None)

    def _remove(self, node: _Node) -> None:
        del node.parent.children[node.tokens]
        self._nodes.discard(node)
        self._free.append(node.block)
