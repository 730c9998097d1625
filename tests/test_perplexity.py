"""Perplexity of a text that every Debian system carries, and the errors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pyllama.cli import main
from pyllama.models import load
from pyllama.perplexity import perplexity
from tests import tiny_models
from tests.numpy_models import Reference

GPL = Path("/usr/share/common-licenses/GPL-3")
GPL_SHA256 = "3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986"


@pytest.fixture(scope="module")
def gpl() -> str:
    if not GPL.exists():
        pytest.skip("Debian's text of the GPL is not on this system")
    assert hashlib.sha256(GPL.read_bytes()).hexdigest() == GPL_SHA256
    return GPL.read_text()


@pytest.mark.parametrize(("name", "expected"), [("smollm2", 18.39), ("gemma", 13.91)])
def test_of_the_gpl(request: pytest.FixtureRequest, gpl: str, name: str, expected: float) -> None:
    """Within 1 % of what an established engine measures."""
    model = load(request.getfixturevalue(f"{name}_path"), n_ctx=512)
    *_, last = perplexity(model, gpl, 512)
    assert last.n_scored == 14 * 255
    assert last.value == pytest.approx(expected, rel=0.01)
    model.close()


@pytest.mark.parametrize(("kv_type", "cost"), [("q8_0", 0.01), ("q4_0", 0.08)])
def test_with_quantized_keys_and_values(smollm2_path: Path, gpl: str, kv_type: str, cost: float) -> None:
    model = load(smollm2_path, n_ctx=512, kv_type=kv_type)
    *_, last = perplexity(model, gpl, 512)
    assert last.value == pytest.approx(18.39, rel=cost)
    model.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity") / "tiny.gguf"
    tiny_models.make_llama(path, quant="F32")
    return path


def test_against_the_oracle(tiny: Path) -> None:
    model = load(tiny, n_ctx=64, kv_type="f32")
    text = "the quick brown fox jumps over the lazy dog " * 8
    tokens = model.tokenizer.encode(text, add_special=True)
    reference, losses = Reference(tiny), []
    for window in range(len(tokens) // 64):
        piece = tokens[window * 64 : (window + 1) * 64]
        rows = reference.logits(piece)
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        losses += [-rows[i, piece[i + 1]] for i in range(32, 63)]
    *_, last = perplexity(model, text, 64)
    assert last.n_scored == len(losses)
    assert last.value == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-3)


def test_a_text_that_is_too_short(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "short.txt"
    file.write_text("too short")
    assert main(["perplexity", "-m", str(tiny), "-f", str(file), "-c", "512"]) == 1
    assert "a window 512" in capsys.readouterr().err
