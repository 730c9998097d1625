"""From a list of chat messages to a prompt, by the model's own Jinja2 template.

A template comes out of a model file, so it runs in a sandbox, with bounds on time and output, and can be wrong in any way:
whatever happens in it is a :class:`ChatTemplateError`. Models without a template are given ChatML. This module knows no HTTP.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyllama.tokenizer import Tokenizer

__all__ = ["CHATML", "ChatTemplate", "ChatTemplateError"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template of models that bring none."""

MAX_SOURCE = 1 << 20
"""Characters of a template."""
MAX_OUTPUT = 1 << 25
"""Characters of a prompt."""
MAX_SECONDS = 5.0
"""Time that rendering may take."""


class ChatTemplateError(ValueError):
    """Messages that are not messages, a template that refuses them, or one that is broken; the message says which."""


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads.

    Args:
        source: Jinja2, with the variables and functions that Hugging Face's templates expect; None for ChatML.
        bos_text, eos_text: what ``bos_token`` and ``eos_token`` stand for in it.

    Raises:
        ChatTemplateError: the source is not a template.
    """

    def __init__(self, source: str | None = None, bos_text: str = "", eos_text: str = "") -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, bos_token=bos_text, eos_token=eos_text
        )
        self.source = CHATML if source is None else source
        self.stop: tuple[str, ...] = ("<|im_end|>",) if self.source == CHATML else ()
        """Texts that end an answer besides the model's own tokens, which may not know of ChatML."""
        if len(self.source) > MAX_SOURCE:
            raise ChatTemplateError(f"the chat template has {len(self.source)} characters; {MAX_SOURCE} are possible")
        try:
            self._template = environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise ChatTemplateError(f"the chat template is wrong in line {error.lineno}: {error}") from None
        except Exception as error:  # noqa: BLE001 - compiling runs Python's own compiler: more ways to fail
            raise ChatTemplateError(f"the chat template cannot be compiled: {error}") from None

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
        """The template ``source``, or else the one that a model brings, or else ChatML, for a model's BOS and EOS.

        Raises:
            ChatTemplateError: that is no template.
        """
        bos_text, eos_text = (
            "" if token is None else tokenizer.token_text(token) for token in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(tokenizer.chat_template if source is None else source, bos_text, eos_text)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a list of messages.

        Args:
            messages: ``{"role": …, "content": …}``; a content may be a string, None, or a list of
                ``{"type": "text", "text": …}``, which are joined. Other fields are handed to the template as they are.
            add_generation_prompt: end with the words that make the model answer.
            variables: more names for the template.

        Raises:
            ChatTemplateError: see there.
        """
        variables["messages"] = _plain_messages(messages)
        variables["add_generation_prompt"] = add_generation_prompt
        _rendering.end = time.monotonic() + MAX_SECONDS
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                _look_at_the_clock()
                pieces.append(piece)
                size += len(piece)
                _check_size(size)
            return "".join(pieces)
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template: {error}") from None
        except Exception as error:  # noqa: BLE001 - a template can call anything that its variables offer
            raise ChatTemplateError(f"the model's chat template failed: {type(error).__name__}: {error}") from None

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The tokens of :meth:`render`, with one BOS where the model wants one, written by the template or not."""
        tokens = tokenizer.encode(self.render(messages, **variables), add_special=True)
        if tokenizer.add_bos and tokens[:2] == [tokenizer.bos_id] * 2:
            del tokens[0]
        if tokenizer.add_eos and tokens[-1:] == [tokenizer.eos_id]:
            tokens.pop()  # the text goes on: the answer is still to come
        return tokens


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ChatTemplateError("messages must be an array")
    if not messages:
        raise ChatTemplateError("messages must not be empty")
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"messages[{i}] must be an object")
        if not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"messages[{i}].role must be a string")
        plain.append({**message, "content": _plain_content(message.get("content"), f"messages[{i}].content")})
    return plain


def _plain_content(content: object, name: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatTemplateError(f"{name} must be a string or an array of parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise ChatTemplateError(f"{name}[{i}] must be a part of type 'text', not {kind!r}")
        if not isinstance(part.get("text"), str):
            raise ChatTemplateError(f"{name}[{i}].text must be a string")
        texts.append(part["text"])
    return "".join(texts)


# ---- the sandbox -----------------------------------------------------------------------------------------------------

_rendering = threading.local()
"""``end``: when the rendering in this thread has to be done."""


def _look_at_the_clock() -> None:
    if time.monotonic() > _rendering.end:
        raise TemplateError(f"takes longer than {MAX_SECONDS:g} seconds")


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT:
        raise TemplateError(f"makes a text of more than {MAX_OUTPUT} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox, with a look at the clock wherever a template reaches for something."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def getitem(self, obj: Any, argument: Any) -> Any:
        _look_at_the_clock()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _look_at_the_clock()
        return super().getattr(obj, attribute)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _look_at_the_clock()
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Operators that make much of little: ``'x' * 10**12``, ``9**9**9``."""
        _look_at_the_clock()
        sizes = [len(value) if isinstance(value, (str, list, tuple)) else None for value in (left, right)]
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 10_000:
            raise TemplateError("makes a number of thousands of digits")
        if operator == "+" and None not in sizes:
            _check_size(sum(sizes))
        if operator == "*":
            for size, count in ((sizes[0], right), (sizes[1], left)):
                if size is not None and isinstance(count, int):
                    _check_size(size * count)
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: object, indent: int | None = None) -> str:
    """Unlike Jinja2's own filter: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
