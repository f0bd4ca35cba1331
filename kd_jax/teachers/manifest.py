"""The content of a teacher's cache: manifest.json, written last, and the index of each part.

A cache is made of parts, one for each time that documents were added. A part is a folder with
`index.npy` (the key and the number of target tokens of each document, in order) and one array for
each field, with the values of all target tokens one after the other. Parts that the manifest does
not name are unfinished and never read.
"""

import io
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
import xxhash

from kd_jax.config import UserError
from kd_jax.config.errors import first_line, raise_all
from kd_jax.data.documents import Documents
from kd_jax.teachers.storage import (
    Field,
    Fields,
    is_remote,
    list_files,
    local_folder,
    open_folder,
    read_file,
    reading,
    token_bytes,
    write_json,
)

VERSION = 1
KINDS = ("hidden", "topk", "sampled")
SOURCE = "source"
"""In the identity of a cache made of a file in place of a teacher: the name of its kind."""
MANIFEST = "manifest.json"
INDEX = "index.npy"
_INDEX_DTYPE = np.dtype([("key", "V16"), ("tokens", "<i4")])


class Part(NamedTuple):
    """A finished part."""

    documents: int
    tokens: int
    files: dict[str, tuple[int, str]]
    """Size and xxh3 of each file, by its name in the part's folder."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A committed cache."""

    path: str
    store: ts.KvStore
    kind: Any
    """One of KINDS."""
    fields: Fields
    identity: dict[str, str]
    """Hashes of teacher, adapter, tokenizer and template, the teacher's dtype and the number of
    vocabulary entries in use."""
    parts: tuple[Part, ...]

    @property
    def num_tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def starts(self) -> np.ndarray:
        """[parts + 1] int64: the first token of each part, in all parts' tokens."""
        return np.cumsum([0, *(part.tokens for part in self.parts)])


def part_folder(number: int) -> str:
    return f"part{number:04}/"


def new_cache(path: str, kind: str, fields: Fields, identity: dict[str, str]) -> Cache:
    """Returns a cache without documents, of which nothing is on disk."""
    return Cache(
        path=path, store=open_folder(path), kind=kind, fields=fields, identity=identity, parts=()
    )


def read_cache(path: str, flag: str = "teacher.cache") -> Cache | None:
    """Returns the committed cache in a folder, None if there is none.

    Raises:
      UserError: the manifest is damaged or of another version, or a file is missing or cut off.
    """
    place = f"{flag}: {path}"
    with reading(place):
        store = open_folder(path)
        text = read_file(store, MANIFEST)
    if text is None:
        return None
    try:
        cache = _from_json(path, store, json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{place}/{MANIFEST}: expected what kd_jax.cache of this version wrote, got another "
            f"file ({first_line(error)}). Give another folder"
        ) from None
    with reading(place):
        _check_files(cache, place)
    return cache


def read_kind(path: str) -> str | None:
    """Returns the kind of a cache; None if its manifest cannot be read."""
    try:
        return json.loads(read_file(open_folder(path), MANIFEST) or b"{}").get("kind")
    except (ValueError, OSError, AttributeError, UserError):
        return None


def _from_json(path: str, store: ts.KvStore, tree: Any) -> Cache:
    if tree["version"] != VERSION:
        raise ValueError(f"version {tree['version']}")
    fields = {name: Field(tuple(x[0]), x[1]) for name, x in tree["fields"].items()}
    kind, size = tree["kind"], token_bytes(fields)
    fits = "hidden" in fields if kind == "hidden" else "vocabulary" in tree["identity"]
    if kind not in KINDS or not fits or not size:
        raise ValueError(f"kind {kind} with arrays {', '.join(fields) or 'missing'}")
    parts = []
    for x in tree["parts"]:
        files = {name: (size, value) for name, (size, value) in x["files"].items()}
        parts.append(Part(int(x["documents"]), int(x["tokens"]), files))
    return Cache(
        path=path,
        store=store,
        kind=kind,
        fields=fields,
        identity=dict(tree["identity"]),
        parts=tuple(parts),
    )


def commit(cache: Cache, part: Part) -> None:
    """Replaces the manifest by one that names the part too, which now counts."""
    tree = {
        "version": VERSION,
        "kind": cache.kind,
        "fields": {name: list(field) for name, field in cache.fields.items()},
        "identity": cache.identity,
        "parts": [x._asdict() for x in (*cache.parts, part)],
    }
    write_json(cache.store, MANIFEST, tree)


def _check_files(cache: Cache, place: str) -> None:
    """Raises UserError for missing files and, on a local disk, for files of another size.

    Each chunk has a CRC, which is checked when it is read.
    """
    problems = []
    for number, part in enumerate(cache.parts):
        folder = part_folder(number)
        found = set(list_files(cache.store / folder))
        for name, (size, _) in part.files.items():
            if name not in found:
                problems.append(f"{place}: {folder}{name} is missing")
            elif not is_remote(cache.path):
                there = (local_folder(cache.path) / folder / name).stat().st_size
                if there != size:
                    problems.append(
                        f"{place}: {folder}{name}: expected {size:,} bytes, got {there:,}"
                    )
    if problems:
        problems.append("Restore the files, or make the cache again in another folder")
    raise_all(problems)


def check_identity(cache: Cache, wanted: dict[str, str], flag: str = "teacher.cache") -> None:
    """Raises UserError if the cache is of another teacher, dtype, tokenizer or template."""
    place, theirs = f"{flag}: {cache.path}", cache.identity
    if SOURCE in theirs and SOURCE not in wanted:  # of a teacher that is no folder
        wanted = {n: x for n, x in wanted.items() if not n.startswith("teacher.")}
    raise_all(
        [
            f"{place}: {name}: expected {_shown(theirs.get(name, 'none'))}, with which the cache "
            f"was made, got {_shown(value)}. Give that, or make another cache"
            for name, value in wanted.items()
            if theirs.get(name, "none") != value
        ]
    )


def _shown(value: str) -> str:
    return f"the content {value[:8]}..." if len(value) > 16 else value


def cache_key(cache: Cache, used: np.ndarray) -> str:
    """Returns a hash of what a run takes from the cache: the identity, and the parts in use.

    Args:
      used: first tokens of the documents, [N] int64, in all parts' tokens.
    """
    numbers = np.unique(np.searchsorted(cache.starts, used, side="right") - 1).tolist()
    parts = [sorted(cache.parts[number].files.items()) for number in numbers]
    fields = sorted(cache.fields.items())
    recipe = [VERSION, cache.kind, fields, sorted(cache.identity.items()), parts]
    return xxhash.xxh3_128_hexdigest(json.dumps(recipe).encode())


def index_bytes(keys: list[bytes], counts: np.ndarray) -> bytes:
    """Returns a part's index as the bytes of a .npy file."""
    table = np.zeros(len(keys), _INDEX_DTYPE)
    table["key"] = np.frombuffer(b"".join(keys), "V16")
    table["tokens"] = counts
    stream = io.BytesIO()
    np.save(stream, table)
    return stream.getvalue()


def find_places(cache: Cache, documents: Documents) -> np.ndarray:
    """Returns where each document's values begin in all parts' tokens, [N] int64; -1: nowhere.

    A document that the cache has several times, since the rows had it so, is at the first place the
    first time, and so on: then its values are those of the same row.
    """
    table: dict[bytes, list[int]] = {}
    wanted = set(documents.keys)
    for number, first in enumerate(cache.starts[:-1]):
        for key, start in _read_index(cache, number, int(first)):
            if key in wanted:
                table.setdefault(key, []).append(start)
    seen: dict[bytes, int] = {}
    out = np.full(len(documents.keys), -1, np.int64)
    for i, key in enumerate(documents.keys):
        if places := table.get(key):
            out[i] = places[seen.setdefault(key, 0) % len(places)]
            seen[key] += 1
    return out


def _read_index(cache: Cache, number: int, first: int) -> list[tuple[bytes, int]]:
    """Returns the key and the first token of each document of a part."""
    name = f"{part_folder(number)}{INDEX}"
    with reading(f"teacher.cache: {cache.path}"):
        part, data = cache.parts[number], read_file(cache.store, name) or b""
    same = xxhash.xxh3_128_hexdigest(data) == part.files[INDEX][1]
    table = np.load(io.BytesIO(data)) if same else np.zeros(0, _INDEX_DTYPE)
    if (len(table), table["tokens"].sum()) != (part.documents, part.tokens):
        raise UserError(
            f"teacher.cache: {cache.path}/{name}: expected the file that was written, got another. "
            "Restore it, or make the cache again"
        )
    starts = first + np.cumsum(table["tokens"], dtype=np.int64) - table["tokens"]
    return list(zip(table["key"].tolist(), starts.tolist(), strict=True))
