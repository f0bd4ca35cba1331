"""A teacher of which a cache has some entries of each token: the most likely, or samples."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd_jax.data.store import TEACHER
from kd_jax.losses.head_inputs import ChunkContext
from kd_jax.losses.vocabulary import NEGATIVE, max_over_vocab, sum_over_vocab
from kd_jax.parallel.placement import Arrays
from kd_jax.teachers.storage import Field, Fields

Rest = Literal["bucket", "uniform", "label", "renormalize", "renormalize_both"]
MOST_ENTRIES = 2**20  # ids have 20 bits
_CHUNK_TOKENS = 1024  # whose logits are in memory at a time
_BITS = 16


def topk_fields(k: int) -> Fields:
    """Returns the arrays of a cache of k entries a token: 4.5 k + 4 bytes."""
    return {
        "ids": Field((k,), "uint16"),
        "high_bits": Field((k // 2,), "uint8"),
        "log_probs": Field((k,), "float16"),
        "rest": Field((), "float32"),
    }


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "high_bits", "log_probs", "rest", "entries"],
    meta_fields=["treatment"],
)
@dataclass(frozen=True)
class TopK:
    """Some entries of each token; implements losses.head_inputs.Teacher."""

    ids: jax.Array
    """[B, S, k] uint16: the lower bits of entries' ids; an id may occur more than once."""
    high_bits: jax.Array
    """[B, S, k / 2] uint8: the 4 bits above, of the first half of the ids below those of the
    second."""
    log_probs: jax.Array
    """[B, S, k] float16, nats; those of one id add up as probabilities."""
    rest: jax.Array
    """[B, S] float32: log of the probability of all other entries."""
    entries: jax.Array
    """[V'] int32: 0, 1, ..."""
    treatment: Rest

    @property
    def num_entries(self) -> int:
        return len(self.entries)

    @property
    def rows(self) -> tuple[jax.Array, ...]:
        return self.ids, self.high_bits, self.log_probs, self.rest

    @property
    def vocab_arrays(self) -> jax.Array:
        return self.entries

    def logits(
        self, rows: tuple[jax.Array, ...], vocab_arrays: jax.Array, context: ChunkContext
    ) -> jax.Array:
        """Returns log-probabilities [C, V] float32, those of the rest by `treatment`.

        bucket: in the student's proportions, which makes of all other entries one: an f-divergence
        and its gradient are those of k + 1 entries. NEGATIVE where the rest is elsewhere; the head
        leaves these entries of the student out with renormalize_both (HeadConfig.listed_only).
        """
        ids, high_bits, log_probs, rest = rows
        place = _whole_ids(ids, high_bits) - vocab_arrays[0]
        inside = (place >= 0) & (place < len(vocab_arrays))
        place = jnp.where(inside, place, len(vocab_arrays))  # dropped
        listed = jnp.zeros(context.student_logits.shape, jnp.float32)
        at = (jnp.arange(len(place))[:, None], place)
        listed = listed.at[at].add(jnp.exp(log_probs.astype(jnp.float32)), mode="drop")
        if self.treatment == "label":
            mine = context.labels[:, None] == vocab_arrays[None]
            listed += jnp.where(mine, jnp.exp(rest)[:, None], 0.0)
        others = _others(self.treatment, context, listed, rest[:, None])
        return jnp.where(listed > 0, jnp.log(jnp.where(listed > 0, listed, 1.0)), others)


def split_ids(ids: Any) -> tuple[Any, Any]:
    """Returns the fields `ids` and `high_bits` of ids [..., k]; _whole_ids is the inverse."""
    high, half = (ids >> _BITS).astype("uint8"), ids.shape[-1] // 2
    return (ids & (2**_BITS - 1)).astype("uint16"), high[..., :half] | (high[..., half:] << 4)


def _whole_ids(ids: jax.Array, high_bits: jax.Array) -> jax.Array:
    """Returns [..., k] int32."""
    high = jnp.concatenate([high_bits & 15, high_bits >> 4], axis=-1).astype(jnp.int32)
    return ids.astype(jnp.int32) | (high << _BITS)


def _others(
    treatment: Rest, context: ChunkContext, listed: jax.Array, rest: jax.Array
) -> jax.Array:
    """Returns the log-probabilities [C, V] or [C, 1] of entries that are not listed."""
    if treatment not in ("bucket", "uniform"):
        return jnp.full_like(rest, NEGATIVE)
    axis = context.vocab.axis
    if treatment == "uniform":
        count = context.num_entries - sum_over_vocab((listed > 0).astype(jnp.float32), axis)
        return rest - jnp.log(jnp.maximum(count, 1.0))
    tail = jnp.where(listed > 0, NEGATIVE, context.student_logits)
    highest = max_over_vocab(tail, axis)
    total = sum_over_vocab(jnp.exp(tail - highest), axis)
    return tail - highest - jnp.log(total) + rest


@dataclass(frozen=True, slots=True)
class TopKModel:
    """A teacher read from such a cache; static under jit."""

    num_entries: int
    treatment: Rest

    def __call__(
        self, arrays: Arrays, batch: Arrays, layers: tuple[int, ...] = ()
    ) -> tuple[TopK, None]:
        """Returns the side of rows [B, S]; there are no outputs of layers."""
        assert not layers
        values = {name: batch[TEACHER + name] for name in topk_fields(2)}
        entries = jnp.arange(self.num_entries, dtype=jnp.int32)
        return TopK(**values, entries=entries, treatment=self.treatment), None


@dataclass(frozen=True, slots=True)
class Selection:
    """Selection of the entries of a token that are stored; static under jit."""

    kind: Literal["topk", "sampled"]
    k: int
    num_entries: int
    """Vocabulary entries in use."""

    def __call__(self, hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> Arrays:
        """Returns the arrays of topk_fields, [B, S, ...], of hidden states [B, S, Dt].

        sampled: k draws with replacement from the teacher, each with probability 1 / k, so that
        their sum is an unbiased estimate of the distribution (arXiv 2503.16870). The row's tokens
        seed them.
        """
        B, S, D = hidden.shape
        size = min(S, max(1, _CHUNK_TOKENS // B))
        hidden = jnp.pad(hidden, ((0, 0), (0, -S % size), (0, 0)))
        chunks = hidden.reshape(B, -1, size, D).swapaxes(0, 1)
        head = head[: self.num_entries].astype(hidden.dtype)
        places = jnp.arange(1, S + 1, dtype=jnp.uint32)[None]
        seeds = jnp.sum(tokens.astype(jnp.uint32) * places * jnp.uint32(2654435761), axis=1)
        numbers = jnp.arange(len(chunks))
        chosen = jax.lax.map(lambda x: self._choose(x[0], head, seeds + x[1]), (chunks, numbers))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1, *x.shape[3:])[:, :S], chosen)

    def _choose(self, hidden, head, seeds):
        """Returns the arrays of a chunk [B, s, Dt]."""
        product = "BSD,VD->BSV"
        logits = jnp.einsum(product, hidden, head, preferred_element_type=jnp.float32)
        log_p = jax.nn.log_softmax(logits)
        if self.kind == "topk":
            # Without a barrier XLA sorts whole rows, to slice the least of the k out of them.
            log_probs, ids = jax.lax.optimization_barrier(jax.lax.top_k(log_p, self.k))
            rest = _log_rest(log_p, log_probs)
        else:
            ids = _draw(seeds, jnp.exp(log_p), self.k)
            log_probs = jnp.full(ids.shape, -math.log(self.k), jnp.float32)
            rest = jnp.full(ids.shape[:2], NEGATIVE, jnp.float32)
        low, high = split_ids(ids)
        return {
            "ids": low,
            "high_bits": high,
            "log_probs": jnp.maximum(log_probs, -6e4).astype(jnp.float16),  # its range
            "rest": rest,
        }


def _draw(seeds: jax.Array, p: jax.Array, k: int) -> jax.Array:
    """Returns k entries a token, [B, s, k] int32, drawn with replacement from p [B, s, V].

    One search in the cumulative sums for each draw: noise for every entry would be k V numbers.
    """
    uniform = lambda seed: jax.random.uniform(jax.random.key(seed), (p.shape[1], k))  # noqa: E731
    cumulative = jnp.cumsum(p, axis=-1)
    drawn = jax.vmap(uniform)(seeds) * cumulative[..., -1:]
    search = lambda sums, x: jnp.searchsorted(sums, x, side="right")  # noqa: E731
    ids = jax.vmap(jax.vmap(search))(cumulative, drawn)
    return jnp.minimum(ids, p.shape[-1] - 1)  # a product rounded up to the whole sum


def _log_rest(log_p: jax.Array, highest: jax.Array) -> jax.Array:
    """Returns the log of the probability outside the k highest of [..., V]; their sum is near 1."""
    least = highest[..., -1:]
    tail = jnp.sum(jnp.where(log_p < least, jnp.exp(log_p), 0.0), axis=-1)
    ties = jnp.sum(log_p == least, axis=-1) - jnp.sum(highest == least, axis=-1)
    tail += ties * jnp.exp(least[..., 0])
    return jnp.where(tail > 0, jnp.log(jnp.where(tail > 0, tail, 1.0)), NEGATIVE)
