"""Random grammars through the engine: what a model says under a grammar that has come to its end is accepted by an
independent reading of the grammar (tests/gbnf_reader.py, an Earley parser)."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyllama import Llama
from pyllama.grammar import Grammar, GrammarError
from tests.gbnf_reader import Gbnf
from tests.tiny_models import make_llama

LITERALS = ['"a"', '"the "', '"é"', '"\\n"', '"\\"\\\\"', '"and"', '"\\U0001F600"', '""', '"x1"']
CLASSES = ["[a-c]", "[^a-z\\n]", "[0-9_]", "[à-ï]", "[\\]\\\\-]", ".", "[あ-ん]", "[^\\x00-\\x7F]"]
REPETITIONS = ["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "{0,1}"]


def random_grammar(rng):
    names = ["root", "one", "two-b", "three"][: rng.randint(1, 4)]
    return "".join(f"{name} ::= {_choice(rng, names, 0)}{rng.choice(['', ' # …'])}\n" for name in names)


def _choice(rng, names, depth):
    return " | ".join(_sequence(rng, names, depth) for _ in range(rng.choice([1, 1, 2, 3])))


def _sequence(rng, names, depth):
    parts = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.35:
            part = rng.choice(LITERALS)
        elif kind < 0.6:
            part = rng.choice(CLASSES)
        elif kind < 0.8 or depth > 2:
            part = rng.choice(names)
        else:
            part = f"({_choice(rng, names, depth + 1)})"
        parts.append(part + (rng.choice(REPETITIONS) if rng.random() < 0.3 else ""))
    return " ".join(parts)


def usable_grammars(seeds):
    """Grammars that are not left-recursive and match anything."""
    for seed in seeds:
        text = random_grammar(random.Random(seed))
        try:
            Grammar(text)
        except GrammarError as error:
            assert "left-recursive" in str(error)
            continue
        reader = Gbnf(text)
        if reader.cost["root"] < float("inf"):
            yield seed, text, reader


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("grammars") / "tiny.gguf"
    make_llama(path, n_layer=1)
    with Llama(path, n_ctx=8 * 256, n_threads=1, n_parallel=8) as llm:
        yield llm


def test_a_model_says_what_random_grammars_want(llm):
    ends = dict.fromkeys(llm.model.tokenizer.eog_ids, 4.0)

    def answers(case):
        seed, grammar, reader = case
        texts = []
        for n in range(2):
            answer = llm.create_completion("the time", max_tokens=60, grammar=grammar, seed=n, temperature=1.5,
                                           top_k=0, top_p=1.0, min_p=0.0, logit_bias=ends)  # fmt: skip
            (choice,) = answer["choices"]
            texts.append(choice["text"] if choice["finish_reason"] == "stop" else None)
            assert texts[-1] is None or reader.accepts(texts[-1]), (seed, grammar, texts[-1])
        return texts

    with ThreadPoolExecutor(8) as pool:
        texts = [text for texts in pool.map(answers, usable_grammars(range(400))) for text in texts]
    assert len(texts) > 250
    assert sum(text is not None for text in texts) > 0.7 * len(texts)
    assert len(set(texts)) > 100


def test_both_readings_agree():
    """Of texts drawn from the grammar, whole and spoiled."""
    n_accepted = n_refused = 0
    for seed, text, reader in usable_grammars(range(1000, 1250)):
        rng = random.Random(seed)
        grammar = Grammar(text)
        for _ in range(4):
            drawn = reader.draw(rng, budget=15)
            at = rng.randrange(len(drawn) + 1)
            for candidate in (drawn, drawn[:at] + rng.choice(["", "a", "é", "\n", "0"]) + drawn[at + 1 :]):
                matcher = grammar.matcher()
                accepted = matcher.accept(candidate.encode()) and matcher.can_end
                assert accepted == reader.accepts(candidate), (seed, text, candidate)
                n_accepted += accepted
                n_refused += not accepted
    assert n_accepted > 500
    assert n_refused > 100
