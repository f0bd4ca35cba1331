"""A teacher whose final-normed hidden states come with the batch; only its head is loaded."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.models.architecture import Architecture
from kd_jax.models.weight_table import head_weights
from kd_jax.parallel.placement import Arrays
from kd_jax.teachers.storage import Field, Fields

PREFIX = "teacher_"
"""Stands before the names of stored arrays in a batch."""


def hidden_fields(width: int, dtype: str) -> Fields:
    """Returns the arrays of a cache of hidden states."""
    return {"hidden": Field((width,), dtype)}


class Stored(NamedTuple):
    """Stored hidden states and the head; implements losses.head_inputs.Teacher."""

    hidden: jax.Array
    """[B, S, Dt] as stored; 0 at tokens without a loss."""
    head: jax.Array
    """[V', Dt]: the lm_head, or the tied embedding; the matmul runs in its dtype."""

    @property
    def num_entries(self) -> int:
        return len(self.head)

    @property
    def rows(self) -> jax.Array:
        return self.hidden

    @property
    def vocab_arrays(self) -> jax.Array:
        return self.head

    @staticmethod
    def logits(rows: jax.Array, vocab_arrays: jax.Array) -> jax.Array:
        """Returns [C, V] float32 of hidden states [C, Dt] and the head [V, Dt]."""
        hidden = rows.astype(vocab_arrays.dtype)  # the live teacher's, if stored in another
        return jnp.einsum("CD,VD->CV", hidden, vocab_arrays, preferred_element_type=jnp.float32)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A teacher read from a cache; static under jit."""

    arch: Architecture

    def __call__(
        self, arrays: Arrays, batch: Arrays, layers: tuple[int, ...] = ()
    ) -> tuple[Stored, None]:
        """Returns the side of rows [B, S]; there are no outputs of layers."""
        assert not layers
        (path,) = head_weights(self.arch)
        return Stored(batch[f"{PREFIX}hidden"], arrays[path]), None
