"""The container: against the ``gguf`` package on real files, written and read back, and every kind of lie in a file."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyllama.gguf import GGUFError, GGUFFile, GGUFWriter, StringArray, TensorInfo
from pyllama.models import ModelError, load
from tests.tiny_models import make_gemma3, make_llama


@pytest.fixture(params=["mapped", "read", "read in pieces"])
def mmap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "read in pieces":
        monkeypatch.setattr("pyllama.gguf._FIRST_BYTES", 8)
    return request.param == "mapped"


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def real(request: pytest.FixtureRequest) -> tuple[Path, gguf.GGUFReader]:
    path = request.getfixturevalue(f"{request.param}_path")
    return path, gguf.GGUFReader(path)


def test_real_files_are_read_like_the_gguf_package_reads_them(real: tuple[Path, gguf.GGUFReader], mmap: bool) -> None:
    path, reader = real
    with GGUFFile.open(path, mmap=mmap) as file:
        keys = {key: value for key, value in reader.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(keys)
        for key, value in keys.items():
            ours = file.metadata[key]
            if isinstance(ours, StringArray):
                some = range(0, len(value.data), max(1, len(value.data) // 1000))
                assert len(ours) == len(value.data)
                assert [ours[i] for i in some] == [bytes(value.parts[value.data[i]]) for i in some], key
            elif isinstance(ours, np.ndarray):
                theirs = np.concatenate([value.parts[i] for i in value.data[:2000]])
                np.testing.assert_array_equal(ours[:2000], theirs)
                assert len(ours) == len(value.data)
            else:
                assert ours == value.contents(), key
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = file.tensors[tensor.name]
            assert info == TensorInfo(
                tensor.name, int(tensor.tensor_type), tuple(map(int, tensor.shape)), tensor.data_offset, tensor.n_bytes
            )
            assert info.type_name == tensor.tensor_type.name
            data = file.data(tensor.name)
            assert len(data) == info.n_bytes
            assert data[:64] == tensor.data.reshape(-1).view(np.uint8)[:64].tobytes()


def write(path: Path, metadata: dict, tensors: dict[str, np.ndarray] | None = None, **options) -> Path:
    writer = GGUFWriter(**options)
    for key, value in metadata.items():
        writer.add(key, value)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, 0, tuple(reversed(array.shape)), array.astype(np.float32))
    writer.write(path)
    return path


METADATA = {
    "a.string": "héllo \U0001f642",
    "an.empty.string": "",
    "an.int": 7,
    "a.negative": -7,
    "a.float": 0.5,
    "true": True,
    "false": False,
    "strings": ["a", "", "日本"],
    "ints": np.arange(5, dtype=np.int32),
    "floats": np.linspace(0, 1, 3, dtype=np.float32),
    "bools": np.array([True, False, True]),
    "long": np.array([1 << 40], np.uint64),
    "none": np.zeros(0, np.float64),
}


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_what_is_written_is_read_back(tmp_path: Path, mmap: bool, alignment: int) -> None:
    tensors = {"one": np.arange(7.0), "two": np.arange(12.0).reshape(3, 4), "four": np.ones((2, 1, 3, 5))}
    path = write(tmp_path / "x.gguf", METADATA, tensors, alignment=alignment)
    with GGUFFile.open(path, mmap=mmap) as file:
        assert file.version == 3 and file.alignment == alignment
        for key, value in METADATA.items():
            got = file.metadata[key]
            if isinstance(value, list):
                assert [bytes(text).decode() for text in got] == value
                assert got[-1].decode() == value[-1] and len(got[1:]) == 2
            elif isinstance(value, np.ndarray):
                np.testing.assert_array_equal(got, value)
                assert got.dtype == value.dtype
            else:
                assert got == value and type(got) is type(value)
        for name, array in tensors.items():
            info = file.tensors[name]
            assert info.shape == tuple(reversed(array.shape)) and info.offset % alignment == 0
            np.testing.assert_array_equal(np.frombuffer(file.data(name), np.float32), array.reshape(-1))
    assert [t.name for t in gguf.GGUFReader(path).tensors] == list(tensors)


def test_a_file_that_is_cut_short_meanwhile(tmp_path: Path, mmap: bool) -> None:
    path = write(tmp_path / "x.gguf", METADATA, {"one": np.arange(70000.0)})
    with GGUFFile.open(path, mmap=mmap) as file:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(GGUFError, match="tensor 'one': the file ends within it"):
            file.data("one")
    with pytest.raises(ValueError, match="closed"):
        file.data("one")
    make_llama(path := tmp_path / "llama.gguf")
    with GGUFFile.open(path) as file:
        end = file.tensors["token_embd.weight"].offset + 99
    with pytest.raises(ModelError, match=r"llama\.gguf: tensor '.*': the file ends within it"):
        load(path, mmap=mmap, progress=lambda _: os.truncate(path, end))


def test_strings_outlive_the_file(tmp_path: Path) -> None:
    with GGUFFile.open(write(tmp_path / "x.gguf", METADATA)) as file:
        strings = file.metadata["strings"]
    assert list(strings) == [b"a", b"", "日本".encode()]


def test_accessors_check_types(tmp_path: Path) -> None:
    with GGUFFile.open(write(tmp_path / "x.gguf", METADATA)) as file:
        assert file.get("nothing", 5, int) == 5
        assert file.get("an.int", kind=float) == 7.0 and isinstance(file.get("an.int", kind=float), float)
        assert file.require("true", bool) is True
        with pytest.raises(GGUFError, match="the metadata key 'nothing' is missing"):
            file.require("nothing")
        for key, kind, message in [
            ("a.string", int, "the value of 'a.string' is str .*; int is needed"),
            ("true", int, "bool True; int is needed"),
            ("true", float, "bool True; float is needed"),
            ("a.float", int, "float 0.5; int is needed"),
            ("strings", str, "an array of 3; str is needed"),
            ("ints", int, "an array of 5; int is needed"),
        ]:
            with pytest.raises(GGUFError, match=message):
                file.require(key, kind)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, n: int | None = None
) -> bytes:
    n = len(shape) if n is None else n
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", n, *shape, kind, offset)


def file_of(*entries: bytes, n_tensors: int = 0, n_keys: int = 0, version: int = 3, rest: int = 4096) -> bytes:
    """A file from its parts; ``rest`` zero bytes follow."""
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(entries) + bytes(rest)


U64 = "<Q"
HUGE = (1 << 64) - 1
LIES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "shorter than the file's mark"),
    ("other magic", b"PK\x03\x04" + bytes(100), r"not a GGUF file: it begins with b'PK"),
    ("older format", b"tjgg" + bytes(100), "an older ggml format"),
    ("only magic", b"GGUF", "the file ends at byte 4, within the version"),
    ("version 1", file_of(version=1), "GGUF version 1; 2 and 3 are read"),
    ("version 4", file_of(version=4), "GGUF version 4"),
    ("big-endian", file_of(version=3 << 24), "a big-endian GGUF"),
    ("many tensors", file_of(n_tensors=HUGE), f"claims {HUGE} tensors, more than its 4120 bytes can hold"),
    ("more tensors than are there", file_of(tensor(), n_tensors=2), "has 0 dimensions"),
    ("many keys", file_of(n_keys=1 << 40), "claims 1099511627776 metadata keys"),
    ("long key", file_of(struct.pack(U64, HUGE), n_keys=1), f"metadata key 0 at byte 24 claims a length of {HUGE}"),
    ("longer key than names are", file_of(text(b"k" * 70000), n_keys=1), "claims a length of 70000"),
    ("key not UTF-8", file_of(key(b"\xff\xfe", 4, bytes(4)), n_keys=1), "metadata key 0 at byte 24 is not UTF-8"),
    ("key twice", file_of(key(b"k", 4, bytes(4)) * 2, n_keys=2), "the metadata key 'k' comes twice"),
    ("unknown value type", file_of(key(b"k", 13, bytes(4)), n_keys=1), "'k' has a value of unknown type 13"),
    (
        "long string",
        file_of(key(b"k", 8, struct.pack(U64, 1 << 62)), n_keys=1),
        "the value of 'k' at byte 37 claims a length",
    ),
    ("string not UTF-8", file_of(key(b"k", 8, text(b"\xc3(")), n_keys=1), "the value of 'k' at byte 37 is not UTF-8"),
    (
        "long array",
        file_of(key(b"k", 9, struct.pack("<IQ", 4, 1 << 62)), n_keys=1),
        "array 'k' claims 46116.* elements",
    ),
    (
        "many strings",
        file_of(key(b"k", 9, struct.pack("<IQ", 8, 1 << 62)), n_keys=1),
        "array 'k' claims 46116.* strings",
    ),
    (
        "long string in an array",
        file_of(key(b"k", 9, struct.pack("<IQ", 8, 2) + text(b"x") + struct.pack(U64, HUGE)), n_keys=1),
        "array 'k': .*1",
    ),
    ("nested array", file_of(key(b"k", 9, struct.pack("<IQ", 9, 1)), n_keys=1), "array 'k' has elements of type 9"),
    (
        "unknown array type",
        file_of(key(b"k", 9, struct.pack("<IQ", 77, 1)), n_keys=1),
        "array 'k' has elements of type 77",
    ),
    ("file ends in a value", file_of(key(b"k", 10, b"123"), n_keys=1, rest=0), "within the value of 'k'"),
    (
        "odd alignment",
        file_of(key(b"general.alignment", 4, struct.pack("<I", 24)), n_keys=1),
        "general.alignment is 24; a power of two",
    ),
    ("alignment 0", file_of(key(b"general.alignment", 4, bytes(4)), n_keys=1), "general.alignment is 0"),
    (
        "alignment a string",
        file_of(key(b"general.alignment", 8, text(b"32")), n_keys=1),
        "'general.alignment' is str '32'",
    ),
    ("no dimensions", file_of(tensor(shape=()), n_tensors=1), "tensor 't' has 0 dimensions; 1 to 4"),
    ("five dimensions", file_of(tensor(shape=(1,) * 5), n_tensors=1), "tensor 't' has 5 dimensions"),
    ("many dimensions", file_of(tensor(n=1 << 31), n_tensors=1), "tensor 't' has 2147483648 dimensions"),
    ("dimension 0", file_of(tensor(shape=(32, 0)), n_tensors=1), r"tensor 't' has the dimensions \(32, 0\)"),
    ("huge dimension", file_of(tensor(shape=(1 << 63,)), n_tensors=1), "tensor 't' has the dimensions"),
    (
        "dimensions that overflow",
        file_of(tensor(shape=(1 << 40, 1 << 40, 1 << 40)), n_tensors=1),
        "tensor 't' has the dim",
    ),
    ("product that wraps to 0", file_of(tensor(shape=(1 << 32, 1 << 32)), n_tensors=1), "tensor 't'"),
    ("rows of part of a block", file_of(tensor(shape=(33,), kind=2), n_tensors=1), "which type Q4_0 cannot have"),
    (
        "type not read",
        file_of(tensor(kind=16), n_tensors=1),
        r"tensor 't' has type 16 \(IQ2_XXS\), which pyllama does not",
    ),
    ("type removed", file_of(tensor(kind=4), n_tensors=1), r"tensor 't' has type 4 \(unknown\)"),
    ("type unknown", file_of(tensor(kind=(1 << 32) - 1), n_tensors=1), "tensor 't' has type 4294967295"),
    (
        "unaligned offset",
        file_of(tensor(offset=4), n_tensors=1),
        "begins at 4, which is not a multiple of the alignment 32",
    ),
    (
        "offset past the end",
        file_of(tensor(offset=1 << 20), n_tensors=1),
        r"takes bytes 1048640 to .*\(was it cut short\?\)",
    ),
    ("offset that overflows", file_of(tensor(offset=(1 << 64) - 32), n_tensors=1), "tensor 't' takes bytes"),
    (
        "larger than the file",
        file_of(tensor(shape=(1 << 20,)), n_tensors=1),
        "takes bytes 64 to 4194368; the file has 4153",
    ),
    ("tensor twice", file_of(tensor() * 2, n_tensors=2), "the tensor 't' comes twice"),
    (
        "tensors that overlap",
        file_of(tensor(b"a", (64,)), tensor(b"b", offset=128), n_tensors=2),
        "the tensors 'a' and 'b' overlap",
    ),
    (
        "tensors at one place",
        file_of(tensor(b"a"), tensor(b"b"), n_tensors=2),
        "the tensors 'a' and 'b' overlap",
    ),
    ("tensor name not UTF-8", file_of(tensor(b"\x80"), n_tensors=1), "the name of tensor 0 at byte 24 is not UTF-8"),
]


@pytest.mark.parametrize(("data", "message"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_lie_is_named(tmp_path: Path, data: bytes, message: str, mmap: bool) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFError, match=message) as caught:
        GGUFFile.open(path, mmap=mmap)
    assert "lie.gguf" in str(caught.value)


def test_version_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(
        file_of(key(b"k", 4, struct.pack("<I", 9)), tensor(), n_keys=1, n_tensors=1, version=2)
    )
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert file.version == 2 and file.metadata == {"k": 9} and file.tensors["t"].n_bytes == 128


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="pipe is a pipe or a device"):
        GGUFFile.open(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        GGUFFile.open(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path / "whole.gguf", n_layer=1, n_embd=32, n_head=2, n_head_kv=1, n_ff=32)
    whole = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for end in [*range(200), *range(200, len(whole) - 128, 997), len(whole) - 129]:
        path.write_bytes(whole[:end])
        with pytest.raises(GGUFError):
            GGUFFile.open(path)


def test_the_writer_checks_sizes() -> None:
    with pytest.raises(GGUFError, match=r"tensor 't' of shape \(32, 2\) takes 36 bytes, not 10"):
        GGUFWriter().add_tensor("t", 2, (32, 2), bytes(10))
    with pytest.raises(GGUFError, match="no values of dtype complex128"):
        GGUFWriter().add("k", np.zeros(1, complex))


def change(path: Path, edit: Callable[[dict, dict], None]) -> Path:
    """Writes a sound file anew after ``edit(metadata, tensors)``; tensors: name → (type, shape, data)."""
    with GGUFFile.open(path) as file:
        metadata = {k: list(v) if isinstance(v, StringArray) else v for k, v in file.metadata.items()}
        tensors = {t.name: (t.type, t.shape, bytes(file.data(t.name))) for t in file.tensors.values()}
    edit(metadata, tensors)
    writer = GGUFWriter()
    for name, value in metadata.items():
        writer.add(name, value)
    for name, (kind, shape, data) in tensors.items():
        writer.add_tensor(name, kind, shape, data)
    writer.write(path)
    return path


def narrow(name: str, n_cols: int, n_rows: int | None = None) -> Callable[[dict, dict], None]:
    def edit(_: dict, tensors: dict) -> None:
        shape = (n_cols,) if n_rows is None else (n_cols, n_rows)
        tensors[name] = (0, shape, np.ones(int(np.prod(shape)), np.float32).tobytes())

    return edit


def set_key(name: str, value: object) -> Callable[[dict, dict], None]:
    return lambda metadata, _: metadata.update({name: value})


MISFITS: list[tuple[Callable[[dict, dict], None], str]] = [
    (lambda m, t: t.pop("blk.0.attn_q.weight"), "'blk.0.attn_q.weight' is missing"),
    (lambda m, t: t.pop("token_embd.weight"), "'token_embd.weight' is missing or is not a matrix"),
    (lambda m, t: m.pop("llama.embedding_length"), "'llama.embedding_length' is missing"),
    (
        set_key("llama.embedding_length", 67),
        "output.weight has .* rows of 64; the model's hyper-parameters say .* of 67",
    ),
    (set_key("llama.embedding_length", 1 << 30), "llama.embedding_length is 1073741824; 1 to"),
    (set_key("llama.embedding_length", "64"), "'llama.embedding_length' is str '64'; int is needed"),
    (set_key("llama.block_count", 3), "'blk.2.attn_norm.weight' is missing"),
    (set_key("llama.attention.head_count", 0), "llama.attention.head_count is 0"),
    (set_key("llama.attention.head_count_kv", 3), "4 heads cannot share 3 key/value heads"),
    (set_key("llama.rope.dimension_count", 7), "llama.rope.dimension_count is 7; an even number"),
    (set_key("llama.rope.freq_base", float("nan")), "llama.rope.freq_base is nan; a positive number"),
    (set_key("llama.rope.scaling.factor", 1e-40), "llama.rope.scaling.factor is 9.999.*; a positive number"),
    (
        lambda m, t: m.update({"llama.rope.scaling.factor": 1e-29, "llama.rope.freq_base": 1e-20}),
        "frequencies that are no numbers",
    ),
    (set_key("llama.rope.scaling.type", "odd"), "llama.rope.scaling.type is 'odd'"),
    (
        lambda m, t: m.update(
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "llama.rope.freq_base": 1.0}
        ),
        "a rotary base of 1.0 cannot be stretched",
    ),
    (narrow("blk.0.attn_k.weight", 64, 48), "blk.0.attn_k|48"),
    (narrow("blk.0.attn_norm.weight", 32), "blk.0.attn_norm.weight .32 elements"),
    (narrow("blk.1.ffn_up.weight", 32, 128), "blk.1.ffn_up.weight has 32 columns, its input 64"),
    (narrow("output.weight", 64, 100), "output.weight has 100 rows"),
    (narrow("output.weight", 64, 1000), "output.weight has 1000 rows"),
    (narrow("rope_freqs.weight", 3), "rope_freqs.weight has 3 elements; 8 are needed"),
]


@pytest.mark.parametrize(("edit", "message"), MISFITS, ids=[message[:40] for _, message in MISFITS])
def test_tensors_and_keys_that_do_not_fit_together(tmp_path: Path, edit, message: str) -> None:
    path = tmp_path / "model.gguf"
    make_llama(path)
    with pytest.raises((ModelError, GGUFError), match=message):
        load(change(path, edit), n_ctx=64)


def test_an_embedding_table_of_another_width(tmp_path: Path) -> None:
    """Gemma's logits come from the same table, so that no product is there to disagree with it."""
    path = tmp_path / "model.gguf"
    make_gemma3(path, n_layer=1)
    with pytest.raises(ModelError, match="rows of 64; the model's hyper-parameters say .* of 63"):
        load(change(path, set_key("gemma3.embedding_length", 63)), n_ctx=64)
