"""Who owns which block of keys and values: allocation, the prefix tree, copy-on-write, eviction.

There are no arrays here, only block numbers. What a sequence has computed stays in a tree of blocks, each node one block whose
tokens follow those of its parent, so that any later prompt that begins the same way can share the blocks. A prefix that ends
within a block is shared too: that part of the block is copied. A node is in use while a sequence's table holds it; leaves that
nobody uses are evicted, the least recently used first, when a block is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["BlockTable", "KVCache"]


@dataclass(eq=False, slots=True)
class _Node:
    """A block in the tree: ``block_tokens`` tokens, or fewer in a leaf."""

    block: int
    tokens: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    users: int = 0
    """Tables that hold the node; they hold its ancestors as well."""
    pinned: bool = False


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
        copy: ``copy(src_blocks, src_pos, dst_blocks, dst_pos, n)`` copies the contents of n positions, the lowest first, from
            one list of blocks to another, and makes them fit their new positions.
    """

    def __init__(
        self, n_blocks: int, block_tokens: int, copy: Callable[[list[int], int, list[int], int, int], None]
    ) -> None:
        self.n_blocks, self.block_tokens = n_blocks, block_tokens
        self._copy = copy
        self._free = list(range(n_blocks - 1, -1, -1))
        self._root = _Node(-1, (), None, pinned=True)
        self._pinned: tuple[int, ...] = ()
        self._n_nodes = self._n_unused = 0  # nodes of the tree; those of them without users
        # What can be evicted, the next first: leaves without users. A parent becomes a leaf when its last child goes, and is
        # then as old as that child.
        self._leaves: OrderedDict[_Node, None] = OrderedDict()
        self._pinned_leaves: OrderedDict[_Node, None] = OrderedDict()

    # -- a sequence's life --------------------------------------------------------------------------------------------

    def share(self, table: BlockTable, tokens: Sequence[int], n_evaluated: int) -> int:
        """Puts into a table the known blocks that go on where it ends, as far as they hold ``tokens``.

        At least one token is left over, since logits come only from evaluating one.

        Args:
            n_evaluated: tokens that the table's blocks hold already.

        Returns:
            Tokens that they hold now.
        """
        if not table.is_prefix:
            return n_evaluated
        size, node, at = self.block_tokens, self._last_node(table), len(table.nodes)
        while (at + 1) * size < len(tokens):
            child = node.children.get(tuple(tokens[at * size : (at + 1) * size]))
            if child is None:
                break
            if at < len(table.blocks):
                self._free.append(table.blocks[at])
                table.blocks[at] = child.block
            else:
                table.blocks.append(child.block)
            self._use(child)
            table.nodes.append(child)
            node, at = child, at + 1
        if at == len(table.blocks):
            return at * size + self._copy_part(table, tokens[at * size : min((at + 1) * size, len(tokens) - 1)])
        return max(at * size, n_evaluated)

    def reserve(self, table: BlockTable, n_tokens: int) -> bool:
        """Makes the table long enough for ``n_tokens`` positions; False (and no change) if there are too few blocks."""
        missing = -(-n_tokens // self.block_tokens) - len(table.blocks)
        if missing > self.n_available:
            return False
        for _ in range(missing):
            table.blocks.append(self._take_block())
        return True

    def commit(self, table: BlockTable, tokens: Sequence[int], n_evaluated: int) -> None:
        """Puts the blocks that the first ``n_evaluated`` tokens have filled into the tree, for others to share."""
        size = self.block_tokens
        while (len(table.nodes) + 1) * size <= n_evaluated and table.is_prefix:
            self._join(table, tuple(tokens[len(table.nodes) * size : (len(table.nodes) + 1) * size]))

    def release(self, table: BlockTable, tokens: Sequence[int], n_evaluated: int) -> None:
        """Ends the sequence's use of its blocks; what they hold stays in the tree as long as there is room."""
        self.commit(table, tokens, n_evaluated)
        rest = tuple(tokens[len(table.nodes) * self.block_tokens : n_evaluated])
        if table.is_prefix and rest and not self._is_known(self._last_node(table), rest):
            self._join(table, rest)
        self._free += table.blocks[len(table.nodes) :]
        for node in reversed(table.nodes):
            self._leave(node)
        table.blocks, table.nodes, table.is_prefix = [], [], True

    def drop(self, table: BlockTable, start: int, n_dropped: int, n_tokens: int) -> bool:
        """Takes ``n_dropped`` of the table's ``n_tokens`` positions away from ``start`` on; those after them move down.

        Blocks that are rewritten are the sequence's own afterwards; where others use them too, they keep them and the
        sequence gets new ones.

        Returns:
            False (and no change) if there are too few blocks for that.
        """
        first = start // self.block_tokens
        # Users never grow from a node to the next, so the shared ones come first.
        n_shared = sum(node.users > 1 for node in table.nodes[first:])
        if n_shared > self.n_available:
            return False
        before = list(table.blocks)
        for node in reversed(table.nodes[first + n_shared :]):
            self._detach(node)
        shared = table.nodes[first : first + n_shared]
        del table.nodes[first:]
        table.is_prefix = False
        table.blocks[first : first + n_shared] = [self._take_block() for _ in shared]
        if shared:
            start_of_block = first * self.block_tokens
            self._copy(before, start_of_block, table.blocks, start_of_block, start - start_of_block)
        self._copy(before, start + n_dropped, table.blocks, start, n_tokens - start - n_dropped)
        for node in reversed(shared):
            self._leave(node)
        n_kept_blocks = -(-(n_tokens - n_dropped) // self.block_tokens)
        self._free += table.blocks[n_kept_blocks:]
        del table.blocks[n_kept_blocks:]
        return True

    # -- the pool -----------------------------------------------------------------------------------------------------

    @property
    def n_available(self) -> int:
        """Blocks that are free or could be evicted."""
        return len(self._free) + self._n_unused

    def n_missing(self, tokens: Sequence[int], *, reuse: bool = True) -> int:
        """Blocks that a sequence of ``tokens`` and one more would need beside those that others are using already."""
        size, node, shared = self.block_tokens, self._root, 0
        while reuse and (shared + 1) * size < len(tokens):
            child = node.children.get(tuple(tokens[shared * size : (shared + 1) * size]))
            if child is None or not child.users:
                break
            node, shared = child, shared + 1
        return len(tokens) // size + 1 - shared

    def next_block(self, table: BlockTable, tokens: Sequence[int]) -> object:
        """Equal for two tables whose next block for the tree will be the same; None if it will not be full."""
        start = len(table.nodes) * self.block_tokens
        if start + self.block_tokens > len(tokens) or not table.is_prefix:
            return None
        return self._last_node(table), tuple(tokens[start : start + self.block_tokens])

    @property
    def pinned(self) -> tuple[int, ...]:
        """The prefix that :meth:`pin` was called with."""
        return self._pinned

    def pin(self, tokens: Sequence[int]) -> None:
        """Blocks that hold this prefix, now or later, are evicted only when there is nothing else. It replaces the last one."""
        self._pinned = tuple(tokens)
        for node in self._walk():
            if node.pinned != self._is_pinned(node):
                self._forget_leaf(node)
                node.pinned = not node.pinned
                self._note_leaf(node)

    def clear(self) -> None:
        """Forgets every prefix that no sequence uses."""
        while self._n_unused:
            self._evict()

    def check(self) -> None:
        """Asserts the invariants: each block has one owner; who uses a node uses its ancestors; all counts are right."""
        nodes = list(self._walk())
        owned = self._free + [node.block for node in nodes]
        assert len(owned) == len(set(owned)) <= self.n_blocks, "a block has two owners"
        assert len(nodes) == self._n_nodes
        assert self._n_unused == sum(node.users == 0 for node in nodes)
        leaves = {node for node in nodes if not node.users and not node.children}
        assert leaves == self._leaves.keys() | self._pinned_leaves.keys()
        assert all(node.pinned for node in self._pinned_leaves) and not any(node.pinned for node in self._leaves)
        for node in nodes:
            assert node.parent is not None and node.parent.children[node.tokens] is node
            assert node.users >= 0
            assert node.users >= sum(child.users for child in node.children.values())
            assert len(node.tokens) == self.block_tokens or not node.children
            assert node.pinned == self._is_pinned(node)

    @property
    def n_owned_by_sequences(self) -> int:
        """Blocks that are in no node of the tree and not free."""
        return self.n_blocks - len(self._free) - self._n_nodes

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _last_node(self, table: BlockTable) -> _Node:
        return table.nodes[-1] if table.nodes else self._root

    def _walk(self) -> Iterator[_Node]:
        """All nodes, parents before their children."""
        below = list(self._root.children.values())
        while below:
            node = below.pop()
            yield node
            below += node.children.values()

    def _use(self, node: _Node) -> None:
        if not node.users:
            self._n_unused -= 1
            self._forget_leaf(node)
        node.users += 1

    def _leave(self, node: _Node) -> None:
        node.users -= 1
        if not node.users:
            self._n_unused += 1
            self._note_leaf(node)

    def _note_leaf(self, node: _Node) -> None:
        if not node.users and not node.children:
            (self._pinned_leaves if node.pinned else self._leaves)[node] = None

    def _forget_leaf(self, node: _Node) -> None:
        (self._pinned_leaves if node.pinned else self._leaves).pop(node, None)

    def _is_pinned(self, node: _Node) -> bool:
        """Does the node hold a block of the pinned prefix, or its last part, and nothing more?"""
        if node.parent is None or not node.parent.pinned:
            return False
        depth, ancestor = 0, node.parent
        while ancestor.parent is not None:
            depth, ancestor = depth + 1, ancestor.parent
        return node.tokens == self._pinned[depth * self.block_tokens : (depth + 1) * self.block_tokens]

    def _copy_part(self, table: BlockTable, tokens: Sequence[int]) -> int:
        """Copies the block that shares the most first tokens with ``tokens`` into a new one, as far as it does; how many."""
        best, longest = None, 0
        for child in self._last_node(table).children.values():
            n = _n_equal(tokens, child.tokens)
            if n > longest:
                best, longest = child, n
        if best is None:
            return 0
        self._use(best)  # not to be evicted for the copy of itself
        if self.n_available:
            table.blocks.append(self._take_block())
            self._copy([best.block], 0, table.blocks[-1:], 0, longest)
        else:
            longest = 0
        self._leave(best)
        return longest

    def _join(self, table: BlockTable, tokens: tuple[int, ...]) -> None:
        """Moves the table's first own block, which holds ``tokens``, into the tree."""
        parent, at = self._last_node(table), len(table.nodes)
        node = parent.children.get(tokens)
        if node is not None:  # someone else computed the same meanwhile: use theirs
            self._free.append(table.blocks[at])
            table.blocks[at] = node.block
            self._use(node)
        else:
            self._drop_beginnings(parent, tokens)
            node = _Node(table.blocks[at], tokens, parent, users=1)
            node.pinned = self._is_pinned(node)
            parent.children[tokens] = node
            self._n_nodes += 1
        table.nodes.append(node)

    def _is_known(self, parent: _Node, tokens: tuple[int, ...]) -> bool:
        """Does a block in the tree begin with these tokens already?"""
        return any(child.tokens[: len(tokens)] == tokens for child in parent.children.values())

    def _drop_beginnings(self, parent: _Node, tokens: tuple[int, ...]) -> None:
        """Evicts unused leaves that hold no more than the beginning of what is about to join beside them."""
        for child in list(parent.children.values()):
            if child in self._leaves and child.tokens == tokens[: len(child.tokens)]:
                self._remove(child)

    def _detach(self, node: _Node) -> None:
        """Takes a node out of the tree whose block its one user is going to rewrite; what follows it is evicted."""
        below = list(node.children.values())
        for child in below:
            below += child.children.values()
        for child in reversed(below):
            self._remove(child)
        self._n_nodes -= 1
        del node.parent.children[node.tokens]

    def _take_block(self) -> int:
        if not self._free:
            self._evict()
        return self._free.pop()

    def _evict(self) -> None:
        self._remove(next(iter(self._leaves or self._pinned_leaves)))

    def _remove(self, node: _Node) -> None:
        """Forgets an unused leaf."""
        self._forget_leaf(node)
        self._n_unused -= 1
        self._n_nodes -= 1
        self._free.append(node.block)
        parent = node.parent
        del parent.children[node.tokens]
        if parent is not self._root and not parent.children and not parent.users:
            leaves = self._pinned_leaves if parent.pinned else self._leaves
            leaves[parent] = None
            leaves.move_to_end(parent, last=False)


def _n_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
