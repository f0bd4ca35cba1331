"""Log-likelihoods of continuations, packed into rows with shared contexts.

A request is a pair of a context and a continuation, in tokens. A row holds a context once, followed
by its continuations; each is a segment of its own that also attends to the context. The head runs
only at positions that predict continuation tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from kd_jax.config import LossConfig
from kd_jax.data.packing import pack
from kd_jax.losses.fused_head import token_metrics
from kd_jax.losses.head_inputs import Student, Targets
from kd_jax.models.decoder import Decoder, DecoderSpec
from kd_jax.parallel.mesh import compiler_options, num_batch_shards, replicated
from kd_jax.parallel.placement import Arrays, put_batch
from kd_jax.setup.program import make_head

Tokens = tuple[int, ...]
Request = tuple[Tokens, Tokens]
Batch = dict[str, np.ndarray]


class Score(NamedTuple):
    log_likelihood: float
    """log p(continuation | context), nats."""
    is_greedy: bool
    """True if every token of the continuation is the likeliest one."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model on the mesh, and the sizes of its batches."""

    spec: DecoderSpec
    arrays: Arrays
    mesh: Mesh
    vocab_size: int
    row_tokens: int
    """Length of a row; doubled as often as a longer request needs."""
    batch_tokens: int
    """Approximate tokens of a batch over all devices."""


def score(scorer: Scorer, requests: Sequence[Request]) -> Iterator[tuple[Request, Score]]:
    """Yields each distinct request with its score, in no particular order."""
    run = jax.jit(
        _score_step,
        static_argnums=(0, 1),
        out_shardings=replicated(scorer.mesh),
        compiler_options=compiler_options(scorer.mesh),
    )
    by_length: dict[int, list[_Piece]] = {}
    for piece in _pieces(dict.fromkeys(requests), scorer.row_tokens):
        by_length.setdefault(_row_length(piece.length, scorer.row_tokens), []).append(piece)
    for length, pieces in sorted(by_length.items(), reverse=True):
        rows = [[pieces[i] for i in row] for row in pack([x.length for x in pieces], length)]
        for some in _batches(rows, scorer, length):
            yield from _score_rows(scorer, run, some, length)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A context and some of its continuations, all in one row.

    The context's last token is the first input of each continuation.
    """

    context: Tokens
    continuations: list[Tokens]

    @property
    def length(self) -> int:
        return len(self.context) - 1 + sum(map(len, self.continuations))


def _row_length(length: int, row_tokens: int) -> int:
    while row_tokens < length:
        row_tokens *= 2
    return row_tokens


def _pieces(requests: Iterable[Request], row_tokens: int) -> Iterator[_Piece]:
    """Yields requests grouped by context, in pieces that fit the row of the longest one."""
    by_context: dict[Tokens, list[Tokens]] = {}
    for context, continuation in requests:
        by_context.setdefault(context, []).append(continuation)
    for context, continuations in by_context.items():
        continuations.sort(key=lambda x: (-len(x), x))
        room = _row_length(_Piece(context, continuations[:1]).length, row_tokens)
        some: list[Tokens] = []
        for continuation in continuations:
            if _Piece(context, [*some, continuation]).length > room:
                yield _Piece(context, some)
                some = []
            some.append(continuation)
        yield _Piece(context, some)


def _batches(rows: list[Any], scorer: Scorer, length: int) -> Iterator[list[Any]]:
    """Yields batches of equal size, divisible by the batch shards; empty rows pad the last."""
    shares = num_batch_shards(scorer.mesh)
    most = max(scorer.batch_tokens // length // shares, 1) * shares
    count = -(-len(rows) // most)
    size = -(-len(rows) // (count * shares)) * shares
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        yield some + [[]] * (size - len(some))


COLUMNS = ("tokens", "positions", "segment_ids", "context_ids", "labels")


def _score_rows(
    scorer: Scorer, run: Callable, rows: list[list[_Piece]], length: int
) -> Iterator[tuple[Request, Score]]:
    batch: Batch = {name: np.zeros((len(rows), length), np.int32) for name in COLUMNS}
    batch["mask"] = np.zeros((len(rows), length), bool)
    places = [(r, *place) for r, row in enumerate(rows) for place in _fill(batch, r, row)]
    unused, dtype = LossConfig(), scorer.arrays["norm.weight"].dtype.name  # no teacher
    head = make_head(unused, scorer.mesh, scorer.vocab_size, len(rows) * length, dtype)
    placed = put_batch(batch, scorer.mesh)
    out = jax.device_get(run(scorer.spec, head, scorer.arrays, placed))
    for r, request, first, last in places:
        nats, correct = (x[r, first:last] for x in out)
        yield request, Score(-float(nats.sum(dtype=np.float64)), bool(correct.all()))


def _fill(batch: Batch, r: int, row: list[_Piece]) -> Iterator[tuple[Request, int, int]]:
    """Writes row r; yields each request with the [first, last) positions that predict it."""
    at, segment = 0, 0

    def write(tokens: Tokens, position: int, context: int) -> slice:
        here = slice(at, at + len(tokens))
        batch["tokens"][r, here] = tokens
        batch["positions"][r, here] = position + np.arange(len(tokens))
        batch["segment_ids"][r, here] = segment
        batch["context_ids"][r, here] = context
        return here

    for piece in row:
        shared = len(piece.context) - 1
        segment += 1
        context = segment
        at = write(piece.context[:-1], 0, context).stop
        for continuation in piece.continuations:
            segment += 1
            here = write((piece.context[-1], *continuation[:-1]), shared, context)
            batch["labels"][r, here] = continuation
            batch["mask"][r, here] = True
            at = here.stop
            yield (piece.context, continuation), here.start, here.stop


def _score_step(spec, head, arrays, batch):
    """Returns -log p of each label, nats, and 1 if it is the likeliest token, [B, S] float32."""
    model = Decoder(spec, arrays)
    segments = (batch["segment_ids"], batch["context_ids"])
    hidden = model(batch["tokens"], batch["positions"], segments)
    student, targets = Student(hidden, model.head_weight()), Targets(batch["labels"], batch["mask"])
    metrics = token_metrics(head, None, student, None, targets)
    return metrics["ce"], metrics["correct"]
