"""Inputs of the fused head: the student's side, the teacher's side and the targets."""

from typing import Any, NamedTuple, Protocol

import jax

from kd_jax.losses.vocabulary import Vocab


class Student(NamedTuple):
    """The student's inputs of the fused head, or the gradient with respect to them."""

    hidden: jax.Array
    """[B, S, D], final-normed hidden states; the matmuls run in their dtype."""
    head: jax.Array
    """[V, D]: the lm_head, or the tied embedding. V may include padding."""


FIRST_OF_BIN = (0, 4, 16, 64, 256, 1024)
"""The first position in a sampled answer of each bin, by which metrics of samples are summed."""
NUM_GROUPS = 1 + len(FIRST_OF_BIN)


class Targets(NamedTuple):
    """The token that each position predicts."""

    labels: jax.Array
    """[B, S] int32."""
    mask: jax.Array
    """[B, S] bool; a position without a loss contributes nothing."""
    group: jax.Array | None = None
    """[B, S] int32: 0 for a token of the data; for a token that the student sampled, whose loss is
    the divergence alone, 1 + its bin in FIRST_OF_BIN. None: all are the data's."""


class ChunkContext(NamedTuple):
    """The student's logits and the labels of a chunk, which a teacher may use."""

    student_logits: jax.Array
    """[C, V] float32, at temperature 1."""
    labels: jax.Array
    """[C] int32."""
    vocab: Vocab
    """The device's vocabulary entries."""
    num_entries: int
    """Vocabulary entries in use, over all devices."""


class Teacher(Protocol):
    """The teacher's side: a pytree without gradient, from which the fused head gets logits.

    The head gathers and slices `rows` as it does the student's hidden states. It cuts
    `vocab_arrays` to the entries that both models have and shards them like the student's head. A
    kind without an lm_head can give the vocabulary ids, [V'] int32, to learn which entries a
    device has. The head masks vocabulary padding itself.
    """

    @property
    def num_entries(self) -> int:
        """Vocabulary entries V', padding included."""

    @property
    def rows(self) -> Any:
        """A pytree of arrays [B, S, ...] with one entry per token."""

    @property
    def vocab_arrays(self) -> Any:
        """A pytree of arrays [V', ...] with one entry per vocabulary entry, such as the head."""

    def logits(self, rows: Any, vocab_arrays: Any, context: ChunkContext) -> jax.Array:
        """Returns the logits of a chunk, [C, V] float32, at temperature 1.

        Runs inside a loop and a shard_map, so it reads no array of `self`.

        Args:
          rows: `self.rows` of the chunk's tokens, [C, ...].
          vocab_arrays: `self.vocab_arrays` of the device's vocabulary entries, [V, ...].
          context: the student's logits and the labels, of use to a kind without an lm_head.
        """
