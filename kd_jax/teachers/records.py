"""Log-probabilities that another system computed, as records of documents, checked one by one."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_jax.config import UserError
from kd_jax.config.errors import first_line
from kd_jax.data.store import Batch
from kd_jax.losses.vocabulary import NEGATIVE
from kd_jax.teachers.topk import split_ids

_MASS_TOLERANCE = 1e-3  # of log-probabilities in 16 bits

Entries = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""(ids [n], log-probabilities [n]) of the token at each position, given those before it."""


class Record(NamedTuple):
    place: str
    """File and line or row, for messages."""
    tokens: np.ndarray
    """[N] int32: the whole document."""
    entries: Entries


def read_records(path: str) -> Iterator[Record]:
    """Yields the records of a .jsonl or .parquet file.

    A line of JSON is what vLLM gives (prompt_token_ids and prompt_logprobs) or SGLang (meta_info
    with input_token_logprobs and input_top_logprobs). A row of Parquet has `tokens`, the
    `positions` of tokens, and for each of these lists of `ids` and of `log_probs`.

    Raises:
      UserError: a record has another form.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".jsonl", ".parquet") or not file.is_file():
        raise UserError(f"--source: expected a .jsonl or .parquet file, got {path}")
    place = str(file)
    try:
        for place, read in _lines(file) if file.suffix == ".jsonl" else _rows(file):
            yield Record(place, *read())
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(
            f"{place}: expected what vLLM, SGLang or docs/caching.md describes, got "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{file}:{number}", lambda line=line: _from_json(json.loads(line))


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
    return _integers(tokens).astype(np.int32), {
        position: (_integers([i for i, _ in some]), np.array([x for _, x in some], np.float64))
        for position, some in enumerate(found)
        if some
    }


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = 0
    checked = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    for batch in checked.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{file}: row {number}", lambda row=row: _from_row(row)


def _from_row(row: dict[str, Any]) -> tuple[np.ndarray, Entries]:
    positions = row["positions"]
    if len(set(positions)) < len(positions):
        raise ValueError("a position twice")
    lists = zip(positions, row["ids"], row["log_probs"], strict=True)
    return _integers(row["tokens"]).astype(np.int32), {
        position: (_integers(ids), np.array(log_probs, np.float64))
        for position, ids, log_probs in lists
    }


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
    sums = np.zeros(4, np.int64)
    for record in records:
        seen = _count_own(record)
        _check_shift(record.place, seen)
        sums += seen
    _check_shift(source, sums)


def _count_own(record: Record) -> np.ndarray:
    """Returns how many positions there are, and how many have among their entries the token of the
    position itself, of that before and of that after, [4] int64."""
    tokens, out = record.tokens, np.zeros(4, np.int64)
    for position, (ids, _) in record.entries.items():
        if 0 < position < len(tokens) - 1:
            around = tokens[[position, position - 1, position + 1]]
            out += [1, *(around[:, None] == ids).any(axis=1)]
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
    ids, log_probs = np.zeros((len(positions), k), np.int64), np.full((len(positions), k), -6e4)
    rest = np.empty(len(positions), np.float32)
    for i, position in enumerate(positions.tolist()):
        place = f"{record.place}: token {position}"
        if position not in record.entries:
            raise UserError(f"{place}: expected log-probabilities, got none")
        some, values = _checked(*record.entries[position], num_entries, place)
        order = np.argsort(-values, kind="stable")[:k]
        ids[i, : len(order)], log_probs[i, : len(order)] = some[order], values[order]
        left = 1 - np.exp(values[order]).sum()
        rest[i] = np.log(left) if left > 1e-7 else NEGATIVE
    low, high = split_ids(ids)
    return {
        "ids": np.asarray(low),
        "high_bits": np.asarray(high),
        "log_probs": np.maximum(log_probs, -6e4).astype(np.float16),  # its range
        "rest": rest,
    }


def _checked(
    ids: np.ndarray, log_probs: np.ndarray, num_entries: int, place: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a token's entries; raises UserError unless they are part of a distribution."""
    expected, got = "", ""
    if len(ids) != len(log_probs) or not len(ids):
        expected, got = "as many ids as log-probabilities", f"{len(ids)} and {len(log_probs)}"
    elif ids.min() < 0 or ids.max() >= num_entries:
        expected, got = f"ids from 0 to {num_entries - 1}", f"{ids.min()} to {ids.max()}"
    elif len(np.unique(ids)) < len(ids):
        expected, got = "each id once", f"{len(ids) - len(np.unique(ids))} again"
    elif not (log_probs <= _MASS_TOLERANCE).all():
        expected, got = "log-probabilities up to 0", f"{log_probs.max()}"
    elif (mass := np.exp(log_probs).sum()) > 1 + _MASS_TOLERANCE:
        expected, got = "probabilities that sum to at most 1", f"{mass:.4f}"
    if expected:
        raise UserError(f"{place}: expected {expected}, got {got}")
    return ids, log_probs


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
