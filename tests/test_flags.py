"""The server's flags, their environment variables, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyllama import __version__
from pyllama.server.flags import FLAGS, Settings, parse


def settings(line: str = "", **environ: str) -> Settings:
    return parse(line.split(), environ)


def test_documented_defaults():
    s = settings()
    assert (s.ctx_size, s.batch_size, s.n_predict, s.parallel, s.timeout) == (512, 512, -1, 1, 600)
    assert (s.host, s.port, s.seed) == ("127.0.0.1", 8080, -1)
    assert not any((s.cont_batching, s.embedding, s.mlock, s.no_mmap, s.memory_f32, s.numa, s.verbose, s.api_key))
    assert s.model is s.alias is s.path is s.threads is s.threads_batch is s.system_prompt_file is s.rope_scaling is None
    assert s.without_effect == []


def test_short_forms():
    s = settings("-m a.gguf -a name -c 1024 -t 3 -tb 4 -b 64 -n 7 -np 2 -cb -to 9 -spf p.json -s 5 -v")
    assert (s.model, s.alias, s.ctx_size, s.threads, s.threads_batch) == (Path("a.gguf"), "name", 1024, 3, 4)
    assert (s.batch_size, s.n_predict, s.parallel, s.cont_batching) == (64, 7, 2, True)
    assert (s.timeout, s.system_prompt_file, s.seed, s.verbose) == (9, Path("p.json"), 5, True)


def test_long_forms(tmp_path):
    s = settings(
        "--model a.gguf --alias name --ctx-size 0 --threads 3 --threads-batch 4 --batch-size 64 --n-predict -1"
        " --parallel 2 --cont-batching --timeout 9.5 --host ::1 --port 0 --api-key k --embedding --mlock"
        f" --no-mmap --memory-f32 --log-format json --queue 0 --chat-template x --seed -1 --path {tmp_path}"
    )
    assert (s.model, s.ctx_size, s.n_predict, s.timeout, s.host, s.port) == (Path("a.gguf"), 0, -1, 9.5, "::1", 0)
    assert all((s.embedding, s.mlock, s.no_mmap, s.memory_f32, s.cont_batching))
    assert (s.api_key, s.log_format, s.queue, s.chat_template, s.path) == (("k",), "json", 0, "x", tmp_path)


def test_rotary_positions():
    s = settings(
        "--rope-scaling yarn --rope-freq-base 1e6 --rope-freq-scale 0.25 --yarn-orig-ctx 2048 --yarn-ext-factor 0.5"
        " --yarn-attn-factor 1.5 --yarn-beta-slow 2 --yarn-beta-fast 16"
    )
    assert (s.rope_scaling, s.rope_freq_base, s.rope_freq_scale, s.yarn_orig_ctx) == ("yarn", 1e6, 0.25, 2048)
    assert (s.yarn_ext_factor, s.yarn_attn_factor, s.yarn_beta_slow, s.yarn_beta_fast) == (0.5, 1.5, 2, 16)
    # llama.cpp's ways to say "as the model says"
    s = settings("--rope-freq-base 0 --rope-freq-scale 0 --yarn-orig-ctx 0 --yarn-ext-factor -1")
    assert s.rope_freq_base is s.rope_freq_scale is s.yarn_orig_ctx is s.yarn_ext_factor is None
    assert settings("--yarn-ext-factor 0").yarn_ext_factor == 0


def test_types_of_keys_and_values(capsys):
    assert settings().kv_type == ("f16", "f16")
    assert settings("--memory-f32").kv_type == ("f32", "f32")
    assert settings("-ctk q8_0 -ctv q4_0").kv_type == ("q8_0", "q4_0")
    assert settings("--memory-f32 --cache-type-v q8_0", LLAMA_ARG_CACHE_TYPE_K="f16").kv_type == ("f16", "q8_0")
    with pytest.raises(SystemExit):
        settings("-ctk q3_7")
    assert "'q3_7'" in capsys.readouterr().err


def test_keys(tmp_path):
    assert settings("--api-key a,b,").api_key == ("a", "b")
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert settings(f"--api-key-file {tmp_path / 'keys'}").api_key_file == ("one", "two")


def test_numa_takes_a_value_or_none():
    assert settings("--numa --mlock").numa == settings("--numa distribute").numa == "distribute"


def test_flags_without_a_part_to_act_on_say_so():
    lines = settings("-ngl 99 -mg 0 -ts 3,1 --lora a --lora-base b --mmproj c").without_effect
    names = ["--n-gpu-layers", "--main-gpu", "--tensor-split", "--lora", "--lora-base", "--mmproj"]
    assert [line.split()[0] for line in lines] == names
    assert all("has no effect" in line and "\n" not in line for line in lines)


def test_environment_variables_stand_in():
    environ = {
        "LLAMA_ARG_CTX_SIZE": "2048",
        "LLAMA_ARG_CONT_BATCHING": "1",
        "LLAMA_ARG_MLOCK": "off",
        "LLAMA_ARG_PORT": "",
    }
    s = settings("-np 3", LLAMA_ARG_N_PARALLEL="5", LLAMA_API_KEY="secret", **environ)
    assert (s.ctx_size, s.cont_batching, s.mlock, s.port) == (2048, True, False, 8080)
    assert (s.parallel, s.api_key) == (3, ("secret",))


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.field)
def test_every_flag_has_its_variable_and_its_field(flag, tmp_path):
    text = {bool: "true", str: "x"}.get(flag.type, "5")
    if flag.field == "path":
        text = str(tmp_path)
    special = {"log_format": "json", "numa": "distribute", "rope_scaling": "yarn", "cache_type_k": "q8_0"}
    special["cache_type_v"] = special["cache_type_k"]
    text = special.get(flag.field, text)
    if flag.field == "api_key_file":
        (tmp_path / "keys").write_text("key")
        text = str(tmp_path / "keys")
    assert getattr(settings(**{flag.env: text}), flag.field) not in (flag.default, None)


def test_no_name_is_taken_twice():
    names = [name for flag in FLAGS for name in (*flag.names, flag.env)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "line, environ, complaint",
    [
        ("-c -1", {}, "--ctx-size: -1 is not between 0"),
        ("-c many", {}, "--ctx-size: 'many' is not an integer"),
        ("-np 0", {}, "--parallel"),
        ("-to nan", {}, "--timeout: nan is not between 1"),
        ("-to soon", {}, "--timeout"),
        ("--port 65536", {}, "--port"),
        ("--path /no/such/folder", {}, "is not a directory"),
        ("--log-format xml", {}, "'xml' is not possible, but text or json"),
        ("--rope-scaling long", {}, "'long' is not possible, but none or linear or yarn"),
        ("--rope-freq-base -1", {}, "--rope-freq-base: -1 is not a number from 0 on"),
        ("--rope-freq-scale nan", {}, "--rope-freq-scale: nan is not a number"),
        ("--yarn-beta-fast x", {}, "--yarn-beta-fast: 'x' is not a number"),
        ("--yarn-orig-ctx -5", {}, "--yarn-orig-ctx"),
        ("--numa isolate", {}, "--numa: 'isolate' is not possible, but distribute"),
        ("--api-key-file /no/such/file", {}, "cannot be read"),
        ("--api-key-file /dev/null", {}, "has no keys in it"),
        ("--no-such-flag", {}, "--no-such-flag"),
        ("--ctx 4", {}, "--ctx"),
        ("model.gguf", {}, "model.gguf"),
        ("", {"LLAMA_ARG_PORT": "http"}, "LLAMA_ARG_PORT: 'http' is not an integer"),
        ("", {"LLAMA_ARG_MLOCK": "maybe"}, "LLAMA_ARG_MLOCK: 'maybe' is neither true nor false"),
    ],
)
def test_what_is_wrong_is_named(line, environ, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        settings(line, **environ)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_and_version(capsys):
    with pytest.raises(SystemExit) as stop:
        settings("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for flag in FLAGS for name in (*flag.names, flag.env))
    with pytest.raises(SystemExit):
        settings("--version")
    assert capsys.readouterr().out == f"pyllama {__version__}\n"
