"""The pages and completion.js, in headless Chromium and in Node, against a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, Page, find_chromium
from tests.serving import ROOT, ServerProcess
from tests.tiny_models import make_llama

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")

JOKES = """<html>
  <body>
    <pre>
      <script type="module">
        import { llama } from '/completion.js'

        const prompt = `### Instruction:
Write dad jokes, each one paragraph.
You can use html formatting if needed.

### Response:`

        for await (const chunk of llama(prompt)) {
          document.write(chunk.data.content)
        }
        window.ended = true
      </script>
    </pre>
  </body>
</html>
"""
"""The example of the reference document, with a sign that it has ended."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``--path`` names."""
    path = tmp_path_factory.mktemp("pages")
    (path / "jokes.html").write_text(JOKES)
    (path / "sub").mkdir()
    (path / "sub" / "text.txt").write_text("some text")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(model)
    # A fixed seed: the random model's text may end at once, or open an HTML comment that hides the rest.
    flags = ("-c", "4096", "-np", "2", "-cb", "--path", folder, "-a", "a tiny model", "--seed", "1")
    with ServerProcess("-m", model, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def is_idle(server: ServerProcess, seconds: float = 60) -> bool:
    """Whether all slots get free."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.is_idle():
            return True
        time.sleep(0.02)
    return False


DISABLED = "['send', 'stop'].map((id) => document.getElementById(id).disabled)"
TEXT = "document.querySelector('#output .new')?.textContent.length"


def first_page(browser: Browser, server: ServerProcess, **options: Any) -> Page:
    """The page at /, with its script running."""
    page = browser.open(server.url, **options)
    page.wait_for("document.body.dataset.state === 'idle'")
    return page


ENDLESS = """
const fetch_ = window.fetch
window.fetch = (url, options = {}) => {
  if (options.body) options.body = JSON.stringify({ ...JSON.parse(options.body), ignore_eos: true })
  return fetch_(url, options)
}
"""
"""Makes the page's requests go on after the end that a random model comes to sooner or later."""


def write(page: Page, **values: str) -> None:
    for name, value in values.items():
        page.run(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")


# ---- the page ---------------------------------------------------------------------------------------------------------


@needs_chromium
def test_the_page_streams_a_completion(server, browser):
    page = first_page(browser, server)
    assert page.run("document.title") == "pyllama"
    assert page.wait_for("document.getElementById('model').textContent") == "a tiny model · 4096 tokens"
    page.run(ENDLESS)
    write(page, prompt="hello world", n_predict="40")
    page.run("document.getElementById('send').click()")
    page.wait_for("document.body.dataset.state === 'busy'")
    page.wait_for("document.body.dataset.state === 'idle'")
    assert page.run("document.querySelector('#output .prompt').textContent") == "hello world"
    assert page.run(TEXT) > 0
    status = page.run("document.getElementById('status').textContent")
    assert "tokens/s" in status and "answer: 40 tokens" in status and "limit" in status
    assert page.complaints == []


@needs_chromium
@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_generation(server, browser, how):
    page = first_page(browser, server)
    page.run(ENDLESS)
    write(page, n_predict="-1")
    page.press("Enter", ctrl=True)
    page.wait_for(f"{TEXT} > 20")
    assert page.run(DISABLED) == [True, False]
    if how == "button":
        page.run("document.getElementById('stop').click()")
    else:
        page.press("Escape")
    page.wait_for("document.body.dataset.state === 'idle'")
    assert "stopped after" in page.run("document.getElementById('status').textContent")
    assert page.run(DISABLED) == [False, True]
    assert is_idle(server)
    length = page.run(TEXT)
    time.sleep(0.2)
    assert page.run(TEXT) == length
    assert page.complaints == []


@needs_chromium
def test_leaving_the_page_ends_the_generation(server, browser):
    page = first_page(browser, server)
    page.run(ENDLESS)
    write(page, n_predict="-1")
    page.run("document.getElementById('send').click()")
    page.wait_for(f"{TEXT} > 20")
    page.call("Page.navigate", url="about:blank")
    assert is_idle(server)


@needs_chromium
def test_errors_are_shown(tmp_path, browser):
    model = tmp_path / "tiny.gguf"
    make_llama(model)
    with ServerProcess("-m", model, "--api-key", "secret") as server:
        page = first_page(browser, server)
        page.run("document.getElementById('send').click()")
        assert "key" in page.wait_for("document.querySelector('#status.bad')?.textContent").lower()
        page.wait_for("document.body.dataset.state === 'idle'")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_in_both_themes(server, browser, dark):
    page = first_page(browser, server, width=360, height=640, dark=dark)
    page.run("document.getElementById('output').textContent = 'x'.repeat(500)")
    assert page.run("document.documentElement.scrollWidth") <= 360
    for script in ("getComputedStyle(document.body)", "getComputedStyle(document.getElementById('prompt'))"):
        ink, paper = (
            sum(map(int, page.run(f"{script}.{name}").strip("rgb()").split(",")))
            for name in ("color", "backgroundColor")
        )
        assert (ink > paper) == dark and abs(ink - paper) > 450
    assert page.run("[...document.querySelectorAll('button')].every((b) => b.getBoundingClientRect().height >= 40)")


@needs_chromium
def test_the_documents_own_page(server, browser):
    page = browser.open(f"{server.url}/jokes.html")
    page.wait_for("window.ended")
    assert page.run("document.body.textContent.length") > 10
    assert is_idle(server)
    assert page.complaints == []


@needs_chromium
def test_the_page_with_a_real_model(smollm2_path, browser):
    with ServerProcess("-m", smollm2_path, "-c", "1024") as server:
        page = first_page(browser, server)
        write(page, prompt="The capital of France is", n_predict="8", temperature="0")
        page.run("document.getElementById('send').click()")
        page.wait_for("document.body.dataset.state === 'busy'")
        page.wait_for("document.body.dataset.state === 'idle'")
        assert "Paris" in page.run("document.querySelector('#output .new').textContent")


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, kind, beginning",
    [
        ("/", "text/html; charset=UTF-8", b"<!doctype html>"),
        ("/index.html", "text/html; charset=UTF-8", b"<!doctype html>"),
        ("/index.js", "text/javascript; charset=UTF-8", b"//"),
        ("/completion.js", "text/javascript; charset=UTF-8", b"//"),
        ("/jokes.html", "text/html; charset=UTF-8", b"<html>"),
        ("/sub/text.txt", "text/plain; charset=UTF-8", b"some text"),
    ],
)
def test_files(server, path, kind, beginning):
    response = server.send("GET", path)
    assert (response.status, response.headers["Content-Type"]) == (200, kind)
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert response.read().startswith(beginning)
    response = server.send("HEAD", path)
    assert response.status == 200 and response.read() == b""


@pytest.mark.parametrize(
    "path",
    [
        "/nothing.html",
        "/sub",
        "/sub/",
        "/../server.py",
        "/..%2fserver.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/sub/../../index.html/../../server.py",
        "/..\\server.py",
        "/index.html%00.txt",
    ],
)
def test_files_that_are_none(server, path):
    response = server.send("GET", path)
    body = json.loads(response.read())
    assert response.status == 404 and body["error"]["type"] == "not_found_error"


# ---- completion.js in Node ----------------------------------------------------------------------------------------------


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


NODE_EXAMPLE = """
const prompt = `Building a website can be done in 10 simple steps:`;

async function Test() {
    let response = await fetch("http://127.0.0.1:8080/completion", {
        method: 'POST',
        body: JSON.stringify({
            prompt,
            n_predict: 512,
        })
    })
    console.log((await response.json()).content)
}

Test()
"""


@needs_node
def test_the_documents_node_example(server, tmp_path):
    (tmp_path / "index.js").write_text(NODE_EXAMPLE.replace("http://127.0.0.1:8080", server.url))
    done = subprocess.run(["node", "index.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "undefined" not in done.stdout, done


GREEDY = "{ n_predict: 12, temperature: 0, ignore_eos: true, cache_prompt: false }"


@needs_node
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


@needs_node
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


@needs_node
def test_model_info(node, server):
    status, settings = server.json("GET", "/model.json")
    assert status == 200
    assert json.loads(node("console.log(JSON.stringify(await c.llamaModelInfo(config)))")) == settings


@needs_node
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
    assert is_idle(server)


@needs_node
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
    assert is_idle(server)


@needs_node
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


@needs_node
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
