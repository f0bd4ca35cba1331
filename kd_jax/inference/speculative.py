"""Speculative decoding: a draft model proposes tokens, which the target model checks in one pass.

The tokens have exactly the target's distribution (arXiv 2211.17192): a proposed x is accepted with
probability min(1, p(x) / q(x)), and in place of the first that is refused one is drawn from
max(p - q, 0), normalised. Greedy decoding is the case in which p and q have one entry.
"""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.inference.decoding import DecodingProgram, attend_cache, logits_of
from kd_jax.inference.drawing import GREEDY, Sampling, distribution, invert
from kd_jax.inference.sampling import bucket, key_data, make_decoding_program, round_up
from kd_jax.inference.unstacking import unstacked
from kd_jax.models.decoder import Decoder, DecoderSpec
from kd_jax.parallel.placement import Arrays

PROPOSED, ACCEPTED, REPLACED = range(3)  # what a uniform number of a token decides


class Model(NamedTuple):
    spec: DecoderSpec
    arrays: Arrays
    """As in sampling.sample."""


@dataclass(frozen=True)
class Pair:
    """Static arguments of a round."""

    target: DecodingProgram
    draft: DecodingProgram
    proposed: int
    """k: tokens that the draft model proposes in a round."""


class State(NamedTuple):
    """B rows; both caches are [B, K, T, H] of each layer, a token's keys at its position."""

    target: Any
    draft: Any
    last: jax.Array
    """[B] int32: the last token, which is in no cache."""
    lengths: jax.Array
    """[B] int32: tokens in the caches, the position of `last`."""
    counts: jax.Array
    """[B] int32: new tokens."""
    keys: jax.Array
    """[B, 2] uint32."""


def speculate(
    target: Model,
    draft: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    proposed: int = 4,
    vocab_size: int | None = None,
    shared_size: int | None = None,
) -> Iterator[list[list[int]]]:
    """Yields the new tokens of each row, round by round; [] for rows that have ended.

    A row ends before its first stop token or after `max_new_tokens`.

    Args:
      proposed: k, tokens that the draft model proposes in a round.
      vocab_size: the target's vocabulary entries without padding; None: all.
      shared_size: those that the draft model has too; None: all.
    """
    target, draft = Model(*unstacked(*target)), Model(*unstacked(*draft))
    sizes = (vocab_size, min(shared_size or draft.spec.arch.vocab_size, vocab_size or sys.maxsize))
    P = bucket(max(map(len, prompts)))
    length = round_up(P + max_new_tokens + proposed + 1, 64)
    programs = [
        make_decoding_program(*model, length, sampling, size)
        for model, size in zip((target, draft), sizes, strict=True)
    ]
    pair = Pair(programs[0], programs[1], proposed)
    keys = key_data(jax.random.split(jax.random.key(seed), len(prompts)))
    tokens = np.zeros((len(prompts), P), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    arrays = (target.arrays, draft.arrays)
    state, first = _begin(pair, arrays, tokens, lengths, keys)
    room = [max_new_tokens] * len(prompts)
    found, numbers = np.asarray(first)[:, None], np.ones(len(prompts), int)
    while True:
        pieces = [list(row[:n]) for row, n in zip(found.tolist(), numbers.tolist(), strict=True)]
        for i, piece in enumerate(pieces):
            stop = next((j for j, token in enumerate(piece) if token in stop_tokens), None)
            pieces[i] = piece[: min(room[i], len(piece) if stop is None else stop)]
            room[i] = 0 if stop is not None else room[i] - len(pieces[i])
        yield pieces
        if not any(room):
            return
        state, found, numbers = _round(pair, arrays, state)
        found, numbers = np.asarray(found), np.asarray(numbers)


@partial(jax.jit, static_argnums=0)
def _begin(pair: Pair, arrays, tokens, lengths, keys):
    """Returns the state with the prompts in both caches, and the first tokens [B]."""
    zeros = jnp.zeros_like(lengths)

    def read(program, weights):
        model, cache = Decoder(program.spec, weights), _empty(program, len(tokens))
        return model, *_extend(program, model, cache, tokens, zeros)

    model, hidden, target_cache = read(pair.target, arrays[0])
    _, _, draft_cache = read(pair.draft, arrays[1])
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    p = _distributions(pair, pair.target, model, last)[:, 0]
    first = invert(p, _uniforms(keys, zeros, REPLACED))
    return State(target_cache, draft_cache, first, lengths, zeros + 1, keys), first


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _round(pair: Pair, arrays, state: State):
    """Returns the state after a round, its tokens [B, k + 1] and how many of them count, [B]."""
    target, draft = Decoder(pair.target.spec, arrays[0]), Decoder(pair.draft.spec, arrays[1])
    draft_cache, proposals, q = _propose(pair, draft, state)
    tokens = jnp.concatenate([state.last[:, None], proposals], axis=1)
    x, target_cache = _extend(pair.target, target, state.target, tokens, state.lengths)
    p = _distributions(pair, pair.target, target, x)
    new, numbers = accept(p, q, proposals, state.keys, state.counts)
    last = jnp.take_along_axis(new, (numbers - 1)[:, None], axis=1)[:, 0]
    # Rows that ended go on in the last places of their cache.
    most = pair.target.length - pair.proposed - 1
    lengths = jnp.minimum(state.lengths + numbers, most)
    counts = state.counts + numbers
    return State(target_cache, draft_cache, last, lengths, counts, state.keys), new, numbers


def accept(p, q, proposals, keys, counts):
    """Returns a round's tokens [B, k + 1] int32, and how many of them count, [B] from 1 to k + 1.

    Args:
      p: [B, k + 1, V] float32, the target's probabilities after the last token and each proposal.
      q: [B, k, V] float32, the draft's, from which the proposals were drawn.
      proposals: [B, k] int32.
      keys: [B, 2] uint32.
      counts: [B] int32, new tokens of the rows before.
    """
    k = proposals.shape[1]
    each = proposals[:, :, None]
    of_target = jnp.take_along_axis(p[:, :k], each, axis=-1)[..., 0]
    of_draft = jnp.take_along_axis(q, each, axis=-1)[..., 0]
    places = counts[:, None] + jnp.arange(k + 1)[None]
    uniforms = jax.vmap(lambda at: _uniforms(keys, at, ACCEPTED), 1, 1)(places)[:, :k]
    accepted = uniforms * of_draft < of_target
    number = jnp.sum(jnp.cumprod(accepted, axis=1), axis=1)  # before the first refused
    at = number[:, None, None]
    rest = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # after the last proposal all of p
    rest = jnp.take_along_axis(p, at, axis=1) - jnp.take_along_axis(rest, at, axis=1)
    rest = jnp.maximum(rest[:, 0], 0.0)
    here = jnp.take_along_axis(p, at, axis=1)[:, 0]
    # Rounding can leave nothing where p and q are equal.
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, here)
    token = invert(rest, _uniforms(keys, counts + number, REPLACED))
    padded = jnp.pad(proposals, ((0, 0), (0, 1)))
    new = jnp.where(jnp.arange(k + 1)[None] == number[:, None], token[:, None], padded)
    return new, number + 1


def _propose(pair: Pair, model: Decoder, state: State):
    """Returns the draft's cache, its proposals [B, k] and their distributions [B, k, V].

    The last proposal goes into the cache too, where it is needed if all are accepted.
    """
    program = pair.draft

    def step(carry, i):
        cache, token = carry
        x, cache = _extend(program, model, cache, token[:, None], state.lengths + i)
        q = _distributions(pair, program, model, x)[:, 0]
        token = invert(q, _uniforms(state.keys, state.counts + i, PROPOSED))
        return (cache, token), (token, q)

    steps = jnp.arange(pair.proposed + 1)
    (cache, _), (tokens, q) = jax.lax.scan(step, (state.draft, state.last), steps)
    return cache, tokens[:-1].T, jnp.swapaxes(q[:-1], 0, 1)


def _extend(program: DecodingProgram, model: Decoder, cache, tokens, lengths):
    """Returns hidden states [B, C, D] of tokens [B, C] after `lengths` others, and the cache."""
    C = tokens.shape[1]
    positions = lengths[:, None] + jnp.arange(C)[None]
    x, rope = model.embed(tokens, positions)
    ages = positions[:, :, None] - jnp.arange(program.length)[None, None]  # [B, C, T]

    def run_layer(x, layer, layer_type, pair):
        def attend(q, k, v, window):
            keys, values = (
                _write(program, old, new, lengths) for old, new in zip(pair, (k, v), strict=True)
            )
            seen = (ages >= 0) if window is None else (ages >= 0) & (ages < window)
            return attend_cache(program, q, keys, values, seen), (keys, values)

        return layer(x, rope, attend, layer_type)

    return model.over_layers(run_layer, x, cache, program.length)


def _write(program: DecodingProgram, old, new, starts):
    """Returns a cache [B, K, T, H] with [B, C, K, H] from each row's own place on."""
    new = jnp.swapaxes(new, 1, 2).astype(program.cache_dtype)
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    return jax.vmap(write)(old, new, starts)


def _empty(program: DecodingProgram, num_rows: int):
    arch = program.spec.arch
    shape = (num_rows, arch.num_key_value_heads, program.length, arch.head_dim)
    zeros = jnp.zeros(shape, program.cache_dtype)
    return [(zeros, zeros)] * arch.num_hidden_layers


def _distributions(pair: Pair, program: DecodingProgram, model: Decoder, x):
    """Returns the probabilities [B, C, V] to draw from, over the target's V entries."""
    logits = logits_of(program, model, x.reshape(-1, x.shape[-1]))
    found, size = distribution(logits, program.sampling), pair.target.spec.arch.vocab_size
    found = jnp.pad(found[:, :size], ((0, 0), (0, max(0, size - found.shape[1]))))
    return found.reshape(*x.shape[:2], size)


def _uniforms(keys, counts, purpose: int):
    """Returns a number from 0 to 1 for each row, [B], by its key, its new tokens and the purpose.

    Tokens that are refused leave no trace: numbers of later places are used again, for the tokens
    that are proposed there next, and have decided nothing that is kept.
    """

    def uniform(key, count):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), count)
        return jax.random.uniform(jax.random.fold_in(key, purpose))

    return jax.vmap(uniform)(keys, counts)
