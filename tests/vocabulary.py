"""A small vocabulary for tests that need no tokenizer."""

from __future__ import annotations

import numpy as np


class Vocabulary:
    """What sampling wants to know of a tokenizer, from a list of the tokens' bytes."""

    def __init__(self, tokens, *, eos=None, eog=(), nl=None):
        self.tokens = list(tokens)
        self.n_vocab = len(self.tokens)
        self.eos_id = eos
        self.eog_ids = frozenset(eog) | (frozenset() if eos is None else frozenset({eos}))
        self.nl_id = nl

    def token_bytes(self, token):
        return self.tokens[token]

    def token_table(self):
        ends = np.cumsum([0, *(len(token) for token in self.tokens)])
        return b"".join(self.tokens), ends.astype(np.int32)
