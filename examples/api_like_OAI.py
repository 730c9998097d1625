"""OpenAI's chat and text completions, translated to the /completion endpoint of a server:

    python api_like_OAI.py --llama-api http://127.0.0.1:8080

Then give http://127.0.0.1:8081 to a client as its base URL. The server's own /v1 endpoints do more (the model's own template,
several answers, log-probabilities, structured output); this program is for models whose chats are to be written by hand, with
names of one's own, and for servers that have only /completion. It needs nothing of pyllama; Bottle and Waitress come with it.
"""

from __future__ import annotations

import argparse
import hmac
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

import waitress
from bottle import Bottle, HTTPError, HTTPResponse, request, response

SAME = (
    "temperature", "top_k", "top_p", "min_p", "tfs_z", "typical_p", "repeat_penalty", "repeat_last_n", "penalize_nl",
    "presence_penalty", "frequency_penalty", "mirostat", "mirostat_tau", "mirostat_eta", "seed", "grammar", "ignore_eos",
    "logit_bias", "n_keep", "slot_id", "cache_prompt", "stream",
)  # fmt: skip
"""Options that are called the same on both sides, or that /completion has and OpenAI does not."""

app = Bottle()
open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Translates OpenAI's API to the /completion endpoint of a server.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8081, help="port to listen on (%(default)s)")
    parser.add_argument("--llama-api", default="http://127.0.0.1:8080", metavar="URL", help="the server (%(default)s)")
    parser.add_argument("--api-key", default="", metavar="KEY", help="key that requests must bring (default: none)")
    text = {"type": lambda value: value.replace("\\n", "\n"), "metavar": "TEXT"}
    parser.add_argument("--chat-prompt", default="A chat between a user and a helpful assistant.", **text,
                        help="the beginning of every chat (%(default)s); \\n stands for a new line")  # fmt: skip
    parser.add_argument("--user-name", default="\nUSER: ", **text, help="before what the user says (\\nUSER: )")
    parser.add_argument("--ai-name", default="\nASSISTANT: ", **text, help="before the answers (\\nASSISTANT: )")
    parser.add_argument("--system-name", default="\nRULE: ", **text, help="before system messages (\\nRULE: )")
    parser.add_argument("--stop", default="</s>", **text, help="a text that ends every answer (%(default)s)")
    return parser.parse_args()


class ApiError(HTTPError):
    """Answered with OpenAI's error object."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code)
        self.message = message


@app.hook("before_request")
def check_key() -> None:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode("latin-1")
    if request.method == "POST" and not hmac.compare_digest(given, args.api_key.encode()) and args.api_key:
        raise ApiError(401, "this server wants the header 'Authorization: Bearer KEY' with its key")


@app.hook("after_request")
def allow_pages_of_all_origins() -> None:
    response.headers["Access-Control-Allow-Origin"] = request.headers.get("Origin", "*")
    response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"


@app.route("/<path:path>", method="ANY")
def anything_else(path: str) -> str:
    if request.method == "OPTIONS":
        return ""
    raise ApiError(404, f"there is nothing at /{path}; chats are at /chat/completions, texts at /completions")


def show_error(error: HTTPError) -> str:
    response.content_type = "application/json"
    message = error.message if isinstance(error, ApiError) else error.status_line
    return json.dumps({"error": {"code": error.status_code, "message": message, "type": "invalid_request_error"}})


app.default_error_handler = show_error


# ---- from OpenAI's requests to /completion ------------------------------------------------------------------------------


def read_body() -> dict[str, Any]:
    try:
        body = json.loads(request.body.read())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    if body.get("n") not in (None, 1):
        raise ApiError(400, "n: only one answer at a time is possible here")
    return body


def chat_prompt(messages: Any) -> str:
    """The conversation as one text, which ends where the assistant is to speak."""
    names = {"system": args.system_name, "user": args.user_name, "assistant": args.ai_name}
    text = args.chat_prompt
    try:
        for message in messages:
            text += names[message["role"]] + message["content"]
    except (KeyError, TypeError):
        raise ApiError(
            400, "messages must be a list of objects with a role (system, user, assistant) and a content"
        ) from None
    return text + args.ai_name.rstrip(" ")


def translate(body: dict[str, Any], prompt: Any, stop: Iterable[str]) -> dict[str, Any]:
    """The fields for /completion. The server says what is wrong with them, if anything is."""
    fields = {name: body[name] for name in SAME if body.get(name) is not None}
    if isinstance(fields.get("logit_bias"), dict):
        fields["logit_bias"] = [
            [int(token) if token.isdecimal() else token, bias] for token, bias in fields["logit_bias"].items()
        ]
    own = body.get("stop") or []
    fields["stop"] = [*stop, *(own if isinstance(own, list) else [own])]
    fields["n_predict"] = next(
        (body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), -1
    )
    return {**fields, "prompt": prompt}


def ask(fields: dict[str, Any]) -> Any:
    """The server's response to a completion, to be read."""
    headers = {"Content-Type": "application/json"}
    if "Authorization" in request.headers:
        headers["Authorization"] = request.headers["Authorization"]  # the server may have a key of its own
    url = args.llama_api.rstrip("/") + "/completion"
    try:
        return open_url(urllib.request.Request(url, json.dumps(fields).encode(), headers))
    except urllib.error.HTTPError as error:  # a refusal: the same words, the same status
        raise HTTPResponse(error.read(), error.code, {"Content-Type": "application/json"}) from None
    except OSError as error:
        raise ApiError(502, f"there is no answer from {args.llama_api}: {error}") from None


# ---- and back -----------------------------------------------------------------------------------------------------------


def answer(fields: dict[str, Any], body: dict[str, Any], kind: str) -> str | Iterator[bytes]:
    """OpenAI's form of a completion; ``kind`` is ``chat`` or ``text``."""
    prefix, name = ("chatcmpl", "chat.completion") if kind == "chat" else ("cmpl", "text_completion")
    head = {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": name,
        "created": int(time.time()),
        "model": body.get("model"),
    }
    server = ask(fields)
    if fields.get("stream") is True:
        response.content_type = "text/event-stream"
        return stream(server, head, kind)
    with server:
        result = json.load(server)
    text = result["content"]
    if kind == "chat":
        text = text.lstrip(" ")  # what comes after "ASSISTANT:" begins with a space
    part = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text, "logprobs": None}
    choice = {"index": 0, **part, "finish_reason": finish_reason(result)}
    n_prompt, n_answer = result["tokens_evaluated"], result["tokens_predicted"]
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer}
    response.content_type = "application/json"
    return json.dumps({**head, "choices": [choice], "usage": usage})


def stream(server: Any, head: dict[str, Any], kind: str) -> Iterator[bytes]:
    """The events of a stream, translated one by one."""

    def event(piece: dict[str, Any], reason: str | None = None) -> bytes:
        part = {"delta": piece} if kind == "chat" else {"text": piece.get("content", ""), "logprobs": None}
        data = {**head, "choices": [{"index": 0, **part, "finish_reason": reason}]}
        return f"data: {json.dumps(data)}\n\n".encode()

    begun = kind != "chat"
    if kind == "chat":
        head["object"] = "chat.completion.chunk"
        yield event({"role": "assistant"})
    with server:
        for line in server:
            if not line.startswith(b"data: "):
                continue
            data = json.loads(line.removeprefix(b"data: "))
            if "error" in data:
                yield line + b"\n"
                return
            text = data["content"] if begun else data["content"].lstrip(" ")
            if text:
                begun = True
                yield event({"content": text})
            if data["stop"]:
                yield event({}, finish_reason(data))
    yield b"data: [DONE]\n\n"


def finish_reason(result: dict[str, Any]) -> str:
    return "length" if result["stopped_limit"] else "stop"


@app.post("/chat/completions")
@app.post("/v1/chat/completions")
def chat_completions() -> str | Iterator[bytes]:
    body = read_body()
    stop = filter(None, (args.stop, args.user_name.rstrip(" ")))
    return answer(translate(body, chat_prompt(body.get("messages")), stop), body, "chat")


@app.post("/completions")
@app.post("/v1/completions")
def completions() -> str | Iterator[bytes]:
    body = read_body()
    return answer(translate(body, body.get("prompt"), filter(None, [args.stop])), body, "text")


if __name__ == "__main__":
    args = parse_arguments()
    server = waitress.create_server(app, host=args.host, port=args.port, channel_request_lookahead=1)
    print(f"listening on http://{args.host}:{server.effective_port}, asking {args.llama_api}", flush=True)
    server.run()
