"""The command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyllama import __version__, cli, pull
from pyllama.gguf import GGUFFile
from pyllama.tokenizer import from_gguf
from tests.serving import ROOT
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command."""
    status = cli.main([str(word) for word in argv])
    return status, *capsys.readouterr()


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch):
    """Puts a text into the standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# ---- texts ------------------------------------------------------------------------------------------------------------


def test_complete(smollm2_path, capsys):
    words = ("-m", smollm2_path, "-c", 128, "-n", 4, "--temperature", 0, "The capital of France is")
    status, out, err = run(capsys, "complete", *words)
    assert (status, err) == (0, "") and out.startswith("The capital of France is Paris")


def test_complete_reads_the_standard_input(model, capsys, says):
    says("hello world\n")
    options = ("-m", model, "-n", 5, "--seed", 3)
    status, out, _ = run(capsys, "complete", *options)
    assert status == 0 and out.startswith("hello world")
    assert run(capsys, "complete", *options, "hello world")[1] == out


def test_complete_with_a_grammar(model, capsys, tmp_path):
    grammar = tmp_path / "digits.gbnf"
    grammar.write_text("root ::= [0-9]{4}")
    status, out, _ = run(capsys, "complete", "-m", model, "--grammar-file", grammar, "n = ")
    assert status == 0 and re.fullmatch(r"n = \d{4}\n", out)
    grammar.write_text("root ::= nothing")
    status, _, err = run(capsys, "complete", "-m", model, "--grammar-file", grammar, "n = ")
    assert status == 1 and "nothing" in err


def test_complete_with_a_json_schema(model, capsys, tmp_path):
    schema = tmp_path / "digits.json"
    schema.write_text('{"type": "array", "items": {"enum": [7]}, "minItems": 3, "maxItems": 3}')
    status, out, _ = run(capsys, "complete", "-m", model, "--json-schema-file", schema, "n = ")
    assert status == 0 and re.fullmatch(r"n = \[7, ?7, ?7\]\n", out)
    status, out, _ = run(capsys, "complete", "-m", model, "--json-schema", '{"const": 12}', "n = ")
    assert (status, out) == (0, "n = 12\n")
    status, _, err = run(capsys, "complete", "-m", model, "-j", '{"not": {}}', "n = ")
    assert status == 1 and "#/not: 'not' cannot be expressed" in err
    status, _, err = run(capsys, "complete", "-m", model, "-j", "{", "n = ")
    assert status == 1 and "the schema is not JSON" in err


def test_chat_line_by_line(smollm2_path, capsys, says):
    says("What is the capital of France?\n\n  \nAnd of Italy?")
    status, out, err = run(capsys, "chat", "-m", smollm2_path, "-n", 24, "--temperature", 0, "--system", "Be brief.")
    assert (status, err) == (0, "")
    assert "Paris" in out.splitlines()[0] and "Rome" in out


def test_a_long_chat_forgets_its_beginning(model, capsys, says):
    says("hello world and all the time of day\n" * 12)
    status, out, err = run(capsys, "chat", "-m", model, "-c", 128, "-n", 16, "--system", "be kind")
    assert (status, err) == (0, "") and out.count("\n") >= 12


def test_chat_on_a_terminal(model):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pyllama.cli", "chat", "-m", str(model), "-n", "5"]
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = read_until(ours, b"> ")
        os.write(ours, b"hello\n")
        seen += read_until(ours, b"> ")
        os.write(ours, b"\x04")  # the end of the input
        with contextlib.suppress(OSError):  # the terminal is gone with its last user
            seen += os.read(ours, 1000)
        assert process.wait(timeout=20) == 0
        assert b"Traceback" not in seen
    os.close(ours)


def read_until(terminal: int, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end):
        seen += os.read(terminal, 1000)
    return seen


def test_an_interrupt_ends_a_command_quietly(model):
    command = [
        sys.executable,
        "-m",
        "pyllama.cli",
        "complete",
        "-m",
        str(model),
        "-c",
        "100000",
        "-n",
        "90000",
        "hello",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(20)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130 and err == b"\n"
        assert time.monotonic() - began < 5


def test_a_reader_that_goes_away(model):
    command = f"{sys.executable} -m pyllama.cli inspect -m {model} | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("GGUF version 3")


# ---- files ------------------------------------------------------------------------------------------------------------


def test_tokenize(model, capsys, says):
    with GGUFFile.open(model) as gguf:
        tokenizer = from_gguf(gguf)
    text = "hello<|im_end|> é"
    tokens = tokenizer.encode(text, add_special=True)
    assert json.loads(run(capsys, "tokenize", "-m", model, "--json", text)[1]) == tokens
    lines = run(capsys, "tokenize", "-m", model, text)[1].splitlines()
    assert [int(line.split()[0]) for line in lines] == tokens
    assert "'<|im_end|>'" in lines[-4]
    plain = tokenizer.encode(text, parse_special=False)
    assert json.loads(run(capsys, "tokenize", "-m", model, "--json", "--no-special", text)[1]) == plain
    says("hello\n")
    assert json.loads(run(capsys, "tokenize", "-m", model, "--json")[1]) == tokenizer.encode("hello", add_special=True)


def test_inspect(model, capsys):
    status, out, _ = run(capsys, "inspect", "-m", model)
    assert status == 0
    assert re.search(r"general\.name = .*tiny llama", out) and re.search(r"token_embd\.weight +F32 +64 x \d+", out)
    assert max(map(len, out.splitlines())) < 200  # long arrays are cut
    found = json.loads(run(capsys, "inspect", "-m", model, "--json")[1])
    assert found["version"] == 3 and found["metadata"]["llama.block_count"] == 2
    with GGUFFile.open(model) as gguf:
        assert [tensor["name"] for tensor in found["tensors"]] == list(gguf.tensors)


def test_perplexity(model, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello world and all the time of day " * 20)
    status, out, err = run(capsys, "perplexity", "-m", model, "-f", text, "-c", 64)
    assert status == 0
    assert re.fullmatch(r"perplexity \d+\.\d+ \+/- \d+\.\d+ over \d+ tokens\n", out)
    running = [float(value) for value in re.findall(r"\[\d+\] (\d+\.\d+)", err)]
    assert len(running) > 1 and f"perplexity {running[-1]:.4f} " in out


def test_bench(model, capsys):
    status, out, _ = run(capsys, "bench", "-m", model, "-p", 16, "-n", 2, "-r", 1, "--json")
    assert status == 0 and {r["work"] for r in json.loads(out)["results"]} == {"prompt 16", "generate 2"}


def test_pull(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PYLLAMA_CACHE", str(tmp_path))
    status, out, _ = run(capsys, "pull")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == list(pull.KNOWN)
    status, _, err = run(capsys, "pull", "no-such-model")
    assert status == 1 and "no-such-model" in err and pull.DEFAULT in err
    monkeypatch.setattr(pull, "path_of", lambda name: tmp_path / name)
    assert run(capsys, "pull", "x")[:2] == (0, f"{tmp_path / 'x'}\n")


# ---- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["complete", "x"], ["chat"], ["tokenize", "x"], ["inspect"], ["bench"]])
def test_files_that_are_no_models(command, capsys, tmp_path, says):
    says("")
    bad = tmp_path / "bad.gguf"
    for content, complaint in ((None, "No such file"), (b"nonsense", "not a GGUF")):
        if content is not None:
            bad.write_bytes(content)
        status, out, err = run(capsys, *command, "-m", bad)
        assert (status, out) == (1, "") and err.startswith("pyllama: ") and complaint in err and "bad.gguf" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["complete", "-n", "3", "--temperature", "nan", "x"], "temperature"),
        (["complete", "--top-p", "-1", "x"], "top_p"),
        (["complete", "-c", "-5", "x"], "n_ctx"),
        (["perplexity", "-f", "/no/such/file"], "No such file"),
        (["perplexity", "-f", os.devnull], "0 tokens"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(argv, complaint, capsys, model):
    status, _, err = run(capsys, argv[0], "-m", model, *argv[1:])
    assert status == 1 and err.startswith("pyllama: ") and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["dance"], ["complete", "--no-such-flag"], ["perplexity"]])
def test_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and "usage: pyllama" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "complete", "chat", "tokenize", "inspect", "bench", "perplexity", "pull"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"usage: pyllama {command} ")


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"pyllama {__version__}\n"


def test_serve_has_the_servers_flags(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "-np", "none"])
    assert "pyllama serve: error: argument -np/--parallel" in capsys.readouterr().err
