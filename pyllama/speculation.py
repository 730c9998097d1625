"""Guesses what a sequence goes on with, for the engine to check several tokens in one step (Leviathan et al. 2023, section 2).

A guess costs nothing but time: the engine keeps a token only where sampling gives the same one, so that what is generated does
not change. This module knows tokens; nothing of models, sampling or the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LookupSpeculation", "Pace"]

_LONGEST, _SHORTEST = 4, 3
_LEAST_PAUSE = 4
_MOST_PAUSE = 64
_MANY_MISSES = 8


class Pace:
    """How much to guess: ever more while guesses are right. After wrong ones it pauses, for longer and longer, so that a text
    that cannot be guessed loses next to nothing.

    Args:
        most: tokens of a guess.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = min(2, most)
        self._pause = 0
        self._next_pause = _LEAST_PAUSE

    def next(self) -> int:
        """Tokens of the guess that may be made now; 0: none."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._length

    @property
    def pause(self) -> int:
        """Steps to come in which nothing is guessed."""
        return self._pause

    def skip(self, n_steps: int) -> None:
        """Lets some of these steps pass."""
        self._pause -= n_steps

    def judge(self, n_guessed: int, n_right: int) -> None:
        """Hears how many tokens of the last guess, which had at least one, were right."""
        if n_right == n_guessed:
            self._length = min(2 * self._length, self._most)
            self._next_pause = _LEAST_PAUSE
        elif n_right:
            self._length = max(2, n_right)
        else:
            self._length = min(2, self._most)
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _MOST_PAUSE)


class LookupSpeculation:
    """Guesses that what followed the last few tokens before will follow again (prompt lookup, Saxena 2023).

    Args:
        most: tokens of a guess.
    """

    def __init__(self, most: int) -> None:
        self.pace = Pace(most)
        self._ends: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in range(_SHORTEST, _LONGEST + 1))
        """For each length of runs of tokens, where a run ended last."""
        self._n_known = 0
        """Tokens before which all runs are known."""
        self._n_missed = 0
        """Times in a row that there was nothing to guess."""

    @property
    def is_idle(self) -> bool:
        """For some time there has been nothing to guess, so that there is hardly any haste to look again."""
        return self._n_missed >= _MANY_MISSES

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow; none where that is as good a guess.

        Args:
            tokens: prompt and answer so far: what they were at the last call, and more.
        """
        n = min(most, self.pace.next())
        if n < 1:
            return []
        self._learn(tokens)
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            end = self._ends[size - _SHORTEST].get(tuple(tokens[-size:]))
            if end is not None:
                self._n_missed = 0
                # Where that leads to the end of the text, the guess is that it repeats itself.
                guess = list(tokens[end : end + n])
                while len(guess) < n:
                    guess.append(guess[end + len(guess) - len(tokens)])
                return guess
        self._n_missed += 1
        return []

    def forget(self) -> None:
        """Tokens were dropped, so that the others stand elsewhere now."""
        self._n_known = 0
        for ends in self._ends:
            ends.clear()

    def _learn(self, tokens: Sequence[int]) -> None:
        """Notes the runs that end before the last token: what follows those is known."""
        for end in range(max(self._n_known, _SHORTEST), len(tokens)):
            for size, ends in enumerate(self._ends, _SHORTEST):
                if size <= end:
                    ends[tuple(tokens[end - size : end])] = end
        self._n_known = len(tokens)
