"""Rotary positions: linear scaling and YaRN against their formulas, from files, from options, and in whole models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama import Llama
from pyllama.gguf import GGUFFile
from pyllama.models import ModelError, RopeOptions, SequenceInput, load
from pyllama.models import llama as llama_family
from pyllama.models.hparams import make_rope
from tests.numpy_models import Reference
from tests.serving import ServerProcess
from tests.tiny_models import make_gemma3, make_llama

TOKENS = [3, 17, 42, 7, 7, 99, 120, 5, 64, 33] * 5


def yarn(
    n: int,
    base: float,
    factor: float,
    n_ctx: int,
    *,
    fast: float = 32,
    slow: float = 1,
    ext: float = 1,
    attn: float = 1,
) -> tuple[np.ndarray, float]:
    """Frequencies and magnitude, written after the paper's equations 17 to 22 column by column."""
    frequencies = []
    for i in range(n // 2):
        theta = base ** (-2 * i / n)

        def column(turns: float) -> float:
            return n * math.log(n_ctx / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = max(math.floor(column(fast)), 0), min(math.ceil(column(slow)), n - 1)
        gamma = 1 - min(max((i - low) / max(high - low, 0.001), 0), 1)
        kept = gamma * ext
        frequencies.append((1 - kept) * theta / factor + kept * theta)
    return np.array(frequencies), attn * ((0.1 * math.log(factor) + 1) if ext else 1)


def rope_of(folder: Path, options: RopeOptions | None = None, **keys: Any) -> tuple[np.ndarray, float]:
    """What a file with these keys after ``llama.rope.`` comes to."""
    path = folder / "rope.gguf"
    make_llama(
        path, n_layer=1, n_embd=128, n_head=2, n_head_kv=2, more={f"rope.{key}": value for key, value in keys.items()}
    )
    with GGUFFile.open(path) as gguf:
        hp = llama_family.read_hparams(gguf)
    if options is not None:
        hp = type(hp)(**{**vars(hp), "rope": hp.rope.replaced(options)})
    rope = make_rope(hp, halves=False)
    return rope.frequencies.data, rope.magnitude


def assert_rope(got: tuple[np.ndarray, float], expected: tuple[np.ndarray, float]) -> None:
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    assert got[1] == pytest.approx(expected[1])


PLAIN = 10000.0 ** (-np.arange(0, 64, 2) / 64)


def keys_of(**scaling: Any) -> dict[str, Any]:
    return {f"scaling.{key}": value for key, value in scaling.items()}


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, (PLAIN, 1)),
        (keys_of(factor=4.0), (PLAIN / 4, 1)),
        ({"scale_linear": 4.0}, (PLAIN / 4, 1)),
        (keys_of(type="linear", factor=8.0), (PLAIN / 8, 1)),
        (keys_of(type="none", factor=8.0), (PLAIN, 1)),
        (keys_of(type="yarn", factor=4.0, original_context_length=2048), yarn(64, 1e4, 4, 2048)),
        (keys_of(type="yarn", factor=16.0), yarn(64, 1e4, 16, 512)),
        ({"freq_base": 5e5, **keys_of(type="yarn", factor=40.0, original_context_length=4096, yarn_beta_fast=24.0,
          yarn_beta_slow=2.0, yarn_attn_factor=0.7)}, yarn(64, 5e5, 40, 4096, fast=24, slow=2, attn=0.7)),
        (keys_of(type="yarn", factor=4.0, yarn_ext_factor=0.0, attn_factor=1.25), (PLAIN / 4, 1.25)),
        (keys_of(type="yarn", factor=4.0, yarn_ext_factor=0.25), yarn(64, 1e4, 4, 512, ext=0.25)),
    ],
)  # fmt: skip
def test_what_a_file_says(tmp_path, keys, expected):
    assert_rope(rope_of(tmp_path, **keys), expected)


YARN_FILE = keys_of(type="yarn", factor=4.0, original_context_length=2048)


@pytest.mark.parametrize(
    "keys, options, expected",
    [
        (YARN_FILE, {}, yarn(64, 1e4, 4, 2048)),
        (YARN_FILE, {"scaling": "none"}, (PLAIN, 1)),
        (YARN_FILE, {"scaling": "linear"}, (PLAIN / 4, 1)),
        (YARN_FILE, {"freq_scale": 0.125, "yarn_orig_ctx": 1024}, yarn(64, 1e4, 8, 1024)),
        (YARN_FILE, {"freq_base": 1e6, "yarn_beta_fast": 16, "yarn_beta_slow": 0.5}, yarn(64, 1e6, 4, 2048, fast=16, slow=0.5)),
        ({}, {"freq_scale": 0.5}, (PLAIN / 2, 1)),
        ({}, {"freq_base": 1e6}, (1e6 ** (-np.arange(0, 64, 2) / 64), 1)),
        ({}, {"scaling": "yarn", "freq_scale": 0.25}, yarn(64, 1e4, 4, 512)),
        ({}, {"scaling": "yarn", "freq_scale": 0.25, "yarn_ext_factor": 0}, (PLAIN / 4, 1)),
        ({}, {"scaling": "yarn", "freq_scale": 0.25, "yarn_attn_factor": 2.0}, yarn(64, 1e4, 4, 512, attn=2)),
        (keys_of(attn_factor=1.5), {"yarn_attn_factor": 2.0}, (PLAIN, 3)),
    ],
)  # fmt: skip
def test_what_options_say_instead(tmp_path, keys, options, expected):
    assert_rope(rope_of(tmp_path, RopeOptions(**options), **keys), expected)


@pytest.mark.parametrize(
    "keys, options, complaint",
    [
        (keys_of(type="longrope"), {}, "rope.scaling.type is 'longrope'"),
        (keys_of(factor=-2.0), {}, "rope.scaling.factor is -2.0"),
        (keys_of(factor=math.nan), {}, "rope.scaling.factor is nan"),
        (keys_of(yarn_beta_fast=0.0), {}, "yarn_beta_fast is 0.0"),
        ({}, {"freq_base": 0.5, "scaling": "yarn"}, "base of 0.5 cannot be stretched"),
        ({}, {"freq_base": 1e-200}, "base of rotary positions is 1e-200"),
        ({}, {"freq_scale": math.inf}, "scale of rotary positions is inf"),
        ({}, {"yarn_ext_factor": -1.0}, "ext_factor of rotary positions is -1.0"),
        ({}, {"yarn_orig_ctx": 0}, "n_ctx_orig of rotary positions is 0"),
        ({}, {"scaling": "cubic"}, "'cubic'; none, linear and yarn"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, keys, options, complaint):
    with pytest.raises(ModelError, match=complaint):
        rope_of(tmp_path, RopeOptions(**options), **keys)


class Scaled(Reference):
    """The oracle with the global layers' rotation replaced."""

    def __init__(self, path: Path, frequencies: np.ndarray, magnitude: float) -> None:
        super().__init__(path)
        self.scaled = frequencies, magnitude

    def rope(self, x: np.ndarray, base: float, halves: bool) -> np.ndarray:
        if self.arch == "gemma3" and base == 10000.0:
            return super().rope(x, base, halves)
        frequencies, magnitude = self.scaled
        angles = np.arange(len(x))[:, None] * frequencies
        cos, sin = np.cos(angles)[:, None] * magnitude, np.sin(angles)[:, None] * magnitude
        n = x.shape[-1]
        first, second = (slice(0, n // 2), slice(n // 2, n)) if halves else (slice(0, n, 2), slice(1, n, 2))
        a, b, y = x[..., first], x[..., second], x.copy()
        y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
        return y


@pytest.mark.parametrize("make, n_rot, base", [(make_llama, 16, 1e4), (make_gemma3, 32, 1e6)])
def test_whole_models(tmp_path, make, n_rot, base):
    path = tmp_path / "model.gguf"
    make(path)
    options = RopeOptions(scaling="yarn", freq_scale=0.125, yarn_orig_ctx=64)
    model = load(path, n_ctx=256, kv_type="f32", rope=options)
    got = model.run([SequenceInput(TOKENS, 0, [0, 1], len(TOKENS))])
    expected = Scaled(path, *yarn(n_rot, base, 8, 64)).logits(TOKENS)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert np.abs(expected - Reference(path).logits(TOKENS)).max() > 0.05  # it makes a difference


def test_shifted_keys_keep_their_magnitude(tmp_path):
    path = tmp_path / "one.gguf"
    make_llama(path, n_layer=1)
    model = load(path, n_ctx=256, kv_type="f32", rope=RopeOptions(scaling="yarn", freq_scale=0.125))
    model.run([SequenceInput(TOKENS, 0, [0, 1], 0)])
    model.kv_copy([0, 1], 13, [3, 4], 3, 30)
    model.run([SequenceInput(TOKENS[:3], 0, [3, 4], 0)])
    kept = TOKENS[:3] + TOKENS[13:43]
    row = model.run([SequenceInput([9], len(kept), [3, 4], 1)])[0].copy()
    expected = model.run([SequenceInput([*kept, 9], 0, [5, 6], 1)])[0]
    np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-3)


def test_flags_mean_what_keys_of_the_file_mean(tmp_path):
    plain, stretched = tmp_path / "plain.gguf", tmp_path / "stretched.gguf"
    make_llama(plain)
    make_llama(
        stretched, more={"rope.freq_base": 50000.0, **{f"rope.{key}": value for key, value in YARN_FILE.items()}}
    )
    flags = "--rope-scaling yarn --rope-freq-base 50000 --rope-freq-scale 0.25 --yarn-orig-ctx 2048"
    request = {"prompt": "the day and hello world " * 3, "temperature": 0, "n_predict": 12, "ignore_eos": True}
    texts = []
    for path, line in ((plain, ""), (stretched, ""), (plain, flags)):
        with ServerProcess("-m", path, *line.split()) as server:
            texts.append(server.post("/completion", **request)["content"])
    assert texts[0] != texts[1] == texts[2]


def test_llamas_arguments(tmp_path):
    path = tmp_path / "model.gguf"
    make_llama(path)
    names = {"rope_freq_base": 5e4, "rope_freq_scale": 0.25, "yarn_orig_ctx": 2048, "yarn_beta_fast": 16.0}
    options = RopeOptions(scaling="yarn", freq_base=5e4, freq_scale=0.25, yarn_orig_ctx=2048, yarn_beta_fast=16)
    expected = load(path, n_ctx=32, rope=options).hp.rope
    for kind in ("yarn", 2):
        with Llama(path, n_ctx=32, rope_scaling_type=kind, **names) as llm:
            assert llm.model.hp.rope == expected
    with Llama(path, n_ctx=32) as llm:
        assert llm.model.hp.rope == load(path, n_ctx=32).hp.rope
    with pytest.raises(ValueError, match="rope_scaling_type is 7"):
        Llama(path, rope_scaling_type=7)
    with pytest.raises(ModelError, match="cubic"):
        Llama(path, rope_scaling_type="cubic")
