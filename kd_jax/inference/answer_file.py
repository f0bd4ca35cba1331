"""Answers to all prompts of a file, written as records that training reads.

Answers are written as rows end, to a part beside the file: a killed command loses those in
progress. When all are there, the file is written whole, in the order of the prompts.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_jax.config import UserError
from kd_jax.config.checks import out_path
from kd_jax.config.errors import first_lines
from kd_jax.config.record import flatten
from kd_jax.data.questions import Question
from kd_jax.inference.drawing import Sampling
from kd_jax.inference.sampling import Row, Stop, check_finite, sample_rows, without_stop
from kd_jax.models.decoder import DecoderSpec
from kd_jax.parallel.placement import Arrays
from kd_jax.parallel.processes import on_first, say, together
from kd_jax.parallel.progress import Progress
from kd_jax.weights.files import hold, naming, read_json, read_lines, write_whole

_FACTS = ("index", "sample", "ended", "tokens")
LONGEST_CHANGE = 150  # characters, of a value in a message
Place = tuple[int, int]
"""Index of a record in the data, and number of the sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of drawing answers."""

    sampling: Sampling
    samples: int
    """Answers to each prompt."""
    seed: int
    stop_tokens: Collection[Stop]
    stop_texts: Sequence[str]
    """Texts that end an answer, cut off afterwards."""
    max_new_tokens: int
    context: int
    """Most tokens of prompt and answer."""
    batch_rows: int | None
    vocab_size: int


class AnswerFile:
    """The file of answers, and the parts of each process beside it."""

    def __init__(self, path: str, identity: Mapping[str, Any]):
        """Checks the file; `identity` is what its answers depend on, as JSON.

        Raises:
          UserError: the file is another one, or was begun with another configuration.
        """
        self.path = out_path(path, "--out")
        self.record = self.path.with_name(f"{self.path.name}.config.json")
        self.identity = json.loads(json.dumps(identity))
        if not self.record.exists():
            if self.path.exists():
                raise UserError(
                    f"--out: expected a new file, or answers of this command, got {path}, which is "
                    "another file. Give another name"
                )
            return
        old, new = flatten(read_json(self.record)), flatten(self.identity)
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if names:
            shown = ", ".join(_describe_change(x, old.get(x), new.get(x)) for x in names)
            raise UserError(
                f"--out: {path} was begun with another configuration: {shown}. Give another name"
            )

    @property
    def is_whole(self) -> bool:
        return self.path.exists()

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Keeps other commands from writing the file; process 0 has the lock.

        Raises:
          UserError: another command writes it.
        """
        with ExitStack() as stack:
            on_first("answers/lock", lambda: self._lock(stack))
            yield

    def _lock(self, stack: ExitStack) -> None:
        taken = "is being written by {holder}. Wait for it or stop it"
        hold(self.path, stack, "--out", taken, self.path.with_name(f"{self.path.name}.lock"))
        if not self.record.exists():
            write_whole(self.record, json.dumps(self.identity, indent=1) + "\n")

    def parts(self) -> list[Path]:
        own = re.compile(rf"{re.escape(self.path.name)}\.part\d+")
        return sorted(x for x in self.path.parent.iterdir() if own.fullmatch(x.name))

    def part(self, process: int) -> Path:
        """Returns this process's part, without lines that a kill or a power cut tore."""
        part = self.path.with_name(f"{self.path.name}.part{process}")
        whole = "".join(f"{line}\n" for line, record in read_lines(part, _FACTS) if record)
        if part.exists() and whole.encode() != part.read_bytes():
            write_whole(part, whole)
        return part

    def read(self) -> dict[Place, dict[str, Any]]:
        """Returns the answers of all parts, without torn lines."""
        lines = [line for part in self.parts() for line in read_lines(part, _FACTS)]
        return {(record["index"], record["sample"]): record for _, record in lines if record}

    def finish(self, wanted: Sequence[Place]) -> dict[str, int]:
        """Writes the whole file and removes the parts; returns counts of the answers.

        Empty answers are left out, since training takes none.
        """
        found = self.read()
        if missing := [place for place in wanted if place not in found]:
            raise UserError(
                f"--out: {len(missing):,} answers are missing beside {self.path}. All processes "
                "must write to one folder; run the same command again"
            )
        records = [found[place] for place in wanted]
        full = [record for record in records if not record.get("empty")]
        write_whole(self.path, (json.dumps(x, ensure_ascii=False) + "\n" for x in full))
        for part in self.parts():
            part.unlink()
        ended = sum(record["ended"] for record in records)
        return {
            "answers": len(records), "empty": len(records) - len(full), "ended": ended,
            "tokens": sum(record["tokens"] for record in records),
        }  # fmt: skip


def _describe_change(name: str, old: Any, new: Any) -> str:
    """Returns both values; of long ones, whose beginnings may be equal, the name alone."""
    before, now = f"{name} {old!r}", f"(now {new!r})"
    return f"{before} {now}" if len(before + now) <= LONGEST_CHANGE else f"another {name}"


def fit_context(
    questions: Sequence[Question], options: Options
) -> tuple[list[Question], list[str]]:
    """Returns the questions that leave room for an answer, and lines about the others.

    Raises:
      UserError: none does.
    """
    long = [q for q in questions if not 0 < len(q.tokens) < options.context]
    fitting = [q for q in questions if 0 < len(q.tokens) < options.context]
    if not fitting:
        raise UserError(
            f"--data: expected prompts of 1 to {options.context - 1} tokens (the model's context "
            f"is {options.context}), got none. The first: {questions[0].place}, "
            f"{len(questions[0].tokens):,} tokens"
        )
    notes = []
    if long:
        shown = ", ".join(first_lines([f"{q.place} ({len(q.tokens):,})" for q in long]))
        notes.append(
            f"warning: {len(long):,} prompts leave no room in the context of {options.context} "
            f"tokens and are skipped: {shown}"
        )
    cut = sum(len(q.tokens) + options.max_new_tokens > options.context for q in fitting)
    if cut:
        notes.append(f"warning: {cut:,} prompts leave room for less than --max-new-tokens")
    return fitting, notes


def write_answers(
    file: AnswerFile,
    spec: DecoderSpec,
    arrays: Arrays,
    questions: Sequence[Question],
    options: Options,
    decode: Callable[[list[int]], str],
) -> dict[str, int] | None:
    """Writes this process's share of the answers; returns counts on process 0 once all are there.

    Args:
      arrays: whole on this process's devices.
      decode: maps tokens to text.
    """
    me, count = jax.process_index(), jax.process_count()
    wanted = [(q.index, sample) for q in questions for sample in range(options.samples)]
    by_index = {q.index: q for q in questions}
    done = file.read()
    mine = [place for place in wanted[me::count] if place not in done]
    number = len(wanted[me::count])
    progress = Progress(str(file.path), number, "answers", number - len(mine))
    path = file.part(me)
    with naming(path), path.open("a", encoding="utf-8") as part:
        for place, record in _draw(spec, arrays, mine, by_index, options, decode):
            line = {**record, "index": place[0], "sample": place[1]}
            part.write(json.dumps(line, ensure_ascii=False) + "\n")
            part.flush()
            progress.batch(progress.done + 1, record["tokens"])
    if progress.tokens:
        rate = progress.tokens / progress.seconds
        say(f"{progress.tokens:,} tokens in {progress.seconds:,.1f} s: {rate:,.0f} tokens/s")
    together("answers/parts", lambda: None)  # all of them are written
    return on_first("answers/whole", lambda: file.finish(wanted))


def _draw(
    spec: DecoderSpec,
    arrays: Arrays,
    places: Sequence[Place],
    questions: Mapping[int, Question],
    options: Options,
    decode: Callable[[list[int]], str],
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yields places and records as answers end, rows of like lengths together."""
    if not places:
        return
    keys = _keys(options.seed, places)
    rows = []
    for (index, _), key in zip(places, keys, strict=True):
        prompt = questions[index].tokens
        rows.append(Row(prompt, min(options.max_new_tokens, options.context - len(prompt)), key))
    classes: dict[int, list[int]] = {}
    for i, row in enumerate(rows):  # one long row would lengthen the cache of all others
        classes.setdefault(max(8, (len(row.prompt) + row.most - 1).bit_length()), []).append(i)
    for _, members in sorted(classes.items(), reverse=True):
        found = sample_rows(
            spec, arrays, [rows[i] for i in members], stop_tokens=options.stop_tokens,
            sampling=options.sampling, batch_rows=options.batch_rows,
            vocab_size=options.vocab_size,
        )  # fmt: skip
        for i, (tokens, log_probs, ended) in found:
            check_finite(log_probs)
            place = places[members[i]]
            yield place, _record(questions[place[0]], tokens, ended, options, decode)


def _record(
    question: Question,
    tokens: np.ndarray,
    ended: bool,
    options: Options,
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    text = decode(without_stop(tokens, options.stop_tokens).tolist())
    cuts = [at for stop in options.stop_texts if (at := text.find(stop)) >= 0]
    if cuts:
        text, ended = text[: min(cuts)], True
    facts = {"ended": bool(ended), "tokens": len(tokens)}
    return facts | ({"empty": True} if not text.strip() else question.answered(text))


def _keys(seed: int, places: Sequence[Place]) -> np.ndarray:
    """Returns the key data [N, 2] of each answer, which its place and the seed determine."""

    @jax.jit
    def key_of(place):
        key = jax.random.fold_in(jax.random.key(seed), place[0])
        return jax.random.key_data(jax.random.fold_in(key, place[1]))

    return np.asarray(jax.vmap(key_of)(np.array(places, np.int32)))
