"""Answers to many prompts at once: rows that end make room for the next (continuous batching)."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.config import UserError
from kd_jax.inference.decoding import DecodingProgram, admit, advance, empty_slots
from kd_jax.inference.drawing import GREEDY, Sampling
from kd_jax.inference.unstacking import unstacked
from kd_jax.models.decoder import DecoderSpec
from kd_jax.parallel.mesh import num_batch_shards
from kd_jax.parallel.placement import Arrays, fetch
from kd_jax.parallel.platforms import PLATFORMS
from kd_jax.planning.memory import CACHE_SHARE

CACHE_BYTES = 2**30
"""Bytes of the KV cache on each device where its memory is unknown, as on a CPU."""


Prompt = Sequence[int] | np.ndarray
"""Token ids."""
Stop = int | tuple[int, ...]
"""The end of a row: a token, or several one after the other."""


class Sampled(NamedTuple):
    """Answers in the order of their prompts."""

    tokens: list[np.ndarray]
    """New tokens of each prompt, int32; what ended the row are the last."""
    log_probs: list[np.ndarray]
    """Log-probabilities of those tokens in nats, float32: the model's at temperature 1, without
    top-k or top-p."""
    ended: np.ndarray
    """[N] bool: True for rows that ended by a stop token."""


def sample(
    spec: DecoderSpec,
    arrays: Arrays,
    prompts: Sequence[Prompt],
    *,
    keys: Any,
    max_new_tokens: int | Sequence[int],
    stop_tokens: Collection[Stop] = (),
    sampling: Sampling = GREEDY,
    batch_rows: int | None = None,
    vocab_size: int | None = None,
    longest: int = 0,
) -> Sampled:
    """Returns an answer to each prompt.

    An answer depends on the weights, its prompt, its key and `max_new_tokens`. The other prompts,
    their order, `batch_rows` and the devices change it by rounding only.

    Args:
      arrays: the decoder's arrays by path, not changed. Stacked layers are copied in the spec's
        dtype, adapters merged, for the time of the call.
      prompts: token ids, of any lengths above 0.
      keys: [N] jax PRNG keys, or integer seeds.
      max_new_tokens: for all prompts, or for each.
      stop_tokens: what ends a row: a token, or several one after the other.
      batch_rows: rows decoded at once; None: as many as `cache_rows` allows.
      vocab_size: vocabulary entries without padding; None: all.
      longest: tokens of the longest prompt and answer of later calls, which then need no other
        program; 0: of this call's.
    """
    most = np.broadcast_to(np.asarray(max_new_tokens, np.int32), len(prompts))
    rows = [Row(*row) for row in zip(prompts, most.tolist(), key_data(keys), strict=True)]
    found: list[Any] = [None] * len(rows)
    for i, answer in sample_rows(
        spec, arrays, rows, stop_tokens=stop_tokens, sampling=sampling, batch_rows=batch_rows,
        vocab_size=vocab_size, longest=longest,
    ):  # fmt: skip
        found[i] = answer
    tokens, log_probs, ended = zip(*found, strict=True) if found else ((), (), ())
    return Sampled(list(tokens), list(log_probs), np.array(ended, bool))


class Row(NamedTuple):
    """A prompt to answer."""

    prompt: Prompt
    """Token ids, at least one."""
    most: int
    """Most new tokens."""
    key: np.ndarray
    """[2] uint32, data of a jax PRNG key."""


def sample_rows(
    spec: DecoderSpec,
    arrays: Arrays,
    rows: Sequence[Row],
    *,
    stop_tokens: Collection[Stop],
    sampling: Sampling,
    batch_rows: int | None,
    vocab_size: int | None,
    longest: int = 0,
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, bool]]]:
    """Yields the index of each row and its tokens, log-probabilities and whether a stop token
    ended it, as rows end; arguments as for `sample`."""
    if not rows:
        return
    batch = _Batch(spec, arrays, rows, stop_tokens, sampling, batch_rows, vocab_size, longest)
    num_slots = len(batch.free)
    refill = num_slots if len(rows) <= num_slots else max(1, num_slots // 8)
    while batch.waiting or batch.owners:
        while batch.waiting and batch.free:
            batch.admit(refill)
        # With rows waiting, the device stops where a group of slots is free, else at the end.
        batch.advance(num_slots - refill if batch.waiting else 0)
        yield from batch.take_ended()


class _Batch:
    """The slots on the devices, and which row is in which."""

    def __init__(
        self,
        spec: DecoderSpec,
        arrays: Arrays,
        rows: Sequence[Row],
        stop_tokens: Collection[Stop],
        sampling: Sampling,
        batch_rows: int | None,
        vocab_size: int | None,
        longest: int = 0,
    ):
        spec, self.arrays = unstacked(spec, arrays)
        length = max(_cache_length(rows), round_up(longest, 64))
        num_slots = _num_slots(spec, self.arrays, length, batch_rows, len(rows))
        self.program = make_decoding_program(spec, self.arrays, length, sampling, vocab_size)
        self.slots = empty_slots(self.program, num_slots, _stop_rows(stop_tokens))
        self.rows = rows
        # Prompts of like lengths start together, in like slots.
        self.waiting = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt))
        self.free = list(range(num_slots))
        self.owners: dict[int, int] = {}  # slot -> row
        self.begins = np.zeros(num_slots, np.int64)  # clock at each row's first new token
        self.clock = 0

    def admit(self, group: int) -> None:
        """Moves up to `group` waiting rows into free slots."""
        num_slots, platform = len(self.begins), _platform(self.arrays)
        P = bucket(len(self.rows[self.waiting[0]].prompt))
        size = min(group, max(1, PLATFORMS[platform].scored_tokens // P))
        size = round_up(size, _row_shards(self.program.spec))
        chosen = self.waiting[: min(size, len(self.free))]
        del self.waiting[: len(chosen)]
        places = np.full(size, num_slots, np.int32)  # the others are dropped
        places[: len(chosen)] = self.free[: len(chosen)]
        del self.free[: len(chosen)]
        group_rows = [self.rows[i] for i in chosen]
        group_rows += group_rows[:1] * (size - len(chosen))
        tokens = left_pad([row.prompt for row in group_rows], P)
        numbers = np.array([[len(row.prompt), row.most] for row in group_rows], np.int32).T
        keys = np.stack([row.key for row in group_rows])
        self.slots = admit(self.program, self.arrays, self.slots, tokens, numbers, places, keys)
        for place, row in zip(places.tolist(), chosen, strict=False):
            self.owners[place], self.begins[place] = row, self.clock

    def advance(self, fewest: int) -> None:
        """Decodes until at most `fewest` rows are alive."""
        steps = np.int32(self.program.length)
        self.slots, _ = advance(self.program, self.arrays, self.slots, np.int32(fewest), steps)
        self.clock = int(self.slots.clock)

    def take_ended(self) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, bool]]]:
        """Yields rows that ended, with their tokens, and frees their slots."""
        slots, T = self.slots, self.program.length
        alive, ended, counts = map(fetch, (slots.alive, slots.ended, slots.counts))
        tokens, log_probs = fetch(slots.tokens), fetch(slots.log_probs)
        for slot in [slot for slot in self.owners if not alive[slot]]:
            at = (self.begins[slot] + np.arange(counts[slot])) % T
            self.free.append(slot)
            yield self.owners.pop(slot), (tokens[slot, at], log_probs[slot, at], bool(ended[slot]))


def generate(
    spec: DecoderSpec,
    arrays: Arrays,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields each row's next token at every step; None for rows that have ended.

    A row ends before its first stop token or after `max_new_tokens`. Arguments as for `sample`.
    """
    keys = key_data(jax.random.split(jax.random.key(seed), len(prompts)))
    rows = [Row(*row) for row in zip(prompts, [max_new_tokens] * len(prompts), keys, strict=True)]
    batch = _Batch(spec, arrays, rows, (), sampling, len(rows), vocab_size)
    while batch.waiting:
        batch.admit(len(rows))
    slots = sorted(batch.owners, key=batch.owners.__getitem__)  # by row
    first = batch.begins[slots] % batch.program.length
    check_finite(fetch(batch.slots.log_probs)[slots, first])
    yield from _stream(batch, slots, max_new_tokens, stop_tokens)


def _stream(
    batch: _Batch, places: list[int], max_new_tokens: int, stop_tokens: Collection[int]
) -> Iterator[list[int | None]]:
    alive = np.ones(len(places), bool)
    none, one = np.int32(0), np.int32(1)
    slots, next_tokens = advance(batch.program, batch.arrays, batch.slots, none, none)
    for i in range(max_new_tokens):
        here = next_tokens
        if i + 1 < max_new_tokens:  # dispatched before this step's tokens are read
            slots, next_tokens = advance(batch.program, batch.arrays, slots, none, one)
        found = np.asarray(here)[places]
        alive &= ~np.isin(found, list(stop_tokens))
        if not alive.any():
            return
        yield [int(token) if on else None for token, on in zip(found, alive, strict=True)]


def make_decoding_program(
    spec: DecoderSpec, arrays: Arrays, length: int, sampling: Sampling, vocab_size: int | None
) -> DecodingProgram:
    """Returns the static part of decoding with slots of `length` tokens, prompt and answer."""
    return DecodingProgram(
        spec=spec, sampling=sampling, vocab_size=vocab_size or spec.arch.vocab_size,
        length=length, by_sums=PLATFORMS[_platform(arrays)].summed_attention,
    )  # fmt: skip


def cache_rows(spec: DecoderSpec, length: int, arrays: Arrays) -> int:
    """Returns the rows of `length` tokens whose keys and values fit CACHE_SHARE of the devices'
    memory, or CACHE_BYTES where it is unknown."""
    arch, device = spec.arch, _device(arrays)
    memory = (device.memory_stats() or {}).get("bytes_limit") or CACHE_BYTES / CACHE_SHARE
    heads = arch.num_hidden_layers * arch.num_key_value_heads
    itemsize = PLATFORMS[device.platform].kv_itemsize(jnp.dtype(spec.dtype).itemsize)
    row_bytes = 2 * heads * length * arch.head_dim * itemsize
    fit = int(CACHE_SHARE * memory // row_bytes) * _row_shards(spec)
    return max(1, min(fit, PLATFORMS[device.platform].sampled_rows * _row_shards(spec)))


def _num_slots(
    spec: DecoderSpec, arrays: Arrays, length: int, batch_rows: int | None, num_rows: int
) -> int:
    number = min(batch_rows or cache_rows(spec, length, arrays), num_rows)
    if spec.dtype == jnp.bfloat16:
        number = max(number, PLATFORMS[_platform(arrays)].decoded_rows)
    return round_up(number, _row_shards(spec))


def _row_shards(spec: DecoderSpec) -> int:
    return num_batch_shards(spec.layout.mesh)


def key_data(keys: Any) -> np.ndarray:
    """Returns the data [N, 2] uint32 of PRNG keys, or of the keys of integer seeds."""
    if not (isinstance(keys, jax.Array) and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)):
        keys = jax.vmap(jax.random.key)(jnp.asarray(keys, jnp.uint32))
    return np.asarray(jax.random.key_data(keys))


def _cache_length(rows: Sequence[Row]) -> int:
    """Returns T, rounded up so that few programs are compiled."""
    least = max(bucket(len(row.prompt)) for row in rows)
    return round_up(max(least, *(len(row.prompt) + row.most for row in rows)), 64)


def stop_length(tokens: Sequence[int] | np.ndarray, stops: Collection[Stop]) -> int:
    """Returns the number of tokens at the end of a row that ended it; 0: none did."""
    found = [len(end) for end in _ends(stops) if tuple(tokens[-len(end) :]) == end]
    return max(found, default=0)


def without_stop(tokens: np.ndarray, stops: Collection[Stop]) -> np.ndarray:
    """Returns a row's tokens without those that ended it."""
    return tokens[: len(tokens) - stop_length(tokens, stops)]


def _ends(stops: Collection[Stop]) -> list[tuple[int, ...]]:
    return sorted((stop,) if isinstance(stop, int) else stop for stop in stops)


def _stop_rows(stops: Collection[Stop]) -> np.ndarray:
    """Returns the stops as in decoding.Slots."""
    ends = _ends(stops)
    rows = np.full((len(ends), max(map(len, ends), default=1)), -1, np.int32)
    for row, end in zip(rows, ends, strict=True):
        row[len(row) - len(end) :] = end
    return rows


def check_finite(log_probs: np.ndarray) -> None:
    """Raises UserError for log-probabilities of a model whose logits are NaN."""
    if np.isnan(log_probs).any():
        raise UserError("--model: expected finite logits, got NaN: its weights are damaged")


def left_pad(prompts: Sequence[Prompt], length: int) -> np.ndarray:
    """Returns left-padded tokens [B, length] int32."""
    assert all(map(len, prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return tokens


def bucket(length: int) -> int:
    """Returns the padded length of a prompt; few of them, so that few programs are compiled."""
    return round_up(length, 32 if length <= 256 else 256)


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _device(arrays: Arrays) -> jax.Device:
    return arrays["norm.weight"].addressable_shards[0].device


def _platform(arrays: Arrays) -> str:
    return _device(arrays).platform
