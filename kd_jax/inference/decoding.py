"""Decoding of several rows at once with a KV cache: two programs, for prompts and for new tokens.

Rows are decoded in slots. All slots share a clock, and their caches are rings: at every step each
slot writes at the clock's place, whatever the length of its row. So a row can start at any time,
in a slot whose row has ended, and no write needs an index per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.inference.drawing import Sampling, draw
from kd_jax.models.decoder import Decoder, DecoderSpec
from kd_jax.parallel.mesh import constrain


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingProgram:
    """Static arguments of the compiled programs of decoding."""

    spec: DecoderSpec
    sampling: Sampling
    vocab_size: int
    """Vocabulary entries without padding."""
    length: int
    """T: tokens that a slot holds, prompt and answer."""
    by_sums: bool
    """Attend by sums over a float32 cache, as Platform.summed_attention."""

    @property
    def cache_dtype(self) -> Any:
        return jnp.dtype("float32") if self.by_sums else self.spec.dtype

    def scale(self, head_dim: int) -> float:
        """Returns the factor of attention's products."""
        given = self.spec.arch.attention_scale
        return head_dim**-0.5 if given is None else given

    def rows(self, x: jax.Array) -> jax.Array:
        """Returns an array [B, ...] with its rows sharded."""
        layout = self.spec.layout
        return constrain(x, layout.mesh, layout.row_axes(len(x)))

    def everywhere(self, x: jax.Array) -> jax.Array:
        """Returns an array that all devices hold, so that every process can read it."""
        return constrain(x, self.spec.layout.mesh)


class Slots(NamedTuple):
    """B rows being decoded; [B] each unless stated otherwise."""

    cache: Any
    """(keys [B, K, H, T], values [B, K, T, H]) of each layer; a ring over T."""
    tokens: jax.Array
    """[B, T] int32: new tokens, at the place where their keys are or will be."""
    log_probs: jax.Array
    """[B, T] float32, of the new tokens, nats."""
    clock: jax.Array
    """Scalar int32: the place of the next keys is the clock modulo T."""
    lengths: jax.Array
    """int32: tokens in the cache, the position of the next."""
    counts: jax.Array
    """int32: new tokens."""
    most: jax.Array
    """int32: new tokens at which the row ends."""
    keys: jax.Array
    """[B, 2] uint32: key data of each row's PRNG key."""
    alive: jax.Array
    """bool: False if the row has ended or the slot is empty."""
    ended: jax.Array
    """bool: True if the row ended by a stop token."""
    stops: jax.Array
    """[any number, n] int32: what ends a row, its last tokens; -1 before shorter ones."""


@partial(jax.jit, static_argnums=(0, 1))
def empty_slots(program: DecodingProgram, num_slots: int, stops) -> Slots:
    """Returns slots without rows; `stops` as in Slots."""
    arch = program.spec.arch
    B, K, T, H = num_slots, arch.num_key_value_heads, program.length, arch.head_dim

    def zeros(*shape):
        return program.rows(jnp.zeros(shape, program.cache_dtype))

    cache = [(zeros(B, K, H, T), zeros(B, K, T, H)) for _ in range(arch.num_hidden_layers)]
    numbers, no = jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, bool)
    tokens = jnp.zeros((num_slots, program.length), jnp.int32)
    return Slots(
        cache=cache, tokens=tokens, log_probs=tokens.astype(jnp.float32), clock=jnp.int32(0),
        lengths=numbers, counts=numbers, most=numbers,
        keys=jnp.zeros((num_slots, 2), jnp.uint32), alive=no, ended=no, stops=stops,
    )  # fmt: skip


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def admit(
    program: DecodingProgram,
    arrays: Mapping[str, jax.Array],
    slots: Slots,
    tokens,
    numbers,
    places,
    keys,
) -> Slots:
    """Returns the slots with n more rows: their prompts in the cache, their first tokens drawn.

    Args:
      tokens: [n, P] int32, left-padded prompts.
      numbers: [2, n] int32: prompt lengths, and new tokens at which the rows end.
      places: [n] int32, slots of the rows; places past the last one are dropped.
      keys: [n, 2] uint32.
    """
    lengths, most = numbers
    model = Decoder(program.spec, arrays)
    B, P = tokens.shape
    start = P - lengths
    place = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    segment_ids = (place >= start[:, None]).astype(jnp.int32)  # padding attends to padding
    x, rope = model.embed(tokens, jnp.maximum(place - start[:, None], 0))

    def attend(q, k, v, window):
        return model.attend(q, k, v, segment_ids, place, window), (k, v)

    def run_layer(x, layer, layer_type, old):
        x, new = layer(x, rope, attend, layer_type)
        keys, values = (_ring(program, part, slots.clock) for part in new)
        parts = zip(old, (jnp.swapaxes(keys, 2, 3), values), strict=True)
        written = (program.rows(x.at[places].set(part, mode="drop")) for x, part in parts)
        return model.sharded(x), tuple(written)

    x, cache = model.over_layers(run_layer, x, slots.cache, P)
    none = jnp.zeros_like(most)
    token, log_prob = draw(logits_of(program, model, x[:, -1]), program.sampling, keys, none)
    recent = jnp.full((len(token), slots.stops.shape[1]), -2).at[:, -1].set(token)
    stops = _is_stop(slots.stops, recent)
    changed = {
        "lengths": lengths, "counts": none + 1, "most": most, "keys": keys,
        "alive": ~stops & (most > 1), "ended": stops,
    }  # fmt: skip
    changed = {
        name: program.everywhere(getattr(slots, name).at[places].set(new, mode="drop"))
        for name, new in changed.items()
    }
    at = slots.clock % program.length
    return slots._replace(
        cache=cache,
        tokens=program.everywhere(slots.tokens.at[places, at].set(token, mode="drop")),
        log_probs=program.everywhere(slots.log_probs.at[places, at].set(log_prob, mode="drop")),
        **changed,
    )


def _ring(program: DecodingProgram, new: jax.Array, clock: jax.Array) -> jax.Array:
    """Returns keys or values [n, P, K, H] as [n, K, T, H], with the last one at the clock."""
    P, T = new.shape[1], program.length
    rows = jnp.pad(jnp.swapaxes(new, 1, 2), ((0, 0), (0, 0), (0, T - P), (0, 0)))
    return jnp.roll(rows, (clock - P) % T, axis=2).astype(program.cache_dtype)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    program: DecodingProgram, arrays: Mapping[str, jax.Array], slots: Slots, fewest, most_steps
) -> tuple[Slots, jax.Array]:
    """Returns the slots after some steps, and the last step's tokens [B] int32.

    The loop ends when at most `fewest` rows are alive, or after `most_steps`.
    """
    model = Decoder(program.spec, arrays)
    end = slots.clock + most_steps

    def go_on(slots):
        return (jnp.sum(slots.alive) > fewest) & (slots.clock < end)

    slots = jax.lax.while_loop(go_on, partial(_step, program, model), slots)
    return slots, slots.tokens[:, slots.clock % program.length]


def _step(program: DecodingProgram, model: Decoder, slots: Slots) -> Slots:
    """Returns the slots with each living row's last token in the cache, and a next one drawn."""
    T = program.length
    at, after = slots.clock % T, (slots.clock + 1) % T
    age = (at - jnp.arange(T)) % T
    # [B, T]: keys before this token's, whose place still has an older one.
    seen = program.rows((age[None] > 0) & (age[None] <= slots.lengths[:, None]))
    token = jax.lax.dynamic_slice_in_dim(slots.tokens, at, 1, axis=1)
    x, rope = model.embed(token, slots.lengths[:, None])

    def run_layer(x, layer, layer_type, pair):
        def attend(q, k, v, window):
            mask = seen if window is None else seen & (age < window)[None]
            out = attend_token(program, q, pair, (k, v), mask)
            place = _after(at, out, slots.clock) if program.by_sums else at
            return out, _write_token(program, pair, (k, v), place)

        return layer(x, rope, attend, layer_type)

    x, cache = model.over_layers(run_layer, x, slots.cache, T)
    logits = logits_of(program, model, x[:, 0])
    token, log_prob = draw(logits, program.sampling, slots.keys, slots.counts)
    ages = jnp.arange(slots.stops.shape[1] - 1)[::-1]  # of the tokens before
    recent = jnp.where(ages[None] < slots.counts[:, None], slots.tokens[:, (at - ages) % T], -2)
    recent = jnp.concatenate([recent, token[:, None]], axis=1)
    stops = slots.alive & _is_stop(slots.stops, recent)
    counts = slots.counts + slots.alive
    return Slots(
        cache=cache,
        tokens=program.everywhere(_write_new(slots.tokens, token, after, slots.alive)),
        log_probs=program.everywhere(_write_new(slots.log_probs, log_prob, after, slots.alive)),
        clock=slots.clock + 1,
        lengths=slots.lengths + 1,
        counts=counts,
        most=slots.most,
        keys=slots.keys,
        alive=program.everywhere(slots.alive & ~stops & (counts < slots.most)),
        ended=program.everywhere(slots.ended | stops),
        stops=slots.stops,
    )


def _after(at: jax.Array, out: jax.Array, clock: jax.Array) -> jax.Array:
    """Returns the place `at`, known only once attention's output is.

    So the cache is read before it is written, and is written in place. XLA's CPU drops an
    optimization barrier before it decides which arrays to copy.
    """
    return jnp.where((clock < 0) & (out.ravel()[0] > 0), at + 1, at)  # the clock is never below 0


def _is_stop(stops: jax.Array, recent: jax.Array) -> jax.Array:
    """Returns [B] bool: True where the last tokens [B, n], -2 for none, are one of stops [M, n]."""
    same = (stops[None] == recent[:, None]) | (stops[None] == -1)  # [B, M, n]
    return jnp.any(jnp.all(same, axis=-1), axis=-1)


def _write_token(program: DecodingProgram, pair, new, at):
    """Returns a layer's cache with a key and a value [B, 1, K, H] at one place of every row."""
    k, v = (x.astype(program.cache_dtype) for x in new)
    update = jax.lax.dynamic_update_slice_in_dim
    keys = update(pair[0], jnp.moveaxis(k, 1, 3), at, axis=3)
    values = update(pair[1], jnp.swapaxes(v, 1, 2), at, axis=2)
    return program.rows(keys), program.rows(values)


def _write_new(old: jax.Array, new: jax.Array, at: jax.Array, alive: jax.Array) -> jax.Array:
    """Returns [B, T] with the living rows' new entries [B] at one place."""
    before = jax.lax.dynamic_slice_in_dim(old, at, 1, axis=1)
    new = jnp.where(alive[:, None], new[:, None], before)
    return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)


def attend_token(program: DecodingProgram, q, pair, new, mask):
    """Returns attention [B, 1, N, H] of one token's queries over a cache and its own key and value.

    Args:
      pair: keys [B, K, H, T] and values [B, K, T, H], as stored.
      new: the token's key and value, [B, 1, K, H].
      mask: [B, T] bool, True for keys in the cache that the token attends to.
    """
    B, _, N, H = q.shape
    keys, values = pair
    k, v = (x[:, 0, :, None].astype(jnp.float32) for x in new)  # [B, K, 1, H]
    queries = q.reshape(B, keys.shape[1], -1, H)  # [B, K, G, H]
    z = _product(program, queries, keys) * program.scale(H)  # [B, K, G, T]
    own = jnp.sum(queries * k, axis=-1, keepdims=True) * program.scale(H)
    z = jnp.where(mask[:, None, None], z, -jnp.inf)
    highest = jnp.maximum(jnp.max(z, axis=-1, keepdims=True), own)
    weights, own = jnp.exp(z - highest), jnp.exp(own - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True) + own
    weights = (weights / total).astype(program.spec.dtype)  # the matmul's dtype
    own = (own / total).astype(program.spec.dtype)
    out = _product(program, weights, values) + own * v
    return out.reshape(B, 1, N, H).astype(q.dtype)


def _product(program: DecodingProgram, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x [B, K, G, M] times y [B, K, M, n], float32."""
    if not program.by_sums:
        return jnp.einsum("BKGM,BKMn->BKGn", x, y, preferred_element_type=jnp.float32)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sum(x[..., None] * y[:, :, None], axis=3)


def attend_cache(program: DecodingProgram, q, keys, values, mask):
    """Returns attention [B, C, N, H] of queries [B, C, N, H] over a cache [B, K, T, H].

    Args:
      mask: [B, C, T] bool, True for keys that the query attends to.
    """
    B, C, N, H = q.shape
    K = keys.shape[1]
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    queries = jnp.swapaxes(q.reshape(B, C, K, -1, H), 1, 2)  # [B, K, C, G, H]
    queries = queries.astype(keys.dtype)
    z = product("BKRH,BKTH->BKRT", queries.reshape(B, K, -1, H), keys)
    z = z.reshape(B, K, C, N // K, -1) * program.scale(H)
    weights = jax.nn.softmax(jnp.where(mask[:, None, :, None], z, -jnp.inf), axis=-1)
    weights = weights.astype(q.dtype)  # the matmul's dtype
    weights = weights.reshape(B, K, C * N // K, -1).astype(values.dtype)
    out = product("BKRT,BKTH->BKRH", weights, values)
    out = jnp.swapaxes(out.reshape(B, K, C, N // K, H), 1, 2)
    return out.reshape(B, C, N, H).astype(q.dtype)


def logits_of(program: DecodingProgram, model: Decoder, x: jax.Array) -> jax.Array:
    """Returns the logits [B, V] float32 of the last layer's hidden states x [B, D]."""
    hidden = model.final_norm(x[:, None])[:, 0]
    head = model.head_weight().astype(hidden.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    # A CPU multiplies few rows faster with the head first, as in matmul.project; more than 16
    # would then be transposed. The barriers keep XLA from reordering the operands.
    if len(hidden) <= 16:
        logits = jax.lax.optimization_barrier(product("VD,BD->VB", head, hidden)).T
    else:
        logits = jax.lax.optimization_barrier(product("BD,VD->BV", hidden, head))
    if program.vocab_size < logits.shape[1]:
        real = jnp.arange(logits.shape[1]) < program.vocab_size
        logits = jnp.where(real[None], logits, -jnp.inf)
    return logits
