"""The prompts of a data set: each answer's conversation up to where the answer begins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kd_jax.config import UserError
from kd_jax.config.on_policy import LEAST_PROMPT
from kd_jax.data.batches import shuffled
from kd_jax.data.rows import Rows

_BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The N prompts of the answers in rows; tokens [begin, end) of a row each, [N] int64."""

    rows: Rows
    row: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    num_long: int = 0
    """Answers whose prompt is too long, which are not among the N."""
    num_without: int = 0
    """Answers without a prompt, as those of plain text."""
    teacher: "Prompts | None" = None
    """The teacher's own prompts of the same answers; None: it sees the student's."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each prompt, [N] int64."""
        return self.end - self.begin

    def tokens(self, number: int) -> np.ndarray:
        """Returns a prompt's tokens, [n] int32."""
        row = self.rows.tokens[self.row[number : number + 1]][0]
        return np.array(row[self.begin[number] : self.end[number]])

    def taken(self, chosen: np.ndarray) -> "Prompts":
        """Returns the chosen ones, [N] bool."""
        row, begin, end = self.row[chosen], self.begin[chosen], self.end[chosen]
        return Prompts(rows=self.rows, row=row, begin=begin, end=end)


def find_prompts(rows: Rows, longest: int, teacher_longest: int = 0) -> Prompts:
    """Returns the prompts of at most `longest` tokens; each answer that has a loss has one.

    Args:
      teacher_longest: most tokens of the teacher's own prompt, where it has one.
    """
    student = _all_prompts(rows)
    long, without = student.sizes > longest, student.sizes < LEAST_PROMPT
    teacher = None
    if rows.teacher is not None:
        teacher = _all_prompts(rows.teacher)
        assert np.array_equal(student.row, teacher.row), "rows with other answers"
        long |= teacher.sizes > teacher_longest
    fits = ~long & ~without
    return replace(
        student.taken(fits),
        num_long=int(long.sum()),
        num_without=int(without.sum()),
        teacher=teacher and teacher.taken(fits),
    )


def _all_prompts(rows: Rows) -> Prompts:
    found = [_prompts_of(rows, start) for start in range(0, len(rows), _BLOCK_ROWS)]
    row, begin, end = (np.concatenate(column) for column in zip(*found, strict=True))
    return Prompts(rows=rows, row=row, begin=begin, end=end)


def _prompts_of(rows: Rows, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns row, begin and end of the prompts in a block of rows."""
    block = slice(start, start + _BLOCK_ROWS)
    segments, mask = np.asarray(rows.segment_ids[block]), np.asarray(rows.loss_mask[block])
    positions = np.asarray(rows.positions[block])
    before = np.pad(mask, ((0, 0), (1, 0)))[:, :-1] & (positions > 0)
    row, end = np.nonzero(mask & ~before & (segments > 0))
    return row + start, end - positions[row, end], end


def check_prompts(
    prompts: Prompts, path: str, longest: int, why: str, fields: Sequence[str] = ("data.seq-len",)
) -> str:
    """Returns a line about the prompts, with those that cannot be used.

    Args:
      path: of the data.
      why: what a prompt of more than `longest` tokens exceeds.
      fields: what can be raised to make room.

    Raises:
      UserError: no prompt can be used.
    """
    if not len(prompts):
        if prompts.num_long:
            raise UserError(
                f"on-policy.max-new-tokens: expected room for a prompt of {path} ({why}: at most "
                f"{longest:,} tokens), got {prompts.num_long:,} longer ones. Lower it"
                + (f", or raise {' and '.join(fields)}" if fields else "")
            )
        raise UserError(
            f"data.path: expected conversations, or prompts with completions, with on-policy."
            f"fraction above 0, got plain text in {path}"
        )
    line = f"on-policy: {len(prompts):,} prompts of at most {longest:,} tokens"
    if prompts.num_long:
        ones = "one is" if prompts.num_long == 1 else "ones are"
        line += f"; {prompts.num_long:,} longer {ones} not used ({why})"
    if prompts.num_without:
        line += f"; {prompts.num_without:,} texts have none"
    return line


class Order:
    """The prompts drawn at each step: a function of seed and step alone."""

    def __init__(self, prompts: Prompts, seed: int, max_new_tokens: int) -> None:
        self.prompts, self.seed = prompts, seed
        sides = [prompts] if prompts.teacher is None else [prompts, prompts.teacher]
        self.sizes = np.stack([side.sizes for side in sides], axis=-1) + max_new_tokens
        self.room = np.array([side.rows.tokens.shape[1] for side in sides])
        sources = prompts.rows.sources
        blended = any(weight for _, weight, _ in sources)
        counts = [size for *_, size in sources] if blended else [len(prompts.rows)]
        ends = np.cumsum([0, *counts])
        sizes = np.diff(np.searchsorted(prompts.row, ends))
        weights = np.array([weight for _, weight, _ in sources] if blended else [1.0])
        weights = np.where(sizes > 0, weights, 0)  # a source without prompts gives none
        self.weights, self.orders = weights / weights.sum(), shuffled(sizes.tolist(), seed)
        self.per_row = max(1.0, float((self.room / self.sizes.mean(axis=0)).min()))

    def choose(self, drawing: int, num_rows: int, most_rows: int) -> list[list[int]]:
        """Returns the numbers of the prompts of each row.

        They are taken in order until the next one, with its answer, fits into no row.

        Args:
          drawing: number of the drawing, from 0.
          most_rows: rows of the largest drawing, for which each drawing has prompts of its own.
        """
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        rooms = np.tile(self.room, (num_rows, 1))
        for number in self._candidates(drawing, self.most_prompts(most_rows)):
            fits = np.flatnonzero((rooms >= self.sizes[number]).all(axis=-1))
            if not len(fits):
                break
            rows[fits[0]].append(number)
            rooms[fits[0]] -= self.sizes[number]
        return rows

    def most_prompts(self, num_rows: int) -> int:
        """Returns the most prompts that are drawn for rows: as many as fit on average."""
        return round(num_rows * self.per_row)

    def _candidates(self, drawing: int, count: int) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, drawing])
        chosen = rng.choice(len(self.weights), count, p=self.weights)
        for i, source in enumerate(chosen):
            yield int(self.orders[source][drawing * count + i])
