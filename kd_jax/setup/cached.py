"""A run's teacher from a cache: identity, missing documents, values of its rows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kd_jax.config import Config, LossConfig, UserError
from kd_jax.config.errors import raise_all
from kd_jax.data.documents import Documents, find_documents
from kd_jax.data.rows import Rows
from kd_jax.data.templates import Template
from kd_jax.parallel.processes import say
from kd_jax.setup.models import TeacherOutputs
from kd_jax.teachers.manifest import SOURCE, Cache, cache_key, find_places
from kd_jax.teachers.reading import CachedRows


class Found(NamedTuple):
    """The documents of a data set, and where the cache has them."""

    name: str
    """The config field of the data set."""
    rows: Rows
    """Those that the student sees."""
    documents: Documents
    places: np.ndarray
    """[N] int64; -1: missing."""

    @property
    def teacher_rows(self) -> Rows:
        """The rows whose documents the teacher sees."""
        return self.rows if self.rows.teacher is None else self.rows.teacher

    @property
    def missing(self) -> np.ndarray:
        """[N] bool: documents that the cache lacks."""
        return self.places < 0

    @property
    def num_missing(self) -> int:
        return int(self.missing.sum())


@dataclass(frozen=True, kw_only=True)
class CachedTeacher:
    """The teacher's values of a run's rows."""

    train: CachedRows
    held_out: CachedRows | None
    kind: TeacherOutputs
    key: str
    """Hash of what the run takes from the cache."""
    vocab_size: int | None = None
    """Vocabulary entries whose probabilities add up to 1; None: hidden states, for any number."""

    def check_vocab(self, size: int) -> None:
        """Raises UserError if the models of a run share another number of vocabulary entries."""
        if self.vocab_size not in (None, size):
            raise UserError(
                f"teacher.cache: expected models that share {self.vocab_size:,} vocabulary "
                f"entries, as those with which its probabilities were computed, got {size:,}. Make "
                "another cache with this student"
            )


def make_identity(
    dtype: str, hashes: dict[str, str], tokenizer: Any, template: Template | None
) -> dict[str, str]:
    """Returns the hashes and choices that all documents of a cache share, by config field.

    Args:
      dtype: the teacher's.
      hashes: content hashes of the teacher and its adapter, by config field.
      tokenizer: the teacher's.
    """
    vocabulary = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    return {
        "teacher.path": hashes["teacher.path"],
        "teacher.adapter": hashes.get("teacher.adapter", "none"),
        "teacher.dtype": dtype,
        "tokenizer": _hash(vocabulary),
        "data.chat-template": "none" if template is None else _hash(template),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


# Divergences that a teacher known by k entries can serve. They are f-divergences: with all other
# entries merged into one, value and gradient are those of k + 1 entries.
_OF_TOPK = (
    "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "jsd_cross", "skew_forward_kl",
    "skew_reverse_kl", "tvd",
)  # fmt: skip
_SERVED: dict[str, tuple[str, ...]] = {"topk": _OF_TOPK, "sampled": ("forward_kl",)}


def _needs_every_entry(loss: LossConfig) -> bool:
    """Returns True where the divergence is infinite if an entry of the teacher has 0."""
    reverse = {"jsd": loss.jsd_beta == 1, "jsd_cross": loss.jsd_beta == 1}
    reverse |= {"reverse_kl": True, "symmetric_kl": True, "skew_reverse_kl": loss.skew_alpha == 0}
    return reverse.get(loss.divergence, False)


def loss_problems(cache: Cache, config: Config) -> list[str]:
    """Returns messages about what the loss needs and the cache does not have."""
    assert config.teacher is not None
    place, rest = f"with the {cache.kind} cache {cache.path}", config.teacher.cache_rest
    if cache.kind != "topk" and rest != "bucket":
        return [f"teacher.cache-rest: expected bucket, its default, {place}, got {rest}"]
    if cache.kind == "hidden":
        return []
    loss, served, problems = config.loss, _SERVED[cache.kind], []
    if rest in ("label", "renormalize") and _needs_every_entry(loss):
        problems.append(
            f"teacher.cache-rest: expected bucket|uniform|renormalize_both with loss.divergence "
            f"{loss.divergence}, got {rest}, with which it is infinite"
        )
    if loss.divergence not in served:
        problems.append(
            f"loss.divergence: expected {'|'.join(served)} {place}, got {loss.divergence}"
        )
    if (loss.temperature, loss.temperature_end) not in ((1, None), (1, 1)):
        problems.append(f"loss.temperature: expected 1 {place}, which has no other's probabilities")
    return [*problems, "A cache of hidden states serves every loss"] if problems else []


def check_loss(cache: Cache, config: Config) -> None:
    """Raises UserError if the loss needs more than the cache has; says in what it is biased."""
    raise_all(loss_problems(cache, config))
    if cache.kind == "hidden":
        return
    what = {
        "topk": "the teacher's most likely entries alone: the loss is biased, and kl_forward and "
        "the like are those to what is stored",
        "sampled": "draws from the teacher alone: the gradient of forward_kl is unbiased, but "
        "kl_forward and the like are those to the draws",
    }
    say(f"warning: teacher.cache: {cache.path} has {what[cache.kind]}")


def find_all(cache: Cache, rows: Rows, eval_rows: Rows | None) -> list[Found]:
    """Returns the documents of the training and held-out rows."""
    sets = {"data.path": rows} | ({} if eval_rows is None else {"eval.path": eval_rows})
    out = []
    for name, some in sets.items():
        documents = find_documents(some if some.teacher is None else some.teacher)
        out.append(Found(name, some, documents, find_places(cache, documents)))
    return out


def missing_documents(found: Sequence[Found]) -> tuple[list[bytes], np.ndarray]:
    """Returns the keys of the documents that a cache lacks, in order, and their target tokens."""
    keys = [x.documents.keys[i] for x in found for i in np.flatnonzero(x.missing)]
    return keys, np.concatenate([x.documents.counts[x.missing] for x in found])


def check_complete(cache: Cache, found: Sequence[Found]) -> None:
    """Raises UserError with the number of missing documents of each data set."""
    lacking = [
        f"{one.num_missing:,} of {len(one.places):,} documents of {one.name}"
        for one in found
        if one.num_missing
    ]
    if lacking:
        from_file = SOURCE in cache.identity
        how = " --source" if from_file else ", or set --teacher.cache-missing compute"
        raise UserError(
            f"teacher.cache: {cache.path} lacks {' and '.join(lacking)}. Add them with python -m "
            f"kd_jax.cache and this configuration{how}"
        )


def read_cached(cache: Cache, found: Sequence[Found]) -> CachedTeacher:
    """Returns the values of rows whose documents are all in the cache."""
    train, *held_out = (CachedRows(cache, x.rows, x.documents, x.places) for x in found)
    used = np.concatenate([x.places[x.documents.counts > 0] for x in found])
    return CachedTeacher(
        train=train,
        held_out=held_out[0] if held_out else None,
        kind=cache.kind,
        key=cache_key(cache, used),
        vocab_size=None if cache.kind == "hidden" else int(cache.identity["vocabulary"]),
    )
