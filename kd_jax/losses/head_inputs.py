"""Inputs of the fused head: its settings, the student's side, the teacher's side, the targets."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from kd_jax.config import LossConfig
from kd_jax.losses.vocabulary import Vocab


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """Settings of the fused head; static under jit."""

    loss: LossConfig
    chunk_tokens: int
    """Tokens in a chunk, per device."""
    vocab_size: int
    """Vocabulary entries in use; higher ones are padding in either model."""
    mesh: Mesh
    """Shards rows and vocabulary."""
    transpose_head: bool = False
    """Transpose the student's head once to [D, V]: bfloat16 matmuls on CPU are faster with it."""
    head_trainable: bool = False
    """Compute the gradient of the student's head."""
    listed_only: bool = False
    """Take the divergence over the teacher's entries above NEGATIVE alone, with both models'
    probabilities divided by their sums over these."""
    top_k: int | None = None
    """Entries of each model whose overlap evaluation measures; None: not measured."""

    @property
    def vocab_axis(self) -> str | None:
        """The mesh axis that shards the vocabulary."""
        return "tensor" if self.mesh.shape["tensor"] > 1 else None


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
