"""The documentation: its commands run, its snippets run, and every flag, file and link that it names exists."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyllama import cli
from pyllama.server.flags import FLAGS
from tests.serving import ROOT, ServerProcess

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = re.compile(r"\W*(?:curl|cmake|pip) ")
"""Commands whose flags are their own."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def server(smollm2_path) -> Iterator[ServerProcess]:
    flags = ("-c", "2048", "-np", "4", "-cb", "--embedding", "--seed", "1")
    with ServerProcess("-m", smollm2_path, *flags) as server:
        yield server


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def pages_with(language: str) -> list:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


def environment(smollm2_path: Path) -> dict[str, str]:
    """The default model is the tests' own; no flag comes from outside."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])
    return {**own, "PATH": path, "PYTHONPATH": str(ROOT), "PYLLAMA_CACHE": str(smollm2_path.parent)}


# ---- what is run ------------------------------------------------------------------------------------------------------

BEFORE = """
set -eu
curl() { command curl --silent --show-error --fail-with-body "$@"; echo; }
pyllama() {
    if [[ $1 == serve ]]; then python server.py "${@:2}"; else command python -m pyllama.cli "$@"; fi
}
python() {  # a server is not started, but its flags are read
    if [[ $1 != server.py ]]; then command python "$@"; return; fi
    command python -c 'from pyllama.server.flags import parse; parse()' "${@:2}"
}
"""


@pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "curl", "jq", "node"))), reason="bash, curl, jq or Node is missing"
)
@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands(server, smollm2_path, page):
    script = BEFORE + "".join(blocks(page, "sh")).replace("http://localhost:8080", server.url)
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment(smollm2_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "rror" not in done.stderr.replace("The requested URL returned error: 400", ""), done.stderr


@pytest.mark.parametrize("page", pages_with("python"))
def test_snippets(server, smollm2_path, page):
    """All of a page, in its order, as one program."""
    pytest.importorskip("openai")
    script = "".join(blocks(page, "python")).replace("http://localhost:8080", server.url)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(smollm2_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_answers_that_are_shown(server):
    """Errors are shown word for word."""
    (shown,) = blocks(ROOT / "docs" / "server.md", "json")
    answer = server.send("POST", "/completion", {"prompt": "x", "top_k": "many"}).read().decode()
    assert answer == shown.strip()


# ---- what is named ----------------------------------------------------------------------------------------------------


@every_page
def test_links(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_files(page):
    """Paths in code that begin with one of the project's folders."""
    for path in re.findall(
        r"(?<![\w/.~])(?:docs|examples|benchmarks|public|pyllama|tests|c_core)/[\w./*-]*\w", page.read_text("utf-8")
    ):
        assert list(ROOT.glob(path)), path


@every_page
def test_flags(page):
    known = all_flags()
    for line in page.read_text(encoding="utf-8").replace("\\\n", "").splitlines():
        if OTHERS.match(line):
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\w", line):
            assert flag in known or any(name.startswith(flag + "-") for name in known), f"{flag} in {line!r}"


def all_flags() -> set[str]:
    """Long flags of the server, of the command line, of the benchmarks and of the example that has some."""
    names = {name for flag in FLAGS for name in flag.names} | {"--help", "--version"}
    (commands,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for parser in commands.choices.values():
        names.update(name for action in parser._actions for name in action.option_strings)
    for script in (ROOT / "examples" / "api_like_OAI.py", *(ROOT / "benchmarks").glob("*.py")):
        names.update(re.findall(r'"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    return names


def test_every_interface_is_a_page_away():
    text = PAGES[0].read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in text, page.name
