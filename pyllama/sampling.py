"""From logits to a token: parameters, the chain of sampling steps, and the state that a sequence keeps between tokens.

The order of the steps and their arithmetic are those of llama.cpp's server of January 2024: logit bias, penalties,
grammar, then greedy (temperature <= 0), mirostat, or top-k, tail-free, typical, top-p, min-p, temperature and a seeded
draw. As with models, what is done is put together here and run in one call of the core: after a model's run Python's
and NumPy's code has been pushed out of the processor's caches, and a chain of small NumPy calls took several times as
long. This module knows nothing of models, batches or requests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from .core import call, failure, ffi, lib
from .grammar import Grammar, Matcher, token_trie

__all__ = ["Sample", "Sampler", "SamplingError", "SamplingParams", "Step", "Vocabulary", "make_chain"]

RANDOM_SEED = 0xFFFFFFFF
"""The seed, as 32 unsigned bits, that asks for a random one; -1 is the same."""
FLOAT32_MAX = float(np.finfo(np.float32).max)


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


# ---- the chain -----------------------------------------------------------------------------------


class Step(NamedTuple):
    """One link of a chain: what the core does with the candidates (``enum pl_sampling_step_kind``)."""

    kind: int
    value: float


def make_chain(params: SamplingParams) -> list[Step]:
    """The steps that do something for these parameters. The first one selects from the whole vocabulary.

    Without top-k, a selection takes the place of the step that would first cut the sorted vocabulary, so that not all of
    it need be sorted.
    """
    if params.temperature <= 0:
        return [Step(lib.PL_SELECT_TOP_K, max(params.n_probs, 1))]
    temperature = Step(lib.PL_TEMPERATURE, 0)
    if params.mirostat:
        select = lib.PL_SELECT_MIROSTAT_1 if params.mirostat == 1 else lib.PL_SELECT_MIROSTAT_2
        return [Step(select, 2 * params.mirostat_tau), temperature]
    steps = []
    if params.tfs_z < 1:
        steps.append(Step(lib.PL_KEEP_TAIL_FREE, params.tfs_z))
    if params.typical_p < 1:
        steps.append(Step(lib.PL_KEEP_TYPICAL, params.typical_p))
    if params.top_p < 1:
        steps.append(Step(lib.PL_KEEP_TOP_P, params.top_p))
    if params.min_p > 0:
        steps.append(Step(lib.PL_KEEP_MIN_P, params.min_p))
    if params.top_k > 0:
        return [Step(lib.PL_SELECT_TOP_K, params.top_k), *steps, temperature]
    selections = {lib.PL_KEEP_TOP_P: lib.PL_SELECT_TOP_P, lib.PL_KEEP_MIN_P: lib.PL_SELECT_MIN_P}
    if steps and steps[0].kind in selections:
        return [Step(selections[steps[0].kind], steps[0].value), *steps[1:], temperature]
    return [Step(lib.PL_SELECT_MIN_P, 0), *steps, temperature]


SMALLEST_TEMPERATURE = 1e-10
"""Already sends every difference between float32 logits beyond e^-700."""


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
        """The grammar permits nothing but the end: the next sample would be an end token, whatever the logits."""
        self._tokenizer = tokenizer
        self._n_vocab = tokenizer.n_vocab
        self._eog = np.array(sorted(tokenizer.eog_ids), np.int32)
        self._n_probs = min(params.n_probs, tokenizer.n_vocab)
        self._matcher: Matcher | None = Grammar.parse(params.grammar).matcher() if params.grammar else None
        seed = params.seed & RANDOM_SEED
        self._new_random = random.Random(None if seed == RANDOM_SEED else seed).random if params.temperature > 0 else _zero
        self._unused: list[float] = []
        """Random numbers that were taken and put back, the next one last."""
        self._core = ffi.new("pl_sampling *", {"n_vocab": tokenizer.n_vocab})
        if params.mirostat and params.temperature > 0:
            self._core.tau, self._core.eta = params.mirostat_tau, params.mirostat_eta
        self._error = ffi.new("pl_error *")
        self._set_biases()
        self._set_penalties(prompt_tokens, n_ctx)
        self._set_chain()

    def _set_biases(self) -> None:
        biases = {token: bias for token, bias in self.params.logit_bias if 0 <= token < self._n_vocab}
        if self.params.ignore_eos:
            biases.update(dict.fromkeys(self._tokenizer.eog_ids, -math.inf))
        self._biases = ffi.new("int32_t[]", list(biases)), ffi.new("float[]", list(biases.values()))
        self._core.n_biased = len(biases)
        self._core.biased, self._core.bias = self._biases

    def _set_penalties(self, prompt_tokens: Sequence[int], n_ctx: int) -> None:
        params = self.params
        size = n_ctx if params.repeat_last_n < 0 else min(params.repeat_last_n, n_ctx)
        n_window = size if params.penalizes else 0
        tokens = prompt_tokens if params.penalty_prompt is None else params.penalty_prompt
        recent = [token if 0 <= token < self._n_vocab else -1 for token in tokens[-size:]] if n_window else []
        self._window = ffi.new("int32_t[]", n_window)
        self._window[0 : len(recent)] = recent
        core = self._core
        core.recent, core.n_recent = self._window, len(recent)
        core.n_window, core.oldest = n_window, len(recent) % size if n_window else 0
        core.exempt = -1 if params.penalize_nl or self._tokenizer.nl_id is None else self._tokenizer.nl_id
        core.repeat, core.frequency, core.presence = (
            params.repeat_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )

    def _set_chain(self) -> None:
        chain, core = make_chain(self.params), self._core
        self._steps = ffi.new("pl_sampling_step[]", [tuple(step) for step in chain])
        room = self._n_vocab
        if chain[0].kind == lib.PL_SELECT_TOP_K:
            room = min(chain[0].value, room)
        self._candidates = np.empty(room, np.int32), np.empty((2, room), np.float64)
        core.steps, core.n_steps = self._steps, len(chain)
        core.temperature = max(self.params.temperature, SMALLEST_TEMPERATURE)
        core.room = room
        core.tokens = ffi.from_buffer("int32_t[]", self._candidates[0])
        core.logits = ffi.from_buffer("double[]", self._candidates[1][0])
        core.work = ffi.from_buffer("double[]", self._candidates[1][1])

    # ---- one token -------------------------------------------------------------------------------

    def sample(self, logits: np.ndarray, peaks: np.ndarray | None = None) -> Sample:
        """Chooses the next token and counts it as part of the sequence.

        Args:
            logits: float32 [n_vocab], contiguous; overwritten. NaN counts as -inf.
            peaks: what :attr:`Model.peaks` says of them, contiguous; overwritten.

        Raises:
            SamplingError: every token is banned, by its logit (-inf or NaN), a bias or the grammar.
            ValueError: the array is not as described.
        """
        if logits.dtype != np.float32 or logits.shape != (self._n_vocab,) or not logits.flags.carray:
            raise ValueError(f"logits must be a contiguous, writable float32 array of {self._n_vocab}")
        raw = logits.copy() if self._n_probs else None
        if self.finished:
            return self._end(raw)
        token = self._choose(lib.pl_sample, logits, ffi.NULL if peaks is None else ffi.from_buffer("float[]", peaks))
        if self._matcher is not None and not (token is not None and self._is_permitted(token)):
            self._ban_what_is_not_permitted(logits, self._matcher)
            token = self._choose(lib.pl_choose, logits)
            if token is None and self._matcher.can_end:
                return self._end(raw)  # the end is all that the grammar and the biases leave, and a bias bans that too
        if token is None:
            raise SamplingError(self.why_nothing())
        self._accept(token)
        return Sample(token) if raw is None else self._report(token, self._probs(logits), raw)

    @property
    def core(self) -> ffi.CData | None:
        """The ``pl_sampling *``, valid as long as this object, with which the core can choose several tokens on its own; None
        when choosing takes more: a grammar, or something that is told about each token."""
        return self._core if self._matcher is None and not self._n_probs else None

    def take_randoms(self, n: int) -> list[float]:
        """The random numbers for the next ``n`` tokens that the core chooses."""
        return [self._random() for _ in range(n)]

    def put_back(self, randoms: list[float]) -> None:
        """Returns what was not used of the last numbers taken."""
        self._unused += reversed(randoms)

    def _random(self) -> float:
        return self._unused.pop() if self._unused else self._new_random()

    def score(self, token: int, logits: np.ndarray) -> Sample:
        """What there is to tell of a token that was there anyway; nothing about the sequence changes. Needs ``n_probs``.

        Args:
            logits: float32 [n_vocab], contiguous.
        """
        return self._report(token, [], logits)

    def _choose(self, function: Callable[..., int], logits: np.ndarray, *peaks: ffi.CData) -> int | None:
        """Runs the chain and draws; None when there is nothing to draw."""
        core = self._core
        n = function(core, ffi.from_buffer("float[]", logits), *peaks, self._random(), self._error)
        if n < 0:
            raise failure(self._error)
        return core.tokens[core.chosen] if n else None

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

    def _accept(self, token: int) -> None:
        lib.pl_accept(self._core, token)
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
        return Sample(token) if raw is None else self._report(token, [(token, 1.0)], raw)

    def why_nothing(self) -> str:
        """The reason when there is no token to draw."""
        if self._matcher is not None:
            return "no token of the vocabulary can continue the text in the way that the grammar wants"
        return "no token can be drawn: every logit is -inf or not a number"

    # ---- what is told about it -------------------------------------------------------------------

    def _most_likely(self, logits: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The `n_probs` tokens with the largest logits, and these."""
        tokens, values = np.empty(self._n_probs, np.int32), np.empty(self._n_probs, np.float64)
        out = ffi.from_buffer("int32_t[]", tokens), ffi.from_buffer("double[]", values)
        n = call(lib.pl_top_k, ffi.from_buffer("float[]", logits), self._n_vocab, self._n_probs, *out)
        return tokens[:n].tolist(), values[:n]

    def _log_total(self, logits: np.ndarray) -> float:
        return lib.pl_log_sum_exp(ffi.from_buffer("float[]", logits), self._n_vocab, 1.0)

    def _probs(self, logits: np.ndarray) -> list[tuple[int, float]]:
        """The most likely candidates of the last choice; where the chain left fewer, the best of what it cut off."""
        core = self._core
        n = min(core.n_candidates, self._n_probs)
        # Greedy sampling selects only what is reported; the probabilities are those of the whole vocabulary.
        log_total = core.log_total if self.params.temperature > 0 else self._log_total(logits)
        tokens = self._candidates[0][:n].tolist()
        probs = np.exp(self._candidates[1][0][:n] - log_total).tolist()
        if n < self._n_probs:
            left = set(tokens)
            cut = [token for token in self._most_likely(logits)[0] if token not in left][: self._n_probs - n]
            tokens += cut
            probs += [0.0] * len(cut)
        return list(zip(tokens, probs))

    def _report(self, token: int, probs: list[tuple[int, float]], raw: np.ndarray) -> Sample:
        log_total = self._log_total(raw)
        tokens, values = self._most_likely(raw)
        logit = min(float(raw[token]), FLOAT32_MAX)
        logprob = logit - log_total if logit > -math.inf else -math.inf
        return Sample(token, tuple(probs), logprob, tuple(zip(tokens, (values - log_total).tolist())))


def _zero() -> float:
    """In place of a random number, for the best candidate."""
    return 0.0
