"""The page at / and the other files, in headless Chromium, against a real server."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, Page, find_chromium
from tests.serving import ServerProcess, loading_server, wait_until
from tests.tiny_models import make_llama

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")

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
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(path)
    return path


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[ServerProcess]:
    # A fixed seed: the random model's text may end at once, or open an HTML comment that hides the rest.
    flags = ("-c", "4096", "-np", "2", "-cb", "--path", folder, "-a", "a tiny model", "--seed", "1")
    with ServerProcess("-m", model, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, server: ServerProcess) -> Iterator[OpenPage]:
    """Opens the page at /, by default that of ``server``, with the model known to it and these settings. A script keeps what the
    page asks of the server in ``requests``. In the end nothing may have gone wrong in it, but for the server's errors where
    ``refusals`` are expected."""
    pages = []

    def open_(
        url: str = server.url,
        *,
        ready: bool = True,
        settings: dict[str, Any] | None = None,
        before: str = "",
        refusals: bool = False,
        **options: Any,
    ) -> Page:
        script = (
            f"localStorage['pyllama.settings'] ??= {json.dumps(json.dumps(settings or {}))}; {KEEP_REQUESTS} {before}"
        )
        page = browser.open(url, before=script, **options)
        pages.append((page, refusals))
        page.wait_for("document.body?.dataset.state === 'idle'")
        if ready:
            page.wait_for("document.getElementById('model').textContent")
        return page

    yield open_
    for page, refusals in pages:
        # The browser complains about every answer that is an error.
        complaints = [it for it in page.complaints if not (refusals and it.startswith("Failed to load resource"))]
        assert complaints == []
        page.close()


KEEP_REQUESTS = """
window.requests = []
const fetch_ = window.fetch
window.fetch = (url, options = {}) => {
  if (options.body) requests.push({ path: new URL(url).pathname, ...JSON.parse(options.body) })
  return fetch_(url, options)
}
"""
ENDLESS = {"ignore_eos": True, "n_predict": 100_000}
"""Settings with which a random model does not come to an end."""
SHORT = {"ignore_eos": True, "n_predict": 12}


def busy(page: Page) -> None:
    page.wait_for("document.body.dataset.state === 'busy'")


def idle(page: Page) -> None:
    page.wait_for("document.body.dataset.state === 'idle'")


def ask(page: Page, text: str) -> None:
    """Sends a message in a chat; the page is busy from then on."""
    page.write("#message", text)
    page.press("Enter")


def texts(page: Page, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((it) => it.innerText.trim())")


def last_request(page: Page) -> dict[str, Any]:
    return page.run("requests.at(-1)")


ANSWER = ".message.assistant .body"
WRITTEN = f"document.querySelector('{ANSWER}')?.textContent.length"


def set_answer(page: Page, text: str) -> None:
    """Makes a text the last answer, by editing it."""
    page.click(".message:last-child .edit")
    page.write(".editor textarea", text)
    page.press("Enter", ctrl=True)


# ---- chats ------------------------------------------------------------------------------------------------------------


@needs_chromium
def test_a_chat(server, open_page):
    page = open_page(settings={"ignore_eos": True, "n_predict": 40})
    assert page.run("document.title") == "pyllama"
    assert page.run("document.getElementById('model').textContent") == "a tiny model · 4096 tokens of context"
    assert page.run("document.activeElement.id") == "message"
    ask(page, "hello world")
    idle(page)
    assert texts(page, ".message.user .body") == ["hello world"]
    assert page.run(WRITTEN) > 0
    (stats,) = texts(page, ".message .stats")
    assert "40 tokens, " in stats and stats.count("tokens/s") == 2 and "prompt" in stats and "limit reached" in stats
    request = last_request(page)
    assert request["path"] == "/v1/chat/completions"
    assert request["messages"] == [{"role": "user", "content": "hello world"}]
    assert (request["stream"], request["n_predict"], request["ignore_eos"]) == (True, 40, True)
    assert "temperature" not in request  # the server's default
    answer = page.run("document.querySelector('.message.assistant .body').innerText")
    ask(page, "and then?")
    idle(page)
    roles = [message["role"] for message in last_request(page)["messages"]]
    assert roles == (["user", "assistant", "user"] if answer.strip() else ["user"])
    assert page.run("document.title") == "hello world – pyllama"


@needs_chromium
@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(server, open_page, how):
    page = open_page(settings=ENDLESS)
    ask(page, "hello")
    page.wait_for(f"{WRITTEN} > 20")
    log = "document.getElementById('messages-list').ariaBusy"
    assert page.run(log) == "true"
    if how == "button":
        page.click("#stop")
    else:
        page.press("Escape")
    idle(page)
    assert "stopped" in texts(page, ".message .stats")[0]
    assert page.run(log) == "false"
    page.wait_for("document.getElementById('announcer').textContent === 'The answer is complete.'")
    wait_until(server.is_idle, 60)
    length = page.run(WRITTEN)
    assert length > 20
    ask(page, "go on")  # all works as before
    page.wait_for(
        "document.querySelectorAll('.message').length === 4 && document.querySelector('.message:last-child .body').innerText"
    )
    assert page.run(WRITTEN) == length
    page.press("Escape")
    idle(page)


@needs_chromium
def test_leaving_the_page_ends_the_generation(server, open_page):
    page = open_page(settings=ENDLESS)
    ask(page, "hello")
    page.wait_for(f"{WRITTEN} > 20")
    page.call("Page.navigate", url=f"{server.url}/sub/text.txt")
    wait_until(server.is_idle, 60)
    page.call("Page.navigate", url=server.url)
    page.wait_for(f"{WRITTEN} > 20")  # what there was has been kept


@needs_chromium
def test_again_and_edit(open_page):
    page = open_page(settings=SHORT)
    ask(page, "hello")
    idle(page)
    page.run("window.first = document.querySelector('.message.assistant')")
    page.click(".regenerate")
    idle(page)
    assert page.run("document.querySelectorAll('.message').length") == 2
    assert page.run("first.isConnected") is False
    answer = f"document.querySelector('{ANSWER}').innerText"
    second = page.run(answer)
    page.click(".message .before")
    assert page.run(answer) == page.run("first.querySelector('.body').innerText")
    assert texts(page, ".message .actions .stats") == ["1 / 2"]
    assert page.run("document.activeElement.matches('.after')")  # there is none before
    page.click(".message .after")
    assert page.run(answer) == second and texts(page, ".message .actions .stats") == ["2 / 2"]
    assert last_request(page)["messages"] == [{"role": "user", "content": "hello"}]
    set_answer(page, "An *edited* answer")
    assert page.run(f"document.querySelector('{ANSWER} em').textContent") == "edited"
    ask(page, "more")
    idle(page)
    assert [message["content"] for message in last_request(page)["messages"]] == ["hello", "An *edited* answer", "more"]
    page.click(".message.user .edit")
    page.write(".editor textarea", "never mind")
    page.press("Escape")  # leaves all as it was
    assert texts(page, ".message.user .body") == ["hello", "more"]
    page.click(".message.user .edit")
    page.write(".editor textarea", "goodbye")
    page.click(".message.user .primary")
    idle(page)
    assert last_request(page)["messages"] == [{"role": "user", "content": "goodbye"}]
    assert (
        texts(page, ".message.user .body") == ["goodbye"]
        and page.run("document.querySelectorAll('.message').length") == 2
    )


@needs_chromium
def test_the_system_prompt(open_page):
    page = open_page(settings=SHORT)
    page.click("#system-box summary")
    page.write("#system", "You are brief.")
    ask(page, "hello")
    idle(page)
    assert last_request(page)["messages"] == [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "hello"},
    ]
    assert texts(page, "#system-state") == ["You are brief."]
    page.press("n", alt=True)  # belongs to its conversation
    assert page.run("document.getElementById('system').value") == ""


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
ADD_IMAGE = f"""(async () => {{
  const bytes = Uint8Array.from(atob('{PIXEL}'), (it) => it.charCodeAt(0))
  const transfer = new DataTransfer()
  transfer.items.add(new File([bytes], 'a.png', {{ type: 'image/png' }}))
  document.getElementById('image-file').files = transfer.files
  document.getElementById('image-file').dispatchEvent(new Event('change'))
}})()"""


@needs_chromium
def test_images_where_the_model_takes_none(open_page):
    page = open_page()
    assert page.run("document.getElementById('add-image').getAttribute('aria-disabled')") == "true"
    page.click("#add-image")
    assert "does not take images" in page.wait_for("document.getElementById('notice-text').textContent")
    page.click("#notice-close")
    assert page.run("document.getElementById('notice').hidden")


@needs_chromium
def test_images_where_the_model_takes_them(open_page):
    """No model takes them yet: the server's word for it, and its answer, are made up."""
    sees = """
const ask_ = window.fetch
const stream = 'data: {"choices":[{"index":0,"delta":{"content":"A pixel."},"finish_reason":null}]}\\n\\n' +
  'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\\n\\ndata: [DONE]\\n\\n'
window.fetch = async (url, options) => {
  if (url.endsWith('completions')) {
    requests.push(JSON.parse(options.body))
    return new Response(stream, { headers: { 'Content-Type': 'text/event-stream' } })
  }
  const response = await ask_(url, options)
  return url.endsWith('/props') ? Response.json({ ...(await response.json()), modalities: { vision: true } }) : response
}
"""
    page = open_page(before=sees)
    assert page.run("document.getElementById('add-image').getAttribute('aria-disabled')") == "false"
    page.run(ADD_IMAGE)
    page.wait_for("document.querySelectorAll('#images img').length === 1")
    page.run(ADD_IMAGE)
    page.wait_for("document.querySelectorAll('#images img').length === 2")
    page.click("#images li:first-child button")
    page.wait_for("document.querySelectorAll('#images img').length === 1")
    ask(page, "What is this?")
    idle(page)
    text, image = last_request(page)["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is this?"}
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))[:2] == b"\xff\xd8"
    assert page.run("document.querySelector('.message.user img').naturalWidth") == 1
    assert texts(page, ANSWER) == ["A pixel."]


# ---- texts -------------------------------------------------------------------------------------------------------------


@needs_chromium
def test_a_text(server, open_page):
    printable = {"shape": "grammar", "grammar": "root ::= [ -~]*"}  # a field shows every kind of line break as one
    page = open_page(settings={**SHORT, **printable})
    page.click("input[value=text]")
    assert page.run("document.getElementById('text').hidden") is False
    page.write("#document", "hello world")
    page.press("Enter", ctrl=True)
    idle(page)
    value = "document.getElementById('document').value"
    first = page.run(value)
    assert first.startswith("hello world") and len(first) > len("hello world")
    request = last_request(page)
    assert (request["path"], request["prompt"], request["n_predict"]) == ("/completion", "hello world", 12)
    assert "temperature" not in request and "stop" not in request
    assert "12 tokens, " in page.run("document.getElementById('text-state').textContent")
    assert page.run("document.querySelector('#mirror .new').textContent") == first.removeprefix("hello world")
    assert page.run("document.getElementById('mirror').textContent.slice(0, -1)") == first
    page.click("#retry")
    idle(page)
    assert last_request(page)["prompt"] == "hello world"
    page.click("#undo")
    assert page.run(value) == "hello world" and page.run("document.getElementById('undo').disabled")
    page.click("#continue")
    idle(page)
    before = page.run(value)
    page.run("document.getElementById('document').focus()")
    page.run("document.getElementById('document').setSelectionRange(5, 5)")
    page.call("Input.insertText", text=" there,")
    assert page.run(value) == before[:5] + " there," + before[5:]
    assert page.run("document.querySelector('#mirror .new').textContent") == before.removeprefix("hello world")
    page.click("#continue")
    idle(page)
    assert last_request(page)["prompt"] == before[:5] + " there," + before[5:]


@needs_chromium
def test_stopping_a_text(server, open_page):
    page = open_page(settings=ENDLESS)
    page.click("input[value=text]")
    page.write("#document", "hello")
    page.click("#continue")
    page.wait_for("document.getElementById('document').value.length > 20")
    assert page.run("document.getElementById('document').readOnly")
    page.click("#text-stop")
    idle(page)
    wait_until(server.is_idle, 60)
    assert "stopped" in page.run("document.getElementById('text-state').textContent")
    assert not page.run("document.getElementById('document').readOnly")


# ---- probabilities -------------------------------------------------------------------------------------------------------

CARD_ROWS = "document.getElementById('token-card').hidden ? 0 : document.querySelectorAll('#token-card tr').length"


@needs_chromium
def test_probabilities_in_a_chat(open_page):
    page = open_page(settings={**SHORT, "n_probs": 5})
    ask(page, "hello")
    idle(page)
    n = page.run("document.querySelectorAll('.message .token').length")
    assert 4 < n <= 12  # several tokens may make up one character
    request = last_request(page)
    assert (request["logprobs"], request["top_logprobs"]) == (True, 5) and "n_probs" not in request
    page.hover(".message .token:nth-child(3)")
    assert page.wait_for(CARD_ROWS) in (5, 6)  # the chosen one may not be among the likeliest
    assert page.run("document.querySelectorAll('#token-card .chosen').length") == 1
    page.press("Escape")
    assert page.run(CARD_ROWS) == 0
    page.run("document.querySelector('.message .tokens').focus()")
    for key, shown in (("ArrowRight", 0), ("ArrowRight", 1), ("End", n - 1), ("ArrowLeft", n - 2)):
        page.press(key)
        assert (
            page.run("[...document.querySelectorAll('.message .token')].findIndex((it) => it.matches('.shown'))")
            == shown
        )
    page.click(".as-tokens")
    assert page.run("document.querySelectorAll('.message .token').length") == 0
    assert page.run(CARD_ROWS) == 0
    page.click(".as-tokens")
    assert page.run("document.querySelectorAll('.message .token').length") == n


@needs_chromium
def test_probabilities_in_a_text(open_page):
    page = open_page(settings={**SHORT, "n_probs": 5})
    page.click("input[value=text]")
    page.write("#document", "hello")
    page.press("Enter", ctrl=True)
    idle(page)
    assert last_request(page)["n_probs"] == 5
    assert 4 < page.run("document.querySelectorAll('#mirror .token').length") <= 12
    visible = page.run("[...document.querySelectorAll('#mirror .token')].findIndex((it) => it.textContent.trim())") + 2
    page.hover(f"#mirror .token:nth-child({visible})")
    assert page.wait_for(CARD_ROWS) in (5, 6)
    page.press("Escape")
    assert page.run(CARD_ROWS) == 0
    page.run("document.getElementById('document').setSelectionRange(6, 6)")  # as the arrow keys do
    assert page.wait_for(CARD_ROWS) in (5, 6)


# ---- settings ------------------------------------------------------------------------------------------------------------


@needs_chromium
def test_settings(open_page):
    page = open_page(width=1300)
    page.click("#show-settings")
    assert page.run("document.getElementById('option-temperature').value") == "0.8"
    assert page.run("document.getElementById('reset').disabled")
    page.write("#option-temperature", "0.35")
    page.press("Tab")
    page.write("#option-n_predict", "7")
    for group in (2, 3, 4):
        page.click(f"#setting-groups details:nth-child({group}) summary")
    page.run(
        "Object.assign(document.getElementById('option-mirostat'), { value: 2 }).dispatchEvent(new Event('change'))"
    )
    page.click("#option-penalize_nl")
    page.write("#option-stop", "END\nSTOP")
    page.write("#option-seed", "5")
    page.press("Tab")
    page.run("""(() => {
  const slider = document.querySelector('#option-min_p ~ [type=range]')
  slider.value = 0.2
  slider.dispatchEvent(new Event('input'))
})()""")
    ask(page, "hello")
    idle(page)
    request = last_request(page)
    expected = {"temperature": 0.35, "n_predict": 7, "mirostat": 2, "penalize_nl": False, "stop": ["END", "STOP"],
                "seed": 5, "min_p": 0.2}  # fmt: skip
    assert {name: request.get(name) for name in expected} == expected
    assert set(request) == {*expected, "path", "messages", "stream"}

    page.write("#option-top_p", "hot")  # no number: the field goes back
    page.press("Tab")
    assert page.run("document.getElementById('option-top_p').value") == "0.95"
    page.call("Page.reload")
    page.wait_for(
        "document.getElementById('model')?.textContent && document.getElementById('option-temperature').value === '0.35'"
    )
    page.click(".option:has(#option-temperature) .reset-one")
    assert page.run("document.getElementById('option-temperature').value") == "0.8"
    page.run("[...document.querySelectorAll('#presets button')].find((it) => it.textContent === 'Exact').click()")
    assert page.run("document.getElementById('option-temperature').value") == "0"
    assert page.run("document.getElementById('option-n_predict').value") == "7"  # is no matter of a preset
    page.click("#reset")
    assert page.run("localStorage['pyllama.settings']") == "{}"
    assert page.run("document.getElementById('option-n_predict').value") == "-1"


@needs_chromium
def test_every_setting_is_explained_and_can_be_reached(open_page):
    page = open_page()
    page.press("s", alt=True)
    assert page.run("document.activeElement.id") == "hide-settings"
    page.run("document.querySelectorAll('#settings details').forEach((it) => { it.open = true })")
    unexplained = page.run("""[...document.querySelectorAll('#setting-groups :is(input:not([type=range]), select, textarea)')]
      .filter((it) => !it.labels.length || !document.getElementById(it.getAttribute('aria-describedby'))?.textContent)
      .map((it) => it.id)""")
    assert unexplained == []
    names = page.run("[...document.querySelectorAll('#setting-groups [id^=option-]')].map((it) => it.id)")
    documented = ["temperature", "top_k", "top_p", "min_p", "n_predict", "tfs_z", "typical_p", "repeat_penalty",
                  "repeat_last_n", "penalize_nl", "presence_penalty", "frequency_penalty", "mirostat", "mirostat_tau",
                  "mirostat_eta", "seed", "ignore_eos", "stop", "n_probs"]  # fmt: skip
    assert {f"option-{name}" for name in documented} <= set(names)
    page.press("Escape")


@needs_chromium
@pytest.mark.parametrize("mode", ["chat", "text"])
def test_a_grammar(open_page, mode):
    page = open_page(settings={"shape": "grammar", "grammar": 'root ::= "yes" | "no"'})
    page.click(f"input[value={mode}]")
    if mode == "chat":
        ask(page, "hello")
        idle(page)
        assert texts(page, ANSWER)[0] in ("yes", "no")
    else:
        page.press("Enter", ctrl=True)
        idle(page)
        assert page.run("document.getElementById('document').value") in ("yes", "no")


SCHEMA = {"type": "object", "properties": {"n": {"enum": [7, 8]}}, "required": ["n"], "additionalProperties": False}


@needs_chromium
@pytest.mark.parametrize("mode", ["chat", "text"])
def test_a_schema(open_page, mode):
    page = open_page(settings={"shape": "schema", "schema": json.dumps(SCHEMA)}, width=1300)
    page.click(f"input[value={mode}]")
    if mode == "chat":
        ask(page, "hello")
    else:
        page.press("Enter", ctrl=True)
    idle(page)
    answer = texts(page, ANSWER)[0] if mode == "chat" else page.run("document.getElementById('document').value")
    assert json.loads(answer)["n"] in (7, 8)
    page.click("#show-settings")
    page.click("#shape-box summary")
    page.click("#to-grammar")
    page.wait_for("document.activeElement.id === 'grammar'")
    assert page.run("document.getElementById('grammar').value") == last_request(page)["grammar"]
    page.click("input[value=schema]")
    page.write("#schema", '{"type": "nothing"}')
    page.wait_for("document.getElementById('schema-error').textContent.includes('nothing')")


@needs_chromium
def test_a_wrong_grammar_and_a_wrong_schema(open_page):
    page = open_page(settings={"shape": "grammar", "grammar": "root ::= ("}, refusals=True, width=1300)
    ask(page, "hello")
    idle(page)
    assert "grammar" in texts(page, ".message .error")[0]
    page.click("#show-settings")
    page.click("#shape-box summary")
    page.click("input[value=schema]")
    page.write("#schema", "{")
    assert "not JSON" in page.wait_for("document.getElementById('schema-error').textContent")
    page.click(".message .error button")
    idle(page)
    assert "not JSON" in texts(page, ".message .error")[0]


# ---- what the browser keeps --------------------------------------------------------------------------------------------


TITLES = "#conversation-list .open"


@needs_chromium
def test_conversations(open_page):
    page = open_page(settings=SHORT)
    ask(page, "the first one")
    idle(page)
    page.click("#new-text")
    page.write("#document", "the second one")
    page.click("#new-chat")
    ask(page, "the third one")
    idle(page)
    assert texts(page, TITLES) == ["the third one", "the second one", "the first one"]
    page.click("#conversation-list li:nth-child(2) .open")
    assert page.run("document.getElementById('document').value") == "the second one"
    page.call("Page.reload")
    page.wait_for("document.querySelectorAll('#conversation-list li').length === 3")
    page.wait_for("document.getElementById('document').value === 'the second one'")  # the one that was open is
    page.click("#conversation-list li:nth-child(3) .open")
    assert texts(page, ".message.user .body") == ["the first one"]

    page.click("#conversation-list li.current .rename")
    page.write("dialog input", "<b>renamed</b>")
    page.press("Enter")
    page.wait_for("document.getElementById('title').textContent === '<b>renamed</b>'")
    page.click("#conversation-list li.current .delete")
    page.press("Escape")  # not after all
    page.wait_for("!document.querySelector('dialog[open]')")
    page.click("#conversation-list li.current .delete")
    page.click("dialog .danger")
    page.wait_for("document.querySelectorAll('#conversation-list li').length === 2")
    assert page.run("document.querySelectorAll('.message').length") == 0
    page.call("Page.reload")
    page.wait_for("document.querySelectorAll('#conversation-list li').length === 2")


@needs_chromium
def test_an_answer_goes_on_while_another_conversation_is_open(server, open_page):
    page = open_page(settings=ENDLESS)
    ask(page, "hello")
    page.wait_for(f"{WRITTEN} > 20")
    length = page.run(WRITTEN)
    page.press("n", alt=True)
    idle(page)
    assert page.run("document.querySelectorAll('.message').length") == 0
    page.click(f"{TITLES}:has(.busy)")
    page.wait_for(f"{WRITTEN} > {length + 20}")
    busy(page)
    page.click("#conversation-list li.current .delete")  # ends it, too
    page.click("dialog .danger")
    idle(page)
    wait_until(server.is_idle, 60)


@needs_chromium
def test_another_window(open_page, server):
    page = open_page(settings=SHORT)
    ask(page, "hello")
    idle(page)
    other = open_page(beside=page)
    assert texts(other, TITLES) == ["hello"]
    ask(page, "more")
    idle(page)
    other.run("document.dispatchEvent(new Event('visibilitychange'))")
    page_texts = texts(page, ".message .body")
    other.wait_for(
        "document.querySelectorAll('.message').length === 4 || document.querySelectorAll('#conversation-list li').length"
    )
    other.click(TITLES)
    other.wait_for("document.querySelectorAll('.message').length === 4")
    assert texts(other, ".message .body") == page_texts


@needs_chromium
def test_export_and_import(open_page):
    page = open_page(settings=SHORT)
    ask(page, "hello")
    idle(page)
    page.run(
        "window.saved = null; URL.createObjectURL = (blob) => { saved = blob; return '#' }; URL.revokeObjectURL = () => {}"
    )
    page.click("#export")
    text = page.run("saved.text()")
    (conversation,) = json.loads(text)
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]

    def load(text: str) -> None:
        page.run(f"""(() => {{
  const transfer = new DataTransfer()
  transfer.items.add(new File([{json.dumps(text)}], 'a.json', {{ type: 'application/json' }}))
  document.getElementById('import-file').files = transfer.files
  document.getElementById('import-file').dispatchEvent(new Event('change'))
}})()""")

    load(json.dumps([{**conversation, "id": "another", "title": "from a file"}, conversation, {"id": 3}, None, []]))
    page.wait_for("document.getElementById('notice-text').textContent === 'One conversation was added.'")
    assert sorted(texts(page, TITLES)) == ["from a file", "hello"]
    odd = {
        "id": "odd",
        "title": 7,
        "messages": [5, {"role": "user"}, {"content": [1], "pieces": [{"tokens": 1}]}],
        "pieces": ["a"],
    }
    load(json.dumps(odd))
    page.click("#conversation-list li:last-child .open")  # without a date it is the oldest
    page.wait_for("document.querySelectorAll('.message').length === 2")
    load("nonsense")
    page.wait_for("document.getElementById('notice-text').textContent.includes('does not hold')")


# ---- Markdown ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def render(open_page) -> Callable[[str], str]:
    """The HTML that a text is shown as; buttons left out."""
    page = open_page()

    def html(text: str) -> str:
        return page.run(f"""import('/markdown.js').then(({{ showMarkdown }}) => {{
  const element = document.createElement('div')
  showMarkdown(element, {json.dumps(text)})
  element.querySelectorAll('button').forEach((it) => it.remove())
  return element.innerHTML
}})""")

    return html


LINK = 'target="_blank" rel="noopener noreferrer nofollow"'
MARKDOWN = [
    ("plain", "<p>plain</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# A *b* #\ntext", "<h1>A <em>b</em></h1><p>text</p>"),
    ("#no heading", "<p>#no heading</p>"),
    ("**bold** __bold__ *em* _em_ ~~gone~~",
     "<p><strong>bold</strong> <strong>bold</strong> <em>em</em> <em>em</em> <del>gone</del></p>"),
    ("***both*** a*b*c snake_case_name 2 * 3 * 4",
     "<p><em><strong>both</strong></em> a<em>b</em>c snake_case_name 2 * 3 * 4</p>"),
    ("**open *and* open", "<p>**open <em>and</em> open</p>"),
    ("`a*b*` ``c`d`` `open", "<p><code>a*b*</code> <code>c`d</code> `open</p>"),
    (r"\*no\* \\ \a", r"<p>*no* \ \a</p>"),
    ("- a\n- b\n  - c\n\ntext", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>text</p>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("1. a\n\n   more\n\n2. b", "<ol><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>"),
    ("- a\n1. b", "<ul><li>a</li></ul><ol><li>b</li></ol>"),
    ("- [x] a", '<ul><li class="task"><input type="checkbox" disabled="">a</li></ul>'),
    ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("| a | b |\n|--|:-:|\n| 1 | *2* |",
     '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th class="center">b</th></tr></thead>'
     '<tbody><tr><td>1</td><td class="center"><em>2</em></td></tr></tbody></table></div>'),
    ("[a *b*](https://x.test/y)", f'<p><a href="https://x.test/y" {LINK}>a <em>b</em></a></p>'),
    ("see https://x.test/a_(b)_c. <mailto:a@x.test>",
     f'<p>see <a href="https://x.test/a_(b)_c" {LINK}>https://x.test/a_(b)_c</a>. '
     f'<a href="mailto:a@x.test" {LINK}>mailto:a@x.test</a></p>'),
    ("![cat](https://x.test/cat.png)", f'<p><a href="https://x.test/cat.png" {LINK}>cat</a></p>'),
    ("```py\n<b> & *c*\n\n  d\n```\ne", '<div class="code-block"><div class="code-head"><span>py</span></div>'
     '<pre tabindex="0"><code>&lt;b&gt; &amp; *c*\n\n  d</code></pre></div><p>e</p>'),
    ("~~~\nopen ```", '<div class="code-block"><div class="code-head"><span>code</span></div>'
     '<pre tabindex="0"><code>open ```</code></pre></div>'),
]  # fmt: skip


@needs_chromium
def test_markdown(render):
    for text, expected in MARKDOWN:
        assert render(text) == expected, text


ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "a <b onclick=1>b</b> <!-- c",
    "[a](javascript:window.hit=1)",
    "[a](JaVaScRiPt:window.hit=1) [b](\tjavascript:1) [c](data:text/html,<script>1</script>)",
    "[a](<javascript:window.hit=1>) <javascript:window.hit=1> [x](vbscript:1)",
    "![a](javascript:window.hit=1) ![b](https://x.test/track.png)",
    '[a](https://x.test/"onmouseover="window.hit=1)',
    "https://x.test/<script>window.hit=1</script>",
    "```<script>window.hit=1</script>\n</code></pre><script>window.hit=1</script>\n```",
    "| <img src=x onerror=window.hit=1> |\n|--|\n| </table><script>window.hit=1</script> |",
    "# <iframe src='javascript:window.hit=1'>\n> <svg onload=window.hit=1>\n- <style>*{display:none}</style>",
    "&lt;script&gt;window.hit=1&lt;/script&gt; &#60;script&#62;",
]


@needs_chromium
def test_markdown_lets_no_markup_through(open_page):
    page = open_page(settings=SHORT)
    ask(page, "hello")
    idle(page)
    set_answer(page, "\n\n".join(ATTACKS))
    assert page.run(f"document.querySelector('{ANSWER}').textContent.length") > 400
    tags = page.run(f"[...document.querySelectorAll('{ANSWER} *')].map((it) => it.tagName.toLowerCase())")
    harmless = {"p", "a", "br", "span", "code", "pre", "div", "button", "svg", "use", "table", "thead", "tbody", "tr", "th",
                "td", "h1", "blockquote", "ul", "li"}  # fmt: skip
    assert set(tags) <= harmless
    names = page.run(f"[...document.querySelectorAll('{ANSWER} *')].flatMap((it) => it.getAttributeNames())")
    assert not [name for name in names if name.startswith("on") or name in ("src", "style", "srcdoc")]
    schemes = page.run(f"[...document.querySelectorAll('{ANSWER} a')].map((it) => it.protocol)")
    assert set(schemes) <= {"https:"}
    assert page.run("window.hit") is None
    set_answer(page, "nothing")  # what is there now is shown in its own form again
    assert texts(page, ANSWER) == ["nothing"]


@needs_chromium
def test_markdown_of_any_text_takes_little_time(open_page):
    page = open_page()
    n = 80_000
    for text in (
        "*" * n, "* a " * n, "_a" * n, "**a*" * n, "*a " * n + "a* " * n, "[a" * n + "](http://x)" * n,
        "`" * n, "`a``" * n, "[" * n, "[a](" * n, "[a](b " * n, "> " * n, "- " * n,
        ">" * n, "~" * n + "`", "<https://" * n, "https://a" + ")" * n, "# " + "# a" * n, "|" * n + "\n" + "|-" * n,
        "- a\n\n" * n, " " * n + "a", "\\" * n, "!" * n + "\n" * n, "1. a\n   - b\n" * (n // 4), "```\n" * n,
    ):  # fmt: skip
        seconds = page.run(f"""import('/markdown.js').then(({{ showMarkdown }}) => {{
  const began = performance.now()
  showMarkdown(document.createElement('div'), {json.dumps(text)})
  return (performance.now() - began) / 1000
}})""")
        assert seconds < 10, text[:20]  # what is quadratic takes minutes; none may exhaust the stack either


@needs_chromium
def test_a_growing_answer_leaves_what_is_done_alone(open_page):
    page = open_page()
    same = page.run("""import('/markdown.js').then(({ showMarkdown }) => {
  const element = document.createElement('div')
  showMarkdown(element, 'one\\n\\ntwo')
  const [first, second] = element.children
  showMarkdown(element, 'one\\n\\ntwo, *and*\\n\\nthree')
  return [element.children[0] === first, element.children[1] === second, element.children.length]
})""")
    assert same == [True, False, 3]


@needs_chromium
def test_copying(browser, open_page, server):
    page = open_page(settings=SHORT)
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.call("Browser.grantPermissions", permissions=permissions, origin=server.url, browserContextId=page.context)
    page.call("Page.bringToFront")
    ask(page, "hello")
    idle(page)
    set_answer(page, "Code:\n```c\nint a = 1;\n```")
    page.click(".code-head button")
    page.wait_for("document.getElementById('announcer').textContent === 'Copied'")
    assert page.run("navigator.clipboard.readText()") == "int a = 1;"
    page.click(".message.assistant footer [aria-label=Copy]")
    page.wait_for("navigator.clipboard.readText().then((text) => text.startsWith('Code:'))")


# ---- when something is wrong ---------------------------------------------------------------------------------------------


@needs_chromium
def test_the_servers_key_is_asked_for(model, open_page):
    with ServerProcess("-m", model, "--api-key", "secret") as server:
        page = open_page(server.url, settings=SHORT, refusals=True)
        ask(page, "hello")
        for key in ("wrong", "secret"):
            page.wait_for("document.querySelector('dialog[open] input[type=password]') !== null")
            page.write("dialog input", key)
            page.press("Enter")
        idle(page)
        assert page.run("document.querySelectorAll('.message .error').length") == 0
        page.call("Page.reload")  # it is kept
        page.wait_for("document.getElementById('model')?.textContent")
        page.click(".regenerate")
        idle(page)
        assert page.run("document.querySelectorAll('dialog[open], .message .error').length") == 0
        page.run("localStorage.removeItem('pyllama.key')")
        page.click(".regenerate")
        page.wait_for("document.querySelector('dialog[open]') !== null")
        page.press("Escape")  # the user does not know it
        idle(page)
        assert "key" in texts(page, ".message .error")[0]


@needs_chromium
def test_the_page_waits_for_the_model(open_page):
    with loading_server() as server:
        page = open_page(server.url, ready=False, refusals=True)
        page.wait_for("document.getElementById('notice-text').textContent.includes('being loaded')")
        ask(page, "hello")
        page.wait_for("document.querySelector('.message .stats')?.textContent.includes('being loaded')")
        busy(page)
        page.press("Escape")
        idle(page)


@needs_chromium
def test_the_page_goes_on_when_the_model_is_there(open_page):
    loading = """
let left = 3
const ask_ = window.fetch
const refusal = { status: 'loading model', error: { code: 503, message: 'the model is being loaded', type: 'unavailable_error' } }
window.fetch = async (url, options) => {
  if (left > 0 && !url.endsWith('/health')) { left -= 1; return Response.json(refusal, { status: 503 }) }
  return left > 0 ? Response.json(refusal, { status: 503 }) : ask_(url, options)
}
window.load = (n) => { left = n }
"""
    page = open_page(before=loading, settings=SHORT, refusals=True)
    page.wait_for("document.getElementById('notice').hidden")
    page.run("load(1)")  # the model comes just before the page asks how the server is
    ask(page, "hello")
    idle(page)
    assert page.run(WRITTEN) > 0
    page.run("load(2)")
    page.click(".regenerate")
    page.wait_for("document.querySelector('.message .stats')?.textContent.includes('being loaded')")
    page.run("load(0)")
    idle(page)
    assert texts(page, ".message .error") == [] and page.run(WRITTEN) > 0


@needs_chromium
def test_a_lost_server(model, open_page):
    server = ServerProcess("-m", model, "-c", "4096")
    try:
        page = open_page(server.url, settings=ENDLESS, refusals=True)
        ask(page, "hello")
        page.wait_for(f"{WRITTEN} > 20")
        server.process.kill()
        server.process.wait()
        idle(page)
        assert "cannot be reached" in texts(page, ".message .error")[0]
        assert page.run(WRITTEN) > 20
        page.click(".message .error button")
        idle(page)
        assert "cannot be reached" in texts(page, ".message .error")[0]
        page.click("input[value=text]")
        page.click("#continue")
        idle(page)
        assert "cannot be reached" in page.run("document.getElementById('text-error').textContent")
    finally:
        server.process.kill()


@needs_chromium
def test_what_the_server_refuses(open_page):
    page = open_page(settings={"top_p": -1}, refusals=True)
    ask(page, "hello")
    idle(page)
    assert "refused: top_p" in texts(page, ".message .error")[0]
    page.click("input[value=text]")
    page.click("#continue")
    idle(page)
    assert "refused: top_p" in page.run("document.getElementById('text-error').textContent")


# ---- looks and keys ------------------------------------------------------------------------------------------------------

COLOURS = """(selector) => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true })
  const luminance = (colour) => {
    canvas.fillStyle = colour
    canvas.fillRect(0, 0, 1, 1)
    const linear = (it) => (it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4)
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((it) => linear(it / 255))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const element = document.querySelector(selector)
  let behind = element
  while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement
  return [luminance(getComputedStyle(element).color), luminance(getComputedStyle(behind).backgroundColor)]
}"""


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_themes(open_page, dark):
    page = open_page(dark=dark, settings=SHORT)
    ask(page, "hello")
    idle(page)

    def is_dark() -> bool:
        for selector in (
            "body",
            "#message",
            "#model",
            ".message .stats",
            ".message.user .body",
            "#show-settings",
            "#conversation-list .open",
        ):
            ink, paper = page.run(f"({COLOURS})({json.dumps(selector)})")
            contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
            assert contrast >= 4.5, (selector, contrast)  # WCAG 2.2, AA
        return ink > paper

    assert is_dark() == dark
    page.click("#theme")  # light
    assert not is_dark()
    page.call("Page.reload")
    page.wait_for("document.querySelector('.message .stats')?.textContent")
    assert not is_dark()
    page.click("#theme")
    assert is_dark()
    page.click("#theme")  # the system's
    assert is_dark() == dark
    page.run("localStorage.clear()")


@needs_chromium
def test_a_phone(open_page):
    page = open_page(width=360, height=640, settings=SHORT)
    ask(page, "hello" * 100)
    page.click("#send")
    idle(page)
    set_answer(page, "x" * 400 + "\n```\n" + "y" * 400 + "\n```\n|a|b|\n|-|-|\n|" + "z" * 300 + "|1|")

    def fits() -> bool:
        small = page.run("""[...document.querySelectorAll('button, summary')].filter((it) => it.getClientRects().length)
          .filter((it) => it.getBoundingClientRect().height < 32).map((it) => it.outerHTML)""")
        assert small == []
        return page.run("document.documentElement.scrollWidth <= 360 && innerWidth === 360")

    assert fits()
    page.click("#show-side")
    assert page.run("document.querySelector('main').inert") and fits()
    page.click("#conversation-list .open")
    assert page.run("document.getElementById('side').hidden") and not page.run("document.querySelector('main').inert")
    page.click("#show-settings")
    assert page.run("document.querySelector('main').inert") and fits()
    page.press("Escape")
    assert (
        page.run("document.getElementById('settings').hidden")
        and page.run("document.activeElement.id") == "show-settings"
    )
    page.click("input[value=text]")
    page.write("#document", "hello")
    page.click("#continue")
    idle(page)
    assert fits()


@needs_chromium
def test_the_keyboard_reaches_everything_and_leaves_it_again(open_page):
    page = open_page(settings=SHORT)
    ask(page, "hello")
    idle(page)
    page.run("document.querySelector('.skip').focus(); window.focused = [document.activeElement]")
    page.run("document.addEventListener('focusin', ({ target }) => { focused.push(target) })")
    for _ in range(60):
        page.press("Tab")
        if page.run("focused.length > 5 && focused.at(-1) === focused[0]"):
            break  # once around
    seen = page.run("[...new Set(focused)].map((it) => it.id || it.className || it.textContent.trim())")
    assert "skip" in seen[0]
    for name in ("new-chat", "theme", "show-settings", "message", "send", "add-image", "icon-button regenerate"):
        assert name in seen, seen
    order = [seen.index(name) for name in ("new-chat", "show-settings", "icon-button regenerate", "message", "send")]
    assert order == sorted(order)
    page.run("document.getElementById('theme').focus({ focusVisible: true })")
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@needs_chromium
def test_shortcuts(open_page):
    page = open_page(settings=SHORT)
    page.press("c", alt=True)
    assert page.run("document.getElementById('side').hidden") and page.run("document.activeElement.id") == "show-side"
    page.press("c", alt=True)
    assert not page.run("document.getElementById('side').hidden")
    page.press("/")
    assert (
        page.run("document.activeElement.id") == "message"
        and page.run("document.getElementById('message').value") == ""
    )
    page.press("/")
    assert page.run("document.getElementById('message').value") == "/"  # in a field it is itself
    page.write("#message", "one")
    page.press("Enter", shift=True)
    assert page.run("document.querySelectorAll('.message').length") == 0
    page.press("Enter")
    idle(page)
    page.run("document.querySelector('#conversation-list .open').focus()")
    page.press("F2")
    page.wait_for("document.querySelector('dialog[open] input') !== null")
    page.write("dialog input", "two")
    page.press("Enter")
    page.wait_for(f"document.querySelector({json.dumps(TITLES)}).innerText.trim() === 'two'")
    page.run("document.activeElement.blur()")
    page.press("?")
    assert page.run("document.getElementById('keys-dialog').open")
    page.press("Escape")
    assert not page.run("document.getElementById('keys-dialog').open")


@needs_chromium
def test_the_page_runs_nothing_but_its_own_modules(open_page):
    page = open_page()
    assert page.run("document.querySelectorAll('script:not([src]), [onclick]').length") == 0
    policy = page.run("document.querySelector('meta[http-equiv=Content-Security-Policy]').content")
    assert "default-src 'self'" in policy and "unsafe" not in policy
    outside = page.run(
        "performance.getEntriesByType('resource').map((it) => new URL(it.name).host).filter((it) => it !== location.host)"
    )
    assert outside == []


# ---- other pages, and the real model ---------------------------------------------------------------------------------------


@needs_chromium
def test_the_documents_own_page(server, browser):
    page = browser.open(f"{server.url}/jokes.html")
    page.wait_for("window.ended")
    assert page.run("document.body.textContent.length") > 10
    wait_until(server.is_idle, 60)
    assert page.complaints == []


@needs_chromium
def test_the_page_with_a_real_model(smollm2_path, open_page):
    with ServerProcess("-m", smollm2_path, "-c", "1024") as server:
        page = open_page(server.url, settings={"temperature": 0, "n_probs": 3, "n_predict": 24})
        ask(page, "What is the capital of France?")
        idle(page)
        assert "Paris" in texts(page, ANSWER)[0]
        assert any("Paris" in text for text in texts(page, ".message .token"))
        page.click("input[value=text]")
        page.write("#document", "The capital of France is")
        page.press("Enter", ctrl=True)
        idle(page)
        assert "Paris" in page.run("document.getElementById('document').value")


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, kind, beginning",
    [
        ("/", "text/html; charset=UTF-8", b"<!doctype html>"),
        ("/index.html", "text/html; charset=UTF-8", b"<!doctype html>"),
        ("/index.js", "text/javascript; charset=UTF-8", b"//"),
        ("/chat.js", "text/javascript; charset=UTF-8", b"//"),
        ("/style.css", "text/css; charset=UTF-8", b"/*"),
        ("/icon.svg", "image/svg+xml", b"<svg"),
        ("/completion.js", "text/javascript; charset=UTF-8", b"//"),
        ("/jokes.html", "text/html; charset=UTF-8", b"<html>"),
        ("/sub/text.txt", "text/plain; charset=UTF-8", b"some text"),
    ],
)
def test_files(server, path, kind, beginning):
    response = server.send("GET", path)
    assert (response.status, response.headers["Content-Type"]) == (200, kind)
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert response.headers["Cache-Control"] == "no-cache" and response.headers["Last-Modified"]
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
