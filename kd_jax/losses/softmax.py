"""Statistics of the softmax of logits, from which log-probabilities follow."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.losses.vocabulary import NEGATIVE, max_over_vocab, sum_over_vocab
from kd_jax.parallel.platforms import by_platform


class Softmax(NamedTuple):
    """Statistics of one model's logits that give log-probabilities, [C, 1] each."""

    highest: jax.Array
    """The largest logit."""
    log_sum: jax.Array
    """log sum_v exp(logit - highest)."""
    tempered_log_sum: jax.Array
    """log sum_v exp((logit - highest) / temperature)."""
    entropy: jax.Array
    """Nats, at temperature 1."""

    def log_probs(self, logits: jax.Array, temperature: float | jax.Array = 1) -> jax.Array:
        """Returns log-probabilities [C, V] at the temperature, of the same logits."""
        if is_one(temperature):
            return logits - self.highest - self.log_sum
        return (logits - self.highest) / temperature - self.tempered_log_sum


def softmaxes(
    logits: list[jax.Array], temperature: float | jax.Array, axis: str | None
) -> list[Softmax]:
    """Returns the Softmax of each of the logits [C, V]. A platform trait chooses one pass or two.

    Args:
      temperature: that of tempered_log_sum.
      axis: mesh axis that shards the vocabulary, inside a shard_map.
    """
    tempered = None if is_one(temperature) else temperature
    # A reduction cannot close over a temperature that a schedule changes.
    one_pass = _sums if isinstance(temperature, jax.Array) else _sums_in_one_pass
    choices = (partial(function, temperature=tempered) for function in (one_pass, _sums))
    sums = by_platform("one_pass_softmax", *choices)(logits)
    if axis is not None:
        highest = jax.lax.pmax([x.highest for x in sums], axis)
        rests = [_rescaled(x, x.highest - m, tempered) for x, m in zip(sums, highest, strict=True)]
        sums = list(map(_Sums, highest, *zip(*jax.lax.psum(rests, axis), strict=True)))
    return [
        Softmax(
            x.highest, jnp.log(x.total), jnp.log(x.tempered), jnp.log(x.total) - x.moment / x.total
        )
        for x in sums
    ]


class _Sums(NamedTuple):
    """Sums of a softmax, [C, 1] each, with x = logit - highest."""

    highest: jax.Array
    total: jax.Array
    """sum_v exp(x)."""
    moment: jax.Array
    """sum_v x exp(x)."""
    tempered: jax.Array
    """sum_v exp(x / temperature); the total at temperature 1."""


def _sums(logits, temperature):
    """Returns the _Sums of each of the logits: one pass for all maxima, one for all sums."""
    highest = max_over_vocab(logits)
    terms = []
    for z, m in zip(logits, highest, strict=True):
        e = jnp.exp(z - m)
        tempered = () if temperature is None else (jnp.exp((z - m) / temperature),)
        terms.append((e, e * (z - m), *tempered))
    return [_filled(m, *x) for m, x in zip(highest, sum_over_vocab(terms), strict=True)]


def _sums_in_one_pass(logits, temperature):
    """Returns the _Sums of each of the logits, which are read once."""
    return [_running_sums(z, temperature) for z in logits]


def _running_sums(z, temperature):
    """Returns the _Sums of logits [C, V] by a reduction that rescales them as the maximum grows."""

    def combine(one, other):
        gap = one[0] - other[0]
        keep = partial(jnp.where, gap > 0)
        high, low = tuple(map(keep, one, other)), tuple(map(keep, other, one))
        # One exponential, not one per side.
        rest = _rescaled(_filled(*low), -jnp.abs(gap), temperature)
        return high[0], *map(jnp.add, high[1:], rest)  # at temperature 1 there is no fourth

    z = jnp.maximum(z, NEGATIVE)  # a difference of infinities would be NaN
    ones, zeros = jnp.ones_like(z), jnp.zeros_like(z)
    entries = (z, ones, zeros) if temperature is None else (z, ones, zeros, ones)
    starts = (jnp.float32(NEGATIVE), *[jnp.float32(0)] * len(entries[1:]))
    sums = jax.lax.reduce(entries, starts, combine, dimensions=(1,))
    return _filled(*(x[:, None] for x in sums))


def _filled(highest, total, moment, tempered=None):
    return _Sums(highest, total, moment, total if tempered is None else tempered)


def _rescaled(sums, fall, temperature):
    """Returns total, moment and tempered of _Sums for the maximum `highest - fall`."""
    scale = jnp.exp(fall)
    hot = scale if temperature is None else jnp.exp(fall / temperature)
    return scale * sums.total, scale * (sums.moment + fall * sums.total), hot * sums.tempered


def is_one(temperature: float | jax.Array) -> bool:
    """Returns True for a temperature that is known to be 1 before a program runs."""
    return isinstance(temperature, (int, float)) and temperature == 1
