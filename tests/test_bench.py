"""Measuring: what a step costs at least, and that the command reports it. No test looks at how fast anything was."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyllama import bench, models
from pyllama.bench import Costs, Machine, Workload
from pyllama.gguf import GGUFFile
from tests import tiny_models

MACHINE = Machine("some", 2, read_gbps=1.0, int8_gops=1.0)
COSTS = Costs(weight_bytes=1000, layer_params=3000, output_params=500, kv_bytes=10.0, windows=(0, 4))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama.gguf"
    tiny_models.make_llama(path, quant="Q8_0")
    return path


@pytest.fixture(autouse=True)
def small_measurement(monkeypatch):
    monkeypatch.setattr(bench, "_BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "_MEASURING_SECONDS", 0.0)


def test_a_step_s_least_times():
    """Two sequences that see 3 and 7 tokens; the second layer sees 4 of them at most."""
    by_memory, by_arithmetic = COSTS.seconds(MACHINE, 2, 2, [3, 7])
    assert by_memory == pytest.approx(1e-9 * (1000 + 10 * (3 + 3 + 7 + 4)))
    assert by_arithmetic == pytest.approx(1e-9 * 2 * (2 * 3000 + 2 * 500))


def test_limits():
    rate, bound = COSTS.limit(MACHINE, Workload(n_prompt=5), n_batch=2)
    assert (rate, bound) == (pytest.approx(5 / (1e-9 * 2 * (5 * 3000 + 500))), "int8")
    fast = Machine("some", 2, read_gbps=1.0, int8_gops=1e9)
    rate, bound = COSTS.limit(fast, Workload(n_generate=2, depth=3, n_sequences=3), n_batch=512)
    n_bytes = 1000 + 3 * 10 * (4 + 4) + 1000 + 3 * 10 * (5 + 4)
    assert (rate, bound) == (pytest.approx(6 / (1e-9 * n_bytes)), "memory")


@pytest.mark.parametrize("make", [tiny_models.make_llama, tiny_models.make_gemma3])
def test_costs_of_a_model(make, tmp_path):
    path = tmp_path / "tiny.gguf"
    make(path, n_embd=64, n_ff=128, quant="Q8_0")
    model = models.load(path, n_ctx=64, kv_type="f32")
    costs, hp = Costs.of(model), model.hp
    heads = hp.n_head * hp.head_dim
    assert costs.layer_params == hp.n_layer * (2 * 64 * heads + 2 * 64 * hp.n_head_kv * hp.head_dim + 3 * 64 * 128)
    assert costs.output_params == 64 * hp.n_vocab
    assert costs.weight_bytes == (costs.layer_params + costs.output_params) * 34 // 32
    assert costs.kv_bytes == 2 * 4 * hp.n_head_kv * hp.head_dim
    assert costs.windows == ((0, 0) if make is tiny_models.make_llama else (16, 16, 16, 16, 16, 0, 16))


def test_report(llama):
    report = bench.bench(
        llama, n_threads=1, n_prompt=40, n_generate=3, depth=35, n_sequences=2, repetitions=2, n_batch=16
    )
    prompt, generation = report.results
    assert prompt.work == Workload(n_prompt=40, depth=35)
    assert generation.work == Workload(n_generate=3, depth=35, n_sequences=2)
    for result in report.results:
        assert len(result.rates) == 2
        assert min(result.rates) <= result.rate <= max(result.rates)
        assert result.fraction == result.rate / result.limit > 0
    assert "2 sequences, generate 3 at depth 35" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["results"][0]["n_prompt"] == 40


def test_command(llama, capsys, monkeypatch):
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "bench.py"
    options = f"-m {llama} -t 2 -p 9 -n 2 -r 1 --memory-f32 -ctv f16".split()
    monkeypatch.setattr(sys, "argv", [str(script), *options, "--json"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(script), run_name="__main__")
    assert exit.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert [result["work"] for result in printed["results"]] == ["prompt 9", "generate 2"]
    assert printed["machine"]["n_threads"] == 2
    assert bench.main(options) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["-p 0 -n 0", "-p -1", "-r 0", "--sequences 0", "-d -5"])
def test_impossible_numbers(llama, capsys, options):
    assert bench.main(["-m", str(llama), *options.split()]) == 1
    assert "error: there must be something to measure" in capsys.readouterr().err


def test_a_missing_file(tmp_path, capsys):
    assert bench.main(["-m", str(tmp_path / "none.gguf")]) == 1
    assert "none.gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "work"),
    [
        ("p512", Workload(n_prompt=512)),
        ("p9@33", Workload(n_prompt=9, depth=33)),
        ("n64", Workload(n_generate=64)),
        ("n2@7000x8", Workload(n_generate=2, depth=7000, n_sequences=8)),
    ],
)
def test_workloads_in_short(text, work):
    assert Workload.parse(text) == work


@pytest.mark.parametrize("text", ["", "512", "p", "p0", "n0", "n-1", "p9x2", "n9x0", "n9@", "n9 ", "q9"])
def test_what_is_no_workload(text):
    with pytest.raises(ValueError, match="is no workload"):
        Workload.parse(text)


COMPARE = Path(__file__).resolve().parent.parent / "benchmarks" / "compare.py"


def test_compare(llama):
    """The comparison with peers, without peers."""
    options = f"-m {llama} -t 1 --work p9@33 n2x3 --engines pyllama --turns 2 --repetitions 1 --json".split()
    done = subprocess.run([sys.executable, str(COMPARE), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (comparison,) = json.loads(done.stdout)
    prompt, generation = comparison["rows"]
    assert prompt["work"] == "prompt 9 at depth 33"
    assert generation["work"] == "3 sequences, generate 2"
    assert prompt["ratio"] == 1
    assert generation["fraction"] > 0


def test_table_of_a_comparison():
    module = runpy.run_path(str(COMPARE))
    row = {"work": "prompt 9", "tokens_per_second": 50.0, "min": 40.0, "max": 60.0, "limit": 200.0, "bound": "int8"}
    ours, theirs = {**row, "engine": "pyllama", "ratio": 1.0}, {**row, "engine": "other", "ratio": 2.0}
    machine = {"cpu": "some", "n_threads": 2, "read_gbps": [9.6, 10.4], "int8_gops": [99.0, 1001.0]}
    rows = [{**ours, "fraction": 0.25}, {**theirs, "fraction": 0.125}]
    text = module["table"]({"model": "m.gguf", "machine": machine, "rows": rows})
    assert "reads 10 to 10 GB/s, int8 99 to 1,001 Gop/s" in text
    assert "2.00 x" in text.splitlines()[-1] and "12 %" in text.splitlines()[-1]


@pytest.mark.parametrize("content", [None, b"no model at all"], ids=["no file", "no model"])
@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("bench -m", 1),
        ("compare -m", 2),
        ("contention -m", 2),
        ("server_load --no-engine -m", 1),
        ("speculation -m", 2),
        ("text", 2),
    ],
)
def test_a_model_that_cannot_be_used(tmp_path, script, status, content):
    """One line says so."""
    path, (name, *options) = tmp_path / "some.gguf", script.split()
    if content:
        path.write_bytes(content)
    command = [sys.executable, COMPARE.with_name(f"{name}.py"), *options, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (status, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and str(path) in line


def test_speculation(llama):
    """The same texts with lookup and with the model as its own draft, which is right."""
    options = f"-m {llama} -md {llama} -t 2 -n 24 --draft 3 --turns 1".split()
    command = [sys.executable, COMPARE.with_name("speculation.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 5
    assert all(int(row[-3]) > 0.5 * int(row[-1]) > 0 for row in rows if "greedy" in row)


def test_contention(llama):
    """Generation beside busy loops: a line for each number of them."""
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "contention.py"
    options = f"-m {llama} -t 2 --turns 1 --seconds 0.1".split()
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == sorted({0, 1, os.cpu_count() // 2, os.cpu_count()})
    assert all(float(row[1]) > 0 for row in rows)


@pytest.mark.parametrize("mixture", ["Q4_0", "Q4_1", "Q8_0", "Q4_K_M"])
def test_make_model(mixture, tmp_path):
    """A model of random blocks: its types, the size of its weights, and that it runs and knows its own vocabulary."""
    script, path = Path(__file__).resolve().parent.parent / "benchmarks" / "make_model.py", tmp_path / "random.gguf"
    shape = "--n-embd 256 --n-layer 8 --n-head 4 --n-head-kv 2 --n-ff 512 --n-vocab 400 --n-ctx 64"
    subprocess.run([sys.executable, script, "-o", path, "--type", mixture, *shape.split()], check=True)
    expected = {f"blk.{i}.ffn_down.weight": "Q6_K" if i in (0, 3, 6, 7) else "Q4_K" for i in range(8)}
    with GGUFFile.open(path) as file:
        for name, info in file.tensors.items():
            if len(info.shape) == 2:
                kind = gguf.GGMLQuantizationType[info.type_name]
                values = gguf.dequantize(np.frombuffer(file.data(name), np.uint8), kind)
                assert abs(values.mean()) < 0.2 * info.shape[0] ** -0.5
                assert values.std() == pytest.approx(info.shape[0] ** -0.5, rel=0.1)
                assert mixture != "Q4_K_M" or expected.get(name, info.type_name) == info.type_name
    model = models.load(path, n_ctx=64)
    logits = model.run([models.SequenceInput([1, 300, 399], 0, [0], 1)])
    assert np.isfinite(logits).all()
    text = "ab Cd"
    assert model.tokenizer.decode(model.tokenizer.encode(text)).strip() == text
    model.close()
