"""One file to raw records: JSON, CSV, text, Parquet and Arrow, also compressed or remote."""

import csv
import gzip
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kd_jax.config import UserError
from kd_jax.config.errors import first_line

Raw = bytes | dict[str, Any]
"""A line of JSON that is not parsed yet, or a record."""

_PACKED = (".gz", ".zst")
_INDEX = "__index_level_0__"  # pandas' own name for a column that has none in its CSV
_CHUNK_CHARACTERS = 2**20
_LONGEST_TOKEN = 16
"""Characters of JSON's longest token but for numbers and texts: an escaped pair of surrogates."""
_SPACE = re.compile(r"[ \t\r\n]*")
_SIGNATURES = {
    b"BZh": "bzip2 data. Decompress it",
    b"\xfd7zXZ": "xz data. Decompress it",
    b"PK\x03\x04": "a zip archive. Unpack it",
    b"\x1f\x8b": "gzip data. Name it .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard data. Name it .zst",
    b"PAR1": "Parquet data. Name it .parquet",
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer. Run git lfs pull",
}


def kind_of(file: str) -> tuple[str, str]:
    """Returns a file's suffix and the suffix of its compression, in lower case."""
    stem, last = os.path.splitext(file.lower())
    return (os.path.splitext(stem)[1], last) if last in _PACKED else (last, "")


def is_data(file: str) -> bool:
    """Returns True if the suffix is one of the readable ones."""
    return kind_of(file)[0] in READERS


def suffixes() -> str:
    return f"{', '.join(READERS)}, also with {' or '.join(_PACKED)}"


def read_file(file: str) -> Iterator[tuple[str, Raw]]:
    """Yields (file:line or `file, record n`, raw record).

    Args:
      file: local path, or URL of an object store.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        if "://" not in file and not os.path.isfile(file):
            raise UserError(f"{file}: expected a file")
        _check_signature(file)
        for where, raw in READERS[kind_of(file)[0]](file):
            yield file + where, raw
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # of any of the libraries that decompress and parse
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file}: cannot be read ({reason})") from None


@contextmanager
def _open(file: str) -> Iterator[Any]:
    """Yields a binary stream of a file's decompressed bytes."""
    packed = kind_of(file)[1]
    with ExitStack() as stack:
        if "://" in file:
            import fsspec

            stream: Any = stack.enter_context(fsspec.open(file, "rb"))
        else:
            stream = stack.enter_context(open(file, "rb"))
        if packed == ".gz":
            stream = stack.enter_context(gzip.open(stream))
        elif packed == ".zst":
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))
            stack.enter_context(stream)
        yield stream


@contextmanager
def _open_to_seek(file: str) -> Iterator[Any]:
    """Yields the same with random access; a compressed file is in memory for it."""
    with _open(file) as stream:
        yield io.BytesIO(stream.read()) if kind_of(file)[1] else stream


@contextmanager
def _open_text(file: str) -> Iterator[Any]:
    with _open(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        yield text


def _lines(stream: Any) -> Iterator[tuple[int, bytes]]:
    """Yields the lines by number, the first without a byte-order mark."""
    for number, line in enumerate(stream, start=1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _check_signature(file: str) -> None:
    with _open(file) as stream:
        head = stream.read(24)
    for signature, what in _SIGNATURES.items():
        own = signature == b"PAR1" and kind_of(file)[0] == ".parquet"
        if head.startswith(signature) and not own:
            raise UserError(f"{file}: expected {kind_of(file)[0]} data, got {what}")


def _json(file: str) -> Iterator[tuple[str, Raw]]:
    """Yields the lines, unparsed, or the entries of an array."""
    with _open(file) as stream:
        first = True
        for number, line in _lines(stream):
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                break
            if first:
                _check_one_line(file, line)
            first = False
            yield f":{number}", line
        else:
            return
    yield from _array(file)


def _check_one_line(file: str, line: bytes) -> None:
    """Raises UserError if a file's first object covers several lines."""
    try:
        json.loads(line)
        return
    except (ValueError, RecursionError):
        pass
    try:
        with _open_text(file) as stream:
            text = stream.read(2**26).lstrip()
        tree, stop = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    if isinstance(tree, dict) and "\n" in text[:stop]:
        raise UserError(
            f"{file}: expected an array, or one record a line, got an object over several lines "
            f"({', '.join(tree) or 'no fields'}). Write its records as an array"
        )


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises ValueError for a key that it has twice."""
    if len(tree := dict(pairs)) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object with the key {twice!r:.60} twice")
    return tree


_DECODER = json.JSONDecoder(object_pairs_hook=once)


class _Window:
    """The part of a long text that is in memory, and a place in it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.text, self.at, self.line = stream, "", 0, 1

    def read(self, size: int) -> bool:
        """Reads on, and forgets what lies before the place; False, without a change, at the end."""
        if more := self.stream.read(size):
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def move(self, stop: int) -> None:
        self.line += self.text.count("\n", self.at, stop)
        self.at = stop

    def peek(self) -> str:
        """Returns the next character that is no white space; "" at the end."""
        while True:
            self.move(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read(_CHUNK_CHARACTERS):
                return ""

    def decode(self) -> tuple[Any, int]:
        """Returns the JSON value here, and where it stops."""
        size = _CHUNK_CHARACTERS
        while True:
            try:
                value, stop = _DECODER.raw_decode(self.text, self.at)
                if stop < len(self.text) or not self.read(size):
                    return value, stop
            except json.JSONDecodeError as error:
                ends = "Unterminated" in error.msg or error.pos > len(self.text) - _LONGEST_TOKEN
                if not (ends and self.read(size)):  # an error before the end stays one
                    self.move(error.pos)
                    raise
            size *= 2


def _array(file: str) -> Iterator[tuple[str, Raw]]:
    """Yields the entries of a JSON array, a part of which is in memory at a time."""
    with _open_text(file) as stream:
        window = _Window(stream)
        window.peek()
        window.at += 1
        try:
            more = window.peek() != "]"
            while more:
                window.peek()
                line = window.line
                entry, stop = window.decode()
                window.move(stop)
                yield f":{line}", entry
                if (char := window.peek()) not in (",", "]"):
                    raise ValueError("expected , or ]")
                more = char == ","
                window.at += more
            window.at += 1
            if window.peek():
                raise ValueError("text after the array's end")
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise UserError(f"{file}:{window.line}: expected a JSON array ({why})") from None


def _table(delimiter: str) -> Callable[[str], Iterator[tuple[str, Raw]]]:
    def read(file: str) -> Iterator[tuple[str, Raw]]:
        csv.field_size_limit(sys.maxsize)
        with _open_text(file) as stream:
            rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
            names = rows.fieldnames or []
            _check_columns(file, filter(None, names))
            others = sorted(set(names[0]) & set(",;\t|") - {delimiter}) if len(names) == 1 else []
            if others:
                raise UserError(
                    f"{file}:1: expected columns with {delimiter!r} between them, as the file's "
                    f"suffix says, got {others[0]!r} in {names[0]!r}"
                )
            rows.fieldnames = [name or _INDEX for name in names]
            line = 2
            try:
                for record in rows:
                    yield f":{line}", {key: value for key, value in record.items() if value != ""}
                    line = rows.line_num + 1
            except csv.Error as error:
                raise UserError(f"{file}:{line}: expected a row of a table ({error})") from None

    return read


def _text(file: str) -> Iterator[tuple[str, Raw]]:
    with _open(file) as stream:
        for number, line in _lines(stream):
            if (text := line.decode().rstrip("\r\n")).strip():
                yield f":{number}", {"text": text}


def _columns(file: str) -> Iterator[tuple[str, Raw]]:
    number = 0
    for batch in record_batches(file, 512):
        for record in batch.to_pylist():
            number += 1
            yield f", record {number}", from_table(record)


def from_table(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a table's row without the nulls in its cells: one column's objects share all keys."""
    return {name: _without_nulls(cell) for name, cell in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _check_columns(file: str, names: Iterable[str]) -> None:
    """Raises UserError for two columns of one name, of which a record could have one."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(
            f"{file}: expected columns of different names, got {', '.join(twice)} twice"
        )


def record_batches(file: str, num_rows: int) -> Iterator[Any]:
    """Yields a Parquet or Arrow file's checked pyarrow.RecordBatch, of at most `num_rows` rows."""
    for batch in (_parquet if kind_of(file)[0] == ".parquet" else _arrow)(file, num_rows):
        _check_columns(file, batch.schema.names)
        batch.validate(full=True)  # a damaged offset would read outside the memory
        for start in range(0, batch.num_rows, num_rows):
            yield batch.slice(start, num_rows)


def _parquet(file: str, num_rows: int) -> Iterator[Any]:
    from pyarrow import parquet

    with _open_to_seek(file) as stream:
        checked = parquet.ParquetFile(stream, page_checksum_verification=True)
        yield from checked.iter_batches(batch_size=num_rows)


def _arrow(file: str, _: int) -> Iterator[Any]:
    import pyarrow

    with _open(file) as stream:
        head = stream.read(6)
    if head == b"ARROW1":
        with _open_to_seek(file) as stream:
            reader = pyarrow.ipc.open_file(stream)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        with _open(file) as stream:
            yield from pyarrow.ipc.open_stream(stream)


READERS: dict[str, Callable[[str], Iterator[tuple[str, Raw]]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".txt": _text,
    ".parquet": _columns,
    ".arrow": _columns,
}
