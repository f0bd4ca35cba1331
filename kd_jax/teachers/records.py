"""Log-probabilities that another system computed, as records of documents, checked one by one."""

import glob
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd_jax.config import UserError
from kd_jax.config.errors import first_line
from kd_jax.data.readers import kind_of, read_file, record_batches
from kd_jax.data.store import Batch
from kd_jax.losses.vocabulary import NEGATIVE
from kd_jax.teachers import distillkit
from kd_jax.teachers.entries import Entries, Group, Listed
from kd_jax.teachers.topk import split_ids

_MASS_TOLERANCE = 1e-3  # of log-probabilities in 16 bits
_ROWS = 64  # of a table in memory at a time
_JSON = (".jsonl", ".ndjson")
_SUFFIXES = (*_JSON, ".parquet", ".arrow")
# Errors of records of another form, and of damaged files.
_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError, EOFError,
    zlib.error,
)  # fmt: skip


class Record(NamedTuple):
    place: str
    """File and line or row, for messages."""
    tokens: np.ndarray
    """[N] int32: the whole document."""
    entries: Entries
    mass_tolerance: float = _MASS_TOLERANCE
    """By which the probabilities of a token may exceed 1."""


def read_records(path: str) -> Iterator[Record]:
    """Yields the records of a file, a glob of files or a folder with files, as in `source_files`.

    A line of JSON is what vLLM gives (prompt_token_ids and prompt_logprobs) or SGLang (meta_info
    with input_token_logprobs and input_top_logprobs). A row of Parquet has `tokens`, the
    `positions` of tokens, and for each of these lists of `ids` and of `log_probs`; or it is
    DistillKit's, with the settings beside the file.

    Raises:
      UserError: a record has another form.
    """
    for file in source_files(path):
        yield from _lines(file) if kind_of(file.name)[0] in _JSON else _table(file)


def source_files(path: str) -> list[Path]:
    """Returns the files of records, sorted; raises UserError if there are none."""
    source = Path(path).expanduser()
    if source.is_dir():
        files = [x for x in source.rglob("*") if kind_of(x.name)[0] in _SUFFIXES]
    else:
        files = [source] if source.exists() else [Path(x) for x in glob.glob(str(source))]
    others = [file for file in files if kind_of(file.name)[0] not in _SUFFIXES]
    if not files or others or not all(file.is_file() for file in files):
        raise UserError(
            f"--source: expected a {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]} file, also with "
            f".gz or .zst, or a folder or glob of such, got {others[0] if others else path}"
        )
    return sorted(files)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turns the errors of a record of another form into one message."""
    try:
        yield
    except _ERRORS as error:
        raise UserError(
            f"{place}: expected what vLLM, SGLang, DistillKit or docs/caching.md describes, got "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None


def _lines(file: Path) -> Iterator[Record]:
    for place, line in read_file(str(file)):
        with _reading(place):
            tree = json.loads(line) if isinstance(line, bytes) else line  # an entry of an array
            yield Record(place, *_from_json(tree))


def _from_json(tree: dict[str, Any]) -> tuple[np.ndarray, Entries]:
    if "meta_info" in tree:  # SGLang: [log-probability, id, text] each
        info = tree["meta_info"]
        tokens = [entry[1] for entry in info["input_token_logprobs"]]
        found = [[(x[1], x[0]) for x in some or ()] for some in info["input_top_logprobs"]]
    else:
        tokens = tree["prompt_token_ids"]
        found = [
            [(int(i), x["logprob"] if isinstance(x, dict) else x) for i, x in (some or {}).items()]
            for some in tree["prompt_logprobs"]
        ]
    if len(found) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens with log-probabilities of {len(found)}")
    listed = {
        position: (_integers([i for i, _ in some]), np.array([x for _, x in some], np.float64))
        for position, some in enumerate(found)
        if some
    }
    return _integers(tokens).astype(np.int32), Listed(listed)


def _table(file: Path) -> Iterator[Record]:
    """Yields the records of a Parquet or Arrow file."""
    number, form = 0, None
    for batch in _batches(file):
        if distillkit.is_compressed(batch.schema.names, str(file)):
            form = form or _find_form(file)
        for row in range(batch.num_rows):
            number += 1
            with _reading(place := f"{file}: row {number}"):
                cells = {name: batch.column(name)[row] for name in batch.schema.names}
                if form is None:
                    yield Record(place, *_from_row({n: x.as_py() for n, x in cells.items()}))
                    continue
                for tokens, entries in distillkit.documents(cells, form):
                    yield Record(place, tokens, entries, distillkit.MASS_TOLERANCE)


def _batches(file: Path) -> Iterator[Any]:
    with _reading(str(file)):
        yield from record_batches(str(file), _ROWS)


def _find_form(file: Path) -> distillkit.Compression:
    """Returns the settings beside a file, or in the folder above, of which it is a part."""
    above = (file.parent.parent / distillkit.CONFIG).is_file()
    beside = (file.parent / distillkit.CONFIG).is_file()
    return distillkit.read_compression(file.parent.parent if above and not beside else file.parent)


def _from_row(row: dict[str, Any]) -> tuple[np.ndarray, Entries]:
    positions = row["positions"]
    if len(set(positions)) < len(positions):
        raise ValueError("a position twice")
    lists = zip(positions, row["ids"], row["log_probs"], strict=True)
    listed = {
        position: (_integers(ids), np.array(log_probs, np.float64))
        for position, ids, log_probs in lists
    }
    return _integers(row["tokens"]).astype(np.int32), Listed(listed)


def _integers(values: list[Any]) -> np.ndarray:
    """Returns [N] int64; raises ValueError for other numbers, which NumPy would cut off."""
    out = np.asarray([0, *values])[1:]
    if out.dtype != np.int64 or out.ndim != 1:
        raise ValueError(f"expected integers, got {values!s:.60}")
    if (np.abs(out) >= 2**31).any():
        raise ValueError("an integer of more than 32 bits")
    return out


_LEAST_SEEN = 16  # tokens from which a shift is told


def check_alignment(records: Iterable[Record], source: str) -> None:
    """Raises UserError if entries are those of the token before or after.

    Aligned entries have their own token nearly always, since vLLM adds it, a neighbour's seldom.
    """
    sums, last = np.zeros(4, np.int64), None
    for record in records:
        if record.entries is last:  # of the document that differs in its last token alone
            continue
        last, seen = record.entries, _count_own(record)
        _check_shift(record.place, seen)
        sums += seen
    _check_shift(source, sums)


def _count_own(record: Record) -> np.ndarray:
    """Returns how many positions there are, and how many have among their entries the token of the
    position itself, of that before and of that after, [4] int64."""
    tokens, positions = record.tokens, record.entries.positions
    positions = positions[(positions > 0) & (positions < len(tokens) - 1)]
    out = np.array([len(positions), 0, 0, 0])
    for rows, ids, _ in record.entries.read(positions):
        around = positions[rows] + np.array([[0], [-1], [1]])
        out[1:] += (tokens[around][..., None] == ids).any(axis=2).sum(axis=1)
    return out


def _check_shift(place: str, seen: np.ndarray) -> None:
    count, own, before, after = seen.tolist()
    for found, late in ((before, "before"), (after, "after")):
        if count >= _LEAST_SEEN and found >= 0.9 * count and own <= found * 2 / 3:
            raise UserError(
                f"{place}: expected the log-probabilities of each token given those before it, got "
                f"those of the token {late}: of {count} positions {found} have that token among "
                f"their entries and {own} their own. Shift them by one"
            )


def make_values(record: Record, positions: np.ndarray, k: int, num_entries: int) -> Batch:
    """Returns the arrays of topk_fields(k), [n, ...], of the tokens at `positions`, [n].

    Raises:
      UserError: a position is missing, or its entries are no part of a distribution.
    """
    if len(absent := np.setdiff1d(positions, record.entries.positions)):
        raise UserError(f"{record.place}: token {absent[0]}: expected log-probabilities, got none")
    ids, log_probs = np.zeros((len(positions), k), np.int64), np.full((len(positions), k), -6e4)
    rest = np.empty(len(positions), np.float32)
    for group in record.entries.read(positions):
        _check_entries(record, positions[group.rows], group, num_entries)
        rows, some, values = group
        mass = np.exp(values).sum(axis=1, keepdims=True)
        values = np.where(mass > 1, values - np.log(mass), values)  # by rounding
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        most = np.take_along_axis(values, order, axis=1)
        kept = np.arange(order.shape[1])
        ids[rows[:, None], kept] = np.take_along_axis(some, order, axis=1)
        log_probs[rows[:, None], kept] = most
        left = 1 - np.exp(most).sum(axis=1)
        rest[rows] = np.log(left, out=np.full(len(left), NEGATIVE), where=left > 1e-7)
    low, high = split_ids(ids)
    return {
        "ids": np.asarray(low),
        "high_bits": np.asarray(high),
        "log_probs": np.maximum(log_probs, -6e4).astype(np.float16),  # its range
        "rest": rest,
    }


def _check_entries(record: Record, positions: np.ndarray, group: Group, num_entries: int) -> None:
    """Raises UserError unless the entries of each position are part of a distribution."""
    _, ids, log_probs = group

    def check(good: NDArray[np.bool_], expected: str, got: Callable[[int], str]) -> None:
        if not good.all():
            i = int(np.argmin(good))
            place = f"{record.place}: token {positions[i]}"
            raise UserError(f"{place}: expected {expected}, got {got(i)}")

    counts = ids.shape[1], log_probs.shape[1]
    as_many = np.full(len(positions), counts[0] == counts[1] > 0, np.bool_)
    check(as_many, "as many ids as log-probabilities", lambda _: f"{counts[0]} and {counts[1]}")
    low, high = ids.min(axis=1), ids.max(axis=1)
    inside = (low >= 0) & (high < num_entries)
    check(inside, f"ids from 0 to {num_entries - 1}", lambda i: f"{low[i]} to {high[i]}")
    again = (np.diff(np.sort(ids, axis=1), axis=1) == 0).sum(axis=1)
    check(again == 0, "each id once", lambda i: f"{again[i]} again")
    below = np.all(log_probs <= record.mass_tolerance, axis=1)
    check(below, "log-probabilities up to 0", lambda i: f"{log_probs[i].max()}")
    mass = np.exp(log_probs).sum(axis=1)
    check(mass > 0, "a probability above 0", lambda _: "none")
    whole = mass <= 1 + record.mass_tolerance
    check(whole, "probabilities that sum to at most 1", lambda i: f"{mass[i]:.4f}")


def difference(tokens: np.ndarray, records: Mapping[bytes, Record]) -> str:
    """Returns where the nearest record's tokens first differ from a document's."""
    nearest, longest = None, -1
    for record in records.values():
        size = min(len(tokens), len(record.tokens))
        unequal = np.flatnonzero(tokens[:size] != record.tokens[:size])
        common = int(unequal[0]) if len(unequal) else size
        if common > longest:
            nearest, longest = record, common
    if nearest is None:
        return "the file has no records"
    ours, theirs = (
        str(x[longest]) if longest < len(x) else "the end" for x in (tokens, nearest.tokens)
    )
    return (
        f"the nearest, {nearest.place}, has {longest} tokens in common; then the document has "
        f"{ours} and the record {theirs}"
    )
