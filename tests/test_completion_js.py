"""completion.js in Node, against a real server and against streams that are cut anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.serving import ROOT, ServerProcess, wait_until
from tests.tiny_models import make_llama

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(model)
    with ServerProcess("-m", model, "-c", "4096", "-np", "2", "-cb") as server:
        yield server


@pytest.fixture
def node(server, tmp_path) -> Callable[[str], str]:
    """Runs a module in Node, with completion.js imported as ``c`` and the server's address as ``config.api_url``."""
    shutil.copy(ROOT / "public" / "completion.js", tmp_path / "completion.mjs")

    def run(script: str) -> str:
        head = f"import * as c from './completion.mjs'\nconst config = {{ api_url: {json.dumps(server.url)} }}\n"
        (tmp_path / "test.mjs").write_text(head + script)
        done = subprocess.run(["node", "test.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


GREEDY = "{ n_predict: 12, temperature: 0, ignore_eos: true, cache_prompt: false }"


def test_every_way_to_get_a_text_gets_the_same(node, server):
    fields = {"prompt": "hello", "n_predict": 12, "temperature": 0, "ignore_eos": True}
    expected = server.post("/completion", **fields)["content"]
    answers = node(
        f"""
const params = {GREEDY}
const answers = []

let text = '', events = []
for await (const chunk of c.llama('hello', params, config)) {{ text += chunk.data.content; events.push(chunk.data) }}
answers.push(text)
if (!events.at(-1).stop || !events.at(-1).timings || events.slice(0, -1).some((e) => e.stop)) throw new Error('events')

answers.push(await c.llamaPromise('hello', params, config))

text = ''
for await (const chunk of c.llama('hello', {{ ...params, stream: false }}, config)) text += chunk.data.content
answers.push(text)

const heard = {{}}
const target = c.llamaEventTarget('hello', params, config)
for (const name of ['message', 'generation_settings', 'timings', 'error'])
  target.addEventListener(name, (e) => (heard[name] ??= []).push(e.detail))
answers.push(await new Promise((resolve) => target.addEventListener('done', (e) => resolve(e.detail.content))))
if (heard.message.map((m) => m.content).join('') !== answers.at(-1)) throw new Error('messages')
if (heard.timings[0].predicted_n !== 12 || heard.generation_settings[0].n_ctx !== 4096 || heard.error) throw new Error('events')

console.log(JSON.stringify(answers))
"""
    )
    assert json.loads(answers) == [expected] * 4


def test_the_generators_value_is_the_text(node):
    out = node(
        f"""
const generator = c.llama('hello', {GREEDY}, config)
let text = '', step
while (!(step = await generator.next()).done) text += step.value.data.content
console.log(step.value === text && text.length > 0)
"""
    )
    assert out == "true"


def test_model_info(node, server):
    status, settings = server.json("GET", "/model.json")
    assert status == 200
    assert json.loads(node("console.log(JSON.stringify(await c.llamaModelInfo(config)))")) == settings


def test_an_abort_is_thrown_and_ends_the_generation(node, server):
    out = node(
        """
const controller = new AbortController()
let n = 0
try {
  for await (const chunk of c.llama('hello', { n_predict: -1, ignore_eos: true }, { ...config, controller }))
    if (++n === 5) controller.abort()
} catch (error) { console.log(error.name, n) }
"""
    )
    assert out == "AbortError 5"
    wait_until(server.is_idle, 60)


def test_who_stops_listening_ends_the_generation(node, server):
    node(
        """
for await (const chunk of c.llama('hello', { n_predict: -1, ignore_eos: true }, config)) break
const end = Date.now() + 30000
for (;;) {
  const later = await (await fetch(config.api_url + '/health')).json()
  if (!later.slots_processing) break
  if (Date.now() > end) throw new Error('still running')
  await new Promise((resolve) => setTimeout(resolve, 50))
}
"""
    )
    wait_until(server.is_idle, 60)


def test_errors_are_thrown(node):
    out = node(
        """
const nobody = { api_url: 'http://127.0.0.1:9' }
for (const [params, other] of [[{ top_k: 'x' }, config], [{ grammar: 'root ::= (' }, config], [{}, nobody]])
  try {
    await c.llamaPromise('hello', params, other)
  } catch (error) {
    console.log(error.code, error.type, error.message)
  }
const target = c.llamaEventTarget('hello', { temperature: 'hot' }, config)
console.log((await new Promise((resolve) => target.addEventListener('error', (e) => resolve(e.detail)))).message)
"""
    ).splitlines()
    assert out[0].startswith("400 invalid_request_error") and "top_k" in out[0]
    assert out[1].startswith("400 invalid_request_error") and "grammar" in out[1]
    assert "fetch failed" in out[2]
    assert "temperature" in out[3]


def test_characters_of_many_bytes_survive(node):
    prompt = "日本語 🦙 \u2028 é"
    out = node(
        f"""
const prompt = {json.dumps(prompt)}
for await (const {{ data }} of c.llama(prompt, {{ n_predict: 2 }}, config))
  if (data.stop) console.log(JSON.stringify(data.prompt))
"""
    )
    assert json.loads(out) == prompt


def test_a_chat(node, server):
    messages = [{"role": "user", "content": "hello"}]
    fields = {"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    expected = server.post("/v1/chat/completions", **fields)["choices"][0]["message"]["content"]
    out = node(
        f"""
const params = {{ n_predict: 12, temperature: 0, ignore_eos: true }}
const answers = []
for (const more of [{{}}, {{ stream: false }}]) {{
  const chat = c.llamaChat({json.dumps(messages)}, {{ ...params, ...more }}, config)
  let step, last
  while (!(step = await chat.next()).done) last = step.value.data
  answers.push(step.value)
  if (!last.choices[0].finish_reason) throw new Error('the last event')
}}
console.log(JSON.stringify(answers))
"""
    )
    assert json.loads(out) == [expected] * 2


def test_several_prompts(node):
    out = node(
        """
const texts = ['', '']
let ends = 0
for await (const { data } of c.llama(['hello', 'world'], { n_predict: 4, ignore_eos: true }, config)) {
  texts[data.index] += data.content
  ends += data.stop
}
console.log(ends, texts.every((text) => text.length > 0))
"""
    )
    assert out == "2 true"


def test_complete_and_its_controller(node, server):
    out = node(
        """
const controller = new AbortController()
const fetch_ = globalThis.fetch
globalThis.fetch = (url, options) => fetch_(url.replace('http://127.0.0.1:8080', config.api_url), options)
let n = 0
const done = c.llamaComplete({ prompt: 'hello', n_predict: -1, ignore_eos: true }, controller, ({ data }) => {
  if (typeof data.content !== 'string') throw new Error('content')
  if (++n === 3) controller.abort()
})
console.log(await done.catch((error) => error.name), n)
"""
    )
    assert out == "AbortError 3"
    wait_until(server.is_idle, 60)


def test_what_is_sent(node):
    out = node(
        """
const sent = []
globalThis.fetch = async (url, { body, headers }) => {
  sent.push([url, JSON.parse(body), headers.Authorization])
  return new Response('data: {"content":"","stop":true}\\n\\n', { headers: { 'Content-Type': 'text/event-stream' } })
}
await c.llamaPromise('a')
const own = { api_url: 'http://127.0.0.1:1/x/', endpoint: '/own' }
await c.llamaPromise('b', { temperature: 1, stop: undefined, api_key: 'K' }, own)
await c.llamaPromise('c', {}, { api_key: 'L' })
console.log(JSON.stringify(sent))
"""
    )
    url = "http://127.0.0.1:8080/completion"
    defaults = {"stream": True, "n_predict": 500, "temperature": 0.2, "stop": ["</s>"]}
    assert json.loads(out) == [
        [url, {**defaults, "prompt": "a"}, None],
        ["http://127.0.0.1:1/x/own", {"stream": True, "n_predict": 500, "temperature": 1, "prompt": "b"}, "Bearer K"],
        [url, {**defaults, "prompt": "c"}, "Bearer L"],
    ]


STREAM = (
    "\ufeff: a comment\n\n"
    'data: {"content":"é🦙","stop":false}\n\n'
    'event: message\r\nid: 7\r\ndata:{"content":"b\\u2028",\r\ndata: "stop":false}\r\n\r\n'
    'data: {"content":"c","stop":false}\r\rdata\n\n'
    'data: {"content":"d","stop":true}'
)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("kind", ["web", "node"])
def test_streams_may_be_cut_anywhere(node, size, kind):
    out = node(
        f"""
import {{ Readable }} from 'node:stream'
const bytes = new TextEncoder().encode({json.dumps(STREAM)})
const pieces = []
for (let at = 0; at < bytes.length; at += {size}) pieces.push(bytes.slice(at, at + {size}))
const web = () => new ReadableStream({{ start(it) {{ pieces.forEach((piece) => it.enqueue(piece)); it.close() }} }})
const body = {json.dumps(kind)} === 'web' ? web() : Readable.from(pieces)
globalThis.fetch = async () => ({{ ok: true, headers: new Headers({{ 'Content-Type': 'text/event-stream' }}), body }})
const events = []
for await (const event of c.llama('')) events.push(event)
console.log(JSON.stringify(events))
"""
    )
    contents = [{"content": "é🦙", "stop": False}, {"content": "b\u2028", "stop": False},
                {"content": "c", "stop": False}, {"content": "d", "stop": True}]  # fmt: skip
    events = json.loads(out)
    assert [event["data"] for event in events] == contents
    assert (events[1]["id"], events[1]["event"]) == ("7", "message")


@pytest.mark.parametrize(
    "body, message",
    [
        ('data: {"content":"a","stop":false}\n\n', "broke off"),
        ('data: {"content":"a","stop":false}\n\ndata: {"error":{"code":503,"message":"too late"}}\n\n', "503 too late"),
        ('error: {"code":500,"message":"of old servers"}\n\n', "500 of old servers"),
    ],
)
def test_streams_that_fail(node, body, message):
    out = node(
        f"""
globalThis.fetch = async () => new Response({json.dumps(body)}, {{ headers: {{ 'Content-Type': 'text/event-stream' }} }})
const controller = new AbortController()
await c.llamaPromise('', {{}}, {{ controller }}).catch((error) => console.log(error.code, error.message))
console.log(controller.signal.aborted)
"""
    )
    assert message in out.splitlines()[0] and out.splitlines()[1] == "true"


def test_what_node_16_lacks_is_not_needed(node, server):
    out = node(
        """
delete globalThis.CustomEvent
delete AbortSignal.prototype.throwIfAborted
const target = c.llamaEventTarget('hello', { n_predict: 3, ignore_eos: true }, config)
let n = 0
target.addEventListener('message', () => { n += 1 })
await new Promise((resolve) => target.addEventListener('done', resolve))
const controller = new AbortController()
Object.defineProperty(controller.signal, 'reason', { value: undefined })
try {
  for await (const chunk of c.llama('hello', { n_predict: -1, ignore_eos: true }, { ...config, controller })) controller.abort()
} catch (error) { console.log(n > 1, error.name) }
"""
    )
    assert out == "true AbortError"
    wait_until(server.is_idle, 60)


@pytest.mark.parametrize("key, outcome", [("secret", "a text"), ("wrong", "401"), (None, "401")])
def test_the_servers_key(node, tmp_path, key, outcome):
    model = tmp_path / "tiny.gguf"
    make_llama(model)
    with ServerProcess("-m", model, "--api-key", "secret") as server:
        out = node(
            f"""
const own = {{ api_url: {json.dumps(server.url)}, api_key: {json.dumps(key)} }}
await c.llamaPromise('hello', {{ n_predict: 2 }}, own).then(() => console.log('a text'), (error) => console.log(error.code))
"""
        )
    assert out == outcome
