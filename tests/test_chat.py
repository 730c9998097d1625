"""Chat templates: rendering, the sandbox, and what is refused."""

from __future__ import annotations

import re

import pytest

from pyllama.chat import ChatTemplate, ChatTemplateError

HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


class Tokenizer:
    """A token for each character and for ``<s>``."""

    def __init__(self, chat_template: str | None = None, add_bos: bool = True, add_eos: bool = False) -> None:
        self.chat_template, self.add_bos, self.add_eos = chat_template, add_bos, add_eos
        self.bos_id, self.eos_id = 1, 2

    def token_text(self, token: int) -> str:
        return {1: "<s>", 2: "</s>"}[token]

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        words = re.findall("<s>|</s>|.", text, re.DOTALL)
        tokens = [{"<s>": 1, "</s>": 2}.get(word, ord(word[0])) for word in words]
        return [1] * (add_special and self.add_bos) + tokens + [2] * (add_special and self.add_eos)


def test_chatml_is_the_default():
    assert ChatTemplate().render(HELLO) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate().render(HELLO[1:], add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_chatml_ends_answers_by_its_text():
    assert ChatTemplate().stop == ("<|im_end|>",) and ChatTemplate("x").stop == ()


def test_contents_in_parts_are_joined():
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert template.render(messages) == "[Hi][]"


def test_blocks_are_trimmed_and_loops_have_controls():
    source = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{% continue %}\n  {% endif %}\n"
        "{{ m.content }}\n{% endfor %}"
    )
    assert ChatTemplate(source).render(HELLO) == "Be kind.\n"


def test_json_is_not_escaped():
    template = ChatTemplate("{{ messages[0] | tojson }}{{ [1] | tojson(indent=1) }}")
    assert template.render([{"role": "user", "content": "<é>"}]) == '{"role": "user", "content": "<é>"}[\n 1\n]'


def test_the_date():
    assert re.fullmatch(r"\d{4}", ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO))


def test_other_variables_reach_the_template():
    assert ChatTemplate("{{ mood }} {{ undefined_name }}").render(HELLO, mood="fine") == "fine "


@pytest.mark.parametrize(
    "source, beginning",
    [
        (None, [1, ord("<")]),
        ("{{ bos_token }}{{ messages[0].content }}", [1, ord("B")]),
        ("{{ messages[0].content }}", [1, ord("B")]),
    ],
)
def test_one_bos(source, beginning):
    tokenizer = Tokenizer(source)
    assert ChatTemplate.of(tokenizer).encode(tokenizer, HELLO)[:2] == beginning


def test_bos_of_the_template_stays_when_the_model_adds_none():
    tokenizer = Tokenizer("{{ bos_token }}x{{ eos_token }}", add_bos=False, add_eos=True)
    assert ChatTemplate.of(tokenizer).encode(tokenizer, HELLO) == [1, ord("x"), 2]


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ("hello", "messages must be an array"),
        (None, "messages must be an array"),
        ([], "must not be empty"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\].role must be a string"),
        ([HELLO[0], {"role": "user", "content": 1}], r"messages\[1\].content must be"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"\[0\] must be .* type 'text', not 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string"),
        ([{"role": "user", "content": ["x"]}], "must be a part of type 'text'"),
    ],
)
def test_what_is_no_message(messages, complaint):
    with pytest.raises(ChatTemplateError, match=complaint):
        ChatTemplate().render(messages)


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10000000000 }}", "a text of more than"),
        ("{{ 1000000 * [1, 2, 3, 4] * 100 }}", "a text of more than"),
        ("{{ 9 ** (9 ** 9) }}", "thousands of digits"),
        (
            "{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "of more than",
        ),
        ("{% for i in range(99) %}{{ 'x' * 1000000 }}{% endfor %}", "of more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.2 seconds"),
    ],
)
def test_a_template_that_fails(source, complaint, monkeypatch):
    monkeypatch.setattr("pyllama.chat.MAX_SECONDS", 0.2)
    with pytest.raises(ChatTemplateError, match=complaint):
        ChatTemplate(source).render(HELLO)


def test_a_source_of_any_length():
    with pytest.raises(ChatTemplateError, match="characters"):
        ChatTemplate("x" * 2_000_000)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% include %}", "{% if x %}", "{{ " + "(" * 5000 + " }}"])
def test_a_source_that_is_no_template(source):
    with pytest.raises(ChatTemplateError, match="the chat template"):
        ChatTemplate(source)
