"""The GGUF container: reading and writing.

Nothing in a file is believed: every count, length, offset, type and dimension is checked against the file's size before it is
used, so that a damaged or lying file ends in a :class:`GGUFError` that names the problem. This module knows the container, not
what models keep in it.
"""

from __future__ import annotations

import itertools
import mmap as mmap_module
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pyllama.core import CoreError, call, ffi, lib

__all__ = ["GGUFError", "GGUFFile", "GGUFWriter", "StringArray", "TensorInfo"]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 1 << 16
_FIRST_BYTES = 1 << 24  # most files' metadata are shorter

# Value types: number -> (struct format, NumPy dtype)
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("<B", "u1"), 1: ("<b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("<B", "?"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_KIND_OF_DTYPE = {"i": int, "u": int, "f": float, "b": bool}

# Names of the tensor types that files use, for messages about those that the core does not read.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class GGUFError(ValueError):
    """The file is not a GGUF, is damaged, or holds something that pyllama does not read."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry. ``shape`` is in GGUF's order, the fastest dimension first; ``offset`` counts from the file's start."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def type_name(self) -> str:
        return _TYPE_NAMES.get(self.type, str(self.type))


class StringArray(Sequence[bytes]):
    """An array of strings, left where it is in the file.

    ``blob`` is the array's region; string i is ``blob[offsets[i] : offsets[i] + lengths[i]]`` (int64 arrays).
    """

    def __init__(self, blob: memoryview, offsets: np.ndarray, lengths: np.ndarray) -> None:
        self.blob, self.offsets, self.lengths = blob, offsets, lengths

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self.offsets[index])
        return bytes(self.blob[start : start + int(self.lengths[index])])

    def __iter__(self) -> Iterator[bytes]:
        for start, length in zip(self.offsets.tolist(), self.lengths.tolist(), strict=True):
            yield bytes(self.blob[start : start + length])


class _Cursor:
    """Reads little-endian values one after another, never past the end.

    ``data`` is the file from its beginning on: mapped whole, or as much as had to be read so far.
    """

    def __init__(self, file: BinaryIO, *, mmap: bool) -> None:
        self._file = file
        self.at, self.n_bytes = 0, os.fstat(file.fileno()).st_size
        if self.n_bytes < len(MAGIC):
            raise GGUFError("not a GGUF file: it is shorter than the file's mark")
        if mmap:
            self.data = memoryview(mmap_module.mmap(file.fileno(), 0, access=mmap_module.ACCESS_READ))
        else:
            self.data = memoryview(file.read(_FIRST_BYTES))

    @property
    def left(self) -> int:
        return self.n_bytes - self.at

    def take(self, n: int, what: str) -> memoryview:
        if n > self.left:
            raise GGUFError(
                f"the file ends at byte {self.n_bytes}, within {what}: {n} bytes from byte {self.at} on are missing"
            )
        while self.at + n > len(self.data):
            self._read_more()
        self.at += n
        return self.data[self.at - n : self.at]

    def _read_more(self) -> None:
        size = len(self.data)
        self._file.seek(0)
        self.data = memoryview(self._file.read(4 * size))
        if len(self.data) <= size:
            raise GGUFError(f"the file ends at byte {size}; it was longer when it was opened")

    def number(self, fmt: str, what: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt), what))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        at = self.at
        length = self.number("<Q", f"the length of {what}")
        if length > self.left or (longest is not None and length > longest):
            raise GGUFError(f"{what} at byte {at} claims a length of {length}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"{what} at byte {at} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise GGUFError(f"{key!r} has a value of unknown type {kind}")
        value = self.number(_SCALARS[kind][0], f"the value of {key!r}")
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Any:
        kind = self.number("<I", f"the type of array {key!r}")
        count = self.number("<Q", f"the length of array {key!r}")
        if kind == _STRING:
            if count > self.left // 8:
                raise GGUFError(f"array {key!r} claims {count} strings, more than the rest of the file can hold")
            return self._strings(key, count)
        if kind not in _SCALARS:
            raise GGUFError(f"array {key!r} has elements of type {kind}, which pyllama does not read")
        dtype = np.dtype(_SCALARS[kind][1])
        if count > self.left // dtype.itemsize:
            raise GGUFError(f"array {key!r} claims {count} elements, more than the rest of the file can hold")
        raw = self.take(count * dtype.itemsize, f"array {key!r}")
        if kind == _BOOL:
            return np.frombuffer(raw, np.uint8) != 0
        return np.frombuffer(raw, dtype).copy()

    def _strings(self, key: str, count: int) -> StringArray:
        offsets, lengths = np.empty(count, np.int64), np.empty(count, np.int64)
        while True:
            rest = self.data[self.at :]
            try:
                walked = call(
                    lib.pl_gguf_scan_strings, ffi.from_buffer(rest), len(rest), count,
                    ffi.cast("int64_t *", offsets.ctypes.data), ffi.cast("int64_t *", lengths.ctypes.data),
                )  # fmt: skip
                return StringArray(self.take(walked, f"array {key!r}"), offsets, lengths)
            except CoreError as error:
                if len(rest) >= self.left:
                    raise GGUFError(f"array {key!r}: {error}") from None
            self._read_more()


class GGUFFile:
    """A GGUF file that is open for reading; use :meth:`open`.

    Attributes:
        version: 2 or 3.
        metadata: key → number, string, bool, NumPy array or :class:`StringArray`.
        tensors: name → :class:`TensorInfo`.
    """

    def __init__(self, path: Path, file: BinaryIO, *, mmap: bool) -> None:
        self.path, self._file = path, file
        cursor = _Cursor(file, mmap=mmap)
        self._n_bytes = cursor.n_bytes
        n_tensors, n_keys = self._read_header(cursor)
        self.metadata = self._read_metadata(cursor, n_keys)
        self.alignment = self._read_alignment()
        self.tensors = self._read_tensors(cursor, n_tensors)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> GGUFFile:
        """Opens and checks a file; tensor data is not touched yet.

        Args:
            mmap: map the file's metadata; otherwise read them.

        Raises:
            GGUFError: see the class.
            OSError: the file cannot be read.
        """
        path = Path(path)
        if path.exists() and not path.is_file() and not path.is_dir():  # to open a pipe might take forever
            raise GGUFError(f"{path} is a pipe or a device; what is read is read from files")
        file = path.open("rb")
        try:
            return cls(path, file, mmap=mmap)
        except GGUFError as error:
            file.close()
            # Raised anew: the old traceback's frames keep views of the mapping, which could not be closed then.
            raise GGUFError(f"{path}: {error}") from None
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Ends the use of the file. String arrays taken from it stay valid as long as they are kept."""
        self.metadata = {}
        self._file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read_header(self, cursor: _Cursor) -> tuple[int, int]:
        magic = bytes(cursor.take(4, "the file's mark"))
        if magic != MAGIC:
            hint = " (an older ggml format)" if magic in (b"tjgg", b"fmgg", b"lmgg") else ""
            raise GGUFError(f"not a GGUF file: it begins with {magic!r}{hint}")
        self.version = cursor.number("<I", "the version")
        if self.version not in (2, 3):
            if self.version & 0xFFFF == 0 and self.version:
                raise GGUFError("a big-endian GGUF file, which pyllama does not read")
            raise GGUFError(f"GGUF version {self.version}; 2 and 3 are read")
        n_tensors, n_keys = cursor.number("<Q", "the tensor count"), cursor.number("<Q", "the key count")
        # The shortest entries: a tensor takes 8 + 0 + 4 + 4 + 8 bytes, a key 8 + 0 + 4 + 1.
        if n_tensors > cursor.left // 24:
            raise GGUFError(f"the file claims {n_tensors} tensors, more than its {cursor.n_bytes} bytes can hold")
        if n_keys > cursor.left // 13:
            raise GGUFError(f"the file claims {n_keys} metadata keys, more than its {cursor.n_bytes} bytes can hold")
        return n_tensors, n_keys

    @staticmethod
    def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(n_keys):
            key = cursor.text(f"metadata key {i}", _LONGEST_NAME)
            if key in metadata:
                raise GGUFError(f"the metadata key {key!r} comes twice")
            metadata[key] = cursor.value(cursor.number("<I", f"the type of {key!r}"), key)
        return metadata

    def _read_alignment(self) -> int:
        alignment = self.get("general.alignment", DEFAULT_ALIGNMENT, int)
        if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise GGUFError(f"general.alignment is {alignment}; a power of two up to 2^20 is needed")
        return alignment

    def _read_tensors(self, cursor: _Cursor, n_tensors: int) -> dict[str, TensorInfo]:
        entries = []
        for i in range(n_tensors):
            name = cursor.text(f"the name of tensor {i}", _LONGEST_NAME)
            n_dimensions = cursor.number("<I", f"tensor {name!r}")
            if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
                raise GGUFError(f"tensor {name!r} has {n_dimensions} dimensions; 1 to {_MOST_DIMENSIONS} are possible")
            shape = tuple(cursor.number("<Q", f"tensor {name!r}") for _ in range(n_dimensions))
            kind = cursor.number("<I", f"tensor {name!r}")
            entries.append((name, shape, kind, cursor.number("<Q", f"tensor {name!r}")))
        start = -(-cursor.at // self.alignment) * self.alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise GGUFError(f"the tensor {name!r} comes twice")
            tensors[name] = self._check_tensor(name, shape, kind, start, offset)
        # Were this possible, a small file could fill any memory: thousands of large tensors over the same bytes.
        for one, other in itertools.pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
            if one.offset + one.n_bytes > other.offset:
                raise GGUFError(f"the tensors {one.name!r} and {other.name!r} overlap")
        return tensors

    def _check_tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int, offset: int) -> TensorInfo:
        if not lib.pl_type_block_elements(kind if kind < 1 << 31 else -1):
            raise GGUFError(f"tensor {name!r} has type {kind} ({_TYPE_NAMES.get(kind, 'unknown')}), which pyllama does not read")
        if min(shape) < 1 or max(shape) > 1 << 48:
            raise GGUFError(f"tensor {name!r} has the dimensions {shape}")
        rows = 1
        for n in shape[1:]:
            rows *= n
        n_bytes = lib.pl_type_bytes(kind, rows, shape[0]) if rows <= 1 << 48 else -1
        if n_bytes < 0:
            raise GGUFError(f"tensor {name!r} has the dimensions {shape}, which type {_TYPE_NAMES[kind]} cannot have")
        if offset % self.alignment:
            raise GGUFError(f"tensor {name!r} begins at {offset}, which is not a multiple of the alignment {self.alignment}")
        if start + offset + n_bytes > self._n_bytes:
            raise GGUFError(
                f"tensor {name!r} takes bytes {start + offset} to {start + offset + n_bytes}; the file has {self._n_bytes}"
                " (was it cut short?)"
            )
        return TensorInfo(name, kind, shape, start + offset, n_bytes)

    # -- access -------------------------------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None, kind: type | None = None) -> Any:
        """A metadata value, or ``default`` if there is none. With ``kind`` (int, float, bool, str) the value's type is checked;
        an int passes for a float.

        Raises:
            GGUFError: the value is of another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        fits = isinstance(value, kind) if kind else True
        if kind is int and isinstance(value, bool):
            fits = False
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not fits:
            raise GGUFError(f"the value of {key!r} is {_describe(value)}; {kind.__name__} is needed")
        return value

    def require(self, key: str, kind: type | None = None) -> Any:
        """Like :meth:`get`, but the key must be there.

        Raises:
            GGUFError: it is not, or the value is of another type.
        """
        if key not in self.metadata:
            raise GGUFError(f"the metadata key {key!r} is missing")
        return self.get(key, kind=kind)

    def data(self, name: str) -> bytes:
        """The tensor's bytes, ``n_bytes`` long.

        Raises:
            GGUFError: the file has become shorter.
            ValueError: it was closed.
        """
        info = self.tensors[name]
        self._file.seek(info.offset)
        data = self._file.read(info.n_bytes)
        if len(data) < info.n_bytes:
            raise GGUFError(f"tensor {name!r}: the file ends within it")
        return data

    def fileno(self) -> int:
        """The open file's descriptor, by which the core reads.

        Raises:
            ValueError: it was closed.
        """
        return self._file.fileno()


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray | StringArray):
        return f"an array of {len(value)}"
    return f"{type(value).__name__} {value!r}"[:100]


class GGUFWriter:
    """Collects metadata and tensors, then writes a version 3 file."""

    def __init__(self, alignment: int = DEFAULT_ALIGNMENT) -> None:
        self.alignment = alignment
        self._metadata: list[tuple[str, bytes]] = []
        self._tensors: list[tuple[str, int, tuple[int, ...], bytes]] = []
        if alignment != DEFAULT_ALIGNMENT:
            self.add("general.alignment", alignment, "u4")

    def add(self, key: str, value: Any, kind: str | None = None) -> None:
        """Adds a metadata value: bool, int, float, str, or a list, tuple or NumPy array of these.

        Args:
            kind: NumPy code of a number's type (``u4`` and ``f4`` by default for int and float; ``i4`` for negative ints).
        """
        self._metadata.append((key, self._encode(value, kind)))

    def add_tensor(self, name: str, type: int, shape: Sequence[int], data: bytes | memoryview | np.ndarray) -> None:
        """Adds a tensor: ``shape`` in GGUF's order, ``data`` its bytes as the type stores them."""
        raw = data.tobytes() if isinstance(data, np.ndarray) else bytes(data)
        rows = 1
        for n in shape[1:]:
            rows *= n
        expected = lib.pl_type_bytes(type, rows, shape[0])
        if expected != len(raw):
            raise GGUFError(f"tensor {name!r} of shape {tuple(shape)} takes {expected} bytes, not {len(raw)}")
        self._tensors.append((name, type, tuple(shape), raw))

    @staticmethod
    def _text(text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(raw)) + raw

    @classmethod
    def _encode(cls, value: Any, kind: str | None) -> bytes:
        if isinstance(value, str | bytes):
            return struct.pack("<I", _STRING) + cls._text(value)
        if isinstance(value, list | tuple) and (not value or isinstance(value[0], str | bytes)):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(cls._text(v) for v in value)
        if isinstance(value, list | tuple | np.ndarray):
            array = np.asarray(value) if kind is None else np.asarray(value, kind)
            number = cls._number(array.dtype)
            return struct.pack("<IIQ", _ARRAY, number, array.size) + array.astype(_SCALARS[number][1]).tobytes()
        if kind is None:
            kind = "?" if isinstance(value, bool) else "f4" if isinstance(value, float) else "u4" if value >= 0 else "i4"
        number = cls._number(np.dtype(kind))
        return struct.pack("<I", number) + struct.pack(_SCALARS[number][0], value)

    @staticmethod
    def _number(dtype: np.dtype) -> int:
        for number, (_, code) in _SCALARS.items():
            if np.dtype(code) == dtype.newbyteorder("<"):
                return number
        raise GGUFError(f"GGUF has no values of dtype {dtype}")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file.

        Raises:
            OSError: it cannot be written.
        """
        head = [MAGIC, struct.pack("<IQQ", 3, len(self._tensors), len(self._metadata))]
        head += [self._text(key) + value for key, value in self._metadata]
        offset = 0
        for name, kind, shape, raw in self._tensors:
            head.append(self._text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
            offset += -(-len(raw) // self.alignment) * self.alignment
        header = b"".join(head)
        with Path(path).open("wb") as file:
            file.write(header + bytes(-len(header) % self.alignment))
            for _, _, _, raw in self._tensors:
                file.write(raw + bytes(-len(raw) % self.alignment))
