"""From logits to a token: parameters, the chain of sampling steps, and the state that a sequence keeps between tokens.

The order of the steps and their arithmetic are those of llama.cpp's server of January 2024: logit bias, penalties,
grammar, then greedy (temperature <= 0), mirostat, or top-k, tail-free, typical, top-p, min-p, temperature and a seeded
draw. Steps that look at the whole vocabulary are helpers of the core; the others are NumPy on a few dozen candidates.
This module knows nothing of models, batches or requests.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from .core import call, ffi, lib
from .grammar import Grammar, Matcher, token_trie

__all__ = ["Candidates", "Sample", "Sampler", "SamplingError", "SamplingParams", "Vocabulary", "make_chain"]

RANDOM_SEED = 0xFFFFFFFF
"""The seed, as 32 unsigned bits, that asks for a random one; -1 is the same."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
SMALLEST_TEMPERATURE = 1e-10
"""Already sends every difference between float32 logits beyond e^-700."""


class SamplingError(RuntimeError):
    """No token can be drawn; the message says why."""


class Vocabulary(Protocol):
    """What sampling wants to know of a tokenizer."""

    n_vocab: int
    nl_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]

    def token_bytes(self, token: int, /) -> bytes: ...

    def token_table(self) -> tuple[bytes, np.ndarray]: ...


# ---- parameters ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens. The defaults are the documented ones of llama.cpp's server.

    Raises:
        ValueError: names the field that has a wrong type, is out of range or is not a number.
    """

    temperature: float = 0.8
    """Divides the logits before the draw; <= 0 takes the most likely token."""
    top_k: int = 40
    """Only the k most likely tokens; <= 0: all."""
    top_p: float = 0.95
    """Only the most likely tokens whose probabilities sum to p; 1 disables."""
    min_p: float = 0.05
    """Only tokens at least p times as likely as the most likely one; 0 disables."""
    tfs_z: float = 1.0
    """Tail-free sampling; 1 disables."""
    typical_p: float = 1.0
    """Locally typical sampling; 1 disables."""
    repeat_penalty: float = 1.1
    """Divides positive logits of recent tokens and multiplies the others; 1 disables."""
    repeat_last_n: int = 64
    """Tokens that count as recent; 0: none, -1: as many as the context holds."""
    penalize_nl: bool = True
    """Whether penalties touch the newline token."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each recent token."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token is among the recent ones."""
    mirostat: int = 0
    """1 or 2: mirostat in that version, in place of the chain; 0: off."""
    mirostat_tau: float = 5.0
    """The surprise that mirostat aims at, in bits."""
    mirostat_eta: float = 0.1
    """Mirostat's learning rate."""
    seed: int = -1
    """Of the random numbers, modulo 2^32; -1 (4294967295): another one each time."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, bias) pairs, added to the logits; -inf bans a token. Tokens outside the vocabulary are ignored."""
    grammar: str = ""
    """GBNF; empty for none."""
    ignore_eos: bool = False
    """Never ends of itself."""
    n_probs: int = 0
    """How many candidates to report with each token."""
    penalty_prompt: tuple[int, ...] | None = None
    """Stands for the prompt when recent tokens are counted."""

    def __post_init__(self) -> None:
        for name in ("top_k", "repeat_last_n", "mirostat", "seed", "n_probs"):
            _check_integer(name, getattr(self, name))
        for name in ("penalize_nl", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name, low, high in (
            ("temperature", -math.inf, math.inf),
            ("top_p", 0.0, math.inf),
            ("min_p", 0.0, 1.0),
            ("tfs_z", 0.0, math.inf),
            ("typical_p", 0.0, math.inf),
            ("presence_penalty", -math.inf, math.inf),
            ("frequency_penalty", -math.inf, math.inf),
            ("mirostat_tau", 0.0, math.inf),
            ("mirostat_eta", 0.0, math.inf),
            ("repeat_penalty", 0.0, math.inf),
        ):
            _check_number(name, getattr(self, name), low, high)
        if self.repeat_penalty == 0:
            raise ValueError("repeat_penalty must be greater than 0")
        if self.repeat_last_n < -1:
            raise ValueError(f"repeat_last_n must be at least -1, not {self.repeat_last_n}")
        if self.mirostat not in (0, 1, 2):
            raise ValueError(f"mirostat must be 0, 1 or 2, not {self.mirostat}")
        if self.n_probs < 0:
            raise ValueError(f"n_probs must not be negative, but is {self.n_probs}")
        if not isinstance(self.grammar, str):
            raise ValueError(f"grammar must be a string, not {self.grammar!r}")
        if not isinstance(self.logit_bias, tuple):
            raise ValueError(f"logit_bias must be a tuple of (token, bias), not {self.logit_bias!r}")
        for pair in self.logit_bias:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"logit_bias must hold (token, bias) pairs, not {pair!r}")
            _check_integer("logit_bias: a token", pair[0])
            if pair[1] != -math.inf:
                _check_number(f"logit_bias of token {pair[0]}", pair[1], -math.inf, math.inf)
        if self.penalty_prompt is not None:
            if not isinstance(self.penalty_prompt, tuple):
                raise ValueError(f"penalty_prompt must be a tuple of tokens or None, not {self.penalty_prompt!r}")
            for token in self.penalty_prompt:
                _check_integer("penalty_prompt: a token", token)

    @property
    def penalizes(self) -> bool:
        """Whether any penalty changes anything."""
        neutral = self.repeat_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
        return self.repeat_last_n != 0 and not neutral


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, not {value!r}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} is out of range")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite number that float32 can hold")
    if not low <= value <= high:
        wanted = f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise ValueError(f"{name} must be {wanted}, not {value}")


# ---- candidates and the steps that thin them out -------------------------------------------------


class Candidates(NamedTuple):
    """Tokens that may be drawn, the most likely first."""

    tokens: np.ndarray
    """int32 [n]"""
    logits: np.ndarray
    """float64 [n], descending"""

    def first(self, n: int) -> Candidates:
        """The n most likely."""
        return Candidates(self.tokens[:n], self.logits[:n])

    def weights(self) -> np.ndarray:
        """Probabilities up to a common factor (float64 [n], the first is 1)."""
        return np.exp(self.logits - self.logits[0])

    def probabilities(self) -> np.ndarray:
        """Softmax over these candidates alone (float64 [n])."""
        weights = self.weights()
        return weights / weights.sum()


Select = Callable[[np.ndarray], Candidates]
"""The start of a chain: candidates from the logits of the whole vocabulary (float32 [n_vocab])."""
Step = Callable[[Candidates], Candidates]
"""A link of a chain: fewer candidates, or the same with other logits. Never leaves none of some."""


class _Selector:
    """The selections that the core makes, on buffers that are allocated once."""

    def __init__(self, n_vocab: int, n_candidates: int) -> None:
        self._n_vocab = n_vocab
        self._tokens = np.empty(n_candidates, np.int32)
        self._values = np.empty(n_candidates, np.float32)
        self._out = ffi.from_buffer("int32_t[]", self._tokens), ffi.from_buffer("float[]", self._values)

    def __call__(self, function: Callable[..., int], logits: np.ndarray, argument: float) -> Candidates:
        n = call(function, ffi.from_buffer("float[]", logits), self._n_vocab, argument, *self._out)
        return Candidates(self._tokens[:n], self._values[:n].astype(np.float64))


def select_top_k(n_vocab: int, k: int) -> Select:
    """The k most likely tokens (k >= 1)."""
    k = min(k, n_vocab)
    selector = _Selector(n_vocab, k)
    return lambda logits: selector(lib.pl_top_k, logits, k)


def select_nucleus(n_vocab: int, p: float) -> Select:
    """:func:`top_p` of the whole vocabulary, without sorting all of it."""
    selector = _Selector(n_vocab, n_vocab)
    return lambda logits: selector(lib.pl_nucleus, logits, p)


def select_min_p(n_vocab: int, p: float) -> Select:
    """:func:`min_p` of the whole vocabulary, without sorting all of it (p = 0: the whole vocabulary)."""
    selector = _Selector(n_vocab, n_vocab)
    margin = -math.log(p) if p > 0 else math.inf

    def select(logits: np.ndarray) -> Candidates:
        best = lib.pl_argmax(ffi.from_buffer("float[]", logits), n_vocab)
        floor = min(float(logits[best]), FLOAT32_MAX) - margin if best >= 0 else 0.0
        return selector(lib.pl_above, logits, floor)

    return select


def tail_free(z: float) -> Step:
    """Cuts the tail where the curve of sorted probabilities has flattened out (https://trentbrick.github.io/Tail-Free-Sampling)."""

    def step(c: Candidates) -> Candidates:
        if len(c.tokens) <= 2:
            return c
        curvature = np.abs(np.diff(c.probabilities(), 2))
        total = curvature.sum()
        share = curvature / total if total > 1e-6 else np.full(len(curvature), 1 / len(curvature))
        n = max(int(np.searchsorted(np.cumsum(share), z, side="right")), 1)
        return c.first(n) if n < len(share) else c

    return step


def typical(p: float) -> Step:
    """Keeps the tokens whose surprise is nearest to the expected one (Meister et al. 2022, https://arxiv.org/abs/2202.00666)."""

    def step(c: Candidates) -> Candidates:
        probabilities = c.probabilities()
        surprise = -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
        entropy = (probabilities * surprise).sum()
        order = np.argsort(np.abs(surprise - entropy), kind="stable")
        n = int(np.searchsorted(np.cumsum(probabilities[order]), p, side="right")) + 1
        kept = np.sort(order[:n])
        return Candidates(c.tokens[kept], c.logits[kept])

    return step


def top_p(p: float) -> Step:
    """Keeps the most likely tokens whose probabilities sum to p (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751)."""

    def step(c: Candidates) -> Candidates:
        cumulative = c.weights().cumsum()
        return c.first(int(cumulative.searchsorted(p * cumulative[-1])) + 1)

    return step


def min_p(p: float) -> Step:
    """Keeps tokens at least p times as likely as the most likely one."""
    margin = -math.log(p)

    def step(c: Candidates) -> Candidates:
        return c.first(int((-c.logits).searchsorted(margin - c.logits[0], side="right")))

    return step


def temperature(t: float) -> Step:
    """Divides the logits by t > 0. From the best one down, so that no difference gets lost in large numbers."""
    t = max(t, SMALLEST_TEMPERATURE)
    return lambda c: Candidates(c.tokens, (c.logits - c.logits[0]) / t)


def make_chain(params: SamplingParams, n_vocab: int) -> tuple[Select, list[Step]]:
    """The steps that do something for these parameters; the draw comes after them.

    Without top-k, a selection takes the place of the step that would first cut the sorted vocabulary.
    """
    steps = []
    if params.tfs_z < 1:
        steps.append(tail_free(params.tfs_z))
    if params.typical_p < 1:
        steps.append(typical(params.typical_p))
    needs_all = bool(steps)
    if params.top_p < 1:
        steps.append(top_p(params.top_p))
    if params.min_p > 0:
        steps.append(min_p(params.min_p))
    if params.top_k > 0:
        select = select_top_k(n_vocab, params.top_k)
    elif needs_all:
        select = select_min_p(n_vocab, 0.0)
    elif params.top_p < 1:
        select = select_nucleus(n_vocab, params.top_p)
        del steps[0]
    else:
        select = select_min_p(n_vocab, params.min_p)
        steps.clear()
    return select, [*steps, temperature(params.temperature)]


# ---- choosing a token ----------------------------------------------------------------------------


class Choice(NamedTuple):
    """A token among the candidates that were left."""

    index: int
    candidates: Candidates
    log_total: float
    """Log of the sum of e^logit over all that could have been chosen: what makes logits log-probabilities."""

    @property
    def token(self) -> int:
        return int(self.candidates.tokens[self.index])

    @property
    def surprise(self) -> float:
        """In bits."""
        return (self.log_total - float(self.candidates.logits[self.index])) / math.log(2)

    def probabilities(self, n: int) -> list[tuple[int, float]]:
        """The n most likely candidates with their probabilities."""
        best = self.candidates.first(n)
        return list(zip(best.tokens.tolist(), np.exp(best.logits - self.log_total).tolist(), strict=True))


def draw(c: Candidates, rng: random.Random) -> Choice:
    """A candidate, each as often as its probability says."""
    cumulative = c.weights().cumsum()
    total = float(cumulative[-1])
    index = int(cumulative.searchsorted(rng.random() * total, side="right"))
    # Rounding can turn random() * total, with random() < 1, into total.
    return Choice(min(index, len(c.tokens) - 1), c, float(c.logits[0]) + math.log(total))


class Chooser(Protocol):
    """A way to get from the adjusted logits of the whole vocabulary to one token."""

    def choose(self, logits: np.ndarray) -> Choice | None:
        """Proposes a token; None when there is no candidate."""
        ...

    def accept(self, choice: Choice) -> None:
        """Learns which proposal was taken."""
        ...


class Greedy:
    """The most likely token. The probabilities are those of the whole vocabulary."""

    def __init__(self, n_vocab: int, n_probs: int) -> None:
        self._n_vocab = n_vocab
        self._reports = n_probs > 0
        self._select = select_top_k(n_vocab, max(n_probs, 1))

    def choose(self, logits: np.ndarray) -> Choice | None:
        candidates = self._select(logits)
        if not len(candidates.tokens):
            return None
        total = lib.pl_log_sum_exp(ffi.from_buffer("float[]", logits), self._n_vocab, 1.0) if self._reports else 0.0
        return Choice(0, candidates, total)

    def accept(self, choice: Choice) -> None:
        """Nothing to learn."""


class Chain:
    """A draw from what the chain of :func:`make_chain` leaves."""

    def __init__(self, params: SamplingParams, n_vocab: int, rng: random.Random) -> None:
        self._select, self._steps = make_chain(params, n_vocab)
        self._rng = rng

    def choose(self, logits: np.ndarray) -> Choice | None:
        candidates = self._select(logits)
        if not len(candidates.tokens):
            return None
        for step in self._steps:
            candidates = step(candidates)
        return draw(candidates, self._rng)

    def accept(self, choice: Choice) -> None:
        """Nothing to learn."""


class Mirostat:
    """Mirostat (Basu et al. 2020, https://arxiv.org/abs/2007.14966): candidates are cut so that the surprise of what is
    drawn stays near tau bits. `mu`, the bound on surprise, is corrected after every token."""

    def __init__(self, params: SamplingParams, n_vocab: int, rng: random.Random) -> None:
        self._n_vocab = n_vocab
        self._temperature = max(params.temperature, SMALLEST_TEMPERATURE)
        self._scale = temperature(params.temperature)
        self._select = _Selector(n_vocab, n_vocab)
        self._rng = rng
        self._tau, self._eta = params.mirostat_tau, params.mirostat_eta
        self.mu = 2 * params.mirostat_tau

    def candidates(self, logits: np.ndarray) -> Candidates:
        """What may be drawn while mu is as it is."""
        raise NotImplementedError

    def choose(self, logits: np.ndarray) -> Choice | None:
        candidates = self.candidates(logits)
        return draw(self._scale(candidates), self._rng) if len(candidates.tokens) else None

    def accept(self, choice: Choice) -> None:
        self.mu -= self._eta * (choice.surprise - self._tau)


class Mirostat1(Mirostat):
    """Version 1: takes the distribution for Zipf's, estimates its exponent s from the 100 most likely tokens, and from
    s and mu the k of a top-k."""

    def candidates(self, logits: np.ndarray) -> Candidates:
        best = self._select(lib.pl_top_k, logits, 100)
        return self._select(lib.pl_top_k, logits, self._k(best.logits / self._temperature))

    def _k(self, logits: np.ndarray) -> int:
        if len(logits) < 2:
            return 1
        rank = np.arange(1, len(logits))
        t = np.log((rank + 1) / rank)
        s = float(-(t * np.diff(logits)).sum() / (t * t).sum())
        # k = (e 2^mu / (1 - N^-e))^(1/s) with e = s - 1, in logarithms; e / (1 - N^-e) tends to 1 / ln N for e = 0.
        log_n, e = math.log(self._n_vocab), s - 1
        ratio = -e / math.expm1(-e * log_n) if abs(e) > 1e-9 else 1 / log_n
        log_k_s = math.log(ratio) + self.mu * math.log(2)
        if log_k_s <= 0:
            return 1
        return int(math.exp(log_k_s / s)) if log_k_s < s * log_n else self._n_vocab


class Mirostat2(Mirostat):
    """Version 2: leaves out what would surprise by more than mu bits."""

    def candidates(self, logits: np.ndarray) -> Candidates:
        data = ffi.from_buffer("float[]", logits)
        best = lib.pl_argmax(data, self._n_vocab)
        log_total = lib.pl_log_sum_exp(data, self._n_vocab, 1 / self._temperature)
        floor = self._temperature * (log_total - self.mu * math.log(2))
        return self._select(lib.pl_above, logits, min(floor, float(logits[best])) if best >= 0 else 0.0)


def make_chooser(params: SamplingParams, n_vocab: int, rng: random.Random) -> Chooser:
    """The way of choosing that the parameters ask for."""
    if params.temperature <= 0:
        return Greedy(n_vocab, params.n_probs)
    if params.mirostat:
        return (Mirostat1 if params.mirostat == 1 else Mirostat2)(params, n_vocab, rng)
    return Chain(params, n_vocab, rng)


# ---- the sampler of a sequence -------------------------------------------------------------------


class Sample(NamedTuple):
    """A sampled token, and what was asked to be told about it."""

    token: int
    probs: tuple[tuple[int, float], ...] = ()
    """The `n_probs` most likely (token, probability) pairs of the distribution that was drawn from, best first.
    What the chain cut off has probability 0; what is banned is not listed."""
    logprob: float | None = None
    """Log-probability of the token by the model alone, before any bias, penalty or grammar (only with `n_probs`)."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The `n_probs` most likely (token, log-probability) pairs by the model alone, best first."""


class RecentTokens:
    """How often each token is among the last `size` ones, kept in arrays that the core reads."""

    def __init__(self, size: int, n_vocab: int, exempt: int | None, tokens: Sequence[int]) -> None:
        self._n_vocab = n_vocab
        self._exempt = exempt
        self._window: deque[int] = deque()
        self._size = size
        self._slots: dict[int, int] = {}
        self._tokens = ffi.new("int32_t[]", size)
        self._counts = ffi.new("int32_t[]", size)
        for token in tokens[-size:]:
            self.add(token)

    def add(self, token: int) -> None:
        """Appends a token; the oldest one leaves when there are more than `size`."""
        if len(self._window) == self._size:
            self._forget(self._window.popleft())
        self._window.append(token)
        if token == self._exempt or not 0 <= token < self._n_vocab:
            return
        slot = self._slots.setdefault(token, len(self._slots))
        self._tokens[slot] = token
        self._counts[slot] += 1

    def _forget(self, token: int) -> None:
        slot = self._slots.get(token)
        if slot is None:
            return
        self._counts[slot] -= 1
        if self._counts[slot] == 0:  # the last slot moves here, so that the used ones stay together
            del self._slots[token]
            last = len(self._slots)
            if slot != last:
                moved = self._tokens[last]
                self._slots[moved] = slot
                self._tokens[slot], self._counts[slot] = moved, self._counts[last]
                self._counts[last] = 0

    def penalize(self, logits: np.ndarray, params: SamplingParams) -> None:
        """Applies the repeat, frequency and presence penalties in place."""
        call(
            lib.pl_penalize,
            ffi.from_buffer("float[]", logits),
            self._n_vocab,
            self._tokens,
            self._counts,
            len(self._slots),
            params.repeat_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )


class Sampler:
    """Chooses the tokens of one sequence, and remembers what that takes: recent tokens, grammar, mirostat's mu, and the
    state of the random numbers.

    Not to be used from two threads at a time.

    Args:
        params: see :class:`SamplingParams`.
        tokenizer: of the model whose logits will come.
        prompt_tokens: what the sequence begins with.
        n_ctx: tokens that the context holds; no more count as recent.

    Raises:
        GrammarError: ``params.grammar`` is not a grammar.
    """

    def __init__(self, params: SamplingParams, tokenizer: Vocabulary, prompt_tokens: Sequence[int], n_ctx: int) -> None:
        self.params = params
        self.finished = False
        """The grammar permits nothing but the end: the next sample is an end token, whatever the logits."""
        self._tokenizer = tokenizer
        n_vocab = self._n_vocab = tokenizer.n_vocab
        self._eog = np.array(sorted(tokenizer.eog_ids), np.int32)
        bias = {token: value for token, value in params.logit_bias if 0 <= token < n_vocab}
        if params.ignore_eos:
            bias.update(dict.fromkeys(tokenizer.eog_ids, -math.inf))
        self._biased = np.array(list(bias.keys()), np.int32)
        self._bias = np.array(list(bias.values()), np.float32)
        self._recent = None
        if params.penalizes:
            size = n_ctx if params.repeat_last_n < 0 else min(params.repeat_last_n, n_ctx)
            tokens = prompt_tokens if params.penalty_prompt is None else params.penalty_prompt
            self._recent = RecentTokens(size, n_vocab, None if params.penalize_nl else tokenizer.nl_id, tokens)
        seed = params.seed & RANDOM_SEED
        self._chooser = make_chooser(params, n_vocab, random.Random(None if seed == RANDOM_SEED else seed))
        self._matcher: Matcher | None = Grammar.parse(params.grammar).matcher() if params.grammar else None
        self._n_probs = min(params.n_probs, n_vocab)
        self._most_likely = select_top_k(n_vocab, self._n_probs) if self._n_probs else None

    def sample(self, logits: np.ndarray) -> Sample:
        """Chooses the next token and counts it as part of the sequence.

        Args:
            logits: float32 [n_vocab], contiguous; overwritten. NaN counts as -inf.

        Raises:
            SamplingError: every token is banned, by its logit (-inf or NaN), a bias or the grammar.
            ValueError: the array is not as described.
        """
        if logits.dtype != np.float32 or logits.shape != (self._n_vocab,) or not logits.flags.carray:
            raise ValueError(f"logits must be a contiguous, writable float32 array of {self._n_vocab}")
        raw = logits.copy() if self._n_probs else None
        if self.finished:
            return self._end(raw)
        if len(self._biased):
            with np.errstate(invalid="ignore", over="ignore"):
                logits[self._biased] += self._bias
        if self._recent is not None:
            self._recent.penalize(logits, self.params)
        choice = self._chooser.choose(logits)
        if self._matcher is not None and not (choice and self._is_permitted(choice.token)):
            self._ban_what_is_not_permitted(logits, self._matcher)
            choice = self._chooser.choose(logits)
            if choice is None and self._matcher.can_end:
                return self._end(raw)  # the end is all that the grammar and the biases leave, and a bias bans that too
        if choice is None:
            raise SamplingError(self._why_nothing())
        self._accept(choice)
        return self._report(choice.token, self._probs(choice, logits), raw)

    def _is_permitted(self, token: int) -> bool:
        """Whether the grammar lets this token come next."""
        assert self._matcher is not None
        if token in self._tokenizer.eog_ids:
            return self._matcher.can_end
        text = self._tokenizer.token_bytes(token)
        return bool(text) and self._matcher.allows(text)

    def _ban_what_is_not_permitted(self, logits: np.ndarray, matcher: Matcher) -> None:
        ends = logits[self._eog]
        matcher.mask(token_trie(self._tokenizer), logits)
        logits[self._eog] = ends if matcher.can_end else -math.inf

    def _accept(self, choice: Choice) -> None:
        token = choice.token
        self._chooser.accept(choice)
        if self._recent is not None:
            self._recent.add(token)
        if self._matcher is not None:
            if token in self._tokenizer.eog_ids:
                self.finished = True
            else:
                self._matcher.accept(self._tokenizer.token_bytes(token))
                self.finished = self._matcher.must_end

    def _end(self, raw: np.ndarray | None) -> Sample:
        self.finished = True
        tokenizer = self._tokenizer
        if tokenizer.eos_id is None and not tokenizer.eog_ids:
            raise SamplingError("the grammar is complete, but the vocabulary has no token that says so")
        token = tokenizer.eos_id if tokenizer.eos_id is not None else min(tokenizer.eog_ids)
        return self._report(token, [(token, 1.0)], raw)

    def _why_nothing(self) -> str:
        if self._matcher is not None:
            return "no token of the vocabulary can continue the text in the way that the grammar wants"
        return "no token can be drawn: every logit is -inf or not a number"

    def _probs(self, choice: Choice, logits: np.ndarray) -> list[tuple[int, float]]:
        """The most likely candidates of a choice; where the chain left fewer, the best of what it cut off."""
        if self._most_likely is None:
            return []
        probs = choice.probabilities(self._n_probs)
        if len(probs) < self._n_probs:
            left = {token for token, _ in probs}
            cut = [token for token in self._most_likely(logits).tokens.tolist() if token not in left]
            probs += [(token, 0.0) for token in cut[: self._n_probs - len(probs)]]
        return probs

    def _report(self, token: int, probs: list[tuple[int, float]], raw: np.ndarray | None) -> Sample:
        if raw is None or self._most_likely is None:
            return Sample(token)
        log_total = lib.pl_log_sum_exp(ffi.from_buffer("float[]", raw), self._n_vocab, 1.0)
        best = self._most_likely(raw)
        top = zip(best.tokens.tolist(), (best.logits - log_total).tolist(), strict=True)
        logit = min(float(raw[token]), FLOAT32_MAX)
        logprob = logit - log_total if logit > -math.inf else -math.inf
        return Sample(token, tuple(probs), logprob, tuple(top))
