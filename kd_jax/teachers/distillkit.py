"""DistillKit's compressed log-probabilities: a curve for the tail, ids packed in bits.

The form is that of arcee-ai/DistillKit 1.0. The bytes of a token are, little-endian, the `exact_k`
highest log-probabilities, the coefficients of a curve through the others, and for each residual bin
a scale and the quantised distances of the next entries from the curve. Ids and quantised numbers
are packed from their highest bit on, and end in a whole byte. Entries are in falling order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kd_jax.config import UserError
from kd_jax.teachers.entries import Group

CONFIG = "compression_config.yaml"
VALUES, IDS = "compressed_logprobs", "bytepacked_indices"
# Columns of DistillKit's other forms, and why each is refused.
_REFUSED = {
    "packed_indices": "its legacy form, which has centred logits",
    "top_values": "its plain form, which has logits",
}
_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
_CURVES = {"sqrt": np.sqrt, "exp": np.exp}
_BIN_COUNTS = ("element_bits", "num_elements")
_MOST_BITS = 62  # of a number in int64
MASS_TOLERANCE = 0.02
"""By which the probabilities of a token may exceed 1: bfloat16 rounds log-probabilities."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Quantised distances of `num_elements` entries from the curve."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def packed_bytes(self) -> int:
        return -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """The settings of a data set, by their names in compression_config.yaml."""

    d: int
    """Vocabulary entries."""
    k: int
    exact_k: int
    residual_bins: tuple[Bin, ...]
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    """Powers, sqrt or exp of the place in the curve."""
    term_dtype: str = "float32"
    delta_encoding: bool = True
    """Each value but the first is the difference from the one before."""
    error_diffusion: bool = False
    """Rounding of the writer; reading does not depend on it."""
    normalize_t: bool = False
    """Places in the curve are 0 to 1 in place of 0, 1, 2, ..."""

    @property
    def id_bits(self) -> int:
        return (self.d - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        return -(-self.k * self.id_bits // 8)

    @property
    def value_sizes(self) -> list[int]:
        """Bytes of each part of a token's values."""
        sizes = [self.exact_k * _DTYPES[self.exact_dtype].itemsize]
        sizes.append(len(self.polynomial_terms) * _DTYPES[self.term_dtype].itemsize)
        for one in self.residual_bins:
            sizes += [_DTYPES[one.scale_dtype].itemsize, one.packed_bytes]
        return sizes


def read_compression(folder: Path) -> Compression:
    """Returns the settings in a folder; raises UserError if they are missing or wrong."""
    import yaml

    file = folder / CONFIG
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        return _checked(tree)
    except FileNotFoundError:
        raise UserError(
            f"--source: expected {file} with the settings that the data were compressed with (d, "
            "k, exact_k, ...), as DistillKit's configuration has them in logprob_compressor"
        ) from None
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--source: {file}: {type(error).__name__}: {error}") from None


def _checked(tree: Any) -> Compression:
    if not isinstance(tree, dict):
        raise ValueError("expected names and values")
    if "polynomial_degree" in tree:
        raise ValueError(f"expected no polynomial_degree, which is of {_REFUSED['packed_indices']}")
    names = {field.name for field in fields(Compression)}
    if unknown := tree.keys() - names:
        raise ValueError(f"expected {', '.join(sorted(names))}, got {', '.join(sorted(unknown))}")
    bins = tuple(Bin(**one) for one in tree["residual_bins"])
    terms = tuple(tree.get("polynomial_terms") or ())
    form = Compression(**(tree | {"residual_bins": bins, "polynomial_terms": terms}))
    if wrong := _wrong_values(form):
        raise ValueError(f"expected other values of {', '.join(wrong)}")
    if sum(one.num_elements for one in bins) > form.k - form.exact_k:
        raise ValueError("expected at most k - exact_k elements in residual_bins")
    if form.exact_k < form.k and not terms and not bins:
        raise ValueError("expected polynomial_terms or residual_bins with exact_k below k")
    return form


def _wrong_values(form: Compression) -> list[str]:
    """Returns the names of numbers below their range, and dtypes and terms that there are not."""
    bins = form.residual_bins
    counts = {"d": form.d - 1, "k": form.k, "exact_k": form.exact_k + 1}
    for i, one in enumerate(bins):
        counts |= {f"residual_bins[{i}].{x}": getattr(one, x) for x in _BIN_COUNTS}
    wrong = [name for name, x in counts.items() if not isinstance(x, int) or x < 1]
    bits = (one.element_bits for one in bins)
    wrong += ["element_bits"] * any(isinstance(x, int) and x > _MOST_BITS for x in bits)
    terms = form.polynomial_terms
    wrong += [f"polynomial_terms: {x}" for x in terms if not (x in _CURVES or _is_power(x))]
    dtypes = (form.exact_dtype, form.term_dtype, *(one.scale_dtype for one in bins))
    return wrong + [f"dtype: {x}" for x in dtypes if x not in _DTYPES]


def _is_power(term: Any) -> bool:
    return isinstance(term, int) and not isinstance(term, bool) and term >= 0


def read_log_probs(data: np.ndarray, form: Compression) -> np.ndarray:
    """Returns log-probabilities [n, k] float64 of bytes [n, sum(form.value_sizes)] uint8."""
    exact, coefficients, *bins = np.split(data, np.cumsum(form.value_sizes)[:-1], axis=1)
    tail = np.zeros((len(data), form.k - form.exact_k))
    if form.polynomial_terms:
        tail += _curve(_view(coefficients, form.term_dtype), form, tail.shape[1])
    start = 0
    for one, scale, packed in zip(form.residual_bins, bins[::2], bins[1::2], strict=True):
        numbers = unpack(packed, one.element_bits, one.num_elements)
        bits = one.element_bits
        numbers = 2 * numbers - 1 if bits == 1 else numbers - 2 ** (bits - 1)
        stop = start + one.num_elements
        tail[:, start:stop] += numbers * _view(scale, one.scale_dtype).astype(np.float64)
        start = stop
    head = _view(exact, form.exact_dtype).astype(np.float64)
    values = np.concatenate([head, tail], axis=1)
    return np.cumsum(values, axis=1) if form.delta_encoding else values


def _view(data: np.ndarray, dtype: str) -> np.ndarray:
    """Returns bytes [n, m] as numbers [n, m / itemsize]."""
    kind = _DTYPES[dtype]
    numbers = np.frombuffer(data.tobytes() + bytes(kind.itemsize), kind.newbyteorder("<"))[:-1]
    return numbers.reshape(len(data), -1) if data.size else np.zeros((len(data), 0), kind)


def _curve(coefficients: np.ndarray, form: Compression, count: int) -> np.ndarray:
    """Returns [n, count] float64; products and sums are rounded to term_dtype, as by the writer."""
    places = np.linspace(0, 1, count) if form.normalize_t else np.arange(count, dtype=np.float64)
    columns = [
        _CURVES[x](places) if isinstance(x, str) else places**x for x in form.polynomial_terms
    ]
    basis = np.stack(columns, axis=-1).astype(coefficients.dtype)
    products = basis[None] * coefficients[:, None]
    return products.astype(np.float64).sum(-1).astype(coefficients.dtype).astype(np.float64)


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns [n, count] int64 of numbers of `bits` bits each in bytes [n, m] uint8."""
    flat = np.unpackbits(data, axis=1, count=bits * count).reshape(len(data), count, bits)
    width = next(width for width in (8, 16, 32, 64) if width >= bits)
    whole = np.pad(flat, ((0, 0), (0, 0), (width - bits, 0)))
    numbers = np.packbits(whole, axis=2).view(f">u{width // 8}")
    return numbers[..., 0].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Packed:
    """The entries of a document's tokens, decoded when they are read."""

    packed_values: np.ndarray
    """[n, bytes] uint8; the first is of the document's token 1."""
    packed_ids: np.ndarray
    form: Compression

    @property
    def positions(self) -> np.ndarray:
        return np.arange(1, len(self.packed_values) + 1)

    def read(self, positions: np.ndarray) -> Iterator[Group]:
        if not len(positions):
            return
        log_probs = read_log_probs(self.packed_values[positions - 1], self.form)
        ids = unpack(self.packed_ids[positions - 1], self.form.id_bits, self.form.k)
        there = log_probs != -np.inf  # the teacher's server left out other ranks
        whole = there.all(axis=1)
        yield Group(np.flatnonzero(whole), ids[whole], log_probs[whole])
        for row in np.flatnonzero(~whole):
            some = there[row]
            yield Group(np.array([row]), ids[row, some][None], log_probs[row, some][None])


def documents(row: Mapping[str, Any], form: Compression) -> Iterator[tuple[np.ndarray, Packed]]:
    """Yields (tokens [N] int32, entries) of the documents in a row, whose columns are Arrow lists.

    The numbers of a packed row's `attention_mask` tell its documents apart. DistillKit appends a
    token to a document before it asks the teacher, so one is also yielded without its last token.

    Raises:
      ValueError: a token has another number of bytes than the settings give, or none.
    """
    tokens = np.asarray(row["input_ids"].values).astype(np.int32)
    values = _rows(row[VALUES], sum(form.value_sizes), VALUES)
    ids = _rows(row[IDS], form.id_bytes, IDS)
    if len(ids) != len(values) or len(tokens) - len(values) not in (0, 1):
        raise ValueError(f"{len(tokens)} tokens with {len(values)} values and {len(ids)} ids")
    segments = np.ones(len(tokens), np.int64)
    if "attention_mask" in row and len(row["attention_mask"].values) == len(tokens):
        segments = np.asarray(row["attention_mask"].values)
    starts = np.flatnonzero(np.diff(segments, prepend=np.nan)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if segments[start]:
            entries = Packed(values[start:stop], ids[start:stop], form)
            yield tokens[start:stop], entries
            yield tokens[start : stop - 1], entries


def _rows(column: Any, size: int, name: str) -> np.ndarray:
    """Returns [n, size] uint8 of a list of lists."""
    lists = column.values
    lengths = set(np.asarray(lists.value_lengths()).tolist())
    if lengths - {size}:
        found = ", ".join(map(str, sorted(lengths)))
        raise ValueError(f"{name}: expected {size} bytes a token by {CONFIG}, got {found}")
    flat = np.asarray(lists.flatten())
    if len(flat) and not 0 <= flat.min() <= flat.max() <= 255:
        raise ValueError(f"{name}: expected bytes")
    return flat.astype(np.uint8).reshape(-1, size)


def is_compressed(names: list[str], place: str) -> bool:
    """Returns True for columns of this form; raises UserError for DistillKit's other forms."""
    for column, form in _REFUSED.items():
        if column in names:
            raise UserError(
                f"--source: {place}: expected DistillKit's {VALUES} and {IDS}, got {column}: "
                f"{form} without the sum over the vocabulary, so that the mass of the rest is "
                "unknown. Capture the teacher's log-probabilities again"
            )
    return {VALUES, IDS} <= set(names)
