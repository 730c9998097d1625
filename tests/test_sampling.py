"""Sampling: the core's helpers, every step and the whole chain against plain re-implementations, draws against statistics."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama.core import CoreError, call, ffi, lib
from pyllama.grammar import GrammarError
from pyllama.sampling import Sampler, SamplingError, SamplingParams, Step, make_chain
from tests.vocabulary import Vocabulary

NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "temperature": 1.0}
"""Every step switched off."""


def vocabulary(n, **kwargs):
    return Vocabulary([b"t%d" % i for i in range(n)], **kwargs)


def random_logits(rng, n, spread=3.0):
    return (rng.standard_normal(n) * spread).astype(np.float32)


def sampler(n, prompt=(), n_ctx=512, **params):
    return Sampler(SamplingParams(**params), vocabulary(n, eos=0), prompt, n_ctx)


# ---- parameters ----------------------------------------------------------------------------------


def test_documented_defaults():
    p = SamplingParams()
    assert (p.temperature, p.top_k, p.top_p, p.min_p, p.tfs_z, p.typical_p) == (0.8, 40, 0.95, 0.05, 1.0, 1.0)
    assert (p.repeat_penalty, p.repeat_last_n, p.penalize_nl, p.presence_penalty, p.frequency_penalty) == (
        1.1,
        64,
        True,
        0.0,
        0.0,
    )
    assert (p.mirostat, p.mirostat_tau, p.mirostat_eta, p.seed, p.logit_bias, p.grammar) == (0, 5.0, 0.1, -1, (), "")
    assert (p.ignore_eos, p.n_probs, p.penalty_prompt) == (False, 0, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", None),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_k", 2**70),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("tfs_z", -1),
        ("typical_p", -1),
        ("repeat_penalty", 0),
        ("repeat_penalty", -1.0),
        ("repeat_last_n", -2),
        ("repeat_last_n", 1.0),
        ("penalize_nl", 1),
        ("presence_penalty", math.inf),
        ("frequency_penalty", "1"),
        ("mirostat", 3),
        ("mirostat", -1),
        ("mirostat_tau", -1.0),
        ("mirostat_eta", math.nan),
        ("seed", 1.0),
        ("seed", 2**64),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", ((1, 2.0, 3.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", ((1, math.inf),)),
        ("logit_bias", (("1", 0.0),)),
        ("grammar", None),
        ("ignore_eos", 0),
        ("n_probs", -1),
        ("penalty_prompt", [1]),
        ("penalty_prompt", ("1",)),
    ],
)
def test_wrong_parameters_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_disabling_values_are_accepted():
    SamplingParams(temperature=-1, top_k=-5, top_p=2, typical_p=1.5, tfs_z=7, min_p=0, repeat_last_n=-1, seed=-7)


def test_a_wrong_grammar_is_refused_when_the_sampler_is_made():
    with pytest.raises(GrammarError, match="line 1"):
        sampler(4, grammar="root ::= (")


# ---- the core's helpers --------------------------------------------------------------------------

special = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3.4e38, -3.4e38])
logit_values = st.one_of(special, st.floats(width=32), st.sampled_from([1.0, 2.0, 3.0]))


def as_float32(values):
    return np.array(values, np.float32)


def usable(logits):
    """Logits with what the core makes of them: (value, token), best first."""
    top = np.finfo(np.float32).max
    pairs = [(min(float(x), float(top)), i) for i, x in enumerate(logits) if x > -math.inf]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


class Core:
    """The core's side of a sampler, with buffers that are checked for writes beyond their end."""

    def __init__(self, steps, n, *, room=None, **fields):
        self.room = n if room is None else room
        self.tokens = np.full(self.room + 1, -7, np.int32)
        self.logits, self.work = np.full(self.room + 1, 77.0), np.full(self.room + 1, 78.0)
        self.steps = ffi.new("pl_sampling_step[]", steps)
        self.struct = ffi.new("pl_sampling *", {"temperature": 1.0, "exempt": -1, "repeat": 1.0, **fields})
        self.struct.n_vocab, self.struct.steps, self.struct.n_steps = n, self.steps, len(steps)
        self.struct.room, self.struct.tokens = self.room, ffi.from_buffer("int32_t[]", self.tokens)
        self.struct.logits = ffi.from_buffer("double[]", self.logits)
        self.struct.work = ffi.from_buffer("double[]", self.work)

    def run(self, logits, random=0.0):
        """[(logit, token)] of the candidates, which are the same with and without the logits' peaks"""
        copy, peaks = logits.copy(), peaks_of(logits)
        with_peaks = self._run(copy, ffi.from_buffer("float[]", peaks), random)
        chosen = self.struct.chosen
        assert self._run(logits, ffi.NULL, random) == with_peaks
        assert self.struct.chosen == chosen
        np.testing.assert_array_equal(copy, logits)
        np.testing.assert_array_equal(peaks, peaks_of(logits))
        return with_peaks

    def _run(self, logits, peaks, random):
        n = call(lib.pl_sample, self.struct, ffi.from_buffer("float[]", logits), peaks, random)
        assert (self.tokens[self.room], self.logits[self.room], self.work[self.room]) == (-7, 77, 78)
        return list(zip(self.logits[:n].tolist(), self.tokens[:n].tolist()))


def peaks_of(logits):
    """The largest of each PL_PEAK_LOGITS logits, as a model's run notes them."""
    whole = np.full((-(-len(logits) // lib.PL_PEAK_LOGITS), lib.PL_PEAK_LOGITS), -math.inf, np.float32)
    whole.reshape(-1)[: len(logits)] = np.where(np.isnan(logits), -math.inf, logits)
    return whole.max(axis=1, initial=-math.inf)


def selected(kind, logits, value):
    """[(logit, token)] that a selection takes"""
    return Core([(kind, value)], len(logits)).run(logits) if len(logits) else []


def top_k(logits, k):
    n = min(k, len(logits))
    tokens, values = np.full(n + 1, -7, np.int32), np.full(n + 1, 77.0)
    out = ffi.from_buffer("int32_t[]", tokens), ffi.from_buffer("double[]", values)
    count = call(lib.pl_top_k, ffi.from_buffer("float[]", logits), len(logits), k, *out)
    assert (tokens[n], values[n]) == (-7, 77)
    return list(zip(values[:count].tolist(), tokens[:count].tolist()))


@given(st.lists(logit_values, max_size=300), st.integers(1, 310))
@settings(max_examples=200, deadline=None)
def test_top_k_of_odd_values(values, k):
    logits = as_float32(values)
    assert top_k(logits, k) == usable(logits)[:k]
    assert selected(lib.PL_SELECT_TOP_K, logits, k) == usable(logits)[:k]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 4096, 50_000, 262_144])
@pytest.mark.parametrize("kind", ["normal", "equal", "ascending", "descending", "few values", "peaks"])
def test_top_k_of_whole_vocabularies(n, kind):
    rng = np.random.default_rng(n)
    logits = {
        "normal": lambda: random_logits(rng, n),
        "equal": lambda: np.full(n, 1.5, np.float32),
        "ascending": lambda: np.arange(n, dtype=np.float32),
        "descending": lambda: -np.arange(n, dtype=np.float32),
        "few values": lambda: rng.integers(0, 5, n).astype(np.float32),
        "peaks": lambda: np.where(rng.random(n) < 0.001, 1e4, -1e4).astype(np.float32),
    }[kind]()
    order = np.argsort(-logits, kind="stable")
    for k in (1, 2, 40, 255, 256, 257, 1000, n):
        found = top_k(logits, k)
        assert [token for _, token in found] == order[:k].tolist()
        assert [value for value, _ in found] == logits[order[:k]].tolist()


@given(st.lists(logit_values, max_size=300), st.one_of(st.just(0.0), st.floats(1e-6, 1)))
@settings(max_examples=200, deadline=None)
def test_min_p_of_odd_values(values, p):
    logits = as_float32(values)
    expected = usable(logits)
    if p > 0 and expected:
        floor = np.float32(expected[0][0] + math.log(p))
        expected = [pair for pair in expected if pair[0] >= floor]
    assert selected(lib.PL_SELECT_MIN_P, logits, p) == expected


def test_everything_sorted():
    logits = random_logits(np.random.default_rng(1), 20_000)
    order = np.argsort(-logits, kind="stable")
    assert [token for _, token in selected(lib.PL_SELECT_MIN_P, logits, 0)] == order.tolist()


@pytest.mark.parametrize("n", [1, 5, 64, 1000, 49_152])
@pytest.mark.parametrize("scale", [1.0, 0.25, 10.0])
def test_log_sum_exp(n, scale):
    logits = random_logits(np.random.default_rng(n), n, 8)
    exact = np.logaddexp.reduce(logits.astype(np.float64) * scale)
    found = lib.pl_log_sum_exp(ffi.from_buffer("float[]", logits), n, scale)
    assert found == pytest.approx(exact, abs=2e-6)


def test_log_sum_exp_of_odd_values():
    def of(*values):
        logits = as_float32(values)
        return lib.pl_log_sum_exp(ffi.from_buffer("float[]", logits), len(logits), 1.0)

    assert of() == of(math.nan) == of(-math.inf, math.nan) == -math.inf
    assert of(1.0, -math.inf, math.nan) == pytest.approx(1.0)
    assert of(-1e30, 2.0, -87.5, -300.0) == pytest.approx(2.0)
    assert of(math.inf, math.inf, 0.0) == pytest.approx(float(np.finfo(np.float32).max))


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0.01, 30), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_nucleus(n, p, spread, seed):
    logits = random_logits(np.random.default_rng(seed), n, spread)
    found = selected(lib.PL_SELECT_TOP_P, logits, p)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits[order].astype(np.float64) - logits[order[0]])
    cumulative = np.cumsum(weights) / weights.sum()
    assert [token for _, token in found] == order[: len(found)].tolist()
    assert cumulative[len(found) - 1] >= p - 1e-6
    assert len(found) == 1 or cumulative[len(found) - 2] < p + 1e-6


@pytest.mark.parametrize(
    ("steps", "fields", "message"),
    [
        ([], {}, "wants a vocabulary, steps"),
        ([(lib.PL_TEMPERATURE, 0)], {}, "cannot begin"),
        ([(99, 0)], {}, "cannot begin"),
        ([(lib.PL_SELECT_TOP_K, 2), (lib.PL_SELECT_TOP_K, 2)], {}, "cannot go on"),
        ([(lib.PL_SELECT_TOP_K, 2), (-1, 2)], {}, "cannot go on"),
        ([(lib.PL_SELECT_TOP_K, 0)], {}, "k >= 1"),
        ([(lib.PL_SELECT_TOP_K, 2)], {"room": 1}, "room for 1"),
        ([(lib.PL_SELECT_TOP_P, 0.5)], {"room": 2}, "room for 2"),
        ([(lib.PL_SELECT_TOP_K, 2)], {"temperature": 0.0}, "temperature above 0"),
        ([(lib.PL_SELECT_TOP_K, 2)], {"temperature": math.nan}, "temperature above 0"),
    ],
)
def test_wrong_chains_are_refused(steps, fields, message):
    with pytest.raises(CoreError, match=message):
        Core(steps, 3, **fields).run(np.zeros(3, np.float32))


def test_other_nonsense_is_refused():
    core = Core([(lib.PL_SELECT_TOP_K, 1)], 3, n_biased=1)
    for token in (-1, 3):
        biased, bias = ffi.new("int32_t[]", [token]), ffi.new("float[]", [1.0])
        core.struct.biased, core.struct.bias = biased, bias
        with pytest.raises(CoreError, match="not in the vocabulary"):
            core.run(np.zeros(3, np.float32))
    out = ffi.new("int32_t[2]"), ffi.new("double[2]")
    with pytest.raises(CoreError, match="k >= 1"):
        call(lib.pl_top_k, ffi.new("float[2]"), 2, 0, *out)
    with pytest.raises(CoreError, match="negative"):
        call(lib.pl_top_k, ffi.new("float[2]"), -1, 1, *out)


# ---- plain re-implementations of the steps -------------------------------------------------------
# Candidates are lists of (token, logit), as the papers and llama.cpp's server have them: softmax anew before each step.


def softmax(candidates):
    top = max(logit for _, logit in candidates)
    weights = [math.exp(logit - top) for _, logit in candidates]
    return [w / sum(weights) for w in weights]


def plain_sorted(logits):
    return sorted(enumerate(map(float, logits)), key=lambda c: (-c[1], c[0]))


def plain_top_k(candidates, k):
    return candidates[:k] if k > 0 else candidates


def plain_tail_free(candidates, z):
    if z >= 1 or len(candidates) <= 2:
        return candidates
    p = softmax(candidates)
    first = [a - b for a, b in zip(p, p[1:], strict=False)]
    second = [abs(a - b) for a, b in zip(first, first[1:], strict=False)]
    total = sum(second)
    second = [s / total for s in second] if total > 1e-6 else [1 / len(second)] * len(second)
    running = 0.0
    for i, share in enumerate(second):
        running += share
        if running > z and i >= 1:
            return candidates[:i]
    return candidates


def plain_typical(candidates, p):
    if p >= 1:
        return candidates
    probabilities = softmax(candidates)
    entropy = -sum(q * math.log(q) for q in probabilities if q > 0)
    shift = [abs(-math.log(max(q, 5e-324)) - entropy) for q in probabilities]
    running, kept = 0.0, []
    for i in sorted(range(len(candidates)), key=lambda i: shift[i]):
        kept.append(i)
        running += probabilities[i]
        if running > p:
            break
    return [candidates[i] for i in sorted(kept)]


def plain_top_p(candidates, p):
    if p >= 1:
        return candidates
    running = 0.0
    for i, q in enumerate(softmax(candidates)):
        running += q
        if running >= p:
            return candidates[: i + 1]
    return candidates


def plain_min_p(candidates, p):
    if p <= 0:
        return candidates
    floor = candidates[0][1] + math.log(p)
    return [c for i, c in enumerate(candidates) if i == 0 or c[1] >= floor]


def plain_chain(logits, params):
    """{token: probability} of the draw."""
    candidates = plain_top_k(plain_sorted(logits), params.top_k)
    candidates = plain_tail_free(candidates, params.tfs_z)
    candidates = plain_typical(candidates, params.typical_p)
    candidates = plain_top_p(candidates, params.top_p)
    candidates = plain_min_p(candidates, params.min_p)
    probabilities = softmax([(token, logit / params.temperature) for token, logit in candidates])
    return {token: p for (token, _), p in zip(candidates, probabilities, strict=True)}


def plain_penalties(logits, recent, params, nl=None):
    adjusted = [float(x) for x in logits]
    for token, count in Counter(recent).items():
        if not 0 <= token < len(adjusted) or (token == nl and not params.penalize_nl):
            continue
        x = adjusted[token]
        x = x * params.repeat_penalty if x <= 0 else x / params.repeat_penalty
        adjusted[token] = x - count * params.frequency_penalty - params.presence_penalty
    return adjusted


def distribution_of(params, logits, **kwargs):
    """{token: probability} that a sampler reports."""
    asked = SamplingParams(**{**params, "n_probs": len(logits), "seed": 1})
    found = Sampler(asked, vocabulary(len(logits), eos=0, **kwargs), (), 512).sample(np.array(logits, np.float32))
    return {token: p for token, p in found.probs if p > 0}


def assert_same_distribution(found, expected, slack=0):
    """Equal, but for `slack` candidates at the edge of a cut that rounding may move, and for probabilities next to 0."""
    found, expected = ({token: p for token, p in d.items() if p > 1e-300} for d in (found, expected))
    assert len(set(found) ^ set(expected)) <= slack
    if set(found) == set(expected):
        for token, p in expected.items():
            assert found[token] == pytest.approx(p, rel=1e-5, abs=1e-12)


# ---- the chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.0},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"tfs_z": 0.5},
        {"tfs_z": 0.95},
        {"tfs_z": 0.0},
        {"typical_p": 0.5},
        {"typical_p": 0.0},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"top_k": 50, "tfs_z": 0.9, "typical_p": 0.8, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7},
    ],
    ids=str,
)
def test_each_step_against_its_plain_form(params):
    rng = np.random.default_rng(3)
    for n in (1, 2, 3, 4, 10, 200):
        logits = random_logits(rng, n)
        wanted = {**NEUTRAL, **params}
        expected = plain_chain(logits, SamplingParams(**wanted))
        assert_same_distribution(distribution_of(wanted, logits), expected)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 400),
    spread=st.floats(0.1, 12),
    params=st.fixed_dictionaries(
        {
            "temperature": st.floats(0.05, 3),
            "top_k": st.integers(-1, 60),
            "top_p": st.floats(0.01, 1.2),
            "min_p": st.floats(0, 0.9),
            "tfs_z": st.one_of(st.just(1.0), st.floats(0.05, 1.2)),
            "typical_p": st.one_of(st.just(1.0), st.floats(0.05, 1.2)),
            "repeat_penalty": st.just(1.0),
        }
    ),
)
@settings(max_examples=200, deadline=None)
def test_whole_chains_against_their_plain_form(seed, n, spread, params):
    logits = random_logits(np.random.default_rng(seed), n, spread)
    expected = plain_chain(logits, SamplingParams(**params))
    assert_same_distribution(distribution_of(params, logits), expected, slack=1)


def test_only_steps_that_do_something_are_in_the_chain():
    def chain(**params):
        return make_chain(SamplingParams(**{**NEUTRAL, **params}))

    temperature = Step(lib.PL_TEMPERATURE, 0)
    assert chain(top_k=5) == [(lib.PL_SELECT_TOP_K, 5), temperature]
    assert chain() == [(lib.PL_SELECT_MIN_P, 0), temperature]
    assert chain(min_p=0.1) == [(lib.PL_SELECT_MIN_P, 0.1), temperature]
    assert chain(top_p=0.9, min_p=0.1) == [(lib.PL_SELECT_TOP_P, 0.9), (lib.PL_KEEP_MIN_P, 0.1), temperature]
    assert chain(temperature=0, top_p=0.9, mirostat=2, n_probs=3) == [(lib.PL_SELECT_TOP_K, 3)]
    assert chain(mirostat=1, top_k=5) == [(lib.PL_SELECT_MIROSTAT_1, 10.0), temperature]
    kinds = [step.kind for step in chain(top_k=9, tfs_z=0.9, typical_p=0.9, top_p=0.9, min_p=0.1)]
    assert kinds == [
        lib.PL_SELECT_TOP_K,
        lib.PL_KEEP_TAIL_FREE,
        lib.PL_KEEP_TYPICAL,
        lib.PL_KEEP_TOP_P,
        lib.PL_KEEP_MIN_P,
        lib.PL_TEMPERATURE,
    ]


# ---- penalties and biases ------------------------------------------------------------------------


@pytest.mark.parametrize("n_recent", [0, 1, 5, 255, 256, 257, 5000])
def test_recent_tokens_are_counted(n_recent):
    """With a repeat penalty of 1 and a frequency penalty of 1, counts can be read off the logits."""
    rng = np.random.default_rng(n_recent)
    tokens = rng.integers(-1, 320, n_recent).tolist()
    recent = ffi.new("int32_t[]", tokens)
    core = Core([(lib.PL_SELECT_TOP_K, 1)], 300, n_recent=n_recent, recent=recent, exempt=3, frequency=1.0)
    logits = np.zeros(300, np.float32)
    core.run(logits)
    expected = Counter(t for t in tokens if t != 3 and 0 <= t < 300)
    assert {t: -int(x) for t, x in enumerate(logits) if x} == expected


@pytest.mark.parametrize(
    "params",
    [
        {"repeat_penalty": 1.3},
        {"repeat_penalty": 0.7},
        {"presence_penalty": 0.7},
        {"frequency_penalty": -0.4},
        {"repeat_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"repeat_penalty": 1.2, "presence_penalty": 0.5, "penalize_nl": False},
        {"repeat_penalty": 1.2, "repeat_last_n": 3},
        {"repeat_penalty": 1.2, "repeat_last_n": 0},
        {"repeat_penalty": 1.2, "repeat_last_n": -1},
        {"repeat_penalty": 1.2, "repeat_last_n": 10**9},
        {"repeat_penalty": 1.2, "penalty_prompt": (7, 7, 2)},
        {"repeat_penalty": 1.2, "penalty_prompt": ()},
        {"repeat_penalty": 1.2, "penalty_prompt": (10**6, -5, 4)},
    ],
    ids=str,
)
def test_penalties_over_a_sequence(params):
    """Of prompt and generated tokens, the last repeat_last_n count."""
    rng = np.random.default_rng(5)
    n, n_ctx, nl = 30, 20, 4
    prompt = rng.integers(0, n, 25).tolist()
    wanted = SamplingParams(**{**NEUTRAL, **params, "n_probs": n, "seed": 3})
    sampling = Sampler(wanted, vocabulary(n, nl=nl), prompt, n_ctx)
    history = list(prompt if wanted.penalty_prompt is None else wanted.penalty_prompt)
    last_n = {-1: n_ctx}.get(wanted.repeat_last_n, min(wanted.repeat_last_n, n_ctx))
    for _ in range(40):
        logits = random_logits(rng, n)
        recent = history[-last_n:] if last_n else []
        expected = plain_chain(plain_penalties(logits, recent, wanted, nl), wanted)
        found = sampling.sample(logits)
        assert_same_distribution(dict(found.probs), expected)
        history.append(found.token)


def test_logit_bias():
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    biased = distribution_of({**NEUTRAL, "logit_bias": ((0, 2.5), (2, -math.inf), (99, 5.0), (-1, 1.0))}, logits)
    assert_same_distribution(biased, plain_chain([3.5, 2.0], SamplingParams(**NEUTRAL)))


def test_the_last_bias_of_a_token_counts():
    biased = distribution_of({**NEUTRAL, "logit_bias": ((0, -math.inf), (0, 1.0))}, np.zeros(2, np.float32))
    assert biased[0] == pytest.approx(math.e / (1 + math.e))


def test_biases_come_before_penalties():
    params = SamplingParams(**{**NEUTRAL, "repeat_penalty": 2.0, "logit_bias": ((0, 6.0),), "n_probs": 2})
    found = Sampler(params, vocabulary(2), [0], 10).sample(np.array([-2.0, 0.0], np.float32))
    assert dict(found.probs)[0] == pytest.approx(math.exp(2) / (1 + math.exp(2)))  # (-2 + 6) / 2


def test_ignore_eos_bans_every_end_token():
    words = Vocabulary([b"a", b"", b"", b"b"], eos=1, eog=[2])
    for seed in range(50):
        sampling = Sampler(SamplingParams(ignore_eos=True, seed=seed), words, (), 10)
        assert sampling.sample(np.array([0, 9, 9, 0], np.float32)).token in (0, 3)


# ---- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0])
def test_greedy(temperature):
    rng = np.random.default_rng(9)
    sampling = sampler(1000, temperature=temperature, repeat_penalty=1.0, mirostat=2)
    for _ in range(20):
        logits = random_logits(rng, 1000)
        best = int(logits.argmax())
        assert sampling.sample(logits).token == best


def test_greedy_probabilities_are_those_of_the_whole_vocabulary():
    logits = random_logits(np.random.default_rng(9), 1000)
    expected = plain_chain(logits, SamplingParams(**NEUTRAL))
    found = sampler(1000, temperature=0, repeat_penalty=1.0, n_probs=4).sample(logits.copy())
    assert [token for token, _ in found.probs] == np.argsort(-logits)[:4].tolist()
    assert [p for _, p in found.probs] == pytest.approx([expected[token] for token, _ in found.probs], rel=1e-5)


# ---- draws ---------------------------------------------------------------------------------------


def draws(params, logits, count, n=None):
    sampling = sampler(len(logits), **params)
    return [sampling.sample(np.array(logits, np.float32)).token for _ in range(count)]


def test_a_seed_determines_the_draws():
    logits = random_logits(np.random.default_rng(2), 100, 1)
    first = draws({"seed": 42}, logits, 50)
    assert first == draws({"seed": 42}, logits, 50)
    assert first == draws({"seed": 42 + 2**32}, logits, 50)
    assert first == draws({"seed": 42, "n_probs": 5}, logits, 50)
    assert first != draws({"seed": 43}, logits, 50)
    assert draws({"seed": -2}, logits, 50) == draws({"seed": 2**32 - 2}, logits, 50)


@pytest.mark.parametrize("seed", [-1, 4294967295])
def test_random_seeds(seed):
    logits = np.zeros(1000, np.float32)
    params = {**NEUTRAL, "seed": seed}
    assert draws(params, logits, 20) != draws(params, logits, 20)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"typical_p": 0.7}, {"min_p": 0.1, "temperature": 2.0}],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    """Chi-square of 20,000 draws, at a level that a right sampler misses once in 10,000."""
    logits = random_logits(np.random.default_rng(11), 30, 1.5)
    wanted = {**NEUTRAL, **params}
    expected = plain_chain(logits, SamplingParams(**wanted))
    count = 20_000
    observed = Counter(draws({**wanted, "seed": 7}, logits, count))
    assert set(observed) <= set(expected)
    chi_square = sum((observed[t] - count * p) ** 2 / (count * p) for t, p in expected.items())
    freedom = len(expected) - 1
    # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal.
    deviation = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(deviation) < 3.9


# ---- mirostat ------------------------------------------------------------------------------------


def plain_mirostat1_candidates(logits, params, mu):
    candidates = [(token, logit / params.temperature) for token, logit in plain_sorted(logits)]
    p = softmax(candidates)
    above = below = 0.0
    for i in range(min(99, len(p) - 1)):
        t, b = math.log((i + 2) / (i + 1)), math.log(p[i] / p[i + 1])
        above += t * b
        below += t * t
    s = above / below
    e = s - 1
    k = (e * 2**mu / (1 - len(logits) ** -e)) ** (1 / s)
    return candidates[: max(1, int(min(k, len(logits))))]


def plain_mirostat2_candidates(logits, params, mu):
    candidates = [(token, logit / params.temperature) for token, logit in plain_sorted(logits)]
    kept = [c for c, p in zip(candidates, softmax(candidates), strict=True) if -math.log2(p) <= mu]
    return kept or candidates[:1]


def mu_of(sampling):
    return sampling._steps[0].value


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("settings_", [{}, {"temperature": 1.7, "mirostat_tau": 2.0, "mirostat_eta": 0.3}], ids=str)
def test_mirostat_against_its_plain_form(version, settings_):
    rng = np.random.default_rng(13)
    n = 300
    params = SamplingParams(mirostat=version, seed=5, repeat_penalty=1.0, n_probs=n, **settings_)
    sampling = Sampler(params, vocabulary(n), (), 100)
    plain = plain_mirostat1_candidates if version == 1 else plain_mirostat2_candidates
    mu = 2 * params.mirostat_tau
    for _ in range(60):
        logits = random_logits(rng, n, 2)
        candidates = plain(logits, params, mu)
        found = sampling.sample(logits)
        expected = {token: p for (token, _), p in zip(candidates, softmax(candidates), strict=True)}
        assert_same_distribution({t: p for t, p in found.probs if p > 0}, expected, slack=1)
        mu -= params.mirostat_eta * (-math.log2(dict(found.probs)[found.token]) - params.mirostat_tau)
        assert mu_of(sampling) == pytest.approx(mu, rel=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_keeps_the_surprise_near_tau(version):
    """On a distribution like Zipf's, the mean surprise among the kept candidates comes to tau."""
    logits = (-1.1 * np.log(np.arange(1, 5001))).astype(np.float32)
    params = SamplingParams(
        mirostat=version, mirostat_tau=3.0, seed=1, temperature=1.0, repeat_penalty=1.0, n_probs=5000
    )
    sampling = Sampler(params, vocabulary(5000), (), 100)
    surprises = []
    for _ in range(400):
        found = sampling.sample(logits.copy())
        surprises.append(-math.log2(dict(found.probs)[found.token]))
    assert np.mean(surprises[100:]) == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "logits",
    [[1.0], [1.0, 1.0], [0.0] * 50, [3.4e38, -3.4e38], [math.inf, 0.0, math.nan], [5.0, -math.inf], [1e-3] * 2 + [0]],
    ids=str,
)
def test_mirostat_on_odd_logits(version, logits):
    for mu in (-1e30, 0.0, 10.0, 1e30):
        sampling = sampler(len(logits), mirostat=version, mirostat_eta=1.0, seed=1)
        sampling._steps[0].value = mu
        for _ in range(3):
            assert logits[sampling.sample(np.array(logits, np.float32)).token] > -math.inf
            assert math.isfinite(mu_of(sampling))


# ---- what is reported ----------------------------------------------------------------------------


def test_reported_probabilities_are_those_of_the_draw_then_what_was_cut():
    logits = np.array([0.0, 5.0, 4.9, 1.0, -math.inf, 4.0], np.float32)
    found = sampler(6, top_k=2, repeat_penalty=1.0, temperature=1.0, n_probs=4, seed=1).sample(logits)
    p = 1 / (1 + math.exp(-0.1))
    assert [token for token, _ in found.probs] == [1, 2, 5, 3]
    assert [p for _, p in found.probs] == pytest.approx([p, 1 - p, 0, 0], rel=1e-5)
    everything = sampler(6, repeat_penalty=1.0, n_probs=100).sample(logits)
    assert {token for token, _ in everything.probs} == {0, 1, 2, 3, 5}


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"mirostat": 2}, {"top_k": 0}], ids=str)
def test_logprobs_are_the_models_own(params):
    logits = random_logits(np.random.default_rng(17), 500)
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    prompt = np.argsort(-logits)[:20].tolist()
    bias = ((prompt[0], -math.inf), (prompt[30 % 20], 3.0))
    found = sampler(500, prompt, n_probs=5, logit_bias=bias, seed=1, **params).sample(logits.copy())
    assert found.logprob == pytest.approx(exact[found.token], abs=1e-5)
    assert [token for token, _ in found.top_logprobs] == np.argsort(-exact)[:5].tolist()
    assert [p for _, p in found.top_logprobs] == pytest.approx(np.sort(exact)[::-1][:5].tolist(), abs=1e-5)


def test_nothing_is_reported_unless_asked_for():
    found = sampler(10).sample(np.zeros(10, np.float32))
    assert (found.probs, found.logprob, found.top_logprobs) == ((), None, ())


# ---- odd logits ----------------------------------------------------------------------------------

EVERY_WAY = [
    {},
    {"temperature": 0},
    {"mirostat": 1},
    {"mirostat": 2},
    {"top_k": 0},
    {"top_k": 0, "top_p": 1.0},
    NEUTRAL,
]
EVERY_WAY += [
    {"tfs_z": 0.5, "typical_p": 0.5},
    {"temperature": 1e-30},
    {"temperature": 1e30},
    {"grammar": "root ::= .+"},
]


@pytest.mark.parametrize("params", EVERY_WAY, ids=str)
def test_logits_that_are_not_numbers_are_never_chosen(params):
    for odd in ([math.nan, 1.0, -math.inf, 2.0], [math.inf, math.nan, 0.0, math.inf], [3.4e38, -3.4e38, math.nan, 0.0]):
        for n_probs in (0, 3):
            sampling = sampler(4, n_probs=n_probs, seed=1, **params)
            for _ in range(20):
                found = sampling.sample(as_float32(odd))
                assert odd[found.token] > -math.inf
                assert all(0 <= p <= 1 + 1e-9 for _, p in found.probs)


@pytest.mark.parametrize("params", EVERY_WAY, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nothing_to_choose_from_is_an_error(params, value):
    with pytest.raises(SamplingError, match="no token"):
        sampler(5, n_probs=2, **params).sample(np.full(5, value, np.float32))


@given(st.lists(logit_values, min_size=1, max_size=80), st.sampled_from(EVERY_WAY), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_any_logits_give_a_token_or_a_clear_error(values, params, n_probs):
    logits = as_float32(values)
    sampling = sampler(len(values), prompt=[0], n_probs=n_probs, seed=1, **params)
    for _ in range(3):
        try:
            assert 0 <= sampling.sample(logits.copy()).token < len(values)
        except SamplingError:
            # The grammar wants something before the end; the penalty can take what is below -3e38 to -inf.
            candidates = logits[1:] if "grammar" in params else logits
            assert not any(value > -3e38 for value, _ in usable(candidates))


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros(5, np.float64),
        np.zeros(4, np.float32),
        np.zeros((1, 5), np.float32),
        np.zeros(10, np.float32)[::2],
        np.frombuffer(bytes(20), np.float32),
    ],
)
def test_arrays_of_another_kind_are_refused(logits):
    with pytest.raises(ValueError, match="float32"):
        sampler(5).sample(logits)


# ---- with a grammar ------------------------------------------------------------------------------

WORDS = [b"", b"a", b"b", b"ab", b"ba", b"c", b"\xc3", b"\xa9", b"aa", b""]  # 0 ends, 9 is a control token


def words(**kwargs):
    return Vocabulary(WORDS, eos=0, eog=[9], **kwargs)


def generate(params, logits, limit=30, vocabulary=None):
    sampling = Sampler(SamplingParams(**params), vocabulary or words(), (), 100)
    tokens = []
    while len(tokens) < limit:
        tokens.append(sampling.sample(np.array(logits, np.float32)).token)
        if sampling.finished:
            break
    return tokens, sampling


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_grammar_rules_over_the_logits(temperature):
    liked = [9, 0, 0, 0, 0, 8, 0, 0, 0, 9]  # the end, and c
    for seed in range(20):
        tokens, sampling = generate(
            {"grammar": 'root ::= "a" "b" "a"', "seed": seed, "temperature": temperature}, liked
        )
        assert b"".join(WORDS[t] for t in tokens) == b"aba"
        assert sampling.finished
        assert sampling.sample(np.array(liked, np.float32)).token == 0


def test_the_end_is_drawn_where_the_grammar_allows_it():
    tokens, sampling = generate({"grammar": 'root ::= "a"+', "temperature": 0}, [5, 1, 9, 0, 0, 0, 0, 0, 2, 4])
    assert [WORDS[t] for t in tokens] == [b"aa", b""]
    assert tokens[-1] == 0
    assert sampling.finished


def test_characters_split_over_tokens():
    tokens, _ = generate({"grammar": 'root ::= "é"', "temperature": 0}, [9, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert tokens == [6, 7]


def test_draws_under_a_grammar_follow_the_distribution_of_what_it_allows():
    logits = [0.0, 1.0, 2.0, 0.5, 3.0, 2.5, 0.1, 0.2, 0.7, 0.0]
    allowed = [1, 3, 8]
    observed = Counter(
        generate({**NEUTRAL, "grammar": 'root ::= "a" [ab]', "seed": seed}, logits, limit=1)[0][0]
        for seed in range(3000)
    )
    assert set(observed) == set(allowed)
    total = sum(math.exp(logits[t]) for t in allowed)
    for t in allowed:
        assert observed[t] / 3000 == pytest.approx(math.exp(logits[t]) / total, abs=0.04)


def test_reports_under_a_grammar():
    found = Sampler(SamplingParams(grammar='root ::= "a"', n_probs=4, seed=1), words(), (), 9).sample(
        np.array([0, 1, 9, 0, 0, 9, 0, 0, 0, 0], np.float32)
    )
    assert found.token == 1
    assert found.probs == ((1, 1.0),)
    assert [token for token, _ in found.top_logprobs][:2] == [2, 5]


def test_a_finished_grammar_ends_even_when_the_end_is_banned():
    tokens, sampling = generate({"grammar": 'root ::= "a"?', "ignore_eos": True, "temperature": 0}, [0] * 10, limit=2)
    assert tokens == [1]
    assert sampling.sample(np.zeros(10, np.float32)).token == 0
    banned = {"grammar": 'root ::= "c"?', "ignore_eos": True, "logit_bias": ((5, -math.inf),), "n_probs": 2}
    found = Sampler(SamplingParams(**banned), words(), (), 9).sample(np.zeros(10, np.float32))
    assert found.token == 0
    assert found.probs == ((0, 1.0),)


def test_a_grammar_that_the_vocabulary_cannot_spell():
    with pytest.raises(SamplingError, match="grammar"):
        generate({"grammar": 'root ::= "x"'}, [0] * 10)


def test_a_finished_grammar_without_an_end_token():
    lone = Vocabulary([b"a"])
    sampling = Sampler(SamplingParams(grammar='root ::= "a"'), lone, (), 9)
    assert sampling.sample(np.zeros(1, np.float32)).token == 0
    assert sampling.finished
    with pytest.raises(SamplingError, match="no token that says so"):
        sampling.sample(np.zeros(1, np.float32))


def test_end_tokens_that_have_a_text_end_all_the_same():
    ends = Vocabulary([b"<end>", b"<", b"x"], eos=0)
    tokens, _ = generate({"grammar": "root ::= [<endx>]+", "temperature": 0}, [9, 0, 1], limit=2, vocabulary=ends)
    assert tokens == [2, 0]


def test_mirostat_learns_from_the_token_that_was_taken():
    params = SamplingParams(mirostat=2, grammar='root ::= "a"+', seed=1, n_probs=10, repeat_penalty=1.0)
    sampling = Sampler(params, words(), (), 9)
    mu = mu_of(sampling)
    for _ in range(10):
        found = sampling.sample(np.array([0, 0, 3, 3, 3, 3, 0, 0, 0, 0], np.float32))
        mu -= 0.1 * (-math.log2(dict(found.probs)[found.token]) - 5.0)
        assert mu_of(sampling) == pytest.approx(mu)
        if sampling.finished:
            break
